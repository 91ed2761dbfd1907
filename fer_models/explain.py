"""Pictures that explain one prediction: patches that were joined, regions that counted, keys that dropped."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.patheffects import withStroke
from torch import Tensor, nn

from fer_kernels.nn import JADAttention

from .base import FERModel
from .data.labels import class_names
from .data.transforms import eval_transform
from .jadfer import JADFER
from .layers.grapher import RELATIONS
from .layers.label_graph import CONTINUOUS, LabelGraphHead, normalise_adjacency
from .layers.regions import Box
from .lnlattennet import LNLAttenNet
from .output import FEROutput
from .train.evaluate import input_side, unwrapped, wants_imagenet
from .vig import ViG

INCHES, DPI = 3.2, 110  # a panel's side
PICTURES = (".png", ".pdf", ".svg")
MOST_CLASSES, MOST_REGIONS = 10, 16  # bars that a panel has room for
SMALL = 8  # points, of text in a panel
HEAT = "inferno"

Panel = Callable[[Any], None]  # draws into axes


def explain(
    model: nn.Module,
    image: Tensor,
    path: str | Path | None = None,
    *,
    classes: Sequence[str] | None = None,
    size: int | None = None,
    node: tuple[int, int] | None = None,
    layers: Sequence[int] | None = None,
) -> Figure:
    """A picture of what the model predicts for one face, and of what its system shows about why.

    ViG and Face2Nodes show which patches speak for the answer, the neighbours of the one that does most in
    the first block and the last, and every node's in-degree, LNLAttenNet its regions' weights, JADFER its
    path maps and the keys that joint attention dropping drops (or the joint attention, where its mode drops
    no keys for that), and any model with a label graph head, as Emotion-GCN, that graph.

    Args:
        model: a model of this package with a classifier, in any mode, which it is left in.
        image: uint8 (3, H, W), RGB.
        path: of the picture to write, .png, .pdf or .svg, in a folder that exists; None writes none.
        classes: names of the classes; None takes the label graph's, or the usual ones for 7 and 8 classes.
        size: pixels a side of the model's input; None takes the model's own.
        node: (row, column) from 0 in the last block's grid; None takes the one that speaks most for the
            answer. Blocks with finer grids show the node in the same place.
        layers: blocks to show, from 0; None takes the first and the last.

    Returns:
        The figure. The same arguments give the same one: nothing is drawn at random.
    """
    model = unwrapped(model)
    if not explainable(model):
        raise TypeError(
            f"explain: nothing to show of a {type(model).__name__}; expected a model of fer_models: ViG, "
            f"Face2Nodes, LNLAttenNet, JADFER, or one with a label graph head, as Emotion-GCN"
        )
    if model.num_classes == 0:
        raise ValueError(f"explain: {model.name} has no classifier, so no prediction to explain")
    if not isinstance(image, Tensor) or image.dtype != torch.uint8:
        got = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"explain: image must be a uint8 tensor (3, H, W), got {got}")
    if image.dim() != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise ValueError(f"explain: image must be (3, H, W), got {tuple(image.shape)}")
    if not isinstance(model, ViG) and (node is not None or layers is not None):
        raise ValueError(f"explain: {model.name} has no graph of nodes, so no node or layers to choose")
    if path is not None and not Path(path).parent.is_dir():
        raise FileNotFoundError(f"explain: no folder {Path(path).parent} to write {Path(path).name} to")
    if path is not None and Path(path).suffix.lower() not in PICTURES:
        raise ValueError(f"explain: {path} must end in {', '.join(PICTURES)}")
    names = shown_names(model, classes)
    size = input_side(model) if size is None else size
    image = image.cpu()
    weight = next(model.parameters())
    x = eval_transform(size, imagenet=wants_imagenet(model))(image).unsqueeze(0).to(weight)

    with torch.no_grad(), _evaluating(model):
        with _changed([model], collect_weights=True):
            output: Any = model(x, full=True)
        face = _Face(image.permute(1, 2, 0).numpy(), size)
        if isinstance(model, ViG):
            panels = _graph_panels(model, x, output, face, names, node, layers)
        elif isinstance(model, LNLAttenNet):
            panels = _region_panels(model.boxes, output.aux["region_weights"][0].cpu().float(), face)
        elif isinstance(model, JADFER):
            panels = _path_panels(model, x, output, face)
        else:
            panels = []
        if isinstance(model.head, LabelGraphHead):
            panels.append(
                partial(_draw_labels, names, label_weights(model.head), int(output.logits[0].argmax()))
            )

    figure = _figure([*_prediction_panels(model, output, names, face), *panels])
    if path is not None:
        figure.savefig(path, dpi=DPI)
    return figure


def explainable(model: nn.Module) -> TypeGuard[FERModel]:
    """Whether there is something to show of this model."""
    graph_head = isinstance(getattr(model, "head", None), LabelGraphHead)
    return isinstance(model, (ViG, LNLAttenNet, JADFER)) or (graph_head and isinstance(model, FERModel))


# The model and its input


def shown_names(model: FERModel, classes: Sequence[str] | None) -> tuple[str, ...]:
    """The given names, or the model's, or the usual ones."""
    if classes is None:
        labels = model.head.labels if isinstance(model.head, LabelGraphHead) else None
        return tuple(labels or class_names(model.num_classes))
    if len(classes) != model.num_classes:
        raise ValueError(
            f"explain: classes must be {model.num_classes} names, got {len(classes)}: {', '.join(classes)}"
        )
    return tuple(classes)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train(modes[0][1])  # not the flags alone: heads forget what they kept from evaluation
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _changed(modules: Iterable[nn.Module], **values: Any) -> Iterator[None]:
    """These attributes of the modules that have them, as they were again afterwards."""
    kept = [
        (module, name, getattr(module, name))
        for module in modules
        for name in values
        if hasattr(module, name)
    ]
    try:
        for module, name, _ in kept:
            setattr(module, name, values[name])
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)


# Graphs of patches


class BlockGrid(NamedTuple):
    """Where the nodes and keys of a block lie in the image.

    Attributes:
        side: pixels a side of the image.
        cell: pixels a side of a node's patch; those at the far edges may be cut off by it.
        nodes: (rows, columns).
        reduction: r; a key is the mean of r x r nodes.
        dilation: of the graph on so many keys.
    """

    side: int
    cell: int
    nodes: tuple[int, int]
    reduction: int
    dilation: int

    @property
    def keys(self) -> tuple[int, int]:
        return self.nodes[0] // self.reduction, self.nodes[1] // self.reduction

    def node_place(self, row: int, column: int) -> tuple[float, float]:
        """(x, y) in pixels of a node's centre."""
        x, y = _centres(
            torch.tensor(row * self.nodes[1] + column), self.nodes[1], self.cell, self.side
        ).tolist()
        return x, y

    def key_places(self, index: Tensor) -> Tensor:
        """(..., 2), x and y in pixels of the keys' centres."""
        return _centres(index, self.keys[1], self.cell * self.reduction, self.side)

    def node_at(self, x: float, y: float) -> tuple[int, int]:
        """(row, column) of the node whose patch holds this place."""
        row, column = int(y // self.cell), int(x // self.cell)
        return min(row, self.nodes[0] - 1), min(column, self.nodes[1] - 1)


def _centres(index: Tensor, columns: int, cell: int, side: int) -> Tensor:
    start = torch.stack([index % columns, index // columns], -1) * cell
    return (start + (start + cell).clamp(max=side)) / 2


def block_grids(model: ViG, side: int) -> list[BlockGrid]:
    """Of every block, for images of this side."""
    grids, cell, rows = [], model.stride, side // model.stride
    stage: Any
    for stage in model.stages:
        if stage.downsample is not None:
            cell, rows = 2 * cell, (rows + 1) // 2
        for block in stage.blocks:
            graph, reduction = block.grapher.graph_conv.dynamic_graph, block.grapher.reduction
            # What the graph does with fewer keys than it was made for
            most = max((rows // reduction) ** 2 // graph.k, 1)
            grids.append(BlockGrid(side, cell, (rows, rows), reduction, min(graph.dilation, most)))
    return grids


def in_degree(graph: Tensor, grid: BlockGrid) -> Tensor:
    """How many nodes look at each key, (rows, columns) of the keys, from a graph (N, k)."""
    rows, columns = grid.keys
    return graph.flatten().bincount(minlength=rows * columns).view(rows, columns)


def relative_weights(weights: Tensor, conv: str) -> Tensor:
    """Relation weights (..., k, H) to (..., k), their mean over heads, such that 1 is no preference."""
    mean = weights.mean(-1)
    return mean if conv == "rgate" else mean * weights.shape[-2]  # gates are around 1, shares around 1 / k


def relevance(model: ViG, x: Tensor, label: int) -> Tensor:
    """How much each node (rows, columns) of the last block speaks for a label: its features times the
    gradient of the label's logit."""
    with torch.enable_grad(), model.kernels():
        features = model.forward_features(x).detach().requires_grad_()
        logits = model.forward_head(features)
        (gradient,) = torch.autograd.grad(logits[0, label], features)
    return (features.detach() * gradient).sum(-1)[0].float().cpu()


def shown_layers(count: int, layers: Sequence[int] | None) -> list[int]:
    if layers is None:
        return sorted({0, count - 1})
    wrong = [layer for layer in layers if not 0 <= layer < count]
    if wrong or not layers:
        raise ValueError(
            f"explain: layers must be one or more blocks of 0 to {count - 1}, got {list(layers)}"
        )
    return list(layers)


def shown_place(grid: BlockGrid, node: tuple[int, int] | None, speaks: Tensor) -> tuple[float, float]:
    """(x, y) of the chosen node, or of the one that speaks most for the answer."""
    rows, columns = grid.nodes
    if node is None:
        return grid.node_place(*divmod(int(speaks.argmax()), columns))
    if len(node) != 2 or not (0 <= node[0] < rows and 0 <= node[1] < columns):
        raise ValueError(
            f"explain: node must be (row, column) with a row of 0 to {rows - 1} and a column of 0 to "
            f"{columns - 1}, got {node}"
        )
    return grid.node_place(*node)


def _graph_panels(
    model: ViG,
    x: Tensor,
    output: FEROutput,
    face: _Face,
    names: Sequence[str],
    node: tuple[int, int] | None,
    layers: Sequence[int] | None,
) -> list[Panel]:
    grids = block_grids(model, face.side)
    graphs = [graph[0].cpu() for graph in output.aux["graphs"]]
    shown = shown_layers(len(graphs), layers)
    best = int(output.logits[0].argmax())
    speaks = relevance(model, x, best)
    place = shown_place(grids[-1], node, speaks)
    panels: list[Panel] = []
    for layer in shown:
        row, column = grids[layer].node_at(*place)
        index = row * grids[layer].nodes[1] + column
        weights = None
        if model.conv in RELATIONS:
            weights = relative_weights(
                output.aux["relation_weights"][layer][0, index].cpu().float(), model.conv
            )
        k, dilation = graphs[layer].shape[1], grids[layer].dilation
        title = f"block {layer} of 0–{len(graphs) - 1}: k = {k}, dilation {dilation}"
        panels.append(
            partial(_draw_neighbours, face, grids[layer], (row, column), graphs[layer][index], weights, title)
        )
    degrees = in_degree(graphs[-1], grids[-1])
    return [
        *panels,
        partial(_draw_relevance, face, grids[-1], speaks, names[best], node is not None),
        partial(_draw_degrees, face, grids[-1], degrees, len(graphs) - 1),
    ]


def _draw_neighbours(
    face: _Face,
    grid: BlockGrid,
    node: tuple[int, int],
    neighbours: Tensor,
    weights: Tensor | None,
    title: str,
    axes: Any,
) -> None:
    face.draw(axes, title, gray=True)
    lines = range(grid.cell, grid.side, grid.cell)
    axes.hlines(lines, 0, grid.side, color="white", linewidth=0.4, alpha=0.4)
    axes.vlines(lines, 0, grid.side, color="white", linewidth=0.4, alpha=0.4)
    x, y = grid.node_place(*node)
    width = torch.ones(len(neighbours)) if weights is None else weights.clamp(0.2, 4)
    colors = colormaps["plasma"](torch.linspace(1, 0.1, len(neighbours)).numpy())
    # The farthest first, so that the nearest lie on top
    for slot in reversed(range(len(neighbours))):
        to_x, to_y = grid.key_places(neighbours[slot]).tolist()
        thick = 1.4 * float(width[slot])
        outline = [withStroke(linewidth=thick + 1, foreground="black", alpha=0.6)]
        axes.plot([x, to_x], [y, to_y], color=colors[slot], linewidth=thick, path_effects=outline)
        area = 30 * float(width[slot])
        axes.scatter(to_x, to_y, s=area, color=colors[slot], edgecolors="black", linewidths=0.6, zorder=3)
    corner = (node[1] * grid.cell, node[0] * grid.cell)
    axes.add_patch(
        Rectangle(corner, grid.cell, grid.cell, fill=False, edgecolor="cyan", linewidth=2, zorder=4)
    )
    note = "neighbours: yellow is near, purple far"
    axes.set_xlabel(note if weights is None else f"{note};\nwidth is the relation's weight", fontsize=SMALL)


def _draw_relevance(face: _Face, grid: BlockGrid, speaks: Tensor, name: str, chosen: bool, axes: Any) -> None:
    face.draw(axes, f"which patches speak for {name}", gray=True)
    rows, columns = grid.nodes
    _heat(axes, speaks.clamp(min=0), (columns * grid.cell, rows * grid.cell))
    axes.set(xlim=(0, grid.side), ylim=(grid.side, 0))
    framed = "" if chosen else ";\nthe brightest has the cyan frame"
    axes.set_xlabel(f"features times gradient, last block{framed}", fontsize=SMALL)


def _draw_degrees(face: _Face, grid: BlockGrid, degrees: Tensor, layer: int, axes: Any) -> None:
    face.draw(axes, f"how often a patch is a neighbour, block {layer}", gray=True)
    rows, columns = degrees.shape
    cell = grid.cell * grid.reduction
    _heat(axes, degrees.float(), (columns * cell, rows * cell))
    axes.set(xlim=(0, grid.side), ylim=(grid.side, 0))  # patches may reach over the edge
    low, mean, high = int(degrees.min()), float(degrees.float().mean()), int(degrees.max())
    axes.set_xlabel(f"in-degree: dark is {low}, bright {high}; mean {mean:.3g}", fontsize=SMALL)


# Regions


def _region_panels(boxes: Sequence[Box], weights: Tensor, face: _Face) -> list[Panel]:
    return [partial(_draw_regions, boxes, weights, face), partial(_draw_region_bars, weights)]


def preference(weights: Tensor) -> Tensor:
    """Weights (R,) that sum to one to [0, 1), where 0.5 is a weight of 1 / R."""
    return weights / (weights + 1 / len(weights))


def _draw_regions(boxes: Sequence[Box], weights: Tensor, face: _Face, axes: Any) -> None:
    face.draw(axes, "weights of the regions", gray=True)
    share = preference(weights).tolist()
    for index, (left, top, right, bottom) in enumerate(boxes):
        corner = (left * face.side, top * face.side)
        sides = ((right - left) * face.side, (bottom - top) * face.side)
        color = colormaps[HEAT](share[index])
        axes.add_patch(Rectangle(corner, *sides, facecolor=color, alpha=0.1 + 0.5 * share[index]))
        axes.add_patch(Rectangle(corner, *sides, fill=False, edgecolor="white", linewidth=0.8))
        axes.text(
            corner[0] + sides[0] / 2,
            corner[1] + sides[1] / 2,
            f"{index}\n{100 * weights[index]:.1f} %",
            ha="center",
            va="center",
            color="white",
            fontsize=SMALL,
            path_effects=[withStroke(linewidth=2, foreground="black")],
        )
    axes.set_xlabel("a region's number and its weight", fontsize=SMALL)


def _draw_region_bars(weights: Tensor, axes: Any) -> None:
    order = weights.argsort(descending=True, stable=True)[:MOST_REGIONS]
    shown = weights[order].tolist()
    axes.barh(range(len(shown)), shown, color=colormaps[HEAT](preference(weights)[order].numpy()))
    axes.axvline(1 / len(weights), color="gray", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(shown)), [f"region {index}" for index in order.tolist()], fontsize=SMALL)
    axes.invert_yaxis()
    count = f"the first {len(shown)} of {len(weights)}" if len(shown) < len(weights) else "sorted"
    axes.set_title(f"weights of the regions, {count}", fontsize=9)
    axes.set_xlabel("dashed: all alike", fontsize=SMALL)
    axes.tick_params(axis="x", labelsize=SMALL)


# Paths, and joint attention dropping


def key_map(statistics: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
    """The mean over layers, heads and queries, (h, w), of tensors (1, H, M) or (1, H, N, M) on all keys.

    Keys are cls, which has no place, and the grid's.
    """
    means = torch.stack([layer[0].float().flatten(0, -2).mean(0) for layer in statistics])
    return means.mean(0)[1:].view(grid)


def drops_keys(model: JADFER) -> bool:
    """Whether the model drops joint keys (or entries) in training: not none, softly, or at random."""
    return any(attention.p > 0 and attention.drop in ("key", "entry") for attention in _attentions(model))


def drop_map(model: JADFER, x: Tensor) -> Tensor:
    """The share (h, w) of heads, over all layers, that drop each key, were all heads to drop."""
    with _changed(_attentions(model), eval_mode="on"):
        aux = _statistics(model, x)
    return key_map(aux["drop_masks"], aux["path_maps"].shape[2:])


def joint_map(model: JADFER, x: Tensor) -> Tensor:
    """How much attention each key (h, w) gets, over all layers, heads and queries; the mean key gets 1."""
    aux = _statistics(model, x)
    means = aux["column_means"]
    return key_map(means, aux["path_maps"].shape[2:]) * means[0].shape[-1]


def _statistics(model: JADFER, x: Tensor) -> dict[str, Any]:
    with _changed([model], collect_stats=True):
        output: Any = model(x, full=True)
    return output.aux


def _attentions(model: JADFER) -> list[JADAttention]:
    return [module for module in model.modules() if isinstance(module, JADAttention)]


def _path_panels(model: JADFER, x: Tensor, output: FEROutput, face: _Face) -> list[Panel]:
    if drops_keys(model):
        last, title, what = drop_map(model, x), "keys that JAD drops", "share of heads"
    else:
        last, title, what = (
            joint_map(model, x),
            "joint attention: the column means",
            "the mean key has 1",
        )
    panels: list[Panel] = []
    for index, path in enumerate(output.aux["path_maps"][0]):
        panels.append(partial(_draw_map, face, path, f"path {index}", "attention of the path"))
    return [*panels, partial(_draw_map, face, last, title, what)]


def _draw_map(face: _Face, values: Tensor, title: str, what: str, axes: Any) -> None:
    face.draw(axes, title, gray=True)
    values = values.float().cpu()
    smooth = F.interpolate(values[None, None], size=(4 * face.side,) * 2, mode="bilinear")[0, 0]
    _heat(axes, smooth, (face.side, face.side))
    axes.set_xlabel(f"{what}: dark is {values.min():.2f}, bright {values.max():.2f}", fontsize=SMALL)


# The label graph


def label_weights(head: LabelGraphHead) -> Tensor:
    """Â (n, n): how much node i takes from node j. Nodes are the classes, then valence and arousal."""
    return normalise_adjacency(head.adjacency.detach().float().cpu(), head.norm)


MOST_LABELS = 40  # on a circle with arrows between all; more are a matrix


def _draw_labels(names: Sequence[str], weights: Tensor, predicted: int, axes: Any) -> None:
    title = "label graph, for every face the same"
    nodes = [*names, *CONTINUOUS][: len(weights)]
    if len(nodes) > MOST_LABELS:
        axes.imshow(weights.abs().numpy(), cmap="Blues", vmin=0)
        axes.set(xlabel="takes from this node", ylabel="node")
        axes.set_title(title, fontsize=9)
        return
    angles = [math.pi / 2 - 2 * math.pi * index / len(nodes) for index in range(len(nodes))]
    places = [(math.cos(angle), math.sin(angle)) for angle in angles]
    # Beside what a node keeps of itself, so that many thin links look thin
    shares = weights.abs() / weights.abs().max()
    edges = weights.clone().fill_diagonal_(0)
    for to, start in edges.nonzero().tolist():
        share = float(shares[to, start])
        axes.add_patch(
            FancyArrowPatch(
                places[start],
                places[to],
                connectionstyle="arc3,rad=0.12",  # the two directions side by side
                arrowstyle="-|>",
                mutation_scale=8,
                shrinkA=7,
                shrinkB=7,
                linewidth=0.3 + 1.7 * share,
                alpha=0.15 + 0.75 * share,
                color="tab:blue",
            )
        )
    for index, (x, y) in enumerate(places):
        color = "tab:orange" if index == predicted else "lightgray" if index < len(names) else "white"
        axes.scatter(x, y, s=110, color=color, edgecolors="black", zorder=3)
        axes.annotate(
            nodes[index],
            (x, y),
            xytext=(10 * x, 12 * y),
            textcoords="offset points",
            ha="center" if abs(x) < 0.2 else "left" if x > 0 else "right",
            va="center",
            fontsize=SMALL,
            fontweight="bold" if index == predicted else "normal",
        )
    axes.set(xlim=(-1.75, 1.75), ylim=(-1.35, 1.35), aspect="equal", xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=9)
    note = f"arrows lead to the node that takes; widest {edges.abs().max():.2f}"
    axes.set_xlabel(note if edges.any() else "no node takes from another", fontsize=SMALL)


# The figure


class _Face(NamedTuple):
    """The image as given, under axes in pixels of the model's input."""

    pixels: Any
    side: int

    def draw(self, axes: Any, title: str, gray: bool = False) -> None:
        """gray: what is drawn over it needs the colours."""
        pixels = self.pixels @ (0.299, 0.587, 0.114) if gray else self.pixels
        extent = (0, self.side, self.side, 0)
        axes.imshow(pixels, extent=extent, cmap="gray", vmin=0, vmax=255, interpolation="bilinear")
        axes.set(xticks=[], yticks=[])
        axes.set_title(title, fontsize=9)


def _heat(axes: Any, values: Tensor, to: tuple[float, float]) -> None:
    """A map over the face, from (0, 0) to this corner; the face shows through where values are small."""
    low, high = values.min(), values.max()
    share = (values - low) / (high - low).clamp(min=1e-12)
    extent = (0, to[0], to[1], 0)
    alpha = (0.25 + 0.45 * share).numpy()
    axes.imshow(share.numpy(), extent=extent, cmap=HEAT, vmin=0, vmax=1, alpha=alpha)


def _prediction_panels(
    model: FERModel, output: FEROutput, names: Sequence[str], face: _Face
) -> tuple[Panel, Panel]:
    probabilities = output.logits[0].float().softmax(0).cpu()
    best = int(probabilities.argmax())
    affect = None if output.valence_arousal is None else output.valence_arousal[0].clamp(-1, 1).tolist()

    def draw_face(axes: Any) -> None:
        face.draw(axes, "")
        axes.set_title(f"{names[best]} ({100 * probabilities[best]:.0f} %)", fontsize=11, fontweight="bold")
        axes.set_xlabel(f"{model.name}, {face.side} pixels", fontsize=SMALL)

    def draw_bars(axes: Any) -> None:
        shown = probabilities.topk(min(len(names), MOST_CLASSES)).indices.sort().values.tolist()
        colors = ["tab:orange" if index == best else "tab:blue" for index in shown]
        bars = axes.barh(range(len(shown)), probabilities[shown].tolist(), color=colors)
        axes.bar_label(
            bars, [f"{100 * probabilities[index]:.0f} %" for index in shown], padding=2, fontsize=SMALL
        )
        axes.set_yticks(range(len(shown)), [names[index] for index in shown], fontsize=SMALL)
        axes.invert_yaxis()
        axes.set(xlim=(0, 1.18), xticks=[0, 0.5, 1])
        axes.tick_params(axis="x", labelsize=SMALL)
        count = f", {len(shown)} of {len(names)} classes" if len(shown) < len(names) else ""
        axes.set_title(f"probabilities{count}", fontsize=9)
        if affect is not None:
            axes.set_xlabel(f"valence {affect[0]:+.2f}, arousal {affect[1]:+.2f}", fontsize=9)

    return draw_face, draw_bars


def _figure(panels: Sequence[Panel]) -> Figure:
    """The panels in a row, or from five in two, with the first two, the prediction, above each other."""
    rows = 1 if len(panels) < 5 else 2
    columns = math.ceil(len(panels) / rows)
    # Not pyplot, which wants a display or a global setting
    figure = Figure((INCHES * columns, INCHES * rows), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows, columns)
    places = [grid[index] for index in range(rows * columns)]
    if rows == 2:
        places.insert(1, places.pop(columns))
    for panel, place in zip(panels, places, strict=False):
        panel(figure.add_subplot(place))
    return figure
