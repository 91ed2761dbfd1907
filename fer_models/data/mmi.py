"""MMI: sessions of posed expressions, from neutral over the peak and back."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from .base import FaceDataset, Record
from .labels import EMOTIONS
from .source import DataError

CODES = {1: "anger", 2: "disgust", 3: "fear", 4: "happy", 5: "sad", 6: "surprise"}
_EMOTION = re.compile(r"""Name\s*=\s*["']Emotion["']\s+Value\s*=\s*["']([^"']*)["']""")
_SUBJECT = re.compile(r"(S\d+)")


class MMI(FaceDataset):
    """MMI's sessions with a basic emotion: the frames in the middle, and with ``neutral`` the first too.

    Layout::

        Sessions/1746/S031-001.xml         holds <Metatag Name="Emotion" Value="4"/>
        Sessions/1746/S031-001/0001.png    the video's frames in order; S031-001.avi itself is not read

    Emotions: 1 anger, 2 disgust, 3 fear, 4 happy, 5 sad, 6 surprise; sessions with another number, or none,
    are left out. The subject is the S... in the names. There is no official split: ``all``, or folds by
    subject. This package reads no video: extract the frames with, say, ffmpeg.
    """

    name = "mmi"
    splits = ("all", "train", "valid")
    by_subject = True
    layout: ClassVar[Mapping[str, str]] = {
        "Sessions": "one folder a session, with its .xml and a folder of frames"
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
        sessions = self.require("Sessions")
        records = []
        videos = []
        for session in self.source.folders(sessions):
            base = f"{sessions}/{session}"
            code = self._emotion(base)
            if code not in CODES:
                continue
            folder, files = self._frames(base)
            if not files:
                videos += [f"{base}/{video}" for video in self.source.files(base, (".avi", ".mp4", ".mpg"))]
                continue
            subject = _SUBJECT.search(" ".join([*self.source.files(base, ("",)), *self.source.folders(base)]))
            if subject is None:
                raise DataError(
                    f"{self.where}/{base}: no file or folder names the subject, as in S031-001.xml"
                )
            label = EMOTIONS.index(CODES[code])
            start = max(0, (len(files) - self.frames) // 2)
            chosen = [(file, label) for file in files[start : start + self.frames]]
            if self.neutral:
                chosen.insert(0, (files[0], 0))
            records += [Record(f"{folder}/{file}", label, subject=subject[1]) for file, label in chosen]
        if videos and not records:
            video = videos[0]
            raise DataError(
                f"{self.where}: {len(videos)} videos but no frames; extract them: mkdir "
                f"{video.rpartition('.')[0]} && ffmpeg -i {video} {video.rpartition('.')[0]}/%04d.png"
            )
        if videos:
            self.notes.append(f"{len(videos)} videos without extracted frames, the first {videos[0]}")
        return records

    def _emotion(self, base: str) -> int | None:
        for file in self.source.files(base, (".xml",)):
            found = _EMOTION.search(self.source.read_text(f"{base}/{file}"))
            if found:
                if not found[1].isdigit():
                    raise DataError(f"{self.where}/{base}/{file}: emotion {found[1]!r}, expected a number")
                return int(found[1])
        return None

    def _frames(self, base: str) -> tuple[str, list[str]]:
        for folder in [base, *(f"{base}/{name}" for name in self.source.folders(base))]:
            files = self.source.files(folder)
            if files:
                return folder, files
        return base, []
