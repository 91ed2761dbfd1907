"""The Grapher block of ViG with Face2Nodes's aggregation, forward and backward: what the operators are
worth where they are used. A part of relation's suite; it is no operator.

    h = BN(fc1 x);  graph = knn(h, keys);  m = aggregate(h, graph);  x + BN(fc2 GELU(BN(groups [h, m])))

Channels of h and m alternate (h0, m0, h1, m1, ...) and go through a projection of four groups, as in ViG.
Every provider runs the same block and differs in the graph, the aggregation, and on the CPU in the products,
where the operator is the faster, and the batch norms, which take GELU and the residual along.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fer_kernels
from fer_kernels.linear.op import chain_dtype
from fer_kernels.nn.conv import grouped_linear

from . import knn
from .gate import unit_roundoff
from .registry import Case, Cost, Inputs

GROUPS = 4  # of ViG's projection after the aggregation
PARAMETERS = ("fc1", "bn1", "p", "q", "a", "groups", "bn2", "fc2", "bn3")

DEVIATIONS = 4  # as many of rounding as the gate allows
DISTURBANCE = 1e-9  # far above float64's rounding, and far below what exchanges two slots
DISTURBED_RUNS = 2


def case(shape: dict[str, int], dtype: torch.dtype, device: str) -> Case:
    return Case(
        op="relation",
        name="grapher-" + "-".join(f"{name.lower()}{size}" for name, size in shape.items()),
        shape=shape,
        dtype=dtype,
        cost=_cost(shape, dtype),
        make_inputs=make_inputs,
        direction="backward",
        devices=(device,),
        tags=("block",),
    )


def _cost(shape: dict[str, int], dtype: torch.dtype) -> Cost:
    """x, its gradient, the upstream gradient and the output once; parameters and theirs once. Matrix
    products three times (forward, and backward to either factor), the graph's distances once."""
    batch, queries, keys, channels, width = (shape[name] for name in "BNMCR")
    weights = channels * channels * (1 + 1 + 2) + 2 * channels * width + 8 * channels + width
    nodes = batch * queries * channels
    products = queries * channels * (channels * (1 + 1 + 2) + width) + keys * channels * width
    return Cost(
        bytes=dtype.itemsize * (4 * nodes + 2 * weights),
        flops=batch * 2 * (3 * products + queries * keys * channels),
    )


def make_inputs(case: Case, generator: torch.Generator) -> Inputs:
    batch, queries, channels, heads, width = (case.shape[name] for name in "BNCHR")

    def weight(*size: int, fan_in: int) -> Tensor:
        return torch.randn(size, generator=generator) / math.sqrt(fan_in)

    def norm(features: int) -> Tensor:  # scale and shift
        spread = 0.1 * torch.randn((2, features), generator=generator)
        spread[0] += 1
        return spread

    inputs = {
        "x": weight(batch, queries, channels, fan_in=1),
        "grad": weight(batch, queries, channels, fan_in=1),
        # No product before a batch norm has a bias: the norm would take it away again.
        "fc1": weight(channels, channels, fan_in=channels),
        "bn1": norm(channels),
        "p": weight(width, channels, fan_in=channels),
        "q": weight(width, channels, fan_in=channels),
        "a": weight(heads, width // heads, fan_in=width // heads),
        "groups": weight(2 * channels, 2 * channels // GROUPS, fan_in=2 * channels // GROUPS),
        "bn2": norm(2 * channels),
        "fc2": weight(channels, 2 * channels, fan_in=2 * channels),
        "bn3": norm(channels),
    }
    return {name: tensor.to(case.dtype) for name, tensor in inputs.items()}


def _batch_norm(nodes: Tensor, scale_and_shift: Tensor) -> Tensor:
    scale, shift = scale_and_shift
    return F.batch_norm(nodes.flatten(0, 1), None, None, scale, shift, training=True).view_as(nodes)


def _norm_of_torch(
    nodes: Tensor,
    scale_and_shift: Tensor,
    rounded: Callable[[Tensor], Tensor],
    gelu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    y = _batch_norm(nodes, scale_and_shift)
    if gelu:
        y = F.gelu(rounded(y))
    return y if residual is None else residual + rounded(y)


def keys_of(h: Tensor, keys: int) -> Tensor | None:
    """The nodes averaged over squares of the grid, as the pyramid models do; None where all are keys."""
    queries = h.shape[1]
    if keys == queries:
        return None
    rows, few = math.isqrt(queries), math.isqrt(keys)
    squares = h.view(h.shape[0], few, rows // few, few, rows // few, h.shape[2])
    return squares.mean((2, 4)).flatten(1, 2)


Graph = Callable[[Tensor, Tensor | None], Tensor]
Aggregate = Callable[..., Tensor]
Norm = Callable[..., Tensor]


def _exact(tensor: Tensor) -> Tensor:
    return tensor


def block(
    x: Tensor,
    fc1: Tensor,
    bn1: Tensor,
    p: Tensor,
    q: Tensor,
    a: Tensor,
    groups: Tensor,
    bn2: Tensor,
    fc2: Tensor,
    bn3: Tensor,
    keys: int,
    graph: Graph,
    aggregate: Aggregate,
    norm: Norm | None = None,
    backend: str = "reference",
    rounded: Callable[[Tensor], Tensor] = _exact,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and for the gate the graph and what was aggregated. `norm` is called as
    norm(nodes, scale_and_shift, gelu=..., residual=...); None takes torch's functions. `backend` is that of
    products. `rounded` stands where a layer rounds its result, for the gate to see what
    that does to the gradients."""

    def product(x: Tensor, weight: Tensor, m: Tensor | None = None) -> Tensor:
        with fer_kernels.use_backend(backend):
            return rounded(grouped_linear(x, m, weight, None, 1 if m is None else GROUPS))

    norm = functools.partial(_norm_of_torch, rounded=rounded) if norm is None else norm
    h = rounded(norm(product(x, fc1), bn1))
    y = keys_of(h, keys)
    if y is not None:
        y = rounded(y)
    with torch.no_grad():
        idx = graph(h, y)
    of_centres, of_keys = product(h, p), product(h if y is None else y, q)
    m = rounded(aggregate(h, idx, y, of_centres, of_keys, a))
    hidden = rounded(norm(product(h, groups, m), bn2, gelu=True))
    return rounded(norm(product(hidden, fc2), bn3, residual=x)), idx, m


def chained_block(
    x: Tensor,
    fc1: Tensor,
    bn1: Tensor,
    p: Tensor,
    q: Tensor,
    a: Tensor,
    groups: Tensor,
    bn2: Tensor,
    fc2: Tensor,
    bn3: Tensor,
    keys: int,
    graph: Graph,
    aggregate: Aggregate,
) -> tuple[Tensor, Tensor, Tensor]:
    """`block` as the layers run it where products do norms on the way: the norm before fc2 and its GELU
    within fc2's product, and the others by statistics that a product made."""
    rows = x.flatten(0, 1)
    one, *statistics = fer_kernels.normed_linear(rows, fc1)
    h = fer_kernels.batch_norm_act(one, *bn1, statistics=tuple(statistics)).view_as(x)
    y = keys_of(h, keys)
    with torch.no_grad():
        idx = graph(h, y)
    of_centres = grouped_linear(h, None, p, None, 1)
    of_keys = grouped_linear(h if y is None else y, None, q, None, 1)
    m = aggregate(h, idx, y, of_centres, of_keys, a)
    two, *statistics = fer_kernels.normed_linear(h.flatten(0, 1), groups, m=m.flatten(0, 1), groups=GROUPS)
    norm = fer_kernels.RowNorm(*statistics, *bn2, act="gelu")
    three, *statistics = fer_kernels.normed_linear(two, fc2, norm=norm)
    out = fer_kernels.batch_norm_act(three, *bn3, residual=rows, statistics=tuple(statistics))
    return out.view_as(x), idx, m


def _step(case: Case, run: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Callable[[Inputs], Any]:
    names = ("x", *PARAMETERS)

    def call(inputs: Inputs) -> dict[str, Tensor]:
        leaves = [inputs[name].requires_grad_() for name in names]
        out, idx, _ = run(*leaves)
        gradients = torch.autograd.grad(out, leaves, inputs["grad"])
        return {"out": out, "idx": idx} | {
            f"d{name}": gradient for name, gradient in zip(names, gradients, strict=True)
        }

    return call


def run_ours(case: Case, backend: str) -> Callable[[Inputs], Any]:
    k, keys = case.shape["k"], case.shape["M"]

    def graph(h: Tensor, y: Tensor | None) -> Tensor:
        return fer_kernels.dilated_knn(h, y, k=k, backend=backend)

    def aggregate(h: Tensor, idx: Tensor, y: Tensor | None, p: Tensor, q: Tensor, a: Tensor) -> Tensor:
        return fer_kernels.relation_aggregate(h, idx, y, p=p, q=q, a=a, backend=backend)

    def norm(
        nodes: Tensor, scale_and_shift: Tensor, gelu: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        rows = nodes.flatten(0, 1)
        along = None if residual is None else residual.flatten(0, 1)
        act = "gelu" if gelu else None
        y = fer_kernels.batch_norm_act(rows, *scale_and_shift, act=act, residual=along, backend="cpu")
        return y.view_as(nodes)

    on_cpu = backend == "cpu"
    last = (norm, "auto") if on_cpu else (None, "reference")

    def run(x: Tensor, fc1: Tensor, *leaves: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if on_cpu and chain_dtype(x, fc1):
            return chained_block(x, fc1, *leaves, keys, graph, aggregate)
        return block(x, fc1, *leaves, keys, graph, aggregate, *last)

    return _step(case, run)


def _plain(case: Case, aggregate: Aggregate) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    k, keys = case.shape["k"], case.shape["M"]

    def run(*leaves: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return block(
            *leaves,
            keys,
            lambda h, y: knn.vig_knn(h, y, k, 1),
            lambda *arguments: aggregate(*arguments, "rmr"),
        )

    return run


def run_plain(case: Case, aggregate: Aggregate, compiled: bool = False) -> Callable[[Inputs], Any]:
    """ViG's own graph and `aggregate`, with edge tensors."""
    run = _plain(case, aggregate)
    return _step(case, torch.compile(run, fullgraph=True, dynamic=False) if compiled else run)


# The gate. Which keys are neighbours, and which of them wins a maximum, is a choice that rounding makes
# where two are nearly equal, and one other choice changes every output a little through the batch
# norms. So the graph is judged first, by knn's own gate; then everything is held against float64 on that
# graph, in the 2-norm. How far rounding leads from there is found by float64 itself, disturbed at every
# place where a layer or the aggregation rounds, forward and backward; a gradient may further miss the
# share that rounding sends to another, nearly equal slot.


def _float64(inputs: Inputs) -> Inputs:
    return {name: tensor.detach().double() for name, tensor in inputs.items()}


def _nodes(case: Case, inputs: Inputs) -> Inputs:
    h = _batch_norm(F.linear(inputs["x"], inputs["fc1"]), inputs["bn1"])
    y = keys_of(h, case.shape["M"])
    return {"x": h} if y is None else {"x": h, "y": y}


def expect(case: Case, inputs: Inputs) -> dict[str, Any]:
    nodes = _nodes(case, _float64(inputs))
    shape = {**case.shape, "d": 1}
    as_knn = Case("knn", case.name, shape, case.dtype, case.cost, make_inputs)
    return {
        "case": as_knn,
        "nodes": nodes,
        "distances": knn.expect(as_knn, nodes),
        "graphs": [],  # (idx, arithmetic, the float64 block on it): most providers find the same graph
    }


def _node_error(case: Case, arithmetic: torch.dtype) -> float:
    """The relative deviation of h: its product's sum, and four roundings (product, norm, keys, p or q)."""
    one, of_sum = (unit_roundoff(dtype) / math.sqrt(3) for dtype in (arithmetic, torch.float32))
    return 2 * one + of_sum * math.sqrt(case.shape["C"])


class _Disturbed(torch.autograd.Function):
    """A relative error of deviation DISTURBANCE in every element, and in the gradient's on its way back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, generator: torch.Generator) -> Tensor:
        ctx.generator = generator
        return _disturb(tensor, generator)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _disturb(gradient, ctx.generator), None


def _disturb(tensor: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype, device=tensor.device)
    return tensor * (1 + DISTURBANCE * noise)


def _differentiated(
    case: Case,
    inputs: Inputs,
    idx: Tensor,
    aggregate: Aggregate,
    rounded: Callable[[Tensor], Tensor] = _exact,
) -> tuple[dict[str, Tensor], Tensor]:
    """The block in float64 on this graph: output and gradients; and the gradient of what was aggregated."""
    double = _float64(inputs)
    leaves = [double[name].requires_grad_() for name in ("x", *PARAMETERS)]
    with torch.enable_grad():
        out, _, m = block(*leaves, case.shape["M"], lambda h, y: idx, aggregate, rounded=rounded)
        of_m, *gradients = torch.autograd.grad(out, [m, *leaves], double["grad"])
    values = {"out": out.detach()}
    values |= {f"d{name}": g for name, g in zip(("x", *PARAMETERS), gradients, strict=True)}
    return values, of_m


def _distance(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def _on_graph(case: Case, inputs: Inputs, idx: Tensor, arithmetic: torch.dtype) -> dict[str, Any]:
    """For every output its float64 value and how far rounding may lead from it, as a share of its norm."""

    def reference(h, graph, y, p, q, a):  # keeps fewer edge tensors for its backward than autograd does
        return fer_kernels.relation_aggregate(h, graph, y, p=p, q=q, a=a, backend="reference")

    values, of_m = _differentiated(case, inputs, idx, reference)
    generator = torch.Generator(idx.device).manual_seed(0)

    def rounded(tensor: Tensor) -> Tensor:
        return _Disturbed.apply(tensor, generator)

    def disturbed(h, graph, y, p, q, a):
        from . import relation  # which imports this file

        return relation.plain(h, graph, y, p, q, a, "rmr", rounded)

    growth = dict.fromkeys(values, 0.0)  # of a relative error from every place to the output
    for _ in range(DISTURBED_RUNS):
        others, _ = _differentiated(case, inputs, idx, disturbed, rounded)
        for name, value in values.items():
            growth[name] = max(growth[name], _distance(others[name], value) / DISTURBANCE)
    one, of_sum = (unit_roundoff(dtype) / math.sqrt(3) for dtype in (arithmetic, torch.float32))
    # A place stands for up to three roundings, as of a batch norm, and for the sum within a product.
    at_a_place = math.sqrt(3) * one + of_sum * math.sqrt(2 * case.shape["C"])
    # A gradient in the other slot is missing in one place and too much in another: twice its energy.
    # The odds are of two independent errors, so the share may be twice as large where they are not.
    astray = math.sqrt(2 * 2 * _exchanged(case, inputs, idx, of_m, arithmetic))
    bounds = {
        name: DEVIATIONS * at_a_place * growth[name] + (0 if name == "out" else astray) for name in values
    }
    return {"values": values, "bounds": bounds}


def _exchanged(case: Case, inputs: Inputs, idx: Tensor, of_m: Tensor, arithmetic: torch.dtype) -> float:
    """The share of the maxima's gradient, as energy, that is to be expected in another slot: a normal
    error exchanges the best two with the odds of their gap."""
    from . import relation  # which imports this file

    double = _float64(inputs)
    nodes = _nodes(case, double)
    keys = nodes.get("y", nodes["x"])
    projections = {"p": F.linear(nodes["x"], double["p"]), "q": F.linear(keys, double["q"])}
    alone = nodes | projections | {"idx": idx, "a": double["a"]}
    as_rmr = Case("relation", "rmr", case.shape, case.dtype, case.cost, make_inputs)
    carried = 0.0
    for part in relation._parts(as_rmr):
        edges = relation._edges(as_rmr, alone, part, arithmetic, _node_error(case, arithmetic))
        best = edges.value.topk(2, dim=2)
        deviation = edges.error.gather(2, best.indices).square().sum(2).sqrt()
        gap = best.values[:, :, 0] - best.values[:, :, 1]
        odds = 0.5 * torch.erfc(gap / deviation / math.sqrt(2))
        carried += (of_m[part].square() * odds).sum().item()
    return carried / of_m.square().sum().item()


@torch.no_grad()
def judge(
    case: Case, inputs: Inputs, expected: dict[str, Any], outputs: dict[str, Tensor], arithmetic: torch.dtype
) -> str | None:
    idx = outputs["idx"]
    # A provider of float32 arithmetic still rounds the block's layers to the case's dtype.
    coarse = case.dtype if unit_roundoff(case.dtype) > unit_roundoff(arithmetic) else arithmetic
    problem = knn.judge(
        expected["case"], expected["nodes"], expected["distances"], idx, coarse, _graph_error(case, coarse)
    )
    if problem:
        return f"graph: {problem}"
    graphs = expected["graphs"]
    truth = next((truth for known, at, truth in graphs if at == coarse and torch.equal(known, idx)), None)
    if truth is None:
        truth = _on_graph(case, inputs, idx, coarse)
        graphs.append((idx.clone(), coarse, truth))
    for name, value in truth["values"].items():
        if outputs[name].shape != value.shape:
            return f"{name} has shape {tuple(outputs[name].shape)}, expected {tuple(value.shape)}"
        error, bound = _distance(outputs[name], value), truth["bounds"][name]
        if not error <= bound:  # a NaN is no smaller than anything
            return f"{name} is off by {error:.2e} of its norm, more than {bound:.2e}"
    return None


def _graph_error(case: Case, arithmetic: torch.dtype) -> float:
    """What h's own rounding adds to a distance: both unit rows may move, and distances reach 4."""
    return 2 * 2 * 2 * 4 * _node_error(case, arithmetic)
