"""JADFER (Gao et al., IEEE TAFFC 2024), paper-inspired: discriminative regions query the context of the
face, in attention that drops what all queries attend to alike.

Only the paper's abstract is public to us. What it states and what is our interpretation:

========================  =================================  ===============================================
part                      the paper's abstract               here [interpreted], and other readings
========================  =================================  ===============================================
features                  not stated                         a residual stem to 14 x 14; backbone=any timm
                                                             model, its level by reduction
spatial branch            N parallel paths to different      N = 4 sigmoid maps A_n, each a LANet, on
                          discriminative regions             convolved features; paths, path_kernel
its tokens                not stated                         a token a path; sb_tokens="grid": a token a
                                                             place of max_n A_n ⊙ F
variety loss              guides the paths apart             mean cosine of the maps; variety="hinge" |
                                                             "partition" | "token" (of the tokens)
contextual branch         self-attention with JAD            4 pre-norm blocks on [cls; features]
interaction               the spatial features query the     2 blocks of cross-attention with JAD
                          contextual ones, with JAD
JAD                       drops the joint attention in the   keys that attract attention from all queries:
                          weight matrix, dropping similar    jad="key"; "soft", "entry" (literally similar
                          activations                        activations); beta, max_drop, soft, tau,
                                                             joint_over
when it drops             not stated                         training, every head with probability jad_p;
                                                             jad_p_last, jad_eval="on"
classifier                not stated                         on [mean of the path tokens; cls];
                                                             readout="mean"
loss                      cross-entropy and variety loss     weights 1 and 0.5; cls_weight for one of cls
========================  =================================  ===============================================

Controls behind the same options: jad="none", "attn_dropout" (of weights, with jad_p), "dropkey" (keys at
random with max_drop) and "random" (as many keys as "key" drops, at random).

Keys of `FEROutput.aux`: "path_maps" (B, N, h, w), "path_tokens" (B, Q, dim), that query (Q = N, or h·w),
"column_means", "drop_masks": empty lists, but with `collect_stats` a tensor for each attention of the
contextual branch and then of the interaction, as in `fer_kernels.JADStats`; and with cls_weight > 0
"cls_logits" (B, classes).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fer_kernels.checks import a_choice
from fer_kernels.nn import JADAttention, JADBlock, drop_schedule

from .base import FERModel, pair, resize_position
from .layers.backbone import channels_first, create_levels, set_checkpointing
from .layers.stem import ConvSequence, Residual, channels_last
from .losses import CCC, VARIETIES, CrossEntropy, Term, Variety
from .registry import StateDict, build, cfg, default_cfgs, register_model

JAD_MODES = ("key", "soft", "entry", "none", "attn_dropout", "dropkey", "random")
SB_TOKENS = ("path", "grid")
READOUTS = ("concat", "mean")
GRID = 14  # the places a side that a backbone's level is chosen for


class ResidualStem(nn.Sequential):
    """x (B, in_chans, H, W) to (B, widths[-1], H / r, W / r), r = 2 ** len(widths): a width is a convolution
    of stride 2 and that many residual blocks."""

    def __init__(self, in_chans: int, widths: Sequence[int], blocks: Sequence[int]) -> None:
        levels = []
        for inputs, width, count in zip((in_chans, *widths[:-1]), widths, blocks, strict=True):
            levels.append(
                ConvSequence(
                    nn.Conv2d(inputs, width, 3, stride=2, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                    *(Residual(width) for _ in range(count)),
                )
            )
        super().__init__(*levels)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(channels_last(x))


class SpatialBranch(nn.Module):
    """Features (B, C, h, w) to N maps A (B, N, h, w) in (0, 1) and the tokens that query, (B, N or h·w, dim).

    A_n is a LANet: 1 x 1 convolution to C / reduction, batch norm, ReLU, 1 x 1 to one, batch norm, sigmoid. A
    path's token is W_s (Σ A_n F_n / Σ A_n) with F_n = A_n ⊙ ReLU(BN(Conv_n(F))); on the grid a token is the
    projection of max_n A_n ⊙ F. The paths run side by side, as one (grouped) convolution.
    """

    def __init__(
        self,
        channels: int,
        dim: int,
        paths: int,
        path_dim: int,
        path_kernel: int,
        reduction: int,
        tokens: str,
    ) -> None:
        super().__init__()
        self.paths, self.tokens = paths, tokens
        squeezed = max(channels // reduction, 1) * paths
        self.squeeze = nn.Conv2d(channels, squeezed, 1, bias=False)
        self.squeeze_norm = nn.BatchNorm2d(squeezed)
        self.score = nn.Conv2d(squeezed, paths, 1, groups=paths, bias=False)
        self.score_norm = nn.BatchNorm2d(paths)
        if tokens == "path":
            self.conv = nn.Conv2d(
                channels, paths * path_dim, path_kernel, padding=path_kernel // 2, bias=False
            )
            self.norm = nn.BatchNorm2d(paths * path_dim)
        self.project = nn.Linear(path_dim if tokens == "path" else channels, dim)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.score_norm(self.score(F.relu(self.squeeze_norm(self.squeeze(features))))).sigmoid()
        if self.tokens == "grid":
            strongest = maps.amax(1, keepdim=True) * features
            return maps, self.project(strongest.flatten(2).mT)
        values = F.relu(self.norm(self.conv(features))).unflatten(1, (self.paths, -1)).flatten(3)
        a = maps.flatten(2)
        # Σ A_n F_n = Σ A_n² Conv_n(F)
        gathered = (values @ a.square().unsqueeze(3)).squeeze(3)
        return maps, self.project(gathered / a.sum(2, keepdim=True).clamp(min=1e-6))


class JADFER(FERModel):
    """Features, a spatial branch of N paths, a contextual branch, and their interaction, both with JAD.

    Args:
        stem: widths of the built-in stem, each halving the map; stem_blocks: residual blocks at each.
        backbone: name of a timm model in its place, with backbone_weights and backbone_options as in
            `layers.backbone.create_backbone`.
        reduction: of the backbone's level; None takes the one that leaves about 14 x 14 of img_size.
        dim, depth, num_heads, mlp_ratio: of the contextual branch's blocks; sci_depth: blocks of interaction.
        paths, path_dim, path_kernel, squeeze: of the spatial branch; path_dim None is the features' width.
        sb_tokens: "path" or "grid".
        readout: "concat" of the mean query and cls, or "mean" of the queries alone.
        jad: "key", "soft", "entry"; or a control: "none", "attn_dropout", "dropkey", "random".
        jad_p: with which probability a head drops; for "attn_dropout" the dropout.
        jad_p_last: in the contextual branch's last block, linear from jad_p in the first; None is jad_p.
        jad_eval: "off" or "on".
        jad_options: more of `fer_kernels.nn.JADAttention`'s: beta, max_drop, protect, soft, tau, joint_over.
        generator: what gates and noise are drawn from; None is torch's own, which torch.compile and gradient
            checkpointing need.
        variety: kind of the variety loss: "cosine", "hinge", "partition" or "token"; variety_weight of it.
        cls_weight: of a cross-entropy of cls alone, which gets a classifier where this is above 0.
        img_size: what the position embedding is made for; any input that the reduction divides works.
        drop_path_rate: of the last block, linear from 0 in the first.
        attn_proj_drop: dropout of the blocks' outputs.
        num_classes, in_chans, drop_rate, head, head_options, valence_arousal, backend: as in `FERModel`.
    """

    output_fmt = "NLC"

    head_prefixes = ("head.", "cls_head.")

    def __init__(
        self,
        *,
        stem: Sequence[int] = (64, 128, 256),
        stem_blocks: Sequence[int] = (1, 1, 2),
        backbone: str | None = None,
        backbone_weights: bool | str | os.PathLike = False,
        backbone_options: dict[str, Any] | None = None,
        reduction: int | None = None,
        dim: int = 384,
        depth: int = 4,
        num_heads: int = 8,
        mlp_ratio: float = 3.0,
        sci_depth: int = 2,
        paths: int = 4,
        path_dim: int | None = None,
        path_kernel: int = 1,
        squeeze: int = 16,
        sb_tokens: str = "path",
        readout: str = "concat",
        jad: str = "key",
        jad_p: float = 0.5,
        jad_p_last: float | None = None,
        jad_eval: str = "off",
        jad_options: dict[str, Any] | None = None,
        generator: torch.Generator | None = None,
        variety: str = "cosine",
        variety_weight: float = 0.5,
        cls_weight: float = 0.0,
        img_size: int | tuple[int, int] = 112,
        num_classes: int = 8,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        attn_proj_drop: float = 0.0,
        **options: Any,
    ) -> None:
        here = type(self).__name__
        for name, value, choices in (
            ("jad", jad, JAD_MODES),
            ("sb_tokens", sb_tokens, SB_TOKENS),
            ("readout", readout, READOUTS),
            ("variety", variety, (*VARIETIES, "token")),
        ):
            a_choice(here, name, value, choices)
        if variety == "token" and sb_tokens != "path":
            raise ValueError(f"{here}: variety='token' compares the paths' tokens: sb_tokens must be 'path'")
        for name, count in (
            ("paths", paths),
            ("depth", depth),
            ("sci_depth", sci_depth),
            ("squeeze", squeeze),
        ):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{here}: {name} must be an int of at least 1, got {count!r}")
        if path_kernel < 1 or path_kernel % 2 == 0:
            raise ValueError(f"{here}: path_kernel must be odd, got {path_kernel}")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"{here}: drop_path_rate must lie in [0, 1), got {drop_path_rate}")
        size = pair(img_size)
        network: nn.Module
        if backbone is None:
            if not stem or len(stem) != len(stem_blocks):
                raise ValueError(
                    f"{here}: stem and stem_blocks must be of one length, got {stem}, {stem_blocks}"
                )
            if reduction not in (None, 2 ** len(stem)):
                raise ValueError(f"{here}: this stem reduces by {2 ** len(stem)}, got reduction={reduction}")
            network, channels, reduction = (
                ResidualStem(in_chans, stem, stem_blocks),
                stem[-1],
                2 ** len(stem),
            )
        else:
            if reduction is None:
                reduction = 2 ** max(round(min(size) / GRID).bit_length() - 1, 0)
            network = create_levels(
                here,
                backbone,
                reduction,
                in_chans=in_chans,
                weights=backbone_weights,
                **(backbone_options or {}),
            )
            channels = network.feature_info.channels()[-1]  # type: ignore[union-attr,operator]
        super().__init__(
            num_classes=num_classes,
            in_chans=in_chans,
            num_features=2 * dim if readout == "concat" else dim,
            stride=reduction,
            min_side=2 * reduction,
            **options,
        )
        if size[0] % reduction or size[1] % reduction:
            raise ValueError(f"{here}: img_size must be a multiple of {reduction}, got {img_size}")
        self.img_size, self.readout, self.collect_stats = img_size, readout, False
        self.variety, self.variety_weight, self.cls_weight = variety, variety_weight, cls_weight
        self.network = network
        self.is_stem = backbone is None
        self.spatial = SpatialBranch(
            channels, dim, paths, path_dim or channels, path_kernel, squeeze, sb_tokens
        )
        self.embed = nn.Linear(channels, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, dim, size[0] // reduction, size[1] // reduction))

        dropped = drop_schedule(jad_p, depth, jad_p if jad_p_last is None else jad_p_last)
        dropped += [jad_p] * sci_depth
        drop_paths = torch.linspace(0, drop_path_rate, depth + sci_depth, device="cpu").tolist()
        blocks = [
            JADBlock(
                dim,
                num_heads,
                context_dim=None if layer < depth else dim,
                mlp_ratio=mlp_ratio,
                proj_drop=attn_proj_drop,
                drop_path=drop_paths[layer],
                generator=generator,
                eval_mode=jad_eval,
                **_jad(jad, dropped[layer]),
                **(jad_options or {}),
            )
            for layer in range(depth + sci_depth)
        ]
        self.context, self.interaction = nn.ModuleList(blocks[:depth]), nn.ModuleList(blocks[depth:])
        self.norm_queries = nn.LayerNorm(dim, eps=1e-6)
        self.norm_cls = nn.LayerNorm(dim, eps=1e-6)
        self.cls_head: nn.Module | None = self._cls_head()
        self._initialise()

    def _initialise(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for part in (self.context, self.interaction, self.embed, self.spatial.project):
            for layer in part.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.trunc_normal_(layer.weight, std=0.02)
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)
        for module in (self.network, self.spatial) if self.is_stem else (self.spatial,):
            for layer in module.modules():
                if isinstance(layer, nn.Conv2d):
                    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def _cls_head(self) -> nn.Module | None:
        wanted = self.cls_weight > 0 and self.num_classes > 0
        return nn.Linear(self.cls_token.shape[-1], self.num_classes) if wanted else None

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            raise ValueError(f"{self.name}: there is no global_pool to choose, got {global_pool!r}")
        super().reset_classifier(num_classes)
        head = self._cls_head()
        self.cls_head = None if head is None else head.to(self.cls_token.device, self.cls_token.dtype)

    def set_generator(self, generator: torch.Generator | None) -> None:
        """What gates and noise are drawn from; None is torch's own."""
        for module in self.modules():
            if isinstance(module, JADAttention):
                module.generator = generator

    def forward_features(self, x: Tensor, aux: dict[str, Any] | None = None) -> Tensor:
        """x (B, in_chans, H, W) to [cls; queries] (B, 1 + Q, dim), after the interaction."""
        if self.is_stem:
            maps = x
            for level in self.network.children():
                maps = self.checkpoint(level, maps)
        else:
            maps = channels_first(self.network, self.network(x)[-1])
        path_maps, queries = self.spatial(maps)
        position = resize_position(self.pos_embed, (maps.shape[2], maps.shape[3]))
        tokens = self.embed(maps.flatten(2).mT) + position.flatten(2).mT
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(tokens.dtype), tokens], 1)
        if aux is not None:
            aux |= {"path_maps": path_maps, "path_tokens": queries, "column_means": [], "drop_masks": []}
        for block in self.context:
            tokens = self._attend(block, aux, tokens)
        for block in self.interaction:
            queries = self._attend(block, aux, queries, tokens)
        return torch.cat([self.norm_cls(tokens[:, :1]), self.norm_queries(queries)], 1)

    def _attend(self, block: nn.Module, aux: dict[str, Any] | None, *inputs: Tensor) -> Tensor:
        if aux is None or not self.collect_stats:
            return self.checkpoint(block, *inputs)
        out, stats = block(*inputs, return_stats=True)
        aux["column_means"].append(stats.column_mean)
        aux["drop_masks"].append(stats.mask)
        return out

    def pool(self, features: Tensor) -> Tensor:
        queries = features[:, 1:].mean(1)
        return torch.cat([queries, features[:, 0]], 1) if self.readout == "concat" else queries

    def classify(
        self, embedding: Tensor, features: Tensor, aux: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if aux is not None and self.cls_head is not None:
            aux["cls_logits"] = self.cls_head(features[:, 0])
        return super().classify(embedding, features, aux)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        own = [m for m in self.modules() if isinstance(m, JADAttention) and m.generator is not None]
        if enable and own:
            raise ValueError(
                f"{self.name}: gradient checkpointing draws the gates twice, and only torch's own generator "
                f"is rewound between: call set_generator(None) first"
            )
        super().set_grad_checkpointing(enable)
        if not self.is_stem:
            set_checkpointing(self.network, enable)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^network|^embed|^cls_token|^pos_embed",
            "blocks": [
                (r"^context\.(\d+)", None),
                (r"^spatial|^interaction|^norm_", (99999,)),
            ],
        }

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}

    def loss_terms(self) -> list[Term]:
        """Cross-entropy, variety, cls's cross-entropy where it has a classifier, and CCC."""
        token = self.variety == "token"
        variety = Variety("cosine", aux="path_tokens") if token else Variety(self.variety)
        terms = [
            Term("cross_entropy", 1.0, CrossEntropy()),
            Term("variety", self.variety_weight, variety),
        ]
        if self.cls_head is not None:
            terms.append(Term("cls", self.cls_weight, CrossEntropy(aux="cls_logits")))
        if self.valence_arousal:
            terms.append(Term("ccc", 1.0, CCC()))
        return terms


def _jad(jad: str, p: float) -> dict[str, Any]:
    """`JADAttention`'s options for one of our modes."""
    if jad == "none":
        return {"drop": "none", "p": 0.0}
    if jad == "attn_dropout":
        return {"drop": "none", "p": 0.0, "attn_drop": p}
    return {"drop": jad, "p": p}


def checkpoint_filter_fn(state: StateDict, model: nn.Module) -> StateDict:
    """A state dict of another grid of tokens, for this model's."""
    own, there = model.state_dict()["pos_embed"], state.get("pos_embed")
    if there is not None and there.dim() == 4 and there.shape[:2] == own.shape[:2]:
        state = {**state, "pos_embed": resize_position(there, (own.shape[2], own.shape[3]))}
    return state


_STEM = {"first_conv": "network.0.0"}

default_cfgs = default_cfgs(  # type: ignore[assignment]
    {
        "jadfer": cfg(input_size=(3, 112, 112), **_STEM),
        "jadfer_s": cfg(input_size=(3, 112, 112), **_STEM),
        "jadfer_xs": cfg(input_size=(3, 48, 48), **_STEM),
        "jadfer_resnet18": cfg(input_size=(3, 224, 224), first_conv="network.conv1"),
    }
)


@register_model
def jadfer(pretrained: bool = False, **kwargs: Any) -> JADFER:
    """JADFER for faces of 112 px: 14 x 14 tokens of width 384."""
    return build(JADFER, "jadfer", pretrained, filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def jadfer_s(pretrained: bool = False, **kwargs: Any) -> JADFER:
    """A smaller JADFER for faces of 112 px: tokens of width 256."""
    small = {"stem": (48, 96, 192), "stem_blocks": (1, 1, 1), "dim": 256}
    return build(JADFER, "jadfer_s", pretrained, filter_fn=checkpoint_filter_fn, **{**small, **kwargs})


@register_model
def jadfer_xs(pretrained: bool = False, **kwargs: Any) -> JADFER:
    """A small JADFER for faces of 48 px and training from scratch."""
    small = {
        **{"stem": (32, 64, 128), "stem_blocks": (1, 1, 1), "dim": 192, "depth": 3, "num_heads": 6},
        **{"mlp_ratio": 2.0, "img_size": 48},
    }
    return build(JADFER, "jadfer_xs", pretrained, filter_fn=checkpoint_filter_fn, **{**small, **kwargs})


@register_model
def jadfer_resnet18(pretrained: bool = False, **kwargs: Any) -> JADFER:
    """JADFER on a resnet18 of timm, 224 px."""
    options = {"backbone": "resnet18", "img_size": 224, **kwargs}
    return build(JADFER, "jadfer_resnet18", pretrained, filter_fn=checkpoint_filter_fn, **options)
