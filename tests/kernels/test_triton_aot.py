"""Every Triton kernel compiles ahead of time, without a GPU, and keeps to its registers.

Any ``fer_kernels/OPERATOR/triton.py`` names its kernels in ``aot_cases(capability)``. What each may cost
stands in triton_budget.json, which a person reviews: registers a thread (rounded up to a multiple of 8)
and bytes of stack, the larger of Triton 3.6 and 3.9, and what more another Triton takes under its own name.
These kernels have no arrays of their own on the stack, so what lies there was spilled. Shared memory need
only fit.
"""

import importlib
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

import fer_kernels

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("TRITON_INTERPRET=1: Triton interprets and compiles nothing", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BUDGET = json.loads(Path(__file__).with_name("triton_budget.json").read_text())
OF_THIS_TRITON = BUDGET.get("triton " + ".".join(triton.__version__.split(".")[:2]), {})
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
CAPABILITIES = (80, 90)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # what a block can have


def operators():
    return sorted(path.parent.name for path in Path(fer_kernels.__file__).parent.glob("*/triton.py"))


def all_cases(capability):
    cases = {}
    for operator in operators():
        module = importlib.import_module(f"fer_kernels.{operator}.triton")
        for name, case in module.aot_cases(capability).items():
            cases[f"{operator}: {name}"] = case
    return cases


CASES = {capability: all_cases(capability) for capability in CAPABILITIES}


def compiled(case, capability):
    kernel, signature, constexprs, num_warps, num_stages = case
    aligned = [i for i, kind in enumerate(signature.values()) if kind.endswith(":16")]
    source = ASTSource(
        kernel,
        {name: kind.removesuffix(":16") for name, kind in signature.items()},
        constexprs,
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def usage(capability, name):
    """Registers a thread, bytes of stack a thread and bytes of shared memory a block."""
    kernel = compiled(CASES[capability][name], capability)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        printed = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", cubin], check=True, capture_output=True, text=True
        ).stdout
    return *map(int, re.search(r"REG:(\d+) STACK:(\d+)", printed).groups()), kernel.metadata.shared


@pytest.fixture(scope="module")
def usages(request):
    """(capability, name) -> a future of `usage`, for the tests that were asked for.

    A compiler works on one core, and there are many cases. Not by fork: other tests have started threads.
    """
    wanted = [
        (item.callspec.params["capability"], item.callspec.params["name"])
        for item in request.session.items
        if item.path == request.path and "name" in getattr(getattr(item, "callspec", None), "params", ())
    ]
    workers = min(len(os.sched_getaffinity(0)), len(wanted))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield {case: pool.submit(usage, *case) for case in wanted}
        pool.shutdown(cancel_futures=True)


def test_there_are_kernels():
    assert "knn" in operators()


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_budget_lists_every_case_and_no_other(capability):
    assert sorted(BUDGET[f"sm_{capability}"]) == sorted(CASES[capability])


@pytest.mark.parametrize(
    ("capability", "name"),
    [(capability, name) for capability in CAPABILITIES for name in CASES[capability]],
    ids=lambda value: f"sm_{value}" if isinstance(value, int) else value,
)
def test_compiles_within_budget(capability, name, usages):
    allowed = OF_THIS_TRITON.get(f"sm_{capability}", {}).get(name) or BUDGET[f"sm_{capability}"].get(name)
    assert allowed is not None, f"no budget for {name!r} on sm_{capability}"
    registers, spilled, shared = usages[capability, name].result()
    assert spilled <= allowed["spilled_bytes"] and registers <= allowed["registers"], (
        f"{name}, sm_{capability}: {registers} registers and {spilled} bytes of spills; allowed {allowed}"
    )
    assert shared <= SHARED_MEMORY[capability], f"{name}, sm_{capability}: {shared} bytes of shared memory"
