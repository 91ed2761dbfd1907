"""Any folder of images sorted into one folder a class."""

from pathlib import Path
from typing import Any

from .base import FaceDataset, Record
from .labels import EMOTIONS, emotion_index
from .source import DataError

_SPLIT_NAMES = {"train": ("train", "training"), "valid": ("valid", "val", "validation"), "test": ("test",)}


class ImageFolder(FaceDataset):
    """Images in folders that carry the emotions' names, in any case and usual spelling (``Happiness``).

    Layout::

        train/happy/a.jpg      valid/... (or val)      test/...     (or Train, training, validation)
        happy/a.jpg            without splits: split="all"

    Folders further down belong to their class. Folders named like no emotion are an error, since a spelling
    that is not understood would silently cost a class. Contempt among the folders of a split makes eight
    classes, else there are seven, unless ``classes`` says; give it where only one of the splits has some.
    """

    name = "folder"
    splits = ("train", "valid", "test", "all")
    counts_classes = True

    def __init__(self, root: str | Path, split: str = "train", *, classes: int | None = None, **options: Any):
        self._given_classes = classes
        super().__init__(root, split, classes=8 if classes is None else classes, **options)
        if classes is None and not any(record.label == 7 for record in self.records):
            self.classes = EMOTIONS[:7]

    def read_records(self) -> list[Record]:
        base = self._base()
        prefix = f"{base}/" if base else ""
        records = []
        for folder in self.source.folders(base):
            try:
                label = emotion_index(folder)
            except ValueError as error:
                below = any(True for name in self._below(prefix + folder) if self.source.files(name))
                if not below:
                    continue  # an empty folder, or one of other files
                raise DataError(f"{self.where}/{prefix}{folder}: {str(error).partition(': ')[2]}") from None
            for name in self._below(prefix + folder):
                records += [Record(f"{name}/{file}", label) for file in self.source.files(name)]
        if not records:
            raise DataError(
                f"{self.where}/{base}: no images in folders named after emotions (happy, sad, ...); "
                f"the folders are {', '.join(self.source.folders(base)[:8]) or 'none'}"
            )
        return records

    def _base(self) -> str:
        """The folder that holds the class folders of the split; the nearest to the root."""
        folders = sorted(self.source.all_folders(), key=lambda name: (name.count("/"), name))
        if self.split == "all":
            for name in folders:
                above, _, last = name.rpartition("/")
                if last.lower() in EMOTIONS:
                    return above
            return ""
        for name in folders:
            if name.rpartition("/")[2].lower() in _SPLIT_NAMES[self.split]:
                return name
        raise DataError(
            f"{self.where}: the folder {self.split} is missing; the root holds "
            f"{', '.join(self.source.folders()[:8]) or 'no folders'}. Training takes class folders within "
            "train and valid (or --valid-split test); split 'all' takes class folders as they are"
        )

    def _below(self, folder: str) -> list[str]:
        return sorted(n for n in self.source.all_folders() if n == folder or n.startswith(f"{folder}/"))
