"""What a relation answer is judged by: the formulas in float64, computed independently of the package.

A maximum is a gather at given slots here, so that gradients are compared on the slots a kernel took; a slot
that is not the oracle's own must be proved to lie within rounding of the maximum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = {
    torch.float64: 2.0**-52,
    torch.float32: 2.0**-23,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}
LEAVES = ("x", "y", "p", "q", "a")
Answer = dict[str, Tensor]  # "out", "weights", "slots", and under LEAVES and "grad" the gradients


@dataclass
class Problem:
    """A call, and the gradients that arrive at its outputs; grad_weights asks for the weights."""

    x: Tensor
    idx: Tensor
    y: Tensor | None = None
    p: Tensor | None = None
    q: Tensor | None = None
    a: Tensor | None = None
    mode: str = "mr"
    slope: float = 0.2
    grad: Tensor | None = None
    grad_weights: Tensor | None = None

    def map(self, change) -> Problem:
        """Every floating tensor changed."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self,
            **{n: change(t) for n, t in tensors.items() if isinstance(t, Tensor) and t.is_floating_point()},
        )

    def leaves(self) -> dict[str, Tensor]:
        named = {name: getattr(self, name) for name in LEAVES}
        return {name: t.detach().clone().requires_grad_() for name, t in named.items() if t is not None}

    def double(self) -> Problem:
        return replace(self.map(lambda t: t.detach().cpu().double()), idx=self.idx.cpu().long())


def gradients(problem: Problem, out: Tensor, weights: Tensor | None, leaves: dict, order: int) -> Answer:
    """Of <out, grad> + <weights, grad_weights> by every leaf; with order 2, of a combination of those."""
    grad = problem.grad.to(out.device).detach().clone().requires_grad_(order == 2)
    outputs, incoming = [out], [grad]
    if weights is not None:
        outputs.append(weights)
        incoming.append(problem.grad_weights.to(out.device))
    found = torch.autograd.grad(
        outputs, list(leaves.values()), incoming, create_graph=order == 2, allow_unused=True
    )
    answer = {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(leaves, found, strict=True)}
    if order == 1:
        return answer
    generator = torch.Generator().manual_seed(5)
    total = out.new_zeros(())
    for g in answer.values():
        total = total + (g * torch.randn(g.shape, generator=generator).to(g)).sum()
    leaves = leaves | {"grad": grad}
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(leaves, found, strict=True)}


# ---- the formulas in float64 ----


def take(rows: Tensor, idx: Tensor) -> Tensor:
    """rows (B, M, C) at idx (B, N, k): (B, N, k, C)."""
    start = rows.shape[1] * torch.arange(rows.shape[0]).view(-1, 1, 1)
    return rows.flatten(0, 1)[idx + start]


def parts(p64: Problem, leaves: dict) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """δ (B, N, k, C), α (B, N, k, H), its scores, and the sum of their terms' magnitudes."""
    x = leaves["x"]
    delta = take(leaves.get("y", x), p64.idx) - x.unsqueeze(2)
    if p64.mode == "mr":
        return delta, None, None, None
    z = leaves["p"].unsqueeze(2) + take(leaves["q"], p64.idx)
    z = torch.where(z > 0, z, p64.slope * z).unflatten(-1, leaves["a"].shape)
    terms = z * leaves["a"]
    scores = terms.sum(-1)
    return delta, scores.softmax(2), scores, terms.detach().abs().sum(-1)


def per_channel(alpha: Tensor, channels: int) -> Tensor:
    """(B, N, k, H) to (B, N, k, C): head h owns the h-th run of channels."""
    return alpha.repeat_interleave(channels // alpha.shape[-1], -1)


def first_maximum(values: Tensor) -> Tensor:
    """(B, N, k, C) to the first slot of the largest value, NaN the largest of all."""
    k = values.shape[2]
    attains = (values == values.amax(2, keepdim=True)) | values.isnan()
    return torch.where(attains, torch.arange(k).view(1, 1, k, 1), k).amin(2)


def solve(problem: Problem, slots: Tensor | None = None, order: int = 1) -> Answer:
    """The truth, with the maximum taken at `slots`."""
    p64 = problem.double()
    leaves = p64.leaves()
    delta, alpha, _, _ = parts(p64, leaves)
    k, channels = delta.shape[2:]
    answer = {}
    if p64.mode == "rsum":
        out = (per_channel(alpha, channels) * delta).sum(2)
    else:
        factor = None if p64.mode == "mr" else k * per_channel(alpha, channels)
        if slots is None:
            slots = first_maximum((delta if factor is None else factor * delta).detach())
        slots = answer["slots"] = slots.detach().cpu().long()
        out = delta.gather(2, slots.unsqueeze(2)).squeeze(2)
        if factor is not None:
            out = out * factor.gather(2, slots.unsqueeze(2)).squeeze(2)
    weights = alpha if p64.grad_weights is not None else None
    if weights is not None:
        answer["weights"] = weights.detach()
    answer["out"] = out.detach()
    if p64.grad is not None:
        answer |= gradients(p64, out, weights, leaves, order)
    return answer


# ---- what plain PyTorch makes of it ----


def eager(x, idx, y, p, q, a, mode, slope) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The natural code, in the inputs' dtype: out, α, slots."""
    rows = torch.arange(x.shape[0], device=x.device).view(-1, 1, 1)
    delta = (x if y is None else y)[rows, idx] - x.unsqueeze(2)
    if mode == "mr":
        out, slots = delta.max(2)
        return out, None, slots
    z = F.leaky_relu(p.unsqueeze(2) + q[rows, idx], slope)
    alpha = (z.unflatten(-1, a.shape) * a).sum(-1).softmax(2)
    weighted = (delta.unflatten(-1, (a.shape[0], -1)) * alpha.unsqueeze(-1)).flatten(-2)
    if mode == "rsum":
        return weighted.sum(2), alpha, None
    out, slots = (idx.shape[2] * weighted).max(2)
    return out, alpha, slots


def solve_eager(problem: Problem, order: int = 1) -> Answer:
    leaves = problem.leaves()
    out, alpha, slots = eager(
        *(leaves.get("x"), problem.idx, leaves.get("y"), leaves.get("p"), leaves.get("q"), leaves.get("a")),
        *(problem.mode, problem.slope),
    )
    weights = alpha if problem.grad_weights is not None else None
    answer = {"out": out.detach()} | gradients(problem, out, weights, leaves, order)
    if weights is not None:
        answer["weights"] = weights.detach()
    if slots is not None:
        answer["slots"] = slots
    return answer


def eager_errors(problem: Problem, order: int) -> dict[str, float]:
    """The largest error of plain PyTorch in float32, the arithmetic that the contract promises.

    Over this problem and over neighbours of it that differ by a per cent, enough of them that each output
    is judged by 16 values or more: a single value may be right by luck.
    """
    errors: dict[str, float] = {}
    generator = torch.Generator().manual_seed(11)

    def nearby(t: Tensor) -> Tensor:
        return (t.double() * (1 + 0.01 * torch.randn(t.shape, generator=generator))).float()

    base = problem.map(lambda t: t.detach().cpu())
    base = replace(base, idx=base.idx.cpu().long())
    smallest = 16
    draw, draws = 0, 4 if problem.x.dtype == torch.float64 else 2
    while draw < max(draws, math.ceil(16 / smallest)):
        near = base.map(nearby if draw else lambda t: t.float())
        got = solve_eager(near, order)
        want = solve(near, got.get("slots"), order)
        got.pop("slots", None)
        for name, value in got.items():
            error = (value.double() - want[name]).abs()
            error = error[error.isfinite()]
            errors[name] = max(errors.get(name, 0.0), error.max().item() if error.numel() else 0.0)
            if value.numel():
                smallest = min(smallest, value.numel())
        draw += 1
    return errors


# ---- judgement ----


def arithmetic(problem: Problem) -> tuple[float, float]:
    """Epsilon and the smallest normal number of the type that the contract computes in."""
    return (2.0**-52, 2.0**-1022) if problem.x.dtype == torch.float64 else (2.0**-23, 2.0**-126)


def weight_error(problem: Problem, scores: Tensor, magnitude: Tensor) -> Tensor:
    """How far an α may be off by rounding, as a share of it: its score, the largest score, exp, the sum."""
    eps, _ = arithmetic(problem)
    k, width = scores.shape[2], problem.a.shape[1]
    score = eps * (width + 3) * magnitude.amax(2, keepdim=True)
    return (2 * score + 2 * eps * (scores.amax(2, keepdim=True) - scores).abs() + eps * (k + 16)).expm1()


def rounding_bounds(problem: Problem, slots: Tensor | None) -> Answer:
    """How far rounding alone may take each output: every sum of n terms by n epsilons of its magnitude."""
    p64 = problem.double()
    with torch.no_grad():
        leaves = p64.leaves()
        delta, alpha, scores, magnitude = parts(p64, leaves)
        k, channels = delta.shape[2:]
        eps, _ = arithmetic(problem)
        hit = torch.ones_like(delta, dtype=torch.bool)
        if slots is not None:
            hit = torch.arange(k).view(1, 1, k, 1) == slots.cpu().long().unsqueeze(2)
        factor, off = torch.ones(()), torch.zeros(())
        if alpha is not None:
            share = weight_error(problem, scores, magnitude)
            factor, off = per_channel(alpha, channels), per_channel(share, channels)
        factor = factor * (k if p64.mode == "rmr" else 1)
        terms = 1 if slots is not None else k
        bounds = {"out": torch.where(hit, delta.abs() * factor * (off + (terms + 3) * eps), 0).sum(2)}

        keys = leaves.get("y", leaves["x"]).shape[1]
        most = p64.idx.numel()  # edges that can meet in one key, or all in a

        def to_keys(edges: Tensor) -> Tensor:
            result = edges.new_zeros(edges.shape[0], keys, edges.shape[3])
            place = p64.idx.flatten(1).unsqueeze(-1).expand(-1, -1, edges.shape[3])
            return result.scatter_add(1, place, edges.flatten(1, 2))

        grad = p64.grad.abs().unsqueeze(2)
        edge = torch.where(hit, grad * factor * (off + (most + 3) * eps), 0)
        bounds["x"], of_keys = edge.sum(2), to_keys(edge)
        if p64.y is None:
            bounds["x"] = bounds["x"] + of_keys
        else:
            bounds["y"] = of_keys
        if alpha is None:
            return bounds

        bounds["weights"] = alpha * share
        heads = alpha.shape[-1]
        to_weight = torch.where(hit, grad * delta.abs(), 0) * (k if p64.mode == "rmr" else 1)
        to_weight = to_weight.unflatten(-1, (heads, channels // heads)).sum(-1)
        if p64.grad_weights is not None:
            to_weight = to_weight + p64.grad_weights.abs()
        to_score = alpha * (to_weight + (alpha * to_weight).sum(2, keepdim=True))
        to_score = to_score * (3 * share.amax(2, keepdim=True) + (channels // heads + k + most + 12) * eps)
        z = leaves["p"].unsqueeze(2) + take(leaves["q"], p64.idx)
        steep = torch.where(z > 0, 1.0, abs(p64.slope))
        to_z = (to_score.unsqueeze(-1) * leaves["a"].abs()).flatten(3) * steep
        bounds["p"], bounds["q"] = to_z.sum(2), to_keys(to_z)
        relu = (z.abs() * steep).unflatten(-1, leaves["a"].shape)
        bounds["a"] = (to_score.unsqueeze(-1) * relu).sum((0, 1, 2))
    return bounds


def assert_slots(problem: Problem, slots: Tensor) -> int:
    """The first maximum where that is certain; returns how many slots differ within rounding."""
    p64 = problem.double()
    with torch.no_grad():
        delta, alpha, scores, magnitude = parts(p64, p64.leaves())
        k, channels = delta.shape[2:]
        eps, tiny = arithmetic(problem)
        if alpha is None:
            value, band = delta, eps * delta.abs()
        else:
            value = k * per_channel(alpha, channels) * delta
            # An α that the arithmetic cannot hold is zero.
            off = per_channel(weight_error(problem, scores, magnitude), channels)
            band = value.abs() * off + 2 * k * tiny * delta.abs()
    got, want = slots.cpu().long(), first_maximum(value)
    assert slots.dtype == torch.uint8 and got.shape == want.shape
    assert (got < k).all(), "a slot outside the neighbours"
    differs = got != want
    at_got, at_want = (value.gather(2, s.unsqueeze(2)).squeeze(2) for s in (got, want))
    allowed = band.gather(2, got.unsqueeze(2)).squeeze(2) + band.gather(2, want.unsqueeze(2)).squeeze(2)
    proved = ((at_want - at_got).abs() <= allowed) | ~differs  # never with NaN or between infinities
    wrong = [t[~proved].tolist()[:3] for t in (got, at_got, want, at_want)]
    assert proved.all(), (
        f"{(~proved).sum()} slots are neither the first maximum nor within rounding of it: "
        f"slots {wrong[0]} of value {wrong[1]} instead of {wrong[2]} of value {wrong[3]}"
    )
    return int(differs.sum())


def assert_answer(problem: Problem, answer: Answer, order: int = 1, proved: bool = False) -> None:
    """Within twice what plain PyTorch loses in the arithmetic's dtype, plus the one rounding of the result.

    The oracle is no truer than float64: for float64 the loss is float32's, scaled, and counts once more.
    `proved` also takes what rounding_bounds proves to be rounding: plain PyTorch may be right by luck, and
    is asked only where that is not proved.
    """
    if "slots" in answer:
        assert_slots(problem, answer["slots"])
    want = solve(problem, answer.get("slots"), order)
    errors = None if proved else eager_errors(problem, order)
    bounds = rounding_bounds(problem, answer.get("slots")) if proved else {}
    dtype = problem.x.dtype
    scale = 3 * 2.0**-29 if dtype == torch.float64 else 2.0
    assert set(answer) == set(want), f"{sorted(answer)} instead of {sorted(want)}"
    for name in sorted(set(answer) - {"slots"}):
        got, true = answer[name].cpu(), want[name]
        assert got.dtype == dtype and got.shape == true.shape, f"{name}: {got.dtype} {tuple(got.shape)}"
        got = got.double()
        assert torch.equal(got.isnan(), true.isnan()), f"{name}: NaN at other places"
        finite = true.isfinite()
        assert torch.equal(got[~finite].nan_to_num(nan=7.0), true[~finite].nan_to_num(nan=7.0)), name
        bound = bounds.get(name, torch.zeros(true.shape, dtype=torch.float64))[finite].nan_to_num(nan=0.0)
        got, true = got[finite], true[finite]
        rounding = EPS[dtype] / 2 * torch.maximum(got.abs(), true.abs())
        rounding = rounding + EPS[dtype] * torch.finfo(dtype).smallest_normal + 2.0**-126
        excess = (got - true).abs() - rounding
        if proved and (excess <= bound).all():
            continue
        errors = errors or eager_errors(problem, order)
        assert (excess <= bound.clamp_min(scale * errors[name])).all(), (
            f"{name}: off by {excess.max():.3g} beyond its rounding, plain PyTorch by {errors[name]:.3g}"
        )


def assert_exact(problem: Problem, answer: Answer, want: Answer | None = None) -> None:
    """Where float32 holds every intermediate result: the truth rounded once, bit for bit."""
    want = solve(problem) if want is None else want
    assert set(answer) == set(want)
    for name, true in want.items():
        got = answer[name].cpu()
        assert got.dtype == (torch.uint8 if name == "slots" else problem.x.dtype)
        assert torch.equal(got, true.to(got.dtype)), f"{name}: {(got != true.to(got.dtype)).sum()} wrong"


def reverse(idx: Tensor, keys: int) -> Tensor:
    """Row by row: offsets, then the edges i * k + slot of each key in ascending order."""
    result = []
    for sample in idx.tolist():
        edges = [j for row in sample for j in row]
        of_key: list[list[int]] = [[] for _ in range(keys)]
        for edge, key in enumerate(edges):
            of_key[key].append(edge)
        offsets = [0]
        for found in of_key:
            offsets.append(offsets[-1] + len(found))
        result.append(offsets + [edge for found in of_key for edge in found])
    return torch.tensor(result, dtype=torch.int32).reshape(
        idx.shape[0], keys + 1 + idx.shape[1] * idx.shape[2]
    )
