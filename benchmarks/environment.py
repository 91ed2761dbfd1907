"""Where a number comes from: machine, threads, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import fer_kernels

_PACKAGES = ("numpy", "triton", "faiss-cpu", "pykeops", "torch_cluster", "torch_geometric")


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def device_slug(device: str) -> str:
    """The device as part of a file name: "intel-xeon-2-threads", "nvidia-h100-80gb-hbm3"."""
    name = re.sub(r"\((r|tm)\)|\b(cpu|processor)\b|@.*", " ", device_name(device).lower())
    if device == "cpu":
        name += f" {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def machine(device: str) -> str:
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return f"{device_name(device)}, {properties.multi_processor_count} SMs, CUDA {torch.version.cuda}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{device_name(device)}, {os.cpu_count()} cores, {capability}"


def versions() -> str:
    found = [f"python {platform.python_version()}", f"torch {torch.__version__}"]
    found.append(f"fer_kernels {fer_kernels.__version__}")
    for package in _PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def commit() -> str:
    """The commit measured, with "-dirty" where the tree has changes other than results.

    BENCHMARKS_COMMIT says it where the measured code runs outside its repository.
    """
    given = os.environ.get("BENCHMARKS_COMMIT")
    if given:
        return given
    head = _git("rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    changes = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return f"{head}-dirty" if changes else head


def _git(*arguments: str) -> str:
    root = Path(__file__).resolve().parents[1]
    try:
        run = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""
