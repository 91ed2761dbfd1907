"""Oulu-CASIA: sequences of 80 people in visible and near infrared light."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from .base import FaceDataset, Record, peak_frames
from .source import DataError

CODES = {
    "Anger": "anger", "Disgust": "disgust", "Fear": "fear", "Happiness": "happy", "Sadness": "sad",
    "Surprise": "surprise", "Surprised": "surprise",
}  # fmt: skip


class OuluCASIA(FaceDataset):
    """Oulu-CASIA NIR-VIS: of each sequence the last frames, and with ``neutral`` the first too.

    Layout::

        OriginalImg/VL/Strong/P012/Anger/000.jpeg      or B_OriginalImg, as in the archive
        PreProcess Img/...                             or C_PreProcess..., with cropped=True

    ``spectrum`` is VL or NI, ``light`` Strong, Weak or Dark; the usual protocol takes VL, Strong, and folds
    by subject. The six classes keep their places in the canonical order; neutral is empty unless asked for.
    """

    name = "oulu_casia"
    splits = ("all", "train", "valid")
    by_subject = True
    layout: ClassVar[Mapping[str, str]] = {
        "*OriginalImg": "the frames, by spectrum, light, subject and emotion"
    }

    def __init__(
        self,
        root: str | Path,
        split: str = "all",
        *,
        spectrum: str = "VL",
        light: str = "Strong",
        cropped: bool = False,
        frames: int = 3,
        neutral: bool = False,
        **options: Any,
    ):
        self.choose("spectrum", spectrum, ("VL", "NI"))
        self.choose("light", light, ("Strong", "Weak", "Dark"))
        self.spectrum, self.light, self.cropped = spectrum, light, cropped
        self.frames, self.neutral = frames, neutral
        super().__init__(root, split, **options)

    def read_records(self) -> list[Record]:
        pattern = "*PreProcess*" if self.cropped else "*OriginalImg"
        base = f"{self.require(pattern, 'the frames')}/{self.spectrum}/{self.light}"
        if not self.source.exists(base):
            raise DataError(f"{self.where}: {base} is missing (the frames, by subject and emotion)")
        records = []
        for subject in self.source.folders(base):
            for emotion in self.source.folders(f"{base}/{subject}"):
                folder = f"{base}/{subject}/{emotion}"
                label = self.label_of(emotion, CODES, folder)
                names = [f"{folder}/{file}" for file in self.source.files(folder)]
                if not names:
                    self.notes.append(f"{folder} holds no frames")
                    continue
                records += peak_frames(names, label, subject, self.frames, self.neutral)
        return records
