"""relation, the specification: every other backend must agree with this, forward and backward.

Gathers every neighbour into (B, N, k, C) and (B, N, k, R) edge tensors, which is what the other backends
exist to avoid. The backward is written out rather than left to autograd, because autograd splits the
gradient of a tied maximum and adds up neighbours in any order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import accumulation_dtype

MODES = ("mr", "rmr", "rsum")  # their numbers in the schema, and in csrc/include/fer/relation.h
MR, RMR, RSUM = range(len(MODES))
# The compiled code raises the same, and can raise no other type of error.
INDEX_ERROR = "relation_aggregate: idx must lie in [0, M) with"


def check_indices(idx: Tensor, keys: int) -> None:
    """Raises where an index leaves [0, keys); on a GPU this waits for the device."""
    if idx.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(idx))
    if low < 0 or high >= keys:
        raise RuntimeError(f"{INDEX_ERROR} M = {keys}, but idx holds values from {low} to {high}")


def neighbours(rows: Tensor, idx: Tensor) -> Tensor:
    """rows (B, M, C) at idx (B, N, k): (B, N, k, C)."""
    return rows[torch.arange(idx.shape[0], device=idx.device).view(-1, 1, 1), idx]


def scatter_add(size: int, dim: int, index: Tensor, values: Tensor) -> Tensor:
    """Zeros with `values` added at `index` along `dim` of length `size`, always in the same order."""
    shape = (*values.shape[:dim], size, *values.shape[dim + 1 :])
    zeros = values.new_zeros(shape)
    if values.device.type != "cuda":
        return zeros.scatter_add(dim, index, values)
    # CUDA's scatter_add is atomic; an accumulating index_put sorts first.
    grid = torch.meshgrid(*(torch.arange(n, device=index.device) for n in values.shape), indexing="ij")
    return zeros.index_put((*grid[:dim], index, *grid[dim + 1 :]), values, accumulate=True)


def _softmax(p: Tensor, idx: Tensor, q: Tensor, a: Tensor, negative_slope: float):
    """z (B, N, k, R) before the LeakyReLU; the softmax's numerator (B, N, k, H) and denominator."""
    z = p.unsqueeze(2) + neighbours(q, idx)
    scores = (F.leaky_relu(z, negative_slope).unflatten(-1, a.shape) * a).sum(-1)
    powers = (scores - scores.detach().amax(2, keepdim=True)).exp()
    return z, powers, powers.sum(2, keepdim=True)


def _factor(powers: Tensor, total: Tensor) -> Tensor:
    """k * alpha. Equal powers sum to k exactly, so this is exactly 1 where a = 0."""
    return powers * (total.new_full((), powers.shape[2]) / total)  # an int over a tensor rounds twice


def relation(
    x: Tensor,
    idx: Tensor,
    y: Tensor | None,
    p: Tensor | None,
    q: Tensor | None,
    a: Tensor | None,
    reverse: Tensor | None,  # for backward on a GPU
    mode: int,
    negative_slope: float,
    return_weights: bool,
    save_slots: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    keys = x if y is None else y
    if idx.device.type == "cpu":
        check_indices(idx, keys.shape[1])
    weights, slots = x.new_empty(0), x.new_empty(0, dtype=torch.uint8)
    compute = accumulation_dtype(x.dtype)
    delta = neighbours(keys.to(compute), idx) - x.to(compute).unsqueeze(2)

    if mode != MR:
        assert p is not None and q is not None and a is not None
        heads = a.shape[0]
        _, powers, total = _softmax(p.to(compute), idx, q.to(compute), a.to(compute), negative_slope)
        if return_weights:
            weights = (powers / total).to(x.dtype)
        factor = _factor(powers, total) if mode == RMR else powers / total
        delta = (delta.unflatten(-1, (heads, -1)) * factor.unsqueeze(-1)).flatten(-2)
    if mode == RSUM:
        return delta.sum(2).to(x.dtype), weights, slots
    out, winner = delta.max(2)  # the first slot among equals
    if save_slots:
        slots = winner.to(torch.uint8)
    return out.to(x.dtype), weights, slots


def relation_backward(
    grad: Tensor,
    grad_weights: Tensor | None,
    x: Tensor | None,
    idx: Tensor,
    y: Tensor | None,
    p: Tensor | None,
    q: Tensor | None,
    a: Tensor | None,
    slots: Tensor | None,
    reverse: Tensor | None,
    keys: int,
    own_keys: bool,
    mode: int,
    negative_slope: float,
    need_nodes: bool,
    need_relation: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to x, y, p, q, a, empty where not wanted. y's joins x's where the keys are x."""
    dtype, compute = grad.dtype, accumulation_dtype(grad.dtype)
    channels, k = grad.shape[2], idx.shape[2]
    grad = grad.to(compute)
    dx, dy, dp, dq, da = (grad.new_empty(0) for _ in range(5))
    if need_relation:
        assert x is not None
        x = x.to(compute)
        y = x if own_keys or y is None else y.to(compute)
    if mode != MR:
        assert p is not None and q is not None and a is not None
        heads, width = a.shape[0], channels // a.shape[0]
        a = a.to(compute)
        z, powers, total = _softmax(p.to(compute), idx, q.to(compute), a, negative_slope)
        alpha = powers / total

    if mode == RSUM:
        edge_grad = (grad.unflatten(-1, (heads, -1)).unsqueeze(2) * alpha.unsqueeze(-1)).flatten(-2)
        if need_nodes:
            dx = -edge_grad.sum(2)
            dy = scatter_add(keys, 1, _expand(idx, channels), edge_grad.flatten(1, 2))
        if need_relation:
            assert x is not None and y is not None
            delta = neighbours(y, idx) - x.unsqueeze(2)
            dalpha = (delta * grad.unsqueeze(2)).unflatten(-1, (heads, -1)).sum(-1)
    else:
        assert slots is not None
        winner = slots.long()
        key = idx.gather(2, winner)  # (B, N, C): which key each channel's maximum came from
        if mode == RMR:
            # Where (slot, head) of a channel stands in a flattened (k, H).
            place = winner * heads + torch.arange(channels, device=idx.device) // width
        if need_nodes:
            routed = grad
            if mode == RMR:
                routed = grad * _factor(powers, total).flatten(2).gather(2, place)
            dx = -routed
            dy = scatter_add(keys, 1, key, routed)
        if need_relation:
            assert x is not None and y is not None
            won = k * grad * (y.gather(1, key) - x)
            dalpha = scatter_add(k * heads, 2, place, won).unflatten(-1, (k, heads))

    if need_nodes and own_keys:
        dx, dy = dx + dy, dx.new_empty(0)
    if need_relation:
        assert a is not None
        if grad_weights is not None:
            dalpha = dalpha + grad_weights.to(compute)
        dscore = alpha * (dalpha - (alpha * dalpha).sum(2, keepdim=True))
        dz = (dscore.unsqueeze(-1) * a).flatten(-2)
        dz = torch.where(z > 0, dz, negative_slope * dz)
        dp = dz.sum(2)
        dq = scatter_add(keys, 1, _expand(idx, z.shape[-1]), dz.flatten(1, 2))
        da = (dscore.unsqueeze(-1) * F.leaky_relu(z, negative_slope).unflatten(-1, a.shape)).sum((0, 1, 2))
    dx, dy, dp, dq, da = (t.to(dtype) for t in (dx, dy, dp, dq, da))
    return dx, dy, dp, dq, da


def _expand(idx: Tensor, channels: int) -> Tensor:
    return idx.flatten(1).unsqueeze(-1).expand(-1, -1, channels)


def reverse_graph(idx: Tensor, keys: int) -> Tensor:
    if idx.device.type == "cpu":
        check_indices(idx, keys)
    # A stable sort by key leaves the edges of one key in ascending order.
    key, edge = torch.sort(idx.flatten(1), dim=1, stable=True)
    bounds = torch.arange(keys + 1, device=idx.device).expand(idx.shape[0], -1).contiguous()
    return torch.cat([torch.searchsorted(key, bounds), edge], 1).to(torch.int32)
