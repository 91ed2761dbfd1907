"""Timing: interleaved samples of several calls, on the CPU clock or between CUDA events."""

from __future__ import annotations

import functools
import gc
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

ROUNDS = 10
MIN_ROUNDS = 3  # even where one round alone outlasts the budget
MAX_SAMPLES_A_SLICE = 200

# Launch gaps and the clock's grain vanish in a sample of this length.
CUDA_SAMPLE_SECONDS = 1e-3
MAX_CALLS_A_SAMPLE = 64
MAX_INPUT_SETS = 32


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50 and p80, linear between neighbouring samples."""
    low, middle, high = np.quantile(np.asarray(samples, dtype=np.float64), (0.2, 0.5, 0.8))
    return float(low), float(middle), float(high)


def interleave(samplers: dict[str, Callable[[], float]], budget: float) -> dict[str, list[float]]:
    """Seconds of every sampler, taken in turns so that a noisy moment hits all alike.

    A turn is a slice of time, not one call, so that a fast sampler gets many samples a round. The
    first of a slice is dropped where more follow: it pays for the caches and for the threads that
    the sampler before it left spinning. Every other round runs in reverse order.
    """
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    slice_seconds = budget / (ROUNDS * max(len(samplers), 1))
    deadline = time.perf_counter() + budget
    gc.collect()
    gc.disable()
    try:
        for number in range(ROUNDS):
            if number >= MIN_ROUNDS and time.perf_counter() > deadline:
                break
            for name in list(samplers) if number % 2 == 0 else reversed(list(samplers)):
                start = time.perf_counter()
                taken = [samplers[name]()]
                while time.perf_counter() - start < slice_seconds and len(taken) < MAX_SAMPLES_A_SLICE:
                    taken.append(samplers[name]())
                samples[name] += taken[1:] or taken
    finally:
        gc.enable()
    return samples


def cpu_sampler(call: Callable[[], Any]) -> Callable[[], float]:
    def sample() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return sample


def input_sets_for(bytes_a_set: int) -> int:
    """How many input sets to rotate among so that none is still in the L2 cache at its next turn."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return min(MAX_INPUT_SETS, max(2, math.ceil(2 * cache / max(bytes_a_set, 1))))


def between_events(run: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


class CudaSampler:
    """Samples one call over several input sets, replaying a CUDA graph where one can be captured.

    Attributes:
        captured: whether samples replay a graph.
        output: the result of the call on the first input set, from the replay where there is one.
            It lives in the pool that the next sampler reuses: look at it before making another.
    """

    def __init__(
        self, call: Callable[[Any], Any], input_sets: Sequence[Any], pool: Any, capturable: bool
    ) -> None:
        for inputs in input_sets[:2]:  # the second finds the allocator and the handles warm
            seconds = between_events(functools.partial(call, inputs))
        rotations = math.ceil(CUDA_SAMPLE_SECONDS / max(seconds, 1e-6) / len(input_sets))
        rotations = max(1, min(rotations, MAX_CALLS_A_SAMPLE // len(input_sets)))
        self._calls = rotations * len(input_sets)

        def rotate() -> Any:
            first = None
            for number in range(self._calls):
                output = call(input_sets[number % len(input_sets)])
                first = output if number == 0 else first
            return first

        self._run: Callable[[], Any] = rotate
        self.captured = False
        if capturable:
            self._capture(rotate, pool)
        if not self.captured:
            self.output = rotate()

    def _capture(self, rotate: Callable[[], Any], pool: Any) -> None:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph, pool=pool):
                self.output = rotate()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as refusal:
            print(f"  not captured, launched call by call: {str(refusal).splitlines()[0]}", file=sys.stderr)
            return
        graph.replay()
        torch.cuda.synchronize()
        self._run, self.captured = graph.replay, True

    def __call__(self) -> float:
        return between_events(self._run) / self._calls
