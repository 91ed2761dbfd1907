"""Face2Nodes (Jiang et al., Information Sciences 649:119640, 2023): a face as a dynamic graph of patches.

Paper-inspired: of the paper its abstract is public, not its equations, sizes or training. What follows is
this project's reading of it, on the published ViG (`vig`); each choice is an option.

=====================================================  ================================================
what the abstract states                               what is interpreted here, and the options
=====================================================  ================================================
An image becomes a graph; no landmarks.                Patches are nodes, as in ViG: `stride`, `img_size`.
Patch embedding by multi-scale feature fusion, for     The stem's maps of three scales, brought to one
"more discriminative graph node features".             grid: `fusion` = "concat" (default), "sum",
                                                       "gated", "kernels", or "none" (one scale);
                                                       `stem_blocks` deepens each scale.
A dynamic graph by dilated k-nearest neighbours.       ViG's schedules: `k`, `dilation`, `stochastic`.
A relation-aware graph convolution that learns         One relation vector an edge scores the edge, and
"latent informative correlations among different       weighs ViG's max-relative aggregation:
nodes".                                                `conv` = "rmr" (default); "rsum" sums instead,
                                                       "rgate" gates each channel, "rboth" takes maximum
                                                       and sum; "mr", "edge", "sage", "gin" have no
                                                       relation. `conv_options`: heads, relation_dim,
                                                       relation = "diff", "diff+pos", "diff+dist".
Sparse, against the redundancy of self-attention.      No dense attention anywhere.
Pre-trained and from-scratch training.                 ViG's weights load, and start unchanged.
Nothing on depth, width, or a pyramid.                 ViG's sizes; "nano" and "xs" for small faces;
                                                       `face2nodes_pyramid_ti` is a pyramid.
=====================================================  ================================================

Relations and fusions start as zero terms: with a ViG's weights the network starts as that ViG (unless
conv="rsum" or fusion="gated"), and learns what differs from it.

Keys of `FEROutput.aux`: as in `vig`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from . import registry, vig
from .layers.grapher import CONVS
from .registry import StateDict, build, cfg, register_model


class Face2Nodes(vig.ViG):
    """A `ViG` with a multi-scale patch embedding and a relation-aware graph convolution.

    Args:
        fusion: of the patch embedding; see `layers.stem.MultiScaleStem`.
        stem_blocks: residual blocks at each of the stem's scales, whose widths double to the nodes'; empty
            is ViG's stem. Small data wants them: a graph learns slowly what edges and corners are.
        conv: "rmr", "rsum", "rgate", "rboth", "mr", "edge", "sage" or "gin".
        conv_options: of that convolution; see `fer_kernels.nn.RelationConv`.

    The rest are those of `ViG`. For 112-pixel faces stride=8 keeps the 14 x 14 nodes of 224 pixels; for 48
    to 64 pixels it keeps 36 to 64 nodes, and stride=4 keeps 144 to 256.
    """

    convs = tuple(CONVS)

    def __init__(
        self,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        *,
        num_classes: int = 8,
        conv: str = "rmr",
        fusion: str = "concat",
        stem_blocks: Sequence[int] = (),
        **options: Any,
    ) -> None:
        super().__init__(
            dims,
            depths,
            num_classes=num_classes,
            conv=conv,
            fusion=fusion,
            stem_blocks=stem_blocks,
            **options,
        )


def checkpoint_filter_fn(state: StateDict, model: nn.Module) -> StateDict:
    """Our state dict for this model's grid; a ViG's, published or ours, gains what only Face2Nodes has."""
    state = vig.checkpoint_filter_fn(state, model)
    if any(name.startswith(_FUSION) or _is_relation(name) for name in state):
        return state
    for name, tensor in model.state_dict().items():
        if name not in state and (name.startswith(_FUSION) or _is_relation(name)):
            state[name] = tensor
    return state


_FUSION = ("stem.align.", "stem.project.", "stem.fuse.", "stem.gate.")


def _is_relation(name: str) -> bool:
    _, found, part = name.partition(".graph_conv.conv.")
    return bool(found) and part.split(".")[0] in ("relation", "a", "gate_weight", "sum_projection")


default_cfgs = registry.default_cfgs(
    {
        "face2nodes_nano": cfg(input_size=(3, 64, 64), first_conv="stem.convs.0"),
        "face2nodes_xs": cfg(input_size=(3, 48, 48), first_conv="stem.convs.0"),
        "face2nodes_ti": cfg(first_conv="stem.convs.0"),
        "face2nodes_s": cfg(first_conv="stem.convs.0"),
        "face2nodes_b": cfg(first_conv="stem.convs.0"),
        "face2nodes_pyramid_ti": cfg(first_conv="stem.convs.0"),
    }
)


def _face2nodes(name: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> Face2Nodes:
    return build(
        Face2Nodes,
        name,
        pretrained,
        filter_fn=checkpoint_filter_fn,
        feature_cfg={"feature_cls": "getter", "out_indices": tuple(range(len(defaults["dims"])))},
        **{**defaults, **kwargs},
    )


@register_model
def face2nodes_nano(pretrained: bool = False, **kwargs: Any) -> Face2Nodes:
    """64 channels, 4 blocks, k = 5, 8 x 8 nodes at 64 pixels; for tests and for quick experiments."""
    defaults = {"dims": (64,), "depths": (4,), "img_size": 64, "k": 5, "num_features": 256}
    return _face2nodes("face2nodes_nano", pretrained, {**defaults, "stem_blocks": (1, 1, 1)}, kwargs)


@register_model
def face2nodes_xs(pretrained: bool = False, **kwargs: Any) -> Face2Nodes:
    """128 channels, 6 blocks after a residual stem; 6 x 6 nodes at 48 pixels, 14 x 14 at 112."""
    defaults = {"dims": (128,), "depths": (6,), "img_size": 48, "num_features": 512, "drop_path_rate": 0.1}
    return _face2nodes("face2nodes_xs", pretrained, {**defaults, "stem_blocks": (2, 3, 3)}, kwargs)


@register_model
def face2nodes_ti(pretrained: bool = False, **kwargs: Any) -> Face2Nodes:
    """The size of ViG-Ti: 192 channels, 12 blocks."""
    defaults = {"dims": (192,), "depths": (12,), "drop_path_rate": 0.1}
    return _face2nodes("face2nodes_ti", pretrained, defaults, kwargs)


@register_model
def face2nodes_s(pretrained: bool = False, **kwargs: Any) -> Face2Nodes:
    """The size of ViG-S: 320 channels, 16 blocks."""
    defaults = {"dims": (320,), "depths": (16,), "drop_path_rate": 0.1}
    return _face2nodes("face2nodes_s", pretrained, defaults, kwargs)


@register_model
def face2nodes_b(pretrained: bool = False, **kwargs: Any) -> Face2Nodes:
    """The size of ViG-B: 640 channels, 16 blocks."""
    defaults = {"dims": (640,), "depths": (16,), "drop_path_rate": 0.1}
    return _face2nodes("face2nodes_b", pretrained, defaults, kwargs)


@register_model
def face2nodes_pyramid_ti(pretrained: bool = False, **kwargs: Any) -> Face2Nodes:
    """The size of Pyramid ViG-Ti: 48 to 384 channels in four stages."""
    defaults = {"dims": (48, 96, 240, 384), "depths": (2, 2, 6, 2), "drop_path_rate": 0.1}
    return _face2nodes("face2nodes_pyramid_ti", pretrained, defaults, kwargs)
