"""relation: relation-aware neighbour aggregation, alone and in the Grapher block around it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fer_kernels

from . import grapher
from .gate import unit_roundoff, value_problem
from .providers import import_problem, ours
from .registry import Case, Cost, Inputs, Provider, Suite, register

# B, N, M, C, k, H, R: an isotropic ViG, the first and the last stage of a pyramid, and the widest
# graph, where edge tensors need the most memory. N = M: the nodes look among themselves.
CPU_SHAPES = (
    (16, 196, 196, 192, 9, 4, 48),
    (8, 3136, 196, 48, 9, 4, 12),
    (32, 49, 49, 640, 9, 4, 160),
    (16, 3136, 196, 96, 9, 4, 24),
)
GPU_SHAPES = tuple((128, *shape[1:]) for shape in CPU_SHAPES)
MODES = ("rmr", "mr", "rsum")
DIRECTIONS = ("forward", "backward")
DTYPES = (torch.float32, torch.bfloat16)
NEGATIVE_SLOPE = 0.2

# The gate holds float64 edge tensors of as many samples as fit in this many elements.
GATE_ELEMENTS = 1 << 23
# Rounding errors are held to this many deviations. One rounding is at most the unit roundoff and
# spread evenly, so its deviation is that over the root of 3.
DEVIATIONS = 4


def mode_of(case: Case) -> str:
    """A case's name begins with its mode, or with "grapher"."""
    return case.name.partition("-")[0]


# Cases


def _cost(shape: dict[str, int], mode: str, direction: str, dtype: torch.dtype) -> Cost:
    batch, queries, keys, channels, k, heads, width = (shape[name] for name in "BNMCkHR")
    size = dtype.itemsize
    related = mode != "mr"
    nodes = queries if keys == queries else queries + keys  # keys that are the queries are read once
    graph = queries * k * torch.int64.itemsize
    features = nodes * channels * size
    relation = (queries + keys) * width * size if related else 0
    moved = batch * (features + relation + graph + queries * channels * size)
    attention = width * size if related else 0
    # A maximum is comparisons, and subtracts the centre once: max(y_j) - x_i = max(y_j - x_i).
    flops = queries * channels
    if related:
        # z, LeakyReLU and the score's multiplication and addition; δ and its weight; softmax.
        flops = queries * k * (4 * width + (3 if mode == "rsum" else 2) * channels + 4 * heads)
    if direction == "backward":
        slots = 0 if mode == "rsum" else queries * channels  # one byte each, written and read
        # Gradients of the inputs are written; only the relation's gradient needs the features again.
        moved += batch * (queries * channels * size + graph + 2 * slots)
        moved += batch * (features + relation + (features + relation if related else 0))
        attention *= 3
        won = k if mode == "rsum" else 1  # edges that a channel's gradient flows along
        flops += queries * channels * won * (5 if related else 2)
        if related:
            # Scores again; dz, its two sums and the gradient of a; the softmax's own.
            flops += queries * k * ((4 + 6) * width + 8 * heads)
    return Cost(bytes=moved + attention, flops=batch * flops)


def make_inputs(case: Case, generator: torch.Generator) -> Inputs:
    """Random nodes, their true nearest-neighbour graph, and scores that differ among neighbours."""
    batch, queries, keys, channels, k, heads, width = (case.shape[name] for name in "BNMCkHR")

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    inputs = {"x": draw(batch, queries, channels)}
    if keys != queries:
        inputs["y"] = draw(batch, keys, channels)
    if mode_of(case) != "mr":
        inputs |= {"p": draw(batch, queries, width), "q": draw(batch, keys, width)}
        inputs["a"] = draw(heads, width // heads) / math.sqrt(width // heads)
    if case.direction == "backward":
        inputs["grad"] = draw(batch, queries, channels)
    inputs = {name: tensor.to(case.dtype) for name, tensor in inputs.items()}
    inputs["idx"] = fer_kernels.dilated_knn(inputs["x"], inputs.get("y"), k=k)
    # The same graph as an edge list: what a graph library starts from, so converting is not timed.
    inputs["edges"] = fer_kernels.to_edge_index(inputs["idx"], keys)
    return inputs


@torch.no_grad()
def settle(case: Case, inputs: Inputs) -> Inputs:
    """Gives no gradient to a maximum whose winner is open: where rounding may exchange two slots,
    a right implementation may send the gradient to either. What is left has one right answer."""
    if case.direction == "backward" and mode_of(case) != "rsum":
        for part in _parts(case):
            edges = _edges(case, inputs, part, case.dtype)  # no provider rounds more coarsely
            inputs["grad"][part].masked_fill_(_contenders(edges).sum(2) > 1, 0)
    return inputs


def _cases() -> Iterator[Case]:
    """Shape by shape, so that a run that is cut short has all of the first ones."""
    for device, shapes in (("cpu", CPU_SHAPES), ("cuda", GPU_SHAPES)):
        for values in shapes:
            shape = dict(zip("BNMCkHR", values, strict=True))
            for mode, direction, dtype in itertools.product(MODES, DIRECTIONS, DTYPES):
                # Minutes of compiling on a GPU for what differs from rmr in the last line only.
                if device == "cuda" and mode == "rsum" and values != shapes[0]:
                    continue
                yield Case(
                    op="relation",
                    name=f"{mode}-" + "-".join(f"{name.lower()}{size}" for name, size in shape.items()),
                    shape=shape,
                    dtype=dtype,
                    cost=_cost(shape, mode, direction, dtype),
                    make_inputs=make_inputs,
                    settle=settle,
                    direction=direction,
                    devices=(device,),
                    tags=("operator", *(("max-relative",) if mode == "mr" else ())),
                )
            yield from (grapher.case(shape, dtype, device) for dtype in DTYPES)


# The truth, and how far rounding may lead from it


def _parts(case: Case) -> Iterator[slice]:
    shape = case.shape
    edges = shape["N"] * shape["k"] * max(shape["C"], shape["R"])
    step = max(1, GATE_ELEMENTS // edges)
    for start in range(0, shape["B"], step):
        yield slice(start, start + step)


class Edges(NamedTuple):
    """float64 edge tensors of some samples. Errors are deviations, for one arithmetic."""

    idx: Tensor  # (B, N, k)
    delta: Tensor  # (B, N, k, C)
    value: Tensor  # what is reduced: δ, k α δ or α δ
    error: Tensor  # of value
    z: Tensor  # (B, N, k, R)
    z_positive: Tensor  # LeakyReLU(z)
    alpha: Tensor  # (B, N, k, H)
    alpha_error: Tensor  # relative


def neighbours(rows: Tensor, idx: Tensor) -> Tensor:
    """rows (B, M, C) at idx (B, N, k): (B, N, k, C), as ViG's batched_index_select gathers them."""
    batch, keys, channels = rows.shape
    first = torch.arange(batch, device=idx.device).view(-1, 1, 1) * keys
    return rows.reshape(-1, channels)[(idx + first).flatten()].view(*idx.shape, channels)


def _edges(case: Case, inputs: Inputs, part: slice, arithmetic: torch.dtype, given: float = 0.0) -> Edges:
    """`given` is the relative deviation that the nodes and their projections come with."""
    mode = mode_of(case)
    one, of_sum = (unit_roundoff(dtype) / math.sqrt(3) for dtype in (arithmetic, torch.float32))
    idx = inputs["idx"][part]
    x = inputs["x"][part].double().unsqueeze(2)
    y = neighbours(inputs.get("y", inputs["x"])[part].double(), idx)
    delta = y - x
    delta_error = one * delta.abs()
    if given:
        delta_error += given * torch.hypot(x, y)
    if mode == "mr":
        return Edges(idx, delta, delta, delta_error, *[delta.new_empty(0)] * 4)
    p, q = inputs["p"][part].double().unsqueeze(2), neighbours(inputs["q"][part].double(), idx)
    a = inputs["a"].double()
    k, (heads, width) = idx.shape[2], a.shape
    z = p + q
    z_positive = F.leaky_relu(z, NEGATIVE_SLOPE)
    terms = z_positive.unflatten(-1, a.shape) * a
    scores, size = terms.sum(-1), terms.square().sum(-1).sqrt()
    # A term is rounded three times (z, LeakyReLU, product), and the sum of them once; torch's own
    # reductions run in float32.
    error = one * (math.sqrt(3) * size + scores.abs())
    error += of_sum * math.sqrt(width) * (scores.abs() + size)
    if given:
        error += given * ((p.square() + q.square()).unflatten(-1, a.shape) * a.square()).sum(-1).sqrt()
    below = scores.amax(2, keepdim=True) - scores
    alpha = (-below).exp()
    alpha = alpha / alpha.sum(2, keepdim=True)
    # Of the exponent: its own and, in the denominator, the others'. Then exp, the sum and the quotient.
    alpha_error = error + error.amax(2, keepdim=True) + one * (below + math.sqrt(k) + 3)
    weight = (k * alpha if mode != "rsum" else alpha).repeat_interleave(delta.shape[-1] // heads, -1)
    spread = alpha_error.repeat_interleave(delta.shape[-1] // heads, -1)
    value = weight * delta
    error = weight * delta_error + value.abs() * (spread + math.sqrt(2) * one)
    return Edges(idx, delta, value, error, z, z_positive, alpha, alpha_error)


def _contenders(edges: Edges) -> Tensor:
    """Slots that may win the maximum after rounding."""
    reach = DEVIATIONS * edges.error
    return edges.value + reach >= (edges.value - reach).amax(2, keepdim=True)


class Truth(NamedTuple):
    value: Tensor
    error: Tensor  # a deviation


def _gather_sum(index: Tensor, size: int, terms: Tensor, errors: Tensor, one: float) -> Truth:
    """Terms (B, E, C) added up at index (B, E or broadcast) of `size` rows, in any order and in the
    arithmetic of the terms, as a scatter is. The gradient's signs are random, and so the partial sums
    are a random walk."""
    index = index.expand_as(terms)
    zeros = terms.new_zeros(terms.shape[0], size, terms.shape[2])
    total = zeros.scatter_add(1, index, terms)
    spread = zeros.scatter_add(1, index, errors.square()).sqrt()
    walked = zeros.scatter_add(1, index, terms.square()).sqrt()
    steps = zeros.scatter_add(1, index, torch.ones_like(terms)).sqrt()
    return Truth(total, spread + one * steps * (total.abs() + walked))


def _row_sum(terms: Tensor, errors: Tensor, dim: int, one: float) -> Truth:
    """Terms whose errors may agree, summed."""
    total = terms.sum(dim)
    walked = terms.square().sum(dim).sqrt()
    return Truth(total, errors.sum(dim) + one * math.sqrt(terms.shape[dim]) * (total.abs() + walked))


def _part_truth(case: Case, inputs: Inputs, part: slice, arithmetic: torch.dtype) -> dict[str, Truth]:
    mode = mode_of(case)
    one, of_sum = (unit_roundoff(dtype) / math.sqrt(3) for dtype in (arithmetic, torch.float32))
    edges = _edges(case, inputs, part, arithmetic)
    idx, k, keys = edges.idx, case.shape["k"], case.shape["M"]
    truth: dict[str, Truth] = {}
    if mode == "rsum":
        truth["m"] = _row_sum(edges.value, edges.error, 2, one)
    else:
        value, winner = edges.value.max(2)
        truth["m"] = Truth(value, edges.error.masked_fill(~_contenders(edges), 0).amax(2))
    if case.direction == "forward":
        return truth

    grad = inputs["grad"][part].double()
    channels, heads = case.shape["C"], case.shape["H"]
    width = channels // heads
    flat = idx.flatten(1).unsqueeze(-1)  # (B, N k, 1)
    if mode == "rsum":
        weight = edges.alpha.repeat_interleave(width, -1)
        spread = edges.alpha_error.repeat_interleave(width, -1) + 2 * one
        routed = grad.unsqueeze(2) * weight
        errors = routed.abs() * spread
        of_x = _row_sum(routed, errors, 2, one)
        of_y = _gather_sum(flat, keys, routed.flatten(1, 2), errors.flatten(1, 2), one)
    else:
        routed, errors = grad, torch.zeros_like(grad)
        if mode == "rmr":
            head = torch.arange(channels, device=idx.device) // width
            place = winner * heads + head  # of a channel's (slot, head) in a flattened (k, H)
            routed = grad * (k * edges.alpha).flatten(2).gather(2, place)
            errors = routed.abs() * (edges.alpha_error.flatten(2).gather(2, place) + 2 * one)
        of_x = Truth(routed, errors)
        of_y = _gather_sum(idx.gather(2, winner), keys, routed, errors, one)
    truth["dx"] = Truth(-of_x.value, of_x.error)
    if "y" in inputs:
        truth["dy"] = of_y
    else:
        once = one * (of_x.value.abs() + of_y.value.abs())
        truth["dx"] = Truth(of_y.value - of_x.value, of_x.error + of_y.error + once)
    if mode == "mr":
        return truth

    if mode == "rsum":
        terms = (grad.unsqueeze(2) * edges.delta).unflatten(-1, (heads, width))
        dalpha, walked = terms.sum(-1), terms.square().sum(-1).sqrt()
    else:
        won = k * grad * edges.delta.gather(2, winner.unsqueeze(2)).squeeze(2)
        zeros = won.new_zeros(*won.shape[:2], k * heads)
        dalpha = zeros.scatter_add(2, place, won).unflatten(-1, (k, heads))
        walked = zeros.scatter_add(2, place, won.square()).sqrt().unflatten(-1, (k, heads))
    dalpha_error = one * (math.sqrt(3) * walked + dalpha.abs())
    dalpha_error += of_sum * math.sqrt(width) * (dalpha.abs() + walked)
    alpha, alpha_error = edges.alpha, edges.alpha_error
    mean = _row_sum(alpha * dalpha, alpha * (dalpha_error + dalpha.abs() * (alpha_error + one)), 2, one)
    centred = dalpha - mean.value.unsqueeze(2)
    dscore = alpha * centred
    dscore_error = dscore.abs() * (alpha_error + 2 * one)
    dscore_error += alpha * (dalpha_error + mean.error.unsqueeze(2) + one * (centred.abs() + dalpha.abs()))
    a = inputs["a"].double()
    slope = torch.where(edges.z > 0, torch.ones_like(edges.z), NEGATIVE_SLOPE).unflatten(-1, a.shape) * a
    dz = (dscore.unsqueeze(-1) * slope).flatten(-2)
    errors = ((dscore_error + 2 * one * dscore.abs()).unsqueeze(-1) * slope.abs()).flatten(-2)
    truth["dp"] = _row_sum(dz, errors, 2, one)
    truth["dq"] = _gather_sum(flat, keys, dz.flatten(1, 2), errors.flatten(1, 2), one)
    positive = edges.z_positive.unflatten(-1, a.shape)
    terms = dscore.unsqueeze(-1) * positive  # (B, N, k, H, R / H)
    errors = ((dscore_error + 2 * one * dscore.abs()).unsqueeze(-1) * positive.abs()).sum(2)
    # Finished by `expect` once every part is in: sums, squares of the errors, and of the terms.
    truth["da"] = Truth(
        terms.sum((0, 1, 2)), torch.stack([errors.square().sum((0, 1)), terms.square().sum((0, 1, 2))])
    )
    return truth


@torch.no_grad()
def expect(case: Case, inputs: Inputs) -> Any:
    """For each arithmetic that a provider may use: the float64 result, and the deviation of rounding."""
    if mode_of(case) == "grapher":
        return grapher.expect(case, inputs)
    return {
        arithmetic: _whole(
            case, [_part_truth(case, inputs, part, arithmetic) for part in _parts(case)], arithmetic
        )
        for arithmetic in {case.dtype, torch.float32}
    }


def _whole(case: Case, parts: list[dict[str, Truth]], arithmetic: torch.dtype) -> dict[str, Truth]:
    whole = {
        name: Truth(*map(torch.cat, zip(*(part[name] for part in parts), strict=True)))
        for name in parts[0]
        if name != "da"
    }
    if "da" in parts[0]:
        value, squares = (sum(fields) for fields in zip(*(part["da"] for part in parts), strict=True))
        spread, walked = squares.sqrt()
        steps = math.sqrt(case.shape["B"] * case.shape["N"] * case.shape["k"])
        one, of_sum = (unit_roundoff(dtype) / math.sqrt(3) for dtype in (arithmetic, torch.float32))
        error = spread + one * value.abs() + of_sum * steps * (value.abs() + walked)
        whole["da"] = Truth(value, error)
    return whole


def judge(case: Case, inputs: Inputs, expected: Any, outputs: Any, arithmetic: torch.dtype) -> str | None:
    """Every value and every gradient lies within rounding of float64's."""
    if mode_of(case) == "grapher":
        return grapher.judge(case, inputs, expected, outputs, arithmetic)
    truth = expected[arithmetic]
    if set(outputs) != set(truth):
        return f"expected {', '.join(truth)}, got {', '.join(outputs)}"
    for name, (value, error) in truth.items():
        # Whatever the arithmetic was, the result is rounded to the case's dtype.
        bound = DEVIATIONS * error + unit_roundoff(case.dtype) * value.abs()
        problem = value_problem(name, outputs[name].detach().double(), value, bound)
        if problem:
            return problem
    return None


# Providers


def _step(case: Case, aggregate: Callable[[Inputs], Tensor]) -> Callable[[Inputs], dict[str, Tensor]]:
    """The call that is timed: the aggregation, and for backward the gradients of all its inputs."""
    if case.direction == "forward":
        return lambda inputs: {"m": aggregate(inputs)}

    def call(inputs: Inputs) -> dict[str, Tensor]:
        leaves = {name: inputs[name].requires_grad_() for name in ("x", "y", "p", "q", "a") if name in inputs}
        m = aggregate(inputs)
        gradients = torch.autograd.grad(m, list(leaves.values()), inputs["grad"])
        return {"m": m} | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}

    return call


def _arguments(inputs: Inputs) -> tuple[Tensor | None, ...]:
    return tuple(inputs.get(name) for name in ("x", "idx", "y", "p", "q", "a"))


def _run_ours(case: Case, backend: str) -> Callable[[Inputs], Any]:
    if mode_of(case) == "grapher":
        return grapher.run_ours(case, backend)
    mode = mode_of(case)

    def aggregate(inputs: Inputs) -> Tensor:
        x, idx, y, p, q, a = _arguments(inputs)
        return fer_kernels.relation_aggregate(
            x, idx, y, p=p, q=q, a=a, mode=mode, negative_slope=NEGATIVE_SLOPE, backend=backend
        )

    return _step(case, aggregate)


def plain(
    x: Tensor,
    idx: Tensor,
    y: Tensor | None,
    p: Tensor | None,
    q: Tensor | None,
    a: Tensor | None,
    mode: str,
    rounded: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Tensor:
    """The aggregation as ViG's own code writes it, with the relation of Face2Nodes: edge tensors.
    `rounded` stands where it rounds, for the Grapher's gate."""
    delta = rounded(neighbours(x if y is None else y, idx) - x.unsqueeze(2))
    if mode == "mr":
        return torch.max(delta, 2).values
    z = rounded(F.leaky_relu(p.unsqueeze(2) + neighbours(q, idx), NEGATIVE_SLOPE))
    alpha = rounded(torch.softmax(rounded((z.unflatten(-1, a.shape) * a).sum(-1)), 2))
    if mode == "rmr":
        alpha = idx.shape[2] * alpha
    weighted = rounded((delta.unflatten(-1, (a.shape[0], -1)) * alpha.unsqueeze(-1)).flatten(-2))
    return weighted.sum(2) if mode == "rsum" else torch.max(weighted, 2).values


def _open_eager(case: Case, device: str) -> Callable[[Inputs], Any]:
    if mode_of(case) == "grapher":
        return grapher.run_plain(case, plain)
    mode = mode_of(case)
    return _step(case, lambda inputs: plain(*_arguments(inputs), mode))


def _open_compile(case: Case, device: str) -> Callable[[Inputs], Any]:
    torch.compiler.reset()  # every case is a new shape, and dynamo recompiles one function only so often
    # The default mode: the tuning modes choose among kernels for matrix products, of which the
    # aggregation has none, and for a Grapher they take minutes a case.
    if mode_of(case) == "grapher":
        return grapher.run_plain(case, plain, compiled=True)
    compiled = torch.compile(plain, fullgraph=True, dynamic=False)
    mode = mode_of(case)
    return _step(case, lambda inputs: compiled(*_arguments(inputs), mode))


def _pyg_why_not(case: Case, device: str) -> str | None:
    if mode_of(case) == "grapher":
        return "it has no Grapher"
    return import_problem("torch_geometric")


def _open_pyg(case: Case, device: str) -> Callable[[Inputs], Any]:
    from torch_geometric.nn import MaxAggregation, SumAggregation
    from torch_geometric.utils import softmax

    mode = mode_of(case)
    batch, queries, channels, k, heads = (case.shape[name] for name in "BNCkH")
    reduce = SumAggregation() if mode == "rsum" else MaxAggregation()
    # The edge list is sorted by target: edges of target i begin at i k.
    starts = torch.arange(batch * queries + 1, device=device) * k
    # Each by its faster form. A scattered maximum's gradient is also wrong: halved where the maximum is 0.
    by_start = mode != "rsum" and case.direction == "backward"

    def aggregate(inputs: Inputs) -> Tensor:
        source, target = inputs["edges"]
        x, y = (inputs.get(name, inputs["x"]).flatten(0, 1) for name in ("x", "y"))
        message = y[source] - x[target]
        if mode != "mr":
            a = inputs["a"]
            p, q = inputs["p"].flatten(0, 1), inputs["q"].flatten(0, 1)
            z = F.leaky_relu(p[target] + q[source], NEGATIVE_SLOPE)
            alpha = softmax((z.unflatten(-1, a.shape) * a).sum(-1), ptr=starts)
            if mode == "rmr":
                alpha = k * alpha
            message = (message.unflatten(-1, (heads, -1)) * alpha.unsqueeze(-1)).flatten(-2)
        if by_start:
            m = reduce(message, ptr=starts, dim=0)
        else:
            m = reduce(message, target, dim_size=batch * queries, dim=0)
        return m.view(batch, queries, channels)

    return _step(case, aggregate)


register(
    Suite(
        op="relation",
        cases=tuple(_cases()),
        providers=(
            *ours("relation", _run_ours),
            Provider("eager", _open_eager),
            Provider("compile", _open_compile),
            Provider("pyg", _open_pyg, _pyg_why_not),
        ),
        expect=expect,
        judge=judge,
    )
)
