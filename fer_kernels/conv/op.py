"""conv: convolutions of maps between two batch norms. Contract, schema, autograd, checks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import checks, dispatch
from ..linear.op import NORMED, RowNorm, norm_tensors
from . import reference

OPERATOR = dispatch.Operator("conv", dtypes=NORMED.dtypes)  # a product of normed_linear's kernel


def _sides(x, weight, stride: int, padding: int) -> list:
    return [(x.shape[i] + 2 * padding - weight.shape[i]) // stride + 1 for i in (1, 2)]


def _fake(x, weight, mean, var, scale, shift, stride, padding, eps, act):
    y = x.new_empty(x.shape[0], *_sides(x, weight, stride, padding), weight.shape[0])
    return y, weight.new_empty(y.shape[3]), weight.new_empty(y.shape[3])


def _fake_backward(
    grad,
    dy_mean,
    dy_var,
    x,
    weight,
    mean,
    var,
    scale,
    shift,
    y,
    y_mean,
    stride,
    padding,
    eps,
    act,
    need_map,
    need_weight,
):
    channels = x.shape[3] if need_map and mean is not None else 0
    dx = x.new_empty(x.shape) if need_map else x.new_empty(0, 0, 0, x.shape[3])
    dweight = weight.new_empty(weight.shape[0] if need_weight else 0, *weight.shape[1:])
    return dx, dweight, *(weight.new_empty(channels) for _ in range(4))


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.stride, ctx.padding, ctx.eps, ctx.act = inputs
    y, y_mean, _ = output
    ctx.save_for_backward(*tensors, y, y_mean)


def _backward(backend: str, ctx: Any, *gradients: Tensor) -> tuple:
    run = _BACKWARD["cpu" if backend == "compiled" else backend]
    of_x, of_weight, *of_norm = ctx.needs_input_grad[:6]
    constants = (ctx.stride, ctx.padding, ctx.eps, ctx.act, of_x or any(of_norm), of_weight)
    found = run(*(g.contiguous() for g in gradients), *ctx.saved_tensors, *constants)
    wanted = (of_x, of_weight, *of_norm)
    return (*(g if w else None for g, w in zip(found, wanted, strict=True)), *(None,) * 4)


def _setup_double(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, _, _, ctx.stride, ctx.padding, ctx.eps, ctx.act, ctx.need_map, ctx.need_weight = inputs
    ctx.save_for_backward(*tensors)


def _double_backward(backend: str, ctx: Any, *gradients: Tensor) -> tuple:
    """Of y too, which is a function of what is convolved."""
    constants = (ctx.stride, ctx.padding, ctx.eps, ctx.act)

    def formula(grad, dy_mean, dy_var, *given):
        y, y_mean, _ = reference.conv(*given, *constants)
        return reference.conv_backward(
            grad, dy_mean, dy_var, *given, y, y_mean, *constants, ctx.need_map, ctx.need_weight
        )

    found = dispatch.differentiated(formula, ctx.saved_tensors, range(9), gradients)
    return *found, None, None, *(None,) * 6


dispatch.define(
    OPERATOR,
    "(Tensor x, Tensor weight, Tensor? mean, Tensor? var, Tensor? scale, Tensor? shift, int stride,"
    " int padding, float eps, int act) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    reference=reference.conv,
    setup_context=_setup_context,
    backward=_backward,
)
_BACKWARD = dispatch.define(
    OPERATOR,
    "(Tensor grad, Tensor dy_mean, Tensor dy_var, Tensor x, Tensor weight, Tensor? mean, Tensor? var,"
    " Tensor? scale, Tensor? shift, Tensor y, Tensor y_mean, int stride, int padding, float eps, int act,"
    " bool need_map, bool need_weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    suffix="_backward",
    fake=_fake_backward,
    reference=reference.conv_backward,
    setup_context=_setup_double,
    backward=_double_backward,
)


def normed_conv(
    x: Tensor,
    weight: Tensor,
    *,
    norm: RowNorm | None = None,
    stride: int = 1,
    padding: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """A convolution between two batch norms, in one pass: norm and activation of x while its pixels are
    fetched, the convolution, and the statistics of its results.

    Args:
        x: (B, H, W, C), not empty; float32, float64, bfloat16 or float16.
        weight: (C_out, C, high, wide) as `nn.Conv2d` has it, of x's dtype, or float32; not larger than x with
            its padding.
        norm: what is convolved is this of x, as in `normed_linear`, with zeros around it; None takes x.
        stride: no more than the weight's sides.
        padding: zeros on every side; less than the weight's sides.
        backend: "auto", "reference" or "cpu". The last is for float32, and for bfloat16 on processors that
            multiply vectors of it (AVX512_BF16).

    Returns:
        y (B, down, across, C_out) of x's dtype, also under autocast, and its pixels' mean and variance
        (C_out), the latter without Bessel's correction.

    Gradients, what is kept for them, exactness and reproducibility are those of `normed_linear`, whose kernel
    this is: its rows are windows of x, which are never in memory as a whole. Where the gradient of y is not
    finite, "cpu" may make NaN of pixels beside the window.
    """
    here = "normed_conv"
    checks.dense_tensor(here, "x", x)
    if x.dtype not in checks.FLOATING:
        raise TypeError(f"{here}: x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.dim() != 4 or not x.numel():
        raise ValueError(f"{here}: x must be (B, H, W, C) and not empty, got {checks.shape(x)}")
    checks.dense_tensor(here, "weight", weight)
    checks.same_device(here, "weight", weight, "x", x)
    wide = checks.accumulation_dtype(x.dtype)
    if weight.dtype not in (x.dtype, wide):
        raise TypeError(f"{here}: weight must be {x.dtype} as x or {wide}, got {weight.dtype}")
    if weight.dim() != 4 or weight.shape[1] != x.shape[3] or not weight.numel():
        raise ValueError(
            f"{here}: weight must be (C_out, C, high, wide) with C = {x.shape[3]} as in x {checks.shape(x)}, "
            f"got {checks.shape(weight)}"
        )
    sides = tuple(weight.shape[2:])
    checks.positive_int(here, "stride", stride)
    if stride > min(sides):
        raise ValueError(f"{here}: stride must be at most {min(sides)}, a side of the weight, got {stride}")
    if isinstance(padding, bool) or not isinstance(padding, int) or not 0 <= padding < min(sides):
        raise ValueError(
            f"{here}: padding must be an int from 0 to {min(sides) - 1}, less than the weight's sides, "
            f"got {padding!r}"
        )
    if any(size + 2 * padding < side for size, side in zip(x.shape[1:3], sides, strict=True)):
        raise ValueError(
            f"{here}: x {checks.shape(x)} with padding = {padding} is smaller than the weight's {sides}"
        )
    given, eps, act = norm_tensors(here, norm, x)
    run = OPERATOR.choose(backend, x)
    return run(x, weight.to(wide).permute(0, 2, 3, 1), *given, stride, padding, eps, act)
