"""linear: the specification, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import without_autocast


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
