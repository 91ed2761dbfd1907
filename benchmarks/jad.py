"""jad: attention with joint attention dropping."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fer_kernels

from .gate import unit_roundoff, value_problem
from .providers import ours
from .registry import Case, Cost, Inputs, Provider, Suite, register, short

# B, H, N, M, D: the transformers of facial expression recognition (197 tokens, or 4 paths that query them),
# and sequences too long for one pass over the scores.
CPU_SHAPES = ((16, 6, 197, 197, 64), (16, 6, 4, 197, 64), (1, 6, 785, 785, 64), (1, 6, 3137, 3137, 64))
GPU_SHAPES = (
    (128, 6, 197, 197, 64),
    (64, 12, 197, 197, 64),
    (128, 6, 4, 197, 64),
    (64, 6, 785, 785, 64),
    (4, 6, 3137, 3137, 64),
)
DROPS = ("key", "none", "soft", "entry")
DTYPES = (torch.float32, torch.bfloat16)
BETA, MAX_DROP, PROTECT, SOFT, TAU = 1.0, 0.3, 1, 0.5, 0.3  # the defaults of jad_attention

# The gate holds a float64 score matrix of as many heads as fit in this many elements.
GATE_ELEMENTS = 1 << 24


@dataclass
class Attended:
    """What a provider returns: its results, and `replay`, which gives the drop mask behind them.

    Which key is dropped may be decided by rounding, so the gate compares on the provider's own mask.
    """

    results: tuple[Tensor, ...]  # out; backward: out, dq, dk, dv
    replay: Callable[[], Tensor | None]


def _cost(shape: dict[str, int], dtype: torch.dtype, direction: str) -> Cost:
    batch, heads, queries, keys, width = (shape[name] for name in "BHNMD")
    product = 2 * batch * heads * queries * keys * width
    own = batch * heads * width * dtype.itemsize
    # Forward: q, k, v in, out out. A training step reads all of them and the gradient once more, and writes
    # three gradients; it recomputes the scores, and has four more products.
    forward = own * (2 * queries + 2 * keys)
    backward = own * (4 * queries + 4 * keys)
    return Cost(
        bytes=forward + (backward if direction == "backward" else 0),
        flops=product * (7 if direction == "backward" else 2),
    )


def _make_inputs(case: Case, generator: torch.Generator) -> Inputs:
    """Queries that share a direction, so that some keys are joint; and out's gradient for backward cases."""
    batch, heads, queries, keys, width = (case.shape[name] for name in "BHNMD")

    def draw(rows: int) -> Tensor:
        return torch.randn(batch, heads, rows, width, generator=generator)

    inputs = {"q": draw(queries) + draw(1), "k": draw(keys), "v": draw(keys)}
    if case.direction == "backward":
        inputs["grad"] = draw(queries)
    return {name: tensor.to(case.dtype) for name, tensor in inputs.items()}


def _cases() -> Iterator[Case]:
    for device, shapes in (("cpu", CPU_SHAPES), ("cuda", GPU_SHAPES)):
        for values, drop, dtype, direction in itertools.product(
            shapes, DROPS, DTYPES, ("forward", "backward")
        ):
            shape = dict(zip("BHNMD", values, strict=True))
            yield Case(
                op="jad",
                name="-".join((drop, *(f"{name.lower()}{size}" for name, size in shape.items()))),
                shape=shape,
                dtype=dtype,
                cost=_cost(shape, dtype, direction),
                make_inputs=_make_inputs,
                direction=direction,
                devices=(device,),
                tags=(drop, "self" if shape["N"] == shape["M"] else "cross"),
            )


def _drop(case: Case) -> str:
    return case.name.split("-")[0]


# Truth


def _slices(case: Case) -> Iterator[slice]:
    """Parts of the batch of heads, flattened."""
    step = max(1, GATE_ELEMENTS // (case.shape["N"] * case.shape["M"]))
    heads = case.shape["B"] * case.shape["H"]
    for start in range(0, heads, step):
        yield slice(start, min(start + step, heads))


def expect(case: Case, inputs: Inputs) -> Tensor:
    """(B * H, M): the float64 column means, from which every decision follows."""
    q, k = (inputs[name].flatten(0, 1) for name in "qk")
    found = []
    for part in _slices(case):
        scores = q[part].double() @ k[part].double().mT * case.shape["D"] ** -0.5
        found.append(scores.softmax(-1).mean(1))
    return torch.cat(found)


def _replayed(
    case: Case, inputs: Inputs, part: slice, bias: Tensor | None, arithmetic: torch.dtype
) -> Iterator[tuple[Tensor, float]]:
    """float64 attention of some heads under a bias, and its gradients, each with what rounding may do to it.

    A weight is off by twice what its score is: D products added up, whose error grows as a random walk (4
    deviations), and a handful of roundings at the size of the score (4 units). A result is off by as much
    of the sum of what it adds up, all taken positive; then it is rounded to the case's dtype, and so is the
    `out` that the backward subtracts.
    """
    q, k, v = (inputs[name].flatten(0, 1)[part].double() for name in "qkv")
    scale = case.shape["D"] ** -0.5
    scores = q @ k.mT * scale
    share = 4 * case.shape["D"] ** 0.5 + 4 * scores.abs().max().item()
    share = 2 * share * unit_roundoff(arithmetic) + 2 * unit_roundoff(case.dtype)
    p = (scores if bias is None else scores + bias).softmax(-1)
    out = p @ v
    yield out, share * (p @ v.abs()).max().item()
    if case.direction == "forward":
        return
    grad = inputs["grad"].flatten(0, 1)[part].double()
    ds = p * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) * scale
    positive = grad.abs() @ v.abs().mT
    positive = p * (positive + (p * positive).sum(-1, keepdim=True)) * scale
    yield ds @ k, share * (positive @ k.abs()).max().item()
    yield ds.mT @ q, share * (positive.mT @ q.abs()).max().item()
    yield p.mT @ grad, share * (p.mT @ grad.abs()).max().item()


def mask_problem(case: Case, mask: Tensor, c: Tensor, arithmetic: torch.dtype) -> str | None:
    """Whether a (B * H, M) mask of mode "key" strays from that of c by more than rounding decides."""
    keys = case.shape["M"]
    deviation = c.std(-1, correction=0, keepdim=True)
    threshold = 1 / keys + BETA * deviation
    if (mask.sum(-1) > int(MAX_DROP * keys)).any() or mask[:, :PROTECT].any():
        return "the mask drops a protected key, or more than max_drop allows"
    above = c > threshold
    above[:, :PROTECT] = False
    above &= keys * deviation >= 0.05
    capped = above.sum(-1, keepdim=True) > int(MAX_DROP * keys)
    # Scores of a few units, rounded in `arithmetic`, are off by as many times its roundoff.
    near = (c - threshold).abs() <= 64 * unit_roundoff(arithmetic) * c.amax(-1, keepdim=True)
    wrong = int(((mask != above) & ~near & ~capped).sum())
    return f"{wrong} of {mask.numel()} keys dropped or kept against the threshold" if wrong else None


def judge(
    case: Case, inputs: Inputs, expected: Tensor, output: Attended, arithmetic: torch.dtype
) -> str | None:
    """The mask is right but for rounding, and the results are right on that mask."""
    names = ("outputs", "gradients of q", "gradients of k", "gradients of v")
    wanted = 4 if case.direction == "backward" else 1
    if len(output.results) != wanted:
        return f"expected {wanted} results, got {len(output.results)}"
    if output.results[0].dtype != case.dtype:
        return f"expected {short(case.dtype)}, got {short(output.results[0].dtype)}"
    mask, drop = output.replay(), _drop(case)
    if (mask is None) != (drop in ("none", "soft")):
        return "expected a mask exactly where something drops"
    if mask is not None:
        mask = mask.flatten(0, 1)
        if drop == "key":
            problem = mask_problem(case, mask, expected, arithmetic)
            if problem:
                return problem
    results = [result.flatten(0, 1) for result in output.results]
    for part in _slices(case):
        bias = None
        if drop == "soft":
            c = expected[part]
            bias = (1 - SOFT * c / c.amax(-1, keepdim=True)).log().unsqueeze(1)
        elif mask is not None:
            chosen = mask[part] if mask.dim() == 3 else mask[part].unsqueeze(1)
            bias = torch.zeros(chosen.shape, dtype=torch.float64, device=chosen.device)
            bias = bias.masked_fill(chosen, -torch.inf)
        replayed = _replayed(case, inputs, part, bias, arithmetic)
        for name, result, (truth, bound) in zip(names, results, replayed, strict=False):
            problem = value_problem(name, result[part].double(), truth, bound)
            if problem:
                return problem
    return None


# Providers


def _stepped(case: Case, attend: Callable[..., Any], inputs: Inputs) -> tuple[tuple[Tensor, ...], Any]:
    """`attend`'s results, with gradients in a backward case, and whatever else it returned."""
    leaves = [inputs[name] for name in "qkv"]
    if case.direction == "forward":
        out, rest = attend(*leaves)
        return (out,), rest
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out, rest = attend(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, inputs["grad"])), rest


def _run_ours(case: Case, backend: str) -> Callable[[Inputs], Attended]:
    drop = _drop(case)
    options: dict[str, Any] = {"drop": drop, "backend": backend}

    def replay(inputs: Inputs) -> Tensor | None:
        if drop in ("none", "soft"):
            return None
        # Bitwise repeatable: asked again, the backend drops what it dropped in the timed call.
        leaves = (inputs[name] for name in "qkv")
        return fer_kernels.jad_attention(*leaves, return_stats=True, **options)[1].mask

    def call(inputs: Inputs) -> Attended:
        results, _ = _stepped(
            case, lambda q, k, v: (fer_kernels.jad_attention(q, k, v, **options), None), inputs
        )
        return Attended(results, lambda: replay(inputs))

    return call


def eager_jad(q: Tensor, k: Tensor, v: Tensor, drop: str) -> tuple[Tensor, Tensor | None]:
    """The plain PyTorch way, all in the inputs' dtype: every score, masked and normalised again."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    weights = scores.softmax(-1)
    if drop == "none":
        return weights @ v, None
    with torch.no_grad():
        c = weights.mean(2)
        keys = c.shape[-1]
        if drop == "soft":
            bias = (1 - SOFT * c / c.amax(-1, keepdim=True)).log().unsqueeze(2)
        else:
            deviation = c.std(-1, correction=0, keepdim=True)
            free = (torch.arange(keys, device=c.device) >= PROTECT) & (keys * deviation >= 0.05)
        if drop == "key":
            above = (c > 1 / keys + BETA * deviation) & free
            largest = c.masked_fill(~above, -1.0).topk(int(MAX_DROP * keys)).indices
            dropped = torch.zeros_like(above).scatter(-1, largest, True) & above
            hidden = dropped.unsqueeze(2)
        if drop == "entry":
            level = c.unsqueeze(2)
            dropped = ((weights - level).abs() <= TAU * level) & ((c > 1 / keys) & free).unsqueeze(2)
            kept = weights.masked_fill(dropped, 0.0).sum(-1, keepdim=True)
            hidden = dropped = dropped & (kept >= 1e-6)
    if drop == "soft":
        return (scores + bias).softmax(-1) @ v, None
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v, dropped


def _with_mask(case: Case, attend: Callable[..., Any]) -> Callable[[Inputs], Attended]:
    drop = _drop(case)

    def call(inputs: Inputs) -> Attended:
        results, mask = _stepped(case, lambda q, k, v: attend(q, k, v, drop), inputs)
        return Attended(results, lambda: mask)

    return call


def _open_eager(case: Case, device: str) -> Callable[[Inputs], Attended]:
    return _with_mask(case, eager_jad)


def _open_compile(case: Case, device: str) -> Callable[[Inputs], Attended]:
    torch.compiler.reset()  # every case is a new shape, and dynamo recompiles one function only so often
    return _with_mask(case, torch.compile(eager_jad, fullgraph=True, dynamic=False))


def _open_sdpa(case: Case, device: str) -> Callable[[Inputs], Attended]:
    """torch's fused attention, which drops nothing."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        return F.scaled_dot_product_attention(q, k, v), None

    return lambda inputs: Attended(_stepped(case, attend, inputs)[0], lambda: None)


SDPA = Provider("sdpa", _open_sdpa, role="floor", gated=False)

register(
    Suite(
        op="jad",
        cases=tuple(_cases()),
        providers=(
            *ours("jad", _run_ours),
            Provider("eager", _open_eager),
            Provider("compile", _open_compile),
            SDPA,
        ),
        expect=expect,
        judge=judge,
    )
)
