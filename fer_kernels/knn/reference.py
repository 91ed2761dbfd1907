"""knn, the specification: every other backend must agree with this.

Materialises the whole (B, N, M) distance matrix, which is what the other backends exist to avoid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import accumulation_dtype


def prepare_rows(x: Tensor, normalize: bool) -> Tensor:
    """x / max(|x|, 1e-12) by row, or x; a row whose squared norm is NaN or infinite becomes NaN."""
    square = (x * x).sum(-1, keepdim=True)
    scale = square.sqrt().clamp_min(1e-12).reciprocal() if normalize else torch.ones_like(square)
    return x * scale.where(square.isfinite(), torch.nan)


def knn(
    x: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    ranks: Tensor | None,
    k: int,
    dilation: int,
    normalize: bool,
    return_distance: bool,
    allow_tf32: bool,  # float32 products follow torch's own setting here
) -> tuple[Tensor, Tensor]:
    compute = accumulation_dtype(x.dtype)
    queries = prepare_rows(x.to(compute), normalize)
    keys = queries if y is None else prepare_rows(y.to(compute), normalize)

    # |x_i|² is the same for a whole row: it cannot change the order, and adding it would only round.
    ranking = (keys * keys).sum(-1).unsqueeze(1) - 2 * (queries @ keys.mT)
    if bias is not None:
        ranking = ranking + bias.to(compute)
    # topk leaves the order of equal distances open; a stable sort gives them to the lowest index.
    ascending, order = torch.sort(ranking, dim=-1, stable=True)

    if ranks is None:
        positions = torch.arange(0, k * dilation, dilation, device=x.device)
    else:
        positions = ranks.to(x.device, torch.int64)
    # With no query there may be no key either, so nothing to pick positions from.
    if x.shape[1] == 0:
        return order.new_empty(x.shape[0], 0, k), ascending.new_empty(
            x.shape[0], 0, k if return_distance else 0
        )
    idx = order[..., positions].contiguous()
    if not return_distance:
        return idx, ascending.new_empty(x.shape[0], x.shape[1], 0)
    square = (queries * queries).sum(-1, keepdim=True)
    return idx, ascending[..., positions] + square
