"""Providers that every operator's file has: ours by backend, and what a missing package says."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from fer_kernels import dispatch

from .registry import Case, Inputs, Provider


def ours(
    op: str,
    run: Callable[[Case, str], Callable[[Inputs], Any]],
    operator_of: Callable[[Case], dispatch.Operator] | None = None,
) -> tuple[Provider, ...]:
    """One provider a backend of `op`; run(case, backend) returns the call on that backend, and
    operator_of(case) is the operator that says what it takes, if that is not the same for all cases.

    Our backends accumulate half-precision input in float32 and are held to that.
    """
    operator_of = operator_of or (lambda case: dispatch.OPERATORS[op])
    return tuple(
        Provider(
            f"ours-{backend}",
            open=functools.partial(_open, run, backend),
            why_not=functools.partial(_backend_problem, operator_of, backend),
            role="ours",
            arithmetic=torch.float32,
        )
        for backend in dispatch.OPERATORS[op].dtypes
    )


def _open(
    run: Callable[[Case, str], Callable[[Inputs], Any]], backend: str, case: Case, device: str
) -> Callable[[Inputs], Any]:
    return run(case, backend)


def _backend_problem(
    operator_of: Callable[[Case], dispatch.Operator], backend: str, case: Case, device: str
) -> str | None:
    if backend == "triton" and dispatch.TRITON_INTERPRETED:
        return "Triton's interpreter is for tests, not for timing"
    probe = torch.empty(0, dtype=case.dtype, device=device)
    operator = operator_of(case)
    reasons = [*operator.missing_reasons(backend), *operator.not_supported_reasons(backend, probe)]
    return "; ".join(dict.fromkeys(reasons)) or None


def step(case: Case, function: Callable[..., torch.Tensor]) -> Callable[[Inputs], dict[str, torch.Tensor]]:
    """A call of function(**inputs), with gradients of all of them where the case goes backward too."""

    def call(inputs: Inputs) -> dict[str, torch.Tensor]:
        leaves = {name: tensor for name, tensor in inputs.items() if name != "grad"}
        if case.direction == "forward":
            return {"y": function(**leaves)}
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
        y = function(**leaves)
        gradients = torch.autograd.grad(y, list(leaves.values()), inputs["grad"])
        return {"y": y.detach(), **dict(zip((f"d{name}" for name in leaves), gradients, strict=True))}

    return call


@functools.cache
def import_problem(module: str) -> str | None:
    """Why this optional package cannot be used here, or None."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a package built for another torch fails with more than ImportError
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None
