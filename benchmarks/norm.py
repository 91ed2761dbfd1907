"""norm: batch norm of a network's nodes with its activation, in a training step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fer_kernels

from .gate import unit_roundoff, value_problem
from .providers import ours
from .registry import Case, Cost, Inputs, Provider, Suite, register

# Rows, channels, activation: layers of ViG-Ti's blocks at 224 pixels and B = 16, and of face2nodes_xs's at 48
# and B = 64.
LAYERS = ((3136, 768, "gelu"), (3136, 192, "none"), (2304, 512, "gelu"), (2304, 128, "none"))
DTYPES = (torch.float32, torch.bfloat16)


def _cases() -> Iterator[Case]:
    for (rows, channels, act), dtype, direction in itertools.product(LAYERS, DTYPES, ("forward", "backward")):
        shape = {"N": rows, "C": channels}
        yield Case(
            op="norm",
            name=f"{act}-n{rows}-c{channels}",
            shape=shape,
            dtype=dtype,
            cost=_cost(shape, dtype, direction),
            make_inputs=_make_inputs,
            devices=("cpu",),
            direction=direction,
            tags=(act,),
        )


def _cost(shape: dict[str, int], dtype: torch.dtype, direction: str) -> Cost:
    """x in and y out; in a step also x and two gradients: as if rows stayed in the cache between passes."""
    elements = shape["N"] * shape["C"]
    tensors = 5 if direction == "backward" else 2
    return Cost(
        bytes=tensors * elements * dtype.itemsize, flops=elements * (20 if direction == "backward" else 8)
    )


def _make_inputs(case: Case, generator: torch.Generator) -> Inputs:
    rows, channels = case.shape["N"], case.shape["C"]
    inputs = {
        "x": torch.randn(rows, channels, generator=generator).to(case.dtype),
        "weight": torch.rand(channels, generator=generator) + 0.5,
        "bias": torch.randn(channels, generator=generator),
    }
    if case.direction == "backward":
        inputs["grad"] = torch.randn(rows, channels, generator=generator).to(case.dtype)
    return inputs


def _step(case: Case, function: Callable[..., Tensor]) -> Callable[[Inputs], dict[str, Tensor]]:
    gelu = case.tags[0] == "gelu"

    def call(inputs: Inputs) -> dict[str, Tensor]:
        leaves = [inputs[name] for name in ("x", "weight", "bias")]
        if case.direction == "forward":
            return {"y": function(*leaves, gelu)}
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        y = function(*leaves, gelu)
        gradients = torch.autograd.grad(y, leaves, inputs["grad"])
        return {"y": y.detach(), **dict(zip(("dx", "dweight", "dbias"), gradients, strict=True))}

    return call


def eager(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    y = F.batch_norm(x, None, None, weight, bias, training=True)
    return F.gelu(y) if gelu else y


def _run_ours(case: Case, backend: str) -> Callable[[Inputs], Any]:
    def function(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
        return fer_kernels.batch_norm_act(x, weight, bias, act="gelu" if gelu else None, backend=backend)

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
    of its size. Sums over rows by those of the square root of as many."""
    for name, value in expected.items():
        scale = case.shape["N"] ** 0.5 if name in ("dweight", "dbias") else 1.0
        bound = 64 * unit_roundoff(case.dtype) * (value.abs() + scale)
        problem = value_problem(name, outputs[name].double(), value, bound)
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
