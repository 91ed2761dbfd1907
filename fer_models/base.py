"""What all systems share: the checks of the input, the head, and timm's model interface."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fer_kernels import dispatch, use_backend
from fer_kernels.checks import a_choice

from .output import FEROutput

HEADS = ("linear", "label_graph")
POOLS = ("avg", "max", "avgmax")


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of one number or two."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


class LinearHead(nn.Module):
    """embedding (B, num_features) to (logits (B, num_classes), valence and arousal (B, 2) or None)."""

    def __init__(self, num_features: int, num_classes: int, valence_arousal: bool = False) -> None:
        super().__init__()
        self.fc = nn.Linear(num_features, num_classes)
        self.va = nn.Linear(num_features, 2) if valence_arousal else None

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.fc(embedding), None if self.va is None else self.va(embedding)


def create_head(
    kind: str, num_features: int, num_classes: int, valence_arousal: bool = False, **options: Any
) -> nn.Module:
    """A head: embedding (B, num_features) to (logits, valence_arousal or None).

    Args:
        kind: "linear", or "label_graph" for `layers.label_graph.LabelGraphHead`.
        options: of that head; the linear one has none.
    """
    a_choice("create_head", "head", kind, HEADS)
    if kind == "label_graph":
        from .layers.label_graph import LabelGraphHead

        return LabelGraphHead(num_features, num_classes, valence_arousal=valence_arousal, **options)
    if options:
        raise TypeError(f"create_head: the linear head has no options, got {', '.join(options)}")
    return LinearHead(num_features, num_classes, valence_arousal)


class FERModel(nn.Module):
    """Base of all systems. A system implements `forward_features` and `group_matcher`.

    Args:
        num_classes: at least 2, or 0 for no classifier: the model then returns its embedding.
        in_chans: channels of the input.
        num_features: width of the embedding, which is what the classifier reads.
        stride: a side of the input must be a multiple of it.
        min_side: and at least this; None takes `stride`.
        drop_rate: dropout before the classifier.
        head: "linear" or "label_graph"; `head_options` are its own.
        valence_arousal: whether the model also gives valence and arousal.
        global_pool: "avg", "max", or "avgmax", their mean.
        backend: of the fer_kernels operators; "auto" leaves it to them and to `fer_kernels.use_backend`.
    """

    output_fmt = "NCHW"  # of forward_features, as timm names it: "NCHW" or "NHWC"
    default_cfg: dict[str, Any] = {}  # noqa: RUF012  # timm sets the instance's

    # Names of what depends on the classes
    head_prefixes: tuple[str, ...] = ("head.",)

    def __init__(
        self,
        *,
        num_classes: int,
        in_chans: int,
        num_features: int,
        stride: int,
        min_side: int | None = None,
        drop_rate: float = 0.0,
        head: str = "linear",
        head_options: dict[str, Any] | None = None,
        valence_arousal: bool = False,
        global_pool: str = "avg",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        here = type(self).__name__
        a_choice(here, "head", head, HEADS)
        a_choice(here, "global_pool", global_pool, POOLS)
        if backend != "auto":
            dispatch.check_backend_name(backend, f"{here}: backend")
        if in_chans < 1:
            raise ValueError(f"{here}: in_chans must be at least 1, got {in_chans}")
        if not 0 <= drop_rate < 1:
            raise ValueError(f"{here}: drop_rate must lie in [0, 1), got {drop_rate}")
        self.in_chans, self.num_features, self.head_hidden_size = in_chans, num_features, num_features
        self.stride, self.min_side = stride, stride if min_side is None else min_side
        self.drop_rate, self.global_pool, self.backend = drop_rate, global_pool, backend
        self.grad_checkpointing = False
        self.head_drop = nn.Dropout(drop_rate)
        self.head_kind, self.head_options = head, dict(head_options or {})
        self.valence_arousal = valence_arousal
        self.num_classes, self.head = num_classes, self._make_head(num_classes)

    # The network

    def forward_features(self, x: Tensor, aux: dict[str, Any] | None = None) -> Tensor:
        """x (B, in_chans, height, width) to the features before pooling; fills `aux` where it is a dict."""
        raise NotImplementedError

    def pool(self, features: Tensor) -> Tensor:
        """Features to the embedding (B, num_features)."""
        sides = (1, 2) if self.output_fmt == "NHWC" else (2, 3)
        if self.global_pool == "avg":
            return features.mean(sides)
        if self.global_pool == "max":
            return features.amax(sides)
        return (features.mean(sides) + features.amax(sides)) / 2

    def classify(
        self, embedding: Tensor, features: Tensor, aux: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """embedding (B, num_features), after its dropout, to (logits, valence_arousal or None)."""
        return (embedding, None) if self.num_classes == 0 else self.head(embedding)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits (B, num_classes), or with `pre_logits` to the embedding (B, num_features)."""
        embedding = self.pool(features)
        return embedding if pre_logits else self.classify(self.head_drop(embedding), features)[0]

    def forward(self, x: Tensor, full: bool = False) -> Tensor | FEROutput:
        """
        Args:
            x: images (B, in_chans, height, width), floating point, normalised as in `default_cfg`.
            full: return a `FEROutput` instead of the logits alone.

        Returns:
            logits (B, num_classes), or the `FEROutput`.
        """
        self.check_input(x)
        aux: dict[str, Any] | None = {} if full else None
        with self.kernels():
            features = self.forward_features(x, aux)
            embedding = self.forward_head(features, pre_logits=True)
            logits, valence_arousal = self.classify(self.head_drop(embedding), features, aux)
        return logits if aux is None else FEROutput(logits, valence_arousal, embedding, aux)

    def check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{self.name}: input must be a tensor, got {type(x).__name__}")
        expected = f"expected (B, {self.in_chans}, height, width)"
        if x.dim() != 4:
            raise ValueError(f"{self.name}: input is {x.dim()}-D (x: {tuple(x.shape)}), {expected}")
        if x.shape[1] != self.in_chans:
            raise ValueError(
                f"{self.name}: input has {x.shape[1]} channels (x: {tuple(x.shape)}), {expected}"
            )
        self._check_side("input", x.shape[2], x.shape[3])
        if not x.is_floating_point():
            raise TypeError(f"{self.name}: input must be floating point, got {x.dtype}")
        if self.training and x.shape[0] == 0:
            raise ValueError(f"{self.name}: an empty batch (x: {tuple(x.shape)}) cannot be trained on")

    def _check_side(self, what: str, height: int, width: int) -> None:
        if height < self.min_side or width < self.min_side or height % self.stride or width % self.stride:
            raise ValueError(
                f"{self.name}: {what} is {height} x {width} pixels, expected sides of at least "
                f"{self.min_side} that are multiples of {self.stride}"
            )

    @property
    def name(self) -> str:
        """The architecture's name where a registered function made the model, else the class's."""
        return self.default_cfg.get("architecture") or type(self).__name__

    def kernels(self) -> contextlib.AbstractContextManager:
        """Within it the fer_kernels operators run on the model's backend."""
        return contextlib.nullcontext() if self.backend == "auto" else use_backend(self.backend)

    def checkpoint(self, function: Callable[..., Any], *args: Any) -> Any:
        """function(*args), with gradient checkpointing where it is switched on."""
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return function(*args)

        def segment(*args: Any) -> Any:
            with self.kernels():  # the second run is within backward, outside of forward's context
                return function(*args)

        if torch.compiler.is_compiling():
            return checkpoint(segment, *args, use_reentrant=False)
        return checkpoint(
            segment,
            *args,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), _without_statistics(self)),
        )

    # timm's model interface

    def _make_head(self, num_classes: int) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        if num_classes < 2:
            raise ValueError(
                f"{self.name}: num_classes must be at least 2, or 0 for no classifier, got {num_classes}"
            )
        return create_head(
            self.head_kind, self.num_features, num_classes, self.valence_arousal, **self.head_options
        )

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head; num_classes=0 leaves none."""
        if global_pool is not None:
            a_choice(self.name, "global_pool", global_pool, POOLS)
        parameter = next(self.parameters())
        self.head = self._make_head(num_classes).to(parameter.device, parameter.dtype)
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups, for layer-wise learning rates."""
        raise NotImplementedError

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay leaves alone (besides biases and norms)."""
        return set()

    def loss_terms(self) -> list[Any]:
        """The `losses.Term`s that this model is trained with: cross-entropy, and CCC where it has outputs."""
        from . import losses

        terms = [losses.Term("cross_entropy", 1.0, losses.CrossEntropy())]
        if self.valence_arousal:
            terms.append(losses.Term("ccc", 1.0, losses.CCC()))
        return terms


@contextlib.contextmanager
def _without_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norms leave their running statistics alone: a segment's second run must not count twice."""
    # Not by track_running_stats: then the second run would save fewer tensors than the first.
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, count in kept:
            norm.momentum, norm.num_batches_tracked = momentum, count


def resize_position(position: Tensor, grid: tuple[int, int]) -> Tensor:
    """A position embedding (1, C, h, w) for another grid, bicubic."""
    if position.shape[2:] == grid:
        return position
    return F.interpolate(position, size=grid, mode="bicubic", align_corners=False)
