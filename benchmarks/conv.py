"""conv: two convolutions of a stem, each with its batch norm, GELU between them, in a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fer_kernels

from .gate import off_as_a_whole
from .providers import ours, step
from .registry import Case, Cost, Inputs, Provider, Suite, register

# Images, their side, channels in, between and out: of ViG-Ti's stem at 224 pixels, and of a smaller one.
PAIRS = ((16, 224, 3, 24, 48), (16, 56, 48, 96, 192), (64, 64, 3, 32, 64))
STRIDE, PADDING, EPS = 2, 1, 1e-5


def _cases() -> Iterator[Case]:
    for images, side, width, hidden, out in PAIRS:
        for dtype in (torch.float32, torch.bfloat16):
            shape = {"B": images, "side": side, "C": width, "H": hidden, "O": out}
            yield Case(
                op="conv",
                name=f"b{images}-{side}px-c{width}-h{hidden}-o{out}",
                shape=shape,
                dtype=dtype,
                cost=_cost(shape, dtype),
                make_inputs=_make_inputs,
                devices=("cpu",),
                direction="backward",
            )


def _cost(shape: dict[str, int], dtype: torch.dtype) -> Cost:
    """x, y and their gradients once; the weights and theirs, in float32, once. An image has no gradient."""
    images, side, width, hidden, out = shape.values()
    pixels = images * side**2
    first, second = pixels // 4 * 9 * width * hidden, pixels // 16 * 9 * hidden * out
    maps = dtype.itemsize * (2 * pixels * width + 2 * pixels // 16 * out)
    return Cost(
        bytes=maps + 4 * 2 * 9 * hidden * (width + out),
        flops=2 * ((2 if width == 3 else 3) * first + 3 * second),
    )


def _make_inputs(case: Case, generator: torch.Generator) -> Inputs:
    """x (B, C, side, side) in channels-last memory; parameters in float32, as under autocast."""
    images, side, width, hidden, out = case.shape.values()

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "x": draw(images, side, side, width).permute(0, 3, 1, 2).to(case.dtype),
        "weight": draw(hidden, width, 3, 3) / (9 * width) ** 0.5,
        "scale": 1 + 0.1 * draw(hidden),
        "shift": 0.1 * draw(hidden),
        "second": draw(out, hidden, 3, 3) / (9 * hidden) ** 0.5,
        "scale_of_second": 1 + 0.1 * draw(out),
        "shift_of_second": 0.1 * draw(out),
        "grad": draw(images, side // 4, side // 4, out).permute(0, 3, 1, 2).to(case.dtype),
    }


def _run(case: Case, function: Callable[..., Tensor]) -> Callable[[Inputs], dict[str, Tensor]]:
    """A step of function(x, *parameters); an image needs no gradient."""

    def call(inputs: Inputs) -> dict[str, Tensor]:
        image = inputs["x"]
        if case.shape["C"] > 3:
            return step(case, lambda **leaves: function(*leaves.values()))(inputs)
        rest = {name: tensor for name, tensor in inputs.items() if name != "x"}
        return step(case, lambda **leaves: function(image, *leaves.values()))(rest)

    return call


def _of_torch(x: Tensor, *parameters: Tensor) -> Tensor:
    def layer(x: Tensor, weight: Tensor, *affine: Tensor) -> Tensor:
        y = F.conv2d(x, weight.to(x.dtype), stride=STRIDE, padding=PADDING)
        return F.batch_norm(y, None, None, *affine, training=True, eps=EPS)

    return layer(F.gelu(layer(x, *parameters[:3])), *parameters[3:])


def _run_ours(case: Case, backend: str) -> Callable[[Inputs], Any]:
    options = {"stride": STRIDE, "padding": PADDING, "backend": backend}

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        weight, scale, shift, second, *affine = parameters
        hidden, *statistics = fer_kernels.normed_conv(x.permute(0, 2, 3, 1), weight, **options)
        norm = fer_kernels.RowNorm(*statistics, scale, shift, EPS, "gelu")
        y, mean, var = fer_kernels.normed_conv(hidden, second, norm=norm, **options)
        rows = y.flatten(0, 2)
        z = fer_kernels.batch_norm_act(rows, *affine, statistics=(mean, var), eps=EPS, backend=backend)
        return z.view_as(y).permute(0, 3, 1, 2)

    return _run(case, function)


def _open_eager(case: Case, device: str) -> Callable[[Inputs], Any]:
    return _run(case, _of_torch)


def _open_compile(case: Case, device: str) -> Callable[[Inputs], Any]:
    torch.compiler.reset()
    return _run(case, torch.compile(_of_torch, fullgraph=True, dynamic=False))


def expect(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    return _run(case, _of_torch)({name: tensor.double() for name, tensor in inputs.items()})


def judge(
    case: Case,
    inputs: Inputs,
    expected: dict[str, Tensor],
    outputs: dict[str, Tensor],
    arithmetic: torch.dtype,
) -> str | None:
    return off_as_a_whole(case, expected, outputs, roundings=12)


register(
    Suite(
        op="conv",
        cases=tuple(_cases()),
        providers=(
            *ours("conv", _run_ours),
            Provider("eager", _open_eager),
            Provider("compile", _open_compile),
        ),
        expect=expect,
        judge=judge,
    )
)
