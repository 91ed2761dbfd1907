"""A contact sheet: what a data set looks like, one row a class."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .base import FaceDataset
from .image import ImageError
from .labels import UNLABELLED
from .transforms import resize


def preview(
    dataset: FaceDataset,
    path: str | Path | None = None,
    *,
    columns: int = 10,
    side: int = 96,
    seed: int = 0,
) -> Image.Image:
    """Draws ``columns`` random images of each class, named and counted, and writes them to ``path`` if given.

    Images are shown without the data set's transform. Those that cannot be read are left out.
    """
    if columns < 1 or side < 8:
        raise ValueError(f"preview: columns = {columns}, side = {side}, expected columns >= 1 and side >= 8")
    rows = [(name, label) for label, name in enumerate(dataset.classes)]
    if UNLABELLED in dataset.labels:
        rows.append(("without label", UNLABELLED))
    margin, gap = 120, 2
    sheet = Image.new("RGB", (margin + columns * (side + gap), len(rows) * (side + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default()
    generator = torch.Generator().manual_seed(seed)
    for row, (name, label) in enumerate(rows):
        top = row * (side + gap)
        members = [index for index, other in enumerate(dataset.labels) if other == label]
        draw.text((6, top + side // 2 - 12), f"{name}\n{len(members):,}", "black", font)
        order = torch.randperm(len(members), generator=generator).tolist()
        column = 0
        for place in order:
            if column == columns:
                break
            try:
                image = dataset.load(dataset.records[members[place]])
            except ImageError:
                continue
            sheet.paste(_thumbnail(image, side), (margin + column * (side + gap), top))
            column += 1
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
    return sheet


def _thumbnail(image: Tensor, side: int) -> Image.Image:
    scale = side / max(image.shape[1:])
    height, width = (max(1, round(n * scale)) for n in image.shape[1:])
    small = resize(image, height, width)
    return Image.fromarray(small.permute(1, 2, 0).numpy())
