"""Emotion-GCN (Antoniadis, Filntisis, Maragos, FG 2021): a classifier written by a label graph.

The paper's code is public, so this system is the published one, but for what the last column switches:

=======================  ==========================================  =====================================
part                     published                                   other readings
=======================  ==========================================  =====================================
backbone                 densenet121, no ReLU after its last norm    backbone, final_relu
pooling                  maximum over the 7 x 7 features             global_pool="avg" | "avgmax"
label graph              |Spearman| on AffectNet at 0.1, reweighted  adjacency="spearman" | "conditional" |
                         with 0.5, no links between expressions      "identity" | "full" | a tensor
Â                        Aᵀ (the code's normalisation)               norm="sym" | "row"
A                        constant                                    head_options: learn_adjacency
word vectors             GloVe, 300-d; their file is no part of it   embeddings="table" (default: sentence
                                                                     embeddings in this package) |
                                                                     "learned" | path of a GloVe file
classes                  7, valence and arousal                      num_classes=8: contempt has disgust's
                                                                     correlations [interpreted]
loss                     cross-entropy + CCC, both weight 1          Criterion.for_model(model, ccc=...,
                                                                     compat=True, class_weights=...)
input                    227 px                                      any side from 32 px; 224 px is usual
=======================  ==========================================  =====================================

The published training weights the classes by `AFFECTNET_CLASS_WEIGHTS`. `compat=True` is the published CCC,
which mixes two conventions of the variance. A published state dict loads by name (`checkpoint_filter_fn`),
into a model with the 300-d word vectors it was trained with.

Keys of `FEROutput.aux`: none.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import FERModel
from .layers.backbone import (
    create_backbone,
    feature_map,
    feature_width,
    prefixed_groups,
    set_checkpointing,
)
from .registry import StateDict, build, cfg, default_cfgs, register_model

# 3,803 over the images of AffectNet's training set: neutral, happy, sad, surprise, fear, disgust, anger
AFFECTNET_CLASS_WEIGHTS = tuple(3803 / n for n in (74874, 134415, 25459, 14090, 6378, 3803, 24882))

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


class EmotionGCN(FERModel):
    """A timm backbone with a `LabelGraphHead`.

    Args:
        backbone: name of a timm model.
        backbone_weights: of `layers.backbone.create_backbone`: False, True (timm downloads them) or a path.
        final_relu: the ReLU after a densenet's last norm, which the published model goes without.
        adjacency, embeddings, norm: of `LabelGraphHead`; more of its options through `head_options`. The
            head "linear" takes none of them.
        img_size: only backbones of fixed input size take it.
        drop_path_rate: of backbones that have stochastic depth.
        num_classes, in_chans, drop_rate, head, head_options, valence_arousal, global_pool, backend: as in
            `FERModel`.
    """

    def __init__(
        self,
        *,
        backbone: str = "densenet121",
        backbone_weights: bool | str | os.PathLike = False,
        final_relu: bool = False,
        num_classes: int = 7,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 224,
        drop_path_rate: float = 0.0,
        head: str = "label_graph",
        head_options: dict[str, Any] | None = None,
        adjacency: str | Tensor | Sequence[Sequence[float]] = "auto",
        embeddings: str | os.PathLike | Tensor | Sequence[Sequence[float]] = "auto",
        norm: str = "code",
        valence_arousal: bool = True,
        global_pool: str = "max",
        **options: Any,
    ) -> None:
        network = create_backbone(
            type(self).__name__,
            backbone,
            in_chans=in_chans,
            weights=backbone_weights,
            drop_path_rate=drop_path_rate,
        )
        if head == "label_graph":
            head_options = {
                "adjacency": adjacency,
                "embeddings": embeddings,
                "norm": norm,
                **(head_options or {}),
            }
        super().__init__(
            num_classes=num_classes,
            in_chans=in_chans,
            num_features=feature_width(network),
            stride=1,
            min_side=32,
            head=head,
            head_options=head_options,
            valence_arousal=valence_arousal,
            global_pool=global_pool,
            **options,
        )
        if backbone.startswith("densenet") and not final_relu:
            network.features.norm5.act = nn.Identity()  # type: ignore[union-attr]
        self.img_size = img_size
        self.backbone = network

    def forward_features(self, x: Tensor, aux: dict[str, Any] | None = None) -> Tensor:
        """x (B, in_chans, H, W) to the backbone's last features (B, num_features, h, w)."""
        return feature_map(self.backbone, x)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        super().set_grad_checkpointing(enable)
        set_checkpointing(self.backbone, enable)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return prefixed_groups(self.backbone, "backbone", coarse)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        found = {f"backbone.{name}" for name in getattr(self.backbone, "no_weight_decay", set)()}
        own = {name for name, _ in self.named_parameters()}
        return (found | {"head.vectors", "head.adjacency"}) & own


def checkpoint_filter_fn(state: StateDict, model: nn.Module) -> StateDict:
    """The published state dict's names translated to this model's; others as they are.

    It holds no word vectors: those are the model's own, and must be the ones it was trained with.
    """
    if "gc1.weight" not in state:
        return state
    own = model.state_dict()
    width = state["gc1.weight"].shape[0]
    if "head.vectors" in own and own["head.vectors"].shape[1] != width:
        raise ValueError(
            f"EmotionGCN: the published weights were trained with {width}-d word vectors, this model has "
            f"{own['head.vectors'].shape[1]}-d ones; make it with embeddings=<path of the GloVe text file>"
        )
    translated = {"A": "head.adjacency", "gc1.weight": "head.gc1.weight", "gc2.weight": "head.gc2.weight"}
    found = {translated.get(name, f"backbone.{name}"): tensor for name, tensor in state.items()}
    if "head.vectors" in own:
        found["head.vectors"] = own["head.vectors"]
    return found


_CFG: dict[str, Any] = {**IMAGENET, "num_classes": 7, "classifier": "head"}

default_cfgs = default_cfgs(  # type: ignore[assignment]
    {
        "emotion_gcn": cfg(**_CFG, first_conv="backbone.features.conv0"),
        "emotion_gcn_resnet18": cfg(**_CFG, first_conv="backbone.conv1"),
    }
)


@register_model
def emotion_gcn(pretrained: bool = False, **kwargs: Any) -> EmotionGCN:
    """Emotion-GCN as published: densenet121, 7 classes, valence and arousal."""
    return build(EmotionGCN, "emotion_gcn", pretrained, filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def emotion_gcn_resnet18(pretrained: bool = False, **kwargs: Any) -> EmotionGCN:
    """Emotion-GCN's label graph on a resnet18."""
    options = {"backbone": "resnet18", **kwargs}
    return build(EmotionGCN, "emotion_gcn_resnet18", pretrained, filter_fn=checkpoint_filter_fn, **options)
