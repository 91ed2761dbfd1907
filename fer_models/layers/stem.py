"""From pixels to nodes: the convolution stems of ViG, their multi-scale form, and what halves a grid.

All maps are (B, C, height, width) in channels-last memory, so that a map is a matrix of nodes as it lies.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fer_kernels.checks import a_choice
from fer_kernels.nn import Projection, conv_norm_act, norm_act_maps

FUSIONS = ("concat", "sum", "gated", "kernels", "none")
KERNELS = (3, 5, 7)  # of fusion="kernels"


def nodes_of(x: Tensor) -> Tensor:
    """(B, C, h, w) to (B, h * w, C); no copy in channels-last memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def map_of(nodes: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, h * w, C) to (B, C, h, w) in channels-last memory; no copy."""
    return nodes.unflatten(1, grid).permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    """Images in the memory that convolutions and norms are fastest on; what follows keeps it."""
    return x.contiguous(memory_format=torch.channels_last)


def steps(layers: nn.Sequential) -> list[tuple[int, Callable[..., Any]]]:
    """What runs the layers in turn, and at which layer each ends: a batch norm takes its activation along,
    and a convolution its batch norm; those can leave a map unfinished to the next."""
    found: list[tuple[int, Callable[..., Any]]] = []
    left = [*layers]
    while left:
        conv = left.pop(0) if isinstance(left[0], nn.Conv2d) else None
        norm = left.pop(0) if left and isinstance(left[0], _BatchNorm) else None
        act = left.pop(0) if norm and left and isinstance(left[0], (nn.GELU, nn.ReLU)) else None
        if conv and norm:
            step: Callable[..., Any] = functools.partial(conv_norm_act, conv, norm, act)
        elif norm:
            step = functools.partial(norm_act_maps, norm, act)
        else:
            step = conv or left.pop(0)
        found.append((len(layers) - len(left) - 1, step))
    return found


def run_steps(layers: nn.Sequential, x: Tensor, kept: Sequence[int] = ()) -> list[Tensor]:
    """What leaves those layers that are `kept`, and the last."""
    found, plan = [], steps(layers)
    chains = [getattr(step, "func", None) is conv_norm_act for _, step in plan]
    for (position, step), here, after in zip(plan, chains, [*chains[1:], False], strict=True):
        x = step(x, unfinished=True) if here and after and position not in kept else step(x)
        if position in kept:
            found.append(x)
    return [*found, x]


class ConvSequence(nn.Sequential):
    """Convolutions, batch norms and activations, run in their `steps`."""

    def forward(self, x: Tensor) -> Tensor:
        return run_steps(self, x)[-1]


class Residual(nn.Module):
    """ReLU(x + two 3 x 3 convolutions with batch norms)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        branch = conv_norm_act(self.conv1, self.norm1, self.act, x, unfinished=True)
        return conv_norm_act(self.conv2, self.norm2, self.act, branch, residual=x)


class ConvStem(nn.Module):
    """3 x 3 convolutions, each with a batch norm and an activation, which the last has only before blocks.

    Args:
        in_chans: channels of the image.
        widths: of each convolution's output.
        strides: of each convolution.
        taps: convolutions whose activated outputs `maps` returns besides the last one's.
        blocks: residual blocks after each activated convolution; empty for none.
    """

    def __init__(
        self,
        in_chans: int,
        widths: tuple[int, ...],
        strides: tuple[int, ...],
        taps: tuple[int, ...] = (),
        blocks: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.ends: list[int] = []  # layers whose outputs are maps
        for fan_in, width, stride, count in zip(
            (in_chans, *widths[:-1]), widths, strides, blocks or (0,) * len(widths), strict=True
        ):
            convolution = nn.Conv2d(fan_in, width, 3, stride=stride, padding=1)
            layers += [convolution, nn.BatchNorm2d(width), nn.GELU()]
            layers += [Residual(width) for _ in range(count)]
            self.ends.append(len(layers) - 1)
        if isinstance(layers[-1], nn.GELU):
            layers.pop()
        self.convs = nn.Sequential(*layers)
        self.taps = taps
        reached = list(itertools.accumulate(strides, lambda total, stride: total * stride))
        self.stride = reached[-1]
        # (channels, how many times finer than the output) of each tapped map
        self.tapped = tuple((widths[tap], self.stride // reached[tap]) for tap in taps)

    def maps(self, x: Tensor) -> list[Tensor]:
        """x (B, in_chans, H, W) to the tapped maps, finest first, and the last one (B, C, h, w)."""
        return run_steps(self.convs, channels_last(x), [self.ends[tap] for tap in self.taps])

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_chans, H, W) to nodes (B, N, C)."""
        return nodes_of(self.maps(x)[-1])


class MultiScaleStem(ConvStem):
    """A `ConvStem` whose earlier, finer maps join its last one: Face2Nodes' patch embedding, as we read it.

    With F_s the map of scale s and F its last one, a_s = BN(W_s D_s(F_s)), where the depth-wise convolution
    D_s brings F_s to F's grid, and

        fusion="concat":   E = F + GELU(BN(W [a_s for the finer s and for F]))
        fusion="sum":      E = F + Σ a_s over the finer s
        fusion="gated":    E = Σ π_s a_s over all s, π = softmax_s(MLP(mean over nodes of Σ a_s)) per channel
        fusion="kernels":  E = F + GELU(BN(W [3 x 3, 5 x 5 and 7 x 7 depth-wise convolutions of F]))
        fusion="none":     E = F, the plain stem

    The last batch norms before the "+" start with a scale of zero, so all but "gated" start as E = F and a
    ViG's weights work from the first step.

    Args:
        in_chans, widths, strides, taps, blocks: as in `ConvStem`.
        fusion: as above.
    """

    def __init__(
        self,
        in_chans: int,
        widths: tuple[int, ...],
        strides: tuple[int, ...],
        taps: tuple[int, ...],
        fusion: str = "concat",
        blocks: tuple[int, ...] = (),
    ) -> None:
        a_choice("MultiScaleStem", "fusion", fusion, FUSIONS)
        taps = taps if fusion in ("concat", "sum", "gated") else ()
        super().__init__(in_chans, widths, strides, taps, blocks)
        self.fusion, dim = fusion, widths[-1]
        if fusion == "none":
            return
        if fusion == "kernels":
            self.align = nn.ModuleList(Depthwise(dim, size, 1) for size in KERNELS)
            self.fuse = Projection(dim * len(KERNELS), dim, groups=1)
            return
        scales = self.tapped if fusion == "sum" else (*self.tapped, (dim, 1))
        # A window twice as wide as its step sees every pixel of the finer map.
        self.align = nn.ModuleList(
            nn.Identity() if ratio == 1 else Depthwise(width, 2 * ratio - 1, ratio) for width, ratio in scales
        )
        self.project = nn.ModuleList(Projection(width, dim, groups=1, act=None) for width, _ in scales)
        if fusion == "concat":
            self.fuse = Projection(dim * len(scales), dim, groups=1)
        elif fusion == "gated":
            hidden = max(dim // 4, 8)
            self.gate = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim * len(scales)))

    def zero_fusion(self) -> None:
        """The start described above; every other parameter stays as it is."""
        starts = {"concat": ["fuse"], "kernels": ["fuse"], "sum": ["project"]}
        for name in starts.get(self.fusion, []):
            for module in getattr(self, name).modules():
                if isinstance(module, nn.BatchNorm1d):
                    nn.init.zeros_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.maps(x)
        last = nodes_of(maps[-1])
        if self.fusion == "none":
            return last
        if self.fusion == "kernels":
            return last + self.fuse(torch.cat([nodes_of(align(maps[-1])) for align in self.align], -1))
        aligned = [
            project(nodes_of(align(of_scale)))
            for of_scale, align, project in zip(maps, self.align, self.project, strict=False)
        ]
        if self.fusion == "concat":
            return last + self.fuse(torch.cat(aligned, -1))
        if self.fusion == "sum":
            return sum(aligned, last)
        scales = torch.stack(aligned, -1)  # (B, N, C, scales)
        gates = self.gate(scales.sum(-1).mean(1)).unflatten(-1, (-1, scales.shape[-1])).softmax(-1)
        return (scales * gates.unsqueeze(1)).sum(-1)


class Downsample(nn.Module):
    """Between two stages of a pyramid: 3 x 3 convolution of stride 2, batch norm; a side n becomes ⌈n/2⌉."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, nodes: Tensor, grid: tuple[int, int]) -> Tensor:
        """Nodes (B, h * w, C) to (B, ⌈h/2⌉ * ⌈w/2⌉, C_out)."""
        return nodes_of(conv_norm_act(self.conv, self.norm, None, map_of(nodes, grid)))


class Depthwise(nn.Conv2d):
    """A depth-wise convolution, on a CPU in float32 whatever the precision around it: there the backward pass
    of such a convolution of 7 x 7 in bfloat16 took twenty times as long."""

    def __init__(self, channels: int, size: int, stride: int) -> None:
        super().__init__(channels, channels, size, stride=stride, padding=size // 2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype == torch.float64:
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            weight, bias = self.weight.float(), None if self.bias is None else self.bias.float()
            return self._conv_forward(x.float(), weight, bias).to(x.dtype)
