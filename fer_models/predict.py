"""From pictures to expressions: images, folders and videos through a trained model.

    from fer_models import Predictor
    predictor = Predictor()  # weights that come with the package; or a run folder of `fer train`
    print(predictor("face.jpg")[0].label)

Colours are RGB. OpenCV's arrays are BGR: passed as they are they raise no error, for nothing in them tells;
the symptom is that skin looks blue in `fer explain`'s picture and probabilities are off by some percent. Turn
them around first: `image[..., ::-1]`.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from fer_kernels.checks import a_choice

from .data.base import crop
from .data.image import ImageError, decode_image, pil_pixels
from .data.labels import class_names, nearest
from .data.source import DataError
from .data.transforms import eval_transform
from .registry import list_models, shipped_weights
from .train.checkpoint import BEST, load_checkpoint
from .train.distributed import pick_device
from .train.evaluate import input_side, wants_imagenet, whole_output

DEFAULT = "face2nodes_xs"
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
DETECTORS = ("opencv",)
SLACK = 1e-3  # by which floats in [0, 1] may exceed it, as resizing's do
FACES = ("largest", "all")
_WHOLE, _NO_FACE = "taken as a face crop", "no face found"
_INSTALL = 'needs OpenCV: pip install "opencv-python-headless>=4.8,<5"'


@dataclass(frozen=True, eq=False)
class FERResult:
    """What the model sees in one face.

    Attributes:
        label: the likeliest expression.
        probabilities: of every class, by its name.
        valence, arousal: in [-1, 1], or None where the model has no such output.
        embedding: what the classifier reads, float32 (num_features,).
        box: (left, top, width, height) in pixels where a detector found the face, else None.
        image: the position of its image in what was asked.
        note: how the face was come by.
    """

    label: str
    probabilities: dict[str, float]
    valence: float | None
    arousal: float | None
    embedding: NDArray[np.float32]
    box: tuple[int, int, int, int] | None
    image: int
    note: str


class Predictor:
    """
    Args:
        model: a model, which moves to the device and goes into evaluation mode; a checkpoint or run folder of
            `fer train`; or the name of a model that is shipped with weights, with or without their tag:
            "face2nodes_xs", "face2nodes_xs.ferplus".
        device: "auto", "cpu", "cuda" or "cuda:N".
        detector: None takes every image as a face crop; "opencv" looks for faces first (frontal ones, with
            the cascade that comes with OpenCV: `pip install "opencv-python-headless<5"`).
        faces: with a detector, "largest" or "all" of an image's faces.
        classes: the names of the model's classes; None takes the checkpoint's, or else the usual order.
        size: pixels a side of what the model sees; None takes the checkpoint's or the model's.
        flip: the mean over an image and its mirror image.
        batch_size: images that go through the model at once.
    """

    def __init__(
        self,
        model: nn.Module | str | os.PathLike = DEFAULT,
        device: str = "auto",
        *,
        detector: str | None = None,
        faces: str = "largest",
        classes: Sequence[str] | None = None,
        size: int | None = None,
        flip: bool = False,
        batch_size: int = 64,
    ) -> None:
        a_choice("Predictor", "detector", detector, (None, *DETECTORS))
        a_choice("Predictor", "faces", faces, FACES)
        if batch_size < 1:
            raise ValueError(f"Predictor: batch_size must be at least 1, got {batch_size}")
        about: dict[str, Any] = {}
        if not isinstance(model, nn.Module):
            model, about = load_checkpoint(weights_file(model))
        self.device = pick_device(device)
        self.model = model.to(self.device).eval()
        self.size = int(size or about.get("size") or input_side(model))
        self.transform = eval_transform(self.size, imagenet=wants_imagenet(model))
        self.detect = None if detector is None else _opencv_detector()
        self.faces, self.flip, self.batch_size = faces, flip, batch_size
        if self.size < 1:
            raise ValueError(f"Predictor: size must be at least 1, got {size}")
        if getattr(model, "num_classes", None) == 0:
            raise ValueError("Predictor: the model has no classifier (num_classes = 0)")
        blank = self.transform(torch.zeros(3, self.size, self.size, dtype=torch.uint8))
        count = self._run([blank])[0].shape[1]
        known = classes or about.get("classes") or getattr(getattr(model, "head", None), "labels", None)
        self.classes = tuple(known or class_names(count))
        if len(self.classes) != count or len(set(self.classes)) != count:
            raise ValueError(
                f"Predictor: the model has {count} classes, got the names {', '.join(self.classes)}"
            )

    def __call__(self, images: Any) -> list[FERResult]:
        """
        Args:
            images: a path, a PIL image, an array (H, W, 3) or (H, W), a tensor (3, H, W), a list of any of
                these, or an array (B, H, W, 3) or tensor (B, 3, H, W). RGB; uint8, or floats in [0, 1] or in
                [0, 255].

        Returns:
            A result a face, in the order of the images; with `faces="all"` an image may have several.
            An image that cannot be used, or has no face where a detector looks for one, is an error that
            says which.
        """

        def usable() -> Iterator[tuple[int, Tensor]]:
            for position, image in enumerate(_listed(images)):
                try:
                    yield position, to_pixels(image)
                except (DataError, ValueError, TypeError) as error:
                    raise type(error)(f"Predictor: image {position}: {error}") from None

        faceless: list[int] = []
        results = list(self._results(usable(), faceless))
        if faceless:
            raise ImageError(
                f"Predictor: image {faceless[0]}: {_NO_FACE}; without a detector it is taken as it is"
            )
        return results

    def rows(self, path: str | os.PathLike, *, every: int = 1, progress: bool = True) -> list[dict[str, Any]]:
        """A row a face of an image, of a folder's images (and its folders'), or of a video's frames.

        An image that cannot be used, or has no face where a detector looks for one, has a row of its own,
        with the reason under "error".

        Args:
            every: of a video, take each frame of this number.
            progress: show a bar.
        """
        if every < 1:
            raise ValueError(f"Predictor: every must be at least 1, got {every}")
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"Predictor: {path} does not exist")
        total, images = _video(path, every) if path.suffix.lower() in VIDEOS else _folder(path)
        names: list[dict[str, Any]] = []
        failed: dict[int, str] = {}

        def usable() -> Iterator[tuple[int, Tensor]]:
            for name, image in tqdm(images, total=total, desc=path.name, unit="image", disable=not progress):
                names.append(name)
                if isinstance(image, Tensor):
                    yield len(names) - 1, image
                else:
                    failed[len(names) - 1] = str(image)

        found: dict[int, list[FERResult]] = {}
        faceless: list[int] = []
        for result in self._results(usable(), faceless):
            found.setdefault(result.image, []).append(result)
        failed |= dict.fromkeys(faceless, _NO_FACE)
        rows = []
        for position, name in enumerate(names):
            if position in failed:
                rows.append(self.no_result(name, failed[position]))
            rows += [{**name, **self._columns(result), "error": ""} for result in found.get(position, [])]
        return rows

    def no_result(self, name: dict[str, Any], error: str) -> dict[str, Any]:
        """The row of what cannot be used."""
        return {**name, **self._columns(None), "error": error}

    def table(self, path: str | os.PathLike, *, every: int = 1, progress: bool = True) -> Any:
        """`rows` as a pandas table."""
        import pandas

        return pandas.DataFrame(self.rows(path, every=every, progress=progress))

    def _columns(self, result: FERResult | None) -> dict[str, Any]:
        box: Sequence[int | None] = (None,) * 4
        if result is not None and result.box is not None:
            box = result.box
        return {
            "label": result.label if result else "",
            **{name: round(result.probabilities[name], 6) if result else None for name in self.classes},
            "valence": result.valence if result else None,
            "arousal": result.arousal if result else None,
            **dict(zip(("left", "top", "width", "height"), box, strict=True)),
            "note": result.note if result else "",
        }

    def _results(self, images: Iterable[tuple[int, Tensor]], faceless: list[int]) -> Iterator[FERResult]:
        """Faces are gathered to batches over images, so that a face a frame is no batch of one. `faceless`
        takes the positions of images without one."""
        waiting: list[tuple[Tensor, FERResult]] = []
        for position, image in images:
            boxes = self._boxes(image)
            if not boxes:
                faceless.append(position)
            for box, note in boxes:
                blank = FERResult("", {}, None, None, np.empty(0, np.float32), box, position, note)
                waiting.append((self.transform(crop(image, box)), blank))
                if len(waiting) == self.batch_size:
                    yield from self._batch(waiting)
                    waiting = []
        if waiting:
            yield from self._batch(waiting)

    def _boxes(self, image: Tensor) -> list[tuple[tuple[int, int, int, int] | None, str]]:
        if self.detect is None:
            return [(None, _WHOLE)]
        boxes = self.detect(image)
        if not boxes:
            return []
        if self.faces == "all":
            return [(box, f"face {i + 1} of {len(boxes)}") for i, box in enumerate(boxes)]
        return [(boxes[0], "the face" if len(boxes) == 1 else f"the largest of {len(boxes)} faces")]

    def _batch(self, waiting: list[tuple[Tensor, FERResult]]) -> Iterator[FERResult]:
        probabilities, affect, embedding = self._run([inputs for inputs, _ in waiting])
        for row, (_, blank) in enumerate(waiting):
            shares = probabilities[row].tolist()
            yield replace(
                blank,
                label=self.classes[int(probabilities[row].argmax())],
                probabilities=dict(zip(self.classes, shares, strict=True)),
                valence=None if affect is None else float(affect[row, 0]),
                arousal=None if affect is None else float(affect[row, 1]),
                embedding=embedding[row].numpy(),
            )

    @torch.inference_mode()
    def _run(self, inputs: list[Tensor]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Probabilities, valence and arousal, and embeddings of transformed images."""
        batch = torch.stack(inputs).to(self.device, next(self.model.parameters()).dtype)
        outputs = [
            whole_output(self.model, view) for view in ([batch, batch.flip(3)] if self.flip else [batch])
        ]

        def mean(tensors: list[Tensor]) -> Tensor:
            return torch.stack([tensor.float() for tensor in tensors]).mean(0).cpu()

        affect = [output.valence_arousal for output in outputs if output.valence_arousal is not None]
        return (
            mean([output.logits.float().softmax(1) for output in outputs]),
            mean(affect).clamp(-1, 1) if affect else None,
            mean([output.embedding for output in outputs]),
        )


def weights_file(which: str | os.PathLike) -> Path:
    """The checkpoint of a path, of a run folder, or of the name of a model shipped with weights."""
    path, text = Path(which), os.fspath(which)
    if (path / BEST).is_file():
        return path / BEST
    name, _, tag = text.partition(".")
    if name in list_models() and (not tag or not path.exists()):
        tags = shipped_weights(name)
        if not tags:
            having = [other for other in list_models() if shipped_weights(other)]
            raise ValueError(
                f"no weights of {name} come with this installation; "
                + (f"there are some of {', '.join(having)}; " if having else "")
                + "name a checkpoint or the run folder of `fer train` as the model"
            )
        if tag and tag not in tags:
            raise ValueError(
                f"unknown weights {tag!r} of {name}: expected one of {', '.join(tags)}"
                + nearest(tag, list(tags))
            )
        return tags[tag or next(iter(tags))]
    if path.is_dir():
        runs = sorted(run.parent.name for run in path.glob(f"*/{BEST}"))
        held = f"; it holds the runs {', '.join(runs[:5])}" if runs else ""
        raise ValueError(f"{path} is no run folder: it has no {BEST}{held}")
    if not path.exists() and path.suffix != ".safetensors" and os.sep not in text:
        shipped = [
            f"{model}.{tag}" for model in list_models(pretrained=True) for tag in shipped_weights(model)
        ]
        raise ValueError(
            f"neither a file nor a model: {text!r}"
            + nearest(name, list_models())
            + (f"; weights are shipped of {', '.join(shipped)}" if shipped else "")
        )
    return path


def to_pixels(image: Any) -> Tensor:
    """Any of the images `Predictor` takes, as uint8 (3, H, W)."""
    if isinstance(image, (str, os.PathLike)):
        path = Path(image)
        if path.is_dir():
            raise ImageError(f"{path} is a folder, and this takes images (`rows` takes folders)")
        if not path.is_file():
            raise ImageError(f"{path}: no such file")
        try:
            return decode_image(path.read_bytes())
        except (ImageError, OSError) as error:
            raise ImageError(f"{path}: {error}") from None
    if isinstance(image, Image.Image):
        try:
            return pil_pixels(image)
        except OSError as error:
            raise ImageError(f"damaged image ({error})") from None
    if isinstance(image, np.ndarray):
        if image.ndim == 2:
            image = np.repeat(image[:, :, None], 3, axis=2)
        if image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"an array must be (H, W, 3) or (H, W), got {image.shape}")
        image = np.ascontiguousarray(image)
        # torch warns of arrays that it could not write to, as PIL's are
        image = torch.from_numpy(image if image.flags.writeable else image.copy()).permute(2, 0, 1)
    if not isinstance(image, Tensor):
        raise TypeError(f"expected a path, a PIL image, an array or a tensor, got {type(image).__name__}")
    if image.dim() != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"a tensor must be (3, H, W), got {tuple(image.shape)}")
    if 0 in image.shape:
        raise ValueError(f"an image without pixels: {tuple(image.shape)}")
    return _as_bytes(image.detach().cpu().expand(3, -1, -1)).contiguous()


def _as_bytes(pixels: Tensor) -> Tensor:
    """uint8, where floats are either in [0, 1], but for a rounding, or in [0, 255]."""
    if pixels.dtype == torch.uint8:
        return pixels
    if not pixels.is_floating_point():
        raise TypeError(f"pixels must be uint8 or floating point, got {pixels.dtype}")
    low, high = float(pixels.min()), float(pixels.max())
    known = "floats must lie in [0, 1] or in [0, 255]"
    if not (low >= -SLACK and high <= 255):  # NaN fails both
        raise ValueError(f"{known}, got {low:.4g} to {high:.4g}")
    if 1 + SLACK < high < 2:
        raise ValueError(f"{known}, and {low:.4g} to {high:.4g} could be either; clamp them or pass uint8")
    scale = 1 if high >= 2 else 255
    return (pixels.float() * scale).round().clamp(0, 255).to(torch.uint8)


def _listed(images: Any) -> list[Any]:
    if isinstance(images, (list, tuple)):
        return list(images)
    if isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4:
        batch = torch.from_numpy(images) if isinstance(images, np.ndarray) else images.detach().cpu()
        if batch.is_floating_point() and batch.numel():  # one scale for all of them
            batch = _as_bytes(batch)
        return list(batch.numpy() if isinstance(images, np.ndarray) else batch)
    return [images]


_Named = tuple[dict[str, Any], Tensor | ImageError]  # an image, or why there is none, and its first columns


def _folder(path: Path) -> tuple[int, Iterator[_Named]]:
    """How many, and the images of a folder and the folders within, or the one of a file."""
    files = [path]
    if path.is_dir():
        # Systems keep files of their own beside images, as in ._photo.jpg
        there = [file for file in path.rglob("*") if not file.name.startswith(".")]
        files = sorted(file for file in there if file.suffix.lower() in IMAGES)
        videos = sorted(file for file in there if file.suffix.lower() in VIDEOS)
        if not files:
            raise DataError(
                f"Predictor: {path} has no images ({', '.join(IMAGES)})"
                + (f"; name videos themselves, such as {videos[0]}" if videos else "")
            )
        if videos:
            warnings.warn(
                f"Predictor: {len(videos)} videos in {path} are left out; name them themselves", stacklevel=3
            )

    def image(file: Path) -> Tensor | ImageError:
        try:
            return decode_image(file.read_bytes())
        except (ImageError, OSError) as error:
            return ImageError(str(error))

    return len(files), (
        ({"image": str(file.relative_to(path) if path.is_dir() else file)}, image(file)) for file in files
    )


def _cv2() -> Any:
    try:
        import cv2
    except ImportError:
        raise ValueError(f"Predictor: this {_INSTALL}") from None
    return cv2


def _video(path: Path, every: int) -> tuple[int | None, Iterator[_Named]]:
    """How many as far as is known, and the frames. A video that ends early has a last row that says so."""
    cv2 = _cv2()
    with _silent(cv2):
        capture = cv2.VideoCapture(str(path))
    whole, rate = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), float(capture.get(cv2.CAP_PROP_FPS))
    if not capture.isOpened() or not capture.grab():
        capture.release()
        raise DataError(f"Predictor: {path} is not a video that can be read, or has no frame")

    def name(number: int) -> dict[str, Any]:
        return {"image": path.name, "frame": number, "seconds": round(number / rate, 3) if rate else None}

    def frames() -> Iterator[_Named]:
        number = 0
        try:
            with _silent(cv2):
                while True:
                    if number % every == 0:
                        read, image = capture.retrieve()
                        if not read:
                            break
                        yield name(number), torch.from_numpy(image[:, :, ::-1].copy()).permute(2, 0, 1)
                    number += 1
                    if not capture.grab():
                        break
        finally:
            capture.release()
        if number < whole:
            yield name(number), ImageError(f"the video ends here, and says it has {whole} frames")

    return max(whole, 0) // every or None, frames()


@contextlib.contextmanager
def _silent(cv2: Any) -> Iterator[None]:
    """OpenCV's own remarks on damaged files go to the terminal otherwise."""
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(level)


def _opencv_detector() -> Any:
    """image (3, H, W) to boxes, the largest first."""
    cv2 = _cv2()
    file = (
        Path(getattr(getattr(cv2, "data", None), "haarcascades", "")) / "haarcascade_frontalface_default.xml"
    )
    if not hasattr(cv2, "CascadeClassifier") or not file.is_file():
        raise ValueError(f"Predictor: OpenCV {cv2.__version__} comes without its cascades; this {_INSTALL}")
    cascade = cv2.CascadeClassifier(str(file))

    def detect(image: Tensor) -> list[tuple[int, int, int, int]]:
        gray = cv2.equalizeHist(cv2.cvtColor(image.permute(1, 2, 0).numpy(), cv2.COLOR_RGB2GRAY))
        least = max(24, min(gray.shape) // 12)
        boxes = cascade.detectMultiScale(gray, scaleFactor=1.1, minNeighbors=5, minSize=(least, least))
        found = [(int(left), int(top), int(width), int(height)) for left, top, width, height in boxes]
        return sorted(found, key=lambda box: (-box[2] * box[3], box))

    return detect
