"""linear: products of nodes with a weight, in groups. Contract, schema, autograd, checks."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .. import checks, dispatch, extension
from ..norm.reference import ACTS
from . import reference

OPERATOR = dispatch.Operator("linear", dtypes={"reference": checks.FLOATING, "cpu": (torch.float32,)})
# normed_linear's, whose kernel takes bfloat16 too where the processor multiplies vectors of it.
_OF_NORMED = (torch.float32, torch.bfloat16) if extension.BFLOAT16_PRODUCTS else (torch.float32,)
NORMED = dataclasses.replace(OPERATOR, dtypes=OPERATOR.dtypes | {"cpu": _OF_NORMED})

# From so many rows and channels on, the kernel beats torch's product (docs/performance.md).
ROWS, WIDTH = 1024, 96 if extension.FAST_PRODUCTS == "amx" else 16


def _fake(x, m, weight, bias, groups):
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_backward(grad, x, m, weight, groups, need_nodes, need_weight):
    rows = x.shape[0] if need_nodes else 0
    return (
        x.new_empty(rows, x.shape[1]),
        x.new_empty(0 if m is None else rows, x.shape[1]),
        weight.new_empty(weight.shape[0] if need_weight else 0, weight.shape[1]),
    )


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, m, weight, _, ctx.groups = inputs
    nodes, of_m, of_weight, *_ = ctx.needs_input_grad
    ctx.shapes = x.shape, None if m is None else m.shape, weight.shape
    ctx.save_for_backward(*((x, m) if of_weight else (None, None)), weight if nodes or of_m else None)


def _backward(backend: str, ctx: Any, grad: Tensor) -> tuple:
    run = _BACKWARD["cpu" if backend == "compiled" else backend]
    grad = grad.contiguous()
    nodes, of_m, of_weight, of_bias, _ = ctx.needs_input_grad
    pairs = zip(ctx.saved_tensors, ctx.shapes, strict=True)
    # of what was not needed, and so not kept, only the shape counts
    inputs = [grad.new_empty(shape) if t is None and shape is not None else t for t, shape in pairs]
    found = run(grad, *inputs, ctx.groups, nodes or of_m, of_weight)
    dx, dm, dweight = (g if w else None for g, w in zip(found, (nodes, of_m, of_weight), strict=True))
    return dx, dm, dweight, grad.sum(0) if of_bias else None, None


def _setup_double(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.groups, ctx.need_nodes, ctx.need_weight = inputs
    ctx.save_for_backward(*tensors)


def _double_backward(backend: str, ctx: Any, *gradients: Tensor) -> tuple:
    inputs = (*ctx.saved_tensors, ctx.groups, ctx.need_nodes, ctx.need_weight)
    return dispatch.differentiated(reference.linear_backward, inputs, range(4), gradients)


dispatch.define(
    OPERATOR,
    "(Tensor x, Tensor? m, Tensor weight, Tensor? bias, int groups) -> Tensor",
    fake=_fake,
    reference=reference.linear,
    setup_context=_setup_context,
    backward=_backward,
)
_BACKWARD = dispatch.define(
    OPERATOR,
    "(Tensor grad, Tensor x, Tensor? m, Tensor weight, int groups, bool need_nodes, bool need_weight)"
    " -> (Tensor, Tensor, Tensor)",
    suffix="_backward",
    fake=_fake_backward,
    reference=reference.linear_backward,
    setup_context=_setup_double,
    backward=_double_backward,
)


def _fake_normed(x, m, weight, mean, var, scale, shift, groups, eps, act):
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, weight.new_empty(y.shape[1]), weight.new_empty(y.shape[1])


def _fake_normed_backward(
    grad,
    dy_mean,
    dy_var,
    x,
    m,
    weight,
    mean,
    var,
    scale,
    shift,
    y,
    y_mean,
    groups,
    eps,
    act,
    need_nodes,
    need_weight,
):
    channels = x.shape[1] if need_nodes and mean is not None else 0
    found = _fake_backward(grad, x, m, weight, groups, need_nodes, need_weight)
    return *found, *(weight.new_empty(channels) for _ in range(4))


def _setup_normed(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.groups, ctx.eps, ctx.act = inputs
    y, y_mean, _ = output
    ctx.save_for_backward(*tensors, y, y_mean)


def _backward_normed(backend: str, ctx: Any, *gradients: Tensor) -> tuple:
    run = _NORMED_BACKWARD["cpu" if backend == "compiled" else backend]
    wanted = ctx.needs_input_grad
    constants = (ctx.groups, ctx.eps, ctx.act, any(wanted[:2]) or any(wanted[3:]), wanted[2])
    found = run(*(g.contiguous() for g in gradients), *ctx.saved_tensors, *constants)
    return (*(g if w else None for g, w in zip(found, wanted, strict=False)), None, None, None)


def _setup_normed_double(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, _, _, ctx.groups, ctx.eps, ctx.act, ctx.need_nodes, ctx.need_weight = inputs
    ctx.save_for_backward(*tensors)


def _normed_double_backward(backend: str, ctx: Any, *gradients: Tensor) -> tuple:
    """Of y too, which is a function of what is multiplied."""
    constants = (ctx.groups, ctx.eps, ctx.act)

    def formula(grad, dy_mean, dy_var, *rest):
        given = rest[:7]
        y, y_mean, _ = reference.linear_normed(*given, *constants)
        return reference.linear_normed_backward(
            grad, dy_mean, dy_var, *given, y, y_mean, *constants, ctx.need_nodes, ctx.need_weight
        )

    found = dispatch.differentiated(formula, ctx.saved_tensors, range(10), gradients)
    return *found, None, None, *(None,) * 5


_NORMED = dispatch.define(
    OPERATOR,
    "(Tensor x, Tensor? m, Tensor weight, Tensor? mean, Tensor? var, Tensor? scale, Tensor? shift,"
    " int groups, float eps, int act) -> (Tensor, Tensor, Tensor)",
    suffix="_normed",
    fake=_fake_normed,
    reference=reference.linear_normed,
    setup_context=_setup_normed,
    backward=_backward_normed,
)
_NORMED_BACKWARD = dispatch.define(
    OPERATOR,
    "(Tensor grad, Tensor dy_mean, Tensor dy_var, Tensor x, Tensor? m, Tensor weight, Tensor? mean,"
    " Tensor? var, Tensor? scale, Tensor? shift, Tensor y, Tensor y_mean, int groups, float eps, int act,"
    " bool need_nodes, bool need_weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    suffix="_normed_backward",
    fake=_fake_normed_backward,
    reference=reference.linear_normed_backward,
    setup_context=_setup_normed_double,
    backward=_normed_double_backward,
)


class RowNorm(NamedTuple):
    """act((x - mean) / sqrt(var + eps) * weight + bias), channel by channel; None stands for 1 and 0."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5
    act: str | None = None


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    m: Tensor | None = None,
    groups: int = 1,
    backend: str = "auto",
) -> Tensor:
    """A 1 x 1 convolution in groups, channels last: group g makes its share of C_out from its share of C_in.

    Args:
        x: (..., C_in); float32, float64, bfloat16 or float16.
        weight: (C_out, C_in / groups), of x's dtype.
        bias: (C_out), of x's dtype.
        m: as x: what is multiplied is x0, m0, x1, m1, ..., and the weight is (C_out, 2 C_in / groups).
        groups: divides C_in and C_out.
        backend: "auto", "reference" or "cpu". The last is for float32. On processors that multiply tiles of
            bfloat16 (AMX), under Linux, it multiplies the three bfloat16 pieces of which a float32 number
            consists; on others, vectors of float32. There is none for GPUs, nor for bfloat16, where torch's
            own product is faster.

    Returns:
        y (..., C_out) of x's dtype, also under autocast.

    "cpu" is as exact as sums in float32, mostly more so. Tiles have two exceptions: numbers beyond 3.38e38
    make NaN of what they enter, infinities included, and numbers, products and sums below 1e-33 lose digits.
    It makes the same bits on every run, whatever the number of threads (the bias's gradient is torch's sum).
    Second derivatives work; the reference computes them.

    The reference is slower than torch's own products. `fer_kernels.nn.GroupedLinear` and `Projection` take
    the kernel where it is the faster, and torch's products elsewhere.
    """
    _check(x, weight, bias, m, groups)
    run = OPERATOR.choose(backend, x)
    y = run(x.flatten(0, -2), None if m is None else m.flatten(0, -2), weight, bias, groups)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def normed_linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm: RowNorm | None = None,
    m: Tensor | None = None,
    groups: int = 1,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """A product between two batch norms, in one pass: norm and activation of x while its rows are fetched,
    the product, and the statistics of its results.

    Args:
        x: (rows, C_in), at least one row; float32, float64, bfloat16 or float16.
        weight: (C_out, C_in / groups), of x's dtype, or float32.
        norm: what is multiplied is this of x: its statistics (C_in), in float32 (float64 for float64), may be
            those that this function returned along with x; its weight and bias are of x's dtype, or float32.
            None multiplies x itself.
        m, groups: as in `linear`; m is not normed, and so comes without a norm.
        backend: "auto", "reference" or "cpu". The last is for float32, and for bfloat16 on processors that
            multiply vectors of it (AVX512_BF16); as fast as torch's own product can be where there is
            AVX-512.

    Returns:
        y (rows, C_out) of x's dtype, also under autocast, and its rows' mean and variance (C_out) as those of
        x, the latter without Bessel's correction.

    A chain of these makes the same network as products and batch norms do, forward and backward, but holds no
    normed rows: the backward pass keeps x and y alone, and makes the others again. All three results have
    gradients, and all of x, m, weight and the norm's tensors get one; so the statistics' share of a batch
    norm's gradient comes from here. Statistics are as exact as `batch_norm_act` takes them. The same bits on
    every run, whatever the number of threads. Second derivatives work; the reference computes them.

    Of bfloat16 what is multiplied, weight included, is rounded to it, once; sums are in float32. There "cpu"
    has GELU to 7e-6, and its slope to 7e-5; and it rounds y's gradient, once its statistics' share is in it,
    up in some rows and down in others, so that the share is not lost where it is smaller than a rounding.
    """
    here = "normed_linear"
    wide = checks.accumulation_dtype(x.dtype) if isinstance(x, Tensor) else torch.float32
    _check(x, weight, None, m, groups, here, wide)
    if x.dim() != 2 or not x.shape[0]:
        raise ValueError(f"{here}: x must be (rows, C_in) with a row, got {checks.shape(x)}")
    weight = weight.to(wide)
    if norm is not None and m is not None:
        raise ValueError(f"{here}: m comes without a norm")
    given, eps, act = norm_tensors(here, norm, x)
    run = NORMED.choose(backend, x, among=_NORMED)
    return run(x, m, weight, *given, groups, eps, act)


def norm_tensors(here: str, norm: RowNorm | None, x: Tensor) -> tuple[tuple[Tensor | None, ...], float, int]:
    """The norm's tensors in the dtype that x is accumulated in, its eps, and the number of its activation."""
    if norm is None:
        return (None,) * 4, 0.0, ACTS.index(None)
    if not isinstance(norm, RowNorm):
        raise TypeError(f"{here}: norm must be a RowNorm, got {type(norm).__name__}")
    checks.a_choice(here, "act", norm.act, ACTS)
    checks.not_negative(here, "eps", norm.eps)
    wide, channels = checks.accumulation_dtype(x.dtype), x.shape[-1]
    for name, tensor in zip(RowNorm._fields, norm[:4], strict=False):
        if tensor is None and name in ("weight", "bias"):
            continue
        checks.dense_tensor(here, f"norm.{name}", tensor)
        assert tensor is not None
        checks.same_device(here, f"norm.{name}", tensor, "x", x)
        allowed = {wide, x.dtype} if name in ("weight", "bias") else {wide}
        if tensor.dtype not in allowed or tuple(tensor.shape) != (channels,):
            raise ValueError(
                f"{here}: norm.{name} must be ({channels},) of {' or '.join(map(str, allowed))}, "
                f"got {checks.shape(tensor)} of {tensor.dtype}"
            )
    given = tuple(None if tensor is None else tensor.to(wide) for tensor in norm[:4])
    return given, float(norm.eps), ACTS.index(norm.act)


def chain_dtype(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """The dtype in which `normed_linear` of x, or `normed_conv`, is faster than torch's products and norms,
    autocast considered; None where it is not, as where tiles of bfloat16 multiply."""
    if extension.FAST_PRODUCTS != "avx512":
        return None
    if is_faster(x, weight):
        return torch.float32
    autocast = torch.is_autocast_enabled("cpu")
    cast = autocast and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype("cpu") if cast else x.dtype
    # Else torch's own product says what is wrong.
    fits = weight.dtype == x.dtype or (cast and weight.dtype in (torch.float32, dtype))
    fast = dtype == torch.bfloat16 and extension.BFLOAT16_PRODUCTS and fits and _is_plain(x, weight)
    return dtype if fast and NORMED.has_kernel(x) else None


def is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether "auto" takes a kernel of `linear` for x and weight that is faster than torch's own product: the
    reference never is, nor the kernel where there is little to multiply."""
    if not (extension.FAST_PRODUCTS and _is_plain(x, weight)):
        return False
    if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    torchs: Any = torch.backends.mkldnn
    if (torchs.conv if weight.dim() == 4 else torchs.matmul).fp32_precision == "bf16":
        return False  # the user prefers speed to float32
    return OPERATOR.has_kernel(x)


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    """Whether x is much, and here, and nothing but numbers."""
    # Where shapes may be open, where what is traced runs elsewhere, where products are counted, and where an
    # operator of our own has no rule.
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode():
        return False
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return False
    if not {type(x), type(weight)} <= {Tensor, nn.Parameter} or x.device.type != "cpu":
        return False
    terms = math.prod(weight.shape[1:])  # a convolution's weight is of windows
    width = terms if weight.dim() == 4 else x.shape[-1]
    return x.numel() >= ROWS * x.shape[-1] and min(width, weight.shape[0]) >= WIDTH and terms >= 16


def _check(x, weight, bias, m, groups, here="linear", wide=None) -> None:
    """`wide`: another dtype that the weight may have."""
    checks.positive_int(here, "groups", groups)
    checks.dense_tensor(here, "x", x)
    if x.dtype not in checks.FLOATING:
        raise TypeError(f"{here}: x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.dim() < 2 or not x.shape[-1] or x.shape[-1] % groups:
        raise ValueError(
            f"{here}: x must be (..., C_in) with C_in divisible by groups = {groups}, got {checks.shape(x)}"
        )
    for name, tensor in (("weight", weight), ("bias", bias), ("m", m)):
        if tensor is None and name != "weight":
            continue
        checks.dense_tensor(here, name, tensor)
        checks.same_device(here, name, tensor, "x", x)
        if tensor.dtype != x.dtype and not (name == "weight" and tensor.dtype == wide):
            raise TypeError(f"{here}: {name} must be {x.dtype} as x, got {tensor.dtype}")
    columns = x.shape[-1] // groups * (1 if m is None else 2)
    if weight.dim() != 2 or weight.shape[1] != columns or not weight.shape[0] or weight.shape[0] % groups:
        raise ValueError(
            f"{here}: weight must be (C_out, {columns}) with C_out divisible by groups = {groups} "
            f"(x: {checks.shape(x)}{'' if m is None else ', and m'}), got {checks.shape(weight)}"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"{here}: bias must be ({weight.shape[0]},), got {checks.shape(bias)}")
    if m is not None and m.shape != x.shape:
        raise ValueError(f"{here}: m must be as x {checks.shape(x)}, got {checks.shape(m)}")
