"""jad in Triton: column means, attention under what they chose to drop, and both backwards.

No N x M array of floats is stored; every kernel computes the scores of a tile anew from q and k. A forward
takes up to three passes over the scores, because each needs the whole of the one before:

1. ``jad_attention_kernel`` without values: the log-sum-exp of every row;
2. ``jad_column_mean_kernel``: a program takes some keys and walks over the queries, so a column's sum has one
   order and no atomics. Its means go through `reference.key_bias`: arrays of (B, H, M), not worth a kernel;
3. ``jad_attention_kernel`` with values: softmax over the keys that are left, keeping what it needs of a row
   while it walks over the keys (flash attention). For "entry" it also decides, and may write bits.

The backward of both operators is a pair of kernels: ``jad_query_gradient_kernel`` walks over keys,
``jad_key_gradient_kernel`` over queries.

Registers limit how many channels a program can hold. Of a wider head it writes BLOCK_D channels, its slice
(the grid's second axis), and the scores take several steps over the channels: WIDE. What has no channels
(lse, bits, delta, excess) every slice computes and writes alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import dispatch
from . import reference
from .reference import DROPKEY, ENTRY, NONE

INFINITY = tl.constexpr(float("inf"))
LOST_MASS = tl.constexpr(reference.LOST_MASS)


# ---- what the kernels share ----


@triton.jit
def _to_tf32(x):
    """x rounded to TF32's 11 bits, as float32."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)  # adding to the bits of a NaN may carry into its sign


@triton.jit
def _add_product(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b to float32's accuracy. Half inputs have exact products; where a is float32 (weights,
    their gradients) or both are, the float32 operand is a sum of two parts that a tensor core can multiply.

    Triton's own "tf32x3" is not used: it turns an overflow to -inf into NaN where the small parts overflow to
    +inf.
    """
    if a.dtype == b.dtype and b.dtype != tl.float32:
        total = tl.dot(a, b, total)
    elif b.dtype == tl.bfloat16:
        high = a.to(tl.bfloat16)
        low = (a - high.to(tl.float32)).to(tl.bfloat16)
        total = tl.dot(high, b, tl.dot(low, b, total))
    elif PRECISION == "ieee":
        total = tl.dot(a, b.to(tl.float32), total, input_precision="ieee")
    else:
        # float16 becomes TF32, which holds it exactly: weights and gradients do not fit its range.
        a_high = _to_tf32(a)
        b_high = _to_tf32(b.to(tl.float32))
        small = tl.zeros((a.shape[0], b.shape[1]), tl.float32)
        small = tl.dot(a - a_high, b_high, small, input_precision="tf32")
        if b.dtype == tl.float32:
            small = tl.dot(a_high, b - b_high, small, input_precision="tf32")
        # An infinite operand has NaN as its small part; the small parts of an overflow do so with any sign.
        small = tl.where(tl.abs(small) < INFINITY, small, 0.0)
        total = tl.dot(a_high, b_high, total + small, input_precision="tf32")
    return total


@triton.jit
def _load_rows(x_ptr, head, row, count, first_channel, D, BLOCK_D: tl.constexpr):
    """Rows of a head's (count, D) matrix. A row too many repeats the last one: every address is good, and no
    infinity times zero makes a NaN that plain attention would not have."""
    row = head * count + tl.minimum(row, count - 1)  # int64 like head
    channel = first_channel + tl.arange(0, BLOCK_D)[None, :]
    return tl.load(x_ptr + row[:, None] * D + channel, mask=channel < D, other=0.0)


@triton.jit
def _store_rows(x_ptr, value, head, row, count, first_channel, D, BLOCK_D: tl.constexpr):
    channel = first_channel + tl.arange(0, BLOCK_D)[None, :]
    place = (head * count + row)[:, None] * D + channel
    tl.store(x_ptr + place, value.to(x_ptr.dtype.element_ty), mask=(row < count)[:, None] & (channel < D))


@triton.jit
def _row_products(
    a,  # (rows of a, BLOCK_D): the first channels, which a program loads once
    a_ptr,
    a_row,
    a_count,
    b_ptr,
    b_row,
    b_count,
    head,
    D,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The inner products of the rows of two matrices, and b's first channels."""
    first = _load_rows(b_ptr, head, b_row, b_count, 0, D, BLOCK_D)
    product = tl.zeros((a.shape[0], first.shape[0]), tl.float32)
    product = _add_product(a, tl.trans(first), product, PRECISION)
    if WIDE:
        for channel in range(BLOCK_D, D, BLOCK_D):
            more = _load_rows(a_ptr, head, a_row, a_count, channel, D, BLOCK_D)
            b = _load_rows(b_ptr, head, b_row, b_count, channel, D, BLOCK_D)
            product = _add_product(more, tl.trans(b), product, PRECISION)
    return product, first


@triton.jit
def _slice_of(first, x_ptr, head, row, count, slice, D, BLOCK_D: tl.constexpr, WIDE: tl.constexpr):
    """The channels that a program writes, of rows whose first channels are at hand."""
    if WIDE:
        first = _load_rows(x_ptr, head, row, count, slice, D, BLOCK_D)
    return first


@triton.jit
def _key_bias(bias_ptr, head, key, M):
    """What is added to all scores of a key: -inf for one beyond the last."""
    # Without a bias zeros are added all the same, so that no bias and one of zeros round alike.
    if bias_ptr is None:
        bias = tl.where(key < M, 0.0, -INFINITY)
    else:
        bias = tl.load(bias_ptr + head * M + key, mask=key < M, other=-INFINITY)
    return bias


@triton.jit
def _is_dropped(bits_ptr, head, query, key, N, M):
    """The bits of entries; query and key broadcast against each other."""
    row = head * N + tl.minimum(query, N - 1)
    byte = tl.load(bits_ptr + row * tl.cdiv(M, 8) + tl.minimum(key, M - 1) // 8)
    return ((byte.to(tl.int32) >> (key % 8)) & 1) != 0


@triton.jit
def _divisor(lse_ptr, head, query, N):
    """The log-sum-exp of rows as what turns scores into weights: exp(s - divisor). Rows that do not exist or
    have no mass get +inf, so that they weigh nothing."""
    lse = tl.load(lse_ptr + head * N + query, mask=query < N, other=INFINITY)
    return tl.where(lse == -INFINITY, INFINITY, lse)


@triton.jit
def _is_similar(scores, divisor, level, tau):
    """Mode entry: whether P_ij lies within tau * level_j of level_j. A level of -1 is never similar."""
    weight = tl.exp(scores - divisor[:, None])
    return tl.abs(weight - level[None, :]) <= tau * level[None, :], weight


# ---- forward ----


@triton.jit
def jad_attention_kernel(
    q_ptr,  # (B, H, N, D)
    k_ptr,  # (B, H, M, D)
    v_ptr,  # (B, H, M, D), or None: the log-sum-exp alone
    bias_ptr,  # (B, H, M), or None
    level_ptr,  # for mode entry, else None: (B, H, M) column means, -1 where nothing may be dropped
    divisor_ptr,  # for mode entry, else None: (B, H, N) log-sum-exp of all scores
    out_ptr,  # (B, H, N, D)
    lse_ptr,  # (B, H, N)
    bits_ptr,  # (B, H, N, ceil(M / 8)), or None: entries that mode entry drops
    N,
    M,
    D,
    scale,
    tau,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slice = tl.program_id(1) * BLOCK_D  # the first of the channels that this program writes
    blocks = tl.cdiv(N, BLOCK_QUERIES)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    query = (tl.program_id(0) % blocks) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    q = _load_rows(q_ptr, head, query, N, 0, D, BLOCK_D)

    if level_ptr is not None:
        # A row that would keep next to nothing is left whole, which is known only at its end.
        divisor = _divisor(divisor_ptr, head, query, N)
        kept = tl.zeros((BLOCK_QUERIES,), tl.float32)
        for first_key in range(0, M, BLOCK_KEYS):
            key = first_key + tl.arange(0, BLOCK_KEYS)
            scores, _ = _row_products(q, q_ptr, query, N, k_ptr, key, M, head, D, BLOCK_D, WIDE, PRECISION)
            scores = scores * scale + _key_bias(None, head, key, M)[None, :]
            level = tl.load(level_ptr + head * M + key, mask=key < M, other=-1.0)
            similar, weight = _is_similar(scores, divisor, level, tau)
            kept += tl.sum(tl.where(similar, 0.0, weight), 1)
        may_drop = kept >= LOST_MASS

    top = tl.full((BLOCK_QUERIES,), -INFINITY, tl.float32)  # the largest score so far
    mass = tl.zeros((BLOCK_QUERIES,), tl.float32)  # the sum of exp(score - top)
    out = tl.zeros((BLOCK_QUERIES, BLOCK_D), tl.float32)
    for first_key in range(0, M, BLOCK_KEYS):
        key = first_key + tl.arange(0, BLOCK_KEYS)
        scores, _ = _row_products(q, q_ptr, query, N, k_ptr, key, M, head, D, BLOCK_D, WIDE, PRECISION)
        scores = scores * scale + _key_bias(bias_ptr, head, key, M)[None, :]
        if level_ptr is not None:
            level = tl.load(level_ptr + head * M + key, mask=key < M, other=-1.0)
            similar, _ = _is_similar(scores, divisor, level, tau)
            similar = similar & may_drop[:, None]
            scores = tl.where(similar, -INFINITY, scores)
            if bits_ptr is not None:
                bit = similar.to(tl.int32) << (key % 8)[None, :]
                byte = tl.sum(tl.reshape(bit, (BLOCK_QUERIES, BLOCK_KEYS // 8, 8)), 2)
                column = first_key // 8 + tl.arange(0, BLOCK_KEYS // 8)
                width = tl.cdiv(M, 8)
                place = (head * N + query)[:, None] * width + column[None, :]
                inside = (query < N)[:, None] & (column < width)[None, :]
                tl.store(bits_ptr + place, byte.to(tl.uint8), mask=inside)
        higher = tl.maximum(top, tl.max(scores, 1))
        reached = tl.where(higher == -INFINITY, 0.0, higher)  # -inf - -inf would be NaN
        weight = tl.exp(scores - reached[:, None])
        shrink = tl.exp(top - reached)
        mass = mass * shrink + tl.sum(weight, 1)
        if v_ptr is not None:
            v = _load_rows(v_ptr, head, key, M, slice, D, BLOCK_D)
            out = _add_product(weight, v, out * shrink[:, None], PRECISION)
        top = higher

    # A row without a finite score has no mass; any other has at least 1.
    tl.store(
        lse_ptr + head * N + query,
        tl.where(mass == 0.0, -INFINITY, top + tl.log(mass)),
        mask=query < N,
    )
    if v_ptr is not None:
        out = out / tl.where(mass == 0.0, 1.0, mass)[:, None]
        _store_rows(out_ptr, out, head, query, N, slice, D, BLOCK_D)


@triton.jit
def jad_column_mean_kernel(
    q_ptr,  # (B, H, N, D)
    k_ptr,  # (B, H, M, D)
    lse_ptr,  # (B, H, N)
    mean_ptr,  # (B, H, M)
    N,
    M,
    D,
    scale,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(M, BLOCK_KEYS)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    key = (tl.program_id(0) % blocks) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    k = _load_rows(k_ptr, head, key, M, 0, D, BLOCK_D)
    total = tl.zeros((BLOCK_KEYS,), tl.float32)
    for first_query in range(0, N, BLOCK_QUERIES):
        query = first_query + tl.arange(0, BLOCK_QUERIES)
        # Keys are the rows, as a program owns those: their sums then stay within a warp.
        scores, _ = _row_products(k, k_ptr, key, M, q_ptr, query, N, head, D, BLOCK_D, WIDE, PRECISION)
        scores *= scale
        total += tl.sum(tl.exp(scores - _divisor(lse_ptr, head, query, N)[None, :]), 1)
    tl.store(mean_ptr + head * M + key, total / N, mask=key < M)


# ---- backward ----


@triton.jit
def jad_query_gradient_kernel(
    q_ptr,  # (B, H, N, D)
    k_ptr,  # (B, H, M, D)
    v_ptr,  # (B, H, M, D), or None: the backward of the column means
    grad_ptr,  # (B, H, N, D) of the output; (B, H, M) of the column means
    out_ptr,  # (B, H, N, D), or None with v
    lse_ptr,  # (B, H, N)
    bias_ptr,  # (B, H, M), or None
    bits_ptr,  # (B, H, N, ceil(M / 8)), or None
    dq_ptr,  # (B, H, N, D)
    delta_ptr,  # (B, H, N), written for jad_key_gradient_kernel: sum_j P_ij dP_ij
    excess_ptr,  # (B, H, N), written likewise; None for half inputs: by what exp(s - lse) is too large
    N,
    M,
    D,
    scale,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slice = tl.program_id(1) * BLOCK_D  # the first of the channels that this program writes
    blocks = tl.cdiv(N, BLOCK_QUERIES)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    query = (tl.program_id(0) % blocks) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    q = _load_rows(q_ptr, head, query, N, 0, D, BLOCK_D)
    divisor = _divisor(lse_ptr, head, query, N)

    if v_ptr is None:
        delta = tl.zeros((BLOCK_QUERIES,), tl.float32)
        for first_key in range(0, M, BLOCK_KEYS):
            key = first_key + tl.arange(0, BLOCK_KEYS)
            scores, _ = _row_products(q, q_ptr, query, N, k_ptr, key, M, head, D, BLOCK_D, WIDE, PRECISION)
            scores = scores * scale + _key_bias(None, head, key, M)[None, :]
            dweight = tl.load(grad_ptr + head * M + key, mask=key < M, other=0.0) / N
            delta += tl.sum(tl.exp(scores - divisor[:, None]) * dweight[None, :], 1)
    else:
        grad = _load_rows(grad_ptr, head, query, N, 0, D, BLOCK_D)
        out = _load_rows(out_ptr, head, query, N, 0, D, BLOCK_D)
        delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
        if WIDE:
            for channel in range(BLOCK_D, D, BLOCK_D):
                more = _load_rows(grad_ptr, head, query, N, channel, D, BLOCK_D).to(tl.float32)
                delta += tl.sum(more * _load_rows(out_ptr, head, query, N, channel, D, BLOCK_D), 1)

    dq = tl.zeros((BLOCK_QUERIES, BLOCK_D), tl.float32)
    if excess_ptr is not None:
        mass = tl.zeros((BLOCK_QUERIES,), tl.float32)
        residue = tl.zeros((BLOCK_QUERIES,), tl.float32)
        mean_key = tl.zeros((BLOCK_QUERIES, BLOCK_D), tl.float32)
    for first_key in range(0, M, BLOCK_KEYS):
        key = first_key + tl.arange(0, BLOCK_KEYS)
        scores, k = _row_products(q, q_ptr, query, N, k_ptr, key, M, head, D, BLOCK_D, WIDE, PRECISION)
        scores = scores * scale + _key_bias(bias_ptr, head, key, M)[None, :]
        if bits_ptr is not None:
            dropped = _is_dropped(bits_ptr, head, query[:, None], key[None, :], N, M)
            scores = tl.where(dropped, -INFINITY, scores)
        weight = tl.exp(scores - divisor[:, None])
        if v_ptr is None:
            dweight = tl.load(grad_ptr + head * M + key, mask=key < M, other=0.0)[None, :] / N
        else:
            dweight, _ = _row_products(
                grad, grad_ptr, query, N, v_ptr, key, M, head, D, BLOCK_D, WIDE, PRECISION
            )
        dscores = weight * (dweight - delta[:, None])
        k = _slice_of(k, k_ptr, head, key, M, slice, D, BLOCK_D, WIDE)
        dq = _add_product(dscores, k, dq, PRECISION)
        if excess_ptr is not None:
            mass += tl.sum(weight, 1)
            residue += tl.sum(dscores, 1)
            mean_key = tl.dot(weight, k, mean_key, input_precision="tf32")

    if excess_ptr is not None:
        # The weights of a row should sum to 1 and its dS to 0, but lse and out are rounded, which shows in
        # float32. What is wrong is known now. It is so little that mean_key need not be exact.
        excess = tl.where(mass == 0.0, 1.0, mass)
        residue = residue / excess
        delta += residue
        dq = (dq - residue[:, None] * mean_key) / excess[:, None]
        tl.store(excess_ptr + head * N + query, excess, mask=query < N)
    tl.store(delta_ptr + head * N + query, delta, mask=query < N)
    _store_rows(dq_ptr, dq * scale, head, query, N, slice, D, BLOCK_D)


@triton.jit
def jad_key_gradient_kernel(
    q_ptr,  # the arguments are those of jad_query_gradient_kernel
    k_ptr,
    v_ptr,
    grad_ptr,
    lse_ptr,
    bias_ptr,
    bits_ptr,
    delta_ptr,
    excess_ptr,
    dk_ptr,  # (B, H, M, D)
    dv_ptr,  # (B, H, M, D), or None with v
    N,
    M,
    D,
    scale,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slice = tl.program_id(1) * BLOCK_D  # the first of the channels that this program writes
    blocks = tl.cdiv(M, BLOCK_KEYS)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    key = (tl.program_id(0) % blocks) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    k = _load_rows(k_ptr, head, key, M, 0, D, BLOCK_D)
    bias = _key_bias(bias_ptr, head, key, M)
    if v_ptr is None:
        dweight = tl.load(grad_ptr + head * M + key, mask=key < M, other=0.0)[:, None] / N
    else:
        v = _load_rows(v_ptr, head, key, M, 0, D, BLOCK_D)
        dv = tl.zeros((BLOCK_KEYS, BLOCK_D), tl.float32)
    dk = tl.zeros((BLOCK_KEYS, BLOCK_D), tl.float32)

    for first_query in range(0, N, BLOCK_QUERIES):
        # Everything (keys, queries): weights come out of one product as the next one takes them.
        query = first_query + tl.arange(0, BLOCK_QUERIES)
        scores, q = _row_products(k, k_ptr, key, M, q_ptr, query, N, head, D, BLOCK_D, WIDE, PRECISION)
        scores = scores * scale + bias[:, None]
        if bits_ptr is not None:
            dropped = _is_dropped(bits_ptr, head, query[None, :], key[:, None], N, M)
            scores = tl.where(dropped, -INFINITY, scores)
        weight = tl.exp(scores - _divisor(lse_ptr, head, query, N)[None, :])
        if excess_ptr is not None:
            excess = tl.load(excess_ptr + head * N + query, mask=query < N, other=1.0)
            weight = weight * (1.0 / excess)[None, :]
        if v_ptr is not None:
            dweight, grad = _row_products(
                v, v_ptr, key, M, grad_ptr, query, N, head, D, BLOCK_D, WIDE, PRECISION
            )
            grad = _slice_of(grad, grad_ptr, head, query, N, slice, D, BLOCK_D, WIDE)
            dv = _add_product(weight, grad, dv, PRECISION)
        delta = tl.load(delta_ptr + head * N + query, mask=query < N, other=0.0)
        q = _slice_of(q, q_ptr, head, query, N, slice, D, BLOCK_D, WIDE)
        dk = _add_product(weight * (dweight - delta[None, :]), q, dk, PRECISION)
    _store_rows(dk_ptr, dk * scale, head, key, M, slice, D, BLOCK_D)
    if v_ptr is not None:
        _store_rows(dv_ptr, dv, head, key, M, slice, D, BLOCK_D)


# ---- launches ----


class Launch(NamedTuple):
    """One reviewed choice of launch parameters."""

    block_queries: int
    block_keys: int
    block_d: int
    wide: bool
    precision: str
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, Any]:
        return {
            "BLOCK_QUERIES": self.block_queries,
            "BLOCK_KEYS": self.block_keys,
            "BLOCK_D": self.block_d,
            "WIDE": self.wide,
            "PRECISION": self.precision,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


# Below this many keys a tile of a tensor core is mostly padding, and float32 is multiplied as it is. It also
# keeps the weight of a single key exact: a tensor core would cut bits off the small part of v.
FEWEST_KEYS_FOR_TF32 = 16


def _launch(kernel: Any, capability: int, keys: int, width: int, dtype: torch.dtype) -> Launch:
    """The launch table, by kernel, architecture (80, 90), M, D and dtype.

    `own` is how many rows a program owns, `other` how many it takes a step: queries and keys, but for the
    kernels that own keys. Four warps own 64 rows: 16 each with mma.sync, the 64 of wgmma together, so a row's
    sums stay within a warp. Registers decide on the rest: a float32 operand takes twice its size as two TF32
    parts, and the gradients hold two tiles of inputs and two of sums throughout, so their steps are short. On
    197 rows steps of 32 also waste less than those of 64: 224 against 256. Weights are float32 operands, and
    float16 inputs become TF32 beside them.
    """
    gradient = kernel in (jad_query_gradient_kernel, jad_key_gradient_kernel)
    own, other, widest, stages, precision = 64, 64, 128, 2, "tf32"
    if dtype == torch.bfloat16:
        other = 32 if gradient else 64
    else:
        widest = 64
        other = 16 if gradient and capability < 90 else 32
    if dtype == torch.float32 and keys < FEWEST_KEYS_FOR_TF32:
        own, other, stages, precision = 16, 16, 1, "ieee"
    if (
        dispatch.TRITON_INTERPRETED
    ):  # time goes by steps, whatever their size; some tests' heads should be wide
        own, other, widest = 64, 64, 32
    block_d = max(16, triton.next_power_of_2(width))
    if block_d > widest:
        block_d = min(64, widest)
    if kernel in (jad_column_mean_kernel, jad_key_gradient_kernel):
        own, other = other, own
    return Launch(own, other, block_d, width > block_d, precision, 4, stages)


def _run(kernel: Any, writes_channels: bool, q: Tensor, k: Tensor, *arguments: Any) -> None:
    """Launches over all heads and the rows that a program of this kernel owns, and slices of channels."""
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    capability = 80
    if q.is_cuda:
        major, minor = torch.cuda.get_device_capability(q.device)
        capability = 10 * major + minor
    launch = _launch(kernel, capability, keys, width, q.dtype)
    if kernel in (jad_column_mean_kernel, jad_key_gradient_kernel):
        blocks = triton.cdiv(keys, launch.block_keys)
    else:
        blocks = triton.cdiv(queries, launch.block_queries)
    slices = triton.cdiv(width, launch.block_d) if writes_channels else 1
    with torch.cuda.device_of(q):  # Triton launches on the current device
        kernel[(batch * heads * blocks, slices)](q, k, *arguments, **launch.options())


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    scale: float,
    bias: Tensor | None = None,
    entry: tuple[Tensor, Tensor, float] | None = None,
    bits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out (empty without v) and lse; `entry` is level, log-sum-exp and tau, `bits` what to write."""
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    out = torch.empty_like(q) if v is not None else q.new_empty(0)
    level, divisor, tau = entry or (None, None, 0.0)
    tensors = (v, bias, level, divisor, out if v is not None else None, lse, bits)
    _run(jad_attention_kernel, v is not None, q, k, *tensors, q.shape[2], *k.shape[2:], scale, tau)
    return out, lse


def _column_mean(q: Tensor, k: Tensor, lse: Tensor, scale: float) -> Tensor:
    mean = torch.empty(k.shape[:3], dtype=torch.float32, device=q.device)
    _run(jad_column_mean_kernel, False, q, k, lse, mean, q.shape[2], *k.shape[2:], scale)
    return mean


def _gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    grad: Tensor,
    out: Tensor | None,
    lse: Tensor,
    bias: Tensor | None,
    bits: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dq, dk, dv; without v those of the column means."""
    delta = torch.empty_like(lse)
    excess = torch.empty_like(lse) if q.dtype == torch.float32 else None
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), None if v is None else torch.empty_like(v)
    sizes = (q.shape[2], *k.shape[2:], scale)
    _run(jad_query_gradient_kernel, True, q, k, v, grad, out, lse, bias, bits, dq, delta, excess, *sizes)
    _run(jad_key_gradient_kernel, True, q, k, v, grad, lse, bias, bits, delta, excess, dk, dv, *sizes)
    if k.shape[2] == 1:  # softmax over one key is constant: exactly no gradient, not one of rounding
        dq.zero_()
        dk.zero_()
    return dq, dk, dv


def _operands(*tensors: Tensor) -> list[Tensor]:
    """What the kernels take: contiguous. The interpreter's tl.dot multiplies the bits of bfloat16; as
    float32 the values are the same."""
    as_float = dispatch.TRITON_INTERPRETED and tensors[0].dtype == torch.bfloat16
    return [(t.float() if as_float else t).contiguous() for t in tensors]


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
    """Arguments and results as in reference.jad."""
    choice = (mode, beta, max_drop, protect, soft)
    if q.numel() == 0:
        return reference.jad(q, k, v, gate, noise, *choice, tau, joint_over_head, scale, return_stats, save)
    dtype = q.dtype
    q, k, v = _operands(q, k, v)
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    may_drop = mode != NONE and queries > 1
    # The controls' noise alone decides in "dropkey"; "none" needs the means for statistics at most.
    plain = column_mean = q.new_empty(0)
    if return_stats or (may_drop and mode != DROPKEY):
        _, plain = _attend(q, k, None, scale)
        column_mean = _column_mean(q, k, plain, scale)

    bias, bits, entry = None, None, None
    if mode == ENTRY:
        if return_stats or save:
            shape = (batch, heads, queries, triton.cdiv(keys, 8))
            bits = (torch.empty if may_drop else torch.zeros)(shape, dtype=torch.uint8, device=q.device)
        if may_drop:
            joint = reference._joint(column_mean, joint_over_head)
            columns = (joint > 1 / keys) & reference._may_drop(joint, protect)
            if gate is not None:
                columns = columns & gate.unsqueeze(-1)
            entry = (torch.where(columns, joint.float(), -1.0), plain, tau)
    elif mode != NONE:
        means = column_mean if column_mean.numel() else torch.zeros(k.shape[:3], device=q.device)
        bias = torch.zeros_like(means)
        if may_drop:
            bias = reference.key_bias(means, gate, noise, *choice, joint_over_head)

    out, lse = _attend(q, k, v, scale, bias, entry, bits if may_drop else None)
    return (
        out.to(dtype),
        lse,
        column_mean if return_stats else lse.new_empty(0),
        lse.new_empty(0) if bias is None else bias,
        torch.empty(0, dtype=torch.uint8, device=q.device) if bits is None else bits,
    )


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
    """Arguments and results as in reference.jad_backward."""
    dtype = q.dtype
    if q.numel() == 0:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    q, k, v, grad, out = _operands(q, k, v, grad, out)
    lse, bias, bits = lse.contiguous(), bias.contiguous(), bits.contiguous()
    dropped = (bias if bias.numel() else None, bits if bits.numel() else None)
    dq, dk, dv = _gradients(q, k, v, grad, out, lse, *dropped, scale)
    assert dv is not None  # there are values
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def column_mean(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Arguments and results as in reference.column_mean."""
    if q.numel() == 0:
        return reference.column_mean(q, k, scale)
    q, k = _operands(q, k)
    _, lse = _attend(q, k, None, scale)
    return _column_mean(q, k, lse, scale), lse


def column_mean_backward(
    grad: Tensor, q: Tensor, k: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in reference.column_mean_backward."""
    dtype = q.dtype
    if q.numel() == 0:
        return torch.empty_like(q), torch.empty_like(k)
    q, k = _operands(q, k)
    grad, lse = grad.float().contiguous(), lse.contiguous()
    dq, dk, _ = _gradients(q, k, None, grad, None, lse, None, None, scale)
    return dq.to(dtype), dk.to(dtype)


# ---- ahead of time ----

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
AotCase = tuple[Callable[..., Any], dict[str, str], dict[str, Any], int, int]


def aot_cases(capability: int) -> dict[str, AotCase]:
    """What the tests compile ahead of time: name -> (kernel, signature, constexprs, num_warps, num_stages).

    The kinds of types are those of knn's: ":16" is divisible by 16, "constexpr" a value among the constexprs.
    """
    bias, entry, bits = {"bias_ptr"}, {"level_ptr", "divisor_ptr", "bits_ptr"}, {"bits_ptr"}
    values = {"v_ptr", "out_ptr", "dv_ptr"}
    kinds: dict[str, tuple[Any, set[str]]] = {
        "key": (jad_attention_kernel, values | bias),
        "key dq": (jad_query_gradient_kernel, values | bias),
        "key dk": (jad_key_gradient_kernel, values | bias),
        "lse": (jad_attention_kernel, set()),
        "means": (jad_column_mean_kernel, set()),
        "entry": (jad_attention_kernel, values | entry),
        "entry dq": (jad_query_gradient_kernel, values | bits),
        "entry dk": (jad_key_gradient_kernel, values | bits),
        "means dq": (jad_query_gradient_kernel, set()),
        "means dk": (jad_key_gradient_kernel, set()),
    }
    cases: dict[str, AotCase] = {}

    def add(name: str, keys: int, width: int, chosen: tuple[str, ...]) -> None:
        for kind in chosen:
            kernel, present = kinds[kind]
            launch = _launch(kernel, capability, keys, width, DTYPES[name])
            cases[f"{name} D={width} {kind}"] = _aot_case(kernel, present, launch, name)

    # Transformers have D = 64. Narrower tiles need less of everything; what is wide is so at 256 as at 129.
    trained = ("key", "key dq", "key dk")
    add("bf16", 197, 64, tuple(kinds))
    add("bf16", 197, 128, trained)
    add("bf16", 197, 256, trained)
    add("fp16", 197, 64, trained)
    add("fp16", 197, 256, ("key dk",))
    add("fp32", 197, 64, (*trained, "means", "entry", "entry dk", "means dq"))
    add("fp32", 197, 256, trained)
    add("fp32", 15, 48, trained)  # few keys
    return cases


def _aot_case(kernel: Any, present: set[str], launch: Launch, name: str) -> AotCase:
    """A case with those of the optional pointers that are `present`."""
    options = launch.options()
    warps, stages = options.pop("num_warps"), options.pop("num_stages")
    optional = {"v_ptr", "bias_ptr", "level_ptr", "divisor_ptr", "out_ptr", "bits_ptr", "dv_ptr"}
    if name != "fp32":
        optional.add("excess_ptr")
    constexprs = options | {a: None for a in kernel.arg_names if a in optional - present}
    floats = ("bias_ptr", "level_ptr", "divisor_ptr", "lse_ptr", "delta_ptr", "excess_ptr", "mean_ptr")
    types = dict.fromkeys(floats, "*fp32:16") | {"bits_ptr": "*u8:16", "scale": "fp32", "tau": "fp32"}
    types |= {"N": "i32", "M": "i32", "D": "i32:16"}
    if "v_ptr" in constexprs:
        types["grad_ptr"] = "*fp32:16"
    signature = {
        argument: "constexpr" if argument in constexprs else types.get(argument, f"*{name}:16")
        for argument in kernel.arg_names
    }
    return kernel, signature, constexprs, warps, stages
