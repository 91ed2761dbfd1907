"""relation in Triton: no edge tensor in memory, no atomics, one order of addition.

Forward, a block takes some queries:

* ``relation_softmax_kernel``: what each (query, slot, head) multiplies δ by, k α or α: (B, N, k, H).
* ``relation_aggregate_kernel``: the slots one after the other, the maximum or the sum in registers.

Backward computes these factors once more rather than keeping them, and then, by queries or by keys,

* ``relation_scores_kernel`` (queries): ∂α, through the softmax ∂e (B, N, k, H), dp and da by parts;
* ``relation_dq_kernel`` and ``relation_nodes_kernel`` (keys): walk a key's edges through the reversed graph.
  What would be a scattered addition is a sum in ascending order of edges instead.

The factors pass through memory although a block could keep them: that is k H numbers a query, and the
aggregation is then free to cut the channels into blocks that suit its loads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import dispatch
from . import reference
from .reference import MR, RMR, RSUM


@triton.jit
def _rows(first_row, rows, BLOCK_ROWS: tl.constexpr):
    """A block's rows as int64, and which of them exist; a row too many repeats the last: a good address."""
    row = first_row + tl.arange(0, BLOCK_ROWS)
    return tl.minimum(row, rows - 1).to(tl.int64), row < rows


@triton.jit
def _key_rows(idx, row, N, M):
    """The rows of y and q, (B * M, ·), that neighbours `idx` of `row` stand in: never another sample's."""
    key = tl.minimum(tl.maximum(idx, 0), M - 1)
    return (row // N) * M + key


@triton.jit
def _leaky(z, negative_slope):
    return tl.where(z > 0, z, z * negative_slope)


@triton.jit
def _channel_groups(block, C, H, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """A block's channels (groups, width), which of them exist, and the one head (groups) of a group."""
    group = block * GROUPS + tl.arange(0, GROUPS)
    channel = group[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    return channel, channel < C, tl.minimum(group * WIDTH // (C // H), H - 1)


@triton.jit
def _edge_relation(
    p_ptr,
    q_ptr,
    a_ptr,
    row,  # (rows,)
    key_row,  # (rows, slots)
    is_edge,  # (rows or 1, slots)
    head,
    first,
    HEADS: tl.constexpr,
    HEAD_RELATION: tl.constexpr,
    BLOCK_RELATION: tl.constexpr,
):
    """z (rows, slots, r), zero without an edge; a (r); the place of r in a row of p, and if it exists."""
    within = first + tl.arange(0, BLOCK_RELATION)
    inside = within < HEAD_RELATION
    place = head * HEAD_RELATION + within
    a = tl.load(a_ptr + place, mask=inside, other=0.0).to(tl.float32)
    p_place = row[:, None] * (HEADS * HEAD_RELATION) + place[None, :]
    p = tl.load(p_ptr + p_place, mask=inside[None, :], other=0.0).to(tl.float32)
    q_place = key_row[:, :, None] * (HEADS * HEAD_RELATION) + place[None, None, :]
    is_z = is_edge[:, :, None] & inside[None, None, :]
    q = tl.load(q_ptr + q_place, mask=is_z, other=0.0).to(tl.float32)
    return tl.where(is_z, p[:, None, :] + q, 0.0), a, place, inside


@triton.jit
def relation_softmax_kernel(
    idx_ptr,  # (B, N, k)
    p_ptr,  # (B, N, R)
    q_ptr,  # (B, M, R)
    a_ptr,  # (R,)
    factor_ptr,  # (B, N, k, H) float32: k α where TIMES_K, else α
    weights_ptr,  # (B, N, k, H): α in the result's dtype, or None
    rows,  # B * N
    N,
    M,
    k,
    negative_slope,
    TIMES_K: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_RELATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_RELATION: tl.constexpr,
):
    head = tl.program_id(1)
    row, is_row = _rows(tl.program_id(0) * BLOCK_ROWS, rows, BLOCK_ROWS)
    slot = tl.arange(0, SLOTS)
    is_slot = (slot < k)[None, :]
    edge = row[:, None] * k + slot[None, :]
    key_row = _key_rows(tl.load(idx_ptr + edge, mask=is_slot, other=0), row[:, None], N, M)

    score = tl.zeros((BLOCK_ROWS, SLOTS), tl.float32)
    for first in range(0, HEAD_RELATION, BLOCK_RELATION):
        z, a, _, _ = _edge_relation(
            p_ptr, q_ptr, a_ptr, row, key_row, is_slot, head, first, HEADS, HEAD_RELATION, BLOCK_RELATION
        )
        score += tl.sum(_leaky(z, negative_slope) * a[None, None, :], 2)

    # A NaN that the maximum overlooks comes back through the sum.
    largest = tl.max(tl.where(is_slot, score, float("-inf")), 1)
    power = tl.where(is_slot, tl.exp(score - largest[:, None]), 0.0)
    total = tl.sum(power, 1)
    # Divisions are exact ones: where a = 0 the total is k, and k / k has to be 1.
    if TIMES_K:
        factor = power * tl.div_rn(tl.zeros_like(total) + k, total)[:, None]
    else:
        factor = tl.div_rn(power, tl.broadcast_to(total[:, None], (BLOCK_ROWS, SLOTS)))
    tl.store(factor_ptr + edge * HEADS + head, factor, mask=is_row[:, None] & is_slot)
    if weights_ptr is not None:
        alpha = tl.div_rn(power, tl.broadcast_to(total[:, None], (BLOCK_ROWS, SLOTS)))
        tl.store(weights_ptr + edge * HEADS + head, alpha, mask=is_row[:, None] & is_slot)


@triton.jit
def relation_aggregate_kernel(
    x_ptr,  # (B, N, C)
    idx_ptr,  # (B, N, k)
    y_ptr,  # (B, M, C)
    factor_ptr,  # (B, N, k, H), or None
    out_ptr,  # (B, N, C)
    slots_ptr,  # (B, N, C) uint8: where the maximum came from; or None
    rows,  # B * N
    N,
    M,
    C,
    k,
    H,
    SUM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row, is_row = _rows(tl.program_id(0) * BLOCK_ROWS, rows, BLOCK_ROWS)
    channel, inside, head = _channel_groups(tl.program_id(1), C, H, GROUPS, WIDTH)
    channel, inside = channel[None, :, :], inside[None, :, :]
    place = row[:, None, None] * C + channel
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)

    if SUM:
        result = tl.zeros((BLOCK_ROWS, GROUPS, WIDTH), tl.float32)
    else:
        # Nothing is less than -inf, so a row of nothing else keeps its first slot.
        result = tl.full((BLOCK_ROWS, GROUPS, WIDTH), float("-inf"), tl.float32)
    winner = tl.zeros((BLOCK_ROWS, GROUPS, WIDTH), tl.int32)
    for slot in tl.range(0, k, loop_unroll_factor=UNROLL):
        edge = row * k + slot
        key_row = _key_rows(tl.load(idx_ptr + edge), row, N, M)
        y_place = key_row[:, None, None] * C + channel
        value = tl.load(y_ptr + y_place, mask=inside, other=0.0).to(tl.float32) - x
        if factor_ptr is not None:
            value *= tl.load(factor_ptr + edge[:, None] * H + head[None, :])[:, :, None]
        if SUM:
            result += value
        else:
            # The first NaN wins and stays: nothing is greater than it.
            better = (value > result) | ((value != value) & (result == result))
            result = tl.where(better, value, result)
            winner = tl.where(better, slot, winner)

    stored = is_row[:, None, None] & inside
    tl.store(out_ptr + place, result, mask=stored)
    if slots_ptr is not None:
        tl.store(slots_ptr + place, winner.to(tl.uint8), mask=stored)


@triton.jit
def relation_scores_kernel(
    grad_ptr,  # (B, N, C)
    grad_weights_ptr,  # (B, N, k, H), or None
    x_ptr,  # (B, N, C)
    idx_ptr,  # (B, N, k)
    y_ptr,  # (B, M, C)
    p_ptr,  # (B, N, R)
    q_ptr,  # (B, M, R)
    a_ptr,  # (R,)
    slots_ptr,  # (B, N, C), or None where SUM
    factor_ptr,  # (B, N, k, H): k α, or α where SUM
    dscore_ptr,  # (B, N, k, H) float32
    dp_ptr,  # (B, N, R)
    da_ptr,  # (blocks of rows, R) float32: each block's part of da
    rows,  # B * N
    N,
    M,
    k,
    negative_slope,
    SUM: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_CHANNELS: tl.constexpr,
    HEAD_RELATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_RELATION: tl.constexpr,
):
    head = tl.program_id(1)
    row, is_row = _rows(tl.program_id(0) * BLOCK_ROWS, rows, BLOCK_ROWS)
    slot = tl.arange(0, SLOTS)
    is_edge = is_row[:, None] & (slot < k)[None, :]
    edge = row[:, None] * k + slot[None, :]
    key_row = _key_rows(tl.load(idx_ptr + edge, mask=is_edge, other=0), row[:, None], N, M)

    dalpha = tl.zeros((BLOCK_ROWS, SLOTS), tl.float32)
    for first in range(0, HEAD_CHANNELS, BLOCK_CHANNELS):
        within = first + tl.arange(0, BLOCK_CHANNELS)
        inside = (within < HEAD_CHANNELS)[None, :]
        channel = head * HEAD_CHANNELS + within
        place = row[:, None] * (HEADS * HEAD_CHANNELS) + channel[None, :]
        grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if SUM:
            y_place = key_row[:, :, None] * (HEADS * HEAD_CHANNELS) + channel[None, None, :]
            is_y = is_edge[:, :, None] & inside[:, None, :]
            y = tl.load(y_ptr + y_place, mask=is_y, other=0.0).to(tl.float32)
            dalpha += tl.sum((y - x[:, None, :]) * grad[:, None, :], 2)
        else:
            winner = tl.load(slots_ptr + place, mask=inside, other=0).to(tl.int32)
            won_key = tl.load(idx_ptr + row[:, None] * k + winner, mask=inside, other=0)
            y_place = _key_rows(won_key, row[:, None], N, M) * (HEADS * HEAD_CHANNELS) + channel[None, :]
            y = tl.load(y_ptr + y_place, mask=inside, other=0.0).to(tl.float32)
            won = (grad * k) * (y - x)
            dalpha += tl.sum(tl.where(winner[:, None, :] == slot[None, :, None], won[:, None, :], 0.0), 2)

    alpha = tl.load(factor_ptr + edge * HEADS + head, mask=is_edge, other=0.0)
    if not SUM:
        alpha = tl.div_rn(alpha, tl.zeros_like(alpha) + k)
    if grad_weights_ptr is not None:
        dalpha += tl.load(grad_weights_ptr + edge * HEADS + head, mask=is_edge, other=0.0).to(tl.float32)
    dalpha = tl.where(is_edge, dalpha, 0.0)
    dscore = alpha * (dalpha - tl.sum(alpha * dalpha, 1)[:, None])
    dscore = tl.where(is_edge, dscore, 0.0)
    tl.store(dscore_ptr + edge * HEADS + head, dscore, mask=is_edge)

    for first in range(0, HEAD_RELATION, BLOCK_RELATION):
        z, a, place, inside = _edge_relation(
            p_ptr, q_ptr, a_ptr, row, key_row, is_edge, head, first, HEADS, HEAD_RELATION, BLOCK_RELATION
        )
        dz = dscore[:, :, None] * a[None, None, :]
        dp = tl.sum(tl.where(z > 0, dz, negative_slope * dz), 1)
        dp_place = row[:, None] * (HEADS * HEAD_RELATION) + place[None, :]
        tl.store(dp_ptr + dp_place, dp, mask=is_row[:, None] & inside[None, :])
        da = tl.sum(tl.sum(dscore[:, :, None] * _leaky(z, negative_slope), 1), 0)
        tl.store(da_ptr + tl.program_id(0).to(tl.int64) * (HEADS * HEAD_RELATION) + place, da, mask=inside)


@triton.jit
def _edges_of_key(reverse_ptr, key_row, N, M, k):
    """A sample's list of edges, the bounds in it of those of this key, and the sample's first query."""
    sample = key_row // M
    reverse_ptr += sample * (M + 1 + N * k)
    bounds_ptr = reverse_ptr + key_row % M
    return reverse_ptr + M + 1, tl.load(bounds_ptr), tl.load(bounds_ptr + 1), sample * N


@triton.jit
def relation_dq_kernel(
    reverse_ptr,  # (B, M + 1 + N * k)
    dscore_ptr,  # (B, N, k, H)
    p_ptr,  # (B, N, R)
    q_ptr,  # (B, M, R)
    a_ptr,  # (R,)
    dq_ptr,  # (B, M, R)
    N,
    M,
    R,
    k,
    H,
    negative_slope,
    BLOCK_EDGES: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    key_row = tl.program_id(0).to(tl.int64)
    place, inside, head = _channel_groups(tl.program_id(1), R, H, GROUPS, WIDTH)
    q = tl.load(q_ptr + key_row * R + place, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + place, mask=inside, other=0.0).to(tl.float32)

    edges_ptr, begin, end, first_row = _edges_of_key(reverse_ptr, key_row, N, M, k)
    dq = tl.zeros((BLOCK_EDGES, GROUPS, WIDTH), tl.float32)
    for first in range(begin, end, BLOCK_EDGES):
        at = first + tl.arange(0, BLOCK_EDGES)
        is_edge = at < end
        edge = tl.load(edges_ptr + at, mask=is_edge, other=0)
        p_place = (first_row + edge // k)[:, None, None] * R + place[None, :, :]
        loaded = is_edge[:, None, None] & inside[None, :, :]
        z = tl.load(p_ptr + p_place, mask=loaded, other=0.0).to(tl.float32) + q[None, :, :]
        dscore_place = (first_row * k + edge)[:, None] * H + head[None, :]
        dscore = tl.load(dscore_ptr + dscore_place, mask=is_edge[:, None], other=0.0)
        dz = dscore[:, :, None] * a[None, :, :]
        dq += tl.where(loaded, tl.where(z > 0, dz, negative_slope * dz), 0.0)
    tl.store(dq_ptr + key_row * R + place, tl.sum(dq, 0), mask=inside)


@triton.jit
def _centre_part(
    grad_ptr,
    slots_ptr,
    factor_ptr,
    row,  # (rows,)
    channel,  # (groups, width)
    inside,  # (groups, width)
    head,  # (groups,)
    C,
    k,
    H,
    SUM: tl.constexpr,
):
    """What a query's own features get, as the -x_i of its δ: (rows, groups, width)."""
    place = row[:, None, None] * C + channel[None, :, :]
    grad = tl.load(grad_ptr + place, mask=inside[None, :, :], other=0.0).to(tl.float32)
    if factor_ptr is None:
        return -grad
    elif SUM:
        total = tl.zeros_like(grad)
        for slot in range(0, k):
            alpha = tl.load(factor_ptr + (row * k + slot)[:, None] * H + head[None, :])
            total += grad * alpha[:, :, None]
        return -total
    else:
        winner = tl.load(slots_ptr + place, mask=inside[None, :, :], other=0).to(tl.int32)
        edge = row[:, None, None] * k + winner
        return -(grad * tl.load(factor_ptr + edge * H + head[None, :, None]))


@triton.jit
def relation_centres_kernel(
    grad_ptr,  # (B, N, C)
    slots_ptr,  # (B, N, C), or None where SUM
    factor_ptr,  # (B, N, k, H), or None
    dx_ptr,  # (B, N, C)
    rows,  # B * N
    C,
    k,
    H,
    SUM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row, is_row = _rows(tl.program_id(0) * BLOCK_ROWS, rows, BLOCK_ROWS)
    channel, inside, head = _channel_groups(tl.program_id(1), C, H, GROUPS, WIDTH)
    dx = _centre_part(grad_ptr, slots_ptr, factor_ptr, row, channel, inside, head, C, k, H, SUM)
    place = row[:, None, None] * C + channel[None, :, :]
    tl.store(dx_ptr + place, dx, mask=is_row[:, None, None] & inside[None, :, :])


@triton.jit
def relation_nodes_kernel(
    reverse_ptr,  # (B, M + 1 + N * k)
    grad_ptr,  # (B, N, C)
    slots_ptr,  # (B, N, C), or None where SUM
    factor_ptr,  # (B, N, k, H), or None
    dy_ptr,  # (B, M, C): dx where OWN_KEYS
    N,
    M,
    C,
    k,
    H,
    SUM: tl.constexpr,
    OWN_KEYS: tl.constexpr,  # keys are queries too: both parts are added before one rounding
    BLOCK_EDGES: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    key_row = tl.program_id(0).to(tl.int64)
    channel, inside, head = _channel_groups(tl.program_id(1), C, H, GROUPS, WIDTH)

    edges_ptr, begin, end, first_row = _edges_of_key(reverse_ptr, key_row, N, M, k)
    dy = tl.zeros((BLOCK_EDGES, GROUPS, WIDTH), tl.float32)
    for first in range(begin, end, BLOCK_EDGES):
        at = first + tl.arange(0, BLOCK_EDGES)
        is_edge = at < end
        edge = tl.load(edges_ptr + at, mask=is_edge, other=0)
        loaded = is_edge[:, None, None] & inside[None, :, :]
        place = (first_row + edge // k)[:, None, None] * C + channel[None, :, :]
        part = tl.load(grad_ptr + place, mask=loaded, other=0.0).to(tl.float32)
        if factor_ptr is not None:
            factor_place = (first_row * k + edge)[:, None] * H + head[None, :]
            part *= tl.load(factor_ptr + factor_place, mask=is_edge[:, None], other=0.0)[:, :, None]
        if not SUM:
            winner = tl.load(slots_ptr + place, mask=loaded, other=0).to(tl.int32)
            part = tl.where(winner == (edge % k)[:, None, None], part, 0.0)
        dy += part

    result = tl.sum(dy, 0)[None, :, :]
    if OWN_KEYS:
        row = key_row + tl.arange(0, 1)
        result += _centre_part(grad_ptr, slots_ptr, factor_ptr, row, channel, inside, head, C, k, H, SUM)
    tl.store(dy_ptr + key_row * C + channel[None, :, :], result, mask=inside[None, :, :])


NUM_WARPS = 4
ROWS = EDGES = 16  # of a (·, channels) tile; most keys of a graph with 9 neighbours have no more edges
TILE = 2048  # numbers in a (rows, slots, columns) tile: 16 a lane, beside the addresses they come from
UNROLL = 4  # slots whose loads are under way at once


def _power_of_two(size: int, most: int) -> int:
    return min(most, triton.next_power_of_2(max(size, 1)))


def _channel_tile(channels: int, heads: int | None) -> dict[str, Any]:
    """Of 64 channels none are wasted at 192, 320 and 640; with 16 rows they are eight numbers a lane."""
    block = _power_of_two(channels, 64)
    # One vector load a group, and one factor. Without factors heads do not matter.
    width = min(block, 8 if heads is None else math.gcd(channels // heads, 8))
    return {"GROUPS": block // width, "WIDTH": width}


def _blocks(channels: int, tile: dict[str, Any]) -> int:
    return triton.cdiv(channels, tile["GROUPS"] * tile["WIDTH"])


def _edge_tile(k: int, *widths: int) -> tuple[int, int, list[int]]:
    """Tiles with a place for every edge of their rows: (rows, slots, columns), one `columns` a width."""
    slots = triton.next_power_of_2(k)
    # Blocks of 16 columns waste little of the widths of a head (12, 20, 40, 48, 80, 160).
    columns = [_power_of_two(width, 16) for width in widths]
    rows = max(1, min(ROWS, TILE // (slots * max(columns))))
    return rows, slots, columns


def _softmax_launch(k: int, heads: int, relation: int) -> dict[str, Any]:
    rows, slots, (columns,) = _edge_tile(k, relation // heads)
    return {
        "HEADS": heads,
        "HEAD_RELATION": relation // heads,
        "BLOCK_ROWS": rows,
        "SLOTS": slots,
        "BLOCK_RELATION": columns,
    }


def _scores_launch(k: int, heads: int, relation: int, channels: int) -> dict[str, Any]:
    rows, slots, columns = _edge_tile(k, relation // heads, channels // heads)
    return {
        "HEADS": heads,
        "HEAD_CHANNELS": channels // heads,
        "HEAD_RELATION": relation // heads,
        "BLOCK_ROWS": rows,
        "SLOTS": slots,
        "BLOCK_CHANNELS": columns[1],
        "BLOCK_RELATION": columns[0],
    }


def _factors(
    idx: Tensor, p: Tensor, q: Tensor, a: Tensor, mode: int, negative_slope: float, weights: Tensor | None
) -> Tensor:
    """(B, N, k, H): k α in mode rmr, α in mode rsum; and α into `weights`."""
    batch, queries, k = idx.shape
    heads, relation = a.shape[0], p.shape[2]
    factor = torch.empty((batch, queries, k, heads), dtype=torch.float32, device=idx.device)
    launch = _softmax_launch(k, heads, relation)
    rows = batch * queries
    relation_softmax_kernel[(triton.cdiv(rows, launch["BLOCK_ROWS"]), heads)](
        idx,
        p,
        q,
        a,
        factor,
        weights,
        rows,
        queries,
        q.shape[1],
        k,
        negative_slope,
        TIMES_K=mode == RMR,
        **launch,
        num_warps=NUM_WARPS,
    )
    return factor


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.contiguous() for t in tensors]


def _rounded_by_torch(operator: Callable[..., Any], *args: Any) -> Any:
    """For the interpreter, which truncates to bfloat16: the same values as float32, rounded by torch."""
    half = torch.bfloat16
    wide = (t.float() if isinstance(t, Tensor) and t.dtype == half else t for t in args)
    return tuple(t.to(half) if t.dtype == torch.float32 else t for t in operator(*wide))


def _check_indices(idx: Tensor, keys: int) -> None:
    # Values cost nothing to look at on a CPU; that there are no keys at all shows without looking.
    if idx.device.type == "cpu" or keys == 0:
        reference.check_indices(idx, keys)


def relation(
    x: Tensor,
    idx: Tensor,
    y: Tensor | None,
    p: Tensor | None,
    q: Tensor | None,
    a: Tensor | None,
    reverse: Tensor | None,
    mode: int,
    negative_slope: float,
    return_weights: bool,
    save_slots: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in reference.relation."""
    if dispatch.TRITON_INTERPRETED and x.dtype == torch.bfloat16:
        return _rounded_by_torch(
            *(relation, x, idx, y, p, q, a, reverse),
            *(mode, negative_slope, return_weights, save_slots),
        )
    batch, queries, channels = x.shape
    keys, k = (x if y is None else y).shape[1], idx.shape[2]
    _check_indices(idx, keys)
    out = x.new_empty(x.shape)
    weights, slots = x.new_empty(0), x.new_empty(0, dtype=torch.uint8)
    if return_weights:
        assert a is not None
        weights = x.new_empty((*idx.shape, a.shape[0]))
    if save_slots and mode != RSUM:
        slots = x.new_empty(x.shape, dtype=torch.uint8)
    rows = batch * queries
    if rows == 0:
        return out, weights, slots

    x, idx, y, p, q, a = _contiguous(x, idx, y, p, q, a)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        factor, heads = None, 1
        if mode != MR:
            assert p is not None and q is not None and a is not None
            factor, heads = (
                _factors(idx, p, q, a, mode, negative_slope, weights if return_weights else None),
                a.shape[0],
            )
        if channels > 0:
            tile = _channel_tile(channels, None if factor is None else heads)
            relation_aggregate_kernel[(triton.cdiv(rows, ROWS), _blocks(channels, tile))](
                x,
                idx,
                x if y is None else y,
                factor,
                out,
                slots if slots.numel() else None,
                rows,
                queries,
                keys,
                channels,
                k,
                heads,
                SUM=mode == RSUM,
                BLOCK_ROWS=ROWS,
                **tile,
                UNROLL=UNROLL,
                num_warps=NUM_WARPS,
            )
    return out, weights, slots


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
    """Arguments and results as in reference.relation_backward."""
    if dispatch.TRITON_INTERPRETED and grad.dtype == torch.bfloat16:
        return _rounded_by_torch(
            *(relation_backward, grad, grad_weights, x, idx, y, p, q, a, slots, reverse),
            *(keys, own_keys, mode, negative_slope, need_nodes, need_relation),
        )
    batch, queries, channels = grad.shape
    _check_indices(idx, keys)
    grad, grad_weights, x, idx, y, p, q, a, slots = _contiguous(grad, grad_weights, x, idx, y, p, q, a, slots)
    if own_keys or y is None:
        y = x
    dx, dy, dp, dq, da = (grad.new_empty(0) for _ in range(5))  # no output may alias another
    if need_nodes:
        dx = torch.empty_like(grad)
        dy = dy if own_keys else grad.new_empty((batch, keys, channels))
    if need_relation:
        assert p is not None and q is not None and a is not None
        dp, dq, da = torch.empty_like(p), torch.empty_like(q), torch.empty_like(a)
    if batch * queries == 0:
        return dx, dy.zero_(), dp, dq.zero_(), da.zero_()

    if not (need_nodes or need_relation):
        return dx, dy, dp, dq, da
    reverse = reference.reverse_graph(idx, keys) if reverse is None else reverse.contiguous()
    with torch.cuda.device_of(grad):  # Triton launches on the current device
        factor = None
        if mode != MR:
            assert p is not None and q is not None and a is not None
            factor = _factors(idx, p, q, a, mode, negative_slope, None)
        heads = 1 if a is None else a.shape[0]
        if need_nodes and channels > 0:
            _nodes_backward(grad, slots, factor, reverse, dx, dy, idx, keys, own_keys, heads, mode == RSUM)
        if need_relation:
            assert x is not None and y is not None and p is not None and q is not None and a is not None
            assert factor is not None
            _relation_backward(
                *(grad, grad_weights, x, idx, y, p, q, a, slots, factor, reverse),
                *(dp, dq, da, keys, mode, negative_slope),
            )
    return dx, dy, dp, dq, da


def _nodes_backward(
    grad: Tensor,
    slots: Tensor | None,
    factor: Tensor | None,
    reverse: Tensor,
    dx: Tensor,
    dy: Tensor,
    idx: Tensor,
    keys: int,
    own_keys: bool,
    heads: int,
    is_sum: bool,
) -> None:
    batch, queries, k = idx.shape
    channels = grad.shape[2]
    tile = _channel_tile(channels, None if factor is None else heads)
    relation_nodes_kernel[(batch * keys, _blocks(channels, tile))](
        reverse,
        grad,
        slots,
        factor,
        dx if own_keys else dy,
        queries,
        keys,
        channels,
        k,
        heads,
        SUM=is_sum,
        OWN_KEYS=own_keys,
        BLOCK_EDGES=EDGES,
        **tile,
        num_warps=NUM_WARPS,
    )
    if own_keys:
        return
    rows = batch * queries
    relation_centres_kernel[(triton.cdiv(rows, ROWS), _blocks(channels, tile))](
        grad,
        slots,
        factor,
        dx,
        rows,
        channels,
        k,
        heads,
        SUM=is_sum,
        BLOCK_ROWS=ROWS,
        **tile,
        num_warps=NUM_WARPS,
    )


def _relation_backward(
    grad: Tensor,
    grad_weights: Tensor | None,
    x: Tensor,
    idx: Tensor,
    y: Tensor,
    p: Tensor,
    q: Tensor,
    a: Tensor,
    slots: Tensor | None,
    factor: Tensor,
    reverse: Tensor,
    dp: Tensor,
    dq: Tensor,
    da: Tensor,
    keys: int,
    mode: int,
    negative_slope: float,
) -> None:
    batch, queries, k = idx.shape
    heads, relation = a.shape[0], p.shape[2]
    rows = batch * queries
    launch = _scores_launch(k, heads, relation, grad.shape[2])
    blocks = triton.cdiv(rows, launch["BLOCK_ROWS"])
    dscore = torch.empty_like(factor)
    da_parts = torch.empty((blocks, relation), dtype=torch.float32, device=grad.device)
    relation_scores_kernel[(blocks, heads)](
        grad,
        grad_weights,
        x,
        idx,
        y,
        p,
        q,
        a,
        slots,
        factor,
        dscore,
        dp,
        da_parts,
        rows,
        queries,
        keys,
        k,
        negative_slope,
        SUM=mode == RSUM,
        **launch,
        num_warps=NUM_WARPS,
    )
    if relation == 0:
        return
    da.copy_(da_parts.sum(0).view_as(da))
    tile = _channel_tile(relation, heads)
    relation_dq_kernel[(batch * keys, _blocks(relation, tile))](
        reverse,
        dscore,
        p,
        q,
        a,
        dq,
        queries,
        keys,
        relation,
        k,
        heads,
        negative_slope,
        BLOCK_EDGES=EDGES,
        **tile,
        num_warps=NUM_WARPS,
    )


AotCase = tuple[Callable[..., Any], dict[str, str], dict[str, Any], int, int]

VIG_HEADS = 4  # and R = C / 4
# Arguments that are None in a mode.
MODE_UNUSED: dict[str, dict[str, Any]] = {
    "mr": {"factor_ptr": None},
    "rmr": {},
    "rsum": {"slots_ptr": None},
}


def aot_cases(capability: int) -> dict[str, AotCase]:
    """What the tests compile ahead of time: name -> (kernel, signature, constexprs, num_warps, num_stages).

    Types are written as in knn's. Launches depend on no capability. Everything is compiled at one of ViG's
    widths in both dtypes. Of its other widths there is what differs most: at C = 48 relations of 12 numbers,
    which are not aligned, and at C = 640 the longest rows.
    """
    cases: dict[str, AotCase] = {}

    def add(dtype: str, channels: int, k: int, modes: tuple[str, ...], kernels: tuple[str, ...]) -> None:
        relation = channels // 4
        width = f"{dtype} C={channels}"
        if "softmax" in kernels:
            softmax = _softmax_launch(k, VIG_HEADS, relation) | {"TIMES_K": True, "weights_ptr": None}
            cases[f"softmax {width} k={k}"] = _aot_case(relation_softmax_kernel, dtype, relation, softmax)
        for mode in modes:
            fixed = MODE_UNUSED[mode] | {"SUM": mode == "rsum"}
            tile = fixed | _channel_tile(channels, None if mode == "mr" else VIG_HEADS)
            if "aggregate" in kernels:
                aggregate = tile | {"BLOCK_ROWS": ROWS, "UNROLL": UNROLL}
                name = f"aggregate {mode} {width}"
                cases[name] = _aot_case(relation_aggregate_kernel, dtype, relation, aggregate)
            if "nodes" in kernels:
                nodes = tile | {"BLOCK_EDGES": EDGES, "OWN_KEYS": True}
                cases[f"nodes {mode} {width}"] = _aot_case(relation_nodes_kernel, dtype, relation, nodes)
            if "scores" in kernels and mode != "mr":
                scores = fixed | _scores_launch(k, VIG_HEADS, relation, channels) | {"grad_weights_ptr": None}
                name = f"scores {mode} {width} k={k}"
                cases[name] = _aot_case(relation_scores_kernel, dtype, relation, scores)
        if "dq" in kernels:
            dq = _channel_tile(relation, VIG_HEADS) | {"BLOCK_EDGES": EDGES}
            cases[f"dq {width}"] = _aot_case(relation_dq_kernel, dtype, relation, dq)

    everything = ("softmax", "aggregate", "nodes", "scores", "dq")
    add("bf16", 192, 18, ("mr", "rmr", "rsum"), everything)
    add("fp32", 192, 18, ("mr", "rmr", "rsum"), everything)
    add("bf16", 48, 9, ("rmr",), everything)
    add("bf16", 640, 18, ("rmr",), ("softmax", "scores", "dq"))
    # The longest list there can be, with weights; and keys that are not the queries.
    softmax = _softmax_launch(128, VIG_HEADS, 80) | {"TIMES_K": True}
    cases["softmax bf16 C=320 k=128 weights"] = _aot_case(relation_softmax_kernel, "bf16", 80, softmax)
    for mode in ("rmr", "rsum"):
        fixed = MODE_UNUSED[mode] | {"SUM": mode == "rsum"}
        scores = fixed | _scores_launch(128, VIG_HEADS, 80, 320)
        name = f"scores {mode} bf16 C=320 k=128 weights"
        cases[name] = _aot_case(relation_scores_kernel, "bf16", 80, scores)
        tile = fixed | _channel_tile(320, VIG_HEADS)
        centres = tile | {"BLOCK_ROWS": ROWS}
        cases[f"centres {mode} bf16"] = _aot_case(relation_centres_kernel, "bf16", 80, centres)
        keys = tile | {"BLOCK_EDGES": EDGES, "OWN_KEYS": False}
        cases[f"nodes {mode} bf16 other keys"] = _aot_case(relation_nodes_kernel, "bf16", 80, keys)
    return cases


def _aot_case(kernel: Any, dtype: str, relation: int, constexprs: dict[str, Any]) -> AotCase:
    types = {
        "idx_ptr": "*i64:16",
        "reverse_ptr": "*i32:16",
        "slots_ptr": "*u8:16",
        **dict.fromkeys(("factor_ptr", "dscore_ptr", "da_ptr"), "*fp32:16"),
        "negative_slope": "fp32",
        "C": "i32:16",
        "R": "i32:16" if relation % 16 == 0 else "i32",
    }
    signature = {
        argument: "constexpr"
        if argument in constexprs
        else types.get(argument, f"*{dtype}:16" if argument.endswith("_ptr") else "i32")
        for argument in kernel.arg_names
    }
    return kernel, signature, constexprs, NUM_WARPS, 1
