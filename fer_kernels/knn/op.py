"""knn: the dilated k-nearest-neighbour graph. Contract, schema, checks."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import checks, dispatch
from . import reference

MAX_NEIGHBOURS = 128  # the largest k * dilation; kMaxNeighbours in csrc/include/fer/knn.h

_HALF = (torch.bfloat16, torch.float16)
OPERATOR = dispatch.Operator(
    "knn",
    dtypes={
        "reference": checks.FLOATING,
        "cpu": checks.FLOATING,
        "triton": (torch.float32, *_HALF),
        "cuda": (torch.float32, *_HALF),
    },
)


def _fake(x, y, bias, ranks, k, dilation, normalize, return_distance, allow_tf32):
    for other in (y, bias):
        torch._check(
            other is None or other.device == x.device, lambda: "knn: x, y and bias on several devices"
        )
    shape = (x.shape[0], x.shape[1], k)
    idx = x.new_empty(shape, dtype=torch.int64)
    dist = x.new_empty(
        shape if return_distance else (*shape[:2], 0), dtype=reference.accumulation_dtype(x.dtype)
    )
    return idx, dist


def _triton(*args: Any) -> tuple[Tensor, Tensor]:
    from . import triton  # importing Triton takes a second: only for those who use it

    return triton.knn(*args)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output)


def _no_gradient(backend: str, ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
    return (None,) * 9


dispatch.define(
    OPERATOR,
    "(Tensor x, Tensor? y, Tensor? bias, Tensor? ranks, int k, int dilation, bool normalize,"
    " bool return_distance, bool allow_tf32) -> (Tensor, Tensor)",
    fake=_fake,
    reference=reference.knn,
    triton=_triton,
    setup_context=_setup_context,
    backward=_no_gradient,
)


@overload
def dilated_knn(
    x: Tensor,
    y: Tensor | None = None,
    *,
    k: int,
    dilation: int = 1,
    bias: Tensor | None = None,
    ranks: Tensor | None = None,
    normalize: bool = True,
    return_distance: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def dilated_knn(
    x: Tensor,
    y: Tensor | None = None,
    *,
    k: int,
    dilation: int = 1,
    bias: Tensor | None = None,
    ranks: Tensor | None = None,
    normalize: bool = True,
    return_distance: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


@overload
def dilated_knn(
    x: Tensor,
    y: Tensor | None = None,
    *,
    k: int,
    dilation: int = 1,
    bias: Tensor | None = None,
    ranks: Tensor | None = None,
    normalize: bool = True,
    return_distance: bool,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]: ...


def dilated_knn(
    x: Tensor,
    y: Tensor | None = None,
    *,
    k: int,
    dilation: int = 1,
    bias: Tensor | None = None,
    ranks: Tensor | None = None,
    normalize: bool = True,
    return_distance: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The k nearest keys of every query, taking every `dilation`-th of the k * dilation nearest.

    The graph of ViG and Face2Nodes: node i's neighbours are the keys j with the smallest

        dist_ij = |x̂_i - ŷ_j|² + bias_ij,    x̂ = x / max(|x|, 1e-12)  (x itself if not normalize)

    Args:
        x: queries (B, N, C); float32, bfloat16, float16 (float64 on reference and cpu).
        y: keys (B, M, C) of the same dtype and device; None takes x. A query is a candidate of its own.
        k: neighbours a query; k * dilation is at most M and at most 128.
        dilation: keep positions 0, d, 2d, ... of the k * d nearest.
        bias: added to the distance; broadcastable to (B, N, M), float32 or x's dtype
            (the pyramid models' relative position).
        ranks: integer tensor of k distinct positions below k * dilation to keep instead, in that
            order (stochastic dilation draws them). Values are checked on the CPU; for a tensor on
            a GPU only under FER_KERNELS_CHECK=1, otherwise a value out of range is clamped into it.
        normalize: compare directions (True) or raw features.
        return_distance: also return the distances.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        idx (B, N, k) int64, ascending by distance; with return_distance also dist (B, N, k), float32
        (float64 for float64 input). Both carry no gradient. A distance may be negative by rounding.

    Ties go to the lowest index and NaN distances come last, in index order, on every backend alike. A row
    whose squared norm is NaN or infinite has NaN distances; without normalize, squared norms above 1e38 may
    overflow. GPU backends may take rows of norm below 1e-19 for zero. Sums are accumulated in float32
    (float64 for float64); float32 products on a GPU use TF32 only where torch.set_float32_matmul_precision
    or torch.backends.cuda.matmul allows it. Results are bitwise reproducible; apart from the reference, no
    backend stores an N x M matrix. An empty batch or N = 0 gives empty results.
    """
    _check(x, y, k, dilation, bias, ranks, normalize, return_distance)
    if bias is not None:
        bias = bias.reshape((1,) * (3 - bias.dim()) + bias.shape)
    run = OPERATOR.choose(backend, x)
    allow_tf32 = x.device.type == "cuda" and _tf32_is_allowed()
    idx, dist = run(x, y, bias, ranks, k, dilation, normalize, return_distance, allow_tf32)
    return (idx, dist) if return_distance else idx


def _tf32_is_allowed() -> bool:
    matmul = torch.backends.cuda.matmul
    # Two ways to read one setting: torch.compile traces and guards the first alone; the first
    # raises where the user has set the second.
    return matmul.allow_tf32 if torch.compiler.is_compiling() else matmul.fp32_precision == "tf32"


def _check(x, y, k, dilation, bias, ranks, normalize, return_distance) -> None:
    here = "dilated_knn"
    checks.floating_nodes(here, "x", x)
    checks.positive_int(here, "k", k)
    checks.positive_int(here, "dilation", dilation)
    checks.a_bool(here, "normalize", normalize)
    checks.a_bool(here, "return_distance", return_distance)
    if y is not None:
        checks.floating_nodes(here, "y", y)
        if y.dtype != x.dtype:
            raise TypeError(f"{here}: y must have x's dtype {x.dtype}, got {y.dtype}")
        checks.same_device(here, "y", y, "x", x)
        if y.shape[0] != x.shape[0] or y.shape[2] != x.shape[2]:
            raise ValueError(
                f"{here}: y must be (B, M, C) with B = {x.shape[0]} and C = {x.shape[2]} "
                f"as in x {checks.shape(x)}, got {checks.shape(y)}"
            )
    keys = x if y is None else y
    if k * dilation > MAX_NEIGHBOURS:
        raise ValueError(
            f"{here}: k * dilation = {k * dilation} exceeds the limit of {MAX_NEIGHBOURS} "
            f"(k={k}, dilation={dilation})"
        )
    if x.shape[1] > 0 and k * dilation > keys.shape[1]:
        raise ValueError(
            f"{here}: k * dilation = {k * dilation} exceeds the {keys.shape[1]} keys "
            f"({'x' if y is None else 'y'}: {checks.shape(keys)}, k={k}, dilation={dilation})"
        )
    if bias is not None:
        _check_bias(here, x, keys, bias)
    if ranks is not None:
        _check_ranks(here, x, k, dilation, ranks)


def _check_bias(here: str, x: Tensor, keys: Tensor, bias: Tensor) -> None:
    checks.dense_tensor(here, "bias", bias)
    if bias.dtype not in (torch.float32, x.dtype):
        raise TypeError(f"{here}: bias must be float32 or x's dtype {x.dtype}, got {bias.dtype}")
    checks.same_device(here, "bias", bias, "x", x)
    full = (x.shape[0], x.shape[1], keys.shape[1])
    fits = bias.dim() <= 3 and all(
        size == 1 or size == want for size, want in zip(reversed(bias.shape), reversed(full), strict=False)
    )
    if not fits:
        raise ValueError(f"{here}: bias must broadcast to (B, N, M) = {full}, got {checks.shape(bias)}")


def _check_ranks(here: str, x: Tensor, k: int, dilation: int, ranks: Tensor) -> None:
    checks.dense_tensor(here, "ranks", ranks)
    if ranks.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{here}: ranks must be int32 or int64, got {ranks.dtype}")
    if ranks.dim() != 1 or ranks.shape[0] != k:
        raise ValueError(f"{here}: ranks must be ({k},), one position a neighbour, got {checks.shape(ranks)}")
    if ranks.device.type != "cpu":
        checks.same_device(here, "ranks", ranks, "x", x)
    # Values are out of reach while tracing, and so are those of a fake tensor, a subclass. The CPU
    # kernels look again, GPU kernels clamp.
    traced = torch.compiler.is_compiling() or type(ranks) is not Tensor
    if not traced and (ranks.device.type == "cpu" or dispatch.CHECK_VALUES):
        check_rank_values(ranks.tolist(), k, dilation)


def check_rank_values(values: list[int], k: int, dilation: int) -> None:
    if min(values) < 0 or max(values) >= k * dilation:
        raise ValueError(
            f"dilated_knn: ranks must lie in [0, {k * dilation}) (k={k}, dilation={dilation}), got {values}"
        )
    if len(set(values)) != len(values):
        raise ValueError(f"dilated_knn: ranks must not repeat, got {values}")


def to_edge_index(idx: Tensor, num_keys: int) -> Tensor:
    """The graph as PyTorch Geometric reads it: (2, E) int64 over the flattened batch.

    Row 0 is the source (the neighbour), row 1 the target (the centre), so messages flow from
    neighbour to centre. Sample b's keys are numbered from b * num_keys and its queries from b * N.

    Args:
        idx: (B, N, k) from `dilated_knn`.
        num_keys: M, the keys a sample (N where keys and queries are the same).
    """
    checks.dense_tensor("to_edge_index", "idx", idx)
    checks.positive_int("to_edge_index", "num_keys", num_keys)
    if idx.dim() != 3 or idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"to_edge_index: idx must be an integer (B, N, k), got {idx.dtype} {checks.shape(idx)}"
        )
    batch, queries, _ = idx.shape
    if idx.numel() and (idx.device.type == "cpu" or dispatch.CHECK_VALUES) and type(idx) is Tensor:
        low, high = (int(bound) for bound in torch.aminmax(idx))
        if low < 0 or high >= num_keys:
            raise RuntimeError(
                f"to_edge_index: idx must lie in [0, num_keys) with num_keys = {num_keys}, "
                f"but idx holds values from {low} to {high}"
            )
    first_key = torch.arange(batch, device=idx.device).view(-1, 1, 1) * num_keys
    centre = torch.arange(batch * queries, device=idx.device).view(batch, queries, 1)
    return torch.stack([(idx + first_key).flatten(), centre.expand_as(idx).flatten()])
