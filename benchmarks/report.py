"""Markdown tables from result files; the same rows give the same text, in whatever order they come."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from .results import OK, UNAVAILABLE, Row

Table = list[list[str]]
# "backward" is timed with its forward; the word alone would promise less
DIRECTIONS = {"backward": "forward and backward"}


def _natural(text: str) -> list:
    """Sorts n49 before n196."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def _kind(row: Row) -> str:
    """What stands before the sizes in a case's name: "rmr" of rmr-b16-n196, nothing of b16-n196.

    Kinds do different work, so one mean over several would mean nothing: each has its own table.
    """
    words = itertools.takewhile(lambda word: not re.fullmatch(r"[a-z]+\d+", word), row.case.split("-"))
    return "-".join(words)


def _machine(row: Row) -> tuple:
    return (row.op, row.device, row.machine, row.threads)


def _section(row: Row) -> tuple:
    forward_first = {"forward": 0}.get(row.direction, 1)
    return (*_machine(row), _kind(row), forward_first, row.direction)


def _case(row: Row) -> tuple:
    return (row.dtype, _natural(row.case))


def _group(rows: Iterable[Row], key: Callable[[Row], tuple]) -> list[tuple[tuple, list[Row]]]:
    return [(name, list(group)) for name, group in itertools.groupby(sorted(rows, key=key), key=key)]


def contenders(rows: Iterable[Row]) -> list[str]:
    """Our timed backends; the reference stands in only where nothing faster of ours was timed."""
    names = sorted({row.provider for row in rows if row.role == "ours" and row.status == OK})
    return [name for name in names if name != "ours-reference"] or names


def rivals(rows: Iterable[Row], contender: str) -> list[tuple[str, bool]]:
    """(provider, whether it is a floor) of all others that were timed: peers, floors, then our own."""
    order = {"peer": 0, "floor": 1, "ours": 2}
    found = {
        (order[row.role], row.provider) for row in rows if row.status == OK and row.provider != contender
    }
    return [(name, rank == order["floor"]) for rank, name in sorted(found)]


def ratio(ours: Row | None, other: Row | None, floor: bool) -> float | None:
    """How many times faster ours is; against a floor, how many times its time ours takes."""
    if ours is None or other is None or ours.p50_ms is None or other.p50_ms is None:
        return None
    return ours.p50_ms / other.p50_ms if floor else other.p50_ms / ours.p50_ms


def geometric_mean(values: Iterable[float | None]) -> float | None:
    logs = [math.log(value) for value in values if value is not None]
    return math.exp(sum(logs) / len(logs)) if logs else None


def _times(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}x" if value >= 100 else f"{value:.3g}x"


def _heading(rival: tuple[str, bool]) -> str:
    name, floor = rival
    return f"of {name}" if floor else f"vs {name}"


def _table(rows: list[Row], contender: str) -> Table:
    others = rivals(rows, contender)
    table = [["case", "dtype", "p50 ms", *map(_heading, others), "of ceiling", "extra MiB"]]
    columns: list[list[float | None]] = [[] for _ in others]
    for _, of_case in _group(rows, _case):
        by_name = {row.provider: row for row in of_case}
        ours = by_name.get(contender)
        if ours is None:
            continue
        ratios = [ratio(ours, by_name.get(name), floor) for name, floor in others]
        for column, value in zip(columns, ratios, strict=True):
            column.append(value)
        time = f"{ours.p50_ms:.3g}" if ours.p50_ms is not None else ours.status
        share = f"{ours.ceiling_share:.0%}" if ours.ceiling_share is not None else ""
        memory = f"{ours.extra_mib:.3g}" if ours.extra_mib is not None else ""
        sizes = ours.case.removeprefix(_kind(ours)).lstrip("-")  # the kind stands above the table
        table.append([sizes, ours.dtype, time, *map(_times, ratios), share, memory])
    means = [_times(geometric_mean(column)) for column in columns]
    table.append(["geometric mean", "", "", *means, "", ""])
    return table


def _markdown(table: Table, left: int = 2) -> str:
    right = len(table[0]) - left
    lines = ["| " + " | ".join(cells) + " |" for cells in table]
    lines.insert(1, "|" + " --- |" * left + " ---: |" * right)
    return "\n".join(lines)


def _sources(rows: Iterable[Row], field: str) -> str:
    return "; ".join(sorted({getattr(row, field) for row in rows}))


def _missing(rows: list[Row]) -> list[str]:
    """One line for each refusal and its reason; that ours has backends for other devices is no news."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.status != OK and (row.role, row.status) != ("ours", UNAVAILABLE):
            found.setdefault((row.provider, row.status, row.reason), []).append(row)
    cases = len({row.case_key for row in rows})
    return [
        f"- {provider}: {status} on {len(refused)} of {cases} cases" + (f" ({reason})" if reason else "")
        for (provider, status, reason), refused in sorted(found.items())
    ]


def _where(row: Row) -> str:
    return row.machine if row.device == "cuda" else f"{row.machine}, {row.threads} threads"


def render(rows: Iterable[Row]) -> str:
    """A table for every operator, machine, kind of case, direction and contender."""
    blocks = []
    for (op, *_), of_machine in _group(rows, _machine):
        for (*_, kind, _, direction), section in _group(of_machine, _section):
            what = f"{op} {kind}".rstrip()
            for contender in contenders(section):
                timed = DIRECTIONS.get(direction, direction)
                blocks.append(f"**{what}, {timed}, `{contender}`** on {_where(section[0])}")
                blocks.append(_markdown(_table(section, contender)))
        missing = _missing(of_machine)
        if missing:
            blocks.append("\n".join(missing))
        blocks.append(f"Commit {_sources(of_machine, 'commit')}; {_sources(of_machine, 'versions')}.")
    legend = (
        "“vs” is that provider's time over ours (above 1, ours is faster); “of” is our time over a bound "
        "that does less work. “of ceiling” is the least time by the copy bandwidth and the matrix product "
        "measured in the same process, over ours."
    )
    return "\n\n".join([*blocks, legend]) + "\n" if blocks else "No results.\n"


SUMMARY = "summary"  # the name of its block
IN_SUMMARY = ("eager", "compile")  # the peers that every operator has
LEGEND_OF_SUMMARY = (
    "How many times faster ours is: the geometric mean over all cases and dtypes, in brackets the least and "
    "the most. “of” is how many times the time of a bound that does less work ours takes."
)


def summary(rows: Iterable[Row]) -> str:
    """One table a machine, with a line for every operator, kind of case, direction and contender."""
    blocks = []
    for _, of_machine in _group(rows, lambda row: (row.device, row.machine, row.threads)):
        table = [["operator", "timed", "ours", "cases", *(f"vs {name}" for name in IN_SUMMARY), "others"]]
        for _, section in _group(of_machine, _section):
            table += [_summary_line(section, contender) for contender in contenders(section)]
        blocks.append(f"On {_where(of_machine[0])}:")
        blocks.append(_markdown(table, left=3))
    return "\n\n".join([LEGEND_OF_SUMMARY, *blocks]) + "\n" if blocks else "No results.\n"


def _summary_line(section: list[Row], contender: str) -> list[str]:
    of_case = [{row.provider: row for row in rows} for _, rows in _group(section, _case)]
    ranges, others = dict[str, str](), []
    for rival in rivals(section, contender):
        name, floor = rival
        ratios = [ratio(by_name.get(contender), by_name.get(name), floor) for by_name in of_case]
        known = [value for value in ratios if value is not None]
        if not known:
            continue
        mean = _times(geometric_mean(known))
        if name in IN_SUMMARY:
            spread = f" ({_times(min(known))} to {_times(max(known))})" if len(known) > 1 else ""
            ranges[name] = mean + spread
        else:
            others.append(f"{_heading(rival)} {mean}")
    return [
        f"{section[0].op} {_kind(section[0])}".rstrip(),
        DIRECTIONS.get(section[0].direction, section[0].direction),
        f"`{contender}`",
        str(sum(contender in by_name for by_name in of_case)),
        *(ranges.get(name, "") for name in IN_SUMMARY),
        ", ".join(others),
    ]


def brief(rows: Iterable[Row]) -> str:
    """Plain aligned lines for a log: ours in ms, and the ratios that the targets are stated in."""
    table = [["case", "dtype", "direction", "provider", "ms", "vs eager", "vs compile", "of bmm"]]
    for _, section in _group(rows, _section):
        for _, of_case in _group(section, _case):
            by_name = {row.provider: row for row in of_case}
            for name in contenders(of_case) or ["ours: none timed"]:
                ours = by_name.get(name)
                table.append(
                    [
                        f"{of_case[0].op} {of_case[0].case}",
                        of_case[0].dtype,
                        of_case[0].direction,
                        name,
                        f"{ours.p50_ms:.4g}" if ours and ours.p50_ms is not None else "",
                        *(_times(ratio(ours, by_name.get(other), False)) for other in ("eager", "compile")),
                        _times(ratio(ours, by_name.get("bmm"), True)),
                    ]
                )
            for row in of_case:
                if row.status not in (OK, UNAVAILABLE):
                    table.append([f"{row.op} {row.case}", row.dtype, row.direction, row.provider, row.status])
    return aligned(table)


def aligned(table: Table) -> str:
    widths = [max(len(row[i]) for row in table if i < len(row)) for i in range(len(table[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) for row in table)
    return "".join(line.rstrip() + "\n" for line in lines)


_BLOCK = re.compile(
    r"(?P<open><!-- benchmarks:(?P<name>[\w.-]+) -->)(?P<old>.*?)(?P<close><!-- /benchmarks -->)", re.DOTALL
)


def update(document: Path, files: dict[str, list[Row]]) -> list[str]:
    """Rewrites the document's blocks that these files fill; returns the names of those blocks.

    A block's NAME is a result file's name without .csv, or an operator: then it holds that
    operator's rows of all the files, or "summary" of all the files. Blocks that none of the files fills stay
    as they are.
    """
    filled = []

    def fill(match: re.Match) -> str:
        name = match["name"]
        rows = files.get(name) or [
            row for rows in files.values() for row in rows if name in (row.op, SUMMARY)
        ]
        if not rows:
            return match[0]
        filled.append(name)
        return f"{match['open']}\n{summary(rows) if name == SUMMARY else render(rows)}{match['close']}"

    text = _BLOCK.sub(fill, document.read_text())
    if filled:
        document.write_text(text)
    return filled
