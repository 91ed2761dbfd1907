"""Result rows and the files that hold them."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OK, FAILED, UNAVAILABLE, ERROR, OUT_OF_MEMORY = "ok", "FAILED", "unavailable", "error", "out of memory"


@dataclass(frozen=True)
class Row:
    """One provider on one case. What was not measured is None, an empty field in the CSV."""

    op: str
    case: str
    direction: str
    dtype: str
    device: str
    threads: int
    provider: str
    role: str
    status: str
    reason: str = ""
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    samples: int | None = None
    timed_by: str = ""  # "clock", "graph" (CUDA-graph replay) or "events" (launched call by call)
    ratios: str = ""  # "eager=6.1;bmm=0.7": that provider's p50 over this one's, above 1 where this is faster
    bytes: int | None = None
    flops: int | None = None
    gb_per_s: float | None = None
    gflop_per_s: float | None = None
    ceiling_share: float | None = None  # least time by the measured ceilings, over p50
    ceiling: str = ""  # which ceiling that is: "bytes" or "flops"
    copy_gb_per_s: float | None = None
    product_gflop_per_s: float | None = None
    extra_mib: float | None = None  # peak memory beyond what was held before, outputs included
    machine: str = ""
    versions: str = ""
    commit: str = ""
    utc: str = ""

    @property
    def case_key(self) -> tuple:
        return (self.op, self.case, self.direction, self.dtype, self.device, self.machine, self.threads)


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


def _parsers() -> dict[str, type]:
    parsers = {}
    for name, hint in typing.get_type_hints(Row).items():
        plain = [part for part in typing.get_args(hint) if part is not types.NoneType]
        parsers[name] = plain[0] if plain else hint
    return parsers


def _write(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def merge(kept: Iterable[Row], measured: Iterable[Row]) -> list[Row]:
    """A case measured again replaces all its rows: ratios only hold within one run."""
    measured = list(measured)
    again = {row.case_key for row in measured}
    return [row for row in kept if row.case_key not in again] + measured


def _replace(path: Path, text: str) -> None:
    """All or nothing, so that a run that is stopped leaves the last whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text)
    partial.replace(path)


def save_csv(path: Path, rows: Iterable[Row]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow([_write(getattr(row, name)) for name in COLUMNS])
    _replace(path, text.getvalue())


def load_csv(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(
                f"{path} is not a result file of this version: its columns are {reader.fieldnames}"
            )
        parsers = _parsers()
        return [Row(**{name: _read(parsers[name], text) for name, text in line.items()}) for line in reader]


def _read(parse: type, text: str) -> Any:
    if parse is str:
        return text
    return parse(text) if text else None


def save_json(path: Path, rows: Iterable[Row]) -> None:
    _replace(path, json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
