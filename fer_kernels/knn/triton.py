"""knn in Triton: distances and selection in one pass, no N x M array in memory.

A block takes some queries of one sample and walks over tiles of its keys. Each tile is a small matrix
product whose entries become ranking values |ŷ_j|² - 2 x̂_i·ŷ_j + bias_ij, and what a query wants of the
tile goes into the list of its nearest keys so far. The selection costs more than the product, and how
to select best depends on the length of that list, so there are two kernels:

* ``knn_select_kernel`` (short lists): take a tile's nearest key while it beats the worst of the list.
  The number of steps adapts to the data: it falls like 1 / tile as the list fills with good keys.
* ``knn_sort_kernel`` (long lists): sort the tile and merge it into the sorted list, both bitonically.

Both compare (ordered image of the ranking value, key index), never the float alone. No two keys of a query
are equal in that order, so whatever the tiling and the network, there is one answer: that of
csrc/include/fer/order.h, with the image signed here because Triton's sort and minimum like int64.

In both a warp owns all the columns of 16 queries (see ``_launch``). A row of a tile then lies in four
lanes of one warp, and selecting takes registers and shuffles but no barrier.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import dispatch

# Ordered images (see _ordered_image). +inf is 0x7F800000, so a NaN comes after every number, and what was
# taken from a tile or lies beyond the last key comes after every NaN.
NAN_IMAGE = tl.constexpr(0x7FC00000)
NO_KEY_IMAGE = tl.constexpr(0x7FFFFFFF)
# The largest packed (image, index) pair: an empty place in a list.
NO_KEY = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.jit
def _ordered_image(value):
    """The int32 that orders as the float does: -0 as +0, every NaN as the same largest one."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # -0 + 0 is +0
    image = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats have their magnitude's order reversed
    return tl.where(value == value, image, NAN_IMAGE)


@triton.jit
def _image_value(image):
    """The inverse of _ordered_image; NAN_IMAGE is NaN's own bit pattern and needs no case of its own."""
    bits = image ^ ((image >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _packed(image, index):
    return (image.to(tl.int64) << 32) | index


@triton.jit
def knn_norms_kernel(
    x_ptr,  # (rows, C)
    scale_ptr,  # (rows,) 1 / max(|x|, 1e-12), or 1 if not NORMALIZE; NaN where |x|² is not finite
    square_ptr,  # (rows,) |x̂|²
    rows,
    C,
    NORMALIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_start = row.to(tl.int64)[:, None] * C
    partial = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    for first_channel in range(0, C, BLOCK_CHANNELS):
        channel = first_channel + tl.arange(0, BLOCK_CHANNELS)[None, :]
        inside = (row < rows)[:, None] & (channel < C)
        x = tl.load(x_ptr + row_start + channel, mask=inside, other=0.0).to(tl.float32)
        partial += x * x
    square = tl.sum(partial, 1)
    if NORMALIZE:
        scale = 1.0 / tl.maximum(tl.sqrt_rn(square), 1e-12)
    else:
        scale = tl.full((BLOCK_ROWS,), 1.0, tl.float32)
    scale = tl.where(square < float("inf"), scale, float("nan"))  # false for NaN too
    tl.store(scale_ptr + row, scale, mask=row < rows)
    tl.store(square_ptr + row, square * scale * scale, mask=row < rows)


@triton.jit
def _tile_images(
    x_ptr,
    y_ptr,
    x_scale_ptr,
    y_scale_ptr,
    y_square_ptr,
    bias_ptr,
    bias_stride_batch,
    bias_stride_query,
    bias_stride_key,
    sample,  # int64: a batch may have more than 2^31 elements
    query,  # (queries,)
    key,  # (keys,)
    N,
    M,
    C,
    BLOCK_CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Ordered images (queries, keys) of the ranking values of one tile."""
    is_key = key < M
    # A query or key too many repeats the last one: every address is good and no load needs a row mask.
    query = tl.minimum(query, N - 1).to(tl.int64)
    key = tl.minimum(key, M - 1).to(tl.int64)
    # Loaded before it is needed: Triton lets the last of loads and products decide how the tile is spread
    # over the lanes, and that has to be the product.
    if bias_ptr is not None:
        bias_ptr += sample * bias_stride_batch
        bias = tl.load(bias_ptr + query[:, None] * bias_stride_query + key[None, :] * bias_stride_key)
    x_ptr += sample * N * C
    y_ptr += sample * M * C
    product = tl.zeros((query.shape[0], key.shape[0]), tl.float32)
    for first_channel in range(0, C, BLOCK_CHANNELS):
        channel = first_channel + tl.arange(0, BLOCK_CHANNELS)
        inside = channel < C
        x = tl.load(x_ptr + query[:, None] * C + channel[None, :], mask=inside[None, :], other=0.0)
        y = tl.load(y_ptr + key[None, :] * C + channel[:, None], mask=inside[:, None], other=0.0)
        product = tl.dot(x, y, product, input_precision=PRECISION)
    # Scaling the float32 product rather than the inputs: x̂ is never rounded to half.
    product *= tl.load(x_scale_ptr + sample * N + query)[:, None]
    product *= tl.load(y_scale_ptr + sample * M + key)[None, :]
    # |x̂_i|² is the same along a row: it cannot change the order, and adding it would only round.
    ranking = tl.load(y_square_ptr + sample * M + key)[None, :] - 2.0 * product
    if bias_ptr is not None:
        ranking += bias.to(tl.float32)
    return tl.where(is_key[None, :], _ordered_image(ranking), NO_KEY_IMAGE)


@triton.jit
def _store_neighbours(
    nearest,  # (queries, LIST) packed, ascending along a row
    first_position,  # where in the list of the k * dilation nearest column 0 stands; may be negative
    idx_ptr,
    dist_ptr,
    x_square_ptr,
    ranks_ptr,
    sample,
    query,
    N,
    k,
    dilation,
    SLOTS: tl.constexpr,
):
    """Writes those of the k output slots whose position in the list lies among these columns."""
    row = sample * N + query
    for first_slot in range(0, k, SLOTS):
        slot = first_slot + tl.arange(0, SLOTS)
        if ranks_ptr is None:
            position = slot * dilation
        else:
            position = tl.load(ranks_ptr + tl.minimum(slot, k - 1))
            position = tl.minimum(tl.maximum(position, 0), k * dilation - 1).to(tl.int32)
        column = position - first_position
        here = (slot < k) & (column >= 0) & (column < nearest.shape[1])
        column = tl.where(here, column, 0)
        chosen = tl.gather(nearest, tl.broadcast_to(column[None, :], (nearest.shape[0], SLOTS)), 1)

        place = row[:, None] * k + slot[None, :]
        inside = (query < N)[:, None] & here[None, :]
        tl.store(idx_ptr + place, chosen & 0xFFFFFFFF, mask=inside)
        if dist_ptr is not None:
            value = _image_value((chosen >> 32).to(tl.int32))
            square = tl.load(x_square_ptr + row, mask=query < N, other=0.0)
            tl.store(dist_ptr + place, value + square[:, None], mask=inside)


@triton.jit
def knn_select_kernel(
    x_ptr,  # (B, N, C)
    y_ptr,  # (B, M, C)
    x_scale_ptr,  # (B, N)
    y_scale_ptr,  # (B, M)
    x_square_ptr,  # (B, N); None where no distances are returned
    y_square_ptr,  # (B, M)
    bias_ptr,  # (B, N, M) by its strides, or None
    bias_stride_batch,
    bias_stride_query,
    bias_stride_key,
    ranks_ptr,  # (k,), or None for 0, d, 2d, ...
    idx_ptr,  # (B, N, k)
    dist_ptr,  # (B, N, k), or None
    N,
    M,
    C,
    k,
    dilation,
    LIST: tl.constexpr,  # k * dilation, rounded up to a power of two
    SLOTS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(N, BLOCK_QUERIES)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    query = (tl.program_id(0) % blocks) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)

    # The list is unordered until the end. A newcomer takes the place of the row's worst entry, so the empty
    # places must differ: they count down from NO_KEY. The places beyond k * dilation hold what is
    # nearer than any key and so are never taken.
    place = tl.arange(0, LIST).to(tl.int64)
    unused = LIST - k * dilation
    nearest = tl.where(place < unused, -NO_KEY, NO_KEY - place)
    nearest = tl.broadcast_to(nearest[None, :], (BLOCK_QUERIES, LIST))
    worst = tl.max(nearest, 1)

    for first_key in range(0, M, BLOCK_KEYS):
        images = _tile_images(
            x_ptr,
            y_ptr,
            x_scale_ptr,
            y_scale_ptr,
            y_square_ptr,
            bias_ptr,
            bias_stride_batch,
            bias_stride_query,
            bias_stride_key,
            sample,
            query,
            first_key + tl.arange(0, BLOCK_KEYS),
            N,
            M,
            C,
            BLOCK_CHANNELS,
            PRECISION,
        )
        # The leftmost minimum: of equal images the lowest index.
        image, column = tl.min(images, 1, return_indices=True, return_indices_tie_break_left=True)
        candidate = _packed(image, first_key + column)
        # A row that has no candidate left stands still until the last row of the block has none.
        while tl.max((candidate < worst).to(tl.int32), 0) > 0:
            taken = (candidate < worst)[:, None] & (nearest == worst[:, None])
            nearest = tl.where(taken, candidate[:, None], nearest)
            worst = tl.max(nearest, 1)
            images = tl.where(tl.arange(0, BLOCK_KEYS)[None, :] == column[:, None], NO_KEY_IMAGE, images)
            image, column = tl.min(images, 1, return_indices=True, return_indices_tie_break_left=True)
            candidate = _packed(image, first_key + column)

    _store_neighbours(
        tl.sort(nearest),
        -unused,
        idx_ptr,
        dist_ptr,
        x_square_ptr,
        ranks_ptr,
        sample,
        query,
        N,
        k,
        dilation,
        SLOTS,
    )


@triton.jit
def knn_sort_kernel(
    x_ptr,  # the arguments are those of knn_select_kernel
    y_ptr,
    x_scale_ptr,
    y_scale_ptr,
    x_square_ptr,
    y_square_ptr,
    bias_ptr,
    bias_stride_batch,
    bias_stride_query,
    bias_stride_key,
    ranks_ptr,
    idx_ptr,
    dist_ptr,
    N,
    M,
    C,
    k,
    dilation,
    LIST: tl.constexpr,  # BLOCK_KEYS or twice that, at least k * dilation
    SLOTS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(N, BLOCK_QUERIES)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    query = (tl.program_id(0) % blocks) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)

    # Lists are as wide as a tile so that merging stays between registers that face each other: a list
    # twice as wide would be laid out differently and travel through shared memory. A long list is
    # therefore two, everything in `near` before everything in `far`.
    near = tl.full((BLOCK_QUERIES, BLOCK_KEYS), NO_KEY, tl.int64)
    far = near

    for first_key in range(0, M, BLOCK_KEYS):
        key = first_key + tl.arange(0, BLOCK_KEYS)
        images = _tile_images(
            x_ptr,
            y_ptr,
            x_scale_ptr,
            y_scale_ptr,
            y_square_ptr,
            bias_ptr,
            bias_stride_batch,
            bias_stride_query,
            bias_stride_key,
            sample,
            query,
            key,
            N,
            M,
            C,
            BLOCK_CHANNELS,
            PRECISION,
        )
        tile = _packed(images, key[None, :])
        # The order of the columns is free until they are sorted. The tensor core leaves columns 2i and
        # 2i + 1 in one lane and the next three pairs in three others. A bitonic sort compares near columns
        # far more often than distant ones, so let the columns of a lane be near: this halves the shuffles.
        tile = tl.reshape(tile, (BLOCK_QUERIES, BLOCK_KEYS // 8, 4, 2))
        tile = tl.reshape(tl.permute(tile, (0, 2, 1, 3)), (BLOCK_QUERIES, BLOCK_KEYS))

        # An ascending list facing a descending one: of each pair the smaller belongs to the smaller half of
        # the two together, and what comes out is bitonic, which merging puts in order.
        tile = tl.sort(tile, descending=True)
        if LIST == BLOCK_KEYS:
            near = tl.bitonic_merge(tl.minimum(near, tile))
        else:
            tile = tl.bitonic_merge(tl.minimum(far, tile), descending=True)
            far = tl.bitonic_merge(tl.maximum(near, tile))
            near = tl.bitonic_merge(tl.minimum(near, tile))

    _store_neighbours(
        near, 0, idx_ptr, dist_ptr, x_square_ptr, ranks_ptr, sample, query, N, k, dilation, SLOTS
    )
    if LIST > BLOCK_KEYS:
        _store_neighbours(
            far, BLOCK_KEYS, idx_ptr, dist_ptr, x_square_ptr, ranks_ptr, sample, query, N, k, dilation, SLOTS
        )


class Launch(NamedTuple):
    """One reviewed choice: the kernel and its launch parameters."""

    kernel: Any
    block_queries: int
    block_keys: int
    block_channels: int
    num_warps: int
    num_stages: int


# Up to this many neighbours taking them one by one beats sorting. [counted] On 196 keys a block of 16
# queries takes about 22 steps of 230 instructions for 9 neighbours and 80 of 250 for 32. Sorting takes
# four tiles of 5000 for any number up to 64.
MAX_SELECTED = 32

NORMS_BLOCK_ROWS, NORMS_BLOCK_CHANNELS, NORMS_WARPS = 16, 128, 4


def _launch(capability: int, neighbours: int, queries: int, dtype: torch.dtype) -> Launch:
    """The launch table, by architecture (80, 90), k * dilation, N and dtype.

    Every entry gives a warp 16 whole rows. With mma.sync, whose tile has 16 rows, that takes blocks of one
    warp (several would split the columns). Hopper's wgmma has 64 rows for four warps, each with whole rows,
    and reads the keys a quarter as often; worth it where the last block's empty rows are few.
    """
    kernel = knn_select_kernel if neighbours <= MAX_SELECTED else knn_sort_kernel
    half = dtype != torch.float32
    padded = triton.cdiv(queries, 64) * 64
    if capability == 90 and half and padded <= 1.125 * triton.cdiv(queries, 16) * 16:
        return Launch(kernel, 64, 64, block_channels=64, num_warps=4, num_stages=3)
    # Two sorted lists of 64 leave no registers for wider slices of the inputs, nor do split float32 operands.
    block_channels = 32 if half and neighbours <= 64 else 16
    return Launch(kernel, 16, 64, block_channels, num_warps=1, num_stages=3)


def _constexprs(
    launch: Launch, k: int, dilation: int, dtype: torch.dtype, allow_tf32: bool
) -> dict[str, Any]:
    smallest = 16 if launch.kernel is knn_select_kernel else launch.block_keys
    return {
        "LIST": max(smallest, triton.next_power_of_2(k * dilation)),
        "SLOTS": min(triton.next_power_of_2(k), 16),
        "BLOCK_QUERIES": launch.block_queries,
        "BLOCK_KEYS": launch.block_keys,
        "BLOCK_CHANNELS": launch.block_channels,
        # Three TF32 products of split operands keep float32's accuracy; half inputs are multiplied exactly.
        "PRECISION": "tf32x3" if dtype == torch.float32 and not allow_tf32 else "tf32",
    }


def _norms(rows: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Every row's scale and its squared norm after scaling, in float32."""
    square = torch.empty(rows.shape[:2], dtype=torch.float32, device=rows.device)
    scale = torch.empty_like(square)
    grid = (triton.cdiv(square.numel(), NORMS_BLOCK_ROWS),)
    knn_norms_kernel[grid](
        rows,
        scale,
        square,
        square.numel(),
        rows.shape[2],
        NORMALIZE=normalize,
        BLOCK_ROWS=NORMS_BLOCK_ROWS,
        BLOCK_CHANNELS=NORMS_BLOCK_CHANNELS,
        num_warps=NORMS_WARPS,
    )
    return scale, square


def knn(
    x: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    ranks: Tensor | None,
    k: int,
    dilation: int,
    normalize: bool,
    return_distance: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor]:
    """The k nearest keys of every query; arguments and results as in reference.knn."""
    batch, queries, channels = x.shape
    idx = torch.empty((batch, queries, k), dtype=torch.int64, device=x.device)
    slots = k if return_distance else 0
    dist = torch.empty((batch, queries, slots), dtype=torch.float32, device=x.device)
    if idx.numel() == 0:
        return idx, dist

    if dispatch.TRITON_INTERPRETED and x.dtype == torch.bfloat16:
        # The interpreter's tl.dot multiplies the bits of bfloat16. As float32 the values are the same.
        x, y = x.float(), None if y is None else y.float()
    x = x.contiguous()
    keys = x if y is None else y.contiguous()
    bias_strides: tuple[int, ...] = (0, 0, 0)
    if bias is not None:
        bias = bias.expand(batch, queries, keys.shape[1])  # a broadcast axis gets stride 0
        bias_strides = bias.stride()
    if ranks is not None:
        ranks = ranks.to(x.device, non_blocking=True).contiguous()

    capability = 80
    if x.is_cuda:
        major, minor = torch.cuda.get_device_capability(x.device)
        capability = 10 * major + minor
    launch = _launch(capability, k * dilation, queries, x.dtype)
    grid = (batch * triton.cdiv(queries, launch.block_queries),)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        y_scale, y_square = _norms(keys, normalize)
        x_scale, x_square = (y_scale, y_square) if y is None else _norms(x, normalize)
        launch.kernel[grid](
            x,
            keys,
            x_scale,
            y_scale,
            x_square if return_distance else None,
            y_square,
            bias,
            *bias_strides,
            ranks,
            idx,
            dist if return_distance else None,
            queries,
            keys.shape[1],
            channels,
            k,
            dilation,
            **_constexprs(launch, k, dilation, x.dtype, allow_tf32),
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
    return idx, dist


AotCase = tuple[Callable[..., Any], dict[str, str], dict[str, Any], int, int]


def aot_cases(capability: int) -> dict[str, AotCase]:
    """What the tests compile ahead of time: name -> (kernel, signature, constexprs, num_warps, num_stages).

    Each case stands for calls that really happen: its launch comes from the table that calls use. A type
    that ends in ":16" is a pointer or number known to be divisible by 16, as Triton finds out by itself
    when it launches; an argument given as "constexpr" has its value, here None, among the constexprs.
    """
    cases: dict[str, AotCase] = {}
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    for name, dtype in dtypes.items():
        cases[f"norms {name}"] = (
            knn_norms_kernel,
            {
                "x_ptr": f"*{name}:16",
                "scale_ptr": "*fp32:16",
                "square_ptr": "*fp32:16",
                "rows": "i32:16",
                "C": "i32:16",
                "NORMALIZE": "constexpr",
                "BLOCK_ROWS": "constexpr",
                "BLOCK_CHANNELS": "constexpr",
            },
            {"NORMALIZE": True, "BLOCK_ROWS": NORMS_BLOCK_ROWS, "BLOCK_CHANNELS": NORMS_BLOCK_CHANNELS},
            NORMS_WARPS,
            3,
        )
        # k and dilation of ViG: k * dilation in each list length, and N of its grids, whose last block of 64
        # queries is well filled at 3136 and not at 196.
        for k, dilation in ((9, 1), (18, 1), (18, 2), (18, 4)):
            for queries in (196, 3136):
                launch = _launch(capability, k * dilation, queries, dtype)
                case = f"{name} k={k} d={dilation} block={launch.block_queries}"
                cases[case] = _aot_case(launch, k, dilation, dtype, name)
        # Bias, ranks and distances, with the longest list there can be.
        launch = _launch(capability, 128, 196, dtype)
        cases[f"{name} k=128 d=1 everything"] = _aot_case(launch, 128, 1, dtype, name, everything=True)
    launch = _launch(capability, 72, 196, torch.float32)
    cases["fp32 k=18 d=4 tf32"] = _aot_case(launch, 18, 4, torch.float32, "fp32", allow_tf32=True)
    return cases


def _aot_case(
    launch: Launch,
    k: int,
    dilation: int,
    dtype: torch.dtype,
    name: str,
    *,
    everything: bool = False,
    allow_tf32: bool = False,
) -> AotCase:
    constexprs = _constexprs(launch, k, dilation, dtype, allow_tf32)
    types = {
        "x_ptr": f"*{name}:16",
        "y_ptr": f"*{name}:16",
        "x_scale_ptr": "*fp32:16",
        "y_scale_ptr": "*fp32:16",
        "y_square_ptr": "*fp32:16",
        "idx_ptr": "*i64:16",
        "C": "i32:16",
    }
    optional = {
        "x_square_ptr": "*fp32:16",
        "bias_ptr": "*fp32:16",
        "ranks_ptr": "*i64:16",
        "dist_ptr": "*fp32:16",
    }
    if everything:
        types |= optional
    else:
        constexprs |= dict.fromkeys(optional)
    signature = {
        argument: "constexpr" if argument in constexprs else types.get(argument, "i32")
        for argument in launch.kernel.arg_names
    }
    return launch.kernel, signature, constexprs, launch.num_warps, launch.num_stages
