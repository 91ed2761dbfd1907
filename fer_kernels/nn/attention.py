"""Multi-head attention with joint attention dropping, and the transformer block around it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..jad.op import JOINT_OVER, JADStats, additive_mask, jad_attention
from ..jad.reference import MODES
from .norm import joined

CONTROLS = ("random", "dropkey")


def drop_schedule(p: float, depth: int, last: float = 0.0) -> list[float]:
    """Drop probabilities of `depth` layers, linear from p in the first to `last` in the last.

    Early layers drop most, as in DropKey; last=p keeps the probability constant.

    >>> drop_schedule(0.5, 3)
    [0.5, 0.25, 0.0]
    """
    if depth < 1:
        raise ValueError(f"drop_schedule: depth must be at least 1, got {depth}")
    for name, value in (("p", p), ("last", last)):
        _check_probability("drop_schedule", name, value)
    steps = max(depth - 1, 1)
    return [p + (last - p) * layer / steps for layer in range(depth)]


class JADAttention(nn.Module):
    """Multi-head self- or cross-attention with `fer_kernels.jad_attention`.

    In training every head of every sample drops with probability p (with joint_over="head" all heads of a
    sample together); in evaluation none does (eval_mode="off"), or all do (eval_mode="on", which needs no
    randomness and so excludes the controls "random" and "dropkey"). p = 0 is plain attention in both. Without
    `context_dim` the parameters are those of timm's ViT attention, by name and shape.

    Args:
        dim: width of the input and the output.
        num_heads: divides dim.
        context_dim: width of the context; given, this is cross-attention, with the parameters q and kv.
        qkv_bias, proj_bias: whether the projections have a bias.
        attn_drop: dropout of the attention weights. In training it leaves the fused operator: what to drop
            still comes from it, the attention from torch's scaled_dot_product_attention under a mask.
        proj_drop: dropout of the output.
        p: drop probability, see `drop_schedule` for several layers.
        drop, beta, max_drop, protect, soft, tau, joint_over, backend: as in `jad_attention`.
        eval_mode: "off" or "on".
        generator: what gates and noise are drawn from; None is torch's own of the input's device. It is
            copied and pickled with the module, and no state dict holds it. torch.compile(fullgraph=True)
            needs None.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        context_dim: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        p: float = 0.5,
        drop: str = "key",
        beta: float = 1.0,
        max_drop: float = 0.3,
        protect: int = 1,
        soft: float = 0.5,
        tau: float = 0.3,
        joint_over: str = "query",
        eval_mode: str = "off",
        generator: torch.Generator | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        here = type(self).__name__
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"{here}: num_heads must divide dim = {dim}, got {num_heads}")
        for name, value in (("p", p), ("attn_drop", attn_drop), ("proj_drop", proj_drop)):
            _check_probability(here, name, value)
        checks.a_choice(here, "drop", drop, MODES)
        checks.a_choice(here, "joint_over", joint_over, JOINT_OVER)
        if eval_mode not in ("off", "on"):
            raise ValueError(f"{here}: eval_mode must be 'off' or 'on', got {eval_mode!r}")
        if eval_mode == "on" and drop in CONTROLS:
            raise ValueError(f"{here}: drop={drop!r} draws at random, so eval_mode must be 'off', got 'on'")
        self.num_heads, self.p, self.drop, self.eval_mode = num_heads, p, drop, eval_mode
        self.options: dict[str, Any] = {
            "beta": beta,
            "max_drop": max_drop,
            "protect": protect,
            "soft": soft,
            "tau": tau,
            "joint_over": joint_over,
            "backend": backend,
        }
        self.context_dim = context_dim
        self.generator = generator
        if context_dim is None:
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        else:
            self.q = nn.Linear(dim, dim, bias=qkv_bias)
            self.kv = nn.Linear(context_dim, 2 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def extra_repr(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        own = f"num_heads={self.num_heads}, p={self.p}, drop={self.drop!r}, eval_mode={self.eval_mode!r}"
        return f"{own}, {options}"

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, JADStats]:
        """x (B, N, dim), and for cross-attention context (B, M, context_dim), to (B, N, dim).

        With return_stats also the `JADStats` of this call.
        """
        q, k, v = self._projections(x, context)
        out, stats = self._attend(q, k, v, return_stats)
        out = self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))
        return out if stats is None else (out, stats)

    def _projections(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, H, N or M, D) each."""
        if (context is None) != (self.context_dim is None):
            wanted = "no context" if self.context_dim is None else f"a context (B, M, {self.context_dim})"
            got = "none" if context is None else str(tuple(context.shape))
            raise ValueError(f"{type(self).__name__}: expected {wanted}, got {got}")
        given = [("x", "N", x, self.proj.out_features)]
        if context is not None and self.context_dim is not None:
            given.append(("context", "M", context, self.context_dim))
        for name, count, tensor, width in given:
            if tensor.dim() != 3 or tensor.shape[2] != width or tensor.shape[0] != x.shape[0]:
                raise ValueError(
                    f"{type(self).__name__}: {name} must be (B, {count}, {width}) with B = {x.shape[0]}, "
                    f"got {tuple(tensor.shape)}"
                )
        if context is None:
            q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            k, v = self.kv(context).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, return_stats: bool) -> tuple[Tensor, JADStats | None]:
        active = self.p > 0 and (self.training or self.eval_mode == "on")
        options = {**self.options, "drop": self.drop if active else "none"}
        options["gate"] = self._draw_gate(q) if active and self.training else None
        if active and self.drop in CONTROLS:
            options["generator"] = self.generator
        if self.training and self.attn_drop.p > 0:
            # The fused operator never holds the weights, so it has nothing to drop out of.
            mask, stats = additive_mask(q, k, **options)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.attn_drop.p)
            return out, stats if return_stats else None
        if return_stats:
            return jad_attention(q, k, v, return_stats=True, **options)
        return jad_attention(q, k, v, **options), None

    def _draw_gate(self, q: Tensor) -> Tensor:
        heads = 1 if self.options["joint_over"] == "head" else self.num_heads
        # A generator may live on another device than the input.
        device = q.device if self.generator is None else self.generator.device
        drawn = torch.rand(q.shape[0], heads, generator=self.generator, device=device) < self.p
        return drawn.to(q.device).expand(-1, self.num_heads)


class JADBlock(nn.Module):
    """A pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    Its parameters are those of timm's ViT `Block`, by name and shape, so that one's state dict loads into the
    other; with p = 0 and in evaluation with eval_mode="off" it computes the same. With `context_dim` the
    attention is cross-attention, and the context has a norm of its own, `norm_context`.

    Args:
        dim, num_heads, context_dim, qkv_bias, proj_bias, attn_drop, proj_drop: as in `JADAttention`;
            proj_drop is the dropout of the MLP too.
        mlp_ratio: width of the MLP over dim.
        init_values: initial layer scale; None for none.
        drop_path: probability with which a sample skips a branch in training.
        norm_eps: of the layer norms.
        options: the rest of `JADAttention`'s, such as p, drop and eval_mode.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        context_dim: int | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
        **options: Any,
    ) -> None:
        super().__init__()
        _check_probability(type(self).__name__, "drop_path", drop_path)
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        if context_dim is not None:
            self.norm_context = nn.LayerNorm(context_dim, eps=norm_eps)
        self.attn = JADAttention(
            dim,
            num_heads,
            context_dim=context_dim,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            **options,
        )
        self.ls1 = nn.Identity() if init_values is None else _LayerScale(dim, init_values)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = _Mlp(dim, int(dim * mlp_ratio), bias=proj_bias, drop=proj_drop)
        self.ls2 = nn.Identity() if init_values is None else _LayerScale(dim, init_values)
        self.drop_path2 = DropPath(drop_path)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, JADStats]:
        """As `JADAttention.forward`."""
        if context is not None and self.attn.context_dim is not None:
            context = self.norm_context(context)
        attended, stats = self.attn(self.norm1(x), context, return_stats=return_stats), None
        if return_stats:
            attended, stats = attended
        x = x + self.drop_path1(self.ls1(attended))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x if stats is None else (x, stats)


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, bias: bool, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(F.gelu(self.fc1(x)))))


class _LayerScale(nn.Module):
    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth: in training a sample's branch is zero with probability p, and else over 1 - p."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def draw(self, x: Tensor) -> Tensor | None:
        """What each sample of x (B, ...) is multiplied by (B), or None for one."""
        if self.p == 0 or not self.training:
            return None
        kept = x.new_empty(x.shape[0]).bernoulli_(1 - self.p)
        return kept.div_(max(1 - self.p, 1e-12))  # p = 1 keeps nothing

    def forward(self, x: Tensor) -> Tensor:
        return joined(x, None, self.draw(x))

    def extra_repr(self) -> str:
        return f"p={self.p}"


def _check_probability(here: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{here}: {name} must be a number, got {value!r} ({type(value).__name__})")
    if not 0 <= value <= 1:
        raise ValueError(f"{here}: {name} must lie in [0, 1], got {value}")
