"""Graph convolutions of ViG and Face2Nodes on nodes (B, N, C) and neighbours (B, N, k).

Only "mr", "rmr", "rsum" and "both" are fused. The others, "gate" and relation="diff+dist" hold edge tensors
(B, N, k, C) in plain PyTorch: they are there to compare with.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import checks, dispatch
from ..linear.op import RowNorm, chain_dtype, is_faster, linear, normed_linear
from ..linear.reference import interleave
from ..norm.op import batch_norm_act, track, with_shift
from ..relation.op import MAX_NEIGHBOURS, relation_aggregate, reverse_graph
from ..relation.reference import neighbours
from .graph import check_grid
from .norm import along, apart, fused, fuses, joined, name_of

Norm = str | Callable[[int], nn.Module] | None
Act = str | Callable[[], nn.Module] | None

# Where the processor multiplies tiles of bfloat16 (AMX), the zeros of a block-diagonal weight cost less than
# the copies that bring every group's columns together for a batched product, up to this width of a group:
# forward and backward of 3,136 nodes took 0.5 of the time at C = 192, 0.8 at C = 320 and 1.1 at C = 400.
TILED_WIDTH = 160
_TILES = torch.cpu._is_amx_tile_supported()  # torch multiplies here, not this package: so torch is asked

_NORMS: dict[str, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
_ACTS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "leaky_relu": functools.partial(nn.LeakyReLU, 0.2),
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
}


class GroupedLinear(nn.Module):
    """A 1 x 1 convolution in groups, channels last: (..., C_in) to (..., C_out).

    Group g makes its C_out / G channels from its C_in / G, like `nn.Conv2d(..., 1, groups=G)`, whose weight
    (C_out, C_in / G, 1, 1) loads as well. Initialised as in ViG: Kaiming normal, bias 0.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int = 4, bias: bool = True) -> None:
        super().__init__()
        here = type(self).__name__
        _check_channels(here, in_channels, out_channels)
        checks.positive_int(here, "groups", groups)
        checks.a_bool(here, "bias", bias)
        _check_divisible(here, "in_channels", in_channels, "groups", groups)
        _check_divisible(here, "out_channels", out_channels, "groups", groups)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_channels:
            raise ValueError(
                f"{type(self).__name__}: x must be (..., {self.in_channels}), got {checks.shape(x)}"
            )
        return grouped_linear(x, None, self.weight, self.bias, self.groups)

    def interleaved(self, x: Tensor, m: Tensor) -> Tensor:
        """self(interleave(x, m)), x and m (..., C_in / 2), without the interleaved nodes in memory."""
        return grouped_linear(x, m, self.weight, self.bias, self.groups)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight = state_dict.get(prefix + "weight")
        if isinstance(weight, Tensor) and weight.dim() > 2 and weight.shape[2:].numel() == 1:
            state_dict[prefix + "weight"] = weight.flatten(1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        bias = "" if self.bias is not None else ", bias=False"
        return f"{self.in_channels}, {self.out_channels}, groups={self.groups}{bias}"


def grouped_linear(x: Tensor, m: Tensor | None, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """x (..., C_in), or with m the interleaved x and m (..., C_in / 2), through weight (C_out, C_in / groups)
    to (..., C_out)."""
    if m is not None and x.shape[-1] % groups:
        x, m = interleave(x, m), None
    if is_faster(x, weight):
        return linear(x, weight, bias, m=None if m is None else m.to(x.dtype), groups=groups)
    if groups == 1:
        x = x if m is None else interleave(x, m)
        return F.linear(x, weight, bias)
    if _TILES and x.dtype == torch.bfloat16 and x.device.type == "cpu" and weight.shape[1] <= TILED_WIDTH:
        nodes = x if m is None else torch.cat((x, m.to(x.dtype)), -1)
        return F.linear(nodes, _block_diagonal(weight, groups, 1 if m is None else 2), bias)
    if m is None:
        out = _batched_product(x, weight, bias, groups)
    else:
        # A group's columns for x and those for m are each a strided view of its weight.
        of_x, of_m = weight.unflatten(-1, (-1, 2)).unbind(-1)
        out = _batched_product(m.to(x.dtype), of_m, _batched_product(x, of_x, bias, groups), groups)
    return out.transpose(0, 1).reshape(*x.shape[:-1], weight.shape[0])


def _block_diagonal(weight: Tensor, groups: int, parts: int) -> Tensor:
    """The weight (C_out, C_in / groups) of a grouped product as the (C_out, C_in) of a plain one, mostly
    zeros. Its columns, `parts` interleaved inputs, become those for the first input, then the second's."""
    blocks = weight.unflatten(0, (groups, -1)).unflatten(-1, (-1, parts))
    return torch.diag_embed(blocks.permute(1, 3, 2, 0), dim1=0, dim2=3).reshape(weight.shape[0], -1)


def _batched_product(x: Tensor, weight: Tensor, added: Tensor | None, groups: int) -> Tensor:
    """(groups, rows, C_out / groups): one batched product with a group as the batch, on views of x
    (..., C_in) and the weight (C_out, C_in / groups). `added` is a bias or such a product, or None."""
    rows = x.flatten(0, -2).unflatten(-1, (groups, -1)).transpose(0, 1)
    weight = weight.unflatten(0, (groups, -1)).transpose(1, 2)
    if added is None:
        return torch.bmm(rows, weight)
    return torch.baddbmm(added.view(groups, 1, -1) if added.dim() == 1 else added, rows, weight)


class Unfinished(NamedTuple):
    """What a `Projection` or a convolution leaves to the one that takes its result: a product, and its norm
    and activation, which are then done as its rows are fetched for the next product."""

    y: Tensor  # (B, ..., C)
    norm: RowNorm

    @classmethod
    def behind(
        cls, y: Tensor, mean: Tensor, var: Tensor, norm: Any, act: nn.Module | None, shift: Tensor | None
    ) -> Unfinished:
        """act(norm(y + shift)) with y's statistics, which the norm tracks."""
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        rows = y.numel() // y.shape[-1]
        track(norm.running_mean, norm.running_var, norm.momentum, mean, var, rows, shift)
        bias = with_shift(norm.bias, shift)
        return cls(y, RowNorm(mean, var, norm.weight, bias, norm.eps, name_of(act)))

    def finished(self, residual: Tensor | None = None, gain: Tensor | None = None) -> Tensor:
        rows, norm = self.y.flatten(0, -2), self.norm
        y = batch_norm_act(
            rows,
            norm.weight,
            norm.bias,
            act=norm.act,
            residual=along(residual, rows),
            gain=gain,
            statistics=(norm.mean, norm.var),
            eps=norm.eps,
        )
        return y.reshape(self.y.shape)


def hooked(*modules: nn.Module) -> bool:
    """Whether anybody looks at what goes in or out of these: then it is nodes, and nothing is unfinished."""
    if torch.compiler.is_compiling():  # which leaves products to torch, and need not look into hooks
        return True
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return _has_any_global_hook() or any(getattr(module, kind) for module in modules for kind in kinds)


class Projection(nn.Module):
    """act(norm(grouped linear)): ViG's BasicConv on (..., C_in), with the norm over channels of all rows.

    Args:
        in_channels, out_channels: divisible by `groups`.
        groups: of the linear part.
        bias: of the linear part.
        norm: "batch", "layer", None, or a function from a channel count to a module that takes (rows, C).
        act: "gelu", "relu", "leaky_relu", "silu", "hardswish", None, or a function that makes a module.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int = 4,
        bias: bool = True,
        norm: Norm = "batch",
        act: Act = "gelu",
    ) -> None:
        super().__init__()
        here = type(self).__name__
        self.linear = GroupedLinear(in_channels, out_channels, groups, bias)
        make_norm, make_act = _look_up(here, "norm", norm, _NORMS), _look_up(here, "act", act, _ACTS)
        self.norm = nn.Identity() if make_norm is None else make_norm(out_channels)
        self.act = nn.Identity() if make_act is None else make_act()

    def forward(
        self,
        x: Tensor | Unfinished,
        m: Tensor | None = None,
        also: Tensor | None = None,
        *,
        residual: Tensor | None = None,
        gain: Tensor | None = None,
        unfinished: bool = False,
    ) -> Any:
        """act(gain * norm(linear(x) + also) + residual), what is None left out.

        Args:
            x: (B, ..., C_in), or with m (B, ..., C_in / 2); or what another projection left unfinished.
            m: as x; what is projected is `interleave(x, m)`.
            also, residual: (B, ..., C_out).
            gain: (B), such as `DropPath.draw` makes; has no gradient.
            unfinished: leave norm and activation to the projection that takes the result, where that is
                as fast, and holds less, and there is neither residual nor gain.

        Returns:
            (B, ..., C_out), or an `Unfinished`.
        """
        linear = self.linear
        left = self._chained(x, m) if also is None else None
        if left is not None:
            leaves = unfinished and residual is None and gain is None and not hooked(self)
            return left if leaves else left.finished(residual, gain)
        if isinstance(x, Unfinished):
            x = x.finished()
        if self._folds(x):
            scale, weight, bias = self._folded()
            x = grouped_linear(x, m, weight, bias, linear.groups)
            x = x if also is None else torch.addcmul(x, also.to(x.dtype), scale.to(x.dtype))
            return self.act(joined(x, residual, gain))
        in_one = fuses(self.norm, self.act, x)
        if in_one:  # the bias changes what the norm tracks, and no more
            x = grouped_linear(x, m, linear.weight, None, linear.groups)
        else:
            x = linear(x) if m is None else linear.interleaved(x, m)
        if also is not None:
            x = x + also
        if in_one:
            return fused(self.norm, self.act, x, residual, gain, shift=linear.bias)
        return apart(self.norm, self.act, x, residual, gain)

    def _chained(self, x: Tensor | Unfinished, m: Tensor | None) -> Unfinished | None:
        """The product with its statistics, where that is faster; else nothing."""
        linear, norm = self.linear, None
        nodes = x.y if isinstance(x, Unfinished) else x
        dtype = chain_dtype(nodes, linear.weight)
        if dtype is None or not fuses(self.norm, self.act, nodes):
            return None
        if isinstance(x, Unfinished):
            norm = x.norm
        if m is not None and (norm or nodes.shape[-1] % linear.groups or m.dtype not in (dtype, nodes.dtype)):
            return None
        rows, of_m = nodes.flatten(0, -2).to(dtype), None if m is None else m.flatten(0, -2).to(dtype)
        y, mean, var = normed_linear(rows, linear.weight, norm=norm, m=of_m, groups=linear.groups)
        return Unfinished.behind(
            y.reshape(*nodes.shape[:-1], -1), mean, var, self.norm, self.act, linear.bias
        )

    def _folds(self, x: Tensor) -> bool:
        """Whether the norm is a fixed scale and shift that is cheaper in the weights: on a CPU, where a pass
        over the nodes takes longer than one over the weights."""
        norm = self.norm
        fixed = isinstance(norm, nn.BatchNorm1d) and not norm.training and norm.running_mean is not None
        return fixed and x.device.type == "cpu"

    def _folded(self) -> tuple[Tensor, Tensor, Tensor]:
        """The norm's scale, and the linear part's weight and bias with the norm in them."""
        norm: Any = self.norm
        linear = self.linear
        scale = torch.rsqrt(norm.running_var + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight
        mean = norm.running_mean if linear.bias is None else norm.running_mean - linear.bias
        bias = -mean * scale if norm.bias is None else torch.addcmul(norm.bias, mean, scale, value=-1)
        return scale, linear.weight * scale.unsqueeze(1), bias


class _GraphConv(nn.Module):
    """What all graph convolutions share: their channels and the checks of their inputs."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        _check_channels(type(self).__name__, in_channels, out_channels)
        self.in_channels, self.out_channels = in_channels, out_channels

    def _project(self, in_channels: int, out_channels: int, groups: int, **options: Any) -> Projection:
        """The projection, with errors in terms of this module's own arguments."""
        here = type(self).__name__
        checks.positive_int(here, "groups", groups)
        name = {self.in_channels: "in_channels", 2 * self.in_channels: "2 * in_channels"}[in_channels]
        _check_divisible(here, name, in_channels, "groups", groups)
        _check_divisible(here, "out_channels", out_channels, "groups", groups)
        return Projection(in_channels, out_channels, groups=groups, **options)

    def _checked(self, x: Tensor, idx: Tensor, y: Tensor | None, values: bool) -> tuple[Tensor, Tensor]:
        """idx as int64, and the keys. `values`: check that idx lies within the keys, as the operators do."""
        here, channels = type(self).__name__, self.in_channels
        checks.floating_nodes(here, "x", x)
        if x.shape[2] != channels:
            raise ValueError(
                f"{here}: x must be (B, N, C) with C = in_channels = {channels}, got {checks.shape(x)}"
            )
        checks.dense_tensor(here, "idx", idx)
        if idx.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{here}: idx must be int64 or int32, got {idx.dtype}")
        checks.same_device(here, "idx", idx, "x", x)
        if idx.dim() != 3 or idx.shape[0] != x.shape[0] or idx.shape[1] != x.shape[1]:
            raise ValueError(
                f"{here}: idx must be (B, N, k) with B = {x.shape[0]} and N = {x.shape[1]} "
                f"as in x {checks.shape(x)}, got {checks.shape(idx)}"
            )
        if not 1 <= idx.shape[2] <= MAX_NEIGHBOURS:
            raise ValueError(
                f"{here}: k must lie between 1 and {MAX_NEIGHBOURS}, got {idx.shape[2]} "
                f"(idx: {checks.shape(idx)})"
            )
        if y is not None:
            checks.floating_nodes(here, "y", y)
            if y.dtype != x.dtype:
                raise TypeError(f"{here}: y must have x's dtype {x.dtype}, got {y.dtype}")
            checks.same_device(here, "y", y, "x", x)
            if y.shape[0] != x.shape[0] or y.shape[2] != channels:
                raise ValueError(
                    f"{here}: y must be (B, M, C) with B = {x.shape[0]} and C = {channels} "
                    f"as in x {checks.shape(x)}, got {checks.shape(y)}"
                )
        keys = x if y is None else y
        traced = torch.compiler.is_compiling() or type(idx) is not Tensor
        if values and not traced and idx.numel() and (idx.device.type == "cpu" or dispatch.CHECK_VALUES):
            low, high = (int(bound) for bound in torch.aminmax(idx))
            if low < 0 or high >= keys.shape[1]:
                raise RuntimeError(
                    f"{here}: idx must lie in [0, M) with M = {keys.shape[1]}, "
                    f"but idx holds values from {low} to {high}"
                )
        return idx.long(), keys

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}"


class MaxRelativeConv(_GraphConv):
    """ViG's graph convolution: m_i = max_j (y_j - x_i), then act(norm(W interleave(x_i, m_i))).

    Args:
        in_channels: C; 2C is divisible by `groups`.
        out_channels: divisible by `groups`; ViG takes 2C.
        groups, bias, norm, act: of the `Projection`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int = 4,
        bias: bool = True,
        norm: Norm = "batch",
        act: Act = "gelu",
    ) -> None:
        super().__init__(in_channels, out_channels)
        self.projection = self._project(2 * in_channels, out_channels, groups, bias=bias, norm=norm, act=act)

    def forward(
        self,
        x: Tensor,
        idx: Tensor,
        y: Tensor | None = None,
        *,
        reverse: Tensor | None = None,
        unfinished: bool = False,
    ) -> Any:
        """
        Args:
            x: nodes (B, N, C).
            idx: neighbours (B, N, k) into y, from `DilatedKnnGraph`.
            y: keys (B, M, C); None takes x.
            reverse: `fer_kernels.reverse_graph(idx, M)`, where several layers share one graph on a GPU.
            unfinished: as of the `Projection`.

        Returns:
            (B, N, out_channels), or an `Unfinished`.
        """
        idx, _ = self._checked(x, idx, y, values=False)
        m = relation_aggregate(x, idx, y, mode="mr", reverse=reverse)
        return self.projection(x, m, unfinished=unfinished)


class RelationConv(_GraphConv):
    """Face2Nodes' relation-aware graph convolution; our reading of the paper, whose equations are not public.

    With δ_ij = y_j - x_i and the relation r_ij = LeakyReLU(W_r [x_i ; δ_ij] + b_r) in R channels,

        conv="rmr":   m_i = max_j k α_ij δ_ij,   α_ij = softmax_j(a_h · r_ij) in each of H heads
        conv="rsum":  m_i = Σ_j α_ij δ_ij
        conv="gate":  m_i = max_j 2 σ(g_ij) δ_ij, with g_ij = W_g r_ij, one gate a channel (gate="channel"),
                      or a_h · r_ij, one a head (gate="head", without the product of R x C an edge)
        conv="both":  m_i = max_j δ_ij, and s_i = Σ_j α_ij δ_ij with a projection W_s of its own

    and then act(norm(W interleave(x_i, m_i) [+ W_s s_i])).

    a, W_g and W_s start at zero, so that "rmr", "gate" (hence the 2: 2 σ(0) = 1) and "both" start as
    exactly the `MaxRelativeConv` with the same projection: its weights load with strict=False, and only
    relation parameters are missing. "rsum" has the same parameters, but starts from the mean of δ.

    W_r = [W_a W_b] is applied to nodes rather than edges: p = x (W_a - W_b)ᵀ + b_r and q = y W_bᵀ, and
    r_ij = LeakyReLU(p_i + q_j).

    `relation` adds to the differences, within the LeakyReLU, what starts at zero: "diff+pos" W_p (s_j - s_i),
    where s are the places of nodes and keys on their grid, from -1 to 1; "diff+dist" w_d times the squared
    distance of the two directions, as in the graph. Places split into p and q as well; distances do not, so
    that "diff+dist" holds edge tensors.

    Args:
        in_channels: C, divisible by `heads`; 2C is divisible by `groups` (for "both", C is).
        out_channels: divisible by `groups`.
        conv: as above.
        heads: H.
        relation_dim: R, divisible by `heads`; None takes C / 4, rounded down to a multiple of H, at least H.
        relation: "diff", "diff+pos" or "diff+dist".
        gate: "channel" or "head", for conv="gate". A gate for each channel needs no heads, and ignores them.
        negative_slope: of the LeakyReLU.
        groups, bias, norm, act: of the `Projection`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        conv: str = "rmr",
        heads: int = 4,
        relation_dim: int | None = None,
        relation: str = "diff",
        gate: str = "channel",
        negative_slope: float = 0.2,
        groups: int = 4,
        bias: bool = True,
        norm: Norm = "batch",
        act: Act = "gelu",
    ) -> None:
        super().__init__(in_channels, out_channels)
        here = type(self).__name__
        checks.a_choice(here, "conv", conv, ("rmr", "rsum", "gate", "both"))
        checks.a_choice(here, "relation", relation, ("diff", "diff+pos", "diff+dist"))
        checks.a_choice(here, "gate", gate, ("channel", "head"))
        checks.positive_int(here, "heads", heads)
        if relation_dim is None:
            relation_dim = max(in_channels // 4 // heads, 1) * heads
        checks.positive_int(here, "relation_dim", relation_dim)
        if isinstance(negative_slope, bool) or not isinstance(negative_slope, (int, float)):
            raise TypeError(f"{here}: negative_slope must be a number, got {negative_slope!r}")
        self.conv, self.heads, self.relation_dim = conv, heads, relation_dim
        self.features, self.gate, self.negative_slope = relation, gate, float(negative_slope)
        self.projection = self._project(2 * in_channels, out_channels, groups, bias=bias, norm=norm, act=act)
        self.relation = nn.Linear(2 * in_channels, relation_dim)
        if relation == "diff+pos":
            self.position = nn.Parameter(torch.empty(relation_dim, 2))
        if relation == "diff+dist":
            self.distance = nn.Parameter(torch.empty(relation_dim))
        if conv == "gate" and gate == "channel":
            self.gate_weight = nn.Parameter(torch.empty(in_channels, relation_dim))
        else:
            _check_divisible(here, "in_channels", in_channels, "heads", heads)
            _check_divisible(here, "relation_dim", relation_dim, "heads", heads)
            self.a = nn.Parameter(torch.empty(heads, relation_dim // heads))
        if conv == "both":
            _check_divisible(here, "in_channels", in_channels, "groups", groups)
            self.sum_projection = GroupedLinear(in_channels, out_channels, groups, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The start described above. The projection's own parameters are left as they are."""
        nn.init.kaiming_normal_(self.relation.weight, self.negative_slope, nonlinearity="leaky_relu")
        nn.init.zeros_(self.relation.bias)
        if self.features == "diff+pos":
            nn.init.zeros_(self.position)
        if self.features == "diff+dist":
            nn.init.zeros_(self.distance)
        if self.conv == "gate" and self.gate == "channel":
            nn.init.zeros_(self.gate_weight)
        else:
            nn.init.zeros_(self.a)
        if self.conv == "both":
            nn.init.zeros_(self.sum_projection.weight)

    def forward(
        self,
        x: Tensor,
        idx: Tensor,
        y: Tensor | None = None,
        *,
        grid: tuple[int, int] | None = None,
        return_weights: bool = False,
        reverse: Tensor | None = None,
        unfinished: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """
        Args:
            x: nodes (B, N, C).
            idx: neighbours (B, N, k) into y, from `DilatedKnnGraph`.
            y: keys (B, M, C); None takes x.
            grid: height and width of x's grid, for "diff+pos"; None supposes a square. y is the same grid, or
                that of its averages over squares.
            return_weights: also return α (B, N, k, H), or for "gate" the gates 2 σ(g), (B, N, k, C or H).
            reverse: `fer_kernels.reverse_graph(idx, M)`, where several layers share one graph on a GPU.
                "both" makes its own for its two aggregations.
            unfinished: as of the `Projection`.

        Returns:
            (B, N, out_channels), or an `Unfinished`, and the weights where asked for.
        """
        here = type(self).__name__
        checks.a_bool(here, "return_weights", return_weights)
        plain = self.conv == "gate" or self.features == "diff+dist"
        idx, keys = self._checked(x, idx, y, values=plain)
        w_a, w_b = self.relation.weight.chunk(2, 1)
        p = grouped_linear(x, None, w_a - w_b, self.relation.bias, 1).to(x.dtype)  # autocast may make these
        q = grouped_linear(keys, None, w_b, None, 1).to(x.dtype)  # of another dtype than x
        if self.features == "diff+pos":
            of_x, of_y = _places(x.shape[1], keys.shape[1], grid, self.position)
            p = p - F.linear(of_x, self.position).to(x.dtype)
            q = q + F.linear(of_y, self.position).to(x.dtype)
        trained = torch.is_grad_enabled() and (x.requires_grad or keys.requires_grad or p.requires_grad)
        if self.conv == "both" and reverse is None and trained and x.device.type == "cuda":
            reverse = reverse_graph(idx, keys.shape[1])
        found: Any  # a tensor or two
        if plain:
            found = self._plain(x, idx, keys, p, q)
        else:
            found = relation_aggregate(  # type: ignore[call-overload]
                x,
                idx,
                y,
                p=p,
                q=q,
                a=self.a.to(x.dtype),
                mode="rsum" if self.conv == "both" else self.conv,
                negative_slope=self.negative_slope,
                return_weights=return_weights,
                reverse=reverse,
            )
        weights: Any
        m, weights = found if plain or return_weights else (found, None)
        also = None
        if self.conv == "both":
            also = self.sum_projection(m)
            m = relation_aggregate(x, idx, y, mode="mr", reverse=reverse)
        out = self.projection(x, m, also, unfinished=unfinished)
        return (out, weights) if return_weights else out

    def _plain(self, x: Tensor, idx: Tensor, keys: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """m (B, N, C), the sum for "both", and the weights or gates; holds edge tensors of R and of C
        channels."""
        relation = p.unsqueeze(2) + neighbours(q, idx)
        if self.features == "diff+dist":
            relation = relation + _distances(x, keys, idx).unsqueeze(-1) * self.distance.to(x.dtype)
        relation = F.leaky_relu(relation, self.negative_slope)
        delta = neighbours(keys, idx) - x.unsqueeze(2)
        if self.conv == "gate" and self.gate == "channel":
            gates = 2 * torch.sigmoid(F.linear(relation, self.gate_weight)).to(x.dtype)
            return (gates * delta).max(2).values, gates
        logits = (relation.unflatten(-1, self.a.shape) * self.a.to(x.dtype)).sum(-1)
        weights = 2 * torch.sigmoid(logits) if self.conv == "gate" else torch.softmax(logits, 2)
        weights = weights.to(x.dtype)
        weighted = (delta.unflatten(-1, (self.heads, -1)) * weights.unsqueeze(-1)).flatten(-2)
        if self.conv in ("rsum", "both"):
            return weighted.sum(2), weights
        return (weighted if self.conv == "gate" else idx.shape[2] * weighted).max(2).values, weights

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, conv={self.conv!r}, relation_dim={self.relation_dim}"
        if self.features != "diff":
            text += f", relation={self.features!r}"
        if self.conv == "gate":
            text += f", gate={self.gate!r}"
        if self.conv != "gate" or self.gate == "head":
            text += f", heads={self.heads}"
        return f"{text}, negative_slope={self.negative_slope:g}"


@torch.no_grad()
def _distances(x: Tensor, keys: Tensor, idx: Tensor) -> Tensor:
    """(B, N, k), of x's dtype: squared, between directions, and constants as in the graph."""
    wide = checks.accumulation_dtype(x.dtype)
    from_x, to_y = (F.normalize(nodes.to(wide), dim=-1) for nodes in (x, keys))
    return (from_x.unsqueeze(2) - neighbours(to_y, idx)).square().sum(-1).to(x.dtype)


def _places(queries: int, keys: int, grid: tuple[int, int] | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the nodes' centres, (N, 2), and of the keys', (M, 2); the grid is from -1 to 1."""
    here = "RelationConv"
    if grid is None:
        side = math.isqrt(queries)
        if side * side != queries:
            raise ValueError(
                f"{here}: relation='diff+pos' needs grid for {queries} nodes, which are no square"
            )
        grid = (side, side)
    check_grid(here, grid, queries)
    height, width = grid
    fitting = (r for r in range(1, min(grid) + 1) if (height // r) * (width // r) == keys)
    reduction = next(fitting, None)
    if reduction is None:
        raise ValueError(f"{here}: {keys} keys are not the averages over squares of a grid of {tuple(grid)}")

    def centres(step: int) -> Tensor:
        sides = [
            (torch.arange(side // step, device=like.device, dtype=like.dtype) + 0.5) * (2 * step / side) - 1
            for side in (height, width)
        ]
        return torch.stack(torch.meshgrid(*sides, indexing="ij"), -1).flatten(0, 1)

    return centres(1), centres(reduction)


class EdgeConv(_GraphConv):
    """y_i = max_j act(norm(W [x_i ; y_j - x_i])), the two halves one after the other as in ViG.

    With four groups the first two see x alone, so half of the channels are a function of the node only;
    groups=1 is the EdgeConv of the literature. A batch norm takes its statistics over edges.

    Args: as in `MaxRelativeConv`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int = 4,
        bias: bool = True,
        norm: Norm = "batch",
        act: Act = "gelu",
    ) -> None:
        super().__init__(in_channels, out_channels)
        self.projection = self._project(2 * in_channels, out_channels, groups, bias=bias, norm=norm, act=act)

    def forward(self, x: Tensor, idx: Tensor, y: Tensor | None = None) -> Tensor:
        """x (B, N, C), idx (B, N, k) into y (B, M, C) or x: (B, N, out_channels)."""
        idx, keys = self._checked(x, idx, y, values=True)
        delta = neighbours(keys, idx) - x.unsqueeze(2)
        edges = torch.cat([x.unsqueeze(2).expand_as(delta), delta], -1)
        return self.projection(edges).max(2).values


class SAGEConv(_GraphConv):
    """m_i = max_j act(norm(W_1 y_j)), then act(norm(W_2 [x_i ; m_i])), halves one after the other as in ViG.

    The first norm's batch statistics are over edges, as in ViG: a key counts as often as it is a neighbour.

    Args: as in `MaxRelativeConv`, and C is divisible by `groups`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int = 4,
        bias: bool = True,
        norm: Norm = "batch",
        act: Act = "gelu",
    ) -> None:
        super().__init__(in_channels, out_channels)
        options: dict[str, Any] = {"bias": bias, "norm": norm, "act": act}
        self.neighbour_projection = self._project(in_channels, in_channels, groups, **options)
        self.projection = self._project(2 * in_channels, out_channels, groups, **options)

    def forward(self, x: Tensor, idx: Tensor, y: Tensor | None = None) -> Tensor:
        """x (B, N, C), idx (B, N, k) into y (B, M, C) or x: (B, N, out_channels)."""
        idx, keys = self._checked(x, idx, y, values=True)
        m = self.neighbour_projection(neighbours(keys, idx)).max(2).values
        # Under autocast the projection has made m narrower than x; cat brings both to one dtype.
        return self.projection(torch.cat([x, m], -1))


class GINConv(_GraphConv):
    """y_i = act(norm(W ((1 + ε) x_i + Σ_j y_j))), ε learned from 0.

    Args: as in `MaxRelativeConv`, and C is divisible by `groups`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int = 4,
        bias: bool = True,
        norm: Norm = "batch",
        act: Act = "gelu",
    ) -> None:
        super().__init__(in_channels, out_channels)
        self.projection = self._project(in_channels, out_channels, groups, bias=bias, norm=norm, act=act)
        self.eps = nn.Parameter(torch.zeros(1))  # one element and not a scalar: so are ViG's checkpoints

    def forward(self, x: Tensor, idx: Tensor, y: Tensor | None = None) -> Tensor:
        """x (B, N, C), idx (B, N, k) into y (B, M, C) or x: (B, N, out_channels)."""
        idx, keys = self._checked(x, idx, y, values=True)
        return self.projection((1 + self.eps).to(x.dtype) * x + neighbours(keys, idx).sum(2))


class DynamicGraphConv(nn.Module):
    """A graph made from the nodes themselves, and a convolution on it.

    Args:
        graph: a `DilatedKnnGraph`, or any module called as graph(x, y, grid=..., generator=...).
        conv: a graph convolution, such as one of `create_conv`.
    """

    def __init__(self, graph: nn.Module, conv: nn.Module) -> None:
        super().__init__()
        for name, module in (("graph", graph), ("conv", conv)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{type(self).__name__}: {name} must be a module, got {module!r}")
        self.dynamic_graph, self.conv = graph, conv  # an exported module has a `graph` of its own

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        grid: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
        return_graph: bool = False,
        return_weights: bool = False,
        unfinished: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """
        Args:
            x: nodes (B, N, C).
            y: keys (B, M, C); None takes x.
            grid, generator: for the graph, see `DilatedKnnGraph`; the grid for relation="diff+pos" too.
            return_graph: also return idx.
            return_weights: also return the convolution's weights, from a `RelationConv`.
            unfinished: as of the `Projection`, for convolutions that end with one.

        Returns:
            nodes (B, N, out_channels), or an `Unfinished`, then idx (B, N, k) and the weights where asked
            for, in this order.
        """
        checks.a_bool(type(self).__name__, "return_graph", return_graph)
        idx = self.dynamic_graph(x, y, grid=grid, generator=generator)
        options: dict[str, Any] = {}
        if isinstance(self.conv, RelationConv) and self.conv.features == "diff+pos":
            options["grid"] = grid
        if type(self.conv) in (MaxRelativeConv, RelationConv):  # a subclass may not know it
            options["unfinished"] = unfinished and not hooked(self, self.conv)
        if return_weights:
            nodes, weights = self.conv(x, idx, y, return_weights=True, **options)
            return (nodes, idx, weights) if return_graph else (nodes, weights)
        nodes = self.conv(x, idx, y, **options)
        return (nodes, idx) if return_graph else nodes


CONVS: dict[str, Callable[..., nn.Module]] = {
    "mr": MaxRelativeConv,
    "rmr": functools.partial(RelationConv, conv="rmr"),
    "rsum": functools.partial(RelationConv, conv="rsum"),
    "gate": functools.partial(RelationConv, conv="gate"),
    "both": functools.partial(RelationConv, conv="both"),
    "edge": EdgeConv,
    "sage": SAGEConv,
    "gin": GINConv,
}


def create_conv(name: str, in_channels: int, out_channels: int, **options: Any) -> nn.Module:
    """The graph convolution of this name in `CONVS`; `options` are its keyword arguments."""
    checks.a_choice("create_conv", "name", name, tuple(CONVS))
    return CONVS[name](in_channels, out_channels, **options)


def _check_channels(here: str, in_channels: Any, out_channels: Any) -> None:
    checks.positive_int(here, "in_channels", in_channels)
    checks.positive_int(here, "out_channels", out_channels)


def _check_divisible(here: str, name: str, value: int, by: str, divisor: int) -> None:
    if value % divisor:
        raise ValueError(f"{here}: {name} = {value} must be divisible by {by} = {divisor}")


def _look_up(here: str, name: str, value: Any, known: dict[str, Any]) -> Any:
    """What makes the module: a name's, or `value` itself."""
    if value is None or (callable(value) and not isinstance(value, nn.Module)):
        return value
    if isinstance(value, str) and value in known:
        return known[value]
    wrong = TypeError if not isinstance(value, str) else ValueError
    raise wrong(
        f"{here}: {name} must be one of {', '.join(map(repr, known))}, None or a function that makes a "
        f"module, got {value!r}"
    )
