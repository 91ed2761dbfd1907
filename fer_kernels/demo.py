"""``python -m fer_kernels.demo``: the graph of a picture, built, timed and drawn.

Cuts a picture into 14 x 14 patches, builds their dilated nearest-neighbour graph, times this
package against the plain PyTorch way in the same process, and draws one patch with its neighbours.

Examples:
    python -m fer_kernels.demo
    python -m fer_kernels.demo --image me.jpg --patch 5,9 --out graph.png
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import fer_kernels

GRID, PATCH = 14, 16
SIDE = GRID * PATCH


def draw_face() -> np.ndarray:
    """A face of ellipses, (224, 224, 3) uint8: enough to see which patches are alike."""
    rows, columns = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    picture = np.empty((SIDE, SIDE, 3))
    picture[:] = [0.42, 0.52, 0.62]

    def ellipse(centre: tuple[float, float], radii: tuple[float, float], colour: list[float]) -> None:
        inside = ((rows - centre[0]) / radii[0]) ** 2 + ((columns - centre[1]) / radii[1]) ** 2
        weight = np.clip((1.08 - inside) / 0.16, 0, 1)[..., None]
        picture[:] = picture * (1 - weight) + np.array(colour) * weight

    ellipse((0.42, 0.5), (0.40, 0.34), [0.25, 0.16, 0.10])  # hair
    ellipse((0.53, 0.5), (0.38, 0.29), [0.87, 0.68, 0.56])  # skin
    for x in (0.38, 0.62):
        ellipse((0.36, x), (0.018, 0.08), [0.28, 0.18, 0.12])  # brow
        ellipse((0.45, x), (0.040, 0.065), [0.97, 0.97, 0.96])
        ellipse((0.45, x), (0.032, 0.032), [0.20, 0.33, 0.42])
        ellipse((0.63, x - 0.03 * np.sign(0.5 - x)), (0.05, 0.05), [0.90, 0.58, 0.52])  # cheek
    ellipse((0.59, 0.5), (0.05, 0.04), [0.80, 0.58, 0.47])
    ellipse((0.74, 0.5), (0.055, 0.13), [0.72, 0.27, 0.28])
    ellipse((0.725, 0.5), (0.022, 0.10), [0.98, 0.97, 0.95])
    grain = np.random.default_rng(0).normal(0, 0.015, picture.shape)
    return (np.clip(picture + grain, 0, 1) * 255).astype(np.uint8)


def read_picture(path: Path) -> np.ndarray:
    """The middle square of a picture file as (224, 224, 3) uint8."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (SIDE, SIDE)))
    except FileNotFoundError:
        sys.exit(f"demo: no such file: {path}")
    except (UnidentifiedImageError, OSError) as error:
        sys.exit(f"demo: {path} cannot be read as a picture: {error}")


def patch_features(picture: np.ndarray) -> Tensor:
    """(1, 196, 48): every patch as 4 x 4 mean colours, relative to the picture's mean."""
    cells = torch.from_numpy(picture.copy()).float().reshape(GRID, 4, 4, GRID, 4, 4, 3).mean((2, 5)) / 255
    return (cells - cells.mean((0, 1, 2, 3))).transpose(1, 2).reshape(1, GRID * GRID, -1)


def eager_knn(x: Tensor, k: int, dilation: int) -> Tensor:
    """The way vision graph networks usually build their graph."""
    x = torch.nn.functional.normalize(x, dim=-1)
    square = (x * x).sum(-1, keepdim=True)
    distance = square - 2 * x @ x.mT + square.mT
    return torch.topk(-distance, k * dilation).indices[..., ::dilation]


def milliseconds(*calls: Callable[[], object], seconds: float = 2.0) -> list[float]:
    """Median time of each, taken in turns so that a disturbance meets all alike."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times[0]) < 5:
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in times]


def draw_graph(picture: np.ndarray, idx: Tensor, patch: int, title: str):
    """The picture, enlarged, with `patch` framed and joined to its neighbours, nearest brightest."""
    from PIL import Image, ImageDraw

    zoom = 2
    image = Image.fromarray(picture // 2 + 48).resize((SIDE * zoom, SIDE * zoom), Image.Resampling.LANCZOS)
    clear = Image.fromarray(picture).resize(image.size, Image.Resampling.LANCZOS)
    neighbours = [j for j in idx.tolist() if j != patch]

    def box(j: int) -> tuple[int, int, int, int]:
        row, column = divmod(j, GRID)
        size = PATCH * zoom
        return column * size, row * size, (column + 1) * size - 1, (row + 1) * size - 1

    def centre(j: int) -> tuple[float, float]:
        left, top, right, bottom = box(j)
        return (left + right) / 2, (top + bottom) / 2

    for j in [patch, *neighbours]:
        image.paste(clear.crop(box(j)), box(j)[:2])
    draw = ImageDraw.Draw(image)
    for order, j in enumerate(neighbours):
        shade = int(255 - 130 * order / max(len(neighbours) - 1, 1))
        draw.line([centre(patch), centre(j)], fill=(shade, shade, 60), width=2)
        draw.rectangle(box(j), outline=(shade, shade, 60), width=3)
    draw.rectangle(box(patch), outline=(230, 40, 40), width=4)
    framed = Image.new("RGB", (image.width, image.height + 26), (250, 250, 250))
    framed.paste(image, (0, 26))
    ImageDraw.Draw(framed).text((6, 6), title, fill=(20, 20, 20))
    return framed


def parse_patch(text: str) -> int:
    try:
        row, column = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected ROW,COLUMN such as 10,5, got {text!r}") from None
    if not (0 <= row < GRID and 0 <= column < GRID):
        raise argparse.ArgumentTypeError(f"ROW and COLUMN must lie in 0..{GRID - 1}, got {text}")
    return row * GRID + column


def between(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isdecimal() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"expected a number from {low} to {high}, got {text!r}")
        return int(text)

    return parse


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fer_kernels.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--image", type=Path, help="a picture file (default: a drawn face)")
    parser.add_argument(
        "--patch",
        type=parse_patch,
        default="10,5",
        metavar="ROW,COLUMN",
        help="default: 10,5, a corner of the mouth",
    )
    parser.add_argument("--out", type=Path, default=Path("fer_demo.png"), help="default: fer_demo.png")
    parser.add_argument("-k", type=between(1, 64), default=9, help="neighbours a patch, 1 to 64 (default: 9)")
    parser.add_argument(
        "--batch",
        type=between(1, 1024),
        default=32,
        help="pictures a batch in the timing, 1 to 1024 (default: 32)",
    )
    arguments = parser.parse_args(argv)
    try:
        from PIL import Image
    except ImportError:
        sys.exit("demo: pictures need Pillow: pip install pillow")

    picture = read_picture(arguments.image) if arguments.image else draw_face()
    nodes = patch_features(picture)
    panels = []
    for dilation in (1, 2):
        try:
            idx = fer_kernels.dilated_knn(nodes, k=arguments.k, dilation=dilation)
        except (ValueError, RuntimeError) as error:  # FER_KERNELS_BACKEND names one that cannot run here
            sys.exit(f"demo: {error}")
        nearest = "the nearest" if dilation == 1 else f"every second of the {2 * arguments.k} nearest"
        title = f"a patch (red) and its {arguments.k} neighbours: {nearest}"
        panels.append(draw_graph(picture, idx[0, arguments.patch], arguments.patch, title))
    sheet = Image.new("RGB", (sum(p.width for p in panels) + 8, panels[0].height), (250, 250, 250))
    sheet.paste(panels[0], (0, 0))
    sheet.paste(panels[1], (panels[0].width + 8, 0))
    try:
        sheet.save(arguments.out)
    except (OSError, ValueError) as error:
        sys.exit(f"demo: cannot write {arguments.out}: {error}")

    x = torch.randn(arguments.batch, GRID * GRID, 192)
    backends = [b for b in fer_kernels.available_backends("knn") if b in ("reference", "cpu")]
    calls: list[Callable[[], object]] = [lambda: eager_knn(x, arguments.k, 2)]
    calls += [
        partial(fer_kernels.dilated_knn, x, k=arguments.k, dilation=2, backend=backend)
        for backend in backends
    ]
    times = milliseconds(*calls)
    print(
        f"graph of {arguments.batch} pictures of {GRID * GRID} patches, 192 channels, "
        f"k={arguments.k}, dilation=2,"
    )
    print(f"on {torch.get_num_threads()} thread(s):")
    for name, taken in zip(["plain PyTorch", *(f"fer_kernels {b}" for b in backends)], times, strict=True):
        print(f"  {name:24} {taken:8.2f} ms   {times[0] / taken:5.1f}x")
    print(f"one patch and its neighbours: {arguments.out.resolve()}")


if __name__ == "__main__":
    main()
