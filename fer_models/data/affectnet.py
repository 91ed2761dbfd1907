"""AffectNet, with its emotion, valence and arousal."""

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .base import FaceDataset, Record
from .source import DataError, one_line

CODES = {
    0: "neutral", 1: "happy", 2: "sad", 3: "surprise", 4: "fear", 5: "disgust", 6: "anger", 7: "contempt",
    8: "none", 9: "uncertain", 10: "no face",
}  # fmt: skip
LEFT_OUT = (8, 9, 10)
COLUMNS = (
    "subDirectory_filePath", "face_x", "face_y", "face_width", "face_height", "facial_landmarks",
    "expression", "valence", "arousal",
)  # fmt: skip


class AffectNet(FaceDataset):
    """AffectNet in either of its forms. Its test labels are not public: results are on ``valid``.

    Layout, ``form="csv"`` (the full set; names of folders may differ in what comes before them)::

        Manually_Annotated_file_lists/training.csv     validation.csv (with or without the header)
            subDirectory_filePath,face_x,face_y,face_width,face_height,facial_landmarks,expression,valence,arousal
        Manually_Annotated_Images/103/29a31ebf1567693f4644c8ba3476ca9a72ee07fe67a5860d98707a0a.jpg
        Automatically_Annotated_file_lists/automatically_annotated.csv       with annotation="automatic"
        Automatically_Annotated_Images/...

    Layout, ``form="npy"`` (the cropped set)::

        train_set/images/0.jpg      val_set/images/0.jpg
        train_set/annotations/0_exp.npy   0_val.npy   0_aro.npy   0_lnd.npy

    expression is 0 to 7 in the canonical order; 8 none, 9 uncertain and 10 no face are left out. Eight
    classes, or seven with ``classes=7``. A valence or arousal of -2 is unknown. Faces of the csv form are
    cut out by their box unless ``cut=False``.
    """

    name = "affectnet"
    default_classes = 8
    layout: ClassVar[Mapping[str, str]] = {
        "Manually_Annotated_file_lists/training.csv": "csv form: the training labels",
        "Manually_Annotated_file_lists/validation.csv": "csv form: the validation labels",
        "Manually_Annotated_Images": "csv form: the images",
        "train_set/annotations": "npy form: the training labels",
        "val_set/annotations": "npy form: the validation labels",
    }

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        form: str = "csv",
        annotation: str = "manual",
        cut: bool = True,
        **options: Any,
    ):
        self.choose("form", form, ("csv", "npy"))
        self.choose("annotation", annotation, ("manual", "automatic"))
        if annotation == "automatic" and (form, split) != ("csv", "train"):
            raise ValueError(
                "AffectNet: annotation = 'automatic' exists for form 'csv' and split 'train' alone"
            )
        self.form, self.annotation, self.cut = form, annotation, cut
        super().__init__(root, split, **options)

    def read_records(self) -> list[Record]:
        return self._csv_records() if self.form == "csv" else self._npy_records()

    def _record(
        self, image: str, code: str, valence: str, arousal: str, box: Any, where: str
    ) -> Record | None:
        number = int(code) if code.isdigit() else code
        if number in LEFT_OUT:
            return None
        label = self.label_of(number, CODES, where)
        return Record(image, label, None, self._affect(valence, where), self._affect(arousal, where), box=box)

    def _affect(self, text: str, where: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.inf
        if value == -2:
            return math.nan
        if not -1 <= value <= 1:
            raise DataError(
                f"{self.where}/{where}: valence or arousal {text!r}, expected -1 to 1, or -2 for unknown"
            )
        return value

    def _csv_records(self) -> list[Record]:
        if self.annotation == "automatic":
            labels = self.require(
                "Automatically_Annotated_file_lists/automatically_annotated.csv", "labels by a network"
            )
            images = self.require("Automatically_Annotated_Images", "their images")
        else:
            name = {"train": "training", "valid": "validation"}[self.split]
            labels = self.require(f"Manually_Annotated_file_lists/{name}.csv")
            images = self.require("Manually_Annotated_Images")
        # One download nests a folder in another of the same name
        nested = f"{images}/{images.rpartition('/')[2]}"
        images = nested if self.source.exists(nested) else images
        records = []
        with self.source.open_text(labels) as file:
            for line, row in enumerate(csv.reader(file), 1):
                if not row or (line == 1 and row[0] == COLUMNS[0]):
                    continue
                where = f"{labels} line {line}"
                if len(row) != len(COLUMNS):
                    raise DataError(
                        f"{self.where}/{where}: {len(row)} columns, "
                        f"expected {len(COLUMNS)} ({','.join(COLUMNS)})"
                    )
                record = self._record(
                    f"{images}/{row[0]}", row[6], row[7], row[8], self._box(row, where), where
                )
                if record is not None:
                    records.append(record)
        return records

    def _box(self, row: list[str], where: str) -> tuple[int, int, int, int] | None:
        if not self.cut or row[1] == "NULL":  # the automatic list has such rows
            return None
        try:
            left, top, width, height = (int(float(cell)) for cell in row[1:5])
        except (ValueError, OverflowError):
            raise DataError(
                f"{self.where}/{where}: face box {','.join(row[1:5])}, expected numbers"
            ) from None
        return (left, top, width, height) if width > 0 and height > 0 else None

    def _npy_records(self) -> list[Record]:
        base = {"train": "train_set", "valid": "val_set"}[self.split]
        annotations = self.require(f"{base}/annotations")
        images = self.require(f"{base}/images", "the images")
        names = {Path(file).stem: f"{images}/{file}" for file in self.source.files(images)}
        files = self.source.files(annotations, ("_exp.npy",))
        records = []
        for file in sorted(files, key=lambda file: (len(file), file)):  # 2 before 10
            stem = file.removesuffix("_exp.npy")
            exp, val, aro = (
                self._scalar(f"{annotations}/{stem}_{kind}.npy") for kind in ("exp", "val", "aro")
            )
            image = names.get(stem, f"{images}/{stem}.jpg")
            record = self._record(image, exp, val, aro, None, f"{annotations}/{file}")
            if record is not None:
                records.append(record)
        unlabelled = len(names) - len(files)
        if unlabelled > 0:
            self.notes.append(f"{unlabelled} images without a label in {annotations}")
        return records

    def _scalar(self, name: str) -> str:
        """The one value of an array file as text; official files hold strings. Never unpickled."""
        data = self.source.read(name)
        try:
            value = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise DataError(f"{self.where}/{name}: not a plain array ({one_line(error)})") from None
        if value.size != 1:
            raise DataError(f"{self.where}/{name}: {value.size} values, expected 1")
        text = str(value.reshape(-1)[0])
        return text.removesuffix(".0") if name.endswith("_exp.npy") else text
