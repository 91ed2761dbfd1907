"""What all data sets share: records, samples, and what happens to an image that cannot be read."""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .image import ImageError, decode_image
from .labels import EMOTIONS, UNLABELLED, nearest
from .sampling import subject_folds
from .source import DataError, Source


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of one sample before its image is read."""

    image: str
    """Name in the source."""
    label: int
    """Canonical index, or UNLABELLED."""
    distribution: tuple[float, ...] | None = None
    """Share of the votes of each of the eight emotions; None stands for all on the label."""
    valence: float = math.nan
    arousal: float = math.nan
    subject: str = ""
    """Who (or which video, which film) is seen; empty where the data set does not say."""
    weight: float = 1.0
    box: tuple[int, int, int, int] | None = None
    """Left, top, width and height of the face in the image."""


class FaceDataset(Dataset):
    """Base of the data sets: a subclass names its layout and turns its labels into records.

    A sample is a dict that the default collate function takes::

        image              float (3, H, W) in [0, 1], or what ``transform`` made of the uint8 image
        label              int, canonical index or UNLABELLED
        distribution       float (num_classes): votes where there are some, else one at the label
        valence_arousal    float (2) in [-1, 1], NaN where unknown
        index              int, which record this is

    An image that cannot be read is warned of once and its place is taken by the next that can; ``index`` then
    names the one that came, so that an evaluation can count each once. Above ``skip_limit`` of them (by
    default one in a hundred, and at least one) a DataError ends it. Loader workers count for themselves.

    Args:
        root: folder or zip archive with the data set in its official layout, at any depth.
        split: one of ``splits``.
        transform: from a uint8 (3, H, W) tensor to the sample's image.
        classes: 7 leaves contempt out, 8 keeps its place even where no sample shows it.
        skip_limit: how many missing or unreadable images are put up with.
        fold: for data sets by subject, which of ``folds`` parts is ``valid``; ``train`` is the others.
    """

    name: ClassVar[str]
    splits: ClassVar[tuple[str, ...]] = ("train", "valid")
    evaluation_split: ClassVar[str] = "valid"
    """The split that results are published on: the validation split where test labels are not public."""
    by_subject: ClassVar[bool] = False
    """No official split: ``train`` and ``valid`` are folds that share no subject."""
    default_classes: ClassVar[int] = 7
    counts_classes: ClassVar[bool] = False
    """Without ``classes`` there are as many as the files show, and not ``default_classes``."""
    layout: ClassVar[Mapping[str, str]] = {}
    """Patterns of the files and folders that the layout needs, and what each is; ``check`` reads it too."""

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        transform: Callable[[Tensor], Tensor] | None = None,
        classes: int | None = None,
        skip_limit: int | None = None,
        fold: int | None = None,
        folds: int = 10,
    ):
        self.split = split
        self.transform = transform
        self.choose("split", split, self.splits)
        num_classes = self.default_classes if classes is None else classes
        self.choose("classes", num_classes, (7, 8))
        self.classes = EMOTIONS[:num_classes]
        self.source = self.open_source(root)
        self.notes: list[str] = []
        """Remarks on what was found that are no reason to stop, for ``check``."""
        self.unreadable: dict[str, str] = {}
        """Images missing or unreadable, with the reason."""
        self.records = [record for record in self.read_records() if record.label < num_classes]
        if not self.records:
            raise DataError(f"{self.where}: the {split} split has no samples")
        self.skip_limit = max(1, len(self.records) // 100) if skip_limit is None else skip_limit
        self._drop_contradictions()
        self._drop_missing()
        if self.by_subject and split != "all":
            self._take_fold(fold, folds)
        elif fold is not None:
            raise ValueError(
                f"{type(self).__name__}: fold = {fold}, but "
                + ("split 'all' has no folds" if self.by_subject else "its splits are official ones")
            )

    # For subclasses --------------------------------------------------------------------------------------

    def open_source(self, root: str | Path) -> Source:
        try:
            return Source(root)
        except DataError as error:
            raise DataError(f"{type(self).__name__}: {error}") from None

    def read_records(self) -> list[Record]:
        """The split's records, in the order of the label file or by name."""
        raise NotImplementedError

    def load(self, record: Record) -> Tensor:
        """The record's image, uint8 (3, H, W); ImageError where there is none to be had."""
        try:
            data = self.source.read(record.image)
        except DataError as error:
            raise ImageError(str(error)) from None
        return crop(decode_image(data), record.box)

    @property
    def where(self) -> str:
        """Class and path, the start of every message."""
        return f"{type(self).__name__}: {self.source.root}"

    def choose(self, option: str, value: Any, values: Sequence[Any]) -> None:
        if value not in values:
            hint = nearest(value, [v for v in values if isinstance(v, str)]) if isinstance(value, str) else ""
            raise ValueError(
                f"{type(self).__name__}: {option} = {value!r}, expected one of "
                + ", ".join(map(repr, values))
                + hint
            )

    def require(self, pattern: str, what: str | None = None) -> str:
        """The name of what the layout needs; a DataError that says what is missing, and what is there."""
        found = self.source.find(pattern)
        if found is not None:
            return found
        what = what or self.layout.get(pattern, "")
        there = [p for p in self.layout if p != pattern and self.source.find(p) is not None]
        message = f"{self.where}: {pattern} is missing" + (f" ({what})" if what else "")
        if there:
            message += f"; found {', '.join(there)}"
        else:
            top = self.source.folders() + self.source.files("", ("",))
            message += f"; the root holds {', '.join(top[:5]) or 'nothing'}" + (
                ", ..." if len(top) > 5 else ""
            )
        if self.source.damaged:
            message += f"; could not look into {'; '.join(self.source.damaged)}"
        raise DataError(message)

    def label_of(self, code: Any, codes: Mapping[Any, str], where: str) -> int:
        """Canonical index of a data set's own code; ``where`` names the file and line."""
        if code not in codes:
            raise DataError(
                f"{self.where}/{where}: label {code!r} is out of range, expected one of "
                + ", ".join(f"{key} ({name})" for key, name in codes.items())
            )
        return EMOTIONS.index(codes[code])

    # Cleaning --------------------------------------------------------------------------------------------

    def _drop_contradictions(self) -> None:
        """An image listed twice with two labels teaches nothing: it goes. Plain repeats stay: published
        counts include them."""
        labels: dict[Any, int] = {}
        contradicted = set()
        repeats = 0
        for record in self.records:
            key = (record.image, record.box)
            if labels.setdefault(key, record.label) != record.label:
                contradicted.add(key)
            repeats += 1
        repeats -= len(labels)
        for image, _ in sorted(contradicted, key=str):
            self.unreadable[image] = "listed more than once, with different labels"
        if contradicted:
            self.records = [r for r in self.records if (r.image, r.box) not in contradicted]
            self._stop_above_limit("are listed more than once with different labels")
        if repeats:
            self.notes.append(f"{repeats} rows repeat an image")

    def _drop_missing(self) -> None:
        missing = [record.image for record in self.records if not self.has_image(record)]
        if missing:
            total = len(self.records)
            self.unreadable.update(dict.fromkeys(missing, "missing"))
            self._stop_above_limit(f"of {total} images are missing")
            self.records = [record for record in self.records if record.image not in self.unreadable]
            warnings.warn(
                f"{self.where}: {len(missing)} of {total} images are missing, "
                f"skipped; the first: {missing[0]}",
                stacklevel=3,
            )

    def has_image(self, record: Record) -> bool:
        return self.source.exists(record.image)

    def _stop_above_limit(self, what: str) -> None:
        if len(self.unreadable) > self.skip_limit:
            name, reason = next(iter(self.unreadable.items()))
            raise DataError(
                f"{self.where}: {len(self.unreadable)} {what}, more than skip_limit = {self.skip_limit}; "
                f"the first: {name} ({reason})"
            )

    def _take_fold(self, fold: int | None, folds: int) -> None:
        if fold is None or not 0 <= fold < folds:
            raise ValueError(
                f"{type(self).__name__}: split {self.split!r} needs fold = 0 to {folds - 1}, got {fold} "
                "(this data set has no official split; 'all' is the whole)"
            )
        parts = subject_folds(self.subjects, self.labels, folds)
        if self.split == "valid":
            chosen = parts[fold]
        else:
            chosen = sorted(i for part in parts[:fold] + parts[fold + 1 :] for i in part)
        self.records = [self.records[i] for i in chosen]

    # Use -------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        count = len(self.records)
        if not -count <= index < count:
            raise IndexError(f"{type(self).__name__}: index {index} of {count} samples")
        for step in range(count):
            place = (index + step) % count
            record = self.records[place]
            if record.image not in self.unreadable:
                try:
                    image = self.load(record)
                    break
                except ImageError as error:
                    self.unreadable[record.image] = str(error)
                    warnings.warn(f"{self.where}/{record.image}: {error}; skipped", stacklevel=2)
                    self._stop_above_limit("images cannot be read")
        else:
            raise DataError(f"{self.where}: no image can be read")
        image = image.float() / 255 if self.transform is None else self.transform(image)
        return {
            "image": image,
            "label": record.label,
            "distribution": self.distribution(record),
            "valence_arousal": torch.tensor((record.valence, record.arousal)),
            "index": place,
        }

    def distribution(self, record: Record) -> Tensor:
        """Float (num_classes), sum 1; zeros for a sample without a label."""
        if record.distribution is not None:
            shares = torch.tensor(record.distribution[: self.num_classes], dtype=torch.float32)
            return shares / shares.sum().clamp(min=1e-12)
        shares = torch.zeros(self.num_classes)
        if record.label >= 0:
            shares[record.label] = 1
        return shares

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def labels(self) -> list[int]:
        return [record.label for record in self.records]

    @property
    def subjects(self) -> list[str]:
        return [record.subject for record in self.records]

    @property
    def weights(self) -> list[float]:
        return [record.weight for record in self.records]

    def class_counts(self) -> list[int]:
        """Samples of each class; those without a label are in none."""
        counts = Counter(self.labels)
        return [counts[label] for label in range(self.num_classes)]

    def subset(self, indices: Sequence[int], transform: Any = "same") -> "FaceDataset":
        """A data set of the same kind with only these records, and another transform if one is given."""
        part = copy(self)
        part.records = [self.records[int(i)] for i in indices]
        part.unreadable = dict(self.unreadable)
        if transform != "same":
            part.transform = transform
        return part

    def __repr__(self) -> str:
        counts = ", ".join(f"{c} {n}" for c, n in zip(self.classes, self.class_counts(), strict=True))
        return f"{self.where} ({self.split}): {len(self)} samples ({counts})"


def crop(image: Tensor, box: tuple[int, int, int, int] | None) -> Tensor:
    """The part of an image inside a box of left, top, width and height, as far as it overlaps."""
    if box is None:
        return image
    left, top, width, height = box
    part = image[:, max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)]
    if part.numel() == 0:
        size = f"{image.shape[2]} x {image.shape[1]}"
        raise ImageError(f"the face box {box} lies outside the image of {size} pixels")
    return part


def peak_frames(names: Sequence[str], label: int, subject: str, frames: int, neutral: bool) -> list[Record]:
    """Of a sequence from neutral to the peak: the last ``frames``, and the first as neutral if asked.

    A sequence too short to have both apart gives its last frames alone.
    """
    if frames < 1:
        raise ValueError(f"peak_frames: frames = {frames}, expected 1 or more")
    records = [Record(name, label, subject=subject) for name in names[-frames:]]
    if neutral and len(names) > frames:
        records.insert(0, Record(names[0], 0, subject=subject))
    return records


__all__ = ["UNLABELLED", "FaceDataset", "Record", "crop", "peak_frames"]
