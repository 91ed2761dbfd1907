"""Batch norms of modules together with what follows them, in one operator where there is a kernel for it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import checks
from ..norm import op


def fuses(norm: nn.Module, act: nn.Module | None, x: Tensor) -> bool:
    """Whether `norm_act` is one operator for what these make of x: a batch norm by its own statistics, an
    activation that the operator knows, and a kernel for x's device."""
    learns = type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d) and norm.training and norm.momentum is not None
    known = type(act) in (type(None), nn.Identity, nn.ReLU) or (
        type(act) is nn.GELU and act.approximate == "none"
    )
    return learns and known and x.numel() > x.shape[-1] > 0 and op.OPERATOR.has_kernel(x)


def name_of(act: nn.Module | None) -> str | None:
    """The operators' name of an activation that `fuses`."""
    return {nn.ReLU: "relu", nn.GELU: "gelu"}.get(type(act))  # type: ignore[call-overload]


def norm_act(
    norm: nn.Module,
    act: nn.Module | None,
    x: Tensor,
    *,
    residual: Tensor | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """act(gain * norm(x) + residual), channels last.

    Args:
        norm: over the channels of all rows, such as nn.BatchNorm1d.
        act: a module, or None.
        x, residual: (B, ..., C).
        gain: (B).
    """
    return (fused if fuses(norm, act, x) else apart)(norm, act, x, residual, gain)


def fused(
    norm: nn.Module,
    act: nn.Module | None,
    x: Tensor,
    residual: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None = None,
) -> Tensor:
    """What `fuses`, in one operator; of x + shift, with shift (C)."""
    batch_norm: Any = norm
    rows = x.flatten(0, -2)
    if batch_norm.num_batches_tracked is not None:
        batch_norm.num_batches_tracked.add_(1)
    return op.batch_norm_act(
        rows,
        batch_norm.weight,
        batch_norm.bias,
        act=name_of(act),
        residual=along(residual, rows),
        gain=gain,
        shift=shift,
        eps=batch_norm.eps,
        running_mean=batch_norm.running_mean,
        running_var=batch_norm.running_var,
        momentum=batch_norm.momentum,
    ).reshape(x.shape)


def along(residual: Tensor | None, rows: Tensor) -> Tensor | None:
    """A residual as the operator takes it beside rows (rows, C)."""
    if residual is None:
        return None
    wide = checks.accumulation_dtype(rows.dtype)
    return residual.reshape(rows.shape).to(wide if residual.dtype == wide else rows.dtype)


def apart(
    norm: nn.Module, act: nn.Module | None, x: Tensor, residual: Tensor | None, gain: Tensor | None
) -> Tensor:
    y = joined(norm(x.flatten(0, -2)).reshape(x.shape), residual, gain)
    return y if act is None else act(y)


def norm_act_maps(
    norm: nn.Module, act: nn.Module | None, x: Tensor, residual: Tensor | None = None
) -> Tensor:
    """act(norm(x) + residual) of maps (B, C, height, width); in one operator for channels-last memory."""
    rows = x.permute(0, 2, 3, 1)
    if not (rows.is_contiguous() and fuses(norm, act, rows)):
        y = joined(norm(x), residual, None)
        return y if act is None else act(y)
    residual = None if residual is None else residual.permute(0, 2, 3, 1)
    return fused(norm, act, rows, residual, None).permute(0, 3, 1, 2)


def joined(x: Tensor, residual: Tensor | None, gain: Tensor | None) -> Tensor:
    """gain * x + residual, for x (B, ...) and gain (B)."""
    if gain is not None:
        x = x * gain.to(x.dtype).view(-1, *(1,) * (x.dim() - 1))
    return x if residual is None else residual + x
