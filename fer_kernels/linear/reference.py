"""linear: the specification, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import accumulation_dtype
from ..dispatch import without_autocast
from ..norm.reference import norm_given, norm_given_backward


def interleave(x: Tensor, m: Tensor) -> Tensor:
    """(..., C) and (..., C) to (..., 2C) as x0, m0, x1, m1, ...: every group of a product sees both."""
    return torch.stack((x, m), -1).flatten(-2)


@without_autocast
def linear(x: Tensor, m: Tensor | None, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """x (rows, C_in), or with m the interleaved x and m, through weight (C_out, C_in / groups)."""
    nodes = x if m is None else interleave(x, m)
    return F.linear(nodes, torch.block_diag(*weight.chunk(groups)), bias)


@without_autocast
def linear_backward(
    grad: Tensor,
    x: Tensor,
    m: Tensor | None,
    weight: Tensor,
    groups: int,
    need_nodes: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, m and weight; (0, C) of what is not wanted or not there.

    By group: d[x, m] = dy W and dW = dyᵀ [x, m]
    """
    nodes = x if m is None else interleave(x, m)
    nothing = x.new_empty(0, x.shape[1])
    dx, dm, dweight = nothing, nothing.clone(), weight.new_empty(0, weight.shape[1])
    if need_nodes:
        dx = grad @ torch.block_diag(*weight.chunk(groups))
        if m is not None:
            dx, dm = (part.contiguous() for part in dx.unflatten(-1, (-1, 2)).unbind(-1))
    if need_weight:
        pairs = zip(grad.chunk(groups, 1), nodes.chunk(groups, 1), strict=True)
        dweight = torch.cat([g.t() @ part for g, part in pairs])
    return dx, dm, dweight


@without_autocast
def linear_normed(
    x: Tensor,
    m: Tensor | None,
    weight: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    act: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = linear(act((x - mean) / sqrt(var + eps) * scale + shift)), or without mean of x itself, and the
    mean and variance of y's rows, without Bessel's correction. All but x, m and y is in the dtype that x is
    accumulated in, and so is what is computed; y is rounded once, before its statistics are taken."""
    nodes, beside = normed(x, m, mean, var, scale, shift, eps, act)
    y = linear(nodes, beside, weight, None, groups).to(x.dtype)
    y_var, y_mean = torch.var_mean(y.to(weight.dtype), 0, correction=0)
    return y, y_mean, y_var


def normed(x, m, mean, var, scale, shift, eps, act):
    wide = accumulation_dtype(x.dtype)
    x, m = x.to(wide), None if m is None else m.to(wide)
    return x if mean is None else norm_given(x, mean, var, scale, shift, None, None, eps, act), m


@without_autocast
def linear_normed_backward(
    grad: Tensor,
    dy_mean: Tensor,
    dy_var: Tensor,
    x: Tensor,
    m: Tensor | None,
    weight: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    y: Tensor,
    y_mean: Tensor,
    groups: int,
    eps: float,
    act: int,
    need_nodes: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, m, weight, mean, var, scale and shift; empty where not wanted or not there.

    y's statistics are means over its n rows: they add dmean / n + 2 (y - mean) dvar / n to y's gradient.
    """
    rows = y.shape[0]
    grad = grad + dy_mean / rows + (y - y_mean) * (2 * dy_var / rows)
    nodes, beside = normed(x, m, mean, var, scale, shift, eps, act)
    dx, dm, dweight = linear_backward(grad, nodes, beside, weight, groups, need_nodes, need_weight)
    of_norm = [nodes.new_empty(0) for _ in range(4)]
    if mean is not None and var is not None and need_nodes:
        wide = x.to(nodes.dtype)
        dx, *of_norm, _ = norm_given_backward(dx, wide, mean, var, scale, shift, None, None, eps, act)
    return dx.to(x.dtype), dm.to(x.dtype), dweight, *of_norm
