"""Every CUDA file compiles for the oldest and the newest architecture that we tune for, without spills."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
# A kernel's line in the log of ptxas -v, and the two that follow it.
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '\w+'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [os.path.join(home, "bin", "nvcc") for home in homes if home]
    return next((path for path in candidates if os.access(path, os.X_OK)), shutil.which("nvcc"))


@pytest.mark.parametrize("architecture", ["80", "90"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles_without_spills(source, architecture, tmp_path):
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc: neither in CUDA_HOME, nor in /usr/local/cuda, nor on the PATH")
    command = [nvcc, "-O3", "-std=c++17", "-Xptxas", "-v", "-cubin", "-o", str(tmp_path / "kernels.cubin")]
    command += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}", f"-I{ROOT / 'csrc/include'}"]
    command += [str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log
    assert "warning" not in log, log
    kernels = list(KERNEL.finditer(log))
    assert kernels and len(kernels) == log.count("Compiling entry function"), log
    for kernel in kernels:
        print(f"sm_{architecture} {kernel['registers']:>3} registers  {kernel['name']}")
    spilling = [
        kernel["name"]
        for kernel in kernels
        if any(int(kernel[part]) for part in ("stack", "stores", "loads"))
    ]
    assert not spilling, log
