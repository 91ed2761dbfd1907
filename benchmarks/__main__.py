"""python -m benchmarks run | verify | report"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from . import environment, registry, report, runner
from .registry import Case, Provider, Suite
from .results import ERROR, FAILED, OK, UNAVAILABLE, Row, load_csv, merge, save_csv, save_json

RESULTS = Path(__file__).with_name("results")
BUDGET, QUICK_BUDGET = 10.0, 0.5  # seconds a case

EXAMPLES = {
    None: """examples:
  python -m benchmarks verify --op knn
  python -m benchmarks run --op knn --case growth --dtype float32
  python -m benchmarks report benchmarks/results/*.csv --update README.md""",
    "run": """example:
  python -m benchmarks run --op knn --case n196 --provider ours-cpu --provider eager --threads 2""",
    "verify": """example:
  python -m benchmarks verify --op knn --dtype bfloat16 --device cuda""",
    "report": """example:
  python -m benchmarks report benchmarks/results/knn-*.csv
  python -m benchmarks report --update README.md""",
}


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Speed and memory of every operator against its peers.",
        epilog=EXAMPLES[None],
        formatter_class=raw,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    about = {
        "run": "gate every provider against float64, then time those that passed",
        "verify": "only the gate: exit code 1 where a result is wrong",
    }
    for name, text in about.items():
        command = commands.add_parser(
            name, help=text, description=text.capitalize() + ".", epilog=EXAMPLES[name], formatter_class=raw
        )
        _add_selection(command)
        if name == "run":
            _add_output(command)
    text = "Markdown tables of ratios from result files"
    command = commands.add_parser(
        "report", help=text, description=text + ".", epilog=EXAMPLES["report"], formatter_class=raw
    )
    command.add_argument(
        "csv", nargs="*", type=Path, metavar="CSV", help="default: all of benchmarks/results"
    )
    command.add_argument(
        "--update",
        type=Path,
        metavar="FILE",
        help="replace what stands between <!-- benchmarks:NAME --> and <!-- /benchmarks --> in a Markdown "
        "file; NAME is an operator, a result file's name without .csv, or summary",
    )
    command.add_argument("--brief", action="store_true", help="plain lines for a log instead of Markdown")
    return parser


def _add_selection(command: argparse.ArgumentParser) -> None:
    command.add_argument("--op", action="append", help="an operator (repeatable; default: all)")
    command.add_argument("--case", default="", metavar="TEXT", help="cases whose name or tag contains TEXT")
    command.add_argument(
        "--dtype", action="append", choices=("float32", "bfloat16", "float16", "float64"), help="repeatable"
    )
    command.add_argument("--provider", action="append", help="a provider (repeatable; default: all)")
    command.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    command.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    command.add_argument("--quick", action="store_true", help="rough numbers, saved only where --csv says")


def _add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--csv",
        type=Path,
        metavar="PATH",
        help="saved after every case; a case measured again replaces its rows there "
        "(default: benchmarks/results/OP-DEVICE.csv)",
    )
    command.add_argument("--json", type=Path, metavar="PATH", help="this run's rows as JSON too")
    command.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help=f"timing a case (default: {BUDGET:g}, quick: {QUICK_BUDGET:g}); slow providers may exceed it",
    )


def _selected(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, device: str
) -> list[tuple[Suite, Case, tuple[Provider, ...]]]:
    suites = registry.load()
    unknown = sorted(set(arguments.op or ()) - set(suites))
    if unknown:
        parser.error(f"unknown operator {', '.join(unknown)}: expected one of {', '.join(sorted(suites))}")
    chosen = [suite for op, suite in suites.items() if not arguments.op or op in arguments.op]
    names = {provider.name for suite in chosen for provider in suite.providers}
    unknown = sorted(set(arguments.provider or ()) - names)
    if unknown:
        parser.error(f"unknown provider {', '.join(unknown)}: expected one of {', '.join(sorted(names))}")
    found = [
        (
            suite,
            case,
            tuple(p for p in suite.providers if not arguments.provider or p.name in arguments.provider),
        )
        for suite in chosen
        for case in registry.select(suite, device, arguments.case, arguments.dtype)
    ]
    if not found:
        parser.error(f"no case on {device} matches --case {arguments.case!r} --dtype {arguments.dtype}")
    return found


def _is_failure(row: Row) -> bool:
    """A wrong result is one whoever gave it; a peer that raises only loses its row."""
    return row.status == FAILED or (row.status == ERROR and row.role == "ours")


def _case_text(case: Case, rows: list[Row]) -> str:
    peers = [row.provider for row in rows if row.status == OK and row.role != "ours"]
    by_name = {row.provider: row for row in rows}
    table = [
        ["", "p20 ms", "p50 ms", "p80 ms", *(f"vs {peer}" for peer in peers), "ceiling", "extra MiB", "by"]
    ]
    for row in rows:
        if row.status == UNAVAILABLE:
            continue
        if row.status != OK:
            table.append([row.provider, f"{row.status}: {row.reason}"])
            continue
        ratios = (report.ratio(row, by_name[peer], False) for peer in peers)
        memory = "" if row.extra_mib is None else f"{row.extra_mib:.1f}"
        table.append(
            [
                row.provider,
                *(f"{value:.4g}" for value in (row.p20_ms, row.p50_ms, row.p80_ms)),
                *(f"{value:.2f}" for value in ratios),
                f"{row.ceiling_share:.0%} {row.ceiling}",
                memory,
                f"{row.timed_by} x{row.samples}",
            ]
        )
    return f"{case.title}\n{report.aligned(table)}"


def _run(selected: list[tuple[Suite, Case, tuple[Provider, ...]]], arguments, session: runner.Session) -> int:
    measured: list[Row] = []
    kept: dict[Path, list[Row]] = {}
    unavailable: set[tuple[str, str]] = set()
    for number, (suite, case, providers) in enumerate(selected, 1):
        start = time.perf_counter()
        rows = runner.measure(suite, case, providers, session)
        measured += rows
        path = arguments.csv
        if path is None and not session.quick:
            path = RESULTS / f"{case.op}-{environment.device_slug(session.device)}.csv"
        if path is not None:
            if path not in kept:
                kept[path] = load_csv(path) if path.exists() else []
            kept[path] = merge(kept[path], rows)
            save_csv(path, kept[path])
        if arguments.json is not None:
            save_json(arguments.json, measured)
        _progress(number, len(selected), case, start)
        print(_case_text(case, rows), flush=True)
        unavailable |= {(row.provider, row.reason) for row in rows if row.status == UNAVAILABLE}
    for provider, reason in sorted(unavailable):
        print(f"unavailable: {provider}: {reason}")
    return int(any(map(_is_failure, measured)))


def _verify(selected: list[tuple[Suite, Case, tuple[Provider, ...]]], session: runner.Session) -> int:
    failures = 0
    for number, (suite, case, providers) in enumerate(selected, 1):
        start = time.perf_counter()
        rows = [entrant.row for entrant in runner.gate(suite, case, providers, session)]
        _progress(number, len(selected), case, start)
        for row in rows:
            gated = row.role != "floor"
            if gated and row.status != UNAVAILABLE:
                print(f"{row.status:<13} {case.title} {row.provider} {row.reason}".rstrip(), flush=True)
            failures += _is_failure(row)
    return int(failures > 0)


def _progress(number: int, total: int, case: Case, start: float) -> None:
    print(
        f"[{number}/{total}] {case.title}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True
    )


def _report(arguments: argparse.Namespace) -> int:
    files = {path.stem: load_csv(path) for path in arguments.csv or sorted(RESULTS.glob("*.csv"))}
    rows = [row for of_file in files.values() for row in of_file]
    if arguments.update is None:
        print(report.brief(rows) if arguments.brief else report.render(rows), end="")
        return 0
    filled = report.update(arguments.update, files)
    if not filled:
        ops = {row.op for row in rows}
        wanted = " or ".join(f"<!-- benchmarks:{name} -->" for name in sorted({*files, *ops}))
        print(f"{arguments.update} has no block for these files: expected {wanted}", file=sys.stderr)
        return 1
    print(f"{arguments.update}: updated {', '.join(filled)}")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command == "report":
        try:
            return _report(arguments)
        except (OSError, ValueError) as error:
            parser.error(str(error))
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device")
    if arguments.threads is not None:
        if arguments.threads < 1:
            parser.error(f"--threads must be at least 1, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    if getattr(arguments, "csv", None) is not None and arguments.csv.exists():
        try:
            load_csv(arguments.csv)  # before anything is measured that could then not be saved
        except (OSError, ValueError) as error:
            parser.error(str(error))
    selected = _selected(parser, arguments, device)
    budget = getattr(arguments, "budget", None) or (QUICK_BUDGET if arguments.quick else BUDGET)
    session = runner.Session.start(device, arguments.quick, budget)
    print(
        f"{session.machine}, {torch.get_num_threads()} threads; {session.versions}; commit {session.commit}"
    )
    if arguments.command == "verify":
        return _verify(selected, session)
    return _run(selected, arguments, session)


if __name__ == "__main__":
    sys.exit(main())
