"""SFEW 2.0: faces from films."""

from collections.abc import Mapping
from typing import ClassVar

from .base import FaceDataset, Record
from .source import DataError

CODES = {
    "Neutral": "neutral", "Happy": "happy", "Sad": "sad", "Surprise": "surprise", "Fear": "fear",
    "Disgust": "disgust", "Angry": "anger",
}  # fmt: skip


class SFEW(FaceDataset):
    """SFEW 2.0, aligned faces: 958 to train on and 436 in ``valid``, where results are (no test labels).

    Layout::

        Train/Train_Aligned_Faces/Angry/Airheads_000519240_00000005.png
        Val/Val_Aligned_Faces/...            or Val_Aligned_Faces_new, as in its archive

    Folders: Neutral, Happy, Sad, Surprise, Fear, Disgust, Angry. The film is the subject.
    """

    name = "sfew"
    layout: ClassVar[Mapping[str, str]] = {
        "Train_Aligned_Faces": "one folder a class",
        "Val_Aligned_Faces*": "one folder a class",
    }

    def read_records(self) -> list[Record]:
        base = self.require("Train_Aligned_Faces" if self.split == "train" else "Val_Aligned_Faces*")
        # Its archives may hold a folder of the same name, or be that folder
        while (below := self.source.folders(base)) and not set(below) & set(CODES):
            base = f"{base}/{below[0]}"
        records = []
        for emotion in self.source.folders(base):
            label = self.label_of(emotion, CODES, f"{base}/{emotion}")
            for file in self.source.files(f"{base}/{emotion}"):
                records.append(Record(f"{base}/{emotion}/{file}", label, subject=file.rsplit("_", 2)[0]))
        if not records:
            raise DataError(f"{self.where}/{base}: no images in folders {', '.join(CODES)}")
        return records
