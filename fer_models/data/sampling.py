"""Which samples a pass sees: class balance, folds without shared subjects, shards for evaluation."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler


def class_weights(counts: Sequence[int], power: float = 1.0) -> Tensor:
    """Weights for a loss, float (num_classes): counts to the ``-power``, with mean 1 over the samples.

    A class without samples gets 0. power = 0 gives ones, 0.5 the inverse square root.
    """
    n = torch.as_tensor(counts, dtype=torch.float64)
    weights = torch.where(n > 0, n.clamp(min=1).pow(-power), 0.0)
    return (weights * n.sum() / (weights * n).sum().clamp(min=1e-12)).float()


class BalancedSampler(Sampler[int]):
    """Draws with replacement so that each class present comes equally often; unlabelled samples never come.

    Deterministic by (seed, epoch): call ``set_epoch`` before each pass. Of ``world`` processes each draws its
    own ``rank`` of one common sequence. power = 0.5 goes half the way, 0 keeps the natural frequencies.
    """

    def __init__(
        self,
        labels: Sequence[int],
        *,
        power: float = 1.0,
        num_samples: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        label = torch.as_tensor(labels)
        if not (label >= 0).any():
            raise ValueError(f"BalancedSampler: none of the {len(label)} samples has a label")
        _check_shard("BalancedSampler", rank, world)
        counts = torch.bincount(label[label >= 0]).double()
        per_class = counts.clamp(min=1).pow(-power)
        self.weights = torch.where(label >= 0, per_class[label.clamp(min=0)], 0.0)
        self.total = len(label) if num_samples is None else num_samples
        self.seed, self.epoch, self.rank, self.world = seed, 0, rank, world

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.total // self.world

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        # By cumulative sums, since torch.multinomial stops at 2^24 samples
        draws = torch.rand(self.total, generator=generator, dtype=torch.float64)
        cumulative = self.weights.cumsum(0)
        chosen = torch.searchsorted(cumulative, draws * cumulative[-1], right=True)
        chosen = chosen.clamp(max=int(self.weights.nonzero()[-1]))
        return iter(chosen[self.rank :: self.world][: len(self)].tolist())


class ShardedSampler(Sampler[int]):
    """Every ``world``-th sample from ``rank`` on, in order: over all ranks each sample exactly once.

    torch's DistributedSampler repeats samples to make shards equal, which falsifies an evaluation.
    """

    def __init__(self, length: int, rank: int = 0, world: int = 1):
        _check_shard("ShardedSampler", rank, world)
        self.indices = range(rank, length, world)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


def _check_shard(name: str, rank: int, world: int) -> None:
    if not 0 <= rank < world:
        raise ValueError(f"{name}: rank = {rank}, expected 0 to world - 1 = {world - 1}")


def subject_folds(subjects: Sequence[str], labels: Sequence[int], folds: int = 10) -> list[list[int]]:
    """Indices of each of ``folds`` parts; no subject is in two, and classes are spread evenly.

    Subjects are placed from the one with most samples down, each where it leaves the parts' class counts
    most even. The result depends on nothing but the arguments.
    """
    of_subject: dict[str, list[int]] = defaultdict(list)
    for index, subject in enumerate(subjects):
        of_subject[subject].append(index)
    if "" in of_subject:
        raise ValueError(f"subject_folds: sample {of_subject[''][0]} has no subject")
    if not 2 <= folds <= len(of_subject):
        raise ValueError(f"subject_folds: folds = {folds}, expected 2 to the {len(of_subject)} subjects")
    place = {label: i for i, label in enumerate(sorted(set(labels)))}
    total = torch.bincount(torch.tensor([place[label] for label in labels])).double()
    counts = torch.zeros(folds, len(place), dtype=torch.float64)
    parts: list[list[int]] = [[] for _ in range(folds)]
    subjects_left = len(of_subject)
    for _, indices in sorted(of_subject.items(), key=lambda item: (-len(item[1]), item[0])):
        own = torch.bincount(torch.tensor([place[labels[i]] for i in indices]), minlength=len(place)).double()
        # Squares of shares grow least where the subject's classes are rare so far
        growth = (((counts + own) / total).square() - (counts / total).square()).sum(1)
        empty = [fold for fold, part in enumerate(parts) if not part]
        # The last subjects go to the parts that would stay empty
        choice = empty if len(empty) == subjects_left else range(folds)
        best = min(choice, key=lambda fold: (growth[fold].item(), len(parts[fold]), fold))
        counts[best] += own
        parts[best] += indices
        subjects_left -= 1
    return [sorted(part) for part in parts]
