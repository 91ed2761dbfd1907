"""linear: products of a network's nodes with a weight, in a training step; and normed_linear: two products, a
batch norm and GELU between them, a batch norm and the residual behind, as in a ViG block's perceptron.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fer_kernels
from fer_kernels.linear.op import NORMED, OPERATOR

from .gate import off_as_a_whole, unit_roundoff, value_problem
from .providers import ours, step
from .registry import Case, Cost, Inputs, Provider, Suite, register

# Rows, columns in and out, groups: layers of ViG-Ti's blocks at 224 pixels and B = 16, and of a last pyramid
# stage. In groups, x and m are the columns.
LAYERS = (
    (3136, 192, 192, 1),
    (3136, 192, 768, 1),
    (3136, 768, 192, 1),
    (3136, 384, 384, 4),
    (1568, 640, 640, 1),
    (1568, 1280, 1280, 4),
)
# Rows, columns and hidden columns of a perceptron, in the same two networks.
PERCEPTRONS = ((3136, 192, 768), (1568, 640, 2560))
EPS = 1e-5


def _cases() -> Iterator[Case]:
    for rows, width, out, groups in LAYERS:
        shape = {"N": rows, "C": width, "O": out, "G": groups}
        for direction in ("forward", "backward"):
            yield Case(
                op="linear",
                name=f"n{rows}-c{width}-o{out}" + (f"-g{groups}" if groups > 1 else ""),
                shape=shape,
                dtype=torch.float32,
                cost=_cost(shape, direction),
                make_inputs=_make_inputs,
                devices=("cpu",),
                direction=direction,
                tags=("grouped" if groups > 1 else "plain",),
            )
    for rows, width, hidden in PERCEPTRONS:
        for dtype in (torch.float32, torch.bfloat16):
            yield Case(
                op="linear",
                name=f"perceptron-n{rows}-c{width}-h{hidden}",
                shape={"N": rows, "C": width, "H": hidden},
                dtype=dtype,
                cost=_perceptron_cost(rows, width, hidden, dtype),
                make_inputs=_perceptron_inputs,
                devices=("cpu",),
                direction="backward",
                tags=("perceptron",),
            )


def _cost(shape: dict[str, int], direction: str) -> Cost:
    """x, the weight and y once; in a step, x, the weight and y's gradient again, and two gradients."""
    rows, width, out, groups = (shape[name] for name in "NCOG")
    step = direction == "backward"
    times = 3 if step else 1
    elements = times * (rows * (width + out) + width * out // groups) - (rows * out if step else 0)
    return Cost(bytes=4 * elements, flops=times * 2 * rows * width * out // groups)


def _make_inputs(case: Case, generator: torch.Generator) -> Inputs:
    rows, width, out, groups = (case.shape[name] for name in "NCOG")

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = {"weight": draw(out, width // groups) / (width // groups) ** 0.5}
    if groups > 1:
        inputs |= {"x": draw(rows, width // 2), "m": draw(rows, width // 2)}
    else:
        inputs["x"] = draw(rows, width)
    return inputs | ({"grad": draw(rows, out)} if case.direction == "backward" else {})


def _perceptron_cost(rows: int, width: int, hidden: int, dtype: torch.dtype) -> Cost:
    """x, y and their gradients once; the weights and theirs, in float32, once."""
    nodes = dtype.itemsize * 4 * rows * width
    return Cost(bytes=nodes + 4 * 4 * width * hidden, flops=3 * 2 * 2 * rows * width * hidden)


def _perceptron_inputs(case: Case, generator: torch.Generator) -> Inputs:
    """Parameters in float32, as under autocast."""
    rows, width, hidden = (case.shape[name] for name in "NCH")

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "x": draw(rows, width).to(case.dtype),
        "weight": draw(hidden, width) / width**0.5,
        "scale": 1 + 0.1 * draw(hidden),
        "shift": 0.1 * draw(hidden),
        "second": draw(width, hidden) / hidden**0.5,
        "scale_of_second": 1 + 0.1 * draw(width),
        "shift_of_second": 0.1 * draw(width),
        "grad": draw(rows, width).to(case.dtype),
    }


def _perceptron_of_torch(**of: Tensor) -> Tensor:
    x = of["x"]

    def norm(y: Tensor, *affine: Tensor) -> Tensor:
        return F.batch_norm(y, None, None, *affine, training=True, eps=EPS)

    hidden = F.gelu(norm(F.linear(x, of["weight"].to(x.dtype)), of["scale"], of["shift"]))
    y = F.linear(hidden, of["second"].to(x.dtype))
    return x + norm(y, of["scale_of_second"], of["shift_of_second"])


def _run_perceptron(case: Case, backend: str) -> Callable[[Inputs], Any]:
    def function(**of: Tensor) -> Tensor:
        hidden, *statistics = fer_kernels.normed_linear(of["x"], of["weight"], backend=backend)
        norm = fer_kernels.RowNorm(*statistics, of["scale"], of["shift"], EPS, "gelu")
        y, mean, var = fer_kernels.normed_linear(hidden, of["second"], norm=norm, backend=backend)
        return fer_kernels.batch_norm_act(
            y,
            of["scale_of_second"],
            of["shift_of_second"],
            residual=of["x"],
            statistics=(mean, var),
            eps=EPS,
            backend=backend,
        )

    return step(case, function)


def _run_ours(case: Case, backend: str) -> Callable[[Inputs], Any]:
    if "perceptron" in case.tags:
        return _run_perceptron(case, backend)

    def function(x: Tensor, weight: Tensor, m: Tensor | None = None) -> Tensor:
        return fer_kernels.linear(x, weight, m=m, groups=case.shape["G"], backend=backend)

    return step(case, function)


def _of_torch(case: Case) -> Callable[..., Tensor]:
    """As ViG does it: x and m interleaved, and a 1 x 1 convolution in groups."""
    if "perceptron" in case.tags:
        return _perceptron_of_torch
    groups = case.shape["G"]

    def function(x: Tensor, weight: Tensor, m: Tensor | None = None) -> Tensor:
        if m is None:
            return F.linear(x, weight)
        nodes = torch.stack((x, m), -1).flatten(-2)
        return F.conv1d(nodes.unsqueeze(-1), weight.unsqueeze(-1), groups=groups).squeeze(-1)

    return function


def _open_eager(case: Case, device: str) -> Callable[[Inputs], Any]:
    return step(case, _of_torch(case))


def _open_compile(case: Case, device: str) -> Callable[[Inputs], Any]:
    torch.compiler.reset()
    return step(case, torch.compile(_of_torch(case), fullgraph=True, dynamic=False))


def _bmm_why_not(case: Case, device: str) -> str | None:
    return None if case.shape.get("G", 1) > 1 else "there are no groups"


def _open_bmm(case: Case, device: str) -> Callable[[Inputs], Any]:
    """What modules do where the kernel is not the faster: batched products over groups."""

    def function(x: Tensor, weight: Tensor, m: Tensor | None = None) -> Tensor:
        with fer_kernels.use_backend("reference"):
            return fer_kernels.nn.conv.grouped_linear(x, m, weight, None, case.shape["G"])

    return step(case, function)


def expect(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    return step(case, _of_torch(case))({name: tensor.double() for name, tensor in inputs.items()})


def judge(
    case: Case,
    inputs: Inputs,
    expected: dict[str, Tensor],
    outputs: dict[str, Tensor],
    arithmetic: torch.dtype,
) -> str | None:
    """Sixteen roundings of a number as large as a sum of as many random terms."""
    if "perceptron" in case.tags:
        return off_as_a_whole(case, expected, outputs, roundings=4)
    terms = {"y": case.shape["C"], "dweight": case.shape["N"]}
    for name, value in expected.items():
        scale = value.square().mean().sqrt()
        bound = (
            16 * unit_roundoff(case.dtype) * terms.get(name, case.shape["O"]) ** 0.5 * (value.abs() + scale)
        )
        problem = value_problem(name, outputs[name].double(), value, bound)
        if problem:
            return problem
    return None


register(
    Suite(
        op="linear",
        cases=tuple(_cases()),
        providers=(
            *ours("linear", _run_ours, lambda case: NORMED if "perceptron" in case.tags else OPERATOR),
            Provider("eager", _open_eager),
            Provider("compile", _open_compile),
            Provider("bmm", _open_bmm, _bmm_why_not),
        ),
        expect=expect,
        judge=judge,
    )
)
