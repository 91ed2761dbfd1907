"""The tables in README and docs are what code and results say."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fer_kernels import info

ROOT = Path(__file__).resolve().parents[2]


def test_operator_table_is_current():
    text = (ROOT / "README.md").read_text()
    (table,) = re.findall(r"<!-- operators -->\n(.*?)\n<!-- /operators -->", text, re.DOTALL)
    assert table.strip() == info.markdown(info.collect()), (
        "paste `python -m fer_kernels.info --markdown` again"
    )


@pytest.mark.parametrize("name", ["README.md", "docs/performance.md"])
def test_benchmark_tables_are_current(name, tmp_path):
    page = tmp_path / "page.md"
    shutil.copy(ROOT / name, page)
    results = sorted((ROOT / "benchmarks" / "results").glob("*.csv"))
    command = [sys.executable, "-m", "benchmarks", "report", *map(str, results), "--update", str(page)]
    subprocess.run(command, cwd=ROOT, check=True)
    assert page.read_text() == (ROOT / name).read_text(), f"run {' '.join(command)}"


def test_every_environment_variable_is_documented():
    page = (ROOT / "docs" / "environment.md").read_text()
    read = set()
    for source in [
        ROOT / "setup.py",
        *(ROOT / "fer_kernels").rglob("*.py"),
        *(ROOT / "fer_models").rglob("*.py"),
    ]:
        read |= set(re.findall(r"(?:environ\.get\(|environ\[|flag\()\"([A-Z_]+)\"", source.read_text()))
    assert read, "the pattern above finds nothing any more"
    assert not [name for name in read if f"`{name}" not in page]
