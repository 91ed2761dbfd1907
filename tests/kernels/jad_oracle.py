"""What a jad answer is judged by: float64 attention, computed independently of the package.

Decisions are compared with those of float64 column means; where a value is so near its threshold that
rounding may decide, the two may differ. Outputs and gradients are then compared under the very mask that the
judged backend chose, so that a decision within rounding fails nobody.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NEARLY_UNIFORM = 0.05
LOST_MASS = 1e-6


def accumulation_eps(dtype: torch.dtype) -> float:
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def double(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().cpu().double() for t in tensors]


def scores(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    q, k = double(q, k)
    return torch.einsum("bhnd,bhmd->bhnm", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)


def softmax(s: Tensor) -> Tensor:
    """By rows; one of -inf alone is zeros."""
    top = s.amax(-1, keepdim=True)
    powers = (s - top.masked_fill(top == -torch.inf, 0)).exp()
    total = powers.sum(-1, keepdim=True)
    return powers / total.masked_fill(total == 0, 1)


def column_mean(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """By attention with q and k exchanged: the log-sum-exp over queries of s_ij - lse_i is log Σ_i P_ij."""
    s = scores(q, k, scale)
    normalised = (s - s.logsumexp(-1, keepdim=True)).transpose(-1, -2)
    return (normalised.logsumexp(-1) - math.log(s.shape[2])).exp()


def keys_to_drop(c: list[float], beta: float, max_drop: float, protect: int) -> list[bool]:
    """The contract in words, for one head."""
    keys = len(c)
    mean = math.fsum(c) / keys
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in c) / keys)
    if not keys * deviation >= NEARLY_UNIFORM:
        return [False] * keys
    joint = [j for j in range(protect, keys) if c[j] > 1 / keys + beta * deviation]
    joint.sort(key=lambda j: (-c[j], j))
    chosen = set(joint[: math.floor(max_drop * keys)])
    return [j in chosen for j in range(keys)]


def key_mask(c: Tensor, beta: float, max_drop: float, protect: int, over_head: bool = False) -> Tensor:
    """(B, H, M) bool from column means."""
    c = c.detach().cpu().double()
    if over_head:
        c = c.mean(1, keepdim=True).expand_as(c)
    rows = [keys_to_drop(row, beta, max_drop, protect) for row in c.flatten(0, 1).tolist()]
    return torch.tensor(rows).view(c.shape)


def control_mask(drop: str, noise: Tensor, key: Tensor, max_drop: float, protect: int) -> Tensor:
    """(B, H, M) bool of the controls, from their noise and the keys that mode "key" drops."""
    rows = []
    for numbers, chosen in zip(noise.flatten(0, 1).tolist(), key.flatten(0, 1), strict=True):
        free = range(protect, len(numbers))
        if drop == "random":
            dropped = set(sorted(free, key=numbers.__getitem__)[: int(chosen.sum())])  # stable: ties by index
        else:
            dropped = {j for j in free if numbers[j] < max_drop}
            dropped = dropped if len(dropped) < len(numbers) else set()
        rows.append([j in dropped for j in range(len(numbers))])
    return torch.tensor(rows).view(noise.shape)


def score_error(q: Tensor, k: Tensor, scale: float | None = None) -> float:
    """How far any score may be off: the worst case of a product summed in the accumulation type."""
    absolute = scores(q.abs(), k.abs(), None if scale is None else abs(scale))
    return float((q.shape[-1] + 4) * accumulation_eps(q.dtype) * absolute.max())


def weight_error(q: Tensor, k: Tensor, scale: float | None = None) -> float:
    """How far a weight P_ij, or a mean of weights over a column, may be off, relative to itself."""
    sums = q.shape[2] + k.shape[2] + 16  # a row's, a column's, and the exponential's own error
    return 2 * score_error(q, k, scale) + sums * accumulation_eps(q.dtype)


def assert_key_mask(
    mask: Tensor,
    q: Tensor,
    k: Tensor,
    *,
    beta: float,
    max_drop: float,
    protect: int,
    gate: Tensor | None = None,
    over_head: bool = False,
    scale: float | None = None,
) -> int:
    """Exact away from the threshold: a key that differs is proved to be within rounding of what decides.

    What decides is the threshold, or where the cap binds the smallest c that still gets dropped.
    """
    c = column_mean(q, k, scale)
    want = key_mask(c, beta, max_drop, protect, over_head)
    if over_head:
        c = c.mean(1, keepdim=True).expand_as(c)
    if gate is not None:
        want &= gate.cpu().bool().unsqueeze(-1)
    got = mask.cpu()
    assert got.dtype == torch.bool and got.shape == want.shape
    keys = c.shape[-1]
    cap = math.floor(max_drop * keys)
    assert (got.sum(-1) <= cap).all(), "more keys dropped than max_drop allows"
    assert not got[..., :protect].any(), "a protected key dropped"
    band = weight_error(q, k, scale) * c.amax(-1, keepdim=True)
    deviation = c.std(-1, correction=0, keepdim=True)
    decided_by = [(c - 1 / keys - beta * deviation).abs() <= (2 + beta) * band]
    decided_by.append((keys * deviation - NEARLY_UNIFORM).abs().expand_as(c) <= 2 * keys * band)
    if 0 < cap < keys:
        last = torch.sort(c[..., protect:], dim=-1, descending=True).values[..., cap - 1 : cap + 1]
        for value in last.unbind(-1):
            decided_by.append((c - value.unsqueeze(-1)).abs() <= 2 * band)
    near = torch.stack(decided_by).any(0)
    differs = got != want
    assert not (differs & ~near).any(), f"{(differs & ~near).sum()} keys differ by more than rounding"
    return int(differs.sum())


def assert_entry_mask(
    mask: Tensor,
    q: Tensor,
    k: Tensor,
    *,
    tau: float,
    protect: int,
    gate: Tensor | None = None,
    over_head: bool = False,
    scale: float | None = None,
) -> int:
    p = softmax(scores(q, k, scale))
    c = p.mean(2)
    if over_head:
        c = c.mean(1, keepdim=True).expand_as(c)
    keys = c.shape[-1]
    deviation = c.std(-1, correction=0, keepdim=True)
    column = (c > 1 / keys) & (keys * deviation >= NEARLY_UNIFORM)
    column[..., :protect] = False
    if gate is not None:
        column &= gate.cpu().bool().unsqueeze(-1)
    level = c.unsqueeze(2)
    want = ((p - level).abs() <= tau * level) & column.unsqueeze(2)
    kept = p.masked_fill(want, 0).sum(-1, keepdim=True)
    want &= kept >= LOST_MASS
    got = mask.cpu()
    assert got.dtype == torch.bool and got.shape == want.shape
    assert not got[..., :protect].any(), "a protected key dropped"

    error = weight_error(q, k, scale)
    near = ((p - level).abs() - tau * level).abs() <= (2 + tau) * error * (p + level)
    near |= ((c - 1 / keys).abs() <= 2 * error * c).unsqueeze(2)
    uncertain_head = (keys * deviation - NEARLY_UNIFORM).abs() <= 2 * keys * error * c.amax(-1, keepdim=True)
    near |= uncertain_head.unsqueeze(2)
    # A row on the edge of being left whole, also by entries that are themselves on the edge.
    doubtful = (p * near).sum(-1, keepdim=True) + error
    near |= (kept - LOST_MASS).abs() <= doubtful * (kept < 2 * LOST_MASS + doubtful)
    differs = got != want
    assert not (differs & ~near).any(), f"{(differs & ~near).sum()} entries differ by more than rounding"
    return int(differs.sum())


@dataclass
class Replayed:
    """Attention under a given bias, and its gradients, in one arithmetic."""

    out: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return self.out, self.dq, self.dk, self.dv


def replay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Replayed:
    """What attention gives under `bias` (broadcastable to (B, H, N, M)), by autograd; everything in `dtype`.

    In float64 this is the truth, in the inputs' own dtype the eager path.
    """
    leaves = [t.detach().cpu().to(dtype).requires_grad_() for t in (q, k, v)]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = leaves[0] @ leaves[1].mT * scale
    if bias is not None:
        s = s + bias.detach().cpu().to(dtype)
    out = s.softmax(-1) @ leaves[2]
    gradients = torch.autograd.grad(out, leaves, grad.detach().cpu().to(dtype))
    return Replayed(out.detach(), *gradients)


def as_bias(mask: Tensor) -> Tensor:
    """A drop mask, (B, H, M) or (B, H, N, M), as what is added to the scores."""
    bias = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device).masked_fill(mask, -torch.inf)
    return bias if mask.dim() == 4 else bias.unsqueeze(2)


def soft_bias(c: Tensor, soft: float, gate: Tensor | None = None, over_head: bool = False) -> Tensor:
    c = c.detach().cpu().double()
    if over_head:
        c = c.mean(1, keepdim=True).expand_as(c)
    bias = (1 - soft * c / c.amax(-1, keepdim=True)).log()
    return (bias if gate is None else bias * gate.cpu().double().unsqueeze(-1)).unsqueeze(2)


def squared_errors(got: tuple[Tensor, ...], truth: tuple[Tensor, ...], eager: tuple[Tensor, ...]) -> Tensor:
    """(tensors, 3): sums of squares of the errors of got and eager, and of the truth. Draws may be added."""
    rows = []
    for mine, want, theirs in zip(got, truth, eager, strict=True):
        errors = (mine.detach().cpu().double() - want, theirs.double() - want, want)
        rows.append([float(e.square().sum()) for e in errors])
    return torch.tensor(rows, dtype=torch.float64)


def assert_within_twice_eager(squares: Tensor, dtype: torch.dtype, names=("out", "dq", "dk", "dv")):
    """Root mean squares: the error of each is at most twice what the eager path of the same dtype loses on
    the same masks, or what rounding the result once already costs.

    The largest error of one draw is no measure of an algorithm: it is that of one row with one large weight,
    and between draws the ratio of two algorithms that err alike reaches four. Single elements are judged by
    their own worst case, in `assert_within_rounding`.
    """
    for name, (mine, theirs, truth) in zip(names, squares.tolist(), strict=True):
        allowed = max(2 * math.sqrt(theirs), torch.finfo(dtype).eps * math.sqrt(truth))
        assert math.sqrt(mine) <= allowed, (
            f"{name}: {math.sqrt(mine) / allowed:.3g} times the allowed error, "
            f"{math.sqrt(mine / max(theirs, 1e-300)):.3g} times that of eager code"
        )


def assert_within_rounding(
    got: tuple[Tensor, ...],
    truth: Replayed,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    bias: Tensor | None,
    scale: float | None = None,
):
    """The error of each is within its worst case, for shapes where an eager error may be zero by luck."""
    number = q.shape[-1] ** -0.5 if scale is None else scale
    q64, k64, v64, g64 = double(q, k, v, grad)
    s = scores(q, k, scale)
    p = softmax(s if bias is None else s + bias.cpu().double())
    last = torch.finfo(q.dtype).eps / 2
    products = g64.abs() @ v64.abs().mT
    summed = (p * products).sum(-1, keepdim=True)
    # The weights, the sums over keys, queries and channels, and out, which is rounded before it enters Δ.
    relative = weight_error(q, k, scale) + (q.shape[-1] + 8) * accumulation_eps(q.dtype)
    dscores = p * (2 * relative * (products + summed) + last * summed)
    exact = p * (products + summed)
    bounds = (
        2 * relative * (p @ v64.abs()),
        (dscores + 2 * relative * exact) @ k64.abs() * abs(number),
        (dscores + 2 * relative * exact).mT @ q64.abs() * abs(number),
        2 * relative * (p.mT @ g64.abs()),
    )
    tiny = torch.finfo(q.dtype).smallest_normal * torch.finfo(q.dtype).eps
    for name, mine, want, bound in zip(("out", "dq", "dk", "dv"), got, truth.tensors(), bounds, strict=True):
        error = (mine.detach().cpu().double() - want).abs()
        allowed = bound + last * (want.abs() + bound) + tiny
        assert (error <= allowed).all(), f"{name}: {(error / allowed).max():.3g} times what rounding allows"


def judged(
    got: tuple[Tensor, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    bias: Tensor | None,
    scale: float | None = None,
) -> Tensor:
    """Every element is within its worst case; returns `squared_errors` for `assert_within_twice_eager`."""
    truth = replay(q, k, v, grad, bias, scale)
    assert all(mine.dtype == q.dtype for mine in got)
    assert_within_rounding(got, truth, q, k, v, grad, bias, scale)
    eager = replay(q, k, v, grad, bias, scale, q.dtype)
    return squared_errors(got, truth.tensors(), eager.tensors())
