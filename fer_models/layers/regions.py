"""Regions of a feature map: where they lie, their crops, and a network for each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Box = tuple[float, float, float, float]  # left, top, right, bottom, as shares of the sides

LAYOUTS = ("grid", "overlap", "5crop", "rows")


def region_boxes(
    here: str,
    layout: str | Sequence[Sequence[float]],
    grid: int = 4,
    overlap: float = 0.25,
    crop: float = 0.5,
) -> list[Box]:
    """Boxes of a layout, row by row.

    Args:
        layout: "grid":    grid x grid that tile the map
                "overlap": grid x grid, each larger by the share `overlap`, evenly spread
                "5crop":   the four corners and the centre, sides of the share `crop`
                "rows":    `grid` rows of full width
                or boxes (left, top, right, bottom) in [0, 1].
    """
    if not isinstance(layout, str):
        return _custom(here, layout)
    if layout not in LAYOUTS:
        raise ValueError(
            f"{here}: unknown layout {layout!r}: expected one of {', '.join(map(repr, LAYOUTS))}, or boxes"
        )
    if layout == "5crop":
        if not 0 < crop <= 1:
            raise ValueError(f"{here}: crop must lie in (0, 1], got {crop}")
        far, middle = 1 - crop, (1 - crop) / 2
        corners = [(0.0, 0.0), (far, 0.0), (0.0, far), (far, far), (middle, middle)]
        return [(x, y, x + crop, y + crop) for x, y in corners]
    if grid < 1:
        raise ValueError(f"{here}: grid must be at least 1, got {grid}")
    if layout == "rows":
        return [(0.0, row / grid, 1.0, (row + 1) / grid) for row in range(grid)]
    if layout == "overlap" and overlap < 0:
        raise ValueError(f"{here}: overlap must be at least 0, got {overlap}")
    side = min((1 + overlap) / grid, 1.0) if layout == "overlap" else 1 / grid
    starts = [cell * (1 - side) / max(grid - 1, 1) for cell in range(grid)]
    return [(x, y, x + side, y + side) for y in starts for x in starts]


def _custom(here: str, boxes: Sequence[Sequence[float]]) -> list[Box]:
    found = []
    for box in boxes:
        if len(box) != 4:
            raise ValueError(f"{here}: a box is (left, top, right, bottom), got {tuple(box)}")
        left, top, right, bottom = map(float, box)
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ValueError(f"{here}: a box must lie in [0, 1] and have an area, got {tuple(box)}")
        found.append((left, top, right, bottom))
    if not found:
        raise ValueError(f"{here}: expected at least one box")
    return found


def crop_regions(features: Tensor, boxes: Sequence[Box]) -> Tensor:
    """(B, C, H, W) to (B, R, C, h, w): the boxes in whole pixels; smaller ones are resized to the largest."""
    height, width = features.shape[2:]
    crops = []
    for left, top, right, bottom in boxes:
        (y, h), (x, w) = _pixels(top, bottom, height), _pixels(left, right, width)
        crops.append(features[:, :, y : y + h, x : x + w])
    size = (max(c.shape[2] for c in crops), max(c.shape[3] for c in crops))
    return torch.stack(
        [
            c if c.shape[2:] == size else F.interpolate(c, size=size, mode="bilinear", align_corners=False)
            for c in crops
        ],
        1,
    )


def _pixels(start: float, stop: float, side: int) -> tuple[int, int]:
    """First pixel and how many. Rounded up, so that boxes that tile leave no pixel out."""
    size = min(max(math.ceil((stop - start) * side - 1e-6), 1), side)
    return min(math.floor(start * side + 0.5), side - size), size


class LocalNets(nn.Module):
    """Crops (B, R, C, h, w) to vectors (B, R, dim): twice 3 x 3 convolution, batch norm, ReLU; then the mean.

    Every region has networks of its own, run as one grouped convolution; share=True has one for all.
    """

    def __init__(self, regions: int, in_channels: int, dim: int, share: bool = False) -> None:
        super().__init__()
        self.share, self.dim = share, dim
        nets = 1 if share else regions
        self.conv1 = nn.Conv2d(nets * in_channels, nets * dim, 3, padding=1, groups=nets, bias=False)
        self.norm1 = nn.BatchNorm2d(nets * dim)
        self.conv2 = nn.Conv2d(nets * dim, nets * dim, 3, padding=1, groups=nets, bias=False)
        self.norm2 = nn.BatchNorm2d(nets * dim)

    def forward(self, crops: Tensor) -> Tensor:
        batch, regions = crops.shape[:2]
        x = crops.flatten(0, 1) if self.share else crops.flatten(1, 2)
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return x.mean((2, 3)).reshape(batch, regions, self.dim)


class LocalClassifiers(nn.Module):
    """Vectors (B, R, dim) to logits (B, R, classes), by a linear layer for every region or one for all."""

    def __init__(self, regions: int, dim: int, classes: int, share: bool = False) -> None:
        super().__init__()
        nets = 1 if share else regions
        self.weight = nn.Parameter(torch.empty(nets, dim, classes))
        self.bias = nn.Parameter(torch.empty(nets, classes))
        bound = dim**-0.5  # as nn.Linear
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, vectors: Tensor) -> Tensor:
        return torch.einsum("brd,rdc->brc", vectors, self.weight.expand(vectors.shape[1], -1, -1)) + self.bias
