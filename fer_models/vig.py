"""ViG and Pyramid ViG (Han et al., NeurIPS 2022): vision graph networks, exactly as published.

Layers, graph schedules, relative position and initialisation are those of the published code, and its state
dicts load (`checkpoint_filter_fn`). Unlike it the models take any input that the stem divides: position
embeddings are interpolated, and dilations and k are limited to the nodes that a small input has.

Nodes are (B, N, C) throughout, so every 1 x 1 convolution is a matrix product on them as they lie.

Keys of `FEROutput.aux`: "graphs", one (B, N, k) tensor of neighbours a block, into the nodes of its
reduced grid where it has one; and with `collect_weights` "relation_weights", one (B, N, k, H) a block.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fer_kernels.checks import a_choice
from fer_kernels.nn import GroupedLinear, Projection, RelationConv
from fer_kernels.relation.op import MAX_NEIGHBOURS

from . import registry
from .base import FERModel, LinearHead, pair, resize_position
from .layers.grapher import RELATIONS, Block
from .layers.stem import ConvStem, Downsample, MultiScaleStem
from .registry import StateDict, build, cfg, register_model

_logger = logging.getLogger(__name__)

ISOTROPIC_CONVS = ("mr", "edge", "sage", "gin")
REDUCTIONS = (4, 2, 1, 1)  # of a pyramid's stages
PUBLISHED_SIDE = 224  # the schedule's largest dilation follows from the grid at this size


class Stage(nn.Module):
    """Blocks on one grid, after what makes that grid from the stage before."""

    def __init__(self, downsample: Downsample | None, blocks: list[Block]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)


class ViG(FERModel):
    """A vision graph network, isotropic (one stage) or a pyramid (several).

    Args:
        dims: channels of each stage.
        depths: blocks of each stage.
        img_size: a side, or (height, width); what the position embeddings are made for. Any input that the
            stem divides works.
        stride: of the stem: 16, 8 or 4 (isotropic), 4 or 2 (pyramid).
        k: neighbours in the first block, as published 9. An isotropic network's grow linearly to 2k in the
            last block, a pyramid's stay.
        dilation: of every block; None takes the published schedule, block // 4 + 1 up to a limit.
        conv: graph convolution: "mr", "edge", "sage" or "gin" (and in Face2Nodes "rmr", "rsum", "rgate" and
            "rboth").
        conv_options: of that convolution, such as `heads` and `relation_dim` for the relation-aware ones.
        stochastic, epsilon: stochastic dilation while training; see `fer_kernels.nn.DilatedKnnGraph`.
        num_features: width of the embedding.
        drop_path_rate: of the last block, linear from 0 in the first.
        num_classes, in_chans, drop_rate, head, head_options, valence_arousal, global_pool, backend: as in
            `FERModel`.

    A k or dilation that exceeds the grid of an input is an error where it was given, and otherwise limited
    to it, with one warning a model in the log.
    """

    output_fmt = "NHWC"
    convs: tuple[str, ...] = ISOTROPIC_CONVS

    def __init__(
        self,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 224,
        stride: int | None = None,
        k: int | None = None,
        dilation: int | None = None,
        conv: str = "mr",
        conv_options: dict[str, Any] | None = None,
        stochastic: bool = False,
        epsilon: float = 0.2,
        num_features: int = 1024,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        fusion: str = "none",
        stem_blocks: Sequence[int] = (),
        **options: Any,
    ) -> None:
        here = type(self).__name__
        if len(dims) != len(depths) or len(dims) not in (1, len(REDUCTIONS)):
            raise ValueError(
                f"{here}: dims and depths must be of 1 or {len(REDUCTIONS)} stages, got {dims}, {depths}"
            )
        a_choice(here, "conv", conv, self.convs)
        for name, value in (("k", k), ("dilation", dilation)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{here}: {name} must be an int of at least 1 or None, got {value!r}")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"{here}: drop_path_rate must lie in [0, 1), got {drop_path_rate}")
        pyramid = len(dims) > 1
        widths, strides, taps = _stem_layers(here, dims[0], pyramid, stride, stem_blocks)
        total = _product(strides)
        # The same seed gives the same weights whatever the convolution and the fusion: what the layers draw
        # while they are made is undone, and `reset_parameters` draws what all networks share first.
        with torch.random.fork_rng(devices=[]):
            super().__init__(
                num_classes=num_classes,
                in_chans=in_chans,
                num_features=num_features,
                stride=total,
                # The first stage's keys, averaged over 4 x 4 nodes, must not vanish.
                min_side=REDUCTIONS[0] * total if pyramid else total,
                drop_rate=drop_rate,
                **options,
            )
            self.img_size = pair(img_size)
            self._check_side("img_size", *self.img_size)
            self.k_given, self.dilation_given = k is not None, dilation is not None
            self.collect_weights = False
            self._adapted = False
            self.dims, self.depths, self.conv = dims, depths, conv
            self.reductions: tuple[int, ...] = REDUCTIONS if pyramid else (1,)
            self.stem: ConvStem = MultiScaleStem(in_chans, widths, strides, taps, fusion, tuple(stem_blocks))
            grid = (self.img_size[0] // total, self.img_size[1] // total)
            self.pos_embed = nn.Parameter(torch.zeros(1, dims[0], *grid))

            count = sum(depths)
            neighbours, dilations = _schedule(9 if k is None else k, dilation, count, pyramid)
            drop_paths = torch.linspace(0, drop_path_rate, count, device="cpu").tolist()
            stages, block = [], 0
            for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
                downsample = Downsample(dims[stage - 1], dim) if stage else None
                blocks = []
                for _ in range(depth):
                    blocks.append(
                        Block(
                            dim,
                            neighbours[block],
                            dilations[block],
                            drop_path=drop_paths[block],
                            reduction=self.reductions[stage],
                            relative_grid=grid if pyramid else None,
                            conv=conv,
                            conv_options=conv_options,
                            stochastic=stochastic,
                            epsilon=epsilon,
                        )
                    )
                    block += 1
                stages.append(Stage(downsample, blocks))
                grid = _halved(grid)
            self.stages = nn.ModuleList(stages)
            self.neck: nn.Module = Projection(dims[-1], num_features, groups=1)
        self.feature_info = [
            {"num_chs": dim, "reduction": total * 2**stage, "module": f"stages.{stage}"}
            for stage, dim in enumerate(dims)
        ]
        self._fit_graphs(self.pos_embed.shape[2], self.pos_embed.shape[3])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As published: Kaiming normal, biases zero; relations and fusions as their modules describe."""
        later: list[nn.Module] = []
        for name, module in self.named_modules():
            if isinstance(module, RelationConv) or name.startswith(
                ("stem.align", "stem.project", "stem.fuse")
            ):
                later.append(module)
            elif ".conv.sum_projection" not in name:
                _reset(module)
        for module in later:
            _reset(module)
        if isinstance(self.stem, MultiScaleStem):
            self.stem.zero_fusion()

    def forward_features(self, x: Tensor, aux: dict[str, Any] | None = None) -> Tensor:
        """x (B, in_chans, H, W) to the last stage's nodes (B, h, w, C)."""
        return self._run(x, aux, len(self.stages))[-1]

    def pool(self, features: Tensor) -> Tensor:
        return self.neck(super().pool(features))

    def _run(self, x: Tensor, aux: dict[str, Any] | None, count: int) -> list[Tensor]:
        """The nodes (B, h, w, C) after each of the first `count` stages."""
        height, width = x.shape[2] // self.stride, x.shape[3] // self.stride
        if not torch.compiler.is_compiling():
            self._fit_graphs(height, width)
        position = resize_position(self.pos_embed, (height, width))
        nodes = self.stem(x) + position.flatten(2).mT
        graphs: list[Tensor] = []
        weights: list[Tensor] = []
        found = []
        stage: Any
        for stage in self.stages[:count]:
            if stage.downsample is not None:
                nodes = stage.downsample(nodes, (height, width))
                height, width = _halved((height, width))
            collect = self.collect_weights and aux is not None and self.conv in RELATIONS
            for block in stage.blocks:
                nodes, graph, of_edges = self.checkpoint(block, nodes, (height, width), collect)
                graphs.append(graph)
                if of_edges is not None:
                    weights.append(of_edges)
            found.append(nodes.unflatten(1, (height, width)))
        if aux is not None:
            aux["graphs"] = graphs
            if weights:
                aux["relation_weights"] = weights
        return found

    def _fit_graphs(self, height: int, width: int) -> None:
        """Raises where a k or dilation that was given exceeds this grid; warns once where one is limited."""
        if self._adapted and not (self.k_given or self.dilation_given):
            return
        grid = (height, width)
        stage: Any
        for stage, reduction in zip(self.stages, self.reductions, strict=True):
            keys = (grid[0] // reduction) * (grid[1] // reduction)
            for block in stage.blocks:
                graph = block.grapher.graph_conv.dynamic_graph
                k, dilation = graph.k, graph.dilation
                if k * dilation <= keys:
                    continue
                where = (
                    f"{self.name}: k * dilation = {k * dilation} exceeds the {keys} keys of a grid of {grid}"
                )
                what = f"(k={k}, dilation={dilation}, reduction={reduction})"
                if (self.k_given and k > keys) or self.dilation_given:
                    raise ValueError(f"{where} {what}")
                if not self._adapted:
                    _logger.warning("%s %s: graphs are limited to the keys there are", where, what)
                    self._adapted = True
            grid = _halved(grid)

    # timm's model interface

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        if coarse:
            blocks = [(r"^stages\.(\d+)", None)]
        return {"stem": r"^stem|^pos_embed", "blocks": [*blocks, (r"^neck", (99999,))]}

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's: the nodes after the stages `indices`, as "NCHW" or "NHWC" maps."""
        a_choice(self.name, "output_fmt", output_fmt, ("NCHW", "NHWC"))
        taken = taken_stages(self.name, len(self.stages), indices)
        self.check_input(x)
        with self.kernels():
            found = self._run(
                x, None, max(taken) + 1 if stop_early or intermediates_only else len(self.stages)
            )
        maps = [found[index] for index in taken]
        if output_fmt == "NCHW":
            maps = [nodes.permute(0, 3, 1, 2) for nodes in maps]
        return maps if intermediates_only else (found[-1], maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's: drop the stages after the last of `indices`, and the head."""
        taken = taken_stages(self.name, len(self.stages), indices)
        self.stages = self.stages[: max(taken) + 1]
        self.reductions = self.reductions[: max(taken) + 1]
        if prune_head:
            self.neck = nn.Identity()
            self.reset_classifier(0)
        return taken


def _reset(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (GroupedLinear, RelationConv)):
        module.reset_parameters()
    elif isinstance(module, LinearHead):
        for layer in (module.fc, module.va):
            if layer is not None:
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)


def _stem_layers(
    here: str, dim: int, pyramid: bool, stride: int | None, blocks: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Widths and strides of the stem's convolutions, and those whose maps a multi-scale stem taps."""
    known = (4, 2) if pyramid else (16, 8, 4)
    default = known[0]
    widths: tuple[int, ...] = (dim // 2, dim, dim)
    taps: tuple[int, ...] = (0, 1)
    if not pyramid:
        widths, taps = (dim // 8, dim // 4, dim // 2, dim, dim), (1, 2)
    if blocks:
        count = len(blocks)
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in blocks):
            raise ValueError(f"{here}: stem_blocks must be counts of at least 0, got {blocks!r}")
        default = min(default, 2**count)
        if dim % 2 ** (count - 1):
            raise ValueError(f"{here}: stem_blocks of {count} scales cannot double up to {dim} channels")
        if stride is not None and stride > 2**count:
            raise ValueError(f"{here}: stem_blocks of {count} scales halve {count} times, got {stride=}")
        widths = tuple(dim >> (count - 1 - layer) for layer in range(count))
        taps = tuple(range(max(count - 3, 0), count - 1))
    a_choice(here, "stride", default if stride is None else stride, known)
    halvings = (stride or default).bit_length() - 1
    # The finest maps are halved first: a smaller stride costs most where maps are already small.
    return widths, tuple(2 if layer < halvings else 1 for layer in range(len(widths))), taps


def _schedule(k: int, dilation: int | None, count: int, pyramid: bool) -> tuple[list[int], list[int]]:
    """k and dilation of every block, as published."""
    last = k if pyramid else 2 * k
    neighbours = [int(value) for value in torch.linspace(k, last, count, device="cpu").tolist()]
    if dilation is not None:
        return neighbours, [dilation] * count
    smallest = (PUBLISHED_SIDE // (32 if pyramid else 16)) ** 2
    most = max(min(smallest, MAX_NEIGHBOURS) // max(neighbours), 1)
    return neighbours, [min(block // 4 + 1, most) for block in range(count)]


def taken_stages(here: str, count: int, indices: int | list[int] | None) -> list[int]:
    """Stages as timm names them: the last so many, or these, negative from the end; None is all."""
    if indices is None or isinstance(indices, int):
        last = count if indices is None else indices
        indices = list(range(count - last, count))
    taken = [index + count if index < 0 else index for index in indices]
    if not taken or not all(0 <= index < count for index in taken):
        raise ValueError(f"{here}: indices must be of stages 0 to {count - 1}, got {indices}")
    return taken


def _halved(grid: tuple[int, int]) -> tuple[int, int]:
    return (grid[0] + 1) // 2, (grid[1] + 1) // 2


def _product(numbers: tuple[int, ...]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result


def checkpoint_filter_fn(state: StateDict, model: nn.Module) -> StateDict:
    """A state dict of ViG or Pyramid ViG, published or ours, in our names and for this model's grid."""
    if any(name.startswith("prediction.") for name in state):
        state = _translated(state)
    own = model.state_dict()
    fitted = {}
    for name, tensor in state.items():
        wanted = own.get(name)
        if name == "pos_embed" and wanted is not None and tensor.shape[:2] == wanted.shape[:2]:
            tensor = resize_position(tensor, (wanted.shape[2], wanted.shape[3]))
        if name.endswith(".relative_pos") and wanted is not None and tensor.shape != wanted.shape:
            # It is not trained: what the model made for its own grid is right.
            tensor = wanted
        fitted[name] = tensor
    return fitted


_INDEX = {"0": "linear", "1": "norm"}


def _translated(state: StateDict) -> StateDict:
    """Names and shapes of the published code in ours: 1 x 1 convolutions become matrices."""
    blocks = sorted({int(name.split(".")[1]) for name in state if name.startswith("backbone.")})
    places, stage, block = {}, 0, 0
    for index in blocks:
        if f"backbone.{index}.conv.0.weight" in state:  # between two stages
            stage, block = stage + 1, 0
            places[index] = f"stages.{stage}"
        else:
            places[index] = f"stages.{stage}.blocks.{block}"
            block += 1
    translated = {}
    for name, tensor in state.items():
        new = _translated_name(name, places)
        if new.endswith("weight") and tensor.dim() == 4 and tensor.shape[2:] == (1, 1) and "stem." not in new:
            tensor = tensor.flatten(1)
        translated[new] = tensor
    return translated


def _translated_name(name: str, places: dict[int, str]) -> str:
    found = re.match(r"backbone\.(\d+)\.(.*)", name)
    if found:
        place, rest = places[int(found[1])], found[2]
        if between := re.match(r"conv\.([01])\.(.*)", rest):
            return f"{place}.downsample.{('conv', 'norm')[int(between[1])]}.{between[2]}"
        if rest == "0.relative_pos":
            return f"{place}.grapher.graph_conv.dynamic_graph.relative_position.relative_pos"
        if convolved := re.match(r"0\.graph_conv\.gconv\.(nn1?|nn2|eps)(?:\.([01])\.(.*))?$", rest):
            part, index, parameter = convolved.groups()
            if part == "eps":
                return f"{place}.grapher.graph_conv.conv.eps"
            projection = "neighbour_projection" if part == "nn1" else "projection"
            return f"{place}.grapher.graph_conv.conv.{projection}.{_INDEX[index]}.{parameter}"
        if layer := re.match(r"([01])\.(fc[12])\.([01])\.(.*)", rest):
            part = ("grapher", "ffn")[int(layer[1])]
            return f"{place}.{part}.{layer[2]}.{_INDEX[layer[3]]}.{layer[4]}"
    elif predicted := re.match(r"prediction\.([014])\.(.*)", name):
        return {"0": "neck.linear.", "1": "neck.norm.", "4": "head.fc."}[predicted[1]] + predicted[2]
    return name


_Widths = tuple[int, ...]
_SIZES: dict[str, tuple[_Widths, _Widths]] = {  # channels and blocks of every stage
    "vig_ti": ((192,), (12,)),
    "vig_s": ((320,), (16,)),
    "vig_b": ((640,), (16,)),
    "pvig_ti": ((48, 96, 240, 384), (2, 2, 6, 2)),
    "pvig_s": ((80, 160, 400, 640), (2, 2, 6, 2)),
    "pvig_m": ((96, 192, 384, 768), (2, 2, 16, 2)),
    "pvig_b": ((128, 256, 512, 1024), (2, 2, 18, 2)),
}


def _cfg(**changes: Any) -> dict[str, Any]:
    published = {"crop_pct": 0.9, "interpolation": "bicubic"}
    return cfg(num_classes=1000, first_conv="stem.convs.0", **{**published, **changes})


default_cfgs = registry.default_cfgs(
    {name: _cfg(crop_pct=0.95) if name == "pvig_b" else _cfg() for name in _SIZES}
)


def _vig(name: str, pretrained: bool, kwargs: dict[str, Any]) -> ViG:
    dims, depths = _SIZES[name]
    return build(
        ViG,
        name,
        pretrained,
        filter_fn=checkpoint_filter_fn,
        feature_cfg={"feature_cls": "getter", "out_indices": tuple(range(len(dims)))},
        **{"dims": dims, "depths": depths, **kwargs},
    )


@register_model
def vig_ti(pretrained: bool = False, **kwargs: Any) -> ViG:
    """ViG-Ti: 192 channels, 12 blocks, 7.1 M parameters at 1000 classes."""
    return _vig("vig_ti", pretrained, kwargs)


@register_model
def vig_s(pretrained: bool = False, **kwargs: Any) -> ViG:
    """ViG-S: 320 channels, 16 blocks, 22.7 M parameters at 1000 classes."""
    return _vig("vig_s", pretrained, kwargs)


@register_model
def vig_b(pretrained: bool = False, **kwargs: Any) -> ViG:
    """ViG-B: 640 channels, 16 blocks, 86.8 M parameters at 1000 classes."""
    return _vig("vig_b", pretrained, kwargs)


@register_model
def pvig_ti(pretrained: bool = False, **kwargs: Any) -> ViG:
    """Pyramid ViG-Ti: 10.7 M parameters at 1000 classes."""
    return _vig("pvig_ti", pretrained, kwargs)


@register_model
def pvig_s(pretrained: bool = False, **kwargs: Any) -> ViG:
    """Pyramid ViG-S: 27.3 M parameters at 1000 classes."""
    return _vig("pvig_s", pretrained, kwargs)


@register_model
def pvig_m(pretrained: bool = False, **kwargs: Any) -> ViG:
    """Pyramid ViG-M: 51.7 M parameters at 1000 classes."""
    return _vig("pvig_m", pretrained, kwargs)


@register_model
def pvig_b(pretrained: bool = False, **kwargs: Any) -> ViG:
    """Pyramid ViG-B: 82.6 M parameters at 1000 classes."""
    return _vig("pvig_b", pretrained, kwargs)
