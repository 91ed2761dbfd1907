"""Metrics of a whole evaluation: computed at once from all predictions, never averaged over batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def confusion_matrix(label: Array, predicted: Array, num_classes: int) -> Array:
    """(C, C) counts: rows are the truth, columns the prediction; negative labels are left out."""
    known = label >= 0
    pairs = label[known] * num_classes + predicted[known]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def classification(confusion: Array) -> dict[str, float]:
    """accuracy; mean_class_accuracy over the classes that occur; macro_f1 over all, 0 where undefined."""
    total = confusion.sum()
    if total == 0:
        return {}
    right, true, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    present = true > 0
    f1 = 2 * right / np.maximum(true + predicted, 1)
    return {
        "accuracy": float(right.sum() / total),
        "mean_class_accuracy": float((right[present] / true[present]).mean()),
        "macro_f1": float(f1.mean()),
    }


def regression(predicted: Array, true: Array) -> dict[str, float]:
    """CCC, PCC, RMSE and SAGR of one quantity, over the pairs where the truth is not NaN.

    Predictions are clipped to [-1, 1] first, as EmoNet's evaluation does. SAGR counts equal signs, and zero
    is a sign of its own.
    """
    known = ~np.isnan(true)
    if not known.any():
        return {}
    x, y = np.clip(predicted[known].astype(np.float64), -1, 1), true[known].astype(np.float64)
    dx, dy = x - x.mean(), y - y.mean()
    covariance, var_x, var_y = (dx * dy).mean(), (dx * dx).mean(), (dy * dy).mean()
    spread = var_x + var_y + (x.mean() - y.mean()) ** 2
    deviations = np.sqrt(var_x * var_y)
    return {
        "ccc": float(2 * covariance / spread) if spread > 0 else 0.0,
        "pcc": float(covariance / deviations) if deviations > 0 else 0.0,
        "rmse": float(np.sqrt(((x - y) ** 2).mean())),
        "sagr": float((np.sign(x) == np.sign(y)).mean()),
    }


@dataclass
class Predictions:
    """What a model said of a data set, one row a sample, in the order of their indices."""

    index: Array  # (n,)
    label: Array  # (n,), negative where unknown
    probabilities: Array  # (n, C)
    valence_arousal: Array | None = None  # (n, 2) predicted
    true_valence_arousal: Array | None = None  # (n, 2), NaN where unknown

    @property
    def predicted(self) -> Array:
        return self.probabilities.argmax(1)

    @property
    def confusion(self) -> Array:
        return confusion_matrix(self.label, self.predicted, self.probabilities.shape[1])

    def metrics(self) -> dict[str, float]:
        """Of the classes, and of valence and arousal where the model has them and the truth is known."""
        found = {"samples": float(len(self.index)), **classification(self.confusion)}
        if self.valence_arousal is not None and self.true_valence_arousal is not None:
            parts = {}
            for column, name in enumerate(("valence", "arousal")):
                part = regression(self.valence_arousal[:, column], self.true_valence_arousal[:, column])
                parts[name] = part
                found |= {f"{name}_{key}": value for key, value in part.items()}
            for key in parts["valence"]:
                if key in parts["arousal"]:
                    found[f"mean_{key}"] = (parts["valence"][key] + parts["arousal"][key]) / 2
        return found

    @classmethod
    def join(cls, parts: Sequence[Predictions]) -> Predictions:
        """One whole of several shards; a sample that came twice counts once."""

        def stack(name: str) -> Array | None:
            arrays = [getattr(part, name) for part in parts]
            return None if any(array is None for array in arrays) else np.concatenate(arrays)

        index, first = np.unique(np.concatenate([part.index for part in parts]), return_index=True)
        rest: dict[str, Any] = {}
        for name in cls.__dataclass_fields__:
            if name != "index":
                rows = stack(name)
                rest[name] = None if rows is None else rows[first]
        return cls(index, **rest)


def paired_bootstrap(
    first: Predictions, second: Predictions, rounds: int = 10_000, seed: int = 0
) -> dict[str, float]:
    """Whether two models differ in accuracy on the same samples: the difference (first - second), its 95 %
    interval, and how often resampling turned its sign (p_value, two-sided)."""
    if not np.array_equal(first.index, second.index):
        raise ValueError(
            f"paired_bootstrap: the models were not evaluated on the same samples "
            f"({len(first.index)} and {len(second.index)})"
        )
    known = first.label >= 0
    differs = (first.predicted == first.label)[known].astype(np.int64)
    differs = differs - (second.predicted == second.label)[known]
    draws = np.random.default_rng(seed)
    count = len(differs)
    # A resample's mean depends on how many samples of -1, 0 and 1 it has
    shares = [(differs == value).mean() for value in (-1, 0, 1)]
    drawn = draws.multinomial(count, shares, size=rounds)
    means = (drawn[:, 2] - drawn[:, 0]) / count
    low, high = np.quantile(means, (0.025, 0.975))
    p_value = min(1.0, 2 * min((means <= 0).mean(), (means >= 0).mean()))
    return {
        "difference": float(differs.mean()),
        "low": float(low),
        "high": float(high),
        "p_value": float(p_value),
    }
