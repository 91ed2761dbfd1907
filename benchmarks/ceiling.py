"""What this device reaches in this process: the rates that a time is held against."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .registry import Cost
from .timing import between_events, cpu_sampler


@dataclass(frozen=True)
class Ceiling:
    bytes_per_second: float  # of a large copy, counting bytes read and bytes written
    flops_per_second: float  # of a large matrix product in the case's dtype

    def floor(self, cost: Cost) -> tuple[float, str]:
        """The least seconds this cost takes here, and whether "bytes" or "flops" set them.

        On a CPU the inputs of a small case lie in the caches, which are faster than the copy.
        """
        moving, computing = cost.bytes / self.bytes_per_second, cost.flops / self.flops_per_second
        return (moving, "bytes") if moving >= computing else (computing, "flops")


@functools.cache
def measure(device: str, dtype: torch.dtype, quick: bool) -> Ceiling:
    """The best of several runs on random data (zeros can run faster than data does)."""
    gpu = device == "cuda"
    copied = (1 << 30) // (16 if quick else 1) if gpu else (1 << 28) // (8 if quick else 1)
    source = torch.randint(0, 255, (copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size = (2048 if quick else 8192) if gpu else (1024 if quick else 2048)
    factor = torch.randn(size, size, device=device).to(dtype)
    product = torch.empty_like(factor)
    return Ceiling(
        2 * copied / _best_seconds(lambda: target.copy_(source), gpu, quick),
        2 * size**3 / _best_seconds(lambda: torch.mm(factor, factor, out=product), gpu, quick),
    )


def _best_seconds(call: Callable[[], Any], gpu: bool, quick: bool) -> float:
    sample = functools.partial(between_events, call) if gpu else cpu_sampler(call)
    end = time.perf_counter() + (0.3 if quick else 2.0)
    best = sample()
    while time.perf_counter() < end:
        best = min(best, sample())
    return best
