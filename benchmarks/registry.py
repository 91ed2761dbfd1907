"""What can be measured: cases, the providers that compete on them, and the suite that joins both.

A suite is one operator's file of the operator's name (benchmarks/knn.py), which calls `register`
when it is imported. Adding an operator means adding that file; nothing here changes.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fer_kernels import dispatch

Inputs = dict[str, Tensor]

ROLES = ("ours", "peer", "floor")  # a floor is less work than the operator needs: a bound, no rival
NETWORKS = ("models",)  # suites besides those of the operators
DIRECTIONS = ("forward", "backward")  # backward times what a training step pays: forward and backward


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _as_drawn(case: Case, inputs: Inputs) -> Inputs:
    return inputs


@dataclass(frozen=True)
class Cost:
    """Counted from the algorithm, for any implementation: no traffic that only some of them cause."""

    bytes: int  # every input read once, every output written once
    flops: int  # floating-point arithmetic; comparisons are not counted


@dataclass(frozen=True)
class Case:
    """One shape, dtype and direction of an operator.

    Attributes:
        make_inputs: make_inputs(case, generator) draws the inputs on the CPU.
        settle: settle(case, inputs) finishes them on the device, where what it takes much arithmetic
            to find out is found faster.
    """

    op: str
    name: str
    shape: Mapping[str, int]
    dtype: torch.dtype
    cost: Cost
    make_inputs: Callable[[Case, torch.Generator], Inputs]
    settle: Callable[[Case, Inputs], Inputs] = _as_drawn
    direction: str = "forward"
    devices: tuple[str, ...] = ("cpu", "cuda")
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise ValueError(
                f"Case {self.name}: direction must be one of {DIRECTIONS}, got {self.direction!r}"
            )

    @property
    def title(self) -> str:
        return f"{self.op} {self.name} {short(self.dtype)} {self.direction}"

    def inputs(self, device: str, seed: int) -> Inputs:
        """The same numbers on every device: drawn on the CPU, then moved."""
        drawn = self.make_inputs(self, torch.Generator().manual_seed(seed))
        return self.settle(self, {name: tensor.to(device) for name, tensor in drawn.items()})


def _always(case: Case, device: str) -> str | None:
    return None


def _as_it_is(case: Case, output: Any) -> Any:
    return output


@dataclass(frozen=True)
class Provider:
    """One implementation.

    Attributes:
        open: open(case, device) prepares what is not timed and returns the call that is.
        why_not: why_not(case, device) is the reason why it is unavailable, or None.
        finish: brings the call's result into the operator's own form; not timed.
        role: "ours", "peer" or "floor".
        gated: whether its result must be right before it is timed; a floor computes something else.
        arithmetic: the dtype it rounds to where that is not the case's own, for the gate's bound.
        capturable: False where it is known to synchronise or to launch on a stream of its own, so
            that no CUDA graph of it is tried.
    """

    name: str
    open: Callable[[Case, str], Callable[[Inputs], Any]]
    why_not: Callable[[Case, str], str | None] = _always
    finish: Callable[[Case, Any], Any] = _as_it_is
    role: str = "peer"
    gated: bool = True
    arithmetic: torch.dtype | None = None
    capturable: bool = True

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"Provider {self.name}: role must be one of {ROLES}, got {self.role!r}")


@dataclass(frozen=True)
class Suite:
    """One operator's cases and providers, and how a result is judged.

    Attributes:
        expect: expect(case, inputs) is the float64 truth, computed once a case.
        judge: judge(case, inputs, expected, output, arithmetic) says what is wrong, or None.
    """

    op: str
    cases: tuple[Case, ...]
    providers: tuple[Provider, ...]
    expect: Callable[[Case, Inputs], Any]
    judge: Callable[[Case, Inputs, Any, Any, torch.dtype], str | None]


SUITES: dict[str, Suite] = {}


def register(suite: Suite) -> None:
    SUITES[suite.op] = suite


def load() -> dict[str, Suite]:
    """Imports the file of every operator that has one, and of the networks; returns all suites by name."""
    for op in (*dispatch.OPERATORS, *NETWORKS):
        module = f"{__package__}.{op}"
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module)
    return SUITES


def select(suite: Suite, device: str, text: str = "", dtypes: list[str] | None = None) -> tuple[Case, ...]:
    """The cases for this device whose name or tags contain `text`."""
    return tuple(
        case
        for case in suite.cases
        if device in case.devices
        and any(text in word for word in (case.name, *case.tags))
        and (not dtypes or short(case.dtype) in dtypes)
    )
