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

import fer_kernels

HERE = Path(__file__).parent
OPERATORS = sorted(path.parent.name for path in Path(fer_kernels.__file__).parent.glob("*/triton.py"))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "0") == "1", reason="already interpreting")
@pytest.mark.parametrize("operator", OPERATORS)
def test_operator_interpreted(operator, tmp_path):
    report = tmp_path / "report.xml"
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", HERE / f"test_{operator}.py"),
            *("-k", "triton", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"),
        ],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-5_000:]
    suite = ElementTree.parse(report).getroot().find("testsuite")
    ran = int(suite.get("tests")) - int(suite.get("skipped"))
    assert ran > 0, f"no test of {operator} ran on Triton:\n{run.stdout[-20_000:]}"
