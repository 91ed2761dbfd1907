"""Batches that depend on the seed, the epoch and the step alone: so a run can go on anywhere, on any number
of processes and workers, with the very samples and augmentations it would have had."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ..data.sampling import BalancedSampler, ShardedSampler


def mixed_seed(*numbers: int) -> int:
    """One seed of several numbers; near ones give unrelated seeds."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = ((state ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


class Seeded(Dataset):
    """A data set by (epoch, index): what its transform draws depends on these and the seed alone."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        # Not torch.manual_seed, which keeps a stack trace for every device that is not in use yet
        generator = torch.default_generator
        state = generator.get_state()
        generator.manual_seed(mixed_seed(self.seed, epoch, index))
        try:
            return self.dataset[index]
        finally:
            generator.set_state(state)


class Steps:
    """A batch sampler: this process's part of every step of an epoch, from `start` on.

    Over all processes a step's samples are those of one process with the whole batch.
    """

    def __init__(
        self, dataset: Any, batch_size: int, seed: int, *, balance: float = 0.0, rank: int = 0, world: int = 1
    ) -> None:
        if batch_size % world:
            raise ValueError(f"batch_size = {batch_size} does not divide by the {world} processes")
        if len(dataset) < batch_size:
            raise ValueError(
                f"the training data has {len(dataset)} samples, fewer than batch_size = {batch_size}"
            )
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.length = len(dataset)
        self.balanced = BalancedSampler(dataset.labels, power=balance, seed=seed) if balance else None
        self.epoch, self.start = 0, 0

    @property
    def steps(self) -> int:
        """Of a whole epoch; samples short of a batch are left out."""
        return self.length // self.batch_size

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        if self.balanced is None:
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, 1, self.epoch))
            order = torch.randperm(self.length, generator=generator).tolist()
        else:
            self.balanced.set_epoch(self.epoch)
            order = list(self.balanced)
        share = self.batch_size // self.world
        for step in range(self.start, self.steps):
            first = step * self.batch_size + self.rank * share
            yield [(self.epoch, index) for index in order[first : first + share]]


def workers_for(wanted: int, device: torch.device, world: int) -> int:
    if wanted >= 0:
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # On a CPU the model wants the cores too; on a GPU they have nothing else to do.
    return min(4, cores // 2) if device.type == "cpu" else max(1, min(8, cores // world))


def training_loader(dataset: Any, steps: Steps, seed: int, workers: int, device: torch.device) -> DataLoader:
    return DataLoader(
        Seeded(dataset, seed),
        batch_sampler=steps,  # type: ignore[arg-type]  # a batch's keys are (epoch, index)
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # of its own, so that it draws nothing from the model's
        worker_init_fn=_one_thread,
    )


def evaluation_loader(
    dataset: Any, batch_size: int, workers: int, device: torch.device, rank: int = 0, world: int = 1
) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=ShardedSampler(len(dataset), rank, world),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
        worker_init_fn=_one_thread,
    )


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def mix(
    images: torch.Tensor,
    distribution: torch.Tensor,
    valence_arousal: torch.Tensor,
    mixup: float,
    cutmix: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch blended with itself in another order: wholly (mixup) or within a box (cutmix), by a share drawn
    from Beta(alpha, alpha). Targets are blended by the share, too."""
    alpha = mixup
    cut = bool(cutmix) and (not mixup or float(torch.rand(())) < 0.5)
    if cut:
        alpha = cutmix
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    order = torch.randperm(images.shape[0]).to(images.device)
    if cut:
        height, width = images.shape[2:]
        side = (1 - share) ** 0.5
        top, left = (int(torch.randint(n, ())) for n in (height, width))
        half = (int(height * side / 2), int(width * side / 2))
        rows = slice(max(top - half[0], 0), min(top + half[0], height))
        columns = slice(max(left - half[1], 0), min(left + half[1], width))
        images = images.clone()
        images[:, :, rows, columns] = images[order][:, :, rows, columns]
        share = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
    else:
        images = share * images + (1 - share) * images[order]
    return (
        images,
        share * distribution + (1 - share) * distribution[order],
        share * valence_arousal + (1 - share) * valence_arousal[order],
    )
