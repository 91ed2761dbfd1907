"""norm: batch norm of rows with its activation in the same passes. Contract, schema, autograd, checks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks, dispatch
from . import reference

ACTS = (None, "gelu")

OPERATOR = dispatch.Operator("norm", dtypes={"reference": checks.FLOATING, "cpu": checks.FLOATING})


def _fake(x, weight, bias, eps, gelu):
    statistics = x.new_empty(x.shape[1], dtype=checks.accumulation_dtype(x.dtype))
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        statistics,
        torch.empty_like(statistics),
    )


def _fake_backward(grad, x, weight, bias, mean, var, eps, gelu):
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(mean),
        torch.empty_like(mean),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, ctx.eps, ctx.gelu = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(x, weight, bias, mean, var)


def _backward(backend: str, ctx: Any, grad: Tensor, *_: Any) -> tuple:
    run = _BACKWARD["cpu" if backend == "compiled" else backend]
    gradients = run(grad.contiguous(), *ctx.saved_tensors, ctx.eps, ctx.gelu)
    wanted = ctx.needs_input_grad
    return (*(g if w else None for g, w in zip(gradients, wanted, strict=False)), None, None)


def _setup_double(ctx: Any, inputs: tuple, output: tuple) -> None:
    grad, x, weight, bias, _, _, ctx.eps, ctx.gelu = inputs
    ctx.save_for_backward(grad, x, weight, bias)


def _double_backward(backend: str, ctx: Any, *gradients: Tensor) -> tuple:
    """Of the statistics too, which are functions of x."""

    def formula(grad, x, weight, bias, *constants):
        var, mean = torch.var_mean(x.to(checks.accumulation_dtype(x.dtype)), 0, correction=0)
        return reference.norm_backward(grad, x, weight, bias, mean, var, *constants)

    inputs = (*ctx.saved_tensors, ctx.eps, ctx.gelu)
    found = dispatch.differentiated(formula, inputs, range(4), gradients)
    return (*found[:4], None, None, *found[4:])


dispatch.define(
    OPERATOR,
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, bool gelu) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    reference=reference.norm,
    setup_context=_setup_context,
    backward=_backward,
)
_BACKWARD = dispatch.define(
    OPERATOR,
    "(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, bool gelu)"
    " -> (Tensor, Tensor, Tensor)",
    suffix="_backward",
    fake=_fake_backward,
    reference=reference.norm_backward,
    setup_context=_setup_double,
    backward=_double_backward,
)


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    act: str | None = None,
    eps: float = 1e-5,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    backend: str = "auto",
) -> Tensor:
    """act(batch norm) of rows by their own statistics, as in training, in as few passes as that takes.

    Args:
        x: (rows, C), at least two rows; float32, float64, bfloat16 or float16.
        weight, bias: (C); of x's dtype, or float32. None stands for ones and zeros.
        act: None, or "gelu" (exact, by the error function).
        eps: added to the variance.
        running_mean, running_var: (C), moved in place by `momentum` towards the rows' mean and unbiased
            variance; None keeps none.
        momentum: share of the new statistics.
        backend: "auto", "reference" or "cpu". There is none for GPUs, where torch.compile fuses the same.

    Returns:
        y (rows, C) of x's dtype.

    As `F.gelu(F.batch_norm(x, ..., training=True))`, whose backward reads what lies between the two: this
    keeps x alone, and computes that again. Arithmetic is in float32 (float64 for float64) and results are
    rounded once, where the two functions round twice. NaN in a channel makes all of it NaN. Results and
    gradients are bitwise reproducible, whatever the number of threads. Second derivatives work; the reference
    computes them.
    """
    _check(x, weight, bias, act, eps, running_mean, running_var)
    dtype = checks.accumulation_dtype(x.dtype)
    weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
    y, mean, var = OPERATOR.choose(backend, x)(x, weight, bias, float(eps), act == "gelu")
    with torch.no_grad():
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        if running_var is not None:
            unbiased = var * (x.shape[0] / (x.shape[0] - 1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    return y


def has_kernel(x: Tensor) -> bool:
    """Whether "auto" takes a kernel for x; the reference is slower than torch's own two functions."""
    return OPERATOR.choose("auto", x) is not OPERATOR.registered["reference"]


def _check(x, weight, bias, act, eps, running_mean, running_var) -> None:
    here = "batch_norm_act"
    checks.dense_tensor(here, "x", x)
    if x.dtype not in checks.FLOATING:
        raise TypeError(f"{here}: x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.dim() != 2:
        raise ValueError(f"{here}: x must be (rows, C), got {x.dim()}-D {checks.shape(x)}")
    if x.shape[0] < 2 or x.shape[1] < 1:
        raise ValueError(f"{here}: x must have at least 2 rows, and a channel, got {checks.shape(x)}")
    if act not in ACTS:
        raise ValueError(f"{here}: unknown act {act!r}: expected one of {', '.join(map(repr, ACTS))}")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not eps >= 0:
        raise ValueError(f"{here}: eps must be a number of at least 0, got {eps!r}")
    named = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, tensor in named.items():
        if tensor is None:
            continue
        checks.dense_tensor(here, name, tensor)
        checks.same_device(here, name, tensor, "x", x)
        if tensor.dtype not in (x.dtype, checks.accumulation_dtype(x.dtype)):
            raise TypeError(f"{here}: {name} must be {x.dtype} as x or float32, got {tensor.dtype}")
        if tuple(tensor.shape) != (x.shape[1],):
            raise ValueError(
                f"{here}: {name} must be (C,) with C = {x.shape[1]} (x: {checks.shape(x)}), "
                f"got {checks.shape(tensor)}"
            )
