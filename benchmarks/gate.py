"""The correctness gate: comparing a result with its float64 truth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .registry import Case, Inputs, Provider, Suite


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def value_problem(what: str, actual: Tensor, expected: Tensor, bound: float | Tensor) -> str | None:
    """What is wrong with `actual` where it strays from `expected` by more than `bound`, or None.

    A bound may be one for each element. A NaN or an infinity is right only where the truth has the same.
    """
    if actual.shape != expected.shape:
        return f"{what} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = (actual - expected).abs()
    alike = (actual == expected) | (actual.isnan() & expected.isnan()) | (error <= bound)
    wrong = int(alike.logical_not().sum())
    if not wrong:
        return None
    # The farthest beyond its bound; a NaN error is the worst there is, and argmax finds it first.
    beyond = (error - bound).nan_to_num(nan=torch.inf)
    worst = int(beyond.masked_fill(alike, -torch.inf).argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    allowed = bound[where].item() if isinstance(bound, Tensor) else bound
    return (
        f"{wrong} of {error.numel()} {what} off by more than {allowed:.2e}, worst at {where}: "
        f"{actual[where].item():.6g}, expected {expected[where].item():.6g}"
    )


def off_as_a_whole(
    case: Case, expected: dict[str, Tensor], outputs: dict[str, Tensor], roundings: int
) -> str | None:
    """What strays from the truth, as a norm, by more than so many roundings to the case's dtype and 16 times
    as many to float32: for layers whose results all depend on all rows."""
    share = roundings * (unit_roundoff(case.dtype) + 16 * unit_roundoff(torch.float32))
    for name, value in expected.items():
        off = (outputs[name].double() - value).norm() / value.norm()
        if not off <= share:
            return f"{name} is off by {off:.2e} of its norm, allowed are {share:.2e}"
    return None


def judged(
    suite: Suite, provider: Provider, case: Case, inputs: Inputs, expected: Any, output: Any
) -> str | None:
    """What is wrong with a provider's raw output, or None."""
    if not provider.gated:
        return None
    result = provider.finish(case, output)
    return suite.judge(case, inputs, expected, result, provider.arithmetic or case.dtype)
