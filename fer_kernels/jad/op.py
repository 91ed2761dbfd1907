"""jad: attention with joint attention dropping. Contract, schema, autograd, checks."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from .. import checks, dispatch
from . import reference
from .reference import DROPKEY, ENTRY, MODES, NONE, RANDOM

MAX_WIDTH = 256  # the largest D

_HALF = (torch.bfloat16, torch.float16)
OPERATOR = dispatch.Operator(
    "jad",
    dtypes={
        "reference": checks.FLOATING,
        "cpu": checks.FLOATING,
        "triton": (torch.float32, *_HALF),
    },
)
JOINT_OVER = ("query", "head")


class JADStats(NamedTuple):
    """What a call of `jad_attention` dropped, and by what; all constants for autograd.

    Attributes:
        column_mean: (B, H, M) float32 (float64 for float64), c_j of each head before any dropping; with
            joint_over="head" the decision was made on its mean over the heads.
        mask: bool, True where dropped: (B, H, M), or (B, H, N, M) for drop="entry". All False for "soft".
        fraction: (B, H) float32, the share of keys, or of entries, that was dropped.
    """

    column_mean: Tensor
    mask: Tensor
    fraction: Tensor


def _triton_module() -> Any:
    from . import triton  # importing Triton takes a second: only for those who use it

    return triton


def _one_device(*tensors: Tensor | None) -> None:
    first = next(t for t in tensors if t is not None)
    for other in tensors:
        torch._check(other is None or other.device == first.device, lambda: "jad: tensors on several devices")


def _fake(
    q, k, v, gate, noise, mode, beta, max_drop, protect, soft, tau, joint_over_head, scale, return_stats, save
):
    _one_device(q, k, v, gate, noise)
    compute = reference.accumulation_dtype(q.dtype)
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    lse = q.new_empty((batch, heads, queries), dtype=compute)
    column_mean = q.new_empty((batch, heads, keys) if return_stats else (0,), dtype=compute)
    bias = q.new_empty((0,) if mode in (NONE, ENTRY) else (batch, heads, keys), dtype=compute)
    packed = (batch, heads, queries, (keys + 7) // 8)
    bits = q.new_empty(packed if mode == ENTRY and (return_stats or save) else (0,), dtype=torch.uint8)
    return q.new_empty(q.shape), lse, column_mean, bias, bits


def _fake_backward(grad, q, k, v, out, lse, bias, bits, scale):
    _one_device(grad, q, k, v, out, lse, bias, bits)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _fake_column_mean(q, k, scale):
    _one_device(q, k)
    compute = reference.accumulation_dtype(q.dtype)
    batch, heads, queries, _ = q.shape
    means = q.new_empty((batch, heads, k.shape[2]), dtype=compute)
    return means, q.new_empty((batch, heads, queries), dtype=compute)


def _fake_column_mean_backward(grad, q, k, lse, scale):
    _one_device(grad, q, k, lse)
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    q, k, v = inputs[:3]
    out, lse, column_mean, bias, bits = output
    ctx.mark_non_differentiable(lse, column_mean, bias, bits)
    ctx.scale = inputs[12]
    ctx.bits_are_missing = inputs[5] == ENTRY and not (inputs[13] or inputs[14])
    ctx.save_for_backward(q, k, v, out, lse, bias, bits)


def _backward(backend: str, ctx: Any, grad: Tensor, *_: Any) -> tuple:
    if ctx.bits_are_missing:
        raise RuntimeError("jad: called with save=False, which is for calls without a backward")
    found = _BACKWARD["cpu" if backend == "compiled" else backend](
        grad.contiguous(), *ctx.saved_tensors, ctx.scale
    )
    wanted = zip(found, ctx.needs_input_grad, strict=False)
    return (*(gradient if needed else None for gradient, needed in wanted), *(None,) * 12)


def _setup_column_mean(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, output[1])


def _backward_column_mean(backend: str, ctx: Any, grad: Tensor, _: Any) -> tuple:
    run = _COLUMN_MEAN_BACKWARD["cpu" if backend == "compiled" else backend]
    found = run(grad.contiguous(), *ctx.saved_tensors, ctx.scale)
    wanted = zip(found, ctx.needs_input_grad, strict=False)
    return (*(gradient if needed else None for gradient, needed in wanted), None)


def _setup_double(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _double_backward(backend: str, ctx: Any, *gradients: Tensor) -> tuple:
    """With N x M arrays in memory. out and lse follow from the others, and the reference uses neither."""
    inputs = (*ctx.saved_tensors, ctx.scale)
    return dispatch.differentiated(reference.jad_backward, inputs, range(4), gradients)


def _double_backward_column_mean(backend: str, ctx: Any, *gradients: Tensor) -> tuple:
    inputs = (*ctx.saved_tensors, ctx.scale)
    return dispatch.differentiated(reference.column_mean_backward, inputs, range(3), gradients)


dispatch.define(
    OPERATOR,
    "(Tensor q, Tensor k, Tensor v, Tensor? gate, Tensor? noise, int mode, float beta, float max_drop,"
    " int protect, float soft, float tau, bool joint_over_head, float scale, bool return_stats, bool save)"
    " -> (Tensor out, Tensor lse, Tensor column_mean, Tensor bias, Tensor bits)",
    fake=_fake,
    reference=reference.jad,
    triton=lambda *args: _triton_module().jad(*args),
    setup_context=_setup_context,
    backward=_backward,
)
_BACKWARD = dispatch.define(
    OPERATOR,
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor bias, Tensor bits,"
    " float scale) -> (Tensor dq, Tensor dk, Tensor dv)",
    suffix="_backward",
    fake=_fake_backward,
    reference=reference.jad_backward,
    triton=lambda *args: _triton_module().jad_backward(*args),
    setup_context=_setup_double,
    backward=_double_backward,
)
_COLUMN_MEAN = dispatch.define(
    OPERATOR,
    "(Tensor q, Tensor k, float scale) -> (Tensor column_mean, Tensor lse)",
    suffix="_column_mean",
    fake=_fake_column_mean,
    reference=reference.column_mean,
    triton=lambda *args: _triton_module().column_mean(*args),
    setup_context=_setup_column_mean,
    backward=_backward_column_mean,
)
_COLUMN_MEAN_BACKWARD = dispatch.define(
    OPERATOR,
    "(Tensor grad, Tensor q, Tensor k, Tensor lse, float scale) -> (Tensor dq, Tensor dk)",
    suffix="_column_mean_backward",
    fake=_fake_column_mean_backward,
    reference=reference.column_mean_backward,
    triton=lambda *args: _triton_module().column_mean_backward(*args),
    setup_context=_setup_double,
    backward=_double_backward_column_mean,
)


@overload
def jad_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    drop: str = "key",
    beta: float = 1.0,
    max_drop: float = 0.3,
    protect: int = 1,
    gate: Tensor | None = None,
    soft: float = 0.5,
    tau: float = 0.3,
    joint_over: str = "query",
    scale: float | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    return_stats: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def jad_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    drop: str = "key",
    beta: float = 1.0,
    max_drop: float = 0.3,
    protect: int = 1,
    gate: Tensor | None = None,
    soft: float = 0.5,
    tau: float = 0.3,
    joint_over: str = "query",
    scale: float | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    return_stats: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, JADStats]: ...


def jad_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    drop: str = "key",
    beta: float = 1.0,
    max_drop: float = 0.3,
    protect: int = 1,
    gate: Tensor | None = None,
    soft: float = 0.5,
    tau: float = 0.3,
    joint_over: str = "query",
    scale: float | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, JADStats]:
    """Attention that drops what every query attends to alike: joint attention dropping, inspired by JADFER.

    With P = softmax(q kᵀ scale) and the column means c_j = (1/N) Σ_i P_ij, whose mean over the M keys is 1/M:

        drop "key":     key j where c_j > 1/M + beta·std(c), but no more than floor(max_drop·M) keys a head:
                        those of the largest c, equal ones by the lowest index
        drop "soft":    no key, but log(1 - soft·c_j / max c) is added to all scores of key j
        drop "entry":   (i, j) where |P_ij - c_j| <= tau·c_j and c_j > 1/M; a row that would keep less than
                        1e-6 of its mass is left whole
        drop "none":    nothing: plain attention
        drop "random":  a control: as many keys as "key" would drop, those of the smallest noise
        drop "dropkey": a control: every key with noise < max_drop; a head that would lose all keys drops none

    and then softmax over what is left, so that the rows sum to one again. std is the population's. "key",
    "random" and "entry" drop nothing in a head with M·std(c) < 0.05. They and "soft" do nothing where a c_j
    is NaN, and no mode does anything where N < 2.

    Args:
        q: queries (B, H, N, D), D at most 256; float32, bfloat16, float16 (float64 on reference and cpu).
        k, v: keys and values (B, H, M, D) of the same dtype and device; M may differ from N.
        drop: the mode, see above.
        beta: how many deviations above the mean makes a key joint; at least 0.
        max_drop: the largest share of keys to drop, in [0, 1); for "dropkey" the probability.
        protect: the first keys (class tokens) that no mode drops; below M. "soft" drops none and ignores it.
        gate: (B, H) of 0 and 1 (any dtype): which heads of which samples drop at all; None is all. Values
            are checked on the CPU; for a tensor on a GPU only under FER_KERNELS_CHECK=1.
        soft: strength of "soft", in [0, 1).
        tau: relative distance at which "entry" finds an entry similar; at least 0.
        joint_over: "query", or "head" to decide on c averaged over the heads too: one set of keys a sample.
        scale: of the scores; None is D ** -0.5.
        noise: float32 (B, H, M), for joint_over="head" (B, 1, M), uniform on [0, 1), for the two controls.
            None draws it from `generator`.
        generator: where noise comes from; None is torch's own of q's device.
        return_stats: also return `JADStats`.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        out (B, H, N, D) in q's dtype, and with return_stats the statistics.

    Gradients flow to q, k and v; what was dropped is constant. Arithmetic is in float32 (float64 for
    float64), results are rounded once, and decisions are taken in float64 on the c so computed ("entry"
    compares P and c in that arithmetic). A row whose scores, or those left to it, are all -inf gives zeros,
    as in a fully masked scaled_dot_product_attention; a NaN or +inf score makes its row NaN, as in plain
    attention. Results and gradients are bitwise reproducible. Apart from the reference, no backend stores an
    N x M array, but for one bit an entry in mode "entry" when a backward is to follow or statistics are asked
    for. An empty batch gives empty results. Second derivatives work; they are computed by the reference.
    """
    here = "jad_attention"
    arguments = _arguments(
        here, q, k, v, drop, beta, max_drop, protect, gate, soft, tau, joint_over, scale, noise, generator
    )
    checks.a_bool(here, "return_stats", return_stats)
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    run = OPERATOR.choose(backend, q)
    out, _, column_mean, bias, bits = run(*arguments, return_stats, trained)
    if not return_stats:
        return out
    mask = _mask(drop, bias, bits, column_mean)
    return out, JADStats(column_mean, mask, mask.float().flatten(2).mean(-1))


def _mask(drop: str, bias: Tensor, bits: Tensor, column_mean: Tensor) -> Tensor:
    if drop == "none":
        return torch.zeros_like(column_mean, dtype=torch.bool)
    return reference.unpack(bits, column_mean.shape[2]) if drop == "entry" else bias == -torch.inf


def additive_mask(
    q: Tensor,
    k: Tensor,
    *,
    drop: str,
    beta: float,
    max_drop: float,
    protect: int,
    gate: Tensor | None,
    soft: float,
    tau: float,
    joint_over: str,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> tuple[Tensor, JADStats]:
    """What `jad_attention` would add to the scores, in q's dtype and broadcastable to (B, H, N, M), and its
    statistics. For attention that needs the weights themselves."""
    with torch.no_grad():
        arguments = _arguments(
            "jad_attention",
            *(q, k, k, drop, beta, max_drop, protect, gate, soft, tau, joint_over, None, None, generator),
        )
        _, _, column_mean, bias, bits = OPERATOR.choose(backend, q)(*arguments, True, False)
        mask = _mask(drop, bias, bits, column_mean)
        if drop in ("none", "entry"):
            bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -torch.inf)
        full = bias if drop == "entry" else bias.unsqueeze(2)
        return full.to(q.dtype), JADStats(column_mean, mask, mask.float().flatten(2).mean(-1))


def attention_column_mean(
    q: Tensor, k: Tensor, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """How much attention each key gets on average: c_j = (1/N) Σ_i softmax(q kᵀ scale)_ij.

    Args:
        q: queries (B, H, N, D), D at most 256; float32, bfloat16, float16 (float64 on reference and cpu).
        k: keys (B, H, M, D) of the same dtype and device.
        scale: of the scores; None is D ** -0.5.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        (B, H, M) float32 (float64 for float64). A head's means sum to 1.

    Gradients flow to q and k. A row whose scores are all -inf counts as zeros, a NaN makes all means of its
    head NaN. Bitwise reproducible; apart from the reference, no backend stores an N x M array.
    """
    here = "attention_column_mean"
    _check_attention(here, q, k, None)
    return OPERATOR.choose(backend, q, among=_COLUMN_MEAN)(q, k, _scale(here, q, scale))[0]


def _arguments(
    here, q, k, v, drop, beta, max_drop, protect, gate, soft, tau, joint_over, scale, noise, generator
) -> tuple:
    """Checks everything and brings it into the schema's form, up to the two flags at its end."""
    _check_attention(here, q, k, v)
    checks.a_choice(here, "drop", drop, MODES)
    checks.a_choice(here, "joint_over", joint_over, JOINT_OVER)
    for name, value, below in (
        *(("beta", beta, None), ("tau", tau, None)),
        *(("max_drop", max_drop, 1), ("soft", soft, 1)),
    ):
        _check_number(here, name, value)
        if not value >= 0 or (below is not None and not value < below):  # so that NaN fails too
            expected = "at least 0" if below is None else "in [0, 1)"
            raise ValueError(f"{here}: {name} must be {expected}, got {value}")
    if isinstance(protect, bool) or not isinstance(protect, (int, torch.SymInt)):
        raise TypeError(f"{here}: protect must be an int, got {protect!r} ({type(protect).__name__})")
    if protect < 0 or (drop != "none" and protect >= k.shape[2]):
        raise ValueError(
            f"{here}: protect must be at least 0 and below the M = {k.shape[2]} keys, got {protect} "
            f"(k: {checks.shape(k)})"
        )
    if gate is not None:
        gate = _checked_gate(here, q, gate)
    joint_over_head, mode = joint_over == "head", MODES.index(drop)
    noise = _noise(here, q, k, mode, joint_over_head, noise, generator)
    numbers = (float(beta), float(max_drop), protect, float(soft), float(tau))
    return (q, k, v, gate, noise, mode, *numbers, joint_over_head, _scale(here, q, scale))


def _check_attention(here: str, q: Any, k: Any, v: Any) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if name == "v" and tensor is None and here == "attention_column_mean":
            continue
        checks.dense_tensor(here, name, tensor)
        if tensor.dtype not in checks.FLOATING:
            raise TypeError(
                f"{here}: {name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}"
            )
        if tensor.dim() != 4:
            nodes = "N" if name == "q" else "M"
            raise ValueError(
                f"{here}: {name} must be (B, H, {nodes}, D), got {tensor.dim()}-D {checks.shape(tensor)}"
            )
        if tensor.dtype != q.dtype:
            raise TypeError(f"{here}: {name} must have q's dtype {q.dtype}, got {tensor.dtype}")
        checks.same_device(here, name, tensor, "q", q)
        keys = q.shape[2] if name == "q" else k.shape[2]
        if (*tensor.shape[:2], tensor.shape[3]) != (*q.shape[:2], q.shape[3]) or tensor.shape[2] != keys:
            count = f", M = {keys}" if name == "v" else ""
            raise ValueError(
                f"{here}: {name} must be (B, H, M, D) with B = {q.shape[0]}, H = {q.shape[1]}{count} and "
                f"D = {q.shape[3]} (q: {checks.shape(q)}), got {checks.shape(tensor)}"
            )
    if q.shape[1] == 0 or q.shape[2] == 0 or k.shape[2] == 0:
        raise ValueError(
            f"{here}: H, N and M must be at least 1, got q {checks.shape(q)} and k {checks.shape(k)}"
        )
    if not 1 <= q.shape[3] <= MAX_WIDTH:
        raise ValueError(f"{here}: D must lie between 1 and {MAX_WIDTH}, got q {checks.shape(q)}")


def _check_number(here: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{here}: {name} must be a number, got {value!r} ({type(value).__name__})")


def _scale(here: str, q: Tensor, scale: Any) -> float:
    if scale is None:
        return q.shape[3] ** -0.5
    _check_number(here, "scale", scale)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"{here}: scale must be finite, got {scale}")
    return float(scale)


def _checked_gate(here: str, q: Tensor, gate: Any) -> Tensor:
    checks.dense_tensor(here, "gate", gate)
    checks.same_device(here, "gate", gate, "q", q)
    if gate.dtype.is_complex:
        raise TypeError(f"{here}: gate must be real, got {gate.dtype}")
    if gate.dim() != 2 or gate.shape[0] != q.shape[0] or gate.shape[1] != q.shape[1]:
        raise ValueError(f"{here}: gate must be (B, H) = {tuple(q.shape[:2])}, got {checks.shape(gate)}")
    if gate.dtype == torch.bool:
        return gate
    # Values are out of reach while tracing, and so are those of a fake tensor, a subclass.
    traced = torch.compiler.is_compiling() or type(gate) is not Tensor
    if not traced and (gate.device.type == "cpu" or dispatch.CHECK_VALUES):
        wrong = gate[(gate != 0) & (gate != 1)]
        if wrong.numel():
            raise ValueError(f"{here}: gate must hold 0 and 1 alone, got {wrong[0].item()}")
    return gate != 0


def _noise(here, q, k, mode, joint_over_head, noise, generator) -> Tensor | None:
    """(B, H, M) float32 for the modes that need it, else None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{here}: generator must be a torch.Generator, got {type(generator).__name__}")
    shape = (q.shape[0], 1 if joint_over_head else q.shape[1], k.shape[2])
    if mode not in (RANDOM, DROPKEY):
        if noise is not None:
            raise ValueError(f"{here}: drop={MODES[mode]!r} takes no noise; 'random' and 'dropkey' do")
        return None
    if noise is None:
        # A generator may live on another device than q.
        device = q.device if generator is None else generator.device
        noise = torch.rand(shape, generator=generator, device=device).to(q.device)
    else:
        checks.dense_tensor(here, "noise", noise)
        checks.same_device(here, "noise", noise, "q", q)
        if noise.dtype != torch.float32:
            raise TypeError(f"{here}: noise must be float32, got {noise.dtype}")
        if noise.dim() != 3 or any(size != want for size, want in zip(noise.shape, shape, strict=True)):
            heads = "1" if joint_over_head else "H"
            raise ValueError(f"{here}: noise must be (B, {heads}, M) = {shape}, got {checks.shape(noise)}")
    return noise.expand(-1, q.shape[1], -1)
