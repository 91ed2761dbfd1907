"""Aff-Wild2: frames of videos with an expression, or valence and arousal, or both."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from .base import FaceDataset, Record
from .labels import EMOTIONS, UNLABELLED, emotion_index
from .source import DataError

_SETS = {"train": ("Train_Set", "Training_Set"), "valid": ("Validation_Set",)}
_FOLDERS = {
    "expr": ("EXPR_Classification_Challenge", "EXPR_Set"),
    "va": ("VA_Estimation_Challenge", "VA_Set"),
}


class AffWild2(FaceDataset):
    """Aff-Wild2 in the layouts of ABAW 1 and 2, and 3 and later; results are on ``valid``.

    Layout::

        EXPR_Set/Train_Set/<video>.txt        or EXPR_Classification_Challenge/...; Validation_Set
            Neutral,Anger,Disgust,Fear,Happiness,Sadness,Surprise[,Other]   a number a frame, -1 invalid
        VA_Set/Train_Set/<video>.txt          or VA_Estimation_Challenge/...
            valence,arousal                                                  two numbers a frame, -5 invalid
        cropped_aligned/<video>/00001.jpg     line n below the header is frame n

    ``task="expr"`` gives the frames with an expression, and their valence and arousal where that list has the
    video too; ``task="va"`` the frames with both numbers, UNLABELLED where no expression is known.
    ``other`` says what becomes of the class Other: ``"drop"`` leaves its frames out, ``"class"`` makes it the
    eighth class (called other). ``stride`` takes each n-th frame. Frames that the face detector lost have no
    image and are left out; a video without any image is put down in ``notes``. The video (with its ``_left``
    or ``_right``) is the subject.
    """

    name = "affwild2"
    layout: ClassVar[Mapping[str, str]] = {
        "EXPR_Set": "expressions (ABAW 1 and 2), or EXPR_Classification_Challenge",
        "EXPR_Classification_Challenge": "expressions (ABAW 3 and later)",
        "VA_Set": "valence and arousal (ABAW 1 and 2), or VA_Estimation_Challenge",
        "VA_Estimation_Challenge": "valence and arousal (ABAW 3 and later)",
        "cropped_aligned": "one folder of frames a video",
    }

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        task: str = "expr",
        other: str = "drop",
        stride: int = 1,
        **options: Any,
    ):
        self.choose("task", task, ("expr", "va"))
        self.choose("other", other, ("drop", "class"))
        if stride < 1:
            raise ValueError(f"AffWild2: stride = {stride}, expected 1 or more")
        if other == "class" and options.setdefault("classes", 8) != 8:
            raise ValueError("AffWild2: other = 'class' makes eight classes")
        self.task, self.other, self.stride = task, other, stride
        super().__init__(root, split, **options)
        if other == "class":
            self.classes = (*EMOTIONS[:7], "other")

    def read_records(self) -> list[Record]:
        folders = {task: self._find_set(task) for task in ("expr", "va")}
        frames = self.require("cropped_aligned")
        labels = folders[self.task]
        if labels is None:
            names = " or ".join(f"{folder}/{_SETS[self.split][0]}" for folder in _FOLDERS[self.task])
            raise DataError(f"{self.where}: {names} is missing (one .txt a video)")
        records: list[Record] = []
        for file in self.source.files(labels, (".txt",)):
            video = file.removesuffix(".txt")
            images = {Path(name).stem: name for name in self.source.files(f"{frames}/{video}")}
            if not images:
                self.notes.append(f"video {video} has labels but no frames in {frames}")
                continue
            lists = {}
            for task, folder in folders.items():
                name = f"{folder}/{file}"
                lists[task] = (
                    self._read(name, task) if folder is not None and self.source.exists(name) else []
                )
            count = len(lists[self.task])
            for frame in range(0, count, self.stride):
                image = images.get(f"{frame + 1:05d}")
                label = lists["expr"][frame] if frame < len(lists["expr"]) else UNLABELLED
                pair = lists["va"][frame] if frame < len(lists["va"]) else (math.nan, math.nan)
                if image is None or (label == UNLABELLED if self.task == "expr" else math.isnan(sum(pair))):
                    continue
                records.append(Record(f"{frames}/{video}/{image}", label, None, pair[0], pair[1], video))
        if not records and self.notes:
            raise DataError(f"{self.where}: no frames; {self.notes[0]}")
        return records

    def _find_set(self, task: str) -> str | None:
        for folder in _FOLDERS[task]:
            for name in _SETS[self.split]:
                found = self.source.find(f"{folder}/{name}")
                if found is not None:
                    return found
        return None

    def _read(self, name: str, task: str) -> list[Any]:
        header, *lines = self.source.read_text(name).strip().splitlines() or [""]
        columns = [column.strip() for column in header.split(",")]
        if task == "va":
            if [column.lower() for column in columns] != ["valence", "arousal"]:
                raise DataError(f"{self.where}/{name}: header {header[:60]!r}, expected 'valence,arousal'")
            return [self._pair(line, f"{name} line {n}") for n, line in enumerate(lines, 2)]
        try:
            if len(columns) < 7:
                raise ValueError
            codes = [UNLABELLED if c == "Other" else emotion_index(c) for c in columns]
        except ValueError:
            raise DataError(
                f"{self.where}/{name}: header {header[:80]!r}, "
                "expected the names of the expressions, Neutral,Anger,Disgust,..."
            ) from None
        if self.other == "class":
            codes = [7 if c == UNLABELLED else c for c in codes]
        known = {str(code): label for code, label in enumerate(codes)} | {"-1": UNLABELLED}
        for n, line in enumerate(lines, 2):
            if line.strip() not in known:
                raise DataError(
                    f"{self.where}/{name} line {n}: label {line.strip()[:20]!r} is out of range, "
                    f"expected -1 to {len(codes) - 1}"
                )
        return [known[line.strip()] for line in lines]

    def _pair(self, line: str, where: str) -> tuple[float, float]:
        try:
            valence, arousal = (float(cell) for cell in line.split(","))
        except ValueError:
            raise DataError(f"{self.where}/{where}: {line[:40]!r}, expected two numbers") from None
        if -5 in (valence, arousal):
            return math.nan, math.nan
        if not (-1 <= valence <= 1 and -1 <= arousal <= 1):
            raise DataError(f"{self.where}/{where}: {line[:40]!r}, expected numbers from -1 to 1, or -5")
        return valence, arousal
