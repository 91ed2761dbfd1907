"""norm: the specification, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import accumulation_dtype

ACTS = (None, "relu", "gelu")


def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gain: Tensor | None,
    eps: float,
    act: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """x (rows, C) to y (rows, C), and the rows' mean and variance (C), without Bessel's correction."""
    wide = x.to(accumulation_dtype(x.dtype))
    var, mean = torch.var_mean(wide, 0, correction=0)
    z = _joined((wide - mean) * torch.rsqrt(var + eps), weight, bias, residual, gain)
    y = {None: z, "relu": F.relu(z), "gelu": F.gelu(z)}[ACTS[act]]
    return y.to(x.dtype if residual is None else residual.dtype), mean, var


def norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gain: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    act: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias and residual; of no residual, nothing (0, C).

    With z = g (x̂ w + b) + residual, y = act(z), dz = dy act'(z) and du = g dz:

    db = Σ du,  dw = Σ du x̂,  dx = w / σ (du - db / n - x̂ dw / n), with sums over the n rows
    """
    dtype = accumulation_dtype(x.dtype)
    rstd = torch.rsqrt(var + eps)
    normal = (x.to(dtype) - mean) * rstd
    dz = grad.to(dtype)
    if ACTS[act] is not None:
        z = _joined(normal, weight, bias, residual, gain)
        if ACTS[act] == "relu":
            dz = dz * (z > 0)
        else:
            density = torch.exp(-z * z / 2) * 0.3989422804014327  # 1 / sqrt(2 pi)
            dz = dz * (0.5 * torch.erfc(-z * 0.7071067811865476) + z * density)
    du = dz if gain is None else dz * _by_row(gain, x.shape[0])
    db, dw = du.sum(0), (du * normal).sum(0)
    scale = rstd if weight is None else rstd * weight
    dx = scale * (du - db / x.shape[0] - normal * (dw / x.shape[0]))
    dresidual = grad.new_empty(0, x.shape[1]) if residual is None else dz.to(residual.dtype)
    return dx.to(x.dtype), dw, db, dresidual


def _joined(
    normal: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, gain: Tensor | None
) -> Tensor:
    """z, from x̂."""
    if weight is not None:
        normal = normal * weight
    if bias is not None:
        normal = normal + bias
    if gain is not None:
        normal = normal * _by_row(gain, normal.shape[0])
    return normal if residual is None else normal + residual


def _by_row(gain: Tensor, rows: int) -> Tensor:
    return gain.repeat_interleave(rows // gain.shape[0]).unsqueeze(1)
