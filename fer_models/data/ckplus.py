"""CK+: sequences from a neutral face to the peak of an expression."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from .base import FaceDataset, Record, peak_frames
from .source import DataError

CODES = {
    0: "neutral", 1: "anger", 2: "contempt", 3: "disgust", 4: "fear", 5: "happy", 6: "sad", 7: "surprise",
}  # fmt: skip


class CKPlus(FaceDataset):
    """The labelled sequences of CK+ (327 of 593): the last frames, and with ``neutral`` the first too.

    Layout::

        cohn-kanade-images/S010/004/S010_004_00000017.png
        Emotion/S010/004/S010_004_00000019_emotion.txt         one number, such as 6.0000000e+00

    Labels: 0 neutral, 1 anger, 2 contempt, 3 disgust, 4 fear, 5 happy, 6 sad, 7 surprise. There is no
    official split: ``all``, or ten folds by subject.
    """

    name = "ckplus"
    splits = ("all", "train", "valid")
    by_subject = True
    default_classes = 8
    layout: ClassVar[Mapping[str, str]] = {
        "cohn-kanade-images": "the frames, by subject and sequence",
        "Emotion": "the labels, likewise",
    }

    def __init__(
        self,
        root: str | Path,
        split: str = "all",
        *,
        frames: int = 3,
        neutral: bool = False,
        **options: Any,
    ):
        self.frames, self.neutral = frames, neutral
        super().__init__(root, split, **options)

    def read_records(self) -> list[Record]:
        images, emotions = self.require("cohn-kanade-images"), self.require("Emotion")
        records = []
        for subject in self.source.folders(emotions):
            for sequence in self.source.folders(f"{emotions}/{subject}"):
                files = self.source.files(f"{emotions}/{subject}/{sequence}", ("_emotion.txt",))
                if not files:
                    continue  # not labelled, as 266 are
                name = f"{emotions}/{subject}/{sequence}/{files[-1]}"
                folder = f"{images}/{subject}/{sequence}"
                names = [f"{folder}/{file}" for file in self.source.files(folder)]
                if not names:
                    raise DataError(f"{self.where}/{folder}: no frames, yet {name} labels the sequence")
                text = self.source.read_text(name).strip()
                try:
                    code: Any = float(text)
                except ValueError:
                    code = text
                label = self.label_of(code, CODES, name)
                records += peak_frames(names, label, subject, self.frames, self.neutral)
        return records
