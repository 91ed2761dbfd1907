"""A U-Net as a feature extractor: down to a bottleneck, and up again to one level of the way."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import channels_first, create_levels
from .stem import ConvSequence, channels_last

Run = Callable[..., Any]  # FERModel.checkpoint


class DoubleConv(ConvSequence):
    """Twice: 3 x 3 convolution, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        layers: list[nn.Module] = []
        for channels in (in_channels, out_channels):
            layers += [
                nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers)


class Up(nn.Module):
    """Twice as large, beside the encoder's map of that size, through a double convolution."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = DoubleConv(in_channels + skip_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
        return self.conv(torch.cat([x, skip], 1))


class ConvEncoder(nn.Module):
    """Double convolutions of these widths at strides 1, 2, 4, ..., with 2 x 2 maximum pooling between."""

    def __init__(self, in_chans: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.channels = list(widths)
        self.reductions = [2**level for level in range(len(widths))]
        inputs = (in_chans, *widths[:-1])
        self.levels = nn.ModuleList(DoubleConv(i, o) for i, o in zip(inputs, widths, strict=True))

    def forward(self, x: Tensor, run: Run) -> list[Tensor]:
        found: list[Tensor] = []
        x = channels_last(x)
        for level in self.levels:
            x = run(level, F.max_pool2d(found[-1], 2) if found else x)
            found.append(x)
        return found


class TimmEncoder(nn.Module):
    """The levels of a timm model down to the reduction `deepest`; what is deeper is not made."""

    def __init__(
        self,
        here: str,
        name: str,
        in_chans: int,
        deepest: int,
        weights: bool | str | os.PathLike,
        **options: Any,
    ) -> None:
        super().__init__()
        self.net = create_levels(here, name, deepest, in_chans=in_chans, weights=weights, **options)
        info: Any = self.net.feature_info
        self.channels, self.reductions = list(info.channels()), list(info.reduction())

    def forward(self, x: Tensor, run: Run) -> list[Tensor]:
        return [channels_first(self.net, level) for level in self.net(x)]


class UNet(nn.Module):
    """x (B, in_chans, H, W) to features (B, out_channels, H / stride, W / stride).

    Args:
        encoder: its maps' channels and reductions grow with depth; the last is the bottleneck.
        stride: of the output, one of the encoder's reductions but the last (then there is no way up).
    """

    def __init__(self, here: str, encoder: ConvEncoder | TimmEncoder, stride: int) -> None:
        super().__init__()
        if stride not in encoder.reductions:
            raise ValueError(
                f"{here}: the U-Net has no level of stride {stride}, only "
                f"{', '.join(map(str, encoder.reductions))}"
            )
        self.encoder = encoder
        last = encoder.reductions.index(stride)
        self.reduction = encoder.reductions[-1]
        self.out_channels = encoder.channels[last]
        ups, below = [], encoder.channels[-1]
        for level in reversed(range(last, len(encoder.channels) - 1)):
            ups.append(Up(below, encoder.channels[level], encoder.channels[level]))
            below = encoder.channels[level]
        self.ups = nn.ModuleList(ups)

    def forward(self, x: Tensor, run: Run = lambda function, *args: function(*args)) -> Tensor:
        levels = self.encoder(x, run)
        x = levels[-1]
        for up, skip in zip(self.ups, reversed(levels[:-1]), strict=False):
            x = run(up, x, skip)
        return x
