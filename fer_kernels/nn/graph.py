"""The dynamic graph: dilated nearest neighbours, stochastic dilation, relative position."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..knn.op import MAX_NEIGHBOURS, dilated_knn

_KEPT_SIZES = 8  # resized tables a module keeps: training on a few sizes must not resize at every call


class DilatedKnnGraph(nn.Module):
    """Every node's neighbours: `fer_kernels.dilated_knn` as a module, without gradients.

    Small grids: with M < k * dilation keys the dilation is limited to M // k, so a model made for 14 x 14
    nodes runs on 7 x 7; with M < k it is an error. `reduce_dilation=False` makes the first an error too.

    Args:
        k: neighbours a node.
        dilation: keep positions 0, d, 2d, ... of the k * d nearest; k * dilation is at most 128.
        stochastic: while training, with probability `epsilon` a call keeps k random positions of the k * d
            instead, the same for all its nodes and, like the others, nearest first. Off in eval.
        epsilon: that probability, in [0, 1].
        relative_position: a `RelativePosition` to add to the distances, or None.
        normalize: compare directions (True, as ViG) or raw features.
        reduce_dilation: limit the dilation on small grids, as above.
    """

    def __init__(
        self,
        k: int,
        dilation: int = 1,
        *,
        stochastic: bool = False,
        epsilon: float = 0.2,
        relative_position: RelativePosition | None = None,
        normalize: bool = True,
        reduce_dilation: bool = True,
    ) -> None:
        super().__init__()
        here = type(self).__name__
        checks.positive_int(here, "k", k)
        checks.positive_int(here, "dilation", dilation)
        if k * dilation > MAX_NEIGHBOURS:
            raise ValueError(
                f"{here}: k * dilation = {k * dilation} exceeds the limit of {MAX_NEIGHBOURS} "
                f"(k={k}, dilation={dilation})"
            )
        for name, value in (
            ("stochastic", stochastic),
            ("normalize", normalize),
            ("reduce_dilation", reduce_dilation),
        ):
            checks.a_bool(here, name, value)
        if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float)):
            raise TypeError(f"{here}: epsilon must be a number, got {epsilon!r}")
        if not 0 <= epsilon <= 1:
            raise ValueError(f"{here}: epsilon must lie in [0, 1], got {epsilon}")
        if relative_position is not None and not isinstance(relative_position, RelativePosition):
            raise TypeError(
                f"{here}: relative_position must be a RelativePosition or None, got {relative_position!r}"
            )
        self.k, self.dilation = k, dilation
        self.stochastic, self.epsilon = stochastic, float(epsilon)
        self.normalize, self.reduce_dilation = normalize, reduce_dilation
        self.relative_position = relative_position

    @torch.no_grad()
    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        grid: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """
        Args:
            x: nodes (B, N, C).
            y: keys (B, M, C); None takes x.
            grid: height and width of x's grid, for the relative position; see `RelativePosition.forward`.
            generator: stochastic dilation draws from it, one draw a call; a CPU one serves tensors on any
                device. None takes the global generator of x's device. Compiled code takes None only.

        Returns:
            idx (B, N, k) int64 into y, nearest first.
        """
        here = type(self).__name__
        checks.floating_nodes(here, "x", x)
        if y is not None:
            checks.floating_nodes(here, "y", y)
        if grid is not None and self.relative_position is None:
            check_grid(here, grid, x.shape[1])
        queries, keys = x.shape[1], (x if y is None else y).shape[1]
        dilation = self._dilation_for(queries, keys)
        bias = None
        if self.relative_position is not None:
            bias = self.relative_position(queries, keys, grid=grid)
            if bias.dtype not in (torch.float32, x.dtype):
                bias = bias.to(x.dtype)
        return dilated_knn(
            x.detach(),
            None if y is None else y.detach(),
            k=self.k,
            dilation=dilation,
            bias=bias,
            ranks=self._draw(x.device, dilation, generator),
            normalize=self.normalize,
        )

    def _dilation_for(self, queries: int, keys: int) -> int:
        if self.k * self.dilation <= keys or queries == 0:
            return self.dilation
        if self.k > keys or not self.reduce_dilation:
            raise ValueError(
                f"{type(self).__name__}: k * dilation = {self.k * self.dilation} exceeds the {keys} keys "
                f"(k={self.k}, dilation={self.dilation}, reduce_dilation={self.reduce_dilation}); "
                f"expected at least {self.k if self.reduce_dilation else self.k * self.dilation} keys"
            )
        return keys // self.k

    def _draw(self, device: torch.device, dilation: int, generator: torch.Generator | None) -> Tensor | None:
        """The positions to keep in this call, or None for every dilation-th; never waits for a GPU."""
        if not (self.training and self.stochastic and self.epsilon > 0 and dilation > 1):
            return None
        if generator is not None:
            if not isinstance(generator, torch.Generator):
                raise TypeError(
                    f"{type(self).__name__}: generator must be a torch.Generator or None, got {generator!r}"
                )
            if generator.device.type not in ("cpu", device.type):
                raise ValueError(
                    f"{type(self).__name__}: generator is on {generator.device} and x on {device}; "
                    "expected a CPU generator or one on x's device"
                )
            device = generator.device
        # Whether to draw, and what, from one tensor: no branch on a value, so it compiles and captures.
        noise = torch.rand(self.k * dilation + 1, device=device, generator=generator)
        drawn = noise[1:].argsort()[: self.k].sort().values
        usual = torch.arange(0, self.k * dilation, dilation, device=device)
        return torch.where(noise[0] < self.epsilon, drawn, usual)

    def extra_repr(self) -> str:
        text = f"k={self.k}, dilation={self.dilation}"
        if self.stochastic:
            text += f", stochastic=True, epsilon={self.epsilon:g}"
        if not self.normalize:
            text += ", normalize=False"
        if not self.reduce_dilation:
            text += ", reduce_dilation=False"
        return text


class RelativePosition(nn.Module):
    """The bias of ViG's pyramid models: the closer two patches are, the smaller their distance.

    With P the 2-D sine-cosine embedding of a grid of n patches, R = 2 P Pᵀ / D is (n, n) with ones on its
    diagonal. Its rows stay, its columns are resized (bicubic) to the n / r² keys, and its negative is kept in
    the buffer `relative_pos` (1, n, n / r²), which is not trained. A checkpoint's table of another size is
    resized when it is loaded.

    Args:
        channels: D, divisible by 4.
        grid: (height, width) of the patches, or one number for a square.
        reduction: r, where the keys are the patches after r x r average pooling.
    """

    relative_pos: Tensor

    def __init__(self, channels: int, grid: int | tuple[int, int], reduction: int = 1) -> None:
        super().__init__()
        table = relative_position_table(channels, grid, reduction)
        self.channels, self.reduction = channels, reduction
        self.grid: tuple[int, int] = (grid, grid) if isinstance(grid, int) else (grid[0], grid[1])
        self.register_buffer("relative_pos", table)
        # (N, M, grid) -> what it was made from, that tensor's version then, and the bias
        self._resized: dict[tuple, tuple[Tensor, int, Tensor]] = {}

    @torch.no_grad()
    def forward(self, queries: int, keys: int, *, grid: tuple[int, int] | None = None) -> Tensor:
        """The bias (1, N, M) for N queries and M keys.

        Where N and M are not the table's, the table is resized to them (bicubic) like ViG does, as a picture:
        that supposes a grid of the table's proportions. For other proportions pass `grid`, the (height,
        width) of the queries: its bias is then that of a module built for it. Sizes are kept once made.
        """
        here = type(self).__name__
        if grid is not None:
            check_grid(here, grid, queries)
            wanted = (grid[0] // self.reduction) * (grid[1] // self.reduction)
            if keys != wanted:
                raise ValueError(
                    f"{here}: grid {tuple(grid)} with reduction {self.reduction} has {wanted} keys, "
                    f"got {keys}"
                )
            if grid[0] * self.grid[1] == grid[1] * self.grid[0]:
                grid = None
        grid = None if grid is None else (grid[0], grid[1])
        table = self.relative_pos
        if grid is None and table.shape[1] == queries and table.shape[2] == keys:
            return table
        if torch.compiler.is_compiling():
            return self._make(queries, keys, grid)
        key = (queries, keys, grid)
        version = -1 if table.is_inference() else table._version
        source, made_at, bias = self._resized.get(key, (None, 0, table))
        if source is not table or made_at != version:
            bias = self._make(queries, keys, grid)
            if type(bias) is Tensor:  # a fake tensor must not outlive its mode
                while len(self._resized) >= _KEPT_SIZES:
                    del self._resized[next(iter(self._resized))]
                self._resized[key] = (table, version, bias)
        return bias

    def _make(self, queries: int, keys: int, grid: tuple[int, int] | None) -> Tensor:
        table = self.relative_pos
        if grid is None:
            return _resize(table, queries, keys)
        return relative_position_table(self.channels, grid, self.reduction, device=table.device).to(
            table.dtype
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_resized": {}}  # copies and pickles carry the table alone

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        loaded: Any = state_dict.get(prefix + "relative_pos")
        if isinstance(loaded, Tensor) and loaded.dim() == 3 and loaded.shape[0] == 1 and loaded.numel() > 0:
            state_dict[prefix + "relative_pos"] = _resize(loaded, *self.relative_pos.shape[1:])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, grid={self.grid}, reduction={self.reduction}"


def relative_position_table(
    channels: int,
    grid: int | tuple[int, int],
    reduction: int = 1,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """-R of `RelativePosition`, (1, n, n / r²) float32, for n patches in row-major order.

    Args:
        channels: D, divisible by 4: sines and cosines of rows and of columns.
        grid: (height, width), or one number for a square.
        reduction: r.
    """
    here = "relative_position_table"
    checks.positive_int(here, "channels", channels)
    checks.positive_int(here, "reduction", reduction)
    if channels % 4:
        raise ValueError(f"{here}: channels must be divisible by 4, got {channels}")
    if isinstance(grid, int):
        grid = (grid, grid)
    check_grid(here, grid)
    height, width = grid
    if min(height, width) < reduction:
        raise ValueError(f"{here}: reduction {reduction} exceeds a side of the grid {tuple(grid)}")

    double = torch.float64
    omega = 10000 ** (-torch.arange(channels // 4, dtype=double, device=device) / (channels / 4))
    angles = [torch.outer(torch.arange(n, dtype=double, device=device), omega) for n in (height, width)]
    rows, columns = (torch.cat([angle.sin(), angle.cos()], 1) for angle in angles)
    embedding = torch.cat([rows.repeat_interleave(width, 0), columns.repeat(height, 1)], 1)
    relation = (2 * embedding @ embedding.T / channels).float().unsqueeze(0)
    return -_resize(relation, height * width, (height // reduction) * (width // reduction))


def _resize(table: Tensor, queries: int, keys: int) -> Tensor:
    """(1, n, m) to (1, queries, keys), bicubic; in float32 at least."""
    if table.shape[1] == queries and table.shape[2] == keys:
        return table
    wide = table if table.dtype == torch.float64 else table.float()
    wide = F.interpolate(wide.unsqueeze(0), size=(queries, keys), mode="bicubic", align_corners=False)
    return wide.squeeze(0).to(table.dtype)


def check_grid(here: str, grid: Any, nodes: int | None = None) -> None:
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise TypeError(f"{here}: grid must be (height, width), got {grid!r}")
    for side in grid:
        checks.positive_int(here, "grid's sides", side)
    if nodes is not None and grid[0] * grid[1] != nodes:
        raise ValueError(f"{here}: grid {tuple(grid)} has {grid[0] * grid[1]} nodes, x has {nodes}")
