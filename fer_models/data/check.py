"""What a folder or archive holds, what is wrong with it, and what is missing."""

import hashlib
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from .base import FaceDataset, Record
from .image import ImageError
from .labels import EMOTIONS, nearest
from .source import DataError, Source

_SHOWN = 5


@dataclass
class SplitReport:
    """What was found in one split."""

    split: str
    classes: tuple[str, ...] = ()
    counts: list[int] = field(default_factory=list)
    unlabelled: int = 0
    people: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    """Image and reason."""
    sizes: dict[tuple[int, int], int] = field(default_factory=dict)
    """How many images have a width and height, most frequent first."""
    suspicious: dict[str, str] = field(default_factory=dict)
    """Image and what is odd about it: tiny, very long, or of one colour."""
    copies: int = 0
    """Images whose pixels equal those of an earlier one of the split."""
    contradictions: int = 0
    """Copies whose label differs from the earlier one's."""
    notes: list[str] = field(default_factory=list)
    error: str = ""
    """Why the split could not be read at all."""

    @property
    def samples(self) -> int:
        return sum(self.counts) + self.unlabelled

    def __str__(self) -> str:
        if self.error:
            return f"{self.split}: {self.error}"
        lines = [f"{self.split}: {self.samples:,} samples"]
        if self.people:
            lines[0] += f", {self.people:,} subjects"
        width = max(map(len, self.classes))
        lines += [
            f"  {name:{width}} {count:8,}  {100 * count / max(1, sum(self.counts)):5.1f} %"
            for name, count in zip(self.classes, self.counts, strict=True)
        ]
        if self.unlabelled:
            lines.append(f"  {self.unlabelled:,} without a label")
        if self.sizes:
            shown = [f"{w} x {h} ({n:,})" for (w, h), n in list(self.sizes.items())[:_SHOWN]]
            more = len(self.sizes) - len(shown)
            lines.append(f"  sizes: {', '.join(shown)}" + (f" and {more} more" if more else ""))
        lines += _listed("unreadable", self.unreadable) + _listed("suspicious", self.suspicious)
        if self.copies:
            lines.append(
                f"  {self.copies:,} copies of earlier images, {self.contradictions} with another label"
            )
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


@dataclass
class Report:
    """What ``check`` found; ``str`` of it is the text to print."""

    path: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    splits: list[SplitReport] = field(default_factory=list)
    shared: dict[tuple[str, str], int] = field(default_factory=dict)
    """Images whose pixels are in both of two splits."""
    error: str = ""

    @property
    def ok(self) -> bool:
        """Every split that is there could be read, whole; at least one is."""
        read = [split for split in self.splits if not split.error]
        return not self.error and bool(read) and not any(split.unreadable for split in read)

    def __str__(self) -> str:
        if self.error:
            return self.error
        options = "".join(f", {key} {value!r}" for key, value in self.options.items())
        lines = [f"{self.path}: {self.name}{options}", *map(str, self.splits)]
        for (one, other), count in self.shared.items():
            lines.append(f"{count:,} images of {other} are in {one} too")
        return "\n".join(lines)


def check(
    path: str | Path, name: str | None = None, *, datasets: Mapping[str, type[FaceDataset]], **options: Any
) -> Report:
    """Reads every image of every split and reports counts, damage, odd sizes and copies.

    Without ``name`` the data set is known by its layout; where none fits, the report says for the nearest
    what is missing. ``options`` go to the data set (``form``, ``protocol``, ...).
    """
    if name is not None and name not in datasets:
        raise ValueError(
            f"check: no data set {name!r}, expected one of {', '.join(datasets)}"
            + nearest(name, list(datasets))
        )
    report = Report(str(path), name or "")
    try:
        source = Source(path)
        if not any(source.files(folder, ("",)) for folder in source.all_folders()):
            report.error = f"{path}: empty, no files at all"
            return report
    except DataError as error:
        report.error = str(error)
        return report
    if name is None:
        name, guessed = _recognise(source, datasets)
        if not name:
            report.error = _nothing_fits(source, datasets)
            return report
        options = {**guessed, **options}
    report.name, report.options = name, options
    kind = datasets[name]
    seen: dict[str, dict[bytes, int]] = {}
    splits = ["all"] if kind.by_subject else kind.splits
    for split in splits:
        report.splits.append(_check_split(kind, path, split, options, seen))
    if not any(not split.error for split in report.splits):
        report.error = report.splits[0].error
        return report
    if name == "folder" and any(not s.error for s in report.splits[:3]):
        report.splits = report.splits[:3]  # "all" is the reading of a tree without splits
    elif name == "folder":
        report.splits = report.splits[3:]
    names = [split for split in seen if split in {s.split for s in report.splits}]
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            if count := len(seen[one].keys() & seen[other].keys()):
                report.shared[one, other] = count
    return report


def _check_split(
    kind: type[FaceDataset], path: str | Path, split: str, options: dict[str, Any], seen: dict[str, Any]
) -> SplitReport:
    result = SplitReport(split)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the report says it
            dataset = kind(path, split, **{"skip_limit": 10**9, **options})
    except DataError as error:
        result.error = str(error)
        return result
    result.classes, result.counts = dataset.classes, dataset.class_counts()
    result.unlabelled = len(dataset) - sum(result.counts)
    result.people = len({record.subject for record in dataset.records} - {""})
    result.notes, result.unreadable = dataset.notes, dict(dataset.unreadable)

    def look(record: Record) -> tuple[Any, ...]:
        try:
            image = dataset.load(record)
        except ImageError as error:
            return record, str(error), None, b""
        digest = hashlib.blake2b(image.numpy().tobytes(), digest_size=16)
        return record, _oddity(image), (image.shape[2], image.shape[1]), digest.digest()

    sizes: Counter[tuple[int, int]] = Counter()
    labels: dict[bytes, int] = {}
    images = {(record.image, record.box): record for record in dataset.records}  # repeats in the list once
    with ThreadPoolExecutor(2) as pool:
        for record, remark, size, digest in tqdm(
            pool.map(look, images.values()), split, len(images), unit="image", leave=False
        ):
            if size is None:
                result.unreadable[record.image] = remark
                continue
            sizes[size] += 1
            if remark:
                result.suspicious[record.image] = remark
            if digest in labels:
                result.copies += 1
                result.contradictions += labels[digest] != record.label
            labels.setdefault(digest, record.label)
    result.sizes = dict(sizes.most_common())
    seen[split] = labels
    return result


def _oddity(image: Tensor) -> str:
    height, width = image.shape[1:]
    size = f"{width} x {height} pixels"
    if min(width, height) < 24:
        return f"{size}, small for a face"
    if max(width, height) > 4096:
        return f"{size}, large for a face"
    if max(width, height) > 2 * min(width, height):
        return f"{size}, long for a face"
    if bool((image == image[:, :1, :1]).all()):
        return "all pixels are equal"
    return ""


def _listed(title: str, images: dict[str, str]) -> list[str]:
    if not images:
        return []
    lines = [f"  {len(images):,} {title}:"]
    lines += [f"    {name}: {reason}" for name, reason in list(images.items())[:_SHOWN]]
    return lines + ([f"    and {len(images) - _SHOWN:,} more"] if len(images) > _SHOWN else [])


def _recognise(source: Source, datasets: Mapping[str, type[FaceDataset]]) -> tuple[str, dict[str, Any]]:
    """The data set whose label file or folder is there, with the options of its form."""

    def has(*patterns: str) -> bool:
        return all(source.find(pattern) is not None for pattern in patterns)

    rules: list[tuple[bool, str, dict[str, Any]]] = [
        (has("FER2013Train/label.csv") or has("FER2013Valid/label.csv"), "ferplus", {"form": "folder"}),
        (has("fer2013new*.csv"), "ferplus", {"form": "csv"}),
        (has("fer2013.csv"), "fer2013", {}),
        (has("EmoLabel/list_patition_label.txt"), "rafdb", {}),
        (has("Manually_Annotated_file_lists/*.csv"), "affectnet", {"form": "csv"}),
        (has("train_set/annotations") or has("val_set/annotations"), "affectnet", {"form": "npy"}),
        (has("EXPR_Classification_Challenge") or has("EXPR_Set"), "affwild2", {"task": "expr"}),
        (has("VA_Estimation_Challenge") or has("VA_Set"), "affwild2", {"task": "va"}),
        (has("cohn-kanade-images", "Emotion"), "ckplus", {}),
        (has("*OriginalImg"), "oulu_casia", {}),
        (has("Train_Aligned_Faces") or has("Val_Aligned_Faces*"), "sfew", {}),
        (has("Sessions"), "mmi", {}),
        (has("*.??[0-9].*.tif*"), "jaffe", {}),
    ]
    for fits, name, options in rules:
        if fits and name in datasets:
            return name, options
    return ("folder", {}) if _class_folders(source) else ("", {})


def _class_folders(source: Source) -> list[str]:
    return [folder for folder in source.all_folders() if folder.rpartition("/")[2].lower() in EMOTIONS]


def _nothing_fits(source: Source, datasets: Mapping[str, type[FaceDataset]]) -> str:
    """Names the layout most of which is there, and what of it is missing."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, kind in datasets.items():
        found[name] = [pattern for pattern in kind.layout if source.find(pattern) is not None]
    best = max(found, key=lambda name: len(found[name]))
    if found[best]:
        missing = {p: what for p, what in datasets[best].layout.items() if p not in found[best]}
        return (
            f"{source.root}: looks like {best} ({', '.join(found[best])} found), but "
            + ", ".join(f"{pattern} ({what})" for pattern, what in missing.items())
            + (" is missing" if len(missing) == 1 else " are missing")
        )
    top = source.folders() + source.files("", ("",))
    known = ", ".join(name for name, kind in datasets.items() if kind.layout)
    return (
        f"{source.root}: no layout of a known data set ({known}, or folders named after emotions); "
        f"the root holds {', '.join(top[:8])}" + (", ..." if len(top) > 8 else "")
    )
