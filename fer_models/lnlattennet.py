"""LNLAttenNet (Shi et al., Machine Intelligence Research 2024), paper-inspired: local networks for regions of
the face, and a non-local attention over the regions that weighs them.

Only the paper's abstract is public to us. What it states and what is our interpretation:

========================  =================================  ===============================================
part                      the paper's abstract               here [interpreted], and other readings
========================  =================================  ===============================================
features                  a U-Net, no landmarks              4 levels down, up to stride 4; widths, stride,
                                                             encoder="resnet18" (any timm model)
regions                   local facial regions               4 x 4 grid; layout="overlap" | "5crop" | "rows"
                                                             | boxes; grid, overlap, crop
local part                an ensemble of local networks      two convolutions a region, unshared; share=True;
                                                             local_dim; ensemble="wvote"
attention                 non-local, over the regions        embedded Gaussian on pooled region tokens;
                                                             nl_domain="pixel", attn="se", temperature
feedback                  the weights are fed into the       ẑ_r = R w_r z_r; feedback="logit" | "map" |
                          local part                         "none"
weights                   gradually updated                  a moving average over the data (region_average,
                                                             momentum); prior=True feeds it back
fusion                    global and local information       logits = local + eta · global; eta=0, "learned"
loss                      not stated                         CE(local) + 0.5 Σ_r w_r CE(region r)
                                                             + 0.5 CE(global); entropy_weight, main_loss
========================  =================================  ===============================================

The region weights are constants in Σ_r w_r CE(region r): otherwise all weight on the easiest region is the
easiest way down. In the fused logits they are not, so that the cross-entropy of the local part trains the
attention, and the attention scales what each local network learns: the two-way feedback.

Keys of `FEROutput.aux`: "region_weights" (B, R), "region_boxes" (R, 4) as shares of the sides (left, top,
right, bottom), and where there is a classifier "local_logits" (B, R, classes), "global_logits" (B, classes)
and "ensemble_logits" (B, classes), those of the local part alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fer_kernels.checks import a_choice

from .base import FERModel
from .layers.backbone import set_checkpointing
from .layers.regions import LocalClassifiers, LocalNets, crop_regions, region_boxes
from .layers.unet import ConvEncoder, TimmEncoder, UNet
from .losses import CCC, CrossEntropy, RegionCrossEntropy, RegionEntropy, Term
from .output import FEROutput
from .registry import build, cfg, default_cfgs, register_model

FEEDBACKS = ("scale", "logit", "map", "none")
ATTENTIONS = ("nonlocal", "se")
DOMAINS = ("token", "pixel")
ENSEMBLES = ("concat", "wvote")
MAIN_LOSSES = ("ensemble", "final")


class NonLocal(nn.Module):
    """T + W_z (A g(T)) with A = softmax(θ(T) φ(T)ᵀ / √c'), tokens (B, N, dim), c' = dim / 2."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        inner = max(dim // 2, 1)
        self.theta, self.phi, self.g = (nn.Linear(dim, inner) for _ in range(3))
        self.out = nn.Linear(inner, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        gathered = F.scaled_dot_product_attention(self.theta(tokens), self.phi(tokens), self.g(tokens))
        return tokens + self.out(gathered)


class RegionAttention(nn.Module):
    """Crops (B, R, C, h, w) to region vectors U (B, R, C) and scores s (B, R).

    attn="nonlocal": s_r = vᵀ tanh(W_s U_r), with U the region tokens after a non-local block (domain
    "token"), or the regions' means of all pixels after one ("pixel"). attn="se": squeeze and excitation of
    the regions' means, with U the tokens as they are.
    """

    def __init__(self, dim: int, regions: int, attn: str, domain: str) -> None:
        super().__init__()
        self.attn, self.domain = attn, domain
        if attn == "se":
            squeezed = max(regions // 2, 2)
            self.excite = nn.Sequential(nn.Linear(regions, squeezed), nn.ReLU(), nn.Linear(squeezed, regions))
        else:
            self.non_local = NonLocal(dim)
            self.project = nn.Linear(dim, max(dim // 2, 1))
            self.score = nn.Linear(max(dim // 2, 1), 1, bias=False)

    def forward(self, features: Tensor, crops: Tensor, boxes: Sequence[Any]) -> tuple[Tensor, Tensor]:
        if self.attn == "se":
            tokens = crops.mean((3, 4))
            return tokens, self.excite(tokens.mean(2))
        if self.domain == "pixel":
            pixels = self.non_local(features.flatten(2).mT)
            crops = crop_regions(pixels.mT.reshape(features.shape), boxes)
            tokens = crops.mean((3, 4))
        else:
            tokens = self.non_local(crops.mean((3, 4)))
        return tokens, self.score(torch.tanh(self.project(tokens))).squeeze(2)


class LNLAttenNet(FERModel):
    """A U-Net's features, cut into R regions, each with a local network, weighed by non-local attention.

    Args:
        widths: channels of the U-Net's levels, strides 1, 2, 4 ..., the last being the bottleneck; with a
            timm encoder only their number counts: how far down it goes.
        encoder: "conv", or the name of a timm model whose levels are the way down.
        encoder_weights: of a timm encoder, see `layers.backbone.create_backbone`.
        feature_stride: of the features that are cut into regions.
        layout, grid, overlap, crop: of `layers.regions.region_boxes`.
        local_dim: width of a local network and of its vector z_r.
        share: one local network for all regions.
        attn: "nonlocal" or "se"; nl_domain: "token" or "pixel".
        temperature: of the softmax over regions.
        feedback: how the weights reach the local part: "scale" (ẑ_r = R w_r z_r), "map" (the crop is scaled),
            "logit" (the local logits are Σ_r w_r o_r, and no classifier reads all regions at once) or "none".
        ensemble: "concat" (one classifier reads all ẑ_r), or "wvote" (the final probabilities are
            Σ_r w_r softmax(o_r), without the global ones).
        eta: factor of the global logits in the final ones, a number or "learned" (from 1).
        momentum: of `region_average`, the moving average of the weights over training batches.
        prior: add the average's logarithm to the scores. Averaged are the weights without it.
        local_weight, global_weight, entropy_weight, entropy_floor: of the losses of the regions, of the
            global logits, and of the entropy of the weights (see `losses.region_entropy`).
        stop_gradient: the weights are constants in the regions' loss.
        main_loss: whether the first cross-entropy is of the local part ("ensemble") or of the final logits.
        img_size: the usual side; any that the U-Net divides works.
        drop_path_rate: of timm encoders that have stochastic depth.
        num_classes, in_chans, drop_rate, head, head_options, valence_arousal, backend: as in `FERModel`. The
            head reads all ẑ_r together; with feedback="logit" or ensemble="wvote" only for valence
            and arousal.

    `region_average` (R,) is a buffer, uniform at first. In distributed training it averages over all
    processes, which therefore must all train in step, as they do under DDP.
    """

    region_average: Tensor

    head_prefixes = ("head.", "local_heads.", "global_head.")

    def __init__(
        self,
        *,
        widths: Sequence[int] = (32, 64, 128, 256, 512),
        encoder: str = "conv",
        encoder_weights: bool | str | os.PathLike = False,
        feature_stride: int = 4,
        layout: str | Sequence[Sequence[float]] = "grid",
        grid: int = 4,
        overlap: float = 0.25,
        crop: float = 0.5,
        local_dim: int = 128,
        share: bool = False,
        attn: str = "nonlocal",
        nl_domain: str = "token",
        temperature: float = 1.0,
        feedback: str = "scale",
        ensemble: str = "concat",
        eta: float | str = 1.0,
        momentum: float = 0.99,
        prior: bool = False,
        local_weight: float = 0.5,
        global_weight: float = 0.5,
        entropy_weight: float = 0.0,
        entropy_floor: float = 1.0,
        stop_gradient: bool = True,
        main_loss: str = "ensemble",
        img_size: int | tuple[int, int] = 112,
        num_classes: int = 8,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **options: Any,
    ) -> None:
        here = type(self).__name__
        for name, value, choices in (
            ("attn", attn, ATTENTIONS),
            ("nl_domain", nl_domain, DOMAINS),
            ("feedback", feedback, FEEDBACKS),
            ("ensemble", ensemble, ENSEMBLES),
            ("main_loss", main_loss, MAIN_LOSSES),
        ):
            a_choice(here, name, value, choices)
        if isinstance(eta, str):
            a_choice(here, "eta", eta, ("learned",))
            if main_loss != "final" or ensemble == "wvote":
                raise ValueError(
                    f"{here}: eta='learned' needs main_loss='final' and ensemble='concat' to be trained"
                )
        if ensemble == "wvote" and feedback == "logit":
            raise ValueError(f"{here}: feedback='logit' and ensemble='wvote' exclude each other")
        if not temperature > 0:
            raise ValueError(f"{here}: temperature must be positive, got {temperature}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"{here}: momentum must lie in [0, 1], got {momentum}")
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"{here}: widths must be two or more positive numbers, got {tuple(widths)}")
        boxes = region_boxes(here, layout, grid, overlap, crop)
        if encoder == "conv":
            if drop_path_rate:
                # The U-Net's own encoder has no residual branches to drop
                raise ValueError(f"{here}: encoder='conv' has no drop_path_rate, got {drop_path_rate}")
            down: ConvEncoder | TimmEncoder = ConvEncoder(in_chans, tuple(widths))
        else:
            down = TimmEncoder(
                here,
                encoder,
                in_chans,
                2 ** (len(widths) - 1),
                encoder_weights,
                **({"drop_path_rate": drop_path_rate} if drop_path_rate else {}),
            )
        unet = UNet(here, down, feature_stride)
        regions = len(boxes)
        super().__init__(
            num_classes=num_classes,
            in_chans=in_chans,
            num_features=regions * local_dim,
            stride=unet.reduction,
            **options,
        )
        if self.head_kind != "linear" and (feedback == "logit" or ensemble == "wvote"):
            raise ValueError(
                f"{here}: head={self.head_kind!r} needs ensemble='concat' and a feedback other than 'logit': "
                f"else the local networks' classifiers decide"
            )
        self.img_size, self.boxes, self.share = img_size, boxes, share
        self.feedback, self.ensemble, self.temperature = feedback, ensemble, temperature
        self.momentum, self.prior, self.local_dim = momentum, prior, local_dim
        self.local_weight, self.global_weight, self.entropy_weight = (
            local_weight,
            global_weight,
            entropy_weight,
        )
        self.entropy_floor, self.stop_gradient, self.main_loss = entropy_floor, stop_gradient, main_loss
        self.unet = unet
        self.attention = RegionAttention(unet.out_channels, regions, attn, nl_domain)
        self.local = LocalNets(regions, unet.out_channels, local_dim, share)
        self.eta = nn.Parameter(torch.ones(())) if isinstance(eta, str) else float(eta)
        self.register_buffer("region_average", torch.full((regions,), 1 / regions))
        self.register_buffer("region_boxes", torch.tensor(boxes), persistent=False)
        for module in (self.unet, self.local):
            _initialise(module)
        self._make_region_heads()

    def _make_region_heads(self) -> None:
        """The classifiers that lie beside `head`."""
        classes, regions = self.num_classes, len(self.boxes)
        self.local_heads = LocalClassifiers(regions, self.local_dim, classes, self.share) if classes else None
        self.global_head = nn.Linear(self.unet.out_channels, classes) if classes else None
        if classes and (self.feedback == "logit" or self.ensemble == "wvote"):
            self.head = nn.Linear(self.num_features, 2) if self.valence_arousal else nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            raise ValueError(f"{self.name}: there is no global_pool to choose, got {global_pool!r}")
        super().reset_classifier(num_classes)
        self._make_region_heads()
        self.to(self.region_average.device)
        dtype = next(self.unet.parameters()).dtype
        for module in (self.head, self.local_heads, self.global_head):
            if module is not None:
                module.to(dtype)

    def forward_features(self, x: Tensor, aux: dict[str, Any] | None = None) -> Tensor:
        """x (B, in_chans, H, W) to the U-Net's features (B, C, H / feature_stride, W / feature_stride)."""
        return self.unet(x, self.checkpoint)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits (B, num_classes), or with `pre_logits` to all ẑ_r together (B, num_features)."""
        output = self._regions(features)
        return output.embedding if pre_logits else output.logits

    def forward(self, x: Tensor, full: bool = False) -> Tensor | FEROutput:
        """As `FERModel.forward`."""
        self.check_input(x)
        output = self._regions(self.forward_features(x))
        return output if full else output.logits

    def _regions(self, features: Tensor) -> FEROutput:
        regions = len(self.boxes)
        crops = crop_regions(features, self.boxes)
        tokens, scores = self.attention(features, crops, self.boxes)
        weights = self._weights(scores)
        if self.feedback == "map":
            crops = crops * (regions * weights)[:, :, None, None, None]
        vectors = self.local(crops)
        scaled = vectors * (regions * weights).unsqueeze(2) if self.feedback == "scale" else vectors
        embedding = scaled.flatten(1)
        aux: dict[str, Any] = {"region_weights": weights, "region_boxes": self.region_boxes}
        if self.local_heads is None or self.global_head is None:
            return FEROutput(embedding, None, embedding, aux)

        local_logits = self.local_heads(vectors)
        global_logits = self.global_head((weights.unsqueeze(2) * tokens).sum(1))
        valence_arousal = None
        if self.feedback == "logit" or self.ensemble == "wvote":
            if self.valence_arousal:
                valence_arousal = self.head(self.head_drop(embedding))
            if self.ensemble == "wvote":
                votes = weights.clamp(min=1e-12).log().unsqueeze(2) + local_logits.log_softmax(2)
                ensemble_logits = votes.logsumexp(1)
            else:
                ensemble_logits = (weights.unsqueeze(2) * local_logits).sum(1)
        else:
            ensemble_logits, valence_arousal = self.head(self.head_drop(embedding))
        logits = ensemble_logits
        if self.ensemble != "wvote":
            logits = logits + self.eta * global_logits
        aux |= {
            "local_logits": local_logits,
            "global_logits": global_logits,
            "ensemble_logits": ensemble_logits,
        }
        return FEROutput(logits, valence_arousal, embedding, aux)

    def _weights(self, scores: Tensor) -> Tensor:
        """softmax of the scores (B, R), which are averaged while training."""
        scores = scores.float() / self.temperature
        weights = scores.softmax(1)
        if self.prior:
            prior = self.region_average.clamp(min=1e-6).log()
            fed_back = (scores + prior).softmax(1)
        else:
            fed_back = weights
        if self.training:
            self._track(weights.detach().mean(0))
        return fed_back

    @torch.no_grad()
    def _track(self, mean: Tensor) -> None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            mean = mean.clone()
            dist.all_reduce(mean)
            mean = mean / dist.get_world_size()
        self.region_average.lerp_(mean.to(self.region_average.dtype), 1 - self.momentum)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        super().set_grad_checkpointing(enable)
        if isinstance(self.unet.encoder, TimmEncoder):
            set_checkpointing(self.unet.encoder.net, enable)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^unet\.encoder\.(?:net|levels\.0)",
            "blocks": [
                (r"^unet\.encoder\.levels\.(\d+)", None),
                (r"^unet\.ups\.(\d+)", (99998,)),
                (r"^attention|^local\.", (99999,)),
            ],
        }

    def loss_terms(self) -> list[Term]:
        """Cross-entropy of the local part, the regions and the global logits; CCC; the entropy floor."""
        main = "ensemble_logits" if self.main_loss == "ensemble" else None
        terms = [
            Term("cross_entropy", 1.0, CrossEntropy(aux=main)),
            Term("local", self.local_weight, RegionCrossEntropy(stop_gradient=self.stop_gradient)),
            Term("global", self.global_weight, CrossEntropy(aux="global_logits")),
        ]
        if self.valence_arousal:
            terms.append(Term("ccc", 1.0, CCC()))
        if self.entropy_weight:
            terms.append(Term("entropy", self.entropy_weight, RegionEntropy(self.entropy_floor)))
        return terms


def _initialise(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


default_cfgs = default_cfgs(  # type: ignore[assignment]
    {
        "lnlattennet": cfg(input_size=(3, 112, 112), first_conv="unet.encoder.levels.0.0"),
        "lnlattennet_xs": cfg(input_size=(3, 64, 64), first_conv="unet.encoder.levels.0.0"),
    }
)


@register_model
def lnlattennet(pretrained: bool = False, **kwargs: Any) -> LNLAttenNet:
    """LNLAttenNet for faces of 112 px: 16 regions of 7 x 7 features."""
    return build(LNLAttenNet, "lnlattennet", pretrained, **kwargs)


@register_model
def lnlattennet_xs(pretrained: bool = False, **kwargs: Any) -> LNLAttenNet:
    """A small LNLAttenNet for faces of 48 and 64 px and training from scratch."""
    small = {"widths": (24, 48, 96, 192), "local_dim": 48, "img_size": 64}
    return build(LNLAttenNet, "lnlattennet_xs", pretrained, **{**small, **kwargs})
