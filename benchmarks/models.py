"""Whole networks, inference and a training step: what the operators are worth in the models that use them.

The peers are the same model on the reference operators, which hold distance matrices and edge tensors
("eager"), and torch.compile of that ("compile"), which fuses all but what the registered operators do.
Convolutions are the same code on all sides; on a CPU ours has operators for norms and float32 products too.
A bfloat16 case is the float32 network under autocast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fer_models
from fer_models.layers.grapher import FFN, Grapher

from .providers import ours
from .registry import Case, Cost, Inputs, Provider, Suite, register

CLASSES = 8
DTYPES = (torch.float32, torch.bfloat16)
# Multiply-adds of one image at 224 pixels, the graphs' distances included, and parameters at 8 classes.
COUNTS = {"face2nodes_ti": (1_378_000_000, 6_571_048), "vig_ti": (1_300_000_000, 6_167_944)}
BATCH, SIDE = 16, 224

# A nearly equal pair of neighbours that rounding exchanges changes all that follows, so a network has no
# tight bound of its own: it may be as far from float64 as the reference with the same rounding is, and half
# as far again. That tells right from wrong only where exchanges matter little: for images with large patterns
# (means over noise are nearly the same for all images, and the neck's batch norm magnifies what is left) and
# branches that start small. There an ignored dilation goes beyond the bound; with noise and unit branches it
# does not.
FACTOR = 1.5
BRANCHES = 0.1
FLOOR = {"forward": 1e-3, "backward": 1e-2}  # of the norm, where that error happens to be small


def _cases() -> list[Case]:
    return [
        Case(
            op="models",
            name=f"{name}-b{BATCH}-{SIDE}px",
            shape={"B": BATCH, "side": SIDE},
            dtype=dtype,
            cost=_cost(name, direction),
            make_inputs=make_inputs,
            direction=direction,
            tags=(name,),
        )
        for dtype in DTYPES
        for name in COUNTS
        for direction in ("forward", "backward")
    ]


def _cost(name: str, direction: str) -> Cost:
    """Images and weights once, in training their gradients too; and three times the products."""
    multiply_adds, parameters = COUNTS[name]
    passes = 3 if direction == "backward" else 1
    pixels = BATCH * 3 * SIDE * SIDE
    weights = parameters * (2 if direction == "backward" else 1)
    return Cost(bytes=4 * (pixels + weights), flops=2 * BATCH * multiply_adds * passes)


def make_inputs(case: Case, generator: torch.Generator) -> Inputs:
    batch, side = case.shape["B"], case.shape["side"]
    patterns = F.interpolate(torch.randn(batch, 3, 4, 4, generator=generator), size=side, mode="bicubic")
    return {
        "images": patterns + 0.2 * torch.randn(batch, 3, side, side, generator=generator),
        "labels": torch.randint(0, CLASSES, (batch,), generator=generator),
    }


def model_of(case: Case, device: str, backend: str) -> torch.nn.Module:
    """The same weights for every backend; no drop path, so that a step can be compared."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = fer_models.create_model(
            case.tags[0],
            num_classes=CLASSES,
            drop_path_rate=0.0,
            img_size=case.shape["side"],
            backend=backend,
        )
    for module in model.modules():
        if isinstance(module, (Grapher, FFN)):
            torch.nn.init.constant_(module.fc2.norm.weight, BRANCHES)
    return model.to(device).train(case.direction == "backward")


def run(case: Case, device: str, backend: str, compiled: bool = False) -> Callable[[Inputs], Any]:
    model = model_of(case, device, backend)
    network: Callable[..., Tensor] = model
    if compiled:
        torch.compiler.reset()
        network = torch.compile(model, dynamic=False)

    def autocast() -> torch.autocast:
        return torch.autocast(device, torch.bfloat16, enabled=case.dtype != torch.float32)

    def inference(inputs: Inputs) -> dict[str, Tensor]:
        with torch.inference_mode(), autocast():
            return {"logits": network(inputs["images"])}

    def step(inputs: Inputs) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        with autocast():
            logits = network(inputs["images"]).float()
        F.cross_entropy(logits, inputs["labels"]).backward()
        return {"logits": logits.detach()} | {name: p.grad for name, p in model.named_parameters()}

    return inference if case.direction == "forward" else step


def _run_on(case: Case, backend: str) -> Callable[[Inputs], Any]:
    return run(case, "cuda" if backend in ("triton", "cuda") else "cpu", backend)


def _distance(actual: dict[str, Tensor], expected: dict[str, Tensor], names: list[str]) -> float:
    """Of all these tensors as one vector, over its norm."""
    difference = sum((actual[name].double() - expected[name]).square().sum().item() for name in names)
    return (difference / sum(expected[name].square().sum().item() for name in names)) ** 0.5


def _parts(case: Case, names: list[str]) -> dict[str, list[str]]:
    return {"logits": ["logits"], "gradients": [name for name in names if name != "logits"]}


def expect(case: Case, inputs: Inputs) -> dict[str, Any]:
    """float64 on the reference operators, and how far the case's own arithmetic on them is from it."""
    device = inputs["images"].device.type
    single = run(case, device, "reference")(inputs)
    model = model_of(case, device, "reference").double()
    images = inputs["images"].double()
    with torch.set_grad_enabled(case.direction == "backward"):
        logits = model(images)
        values = {"logits": logits.detach()}
        if case.direction == "backward":
            F.cross_entropy(logits, inputs["labels"]).backward()
            values |= {name: p.grad for name, p in model.named_parameters()}
    bounds = {
        part: max(FACTOR * _distance(single, values, names), FLOOR[case.direction])
        for part, names in _parts(case, list(values)).items()
        if names
    }
    return {"values": values, "bounds": bounds}


@torch.no_grad()
def judge(
    case: Case, inputs: Inputs, expected: dict[str, Any], outputs: dict[str, Tensor], arithmetic: torch.dtype
) -> str | None:
    values = expected["values"]
    for part, bound in expected["bounds"].items():
        error = _distance(outputs, values, _parts(case, list(values))[part])
        if not error <= bound:  # a NaN is no smaller than anything
            return f"{part} are off by {error:.2e} of their norm, more than {bound:.2e}"
    return None


register(
    Suite(
        op="models",
        cases=tuple(_cases()),
        providers=(
            *(provider for provider in ours("relation", _run_on) if provider.name != "ours-reference"),
            Provider("eager", functools.partial(run, backend="reference")),
            Provider("compile", functools.partial(run, backend="reference", compiled=True)),
        ),
        expect=expect,
        judge=judge,
    )
)
