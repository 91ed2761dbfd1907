"""norm: the specification, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import accumulation_dtype


def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, gelu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x (rows, C) to y (rows, C), and the rows' mean and variance (C), without Bessel's correction."""
    wide = x.to(accumulation_dtype(x.dtype))
    var, mean = torch.var_mean(wide, 0, correction=0)
    z = _scaled((wide - mean) * torch.rsqrt(var + eps), weight, bias)
    return (F.gelu(z) if gelu else z).to(x.dtype), mean, var


def norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    gelu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias. With z = x̂ w + b, y = gelu(z) and dz = dy gelu'(z):

    db = Σ dz,  dw = Σ dz x̂,  dx = w / σ (dz - db / n - x̂ dw / n), with sums over the n rows
    """
    dtype = accumulation_dtype(x.dtype)
    rstd = torch.rsqrt(var + eps)
    normal = (x.to(dtype) - mean) * rstd
    dz = grad.to(dtype)
    if gelu:
        z = _scaled(normal, weight, bias)
        density = torch.exp(-z * z / 2) * 0.3989422804014327  # 1 / sqrt(2 pi)
        dz = dz * (0.5 * torch.erfc(-z * 0.7071067811865476) + z * density)
    db, dw = dz.sum(0), (dz * normal).sum(0)
    scale = rstd if weight is None else rstd * weight
    dx = scale * (dz - db / x.shape[0] - normal * (dw / x.shape[0]))
    return dx.to(x.dtype), dw, db


def _scaled(normal: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        normal = normal * weight
    return normal if bias is None else normal + bias
