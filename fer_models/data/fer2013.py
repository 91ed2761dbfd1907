"""FER2013: 35,887 gray faces of 48 x 48 pixels in one csv file."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .base import FaceDataset, Record
from .image import ImageError
from .source import DataError

CODES = {0: "anger", 1: "disgust", 2: "fear", 3: "happy", 4: "sad", 5: "surprise", 6: "neutral"}
USAGES = {"train": "Training", "valid": "PublicTest", "test": "PrivateTest"}
SIDE = 48


class FER2013(FaceDataset):
    """FER2013 as the challenge gave it out; published results are on ``test``.

    Layout::

        fer2013.csv    emotion,pixels,Usage
                       0,70 80 82 ... (48 x 48 numbers),Training      or PublicTest, PrivateTest

    emotion: 0 anger, 1 disgust, 2 fear, 3 happy, 4 sad, 5 surprise, 6 neutral. The pixels of the split stay
    in memory, 2 KB an image.
    """

    name = "fer2013"
    splits = ("train", "valid", "test")
    evaluation_split = "test"
    layout: ClassVar[Mapping[str, str]] = {"fer2013.csv": "columns emotion,pixels,Usage"}

    def __init__(self, root: str | Path, split: str = "train", **options: Any):
        self.pixels: dict[str, np.ndarray] = {}
        super().__init__(root, split, **options)

    def read_records(self) -> list[Record]:
        self.require("fer2013.csv")
        records = []
        for line, (code, pixels) in read_pixels(self, USAGES[self.split]).items():
            image = f"fer2013.csv line {line}"
            self.pixels[image] = pixels
            label = self.label_of(int(code) if code.isdigit() else code, CODES, image)
            records.append(Record(image, label))
        return records

    def has_image(self, record: Record) -> bool:
        return record.image in self.pixels

    def load(self, record: Record) -> Tensor:
        return gray_to_rgb(self.pixels[record.image])


def read_pixels(dataset: FaceDataset, usage: str) -> dict[int, tuple[str, np.ndarray]]:
    """Emotion code and pixels by line of fer2013.csv; a row of the wrong length comes back empty."""
    name = dataset.require("fer2013.csv")
    rows = {}
    with dataset.source.open_text(name) as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if header != ["emotion", "pixels", "Usage"]:
            raise DataError(
                f"{dataset.where}/{name}: the columns are {','.join(header)[:60]!r}, "
                "expected 'emotion,pixels,Usage'"
            )
        for line, row in enumerate(reader, 2):
            if not row:
                continue
            if len(row) != 3 or row[2] not in USAGES.values():
                raise DataError(
                    f"{dataset.where}/{name} line {line}: {len(row)} columns ending in {row[-1][:20]!r}, "
                    f"expected emotion,pixels and {' or '.join(USAGES.values())}"
                )
            if row[2] == usage:
                rows[line] = (row[0], parse_pixels(row[1]))
    return rows


def parse_pixels(text: str) -> np.ndarray:
    """Numbers between spaces as uint8 (48, 48), or an empty array where they are anything else."""
    try:
        values = np.array(text.split(), dtype=np.uint8)
    except (ValueError, OverflowError):
        values = np.empty(0, np.uint8)
    return values.reshape(SIDE, SIDE) if values.size == SIDE * SIDE else np.empty(0, np.uint8)


def gray_to_rgb(pixels: np.ndarray) -> Tensor:
    if pixels.size == 0:
        raise ImageError(f"pixels are not {SIDE} x {SIDE} numbers from 0 to 255")
    return torch.from_numpy(pixels).expand(3, SIDE, SIDE).contiguous()
