"""Convolutions of maps (B, C, height, width) with the batch norm and activation behind them."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from ..conv.op import normed_conv
from ..linear.op import chain_dtype
from .conv import Unfinished, hooked
from .norm import fuses, norm_act_maps

# Up to so many channels a convolution is faster by `normed_conv` than by oneDNN, with a stride and without.
# Forward, backward and norm together are 1.2 to 1.3 times as fast for an image, of stride 2 1.4 times at 24
# channels, 1.1 at 48, 0.9 to 1.1 at 128; all others of stride 1 0.8 to 1.0 times.
NARROW, IMAGE = 96, 4


def conv_norm_act(
    conv: nn.Conv2d,
    norm: nn.Module,
    act: nn.Module | None,
    x: Tensor | Unfinished,
    *,
    residual: Tensor | None = None,
    unfinished: bool = False,
) -> Any:
    """act(norm(conv(x)) + residual), in few passes for channels-last memory.

    Args:
        conv, norm, act: modules; act may be None.
        x: (B, C, height, width), or what another call left unfinished.
        residual: as the result.
        unfinished: leave norm and activation to the call that takes the result, where that is as fast, and
            holds less, and there is no residual.

    Returns:
        (B, C_out, height, width), or an `Unfinished` of (B, height, width, C_out).
    """
    left = _chained(conv, norm, act, x)
    if left is not None:
        if unfinished and residual is None:
            return left
        return _as_map(left.finished(None if residual is None else _as_nodes(residual)))
    if isinstance(x, Unfinished):
        x = _as_map(x.finished())
    return norm_act_maps(norm, act, conv(x), residual)


def _as_map(nodes: Tensor) -> Tensor:
    return nodes.permute(0, 3, 1, 2)


def _as_nodes(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _chained(
    conv: nn.Conv2d, norm: nn.Module, act: nn.Module | None, x: Tensor | Unfinished
) -> Unfinished | None:
    """The convolution with its statistics, where that is faster; else nothing."""
    nodes = x.y if isinstance(x, Unfinished) else _as_nodes(x)
    if not (_is_known(conv) and _fits(conv, nodes)):
        return None
    stride, padding = conv.stride[0], int(conv.padding[0])
    dtype = chain_dtype(nodes, conv.weight) if conv.in_channels <= (NARROW if stride > 1 else IMAGE) else None
    if dtype is None or not fuses(norm, act, nodes) or hooked(conv, norm, *(() if act is None else (act,))):
        return None
    of_x = x.norm if isinstance(x, Unfinished) else None
    y, mean, var = normed_conv(nodes.to(dtype), conv.weight, norm=of_x, stride=stride, padding=padding)
    return Unfinished.behind(y, mean, var, norm, act, conv.bias)


def _is_known(conv: nn.Conv2d) -> bool:
    """Whether this is a convolution that `normed_conv` has."""
    if type(conv) is not nn.Conv2d or conv.groups != 1 or conv.padding_mode != "zeros":
        return False
    if isinstance(conv.padding, str) or conv.dilation != (1, 1):
        return False
    (stride, other), (padding, beside), side = conv.stride, conv.padding, min(conv.kernel_size)
    return stride == other <= side and padding == beside < side


def _fits(conv: nn.Conv2d, nodes: Tensor) -> bool:
    """Whether nodes (B, height, width, C) lie as it takes them, and more than one pixel comes out: of one
    torch says that it has no variance."""
    sizes = zip(nodes.shape[1:3], conv.kernel_size, strict=True)
    sides = [(size + 2 * int(conv.padding[0]) - side) // conv.stride[0] + 1 for size, side in sizes]
    many = min(sides) >= 1 and nodes.shape[0] * math.prod(sides) > 1
    return many and nodes.shape[3] == conv.in_channels and nodes.is_contiguous()
