"""Pictures of a run: learning curves, confusion matrix, bars a class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def _figure(width: float, height: float, columns: int = 1) -> Any:
    # Not pyplot, which wants a display or a global setting
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    return figure, axes


def curves(history: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Loss and accuracy by epoch."""
    from matplotlib.ticker import MaxNLocator

    figure, (left, right) = _figure(9, 3.5, 2)
    epochs = [row["epoch"] + 1 for row in history]
    parts = [name for name in history[0] if name.startswith("train_")]
    for name in parts[1:] if len(parts) == 2 else parts:  # where there is one part, it is the loss
        values = [row.get(name, np.nan) for row in history]
        left.plot(epochs, values, marker=".", label=name.removeprefix("train_").replace("_", " "))
    left.set(title="training loss and its parts")
    styles = ("-", "--", ":", "-.")  # where classes are equally many, the first three are nearly one line
    for name, style in zip(("accuracy", "mean_class_accuracy", "macro_f1", "mean_ccc"), styles, strict=True):
        if any(name in row for row in history):
            values = [row.get(name, np.nan) for row in history]
            right.plot(epochs, values, style, marker=".", label=name.replace("_", " "))
    right.set(title="validation")
    for axes in (left, right):
        axes.set(xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def confusion(matrix: NDArray[Any], classes: Sequence[str], path: str | Path) -> None:
    """Counts, coloured by the share of their row: rows are the truth. Beside it each class's accuracy."""
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    size = 1.6 + 0.62 * len(classes)
    figure, (left, right) = _figure(size * 1.6, size, 2)
    left.imshow(share, cmap="Blues", vmin=0, vmax=1)
    places = range(len(classes))
    left.set(xlabel="predicted", ylabel="truth", xticks=places, yticks=places)
    left.set_xticklabels(classes, rotation=45, ha="right")
    left.set_yticklabels(classes)
    for row in places:
        for column in places:
            color = "white" if share[row, column] > 0.5 else "black"
            left.text(
                column, row, int(matrix[row, column]), ha="center", va="center", color=color, fontsize=8
            )
    bars = right.barh(places, np.diag(share), color="tab:blue")
    right.bar_label(bars, [f"{value:.0%}" for value in np.diag(share)], padding=2, fontsize=8)
    right.set(xlim=(0, 1.15), ylim=left.get_ylim(), yticks=places, xlabel="share recognised")
    right.set_box_aspect(1)  # as the matrix beside it, so that rows are level
    right.set_yticklabels([f"{name} ({int(n)})" for name, n in zip(classes, matrix.sum(1), strict=True)])
    right.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")
