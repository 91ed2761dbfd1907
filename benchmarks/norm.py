"""norm: batch norm of a network's nodes and what follows it, in a training step."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fer_kernels

from .gate import unit_roundoff, value_problem
from .providers import ours, step
from .registry import Case, Cost, Inputs, Provider, Suite, register

# Rows, channels, what follows: layers of ViG-Ti's blocks and stem at 224 pixels and B = 16, of face2nodes_xs
# at 48 and B = 64, and of lnlattennet_xs's first level there. "add" is a block's nodes, in float32.
LAYERS = (
    (3136, 768, "gelu"),
    (3136, 192, "none"),
    (3136, 192, "add"),
    (200704, 24, "gelu"),
    (2304, 512, "gelu"),
    (2304, 128, "none"),
    (147456, 24, "relu"),
)
DTYPES = (torch.float32, torch.bfloat16)


def _cases() -> Iterator[Case]:
    for (rows, channels, after), dtype, direction in itertools.product(
        LAYERS, DTYPES, ("forward", "backward")
    ):
        shape = {"N": rows, "C": channels}
        yield Case(
            op="norm",
            name=f"{after}-n{rows}-c{channels}",
            shape=shape,
            dtype=dtype,
            cost=_cost(shape, after, dtype, direction),
            make_inputs=_make_inputs,
            devices=("cpu",),
            direction=direction,
            tags=(after,),
        )


def _cost(shape: dict[str, int], after: str, dtype: torch.dtype, direction: str) -> Cost:
    """x in and y out; in a step also x and two gradients: as if rows stayed in the cache between passes."""
    elements = shape["N"] * shape["C"]
    step = direction == "backward"
    outside = 4 if after == "add" else dtype.itemsize  # of y and its gradient
    size = dtype.itemsize * (3 if step else 1) + outside * (2 if step else 1) + (4 if after == "add" else 0)
    return Cost(bytes=size * elements, flops=elements * (20 if step else 8))


def _make_inputs(case: Case, generator: torch.Generator) -> Inputs:
    rows, channels = case.shape["N"], case.shape["C"]
    inputs = {
        "x": torch.randn(rows, channels, generator=generator).to(case.dtype),
        "weight": torch.rand(channels, generator=generator) + 0.5,
        "bias": torch.randn(channels, generator=generator),
    }
    outside = torch.float32 if _after(case) == "add" else case.dtype
    if _after(case) == "add":
        inputs["residual"] = torch.randn(rows, channels, generator=generator)
    if case.direction == "backward":
        inputs["grad"] = torch.randn(rows, channels, generator=generator).to(outside)
    return inputs


def _after(case: Case) -> str:
    return case.tags[0]


def _step(case: Case, function: Callable[..., Tensor]) -> Callable[[Inputs], dict[str, Tensor]]:
    return step(case, functools.partial(function, after=_after(case)))


def eager(x: Tensor, weight: Tensor, bias: Tensor, after: str, residual: Tensor | None = None) -> Tensor:
    y = F.batch_norm(x, None, None, weight, bias, training=True)
    if residual is not None:
        y = residual + y
    return F.gelu(y) if after == "gelu" else F.relu(y) if after == "relu" else y


def _run_ours(case: Case, backend: str) -> Callable[[Inputs], Any]:
    def function(after: str, **leaves: Tensor) -> Tensor:
        act = after if after in ("gelu", "relu") else None
        return fer_kernels.batch_norm_act(**leaves, act=act, backend=backend)

    return _step(case, function)


def _open_eager(case: Case, device: str) -> Callable[[Inputs], Any]:
    return _step(case, eager)


def _open_compile(case: Case, device: str) -> Callable[[Inputs], Any]:
    torch.compiler.reset()
    return _step(case, torch.compile(eager, fullgraph=True, dynamic=False))


def expect(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    return _step(case, eager)({name: tensor.double() for name, tensor in inputs.items()})


def judge(
    case: Case,
    inputs: Inputs,
    expected: dict[str, Tensor],
    outputs: dict[str, Tensor],
    arithmetic: torch.dtype,
) -> str | None:
    """As far off as a variance summed over thousands of rows in one go may make it: 64 roundings of a value
    of its size. Sums over rows by those of the square root of as many. Where a ReLU's argument is that near
    to zero, dx may be what an open or a shut one makes it."""
    for name, value in expected.items():
        scale = case.shape["N"] ** 0.5 if name in ("dweight", "dbias") else 1.0
        bound = 64 * unit_roundoff(case.dtype) * (value.abs() + scale)
        actual = outputs[name].double()
        if name == "dx" and _after(case) == "relu":
            exact = {name: tensor.double() for name, tensor in inputs.items() if name != "grad"}
            z = eager(after="none", **exact)
            bound = bound + inputs["grad"].double().abs() * inputs["weight"].double() * (z.abs() < bound)
        problem = value_problem(name, actual, value, bound)
        if problem:
            return problem
    return None


register(
    Suite(
        op="norm",
        cases=tuple(_cases()),
        providers=(
            *ours("norm", _run_ours),
            Provider("eager", _open_eager),
            Provider("compile", _open_compile),
        ),
        expect=expect,
        judge=judge,
    )
)
