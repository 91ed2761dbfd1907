"""RAF-DB, the part with the seven basic emotions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from .base import FaceDataset, Record
from .source import DataError

CODES = {1: "surprise", 2: "fear", 3: "disgust", 4: "happy", 5: "sad", 6: "anger", 7: "neutral"}


class RAFDB(FaceDataset):
    """RAF-DB basic: 12,271 images to train on and 3,068 to test; published results are on ``test``.

    Layout::

        basic/EmoLabel/list_patition_label.txt       train_00001.jpg 5      (the misspelling is official)
        basic/Image/aligned/train_00001_aligned.jpg
        basic/Image/original/train_00001.jpg         with aligned=False

    Labels: 1 surprise, 2 fear, 3 disgust, 4 happy, 5 sad, 6 anger, 7 neutral.
    """

    name = "rafdb"
    splits = ("train", "test")
    evaluation_split = "test"
    layout: ClassVar[Mapping[str, str]] = {
        "EmoLabel/list_patition_label.txt": "one 'train_00001.jpg 5' a line",
        "Image/aligned": "train_00001_aligned.jpg, test_0001_aligned.jpg, ...",
    }

    def __init__(self, root: str | Path, split: str = "train", *, aligned: bool = True, **options: Any):
        self.aligned = aligned
        super().__init__(root, split, **options)

    def read_records(self) -> list[Record]:
        labels = self.require("EmoLabel/list_patition_label.txt")
        folder = (
            self.require("Image/aligned") if self.aligned else self.require("Image/original", "the photos")
        )
        records = []
        for line, text in enumerate(self.source.read_text(labels).splitlines(), 1):
            parts = text.split()
            if not parts:
                continue
            if len(parts) != 2 or not parts[0].startswith(("train_", "test_")):
                raise DataError(
                    f"{self.where}/{labels} line {line}: {text[:60]!r}, "
                    "expected a name that starts with train_ or test_ and a label"
                )
            image, code = parts
            label = self.label_of(int(code) if code.isdigit() else code, CODES, f"{labels} line {line}")
            if image.startswith(f"{self.split}_"):
                if self.aligned:
                    stem, _, suffix = image.rpartition(".")
                    image = f"{stem}_aligned.{suffix}"
                records.append(Record(f"{folder}/{image}", label))
        return records
