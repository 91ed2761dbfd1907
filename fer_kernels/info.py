"""``python -m fer_kernels.info``: versions, build, and what each operator can run on here, or why not.

Examples:
    python -m fer_kernels.info            readable
    python -m fer_kernels.info --json     for scripts and bug reports
    python -m fer_kernels.info --markdown the table of the README
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from typing import Any

import torch

import fer_kernels

from . import dispatch, extension

GPU_BACKENDS = ("triton", "cuda")


def collect() -> dict[str, Any]:
    """Everything the command prints, as plain data."""
    cpu = extension.cpu.module
    return {
        "versions": {
            "fer_kernels": fer_kernels.__version__,
            "torch": torch.__version__,
            "triton": _triton_version(),
            "cuda of torch": torch.version.cuda,
            "python": platform.python_version(),
        },
        "build": extension.build_info(),
        "cuda build": extension.cuda.module.build_info() if extension.cuda.module else None,
        "cpu": {
            "instruction sets": cpu.supported_isas() if cpu else [],
            "in use": cpu.current_isa() if cpu else None,
            "fast products": extension.FAST_PRODUCTS,
            "bfloat16 products": extension.BFLOAT16_PRODUCTS,
            "threads": torch.get_num_threads(),
        },
        "environment": {
            name: os.environ[name] for name in sorted(os.environ) if name.startswith("FER_KERNELS_")
        },
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "operators": {name: _operator(name) for name in sorted(dispatch.OPERATORS)},
    }


def _triton_version() -> str | None:
    if not dispatch.TRITON_INSTALLED:
        return None
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return "unknown"


def _operator(name: str) -> dict[str, Any]:
    operator = dispatch.OPERATORS[name]
    result = {}
    for backend, dtypes in operator.dtypes.items():
        result[backend] = {
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in dtypes],
            "missing because": operator.missing_reasons(backend),
            "passed its tests on": dispatch.PROVED_ON.get(
                (name, backend), None if backend in GPU_BACKENDS else "CPU, in CI"
            ),
        }
    return result


def readable(info: dict[str, Any]) -> str:
    lines = ["fer_kernels"]
    lines += _section("versions", info["versions"])
    lines += _section("build", info["build"] or {"": "nothing was built: only reference and triton can run"})
    if info["cuda build"]:
        lines += _section("cuda build", info["cuda build"])
    lines += _section("cpu", info["cpu"])
    lines += ["", "  gpus", *(f"    {gpu}" for gpu in info["gpus"] or ["none"])]
    lines += _section("environment", info["environment"] or {"": "no FER_KERNELS_ variable is set"})
    for name, backends in info["operators"].items():
        lines += ["", f"  operator {name}"]
        for backend, state in backends.items():
            reasons = state["missing because"]
            lines.append(f"    {backend:10} {'no' if reasons else 'yes':4} {', '.join(state['dtypes'])}")
            lines += [f"{'':16}because {reason}" for reason in reasons]
            if backend in GPU_BACKENDS:
                proved = state["passed its tests on"] or "no GPU yet, so 'auto' does not choose it"
                lines.append(f"{'':16}passed its tests on {proved}")
    return "\n".join(lines)


def _section(title: str, values: dict[str, Any]) -> list[str]:
    def text(value: Any) -> str:
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    return ["", f"  {title}", *(f"    {key:18} {text(value)}" for key, value in values.items())]


def markdown(info: dict[str, Any]) -> str:
    """Operator x backend x dtype. What is supported, not what this machine happens to have."""
    dtypes = ["float32", "bfloat16", "float16", "float64"]
    rows = [
        f"| operator | backend | {' | '.join(dtypes)} | tests passed on |",
        "|---" * (len(dtypes) + 3) + "|",
    ]
    for name, backends in info["operators"].items():
        for backend, state in backends.items():
            marks = ["yes" if dtype in state["dtypes"] else "" for dtype in dtypes]
            proved = state["passed its tests on"] or "no GPU yet"
            rows.append(f"| {name} | {backend} | {' | '.join(marks)} | {proved} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fer_kernels.info",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print the operator table as Markdown")
    arguments = parser.parse_args()
    info = collect()
    if arguments.json:
        print(json.dumps(info, indent=2))
    else:
        print(markdown(info) if arguments.markdown else readable(info))


if __name__ == "__main__":
    main()
