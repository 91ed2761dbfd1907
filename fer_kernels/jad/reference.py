"""jad, the specification: every other backend must agree with this, forward and backward.

Materialises the (B, H, N, M) attention weights, which is what the other backends exist to avoid. A call has
two halves: the column means choose what to drop, written down as a bias a key or as a bit an entry; then
comes softmax attention under that bias or those bits. The backward sees only what was written down: how the
choice was made does not matter to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import accumulation_dtype
from ..dispatch import without_autocast

MODES = ("none", "key", "soft", "entry", "random", "dropkey")  # their numbers in the schema
NONE, KEY, SOFT, ENTRY, RANDOM, DROPKEY = range(len(MODES))
NEARLY_UNIFORM = 0.05  # key, random, entry: a head whose M * std(c) is below this drops nothing
LOST_MASS = 1e-6  # entry: a row that would keep less than this is left whole


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    compute = accumulation_dtype(q.dtype)
    return (q.to(compute) @ k.to(compute).mT) * scale


def _weights(scores: Tensor) -> tuple[Tensor, Tensor]:
    """softmax and log-sum-exp by row; a row of -inf alone weighs nothing: zeros and -inf."""
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    alive = scores.masked_fill(dead, 0.0)  # softmax of such a row is NaN, and so would be its derivative
    lse = alive.logsumexp(-1, keepdim=True).masked_fill(dead, -torch.inf)
    return alive.softmax(-1).masked_fill(dead, 0.0), lse.squeeze(-1)


def _joint(c: Tensor, joint_over_head: bool) -> Tensor:
    """What decisions are made on, in float64: every backend that has the same c then drops the same."""
    c = c.double()
    return c.mean(1, keepdim=True).expand_as(c) if joint_over_head else c


def _deviation(joint: Tensor) -> Tensor:
    """The population's, (B, H, 1); Tensor.std warns of an empty batch. One NaN makes it NaN."""
    return (joint - joint.mean(-1, keepdim=True)).square().mean(-1, keepdim=True).sqrt()


def _may_drop(joint: Tensor, protect: int) -> Tensor:
    """(B, H, M): not protected, in a head that is not nearly uniform."""
    keys = joint.shape[-1]
    return (torch.arange(keys, device=joint.device) >= protect) & (keys * _deviation(joint) >= NEARLY_UNIFORM)


def _rank(values: Tensor, descending: bool) -> Tensor:
    """The place of each value in its sorted row; equal values in index order."""
    return torch.sort(values, dim=-1, descending=descending, stable=True).indices.argsort(-1)


def _joint_keys(joint: Tensor, beta: float, max_drop: float, protect: int) -> Tensor:
    """(B, H, M) bool: the keys that mode "key" drops."""
    keys = joint.shape[-1]
    threshold = 1 / keys + beta * _deviation(joint)
    above = (joint > threshold) & _may_drop(joint, protect)
    return above & (_rank(joint.masked_fill(~above, -1.0), descending=True) < int(max_drop * keys))


def key_bias(
    c: Tensor,
    gate: Tensor | None,
    noise: Tensor | None,
    mode: int,
    beta: float,
    max_drop: float,
    protect: int,
    soft: float,
    joint_over_head: bool,
) -> Tensor:
    """(B, H, M), c's dtype: what is added to every score of a key; -inf where it is dropped."""
    joint = _joint(c, joint_over_head)
    free = torch.arange(c.shape[-1], device=c.device) >= protect
    if mode == SOFT:
        top = joint.amax(-1, keepdim=True)
        bias = torch.log1p(-soft * (joint / top)).to(c.dtype)
        bias = torch.where(top > 0, bias, 0.0)  # not where a NaN is the largest
    else:
        if mode == DROPKEY:
            assert noise is not None
            dropped = (noise.double() < max_drop) & free
            dropped = dropped & ~dropped.all(-1, keepdim=True)
        else:
            dropped = _joint_keys(joint, beta, max_drop, protect)
        if mode == RANDOM:
            assert noise is not None
            order = _rank(noise.double().masked_fill(~free, torch.inf), descending=False)
            dropped = order < dropped.sum(-1, keepdim=True)
        bias = torch.zeros_like(c).masked_fill(dropped, -torch.inf)
    return bias if gate is None else torch.where(gate.unsqueeze(-1), bias, 0.0)


def similar_entries(
    weights: Tensor, c: Tensor, gate: Tensor | None, protect: int, tau: float, joint_over_head: bool
) -> Tensor:
    """(B, H, N, M) bool: the entries that mode "entry" drops."""
    joint = _joint(c, joint_over_head)
    columns = (joint > 1 / c.shape[-1]) & _may_drop(joint, protect)
    if gate is not None:
        columns = columns & gate.unsqueeze(-1)
    level = joint.to(c.dtype).unsqueeze(2)
    dropped = ((weights - level).abs() <= tau * level) & columns.unsqueeze(2)
    return dropped & (weights.masked_fill(dropped, 0.0).sum(-1, keepdim=True) >= LOST_MASS)


def pack(dropped: Tensor) -> Tensor:
    """(..., M) bool to (..., ceil(M / 8)) uint8: key j is bit j % 8 of byte j // 8; bits past M are 0."""
    padded = torch.nn.functional.pad(dropped, (0, -dropped.shape[-1] % 8))
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], device=dropped.device)
    return (padded.unflatten(-1, (-1, 8)) * places).sum(-1).to(torch.uint8)


def unpack(bits: Tensor, keys: int) -> Tensor:
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    return (bits.unsqueeze(-1) & places).ne(0).flatten(-2)[..., :keys]


@without_autocast
def jad(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    noise: Tensor | None,
    mode: int,
    beta: float,
    max_drop: float,
    protect: int,
    soft: float,
    tau: float,
    joint_over_head: bool,
    scale: float,
    return_stats: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, lse, column_mean, bias, bits. column_mean is empty without return_stats, bias for none and entry,
    bits for all but entry, and for entry where neither return_stats nor save asks for it."""
    scores = _scores(q, k, scale)
    column_mean, bias, bits = scores.new_empty(0), scores.new_empty(0), q.new_empty(0, dtype=torch.uint8)
    weights, lse = _weights(scores)
    c = weights.mean(2)
    queries = q.shape[2]
    if return_stats:
        column_mean = c
    if mode == ENTRY:
        dropped = similar_entries(weights, c, gate, protect, tau, joint_over_head)
        if queries < 2:  # then c is the row itself
            dropped = torch.zeros_like(dropped)
        scores = scores.masked_fill(dropped, -torch.inf)
        if return_stats or save:
            bits = pack(dropped)
    elif mode != NONE:
        bias = key_bias(c, gate, noise, mode, beta, max_drop, protect, soft, joint_over_head)
        if queries < 2:
            bias = torch.zeros_like(bias)
        scores = scores + bias.unsqueeze(2)
    if mode != NONE:
        weights, lse = _weights(scores)
    out = (weights @ v.to(weights.dtype)).to(q.dtype)
    return out, lse, column_mean, bias, bits


@without_autocast
def jad_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor,
    bits: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to q, k, v, with what was dropped held constant.

    P̃ is computed anew rather than as exp(S + bias - lse), and Δ as Σ_j P̃_ij dP̃_ij rather than dO_i · O_i, so
    that this is a function of grad, q, k and v alone: differentiated again, it gives second derivatives.
    """
    scores = _scores(q, k, scale)
    if bits.numel():
        scores = scores.masked_fill(unpack(bits, k.shape[2]), -torch.inf)
    if bias.numel():
        scores = scores + bias.unsqueeze(2)
    weights, _ = _weights(scores)
    compute = weights.dtype
    grad = grad.to(compute)
    dv = weights.mT @ grad
    dweights = grad @ v.to(compute).mT
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
    dq = dscores @ k.to(compute) * scale
    # in autograd's order: MKL rounds the other one, over many queries, up to three times as much
    dk = (q.to(compute).mT @ dscores).mT.contiguous() * scale
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


@without_autocast
def column_mean(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The column means (B, H, M) and the log-sum-exp of the rows (B, H, N)."""
    weights, lse = _weights(_scores(q, k, scale))
    return weights.mean(2), lse


@without_autocast
def column_mean_backward(
    grad: Tensor, q: Tensor, k: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """With dP_ij = g_j / N: dS = P (dP - Σ_j P dP). As above, computed anew from q and k alone."""
    weights, _ = _weights(_scores(q, k, scale))
    compute = weights.dtype
    dweights = grad.to(compute).unsqueeze(2) / q.shape[2]
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
    dq = dscores @ k.to(compute) * scale
    dk = (q.to(compute).mT @ dscores).mT.contiguous() * scale
    return dq.to(q.dtype), dk.to(q.dtype)
