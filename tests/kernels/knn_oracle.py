"""What a knn answer is judged by: float64 distances, computed independently of the package."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23}


def unit(x: Tensor) -> Tensor:
    square = (x * x).sum(-1, keepdim=True)
    y = x / square.sqrt().clamp_min(1e-12)
    return torch.where(square.isfinite(), y, torch.nan)


def distances(x: Tensor, y: Tensor | None, bias: Tensor | None, normalize: bool) -> Tensor:
    """(B, N, M) in float64 on the CPU, by differences rather than by products."""
    queries = x.detach().cpu().double()
    keys = queries if y is None else y.detach().cpu().double()
    if normalize:
        queries, keys = unit(queries), unit(keys)
    square = (queries.unsqueeze(2) - keys.unsqueeze(1)).square().sum(-1)
    return square if bias is None else square + bias.detach().cpu().double()


def neighbours(dist: Tensor, k: int, dilation: int, ranks: Tensor | None = None) -> Tensor:
    """The contract in words: sort by (distance, index) with NaN last, then pick positions."""
    rows = dist.flatten(0, 1).tolist()
    positions = ranks.tolist() if ranks is not None else range(0, k * dilation, dilation)
    picked = []
    for row in rows:
        order = sorted(
            range(len(row)), key=lambda j: (row[j] != row[j], row[j] if row[j] == row[j] else 0.0, j)
        )
        picked.append([order[p] for p in positions])
    return torch.tensor(picked, dtype=torch.int64).reshape(*dist.shape[:2], k)


def rounding_band(x: Tensor, y: Tensor | None, bias: Tensor | None, normalize: bool) -> Tensor:
    """How far a distance may be off, (B, N, M): the worst case of summing C products in the
    accumulation type, the norms' own rounding, and the final additions."""
    eps = EPS[torch.float64] if x.dtype == torch.float64 else EPS[torch.float32]
    queries = x.detach().cpu().double()
    keys = queries if y is None else y.detach().cpu().double()
    if normalize:
        queries, keys = unit(queries), unit(keys)
    channels = x.shape[-1]
    magnitude = queries.abs() @ keys.abs().mT
    scale = 2 * magnitude + keys.square().sum(-1).unsqueeze(1) + queries.square().sum(-1).unsqueeze(2)
    if bias is not None:
        scale = scale + bias.detach().cpu().double().abs()
    return (channels + 8) * eps * scale


def assert_neighbours(
    idx: Tensor, dist64: Tensor, band: Tensor, k: int, dilation: int, ranks: Tensor | None = None
):
    """Exact where the order is certain; a slot that differs must be proved to lie within the band."""
    want = neighbours(dist64, k, dilation, ranks)
    got = idx.cpu()
    assert got.dtype == torch.int64 and got.shape == want.shape
    assert ((got >= 0) & (got < dist64.shape[2])).all(), "an index outside the keys"
    ordered = got.sort(-1).values
    assert (ordered[..., 1:] != ordered[..., :-1]).all(), "a key stands twice in one row"
    differs = got != want
    if not differs.any():
        return 0
    allowed = band.gather(2, got) + band.gather(2, want)
    gap = (dist64.gather(2, got) - dist64.gather(2, want)).abs()
    proved = (gap <= allowed) | ~differs
    assert proved.all(), (
        f"{(~proved).sum()} slots differ by more than rounding; largest gap {gap[differs].max()}"
    )
    return int(differs.sum())
