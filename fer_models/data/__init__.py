"""Data sets of facial expressions in one label order, and what training and evaluation need around them.

train = create_dataset("ferplus", "../shared/data", "train", protocol="majority")
train.transform = train_transform(64)
loader = DataLoader(train, 64, sampler=BalancedSampler(train.labels), num_workers=2)
"""

import inspect
from pathlib import Path
from typing import Any

from . import check as _check
from .affectnet import AffectNet
from .affwild2 import AffWild2
from .base import FaceDataset, Record
from .check import Report, SplitReport
from .ckplus import CKPlus
from .fer2013 import FER2013
from .ferplus import FERPlus
from .folder import ImageFolder
from .image import ImageError, decode_image
from .jaffe import JAFFE
from .labels import EMOTIONS, UNLABELLED, emotion_index, nearest
from .mmi import MMI
from .oulu_casia import OuluCASIA
from .preview import preview
from .rafdb import RAFDB
from .sampling import BalancedSampler, ShardedSampler, class_weights, subject_folds
from .sfew import SFEW
from .source import DataError, Source
from .synthetic import ACTION_UNITS, SyntheticFaces
from .transforms import eval_transform, train_transform

DATASETS: dict[str, type[FaceDataset]] = {
    kind.name: kind
    for kind in (
        RAFDB,
        FER2013,
        FERPlus,
        AffectNet,
        AffWild2,
        CKPlus,
        JAFFE,
        OuluCASIA,
        SFEW,
        MMI,
        ImageFolder,
        SyntheticFaces,
    )
}
"""Every data set by its name."""


def create_dataset(
    name: str, root: str | Path | None = None, split: str | None = None, **options: Any
) -> FaceDataset:
    """A data set by name; ``split`` is by default the first of its ``splits``."""
    if name not in DATASETS:
        raise ValueError(
            f"create_dataset: no data set {name!r}, expected one of {', '.join(DATASETS)}"
            + nearest(name, list(DATASETS))
        )
    kind = DATASETS[name]
    known = [
        parameter.name
        for owner in kind.__mro__
        if issubclass(owner, FaceDataset) and "__init__" in owner.__dict__
        for parameter in inspect.signature(owner.__init__).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    for option in options:
        if option not in known:
            raise ValueError(
                f"create_dataset: {name} has no option {option!r}, expected one of {', '.join(known)}"
                + nearest(option, known)
            )
    if root is None and kind is not SyntheticFaces:
        raise ValueError(f"create_dataset: {name} needs root, the folder or zip archive that holds it")
    try:
        return kind(root, kind.splits[0] if split is None else split, **options)  # type: ignore[arg-type]
    except TypeError as error:
        given = ", ".join(f"{option}={value!r}" for option, value in options.items() if option != "transform")
        raise ValueError(f"create_dataset: {name} cannot be made with {given}: {error}") from error


def check(path: str | Path, name: str | None = None, **options: Any) -> Report:
    """Reads every image of every split at ``path`` and reports what is there, damaged, odd or missing.

    Without ``name`` the data set is known by its layout. ``print(check(path))`` prints it; ``ok`` sums it up.
    """
    return _check.check(path, name, datasets=DATASETS, **options)


__all__ = [
    "ACTION_UNITS",
    "DATASETS",
    "EMOTIONS",
    "FER2013",
    "JAFFE",
    "MMI",
    "RAFDB",
    "SFEW",
    "UNLABELLED",
    "AffWild2",
    "AffectNet",
    "BalancedSampler",
    "CKPlus",
    "DataError",
    "FERPlus",
    "FaceDataset",
    "ImageError",
    "ImageFolder",
    "OuluCASIA",
    "Record",
    "Report",
    "ShardedSampler",
    "Source",
    "SplitReport",
    "SyntheticFaces",
    "check",
    "class_weights",
    "create_dataset",
    "decode_image",
    "emotion_index",
    "eval_transform",
    "preview",
    "subject_folds",
    "train_transform",
]
