"""conv: the specification, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from ..dispatch import without_autocast
from ..linear.reference import normed
from ..norm.reference import norm_given_backward


@without_autocast
def conv(
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: int,
    padding: int,
    eps: float,
    act: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = the convolution of act((x - mean) / sqrt(var + eps) * scale + shift), or without mean of x itself,
    by weight (C_out, high, wide, C), with zeros around the map; and the mean and variance of y over all its
    pixels, without Bessel's correction. All but x and y is in the dtype that x is accumulated in, and so is
    what is computed; y is rounded once, before its statistics are taken."""
    maps = _first(_normed(x, mean, var, scale, shift, eps, act))
    y = F.conv2d(maps, _first(weight), stride=stride, padding=padding)
    y = _last(y).to(x.dtype)
    y_var, y_mean = torch.var_mean(y.flatten(0, 2).to(weight.dtype), 0, correction=0)
    return y, y_mean, y_var


def _first(x: Tensor) -> Tensor:
    """Channels last to channels first."""
    return x.permute(0, 3, 1, 2)


def _last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def _normed(x: Tensor, *norm) -> Tensor:
    return normed(x.flatten(0, 2), None, *norm)[0].view_as(x)


@without_autocast
def conv_backward(
    grad: Tensor,
    dy_mean: Tensor,
    dy_var: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    y: Tensor,
    y_mean: Tensor,
    stride: int,
    padding: int,
    eps: float,
    act: int,
    need_map: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, mean, var, scale and shift; empty where not wanted or not there.

    y's statistics are means over its n pixels: they add dmean / n + 2 (y - mean) dvar / n to y's gradient.
    """
    pixels = y[..., 0].numel()
    grad = _first(grad + dy_mean / pixels + (y - y_mean) * (2 * dy_var / pixels))
    maps = _first(_normed(x, mean, var, scale, shift, eps, act))
    dx, dweight = x.new_empty(0, 0, 0, x.shape[3]), weight.new_empty(0, *weight.shape[1:])
    of_norm = [weight.new_empty(0) for _ in range(4)]
    if need_map:
        dmaps = conv2d_input(maps.shape, _first(weight), grad, stride=stride, padding=padding)
        dx = _last(dmaps)
        if mean is not None and var is not None:
            rows, wide = dx.flatten(0, 2), x.flatten(0, 2).to(weight.dtype)
            rows, *of_norm, _ = norm_given_backward(rows, wide, mean, var, scale, shift, None, None, eps, act)
            dx = rows.view_as(x)
    if need_weight:
        shape = _first(weight).shape
        dweight = _last(conv2d_weight(maps, shape, grad, stride=stride, padding=padding))
    dmean, dvar, dscale, dshift = of_norm
    return dx.to(x.dtype), dweight, dmean, dvar, dscale, dshift
