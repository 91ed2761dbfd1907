"""Images a second: of a model, on this package's operators and on their references in turns; of loading."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..losses import Criterion, Targets
from ..registry import create_model
from .distributed import pick_device
from .evaluate import input_side
from .loading import Steps, training_loader


def measure(
    name: str,
    *,
    batch_size: int = 16,
    size: int = 0,
    device: str = "auto",
    amp: bool = False,
    seconds: float = 5.0,
) -> list[tuple[str, float, float]]:
    """(backend, images a second of inference, of training steps) for "auto" and "reference"."""
    place = pick_device(device)
    options: dict[str, Any] = {"img_size": size} if size else {}
    models = {}
    for backend in ("auto", "reference"):
        torch.manual_seed(0)
        models[backend] = create_model(name, backend=backend, **options).to(place)
    side = size or input_side(models["auto"])
    images = torch.randn(batch_size, 3, side, side, device=place)
    label = torch.arange(batch_size, device=place) % models["auto"].num_classes

    def infer(model: nn.Module) -> None:
        model.eval()
        with torch.inference_mode(), torch.autocast(place.type, torch.bfloat16, enabled=amp):
            model(images)

    def step(model: nn.Module) -> None:
        model.train()
        with torch.autocast(place.type, torch.bfloat16, enabled=amp):
            output = model(images, full=True)
        Criterion.for_model(model)(output, Targets(label))[0].backward()
        model.zero_grad(set_to_none=True)

    result = {backend: [0.0, 0.0] for backend in models}
    for column, work in enumerate((infer, step)):
        best = dict.fromkeys(models, float("inf"))
        for model in models.values():
            work(model)
        end = time.perf_counter() + seconds * len(models)
        while time.perf_counter() < end:
            for backend, model in models.items():
                start = time.perf_counter()
                work(model)
                if place.type == "cuda":
                    torch.cuda.synchronize()
                best[backend] = min(best[backend], time.perf_counter() - start)
        for backend in models:
            result[backend][column] = batch_size / best[backend]
    return [(backend, *columns) for backend, columns in result.items()]  # type: ignore[misc]


def loading_rate(dataset: Any, *, workers: int, seconds: float, batch_size: int = 64) -> float:
    """Samples a second that the training loader gives, from its second batch on."""
    steps = Steps(dataset, min(batch_size, len(dataset)), seed=0)
    loader = training_loader(dataset, steps, 0, workers, torch.device("cpu"))
    count, start = 0, 0.0
    with tqdm(desc="load", unit="image", leave=False) as bar:
        while True:
            for batch in loader:
                if not start:  # the first comes when the processes are up
                    start = time.perf_counter()
                    continue
                count += len(batch["label"])
                bar.update(len(batch["label"]))
                if time.perf_counter() - start > seconds:
                    return count / (time.perf_counter() - start)
            steps.epoch += 1
