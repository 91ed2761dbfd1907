"""ViG's block on nodes (B, N, C): a graph convolution on a graph of the nodes' own, and a perceptron."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fer_kernels import dilated_knn
from fer_kernels.nn import (
    DilatedKnnGraph,
    DropPath,
    DynamicGraphConv,
    Projection,
    RelativePosition,
    create_conv,
    hooked,
)

from .stem import map_of, nodes_of

# The names that the systems use, and fer_kernels.nn's.
CONVS = {
    "rmr": "rmr",
    "rsum": "rsum",
    "rgate": "gate",
    "rboth": "both",
    "mr": "mr",
    "edge": "edge",
    "sage": "sage",
    "gin": "gin",
}
RELATIONS = ("rmr", "rsum", "rgate", "rboth")


class NodeGraph(DilatedKnnGraph):
    """A `DilatedKnnGraph` for any grid: where there are fewer keys than k, all are neighbours."""

    @torch.no_grad()
    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        grid: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        keys = (x if y is None else y).shape[1]
        if keys >= self.k:
            return super().forward(x, y, grid=grid, generator=generator)
        bias = None
        if self.relative_position is not None:
            bias = self.relative_position(x.shape[1], keys, grid=grid)
            bias = bias if bias.dtype in (torch.float32, x.dtype) else bias.to(x.dtype)
        return dilated_knn(
            x.detach(), None if y is None else y.detach(), k=keys, bias=bias, normalize=self.normalize
        )


class Grapher(nn.Module):
    """x + fc2(graph convolution(fc1(x))), where fc1 and fc2 are linear with a batch norm.

    Args:
        dim: C.
        k, dilation, stochastic, epsilon: of the graph, as in `DilatedKnnGraph`.
        reduction: r; the keys are the nodes after r x r average pooling.
        relative_grid: (height, width) of the nodes that the relative position is made for; None for none.
        conv: one of `CONVS`.
        conv_options: of that convolution.
        drop_path: probability with which a sample skips the branch in training.
    """

    def __init__(
        self,
        dim: int,
        k: int,
        dilation: int = 1,
        *,
        reduction: int = 1,
        relative_grid: tuple[int, int] | None = None,
        conv: str = "mr",
        conv_options: dict[str, Any] | None = None,
        stochastic: bool = False,
        epsilon: float = 0.2,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        position = None if relative_grid is None else RelativePosition(dim, relative_grid, reduction)
        self.reduction = reduction
        self.fc1 = Projection(dim, dim, groups=1, act=None)
        self.graph_conv = DynamicGraphConv(
            NodeGraph(k, dilation, stochastic=stochastic, epsilon=epsilon, relative_position=position),
            create_conv(CONVS[conv], dim, 2 * dim, **(conv_options or {})),
        )
        self.fc2 = Projection(2 * dim, dim, groups=1, act=None)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Tensor, grid: tuple[int, int], weights: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x (B, h * w, C) on this grid to nodes of the same shape, their graph (B, N, k), and with `weights`
        those of a relation-aware convolution."""
        nodes, keys = self.fc1(x), None
        if self.reduction > 1:
            keys = nodes_of(F.avg_pool2d(map_of(nodes, grid), self.reduction))
        found: Any = self.graph_conv(
            nodes,
            keys,
            grid=grid,
            return_graph=True,
            return_weights=weights,
            unfinished=not hooked(self.fc2),
        )
        nodes = self.fc2(found[0], residual=x, gain=self.drop_path.draw(x))
        return nodes, found[1], found[2] if weights else None


class FFN(nn.Module):
    """x + fc2(GELU(fc1(x))), where fc1 and fc2 are linear with a batch norm, and fc1 widens."""

    def __init__(self, dim: int, ratio: int = 4, drop_path: float = 0.0) -> None:
        super().__init__()
        self.fc1 = Projection(dim, ratio * dim, groups=1)
        self.fc2 = Projection(ratio * dim, dim, groups=1, act=None)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x, unfinished=not hooked(self.fc2))
        return self.fc2(hidden, residual=x, gain=self.drop_path.draw(x))


class Block(nn.Module):
    """A `Grapher` and an `FFN`."""

    def __init__(
        self, dim: int, k: int, dilation: int = 1, *, drop_path: float = 0.0, **options: Any
    ) -> None:
        super().__init__()
        self.grapher = Grapher(dim, k, dilation, drop_path=drop_path, **options)
        self.ffn = FFN(dim, drop_path=drop_path)

    def forward(
        self, x: Tensor, grid: tuple[int, int], weights: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `Grapher.forward`."""
        x, graph, found = self.grapher(x, grid, weights)
        return self.ffn(x), graph, found
