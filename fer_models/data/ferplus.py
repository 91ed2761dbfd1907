"""FERPlus: FER2013's images, each with ten people's votes."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from .base import FaceDataset, Record
from .fer2013 import USAGES, gray_to_rgb, read_pixels
from .labels import EMOTIONS
from .source import DataError

COLUMNS = ("neutral", "happy", "surprise", "sad", "anger", "disgust", "fear", "contempt")
"""The order of the first eight vote columns; unknown and NF (no face) follow."""

PROTOCOLS = ("majority", "probability", "argmax10", "argmax8")
_TO_CANONICAL = [COLUMNS.index(emotion) for emotion in EMOTIONS]
_FOLDERS = {"train": "FER2013Train", "valid": "FER2013Valid", "test": "FER2013Test"}


class FERPlus(FaceDataset):
    """FERPlus in either of its two official forms, which disagree on one image in twenty.

    Layout, ``form="folder"``::

        FER2013Train/label.csv       fer0000000.png,"(0, 0, 48, 48)",4,0,0,1,3,2,0,0,0,0   (no header)
        FER2013Train/fer0000000.png
        FER2013Valid/...             FER2013Test/...

    Layout, ``form="csv"``::

        fer2013new*.csv              Usage,Image name,neutral,happiness,surprise,sadness,anger,disgust,...
        fer2013.csv                  the pixels, row by row the same images; or else the folders above

    Ten votes an image: eight emotions, unknown, NF (no face). Which images count is the ``protocol``:

    - ``majority``: votes below 2 become 0; kept where the largest exceeds half of what remains and is an
      emotion.
    - ``probability``: votes below 2 become 0; the largest are taken (all that share a value together) until
      three quarters are covered or three are taken, stopping at unknown or NF, which is given back if an
      emotion came before; kept where more than half is covered by at most three, an emotion first.
    - ``argmax10``: kept where the largest of all ten is an emotion.
    - ``argmax8``: the largest among the emotions; kept where one has a vote.

    The label is the largest of what the protocol leaves (the first in the order of the columns), and
    ``distribution`` the shares of the emotions in it. Rows without an image name are FERPlus's own removals.
    """

    name = "ferplus"
    splits = ("train", "valid", "test")
    evaluation_split = "test"
    default_classes = 8
    layout: ClassVar[Mapping[str, str]] = {
        "FER2013Train/label.csv": "names and votes of the training images",
        "FER2013Valid/label.csv": "names and votes of the validation images",
        "fer2013new*.csv": "the csv form of the votes",
    }

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        protocol: str = "majority",
        form: str = "folder",
        **options: Any,
    ):
        self.choose("protocol", protocol, PROTOCOLS)
        self.choose("form", form, ("folder", "csv"))
        self.protocol, self.form = protocol, form
        self.pixels: dict[str, np.ndarray] = {}
        super().__init__(root, split, **options)

    def read_records(self) -> list[Record]:
        folder = _FOLDERS[self.split]
        records = []
        for image, votes in self._folder_rows(folder) if self.form == "folder" else self._csv_rows(folder):
            shares = apply_protocol(votes, self.protocol)
            if shares is not None:
                canonical = tuple(shares[column] for column in _TO_CANONICAL)
                label = EMOTIONS.index(COLUMNS[shares.index(max(shares))])
                records.append(Record(image, label, canonical))
        return records

    def _folder_rows(self, folder: str) -> list[tuple[str, list[float]]]:
        labels = self.require(f"{folder}/label.csv", f"names and votes of the {self.split} images")
        parent = labels.rpartition("/")[0]
        rows = []
        with self.source.open_text(labels) as file:
            for line, row in enumerate(csv.reader(file), 1):
                if not row or (line == 1 and row[-1] == "NF"):
                    continue
                if len(row) != 12:
                    raise DataError(
                        f"{self.where}/{labels} line {line}: {len(row)} columns, "
                        "expected 12 (name, box, ten votes)"
                    )
                rows.append((f"{parent}/{row[0]}", self._votes(row[2:], labels, line)))
        return rows

    def _csv_rows(self, folder: str) -> list[tuple[str, list[float]]]:
        labels = self.require("fer2013new*.csv")
        usage = USAGES[self.split]
        images = self.source.find(f"{folder}/*.png")
        parent = images.rpartition("/")[0] if images else None
        numbered = []
        with self.source.open_text(labels) as file:
            for line, row in enumerate(csv.reader(file), 1):
                if not row or row[0] == "Usage":
                    continue
                if len(row) != 12 or row[0] not in USAGES.values():
                    raise DataError(
                        f"{self.where}/{labels} line {line}: {','.join(row)[:60]!r}, expected 12 columns: "
                        f"{' or '.join(USAGES.values())}, name, ten votes"
                    )
                if row[0] == usage and row[1]:
                    # The header is line 1, so fer2013.csv has this image on the same line
                    numbered.append((line, row[1], self._votes(row[2:], labels, line)))
        if parent is not None:
            return [(f"{parent}/{name}", votes) for _, name, votes in numbered]
        if self.source.find("fer2013.csv") is None:
            raise DataError(
                f"{self.where}: {labels} holds votes only; the images are missing, "
                f"either {folder}/*.png or fer2013.csv"
            )
        by_line = read_pixels(self, usage)
        self.pixels = {
            f"fer2013.csv line {line}": by_line[line][1] for line, *_ in numbered if line in by_line
        }
        return [(f"fer2013.csv line {line}", votes) for line, _, votes in numbered]

    def _votes(self, cells: Sequence[str], labels: str, line: int) -> list[float]:
        try:
            votes = [float(cell) for cell in cells]
        except ValueError:
            votes = [-1.0]
        if not all(0 <= vote <= 10 for vote in votes):
            raise DataError(
                f"{self.where}/{labels} line {line}: votes {','.join(cells)}, expected numbers from 0 to 10"
            )
        return votes

    def has_image(self, record: Record) -> bool:
        return record.image in self.pixels if self.pixels else super().has_image(record)

    def load(self, record: Record) -> Tensor:
        if self.pixels:
            return gray_to_rgb(self.pixels[record.image])
        return super().load(record)


def apply_protocol(votes: Sequence[float], protocol: str) -> list[float] | None:
    """What a protocol leaves of ten votes: eight numbers in the order of COLUMNS, or None to leave it out."""
    if protocol == "argmax8":
        return list(votes[:8]) if any(votes[:8]) else None
    if protocol == "argmax10":
        return list(votes[:8]) if votes.index(max(votes)) < 8 else None
    rest = [vote if vote >= 2 else 0.0 for vote in votes]
    total = sum(rest)
    if protocol == "majority":
        largest = max(rest)
        return rest[:8] if largest > 0.5 * total and rest.index(largest) < 8 else None
    taken = [0.0] * 10
    covered, count, go_on = 0.0, 0, True
    while go_on and covered < 0.75 * total and count < 3:
        largest = max(rest)
        for column in range(10):
            if rest[column] != largest:
                continue
            taken[column], rest[column] = largest, 0.0
            covered += largest
            count += 1
            if column >= 8:
                go_on = False
                if sum(taken) > largest:
                    taken[column] = 0.0
                    count -= 1
                break
    if sum(taken) <= 0.5 * total or count > 3 or taken.index(max(taken)) >= 8:
        return None
    return taken[:8]
