"""Peak extra memory of one call."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_RESET_PEAK = "5"  # the value that makes the kernel set VmHWM back to VmRSS


def peak_extra_bytes(call: Callable[[], Any], device: str) -> int | None:
    """Bytes that a call needs at its peak beyond what is held before it, its outputs included.

    CUDA: what torch's allocator hands out; scratch that a library takes from the driver itself is
    not in it. CPU: growth of the process's resident pages, so scratch of compiled code counts like
    a tensor does; a buffer that a library keeps between calls does not count after the first. None
    where the kernel offers no way to reset the peak.
    """
    return _cuda(call) if device == "cuda" else _resident(call)


def _cuda(call: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _resident(call: Callable[[], Any]) -> int | None:
    if not _can_reset():
        return None
    start = time.perf_counter()
    extra = [_resident_once(call)]
    # The median: what other threads of the process touch is noise. A long call moves too much to care.
    while len(extra) < 3 and time.perf_counter() - start < 0.5:
        extra.append(_resident_once(call))
    return sorted(extra)[len(extra) // 2]


def _can_reset() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _resident_once(call: Callable[[], Any]) -> int:
    gc.collect()
    _return_free_pages()
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    before = _status_bytes("VmRSS")
    result = call()
    peak = _status_bytes("VmHWM")
    del result
    return max(0, peak - before)


def _return_free_pages() -> None:
    """Gives freed heap back to the system, so that reusing it shows up as growth."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
