"""JAFFE: 213 posed faces of ten women."""

import re
from collections.abc import Mapping
from typing import ClassVar

from .base import FaceDataset, Record
from .source import DataError

CODES = {
    "NE": "neutral", "HA": "happy", "SA": "sad", "SU": "surprise", "FE": "fear", "DI": "disgust",
    "AN": "anger",
}  # fmt: skip
_NAME = re.compile(r"([A-Z]{2})\.+([A-Z]{2})\d*\.+\d+\.[a-z]+", re.IGNORECASE)


class JAFFE(FaceDataset):
    """JAFFE; ``all``, or folds by subject: ``folds=10`` leaves one subject out.

    Layout::

        KA.AN1.39.tiff         subject, expression and its number, serial number

    Expressions: NE neutral, HA happy, SA sad, SU surprise, FE fear, DI disgust, AN anger. Images may lie in
    any one folder.
    """

    name = "jaffe"
    splits = ("all", "train", "valid")
    by_subject = True
    layout: ClassVar[Mapping[str, str]] = {"*.??[0-9].*.tif*": "images named as KA.AN1.39.tiff"}

    def read_records(self) -> list[Record]:
        first = self.require("*.??[0-9].*.tif*")
        folder = first.rpartition("/")[0]
        records = []
        for file in self.source.files(folder):
            found = _NAME.fullmatch(file)
            name = f"{folder}/{file}" if folder else file
            if found is None:
                raise DataError(f"{self.where}/{name}: expected a name such as KA.AN1.39.tiff")
            records.append(
                Record(name, self.label_of(found[2].upper(), CODES, name), subject=found[1].upper())
            )
        return records
