"""knn: the dilated k-nearest-neighbour graph of vision graph networks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fer_kernels

from .gate import unit_roundoff, value_problem
from .providers import import_problem, ours
from .registry import Case, Cost, Inputs, Provider, Suite, register, short

# B, N, M, C, k, d: stages of the ViG family, isotropic (N = M = 196) and pyramid (N != M).
CPU_SHAPES = (
    (32, 196, 196, 192, 9, 2),
    (32, 196, 196, 320, 18, 1),
    (8, 3136, 196, 48, 9, 1),
    (8, 3136, 3136, 48, 9, 1),
    (32, 49, 49, 640, 9, 1),
)
GPU_SHAPES = (*((128, *shape[1:]) for shape in CPU_SHAPES), (128, 196, 196, 320, 18, 4))
GROWTH = tuple((8, nodes, nodes, 48, 9, 1) for nodes in (196, 392, 784, 1568, 3136))
DTYPES = (torch.float32, torch.bfloat16)

# The gate holds a float64 distance matrix of as many samples as fit in this many elements.
GATE_ELEMENTS = 1 << 25
TORCH_CLUSTER_GPU_LIMIT = 100  # neighbours a query


def _cost(shape: dict[str, int], dtype: torch.dtype) -> Cost:
    batch, queries, keys, channels = (shape[name] for name in "BNMC")
    # Keys that are the queries are read, and normalised, once.
    rows = queries if keys == queries else queries + keys
    return Cost(
        bytes=batch * (rows * channels * dtype.itemsize + queries * shape["k"] * torch.int64.itemsize),
        # A multiplication and an addition a product term; a square, its sum and the scaling a row.
        flops=batch * channels * (2 * queries * keys + 3 * rows),
    )


def _make_inputs(case: Case, generator: torch.Generator) -> Inputs:
    """x, and y where there are fewer keys than queries; otherwise the nodes look among themselves."""
    batch, queries, keys, channels = (case.shape[name] for name in "BNMC")
    inputs = {"x": torch.randn(batch, queries, channels, generator=generator).to(case.dtype)}
    if keys != queries:
        inputs["y"] = torch.randn(batch, keys, channels, generator=generator).to(case.dtype)
    return inputs


def _cases() -> Iterator[Case]:
    found: dict[tuple, tuple[set[str], set[str]]] = {}  # (shape, dtype) -> devices, tags
    for shapes, dtypes, devices, tag in (
        (CPU_SHAPES, DTYPES, {"cpu"}, "shapes"),
        (GPU_SHAPES, DTYPES, {"cuda"}, "shapes"),
        (GROWTH, DTYPES[:1], {"cpu", "cuda"}, "growth"),
    ):
        for key in itertools.product(shapes, dtypes):
            known_devices, tags = found.setdefault(key, (set(), set()))
            known_devices |= devices
            tags.add(tag)
    for (values, dtype), (devices, tags) in found.items():
        shape = dict(zip("BNMCkd", values, strict=True))
        yield Case(
            op="knn",
            name="-".join(f"{name.lower()}{size}" for name, size in shape.items()),
            shape=shape,
            dtype=dtype,
            cost=_cost(shape, dtype),
            make_inputs=_make_inputs,
            devices=tuple(sorted(devices)),
            tags=tuple(sorted(tags)),
        )


def _distances(inputs: Inputs) -> Iterator[tuple[slice, Tensor]]:
    """float64 distances, a few samples at a time."""
    x, y = inputs["x"], inputs.get("y", inputs["x"])
    step = max(1, GATE_ELEMENTS // (x.shape[1] * y.shape[1]))
    for start in range(0, x.shape[0], step):
        part = slice(start, start + step)
        queries, keys = (F.normalize(rows[part].double(), dim=-1) for rows in (x, y))
        squares = (queries * queries).sum(-1, keepdim=True), (keys * keys).sum(-1).unsqueeze(1)
        yield part, squares[0] + squares[1] - 2 * (queries @ keys.mT)


def expect(case: Case, inputs: Inputs) -> Tensor:
    """(B, N, k): the float64 distance that belongs in every slot. Which of several keys at one
    distance stands there is left open, so a tie cannot fail anybody."""
    k, d = case.shape["k"], case.shape["d"]
    return torch.cat(
        [
            torch.topk(distances, k * d, largest=False, sorted=True).values[..., ::d]
            for _, distances in _distances(inputs)
        ]
    )


def rounding_bound(channels: int, arithmetic: torch.dtype) -> float:
    """How far apart two float64 distances of unit rows may be for `arithmetic` to confuse them.

    Each of the two is the sum of terms no larger than 2, rounded a handful of times (8 units), from a
    product summed over the channels in float32, whose error grows as a random walk (4 deviations).
    """
    walk = 4 * math.sqrt(channels) * unit_roundoff(torch.float32)
    return 2 * (8 * unit_roundoff(arithmetic) + walk)


def judge(
    case: Case,
    inputs: Inputs,
    expected: Tensor,
    idx: Tensor,
    arithmetic: torch.dtype,
    given: float = 0.0,
) -> str | None:
    """A slot is wrong where its key's float64 distance is not the slot's, beyond rounding. `given` is how
    far the rounding of the nodes themselves may have moved a distance."""
    want = tuple(case.shape[name] for name in "BNk")
    if tuple(idx.shape) != want or idx.is_floating_point():
        return f"expected integer indices {want}, got {short(idx.dtype)} {tuple(idx.shape)}"
    idx = idx.to(expected.device, torch.int64)
    if idx.min() < 0 or idx.max() >= case.shape["M"]:
        return f"indices from {idx.min().item()} to {idx.max().item()} leave [0, {case.shape['M']})"
    ordered = idx.sort(-1).values
    repeated = int((ordered[..., 1:] == ordered[..., :-1]).any(-1).sum())
    if repeated:
        return f"{repeated} queries have a neighbour twice"
    chosen = torch.cat([distances.gather(-1, idx[part]) for part, distances in _distances(inputs)])
    bound = given + rounding_bound(case.shape["C"], arithmetic)
    return value_problem("slots", chosen, expected, bound)


def _run_ours(case: Case, backend: str) -> Callable[[Inputs], Any]:
    k, d = case.shape["k"], case.shape["d"]
    return lambda inputs: fer_kernels.dilated_knn(
        inputs["x"], inputs.get("y"), k=k, dilation=d, backend=backend
    )


def vig_knn(x: Tensor, y: Tensor | None, k: int, d: int) -> Tensor:
    """The graph as ViG's own code builds it: the whole distance matrix, then topk of its negative."""
    queries = F.normalize(x, dim=-1)
    keys = queries if y is None else F.normalize(y, dim=-1)
    squares = (queries * queries).sum(-1, keepdim=True), (keys * keys).sum(-1).unsqueeze(1)
    distances = squares[0] - 2 * torch.matmul(queries, keys.mT) + squares[1]
    return torch.topk(-distances, k * d).indices[..., ::d]


def _open_eager(case: Case, device: str) -> Callable[[Inputs], Tensor]:
    k, d = case.shape["k"], case.shape["d"]
    return lambda inputs: vig_knn(inputs["x"], inputs.get("y"), k, d)


def _open_compile(case: Case, device: str) -> Callable[[Inputs], Tensor]:
    torch.compiler.reset()  # every case is a new shape, and dynamo recompiles one function only so often
    compiled = torch.compile(vig_knn, fullgraph=True, dynamic=False)
    k, d = case.shape["k"], case.shape["d"]
    return lambda inputs: compiled(inputs["x"], inputs.get("y"), k, d)


def _open_bmm(case: Case, device: str) -> Callable[[Inputs], Tensor]:
    return lambda inputs: torch.bmm(inputs["x"], inputs.get("y", inputs["x"]).mT)


def _unit_rows(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Normalised queries and keys in float32, for libraries that know neither directions nor bfloat16."""
    queries = F.normalize(inputs["x"].float(), dim=-1)
    return queries, F.normalize(inputs["y"].float(), dim=-1) if "y" in inputs else queries


def _every_dth(case: Case, idx: Tensor) -> Tensor:
    return idx[..., :: case.shape["d"]]


def _faiss_why_not(case: Case, device: str) -> str | None:
    if device != "cpu":
        return "faiss-cpu takes CPU tensors"
    return import_problem("faiss")


def _open_faiss(case: Case, device: str) -> Callable[[Inputs], Tensor]:
    import faiss
    import numpy as np

    faiss.omp_set_num_threads(torch.get_num_threads())
    neighbours = case.shape["k"] * case.shape["d"]

    def call(inputs: Inputs) -> Tensor:
        queries, keys = (rows.numpy() for rows in _unit_rows(inputs))
        found = [faiss.knn(q, y, neighbours)[1] for q, y in zip(queries, keys, strict=True)]
        return torch.from_numpy(np.stack(found))

    return call


def _torch_cluster_why_not(case: Case, device: str) -> str | None:
    if device == "cuda" and case.shape["k"] * case.shape["d"] > TORCH_CLUSTER_GPU_LIMIT:
        return f"k * d exceeds its limit of {TORCH_CLUSTER_GPU_LIMIT} on a GPU"
    return import_problem("torch_cluster")


def _open_torch_cluster(case: Case, device: str) -> Callable[[Inputs], Tensor]:
    import torch_cluster

    samples = torch.arange(case.shape["B"], device=device)
    of_query, of_key = (samples.repeat_interleave(case.shape[name]) for name in "NM")
    neighbours = case.shape["k"] * case.shape["d"]

    def call(inputs: Inputs) -> Tensor:
        queries, keys = (rows.flatten(0, 1) for rows in _unit_rows(inputs))
        return torch_cluster.knn(keys, queries, neighbours, of_key, of_query)[1]

    return call


def _from_flat_batch(case: Case, key: Tensor) -> Tensor:
    batch, queries, keys = (case.shape[name] for name in "BNM")
    first = torch.arange(batch, device=key.device).view(-1, 1, 1) * keys
    return _every_dth(case, key.view(batch, queries, -1) - first)


def _pykeops_why_not(case: Case, device: str) -> str | None:
    return import_problem("pykeops.torch")


def _open_pykeops(case: Case, device: str) -> Callable[[Inputs], Any]:
    import pykeops
    from pykeops.torch import LazyTensor

    pykeops.set_verbose(False)
    neighbours = case.shape["k"] * case.shape["d"]

    def call(inputs: Inputs) -> Tensor:
        queries, keys = _unit_rows(inputs)
        lazy_queries, lazy_keys = LazyTensor(queries.unsqueeze(2)), LazyTensor(keys.unsqueeze(1))
        return ((lazy_queries - lazy_keys) ** 2).sum(-1).argKmin(neighbours, dim=2)

    return call


register(
    Suite(
        op="knn",
        cases=tuple(_cases()),
        providers=(
            *ours("knn", _run_ours),
            Provider("eager", _open_eager),
            Provider("compile", _open_compile),
            Provider("bmm", _open_bmm, role="floor", gated=False),
            Provider("faiss", _open_faiss, _faiss_why_not, _every_dth, arithmetic=torch.float32),
            Provider(
                "torch_cluster",
                _open_torch_cluster,
                _torch_cluster_why_not,
                _from_flat_batch,
                arithmetic=torch.float32,
                capturable=False,
            ),
            Provider(
                "pykeops",
                _open_pykeops,
                _pykeops_why_not,
                _every_dth,
                arithmetic=torch.float32,
                capturable=False,
            ),
        ),
        expect=expect,
        judge=judge,
    )
)
