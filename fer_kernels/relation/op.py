"""relation: relation-aware neighbour aggregation. Contract, schema, autograd, checks."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import checks, dispatch
from . import reference
from .reference import MODES, RSUM

MAX_NEIGHBOURS = 128  # the largest k: a slot is saved as one byte, and as many as a knn graph may have

_HALF = (torch.bfloat16, torch.float16)
OPERATOR = dispatch.Operator(
    "relation",
    dtypes={
        "reference": checks.FLOATING,
        "cpu": checks.FLOATING,
        "triton": (torch.float32, *_HALF),
        "cuda": (torch.float32, *_HALF),
    },
)


def _triton_module() -> Any:
    from . import triton  # importing Triton takes a second: only for those who use it

    return triton


def _fake(x, idx, y, p, q, a, reverse, mode, negative_slope, return_weights, save_slots):
    for other in (idx, y, p, q, a):
        torch._check(
            other is None or other.device == x.device, lambda: "relation: tensors on several devices"
        )
    weights, slots = x.new_empty(0), x.new_empty(0, dtype=torch.uint8)
    if return_weights:
        weights = x.new_empty((*idx.shape, a.shape[0]))
    if save_slots and mode != RSUM:
        slots = x.new_empty(x.shape, dtype=torch.uint8)
    return x.new_empty(x.shape), weights, slots


def _fake_backward(
    grad, grad_weights, x, idx, y, p, q, a, slots, reverse, keys, own_keys, mode, slope, nodes, relation
):
    def wanted(condition, *shape):  # a tensor of its own in any case: outputs must not share memory
        return grad.new_empty(shape if condition else 0)

    return (
        wanted(nodes, *grad.shape),
        wanted(nodes and not own_keys, grad.shape[0], keys, grad.shape[2]),
        *(wanted(relation, *(t.shape if relation else ())) for t in (p, q, a)),
    )


def _fake_reverse(idx, keys):
    return idx.new_empty((idx.shape[0], keys + 1 + idx.shape[1] * idx.shape[2]), dtype=torch.int32)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, idx, y, p, q, a, reverse, mode, negative_slope, return_weights, save_slots = inputs
    _, weights, slots = output
    ctx.mark_non_differentiable(*((slots,) if return_weights else (weights, slots)))
    ctx.need_nodes = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]
    ctx.need_relation = any(ctx.needs_input_grad[3:6])
    ctx.constants = (mode, negative_slope, return_weights, save_slots)
    ctx.keys, ctx.own_keys = (x if y is None else y).shape[1], y is None
    # The nodes' gradient needs to know where a maximum came from; only the relation's needs their values.
    nodes = (x, y) if ctx.need_relation else (None, None)
    ctx.save_for_backward(*nodes, idx, p, q, a, slots if save_slots else None, reverse)


def _backward(backend: str, ctx: Any, grad: Tensor, grad_weights: Tensor | None, _: Any) -> tuple:
    x, y, idx, p, q, a, slots, reverse = ctx.saved_tensors
    mode, negative_slope, return_weights, save_slots = ctx.constants
    if mode != RSUM and not save_slots:
        raise RuntimeError("relation: called with save_slots=False, which is for calls without a backward")
    dx, dy, dp, dq, da = _BACKWARD["cpu" if backend == "compiled" else backend](
        grad.contiguous(),
        grad_weights.contiguous() if return_weights and grad_weights is not None else None,
        *(x, idx, y, p, q, a, slots, reverse),
        *(ctx.keys, ctx.own_keys, mode, negative_slope, ctx.need_nodes, ctx.need_relation),
    )
    wanted = ctx.needs_input_grad
    gradients: list[Tensor | None] = [None] * 11
    for position, gradient in ((0, dx), (2, dy), (3, dp), (4, dq), (5, da)):
        if wanted[position]:
            gradients[position] = gradient
    return tuple(gradients)


def _setup_double(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:10])
    ctx.constants = inputs[10:]


def _double_backward(backend: str, ctx: Any, *gradients: Tensor) -> tuple:
    """With edge tensors in memory."""
    inputs = (*ctx.saved_tensors, *ctx.constants)
    return dispatch.differentiated(reference.relation_backward, inputs, (0, 1, 2, 4, 5, 6, 7), gradients)


dispatch.define(
    OPERATOR,
    "(Tensor x, Tensor idx, Tensor? y, Tensor? p, Tensor? q, Tensor? a, Tensor? reverse, int mode,"
    " float negative_slope, bool return_weights, bool save_slots) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    reference=reference.relation,
    triton=lambda *args: _triton_module().relation(*args),
    setup_context=_setup_context,
    backward=_backward,
)
_BACKWARD = dispatch.define(
    OPERATOR,
    "(Tensor grad, Tensor? grad_weights, Tensor? x, Tensor idx, Tensor? y, Tensor? p, Tensor? q, Tensor? a,"
    " Tensor? slots, Tensor? reverse, SymInt keys, bool own_keys, int mode, float negative_slope,"
    " bool need_nodes, bool need_relation) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    suffix="_backward",
    fake=_fake_backward,
    reference=reference.relation_backward,
    triton=lambda *args: _triton_module().relation_backward(*args),
    setup_context=_setup_double,
    backward=_double_backward,
)
_REVERSE = dispatch.define(
    OPERATOR,
    "(Tensor idx, SymInt keys) -> Tensor",
    suffix="_reverse",
    fake=_fake_reverse,
    reference=reference.reverse_graph,
)


@overload
def relation_aggregate(
    x: Tensor,
    idx: Tensor,
    y: Tensor | None = None,
    *,
    p: Tensor | None = None,
    q: Tensor | None = None,
    a: Tensor | None = None,
    mode: str = "rmr",
    negative_slope: float = 0.2,
    return_weights: Literal[False] = False,
    reverse: Tensor | None = None,
    backend: str = "auto",
) -> Tensor: ...


@overload
def relation_aggregate(
    x: Tensor,
    idx: Tensor,
    y: Tensor | None = None,
    *,
    p: Tensor | None = None,
    q: Tensor | None = None,
    a: Tensor | None = None,
    mode: str = "rmr",
    negative_slope: float = 0.2,
    return_weights: Literal[True],
    reverse: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def relation_aggregate(
    x: Tensor,
    idx: Tensor,
    y: Tensor | None = None,
    *,
    p: Tensor | None = None,
    q: Tensor | None = None,
    a: Tensor | None = None,
    mode: str = "rmr",
    negative_slope: float = 0.2,
    return_weights: bool = False,
    reverse: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """What every node makes of its neighbours: the aggregation of ViG and Face2Nodes graph convolutions.

    With j over the k slots of node i, δ_ij = y_j - x_i, and per head h (its own channels of x and y, its
    own R / H of p, q)

        z_ij = p_i + q_j,   e_ij = a_h · LeakyReLU(z_ij),   α_ij = softmax_j(e_ij)
        mode "rmr":   m_i = max_j k α_ij δ_ij      relation-weighted max-relative; a = 0 is exactly "mr"
        mode "rsum":  m_i = Σ_j α_ij δ_ij
        mode "mr":    m_i = max_j δ_ij             ViG's max-relative; takes no p, q, a

    p and q are the two halves of a relation layer on [x_i ; δ_ij]: with W = [W_a W_b],
    p = x (W_a - W_b)ᵀ + b and q = y W_bᵀ, two products over nodes instead of one over edges.

    Args:
        x: centres (B, N, C); float32, bfloat16, float16 (float64 on reference and cpu).
        idx: neighbours (B, N, k) into y, int64 or int32, k at most 128; as from `dilated_knn`.
        y: neighbours' features (B, M, C); None takes x.
        p, q: (B, N, R) and (B, M, R), for "rmr" and "rsum".
        a: (H, R / H); H divides C.
        negative_slope: of the LeakyReLU.
        return_weights: also return α (B, N, k, H), differentiable like the rest.
        reverse: `reverse_graph(idx, M)`, for several calls on one graph. Only GPU backward passes use it;
            without it each builds its own.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        m (B, N, C), and with return_weights α (B, N, k, H), in x's dtype.

    Gradients flow to x, y, p, q and a. That of a maximum goes to the first slot that attains it, on every
    backend alike. Arithmetic is in float32 (float64 for float64) and results are rounded once. NaN wins a
    maximum and spreads through sums, as in torch.amax; a softmax over scores that are all -inf is NaN. An
    index outside [0, M) raises on CPU tensors; for tensors on a GPU only under FER_KERNELS_CHECK=1, and
    otherwise it is undefined. Results and gradients are bitwise reproducible, whatever the number of threads.
    Apart from the reference, no backend stores an edge tensor (B, N, k, C) or (B, N, k, R); for backward it
    keeps one byte a (node, channel) beyond its inputs. Second derivatives work; the reference computes them.
    """
    _check(x, idx, y, p, q, a, mode, negative_slope, return_weights, reverse)
    if idx.dtype != torch.int64:
        idx = idx.to(torch.int64)
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, y, p, q, a))
    run = OPERATOR.choose(backend, x)
    number = MODES.index(mode)
    m, weights, _ = run(
        *(x, idx, y, p, q, a, reverse),
        *(number, float(negative_slope), return_weights, trained and number != RSUM),
    )
    return (m, weights) if return_weights else m


def reverse_graph(idx: Tensor, num_keys: int) -> Tensor:
    """Who has j as a neighbour: the transpose of a graph, to share between calls of `relation_aggregate`.

    Args:
        idx: (B, N, k), int64 or int32.
        num_keys: M, the keys a sample.

    Returns:
        (B, M + 1 + N * k) int32. A row holds M + 1 offsets, then the edges i * k + slot sorted by key,
        ascending within a key: those of key j stand at offsets j to j + 1.
    """
    here = "reverse_graph"
    _check_idx(here, idx)
    checks.positive_int(here, "num_keys", num_keys)
    proved = idx.device.type == "cpu" or (OPERATOR.name, "cuda") in dispatch.PROVED_ON
    return _REVERSE["cuda" if proved else "reference"](idx.to(torch.int64), num_keys)


def _check_idx(here: str, idx: Any) -> None:
    checks.dense_tensor(here, "idx", idx)
    if idx.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{here}: idx must be int64 or int32, got {idx.dtype}")
    if idx.dim() != 3:
        raise ValueError(f"{here}: idx must be (B, N, k), got {idx.dim()}-D {checks.shape(idx)}")
    if not 1 <= idx.shape[2] <= MAX_NEIGHBOURS:
        raise ValueError(
            f"{here}: k must lie between 1 and {MAX_NEIGHBOURS}, got {idx.shape[2]} "
            f"(idx: {checks.shape(idx)})"
        )


def _check(x, idx, y, p, q, a, mode, negative_slope, return_weights, reverse) -> None:
    here = "relation_aggregate"
    checks.floating_nodes(here, "x", x)
    _check_idx(here, idx)
    checks.same_device(here, "idx", idx, "x", x)
    batch, queries, channels = x.shape
    if idx.shape[0] != batch or idx.shape[1] != queries:
        raise ValueError(
            f"{here}: idx must be (B, N, k) with B = {batch} and N = {queries} as in x {checks.shape(x)}, "
            f"got {checks.shape(idx)}"
        )
    if y is not None:
        _check_like(here, x, "y", y, "M", None, "C", channels)
    keys = x.shape[1] if y is None else y.shape[1]
    checks.a_choice(here, "mode", mode, MODES)
    if isinstance(negative_slope, bool) or not isinstance(negative_slope, (int, float, torch.SymFloat)):
        raise TypeError(f"{here}: negative_slope must be a number, got {negative_slope!r}")
    checks.a_bool(here, "return_weights", return_weights)
    given = [name for name, tensor in (("p", p), ("q", q), ("a", a)) if tensor is not None]
    if mode == "mr":
        if given:
            raise ValueError(f"{here}: mode 'mr' takes no p, q, a, got {', '.join(given)}")
        if return_weights:
            raise ValueError(f"{here}: mode 'mr' has no weights to return")
    elif len(given) < 3:
        missing = [name for name in ("p", "q", "a") if name not in given]
        raise ValueError(
            f"{here}: mode {mode!r} needs p, q and a (mode 'mr' none), missing {', '.join(missing)}"
        )
    else:
        _check_like(here, x, "p", p, "N", queries, "R", None)
        _check_like(here, x, "q", q, "M", keys, "R", p.shape[2])
        _check_heads(here, x, p, a)
    if reverse is not None:
        _check_reverse(here, idx, keys, reverse)
    # Values are out of reach while tracing, and so are those of a fake tensor, a subclass.
    traced = torch.compiler.is_compiling() or type(idx) is not Tensor
    if idx.device.type != "cpu" and dispatch.CHECK_VALUES and not traced:
        reference.check_indices(idx, keys)


def _check_like(here: str, x: Tensor, name: str, tensor: Any, rows: str, n: Any, width: str, c: Any) -> None:
    """`tensor` is (B, rows, width) of x's batch, dtype and device; None leaves a size open."""
    checks.floating_nodes(here, name, tensor)
    if tensor.dtype != x.dtype:
        raise TypeError(f"{here}: {name} must have x's dtype {x.dtype}, got {tensor.dtype}")
    checks.same_device(here, name, tensor, "x", x)
    wanted = [("B", x.shape[0]), (rows, n), (width, c)]
    if any(
        size is not None and actual != size for actual, (_, size) in zip(tensor.shape, wanted, strict=True)
    ):
        sizes = " and ".join(f"{symbol} = {size}" for symbol, size in wanted if size is not None)
        raise ValueError(
            f"{here}: {name} must be (B, {rows}, {width}) with {sizes} (x: {checks.shape(x)}), "
            f"got {checks.shape(tensor)}"
        )


def _check_heads(here: str, x: Tensor, p: Tensor, a: Any) -> None:
    checks.dense_tensor(here, "a", a)
    if a.dtype != x.dtype:
        raise TypeError(f"{here}: a must have x's dtype {x.dtype}, got {a.dtype}")
    checks.same_device(here, "a", a, "x", x)
    if a.dim() != 2 or a.shape[0] == 0 or a.shape[0] * a.shape[1] != p.shape[2]:
        raise ValueError(
            f"{here}: a must be (H, R / H) with R = {p.shape[2]} as in p {checks.shape(p)}, "
            f"got {checks.shape(a)}"
        )
    if x.shape[2] % a.shape[0]:
        raise ValueError(
            f"{here}: C = {x.shape[2]} must be divisible by the {a.shape[0]} heads of a {checks.shape(a)}"
        )


def _check_reverse(here: str, idx: Tensor, keys: Any, reverse: Any) -> None:
    checks.dense_tensor(here, "reverse", reverse)
    checks.same_device(here, "reverse", reverse, "idx", idx)
    want = (idx.shape[0], keys + 1 + idx.shape[1] * idx.shape[2])
    if reverse.dtype != torch.int32 or tuple(reverse.shape) != want:
        raise ValueError(
            f"{here}: reverse must be reverse_graph(idx, {keys}), an int32 {want}, "
            f"got {reverse.dtype} {checks.shape(reverse)}"
        )
