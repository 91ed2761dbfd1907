"""norm: batch norm of rows, and what follows it in the same passes. Contract, schema, autograd, checks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks, dispatch
from . import reference

ACTS = reference.ACTS

OPERATOR = dispatch.Operator("norm", dtypes={"reference": checks.FLOATING, "cpu": checks.FLOATING})


def _fake(x, weight, bias, residual, gain, eps, act):
    like = x if residual is None else residual
    statistics = x.new_empty(x.shape[1], dtype=checks.accumulation_dtype(x.dtype))
    return (
        torch.empty_like(like, memory_format=torch.contiguous_format),
        statistics,
        torch.empty_like(statistics),
    )


def _fake_backward(grad, x, weight, bias, residual, gain, mean, var, eps, act):
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(mean),
        torch.empty_like(mean),
        grad.new_empty(0 if residual is None else x.shape[0], x.shape[1]),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, residual, gain, ctx.eps, ctx.act = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    kept = residual if ctx.act else None  # without an activation its gradient is y's
    ctx.save_for_backward(x, weight, bias, kept, gain, mean, var)


def _backward(backend: str, ctx: Any, grad: Tensor, *_: Any) -> tuple:
    run = _BACKWARD["cpu" if backend == "compiled" else backend]
    grad = grad.contiguous()
    *gradients, of_residual = run(grad, *ctx.saved_tensors, ctx.eps, ctx.act)
    gradients.append(of_residual if ctx.act else grad)
    wanted = ctx.needs_input_grad
    return (*(g if w else None for g, w in zip(gradients, wanted, strict=False)), None, None, None)


def _setup_double(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, _, _, ctx.eps, ctx.act = inputs
    ctx.save_for_backward(*tensors)


def _double_backward(backend: str, ctx: Any, *gradients: Tensor) -> tuple:
    """Of the statistics too, which are functions of x."""

    def formula(grad, x, weight, bias, residual, gain, *constants):
        var, mean = torch.var_mean(x.to(checks.accumulation_dtype(x.dtype)), 0, correction=0)
        return reference.norm_backward(grad, x, weight, bias, residual, gain, mean, var, *constants)

    inputs = (*ctx.saved_tensors, ctx.eps, ctx.act)
    found = dispatch.differentiated(formula, inputs, range(5), gradients)
    return (*found[:6], None, None, *found[6:])


dispatch.define(
    OPERATOR,
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? gain, float eps, int act)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    reference=reference.norm,
    setup_context=_setup_context,
    backward=_backward,
)
_BACKWARD = dispatch.define(
    OPERATOR,
    "(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? gain, Tensor mean,"
    " Tensor var, float eps, int act) -> (Tensor, Tensor, Tensor, Tensor)",
    suffix="_backward",
    fake=_fake_backward,
    reference=reference.norm_backward,
    setup_context=_setup_double,
    backward=_double_backward,
)


def _fake_given(x, mean, var, weight, bias, residual, gain, eps, act):
    return torch.empty_like(x if residual is None else residual, memory_format=torch.contiguous_format)


def _fake_given_backward(grad, x, mean, var, weight, bias, residual, gain, eps, act):
    dx, dweight, dbias, dresidual = _fake_backward(grad, x, weight, bias, residual, gain, mean, var, eps, act)
    return dx, torch.empty_like(mean), torch.empty_like(var), dweight, dbias, dresidual


def _setup_given(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, mean, var, weight, bias, residual, gain, ctx.eps, ctx.act = inputs
    ctx.save_for_backward(x, mean, var, weight, bias, residual if ctx.act else None, gain)


def _backward_given(backend: str, ctx: Any, grad: Tensor) -> tuple:
    run = _GIVEN_BACKWARD["cpu" if backend == "compiled" else backend]
    grad = grad.contiguous()
    *gradients, of_residual = run(grad, *ctx.saved_tensors, ctx.eps, ctx.act)
    gradients.append(of_residual if ctx.act else grad)
    wanted = ctx.needs_input_grad
    return (*(g if w else None for g, w in zip(gradients, wanted, strict=False)), None, None, None)


def _setup_given_double(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.eps, ctx.act = inputs
    ctx.save_for_backward(*tensors)


def _given_double_backward(backend: str, ctx: Any, *gradients: Tensor) -> tuple:
    inputs = (*ctx.saved_tensors, ctx.eps, ctx.act)
    return dispatch.differentiated(reference.norm_given_backward, inputs, range(7), gradients)


_GIVEN = dispatch.define(
    OPERATOR,
    "(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? gain,"
    " float eps, int act) -> Tensor",
    suffix="_given",
    fake=_fake_given,
    reference=reference.norm_given,
    setup_context=_setup_given,
    backward=_backward_given,
)
_GIVEN_BACKWARD = dispatch.define(
    OPERATOR,
    "(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? residual,"
    " Tensor? gain, float eps, int act) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    suffix="_given_backward",
    fake=_fake_given_backward,
    reference=reference.norm_given_backward,
    setup_context=_setup_given_double,
    backward=_given_double_backward,
)


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    act: str | None = None,
    residual: Tensor | None = None,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    backend: str = "auto",
) -> Tensor:
    """act(gain * batch norm + residual) of rows by their own statistics, as in training, or by given ones, in
    as few passes as that takes.

    Args:
        x: (rows, C), at least two rows; float32, float64, bfloat16 or float16.
        weight, bias: (C); of x's dtype, or float32. None stands for ones and zeros.
        act: None, "relu" or "gelu" (exact, by the error function).
        residual: (rows, C), of x's dtype or float32; y has its dtype.
        gain: (S), for S samples of rows / S rows each, such as 0 and 1 / keep for stochastic depth; of x's
            dtype or float32. A constant: it has no gradient.
        shift: (C), added to every row before the norm, such as the bias of the layer before. The norm takes
            it off again, so it only moves running_mean, and its gradient is zero.
        statistics: mean and variance (C) instead of the rows' own, in float32 (float64 for float64), such as
            those that `normed_linear` returns along with x; they have gradients.
        eps: added to the variance.
        running_mean, running_var: (C), moved in place by `momentum` towards the rows' mean and unbiased
            variance; None keeps none.
        momentum: share of the new statistics.
        backend: "auto", "reference" or "cpu". There is none for GPUs, where torch.compile fuses the same.

    Returns:
        y (rows, C) of x's dtype, or the residual's.

    As `F.gelu(F.batch_norm(x, ..., training=True))`, whose backward reads what lies between the two: this
    keeps x alone (and, for an activation, the residual), and computes that again. Arithmetic is in float32
    (float64 for float64) and results are rounded once, where the two functions round twice; where y is
    bfloat16 "cpu" has GELU to 7e-6, and its slope to 7e-5. NaN in a channel makes all of it NaN, where the
    statistics are its own. Results and gradients are bitwise reproducible, whatever the number of threads.
    Second derivatives work; the reference computes them.
    """
    _check(x, weight, bias, act, residual, gain, shift, statistics, eps, running_mean, running_var)
    dtype = checks.accumulation_dtype(x.dtype)
    bias = with_shift(bias, shift)
    weight, bias, gain = (None if t is None else t.to(dtype) for t in (weight, bias, gain))
    rest = (weight, bias, residual, gain, float(eps), ACTS.index(act))
    if statistics is None:
        y, mean, var = OPERATOR.choose(backend, x)(x, *rest)
    else:
        mean, var = statistics
        y = OPERATOR.choose(backend, x, among=_GIVEN)(x, mean, var, *rest)
    track(running_mean, running_var, momentum, mean, var, x.shape[0], shift)
    return y


def with_shift(bias: Tensor | None, shift: Tensor | None) -> Tensor | None:
    """The bias. shift gets its gradient, zero, by it; and where it is not finite it spoils the norm."""
    if shift is None:
        return bias
    return 0 * shift if bias is None else torch.add(bias, shift, alpha=0)


@torch.no_grad()
def track(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    mean: Tensor,
    var: Tensor,
    rows: int,
    shift: Tensor | None,
) -> None:
    """Moves what there is towards the rows' mean + shift and unbiased variance, in place."""
    if running_mean is not None:
        mean = mean if shift is None else mean + shift
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    if running_var is not None:
        running_var.lerp_((var * (rows / (rows - 1))).to(running_var.dtype), momentum)


def _check(x, weight, bias, act, residual, gain, shift, statistics, eps, running_mean, running_var) -> None:
    here = "batch_norm_act"
    checks.dense_tensor(here, "x", x)
    if x.dtype not in checks.FLOATING:
        raise TypeError(f"{here}: x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.dim() != 2:
        raise ValueError(f"{here}: x must be (rows, C), got {x.dim()}-D {checks.shape(x)}")
    if x.shape[0] < 2 or x.shape[1] < 1:
        raise ValueError(f"{here}: x must have at least 2 rows, and a channel, got {checks.shape(x)}")
    checks.a_choice(here, "act", act, ACTS)
    checks.not_negative(here, "eps", eps)
    named = {
        "weight": weight,
        "bias": bias,
        "shift": shift,
        "running_mean": running_mean,
        "running_var": running_var,
        "residual": residual,
        "gain": gain,
    }
    if statistics is not None:
        if not isinstance(statistics, (tuple, list)) or len(statistics) != 2:
            raise TypeError(
                f"{here}: statistics must be a mean and a variance, got {type(statistics).__name__}"
            )
        named |= {"mean": statistics[0], "variance": statistics[1]}
        for name in ("mean", "variance"):
            checks.dense_tensor(here, name, named[name])
            if named[name].dtype != checks.accumulation_dtype(x.dtype):
                raise TypeError(
                    f"{here}: {name} must be float32 (float64 for float64), got {named[name].dtype}"
                )
    for name, tensor in named.items():
        if tensor is None:
            continue
        checks.dense_tensor(here, name, tensor)
        checks.same_device(here, name, tensor, "x", x)
        if tensor.dtype not in (x.dtype, checks.accumulation_dtype(x.dtype)):
            raise TypeError(f"{here}: {name} must be {x.dtype} as x or float32, got {tensor.dtype}")
        if name == "gain":
            if tensor.dim() != 1 or not tensor.shape[0] or x.shape[0] % tensor.shape[0]:
                raise ValueError(
                    f"{here}: gain must be (S,) with S a divisor of {x.shape[0]} rows, "
                    f"got {checks.shape(tensor)}"
                )
            if tensor.requires_grad:
                raise ValueError(f"{here}: gain is a constant and has no gradient, but requires one")
        elif name == "residual":
            if tensor.shape != x.shape:
                raise ValueError(
                    f"{here}: residual must be as x {checks.shape(x)}, got {checks.shape(tensor)}"
                )
        elif tuple(tensor.shape) != (x.shape[1],):
            raise ValueError(
                f"{here}: {name} must be (C,) with C = {x.shape[1]} (x: {checks.shape(x)}), "
                f"got {checks.shape(tensor)}"
            )
