"""The operators' own test modules once more, with Triton kernels run by Triton's interpreter.

Triton decides at import whether it interprets, hence a process of its own. It is also the only way to run
these kernels where there is no GPU; on a GPU the operators' tests run them compiled.
"""

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

import fer_kernels

HERE = Path(__file__).parent
OPERATORS = sorted(path.parent.name for path in Path(fer_kernels.__file__).parent.glob("*/triton.py"))


pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "0") == "1", reason="already interpreting"),
]


# The interpreter's products are numpy's. OpenBLAS's kernel for AVX2, which it takes for some processors with
# AVX-512 too, rounds a product's last columns unlike the others, so that equal keys get unequal distances.
PRODUCTS = {"OPENBLAS_CORETYPE": "SkylakeX"} if torch.backends.cpu.get_cpu_capability() == "AVX512" else {}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A process for each operator, all at the same time: the interpreter keeps one core busy."""
    folder = tmp_path_factory.mktemp("interpreted")
    started = {}
    for operator in OPERATORS:
        report, log = folder / f"{operator}.xml", folder / f"{operator}.txt"
        with open(log, "w") as output:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "pytest", HERE / f"test_{operator}.py"),
                    *("-k", "triton", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"),
                ],
                env=os.environ
                | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
                | PRODUCTS,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        started[operator] = process, report, log
    yield started
    for process, _, _ in started.values():
        process.kill()


@pytest.mark.parametrize("operator", OPERATORS)
def test_operator_interpreted(operator, runs):
    process, report, log = runs[operator]
    code = process.wait()
    said = log.read_text()[-20_000:]
    assert code == 0, said
    suite = ElementTree.parse(report).getroot().find("testsuite")
    ran = int(suite.get("tests")) - int(suite.get("skipped"))
    assert ran > 0, f"no test of {operator} ran on Triton:\n{said}"
