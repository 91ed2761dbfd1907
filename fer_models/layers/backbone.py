"""timm's models as parts of a system."""

from __future__ import annotations

import difflib
import logging
import os
from typing import Any

import torch
from torch import Tensor, nn

from ..registry import read_state_dict

_logger = logging.getLogger(__name__)
_SHOWN = 10  # names of a mismatch that an error lists


def create_backbone(
    here: str,
    name: str,
    *,
    in_chans: int = 3,
    weights: bool | str | os.PathLike = False,
    drop_path_rate: float = 0.0,
    **options: Any,
) -> nn.Module:
    """A timm model without its classifier.

    Args:
        here: who asks, for errors.
        name: one of `timm.list_models()`.
        weights: False for random ones; the path of a state dict of this timm model; or True for timm's
            pretrained ones, which timm downloads from the Hugging Face hub unless they are cached.
        drop_path_rate: of models that have stochastic depth; above 0 with another is an error.
        options: of `timm.create_model`.
    """
    import timm  # here: it takes as long to import as torch, and most models do without

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see timm.list_models()"
        raise ValueError(f"{here}: unknown backbone {name!r}: {hint}")
    if drop_path_rate > 0:
        options["drop_path_rate"] = drop_path_rate
    if not options.get("features_only"):
        options["num_classes"] = 0
    if weights is True:
        _logger.warning("%s: timm fetches the pretrained weights of %s, unless they are cached", here, name)
    try:
        backbone = timm.create_model(name, pretrained=weights is True, in_chans=in_chans, **options)
    except TypeError as error:
        if "drop_path_rate" in str(error):
            raise ValueError(f"{here}: {name} has no drop_path_rate, got {drop_path_rate}") from error
        raise
    if not isinstance(weights, bool):
        _load(here, backbone, weights)
    return backbone


def _load(here: str, backbone: nn.Module, path: str | os.PathLike) -> None:
    """What is left out of the file is the classifier, and stages that the backbone here goes without."""
    state, own = read_state_dict(path), backbone.state_dict()
    wrong = [name for name, tensor in own.items() if name not in state or state[name].shape != tensor.shape]
    if wrong:
        raise ValueError(
            f"{here}: {path} is no state dict of this backbone: {len(wrong)} missing or of another shape "
            f"({', '.join(wrong[:_SHOWN])}{', ...' if len(wrong) > _SHOWN else ''})"
        )
    backbone.load_state_dict({name: state[name] for name in own})


def set_checkpointing(backbone: nn.Module, enable: bool) -> None:
    """timm's gradient checkpointing, but for batch norms: the second run leaves their statistics alone."""
    for handle in getattr(backbone, "statistics_hooks", ()):
        handle.remove()
    hooks: list[Any] = []
    backbone.statistics_hooks = hooks  # type: ignore[assignment]
    if not hasattr(backbone, "set_grad_checkpointing"):
        if enable:
            raise ValueError(
                f"{type(backbone).__name__}: timm has no gradient checkpointing for this backbone"
            )
        return
    backbone.set_grad_checkpointing(enable)  # type: ignore[operator]
    if enable:
        for norm in backbone.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.track_running_stats:
                hooks += [
                    norm.register_forward_pre_hook(_before_norm),
                    norm.register_forward_hook(_after_norm, always_call=True),
                ]


def _before_norm(norm: Any, _: Any) -> None:
    if torch._C._current_graph_task_id() != -1:  # within a backward pass, so in a checkpoint's second run
        norm.kept = norm.momentum, norm.num_batches_tracked
        norm.momentum, norm.num_batches_tracked = 0.0, None


def _after_norm(norm: Any, *_: Any) -> None:
    if hasattr(norm, "kept"):
        norm.momentum, norm.num_batches_tracked = norm.kept
        del norm.kept


def create_levels(here: str, name: str, reduction: int, **options: Any) -> nn.Module:
    """timm's feature extractor of this model, down to the last level with this reduction.

    options: of `create_backbone`.
    """
    probe = create_backbone(here, name, features_only=True, **{**options, "weights": False})
    reductions = list(probe.feature_info.reduction())  # type: ignore[union-attr,operator]
    if reduction not in reductions:
        raise ValueError(
            f"{here}: {name} has no level that reduces by {reduction}, but by "
            f"{', '.join(map(str, reductions))}"
        )
    last = len(reductions) - 1 - reductions[::-1].index(reduction)
    return create_backbone(here, name, features_only=True, out_indices=tuple(range(last + 1)), **options)


def gives_maps(backbone: nn.Module) -> bool:
    """Whether forward_features gives maps, (B, C, h, w) or (B, h, w, C), rather than tokens (B, N, C)."""
    return not hasattr(backbone, "cls_token")


def feature_width(backbone: nn.Module) -> int:
    """Channels of what `feature_map` returns."""
    width = backbone.num_features if gives_maps(backbone) else backbone.head_hidden_size
    return int(width)  # type: ignore[arg-type]


def feature_map(backbone: nn.Module, x: Tensor) -> Tensor:
    """The last features (B, C, h, w); of a backbone of tokens what its own pooling makes of them, 1 x 1."""
    features = backbone.forward_features(x)  # type: ignore[operator]
    if not gives_maps(backbone):
        return backbone.forward_head(features, pre_logits=True)[:, :, None, None]  # type: ignore[operator]
    return channels_first(backbone, features)


def channels_first(backbone: nn.Module, features: Tensor) -> Tensor:
    """(B, C, h, w), whichever layout this backbone has."""
    return features.permute(0, 3, 1, 2) if _layout(backbone) == "NHWC" else features


def _layout(backbone: nn.Module) -> str:
    layout = getattr(backbone, "output_fmt", None)
    if layout is None and hasattr(
        backbone, "feature_info"
    ):  # a feature extractor says it by level, if at all
        layout = getattr(backbone.feature_info, "output_fmt", None)
    return str(getattr(layout, "value", layout) or "NCHW")


def prefixed_groups(backbone: nn.Module, prefix: str, coarse: bool = False) -> dict[str, Any]:
    """The backbone's group_matcher for a model that holds it as `prefix`; one group where it has none."""
    if not hasattr(backbone, "group_matcher"):
        return {"stem": rf"^{prefix}\."}

    def prefixed(pattern: str) -> str:
        return rf"^{prefix}\.(?:{pattern.replace('^', '')})"

    groups = backbone.group_matcher(coarse=coarse)  # type: ignore[operator]
    return {
        name: prefixed(found) if isinstance(found, str) else [(prefixed(p), order) for p, order in found]
        for name, found in groups.items()
    }
