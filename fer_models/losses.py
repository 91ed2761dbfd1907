"""Losses of all systems: functions that stand alone, the terms models name them by, and their weighted sum.

All of them compute in float32 (float64 for float64 input), also under autocast, never wait for a device, and
skip what is unlabelled: a negative label, a row of a distribution without mass, a NaN valence or arousal. A
sample without any target takes no part in any term, also not in those that need no target, so that a batch
where nothing is labelled gives 0 with gradients 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fer_kernels.checks import a_choice

from .output import FEROutput

VARIETIES = ("cosine", "hinge", "partition")


class Targets(NamedTuple):
    """What is known of a batch.

    Attributes:
        label: (B,) integers; negative where there is none.
        distribution: (B, classes), votes or probabilities; where a row has mass it stands in for the label,
            and its sum does not matter. None trains on the labels alone.
        valence_arousal: (B, 2), NaN where unknown.
    """

    label: Tensor
    distribution: Tensor | None = None
    valence_arousal: Tensor | None = None


class Term(NamedTuple):
    """One part of a loss: `weight` times `loss(output, targets)`, a scalar."""

    name: str
    weight: float
    loss: Callable[[FEROutput, Targets], Tensor]


# Functions


def cross_entropy(
    logits: Tensor,
    label: Tensor,
    distribution: Tensor | None = None,
    *,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    sample_weights: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy of the labelled samples; torch's where all are labelled by index.

    Args:
        logits: (B, C).
        label: (B,) integers, negative where there is none.
        distribution: (B, C), see `Targets`; given votes d it is -Σ_c d_c log p_c / Σ_c d_c.
        class_weights: (C,), as in torch's cross_entropy: the mean is over the weights.
        label_smoothing: share of the target that all classes get alike, in [0, 1).
        sample_weights: (B,), factors of the samples' losses; they leave the mean's divisor alone.

    A label of C or more raises ValueError on a CPU, and a device-side assertion elsewhere.
    """
    _check_logits("cross_entropy", logits, label, distribution, class_weights)
    logits = _wide(logits)
    target = label_distribution(label, logits.shape[1], distribution).to(logits.dtype)
    weights = logits.new_ones(logits.shape[1]) if class_weights is None else class_weights.to(logits)
    divisor = (target * weights).sum()
    known = target.sum(1, keepdim=True)
    target = (1 - label_smoothing) * target + label_smoothing / logits.shape[1] * known
    losses = -(target * weights * logits.log_softmax(1)).sum(1)
    if sample_weights is not None:
        losses = losses * sample_weights.to(losses)
    return losses.sum() / divisor.clamp(min=torch.finfo(divisor.dtype).tiny)


def label_distribution(label: Tensor, num_classes: int, distribution: Tensor | None = None) -> Tensor:
    """(B, C) float: the distribution, scaled to sum 1, where a row has mass; else one at the label, or 0."""
    _check_label_range(label, num_classes)
    target = (label.unsqueeze(1) == torch.arange(num_classes, device=label.device)).float()
    if distribution is None:
        return target
    distribution = _wide(distribution)
    mass = distribution.sum(1, keepdim=True)
    given = mass > 0  # not where it is NaN
    return torch.where(given, distribution / torch.where(given, mass, 1.0), target.to(mass.dtype))


def concordance(prediction: Tensor, target: Tensor, *, compat: bool = False) -> Tensor:
    """The concordance correlation coefficient of every column, (B, D) each to (D,).

    2 cov / (var + var + (difference of means)²) over the samples whose target is not NaN, with the
    population's moments. compat=True mixes the population's covariance with the sample's variances (over
    n - 1), as Emotion-GCN's published code does. A column with fewer than two known targets gives 0, and so
    does one where nothing varies.
    """
    if prediction.shape != target.shape or prediction.dim() != 2:
        raise ValueError(
            f"concordance: prediction and target must be of one shape (B, D), got {tuple(prediction.shape)} "
            f"and {tuple(target.shape)}"
        )
    prediction, target = _wide(prediction), target.to(_wide(prediction).dtype)
    known = ~target.isnan()
    count = known.sum(0)
    n = count.clamp(min=1)
    x, y = torch.where(known, prediction, 0.0), torch.where(known, target, 0.0)
    mean_x, mean_y = x.sum(0) / n, y.sum(0) / n
    dx, dy = torch.where(known, x - mean_x, 0.0), torch.where(known, y - mean_y, 0.0)
    covariance = (dx * dy).sum(0) / n
    freedom = (count - 1).clamp(min=1) if compat else n
    spread = ((dx * dx).sum(0) + (dy * dy).sum(0)) / freedom + (mean_x - mean_y) ** 2
    return torch.where(count > 1, 2 * covariance / spread.clamp(min=1e-12), 0.0)


def ccc_loss(prediction: Tensor, target: Tensor, *, compat: bool = False) -> Tensor:
    """1 - `concordance`, the mean of the columns with at least two known targets; 0 where there is none."""
    counts = ((~target.isnan()).sum(0) > 1).to(_wide(prediction).dtype)
    return ((1 - concordance(prediction, target, compat=compat)) * counts).sum() / counts.sum().clamp(min=1)


def variety_loss(
    maps: Tensor, kind: str = "cosine", *, margin: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """How alike the N maps (or vectors) of a sample are, mean over the samples.

    Args:
        maps: (B, N, ...), flattened to vectors a_1 ... a_N a sample; N = 1 gives 0.
        kind: "cosine":    the mean cosine of all pairs, (|Σ u_n|² - N) / (N (N - 1)) with u_n = a_n / |a_n|,
                           in [0, 1] for maps that are not negative
              "hinge":     TransFER's: mean over pairs of max(0, margin - |a_i - a_j| / size) / 2
              "partition": DAN's: log(1 + N / variance over the N, mean over the size)
        margin: of "hinge".
        mask: (B,), the samples that count; None is all.
    """
    a_choice("variety_loss", "kind", kind, VARIETIES)
    if maps.dim() < 3:
        raise ValueError(f"variety_loss: maps must be (B, N, ...), got {tuple(maps.shape)}")
    a = _wide(maps).flatten(2)
    n = a.shape[1]
    if n == 1:
        return (a * 0).sum()
    if kind == "cosine":
        u = F.normalize(a, dim=2)
        losses = (u.sum(1).square().sum(1) - u.square().sum((1, 2))) / (n * (n - 1))
    elif kind == "hinge":
        pairs = torch.tensor(list(itertools.combinations(range(n), 2)), device=a.device).T
        # The root's derivative at 0 is infinite, and equal maps are where this loss starts
        distances = (a[:, pairs[0]] - a[:, pairs[1]]).square().sum(2).clamp(min=1e-12).sqrt()
        losses = (margin - distances / a.shape[2]).clamp(min=0).mean(1) / 2
    else:
        variance = a.var(1).mean(1)
        losses = torch.log1p(n / (variance + torch.finfo(torch.float32).eps))
    return masked_mean(losses, mask)


def region_cross_entropy(
    local_logits: Tensor,
    region_weights: Tensor,
    label: Tensor,
    distribution: Tensor | None = None,
    *,
    stop_gradient: bool = True,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Σ_r w_r CE(o_r, y), the regions' cross-entropies (local_logits (B, R, C)) by their weights (B, R).

    The weights are constants here (stop_gradient): else the easiest way down is all weight on the region
    that happens to be easiest, and the others are never trained.
    """
    batch, regions, classes = local_logits.shape
    if region_weights.shape != (batch, regions):
        raise ValueError(
            f"region_cross_entropy: region_weights must be {(batch, regions)} as local_logits "
            f"{tuple(local_logits.shape)} are, got {tuple(region_weights.shape)}"
        )
    weights = region_weights.detach() if stop_gradient else region_weights
    # A sample's rows follow each other; each counts once in the mean's divisor, hence times R
    return regions * cross_entropy(
        local_logits.reshape(batch * regions, classes),
        label.repeat_interleave(regions),
        None if distribution is None else distribution.repeat_interleave(regions, 0),
        class_weights=class_weights,
        label_smoothing=label_smoothing,
        sample_weights=weights.reshape(-1),
    )


def region_entropy(region_weights: Tensor, floor: float = 1.0, *, mask: Tensor | None = None) -> Tensor:
    """max(0, floor · log R - H(w)), mean over the samples: pushes the entropy of w (B, R) up to its floor.

    floor = 1 is -H(w) but for a constant; smaller ones leave weights alone that are spread enough.
    """
    w = _wide(region_weights)
    most = floor * torch.log(torch.tensor(float(w.shape[1])))
    return masked_mean((most.to(w) - torch.special.entr(w.clamp(min=1e-12)).sum(1)).clamp(min=0), mask)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of values (B,) over the samples of `mask` (B,); 0 where it has none."""
    if mask is None:
        mask = torch.ones_like(values, dtype=torch.bool)
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def labelled(targets: Targets) -> Tensor:
    """(B,) bool: the samples with any target."""
    found = targets.label >= 0
    if targets.distribution is not None:
        found = found | (targets.distribution.sum(1) > 0)
    if targets.valence_arousal is not None:
        found = found | (~targets.valence_arousal.isnan()).any(1)
    return found


def class_balanced_weights(counts: Sequence[int], beta: float = 0.9999) -> Tensor:
    """Class weights (C,) by the effective number of samples, (1 - beta) / (1 - betaⁿ), with mean 1.

    beta = 0 gives ones, towards 1 it gives 1 / n. A class without samples gets 0.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"class_balanced_weights: beta must lie in [0, 1), got {beta}")
    n = torch.as_tensor(counts, dtype=torch.float64)
    weights = torch.where(n > 0, (1 - beta) / (1 - beta ** n.clamp(min=1)), 0.0)
    return (weights * (n > 0).sum() / weights.sum().clamp(min=1e-12)).float()


# The same as terms of a criterion: (output, targets) to a scalar


class CrossEntropy(nn.Module):
    """`cross_entropy` of the output's logits, or with `aux` of logits of this name in output.aux."""

    options: tuple[str, ...] = ("class_weights", "label_smoothing")
    class_weights: Tensor | None

    def __init__(
        self,
        *,
        class_weights: Tensor | Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        aux: str | None = None,
    ) -> None:
        super().__init__()
        self.aux = aux
        self.register_buffer("class_weights", None, persistent=False)
        self.configure(class_weights=class_weights, label_smoothing=label_smoothing)

    def configure(
        self,
        class_weights: Tensor | Sequence[float] | None = None,
        label_smoothing: float | None = None,
    ) -> None:
        if class_weights is not None:
            self.class_weights = torch.as_tensor(class_weights, dtype=torch.float32)
        if label_smoothing is not None:
            if not 0 <= label_smoothing < 1:
                raise ValueError(
                    f"{type(self).__name__}: label_smoothing must lie in [0, 1), got {label_smoothing}"
                )
            self.label_smoothing = label_smoothing

    def forward(self, output: FEROutput, targets: Targets) -> Tensor:
        logits = output.logits if self.aux is None else _aux(output, self.aux)
        return cross_entropy(logits, targets.label, targets.distribution, **self.given())

    def given(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in CrossEntropy.options}


class RegionCrossEntropy(CrossEntropy):
    """`region_cross_entropy` of aux["local_logits"] and aux["region_weights"]."""

    options = (*CrossEntropy.options, "stop_gradient")

    def __init__(self, *, stop_gradient: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.stop_gradient = stop_gradient

    def configure(self, *, stop_gradient: bool | None = None, **options: Any) -> None:  # type: ignore[override]
        super().configure(**options)
        if stop_gradient is not None:
            self.stop_gradient = stop_gradient

    def forward(self, output: FEROutput, targets: Targets) -> Tensor:
        return region_cross_entropy(
            _aux(output, "local_logits"),
            _aux(output, "region_weights"),
            targets.label,
            targets.distribution,
            stop_gradient=self.stop_gradient,
            **self.given(),
        )


class CCC(nn.Module):
    """`ccc_loss` of the output's valence and arousal."""

    options = ("compat",)

    def __init__(self, *, compat: bool = False) -> None:
        super().__init__()
        self.compat = compat

    def configure(self, compat: bool) -> None:
        self.compat = compat

    def forward(self, output: FEROutput, targets: Targets) -> Tensor:
        prediction = output.valence_arousal
        if prediction is None:
            raise ValueError("CCC: the model gives no valence and arousal; make it with valence_arousal=True")
        target = targets.valence_arousal
        # Without targets all is unknown: 0, but part of the graph, so that DDP finds every parameter in it
        target = torch.full_like(prediction, torch.nan) if target is None else target
        return ccc_loss(prediction, target, compat=self.compat)


class Variety(nn.Module):
    """`variety_loss` of the maps or vectors of this name in output.aux."""

    options = ("kind", "margin")

    def __init__(self, kind: str = "cosine", *, margin: float = 1.0, aux: str = "path_maps") -> None:
        super().__init__()
        self.aux = aux
        self.configure(kind, margin)

    def configure(self, kind: str | None = None, margin: float | None = None) -> None:
        if kind is not None:
            a_choice("Variety", "kind", kind, VARIETIES)
            self.kind = kind
        if margin is not None:
            self.margin = margin

    def forward(self, output: FEROutput, targets: Targets) -> Tensor:
        maps = _aux(output, self.aux)
        return variety_loss(maps, self.kind, margin=self.margin, mask=labelled(targets))


class RegionEntropy(nn.Module):
    """`region_entropy` of aux["region_weights"]."""

    options = ("floor",)

    def __init__(self, floor: float = 1.0) -> None:
        super().__init__()
        self.configure(floor)

    def configure(self, floor: float) -> None:
        if not 0 <= floor <= 1:
            raise ValueError(f"RegionEntropy: floor must lie in [0, 1], got {floor}")
        self.floor = floor

    def forward(self, output: FEROutput, targets: Targets) -> Tensor:
        return region_entropy(_aux(output, "region_weights"), self.floor, mask=labelled(targets))


class Criterion(nn.Module):
    """The weighted sum of terms.

    A term of weight 0 is still computed: its part is reported, and DDP finds the parameters it reads.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        super().__init__()
        terms = list(terms)
        if not terms:
            raise ValueError("Criterion: expected at least one term")
        names = [term.name for term in terms]
        if len(set(names)) < len(names):
            raise ValueError(f"Criterion: the terms' names must differ, got {', '.join(names)}")
        self.terms = terms
        # So that class weights move with the criterion
        self.losses = nn.ModuleList(term.loss for term in terms if isinstance(term.loss, nn.Module))

    @classmethod
    def for_model(cls, model: nn.Module, **overrides: Any) -> Criterion:
        """The criterion of `model.loss_terms()`.

        Args:
            model: a `FERModel`, also within DDP or torch.compile.
            overrides: a term's weight by its name (variety=0.1), or an option of the terms' losses
                (label_smoothing=0.1, class_weights=...), which all that have it get.
        """
        while hasattr(model, "_orig_mod") or hasattr(model, "module"):
            model = model._orig_mod if hasattr(model, "_orig_mod") else model.module  # type: ignore[assignment]
        if not hasattr(model, "loss_terms"):
            raise TypeError(f"Criterion.for_model: expected a FERModel, got {type(model).__name__}")
        terms: list[Term] = model.loss_terms()  # type: ignore[operator]
        names = [term.name for term in terms]
        options = sorted({name for term in terms for name in getattr(term.loss, "options", ())})
        for name, value in overrides.items():
            if name in names:
                terms[names.index(name)] = terms[names.index(name)]._replace(weight=float(value))
            elif name in options:
                for term in terms:
                    if name in getattr(term.loss, "options", ()):
                        term.loss.configure(**{name: value})  # type: ignore[attr-defined]
            else:
                raise ValueError(
                    f"Criterion.for_model: unknown override {name!r}: expected a term "
                    f"({', '.join(names)}) or an option ({', '.join(options)})"
                )
        return cls(terms)

    def forward(self, output: FEROutput, targets: Targets | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Args:
            output: of a model called with full=True.
            targets: `Targets`, or labels (B,), or distributions (B, classes), of mixup for instance.

        Returns:
            the sum, and every term's part before its weight, detached.
        """
        if isinstance(targets, Tensor):
            targets = _as_targets(targets)
        if not isinstance(output, FEROutput):
            raise TypeError(
                f"Criterion: output must be a FEROutput (call the model with full=True), "
                f"got {type(output).__name__}"
            )
        total: Tensor | None = None
        parts = {}
        with torch.autocast(output.logits.device.type, enabled=False):
            for term in self.terms:
                part = term.loss(output, targets)
                parts[term.name] = part.detach()
                weighted = term.weight * part
                total = weighted if total is None else total + weighted
        assert total is not None
        return total, parts

    def extra_repr(self) -> str:
        return ", ".join(f"{term.name}={term.weight}" for term in self.terms)


def _as_targets(targets: Tensor) -> Targets:
    if targets.dim() == 2 and targets.is_floating_point():
        return Targets(targets.new_full(targets.shape[:1], -1, dtype=torch.long), targets)
    if targets.dim() != 1 or targets.is_floating_point():
        raise ValueError(
            f"Criterion: targets must be Targets, integers (B,) or floats (B, classes), "
            f"got {targets.dtype} {tuple(targets.shape)}"
        )
    return Targets(targets)


def _aux(output: FEROutput, name: str) -> Tensor:
    if name not in output.aux:
        raise ValueError(f"the model's output has no {name!r}, only {', '.join(output.aux) or 'nothing'}")
    return output.aux[name]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check_logits(
    here: str, logits: Tensor, label: Tensor, distribution: Tensor | None, class_weights: Tensor | None
) -> None:
    if logits.dim() != 2 or label.shape != logits.shape[:1] or label.is_floating_point():
        raise ValueError(
            f"{here}: expected logits (B, C) and integer labels (B,), got {tuple(logits.shape)} and "
            f"{label.dtype} {tuple(label.shape)}"
        )
    if distribution is not None and distribution.shape != logits.shape:
        raise ValueError(
            f"{here}: distribution must be {tuple(logits.shape)} as the logits are, got "
            f"{tuple(distribution.shape)}"
        )
    if class_weights is not None and class_weights.shape != logits.shape[1:]:
        raise ValueError(
            f"{here}: class_weights must be ({logits.shape[1]},), got {tuple(class_weights.shape)}"
        )


def _check_label_range(label: Tensor, num_classes: int) -> None:
    """Without waiting for a device: what is on one, or compiled, asserts there."""
    message = f"cross_entropy: a label exceeds the {num_classes} classes"
    if torch.compiler.is_compiling() or label.device.type != "cpu":
        torch._assert_async((label < num_classes).all(), message)
    elif (label >= num_classes).any():
        raise ValueError(f"{message} (largest: {int(label.max())})")
