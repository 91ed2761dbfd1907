"""A model's predictions of a whole data set, over all processes, each sample once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..base import pair
from ..data.transforms import PLAIN_MEAN
from ..metrics import Predictions
from ..output import FEROutput
from .distributed import World, gathered
from .loading import evaluation_loader, workers_for


def whole_output(model: nn.Module, images: torch.Tensor) -> FEROutput:
    """`model(images, full=True)`; a model that is not of this package gives its logits alone."""
    if hasattr(unwrapped(model), "loss_terms"):
        return model(images, full=True)
    logits = model(images)
    return FEROutput(logits, None, logits, {})


def input_side(model: nn.Module) -> int:
    """Pixels a side of the square images that the model is made for."""
    made_for = getattr(model, "img_size", None)
    if made_for is None:
        return int((getattr(model, "default_cfg", None) or {}).get("input_size", (3, 64, 64))[-1])
    height, width = pair(made_for)
    if height != width:
        raise ValueError(f"the model is made for {height} x {width} pixels, and faces are squares; give size")
    return height


def wants_imagenet(model: nn.Module) -> bool:
    """Whether images are normalised as for ImageNet, and not to [-1, 1]."""
    return tuple((getattr(model, "default_cfg", None) or {}).get("mean", PLAIN_MEAN)) != PLAIN_MEAN


def unwrapped(model: nn.Module) -> Any:
    """The model within DDP and torch.compile."""
    while hasattr(model, "_orig_mod") or isinstance(model, nn.parallel.DistributedDataParallel):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module  # type: ignore[assignment]
    return model


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: Any,
    *,
    world: World | None = None,
    batch_size: int = 64,
    workers: int = -1,
    amp: bool = False,
    flip: bool = False,
    channels_last: bool = False,
    progress: bool = True,
) -> Predictions:
    """
    Args:
        model: with logits as its output, or valence and arousal as well.
        dataset: of samples as `fer_models.data` makes them.
        world: this process's place; every process gets the whole result.
        flip: the mean over an image and its mirror image (test-time averaging).

    Returns:
        `Predictions`, in the order of the samples; `metrics()` of it are exact whatever the batches were.
    """
    if world is None:
        place = next(model.parameters()).device
        world = World(0, 1, place)
    training, model = model.training, unwrapped(model)
    model.eval()
    device = world.device
    loader = evaluation_loader(
        dataset, batch_size, workers_for(workers, device, world.size), device, world.rank, world.size
    )
    rows: list[dict[str, np.ndarray]] = []
    for batch in tqdm(
        loader, desc="evaluate", unit="batch", leave=False, disable=not (progress and world.main)
    ):
        images = batch["image"].to(device, non_blocking=True)
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        views = [images, images.flip(3)] if flip else [images]
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            outputs = [whole_output(model, view) for view in views]
        probabilities = sum(output.logits.float().softmax(1) for output in outputs) / len(outputs)
        row = {
            "index": batch["index"],
            "label": batch["label"],
            "probabilities": probabilities,
            "true_valence_arousal": batch["valence_arousal"],
        }
        if outputs[0].valence_arousal is not None:
            row["valence_arousal"] = sum(o.valence_arousal.float() for o in outputs) / len(outputs)  # type: ignore[union-attr,misc]
        rows.append({name: torch.as_tensor(value).cpu().numpy() for name, value in row.items()})
    model.train(training)
    parts = []
    for shard in gathered(rows, world):
        for row in shard:
            parts.append(Predictions(**row))
    if not parts:
        raise ValueError("evaluate: the data set is empty")
    return Predictions.join(parts)
