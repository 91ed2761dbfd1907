"""jad: one set of cases for every backend that can run here."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings

import jad_oracle as oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import backends, device_of
from torch._subclasses.fake_tensor import FakeTensorMode

import fer_kernels
from fer_kernels import attention_column_mean, dispatch, jad_attention
from fer_kernels.jad import op, reference
from fer_kernels.jad.op import OPERATOR
from fer_kernels.jad.reference import MODES

INTERPRETED = dispatch.TRITON_INTERPRETED
every_backend = pytest.mark.parametrize("backend", backends("jad"))
every_mode = pytest.mark.parametrize("drop", MODES)
CONTROLS = ("random", "dropkey")


def slow_when_interpreted(backend: str) -> bool:
    return backend == "triton" and INTERPRETED


def compiled(name: str) -> bool:
    """Whether compiled code is behind the registered operator on CPU tensors."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fer_kernels::{name}", "CPU")


def dtypes_of(backend: str) -> list[torch.dtype]:
    return list(OPERATOR.dtypes[backend])


def normal(*shape: int, seed: int = 0, dtype=torch.float32, device="cpu") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def attention_inputs(shape, dtype=torch.float32, device="cpu", seed=0, joint=1.5):
    """q, k, v and out's gradient. All queries share a direction, so some keys are joint."""
    b, h, n, m, d = shape
    shared = joint * normal(b, h, 1, d, seed=seed + 4)
    q = (normal(b, h, n, d, seed=seed) + shared).to(dtype).to(device)
    k, v = (normal(b, h, m, d, seed=seed + i, dtype=dtype, device=device) for i in (1, 2))
    return q, k, v, normal(b, h, n, d, seed=seed + 3, dtype=dtype, device=device)


def uniform_noise(b, h, m, seed=0, device="cpu"):
    return torch.rand(b, h, m, generator=torch.Generator().manual_seed(seed)).to(device)


def with_noise(drop, b, h, m, device="cpu", **options):
    noise = {"noise": uniform_noise(b, h, m, device=device)} if drop in CONTROLS else {}
    return {"drop": drop, **noise, **options}


def forward_backward(q, k, v, grad, **options):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out, stats = jad_attention(*leaves, return_stats=True, **options)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad)), stats


def bias_of(stats, drop, **options):
    """What the call did, for the oracle: its own mask, or the float64 bias of its own column means."""
    return oracle.soft_bias(stats.column_mean, **options) if drop == "soft" else oracle.as_bias(stats.mask)


# ---- masks, outputs and gradients against float64 ----

SHAPES = [  # B, H, N, M, D: self and cross, both regimes, widths that are no power of two
    (2, 3, 49, 49, 16),
    (1, 2, 197, 197, 64),
    (2, 2, 4, 197, 24),
    (1, 2, 70, 5, 40),
    (1, 2, 33, 256, 8),
    (1, 1, 40, 257, 72),
    (1, 1, 300, 520, 32),
    (1, 2, 20, 60, 256),
    (2, 1, 31, 33, 100),
]
SEEDS = (0, 10, 20, 30, 40)  # attention_inputs draws from five seeds
SMALL_SHAPES = [(1, 2, 20, 24, 16), (1, 1, 9, 40, 24)]


def shapes_of(backend):
    return SMALL_SHAPES if slow_when_interpreted(backend) else SHAPES


@every_backend
@every_mode
@pytest.mark.parametrize("joint_over", ["query", "head"])
def test_against_float64(backend, drop, joint_over):
    """The mask is right, and on that very mask results err at most twice as much as eager code.

    In float64 eager code is the truth itself, and the worst case of rounding all that is asked.
    """
    device, over_head = device_of(backend), joint_over == "head"
    dropped = 0
    shapes = [shape for shape in shapes_of(backend) if shape[1] > 1 or not over_head]
    for shape, dtype in itertools.product(shapes[:3] if over_head else shapes, dtypes_of(backend)):
        b, h, _, m, _ = shape
        options = with_noise(drop, b, 1 if over_head else h, m, device, joint_over=joint_over)
        squares = 0
        for seed in SEEDS[:1] if dtype == torch.float64 else SEEDS:
            q, k, v, grad = attention_inputs(shape, dtype, device, seed)
            got, stats = forward_backward(q, k, v, grad, **options, backend=backend)
            if drop == "key":
                rule = {"beta": 1.0, "max_drop": 0.3, "protect": 1}
                oracle.assert_key_mask(stats.mask, q, k, **rule, over_head=over_head)
            if drop == "entry":
                oracle.assert_entry_mask(stats.mask, q, k, tau=0.3, protect=1, over_head=over_head)
            dropped += int(stats.mask.sum())
            soft = {"soft": 0.5, "over_head": over_head} if drop == "soft" else {}
            squares += oracle.judged(got, q, k, v, grad, bias_of(stats, drop, **soft))
        if dtype != torch.float64:
            oracle.assert_within_twice_eager(squares, dtype)
    assert (dropped > 0) == (drop not in ("none", "soft"))


@pytest.mark.sanitize
@every_backend
@every_mode
def test_every_dtype_at_small_shapes(backend, drop):
    for shape, dtype in itertools.product(
        [(2, 2, 7, 11, 8), (1, 1, 2, 2, 1), (1, 3, 17, 3, 20)],
        [torch.float32, torch.float64, torch.bfloat16, torch.float16],
    ):
        device = device_of(backend)
        b, h, _, m, _ = shape
        q, k, v, grad = attention_inputs(shape, dtype, device)
        options = with_noise(drop, b, h, m, device, max_drop=0.6)
        if dtype not in dtypes_of(backend):
            with pytest.raises(RuntimeError, match="it takes"):
                jad_attention(q, k, v, **options, backend=backend)
            continue
        got, stats = forward_backward(q, k, v, grad, **options, backend=backend)
        bias = bias_of(stats, drop, **({"soft": 0.5} if drop == "soft" else {}))
        oracle.assert_within_rounding(got, oracle.replay(q, k, v, grad, bias), q, k, v, grad, bias)


@every_backend
def test_large(backend):
    if slow_when_interpreted(backend):
        pytest.skip("too slow interpreted")
    for shape in [(1, 1, 1000, 4096, 48), (1, 1, 4096, 700, 8), (1, 2, 785, 785, 64)]:
        q, k, v, grad = attention_inputs(shape, device=device_of(backend))
        got, stats = forward_backward(q, k, v, grad, drop="key", backend=backend)
        oracle.assert_key_mask(stats.mask, q, k, beta=1.0, max_drop=0.3, protect=1)
        assert stats.mask.any()
        bias = oracle.as_bias(stats.mask)
        oracle.assert_within_twice_eager(oracle.judged(got, q, k, v, grad, bias), q.dtype)


@every_backend
@pytest.mark.parametrize("scale", [0.0, 0.05, 1.0, -0.3])
def test_scale(backend, scale):
    q, k, v, grad = attention_inputs((1, 2, 24, 30, 16), device=device_of(backend))
    for drop in ("none", "key", "entry"):
        got, stats = forward_backward(q, k, v, grad, drop=drop, scale=scale, backend=backend)
        if drop == "key":
            oracle.assert_key_mask(stats.mask, q, k, beta=1.0, max_drop=0.3, protect=1, scale=scale)
        bias = oracle.as_bias(stats.mask)
        truth = oracle.replay(q, k, v, grad, bias, scale)
        oracle.assert_within_rounding(got, truth, q, k, v, grad, bias, scale)


@every_backend
def test_every_width(backend):
    widths = (8, 20, 48) if slow_when_interpreted(backend) else (*range(8, 257, 8), 9, 31, 33, 100, 255)
    for d in widths:
        q, k, v, grad = attention_inputs((1, 1, 9, 21, d), device=device_of(backend))
        got, stats = forward_backward(q, k, v, grad, max_drop=0.5, backend=backend)
        bias = oracle.as_bias(stats.mask)
        oracle.assert_within_rounding(got, oracle.replay(q, k, v, grad, bias), q, k, v, grad, bias)


@every_backend
@every_mode
def test_key_counts_around_tile_edges(backend, drop):
    sizes = (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300)
    if slow_when_interpreted(backend):
        sizes = (1, 16, 17, 65)
    device = device_of(backend)
    for m, n in itertools.product(sizes, (3, 18)):
        q, k, v, grad = attention_inputs((1, 2, n, m, 12), device=device)
        options = with_noise(drop, 1, 2, m, device, protect=0)
        got, stats = forward_backward(q, k, v, grad, **options, backend=backend)
        bias = bias_of(stats, drop, **({"soft": 0.5} if drop == "soft" else {}))
        oracle.assert_within_rounding(got, oracle.replay(q, k, v, grad, bias), q, k, v, grad, bias)


@every_backend
def test_query_counts_around_tile_edges(backend):
    sizes = (1, 17) if slow_when_interpreted(backend) else (1, 2, 15, 17, 31, 33, 64, 65, 127, 129, 257)
    for n, m in itertools.product(sizes, (20, 270)):
        q, k, v, grad = attention_inputs((1, 2, n, m, 12), device=device_of(backend))
        got, stats = forward_backward(q, k, v, grad, backend=backend)
        bias = oracle.as_bias(stats.mask)
        oracle.assert_within_rounding(got, oracle.replay(q, k, v, grad, bias), q, k, v, grad, bias)


# ---- the rules of dropping ----


def planted(c, queries=8, width=16, dtype=torch.float32, device="cpu"):
    """q and k whose every row of attention is `c` / sum(c), as its scores are log c."""
    c = torch.as_tensor(c, dtype=torch.float64)
    q = torch.zeros(1, 1, queries, width, dtype=torch.float64)
    k = torch.zeros(1, 1, len(c), width, dtype=torch.float64)
    q[..., 0], k[..., 0] = 1.0, c.log()
    return (
        q.to(dtype).to(device),
        k.to(dtype).to(device),
        normal(1, 1, len(c), width, device=device).to(dtype),
    )


def dropped_keys(c, backend, **options):
    q, k, v = planted(c, device=device_of(backend))
    _, stats = jad_attention(q, k, v, scale=1.0, return_stats=True, backend=backend, **options)
    rows = stats.mask[0, 0]
    return rows.nonzero().flatten().tolist()


@pytest.mark.sanitize
@every_backend
def test_a_joint_key_is_dropped(backend):
    weights = [1.0] * 20
    weights[7] = 12.0
    assert dropped_keys(weights, backend) == [7]
    weights[3] = 11.0
    assert dropped_keys(weights, backend) == [3, 7]
    assert dropped_keys(weights, backend, beta=1e9) == []
    assert dropped_keys(weights, backend, beta=float("inf")) == []
    assert dropped_keys(weights, backend, max_drop=0.05) == [7]  # one of twenty: the larger
    assert dropped_keys(weights, backend, max_drop=0.0499) == []


@every_backend
def test_ties_go_to_the_lowest_index(backend):
    weights = [1.0] * 20
    for j in (4, 9, 13, 18):
        weights[j] = 8.0
    assert dropped_keys(weights, backend) == [4, 9, 13, 18]
    assert dropped_keys(weights, backend, max_drop=0.15) == [4, 9, 13]
    assert dropped_keys(weights, backend, max_drop=0.15, protect=5) == [9, 13, 18]
    weights = [1.0] * 520  # the regime of many keys
    for j in range(100, 500, 10):
        weights[j] = 5.0
    assert dropped_keys(weights, backend, max_drop=10 / 520) == list(range(100, 200, 10))


@every_backend
def test_protected_keys_never_drop(backend):
    weights = [9.0, 9.0, 9.0] + [1.0] * 17
    assert dropped_keys(weights, backend, protect=0) == [0, 1, 2]
    assert dropped_keys(weights, backend) == [1, 2]
    assert dropped_keys(weights, backend, protect=3) == []
    device = device_of(backend)
    for drop, protect in itertools.product(("key", "entry", *CONTROLS), (1, 5, 23)):
        q, k, v, _ = attention_inputs((2, 2, 12, 24, 16), device=device, joint=3.0)
        options = with_noise(drop, 2, 2, 24, device, protect=protect, max_drop=0.9, beta=0.0)
        _, stats = jad_attention(q, k, v, **options, return_stats=True, backend=backend)
        assert not stats.mask[..., :protect].any()


@every_backend
@pytest.mark.parametrize("drop", ["key", "random"])
@pytest.mark.parametrize("max_drop", [0.0, 0.01, 0.1, 0.3, 0.7, 0.99])
def test_the_cap_holds(backend, drop, max_drop):
    device = device_of(backend)
    for m in (3, 10, 100, 300):
        q, k, v, _ = attention_inputs((2, 2, 10, m, 16), device=device, joint=3.0)
        options = with_noise(drop, 2, 2, m, device, max_drop=max_drop, beta=0.0)
        _, stats = jad_attention(q, k, v, **options, return_stats=True, backend=backend)
        assert (stats.mask.sum(-1) <= int(max_drop * m)).all()
    assert max_drop < 0.1 or stats.mask.any()


@every_backend
@pytest.mark.parametrize("drop", ["none", "key", "entry", "random"])
def test_uniform_attention_drops_nothing(backend, drop):
    device = device_of(backend)
    for n, m in [(5, 3), (7, 49), (4, 197), (6, 300), (197, 197)]:
        v = normal(1, 2, m, 16, device=device)
        k = normal(1, 2, 1, 16, seed=1, device=device).expand(-1, -1, m, -1)  # all keys alike
        q = normal(1, 2, n, 16, seed=2, device=device)
        for queries in (q, torch.zeros_like(q)):
            options = with_noise(drop, 1, 2, m, device, beta=0.0, max_drop=0.9)
            out, stats = jad_attention(queries, k, v, **options, return_stats=True, backend=backend)
            assert not stats.mask.any() and (stats.fraction == 0).all()
            plain = jad_attention(queries, k, v, drop="none", backend=backend)
            torch.testing.assert_close(out, plain, rtol=1e-6, atol=1e-6)


@every_backend
def test_uniform_attention_is_not_changed_by_soft(backend):
    q, k, v = planted([1.0] * 30, device=device_of(backend))
    soft = jad_attention(q, k, v, drop="soft", soft=0.9, backend=backend)
    torch.testing.assert_close(soft, jad_attention(q, k, v, drop="none", backend=backend))


@every_backend
def test_a_nearly_uniform_head_is_left_alone(backend):
    """One key 2% above the rest is above the threshold, but the spread is too small to mean anything."""
    weights = [1.0] * 19 + [1.02]
    assert dropped_keys(weights, backend) == []
    assert dropped_keys([1.0] * 19 + [1.5], backend) == [19]


@every_backend
@every_mode
def test_a_single_query_drops_nothing(backend, drop):
    device = device_of(backend)
    q, k, v, grad = attention_inputs((2, 3, 1, 40, 16), device=device)
    options = with_noise(drop, 2, 3, 40, device)
    got, stats = forward_backward(q, k, v, grad, **options, backend=backend)
    assert not stats.mask.any()
    plain, _ = forward_backward(q, k, v, grad, drop="none", backend=backend)
    for mine, want in zip(got, plain, strict=True):
        assert torch.equal(mine, want)


@every_backend
def test_a_single_key(backend):
    q, _, _, grad = attention_inputs((2, 3, 5, 4, 16), device=device_of(backend))
    k, v = normal(2, 3, 1, 16, device=q.device), normal(2, 3, 1, 16, seed=1, device=q.device)
    for drop in ("none", "key", "soft", "entry", "random", "dropkey"):
        options = with_noise(drop, 2, 3, 1, q.device, max_drop=0.999, protect=0)
        got, stats = forward_backward(q, k, v, grad, **options, backend=backend)
        assert not stats.mask.any()
        assert torch.equal(got[0], v.expand_as(got[0]))
        oracle.assert_within_rounding(got, oracle.replay(q, k, v, grad), q, k, v, grad, None)


@every_backend
@every_mode
def test_gate(backend, drop):
    """Heads with gate 0 are plain attention, those with 1 are what they are without a gate."""
    device = device_of(backend)
    q, k, v, grad = attention_inputs((2, 3, 20, 30, 16), device=device)
    options = with_noise(drop, 2, 3, 30, device, backend=backend)
    gate = torch.tensor([[0, 1, 0], [1, 1, 0]], device=device)
    full, full_stats = forward_backward(q, k, v, grad, **options)
    plain, _ = forward_backward(q, k, v, grad, drop="none", backend=backend)
    for dtype in (torch.int64, torch.bool, torch.float32, torch.bfloat16, torch.uint8):
        got, stats = forward_backward(q, k, v, grad, gate=gate.to(dtype), **options)
        on = gate.bool()
        assert torch.equal(stats.mask[on], full_stats.mask[on]) and not stats.mask[~on].any()
        assert torch.equal(stats.column_mean, full_stats.column_mean)
        for mine, dropped, whole in zip(got, full, plain, strict=True):
            assert torch.equal(mine[on], dropped[on])
            assert torch.equal(mine[~on], whole[~on])


@every_backend
@every_mode
def test_gate_zero_is_scaled_dot_product_attention(backend, drop):
    device = device_of(backend)
    for dtype in dtypes_of(backend):
        q, k, v, grad = attention_inputs((2, 2, 33, 40, 24), dtype, device)
        options = with_noise(drop, 2, 2, 40, device, backend=backend)
        gate = torch.zeros(2, 2, dtype=torch.bool, device=device)
        got, _ = forward_backward(q, k, v, grad, gate=gate, **options)
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        theirs = F.scaled_dot_product_attention(*leaves)
        sdpa = (theirs.detach(), *torch.autograd.grad(theirs, leaves, grad))
        truth = oracle.replay(q, k, v, grad).tensors()
        eager = oracle.replay(q, k, v, grad, dtype=dtype).tensors()
        for mine, other, plain, want in zip(got, sdpa, eager, truth, strict=True):
            error, own = (((t.cpu().double() - want).abs().max()) for t in (other, plain))
            allowed = max(error, own, torch.finfo(dtype).eps * want.abs().max())
            assert (mine.cpu().double() - other.cpu().double()).abs().max() <= 3 * allowed


@every_backend
@pytest.mark.parametrize("drop", ["key", "random", "dropkey"])
def test_max_drop_zero_is_bit_equal_to_none(backend, drop):
    device = device_of(backend)
    for shape, dtype in itertools.product([(2, 2, 20, 30, 16), (1, 1, 20, 300, 40)], dtypes_of(backend)):
        if slow_when_interpreted(backend) and shape[3] == 300:
            continue
        q, k, v, grad = attention_inputs(shape, dtype, device)
        options = with_noise(drop, shape[0], shape[1], shape[3], device, max_drop=0.0, backend=backend)
        got, stats = forward_backward(q, k, v, grad, **options)
        plain, _ = forward_backward(q, k, v, grad, drop="none", backend=backend)
        assert not stats.mask.any()
        for mine, want in zip(got, plain, strict=True):
            assert torch.equal(mine, want)


@every_backend
@pytest.mark.parametrize("drop", ["key", "entry"])
def test_permuting_keys_permutes_the_mask(backend, drop):
    device = device_of(backend)
    for m in (50, 300):
        q, k, v, _ = attention_inputs((1, 2, 20, m, 16), device=device)
        order = torch.randperm(m, generator=torch.Generator().manual_seed(1)).to(device)
        options = {"drop": drop, "protect": 0, "return_stats": True, "backend": backend}
        out, stats = jad_attention(q, k, v, **options)
        again, permuted = jad_attention(q, k[:, :, order], v[:, :, order], **options)
        check = oracle.assert_key_mask if drop == "key" else oracle.assert_entry_mask
        rule = {"beta": 1.0, "max_drop": 0.3} if drop == "key" else {"tau": 0.3}
        check(permuted.mask, q, k[:, :, order], protect=0, **rule)
        differs = (permuted.mask != stats.mask[..., order]).sum()
        assert differs <= check(stats.mask, q, k, protect=0, **rule) + check(
            permuted.mask, q, k[:, :, order], protect=0, **rule
        )
        if not differs:
            torch.testing.assert_close(again, out, rtol=1e-5, atol=1e-5)


@every_backend
def test_permuting_queries_permutes_the_output(backend):
    q, k, v, _ = attention_inputs((1, 2, 20, 50, 16), device=device_of(backend))
    out, stats = jad_attention(q, k, v, return_stats=True, backend=backend)
    again, other = jad_attention(q.flip(2), k, v, return_stats=True, backend=backend)
    assert torch.equal(stats.mask, other.mask)
    torch.testing.assert_close(again, out.flip(2), rtol=1e-5, atol=1e-5)


@every_backend
@pytest.mark.parametrize("drop", ["key", "random", "dropkey"])
def test_joint_over_head_is_one_mask_a_sample(backend, drop):
    device = device_of(backend)
    q, k, v, grad = attention_inputs((3, 4, 20, 60, 16), device=device)
    options = with_noise(drop, 3, 1, 60, device, joint_over="head", backend=backend)
    _, stats = forward_backward(q, k, v, grad, **options)
    assert torch.equal(stats.mask, stats.mask[:, :1].expand_as(stats.mask)) and stats.mask.any()
    if drop == "key":
        assert torch.equal(stats.mask.cpu(), oracle.key_mask(stats.column_mean, 1.0, 0.3, 1, over_head=True))


@every_backend
@pytest.mark.parametrize("joint_over", ["query", "head"])
def test_the_mask_follows_from_the_returned_means(backend, joint_over):
    """Decisions are taken in float64 on the means that are returned: no rounding band is left."""
    device = device_of(backend)
    for m, beta, max_drop in [(49, 1.0, 0.3), (197, 0.3, 0.1), (300, 0.0, 0.2), (700, 2.0, 0.01)]:
        q, k, v, _ = attention_inputs((2, 3, 12, m, 16), device=device)
        options = {"beta": beta, "max_drop": max_drop, "joint_over": joint_over, "backend": backend}
        _, stats = jad_attention(q, k, v, **options, return_stats=True)
        want = oracle.key_mask(stats.column_mean, beta, max_drop, 1, joint_over == "head")
        assert torch.equal(stats.mask.cpu(), want)


@every_backend
def test_random_drops_as_many_keys_as_key(backend):
    device = device_of(backend)
    q, k, v, _ = attention_inputs((2, 3, 20, 80, 16), device=device)
    noise = uniform_noise(2, 3, 80, device=device)
    options = {"return_stats": True, "protect": 2, "backend": backend}
    key = jad_attention(q, k, v, drop="key", **options)[1]
    random = jad_attention(q, k, v, drop="random", noise=noise, **options)[1]
    assert torch.equal(key.fraction, random.fraction) and key.mask.any()
    for head, drawn in zip(random.mask.flatten(0, 1).cpu(), noise.flatten(0, 1).cpu(), strict=True):
        order = sorted(range(2, 80), key=drawn.tolist().__getitem__)
        assert sorted(order[: int(head.sum())]) == head.nonzero().flatten().tolist()
    tied = jad_attention(q, k, v, drop="random", noise=torch.zeros_like(noise), **options)[1]
    for head in tied.mask.flatten(0, 1).cpu():
        assert head.nonzero().flatten().tolist() == list(range(2, 2 + int(head.sum())))


@every_backend
def test_dropkey_drops_where_noise_is_small(backend):
    device = device_of(backend)
    q, k, v, _ = attention_inputs((2, 3, 20, 80, 16), device=device)
    noise = uniform_noise(2, 3, 80, device=device)
    noise[1, 1] = 0.0  # this head would lose every key
    options = {"drop": "dropkey", "max_drop": 0.25, "return_stats": True, "backend": backend}
    mask = jad_attention(q, k, v, noise=noise, protect=0, **options)[1].mask
    want = noise < 0.25
    want[1, 1] = False
    assert torch.equal(mask, want)
    mask = jad_attention(q, k, v, noise=noise, protect=1, **options)[1].mask
    assert mask[1, 1, 1:].all() and not mask[..., 0].any()


def test_noise_comes_from_the_generator():
    q, k, v, _ = attention_inputs((2, 3, 20, 80, 16))

    def mask(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        return jad_attention(q, k, v, generator=generator, return_stats=True, **options)[1].mask

    for drop in CONTROLS:
        assert torch.equal(mask(1, drop=drop), mask(1, drop=drop))
        assert not torch.equal(mask(1, drop=drop), mask(2, drop=drop))
        torch.manual_seed(3)
        first = jad_attention(q, k, v, drop=drop)
        torch.manual_seed(3)
        assert torch.equal(jad_attention(q, k, v, drop=drop), first)
    state = torch.get_rng_state()
    for drop in ("none", "key", "soft", "entry"):
        jad_attention(q, k, v, drop=drop)
    assert torch.equal(torch.get_rng_state(), state)


@every_backend
def test_entry_leaves_a_row_whole_that_would_lose_all(backend):
    """Every row is the same, so every entry is similar; only protected keys would be left, or none."""
    weights = [1.0] * 10 + [30.0] * 10
    device = device_of(backend)
    q, k, v = planted(weights, device=device)
    options = {"drop": "entry", "tau": 0.5, "scale": 1.0, "return_stats": True, "backend": backend}
    _, stats = jad_attention(q, k, v, **options)
    assert stats.mask[..., 10:].all() and not stats.mask[..., :10].any()
    tiny = [1e-9] * 10 + [1.0] * 10  # what would be left is 1e-9 of the mass
    q, k, v = planted(tiny, device=device)
    out, stats = jad_attention(q, k, v, **options)
    assert not stats.mask.any()
    plain = jad_attention(q, k, v, drop="none", scale=1.0, backend=backend)
    torch.testing.assert_close(out, plain)


@every_backend
def test_soft_is_its_formula(backend):
    device = device_of(backend)
    for soft in (0.0, 0.3, 0.999):
        squares = 0
        for seed in SEEDS:
            q, k, v, grad = attention_inputs((2, 3, 20, 50, 16), device=device, seed=seed)
            got, stats = forward_backward(q, k, v, grad, drop="soft", soft=soft, protect=3, backend=backend)
            assert not stats.mask.any() and (stats.fraction == 0).all()
            squares += oracle.judged(got, q, k, v, grad, oracle.soft_bias(stats.column_mean, soft))
        oracle.assert_within_twice_eager(squares, q.dtype)
    p = oracle.softmax(oracle.scores(q, k))
    c = p.mean(2, keepdim=True)
    by_hand = p * (1 - 0.999 * c / c.amax(-1, keepdim=True))
    by_hand = by_hand / by_hand.sum(-1, keepdim=True) @ v.cpu().double()
    assert (got[0].cpu().double() - by_hand).abs().max() < 1e-4


@every_backend
def test_statistics(backend):
    device = device_of(backend)
    for dtype in dtypes_of(backend):
        q, k, v, _ = attention_inputs((2, 3, 20, 45, 16), dtype, device)
        for drop in MODES:
            options = with_noise(drop, 2, 3, 45, device, backend=backend)
            out, stats = jad_attention(q.requires_grad_(), k, v, **options, return_stats=True)
            assert isinstance(stats, fer_kernels.JADStats)
            compute = torch.float64 if dtype == torch.float64 else torch.float32
            assert stats.column_mean.dtype == compute and stats.column_mean.shape == (2, 3, 45)
            assert stats.mask.dtype == torch.bool
            assert stats.mask.shape == ((2, 3, 20, 45) if drop == "entry" else (2, 3, 45))
            assert stats.fraction.shape == (2, 3) and stats.fraction.dtype == torch.float32
            torch.testing.assert_close(stats.fraction, stats.mask.float().flatten(2).mean(-1))
            assert not any(t.requires_grad for t in stats) and out.requires_grad
            assert torch.equal(out, jad_attention(q, k, v, **options))
            with torch.no_grad():
                assert torch.equal(out, jad_attention(q, k, v, **options))


def test_packed_bits():
    for m in (1, 7, 8, 9, 16, 197):
        mask = torch.rand(2, 3, 4, m, generator=torch.Generator().manual_seed(m)) < 0.5
        bits = reference.pack(mask)
        assert bits.shape == (2, 3, 4, -(-m // 8)) and bits.dtype == torch.uint8
        assert torch.equal(reference.unpack(bits, m), mask)
        for j in range(m):
            assert torch.equal((bits[..., j // 8] >> (j % 8)) & 1, mask[..., j].to(torch.uint8))
        if m % 8:
            assert (bits[..., -1] >> (m % 8) == 0).all()


# ---- column means ----


@every_backend
@pytest.mark.parametrize("scale", [None, 0.5])
def test_column_means_match_exchanged_attention(backend, scale):
    device = device_of(backend)
    for shape, dtype in itertools.product(shapes_of(backend), dtypes_of(backend)):
        q, k, v, _ = attention_inputs(shape, dtype, device)
        got = attention_column_mean(q, k, scale=scale, backend=backend)
        want = oracle.column_mean(q, k, scale)
        # Relative to each mean, but for scores so large that rounding them alone costs more.
        allowed = want * (1e-5 if scale is None else max(1e-5, oracle.weight_error(q, k, scale)))
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert ((got.cpu().double() - want).abs() <= allowed).all()
        assert (got.sum(-1) - 1).abs().max() < 1e-5
        for drop in ("key", "none"):
            _, stats = jad_attention(q, k, v, drop=drop, scale=scale, return_stats=True, backend=backend)
            assert ((stats.column_mean.cpu().double() - want).abs() <= allowed).all()


@every_backend
def test_column_mean_gradients(backend):
    device = device_of(backend)
    below_float64 = [dtype for dtype in dtypes_of(backend) if dtype != torch.float64]  # gradcheck has that
    for shape, dtype in itertools.product(shapes_of(backend), below_float64):
        squares = 0
        for seed in SEEDS:
            q, k, _, _ = attention_inputs(shape, dtype, device, seed)
            grad = normal(*shape[:2], shape[3], seed=seed + 5, device=device)

            def gradients(dtype, q=q, k=k, grad=grad):
                leaves = [t.detach().cpu().to(dtype).requires_grad_() for t in (q, k)]
                p = (leaves[0] @ leaves[1].mT * q.shape[-1] ** -0.5).softmax(-1)
                return torch.autograd.grad(p.mean(2), leaves, grad.cpu().to(dtype))

            leaves = [t.detach().requires_grad_() for t in (q, k)]
            means = attention_column_mean(*leaves, backend=backend)
            got = torch.autograd.grad(means, leaves, grad.to(means.dtype))
            assert all(mine.dtype == dtype for mine in got)
            squares += oracle.squared_errors(got, gradients(torch.float64), gradients(dtype))
        oracle.assert_within_twice_eager(squares, dtype, ("dq", "dk"))


# ---- infinities and NaN ----


@pytest.mark.sanitize
@every_backend
@every_mode
def test_overflow_gives_no_nan(backend, drop):
    """Scores of -inf: rows that keep a finite score are a softmax over those, rows without one are zeros."""
    device = device_of(backend)
    q, k, v, grad = attention_inputs((1, 2, 12, 20, 16), device=device)
    q[..., 0], k[..., 0] = 0.0, 0.0
    k[:, :, 3:, 0] = -1e30
    q[:, :, 4, 0] = 1e30  # row 4: keys 0 to 2 alone
    k[:, 1, :, 0] = -1e30  # head 1: no key is left to row 4
    options = with_noise(drop, 1, 2, 20, device, protect=0, backend=backend)
    out, stats = jad_attention(q, k, v, **options, return_stats=True)
    assert out.isfinite().all() and stats.column_mean.isfinite().all()
    assert (out[:, 1, 4] == 0).all()
    bias = bias_of(stats, drop, **({"soft": 0.5} if drop == "soft" else {}))
    overflow = oracle.softmax(
        (oracle.scores(q, k)).masked_fill(oracle.scores(q, k) < -3e38, -torch.inf) + bias
    )
    want = overflow @ v.cpu().double()
    torch.testing.assert_close(out.cpu().double(), want, rtol=1e-4, atol=1e-4)
    # The gradient to q is a sum over k = -1e30 with weight zero: finite, as in plain attention.
    (_, dq, _, dv), _ = forward_backward(q, k, v, grad, **options)
    assert dv.isfinite().all() and dq.isfinite().all()
    assert (dq[:, 1, 4] == 0).all()


@every_backend
@pytest.mark.parametrize("protect", [0, 1])
def test_a_row_that_loses_its_only_finite_score_is_zero(backend, protect):
    device = device_of(backend)
    weights = [1.0] * 20
    weights[7] = 30.0
    q, k, v = planted(weights, device=device)
    k[..., 1] = -1e30
    k[:, :, 7, 1] = 0.0
    q[:, :, 5, 1] = 1e30  # row 5 sees key 7 alone, which is joint
    options = {"scale": 1.0, "protect": protect, "backend": backend}
    (out, dq, _, dv), stats = forward_backward(q, k, v, torch.ones_like(q), **options)
    assert stats.mask[0, 0].nonzero().flatten().tolist() == [7]
    assert (out[0, 0, 5] == 0).all() and (dq[0, 0, 5] == 0).all() and (dv[0, 0, 7] == 0).all()
    assert out.isfinite().all() and dv.isfinite().all()
    plain = jad_attention(q, k, v, drop="none", scale=1.0, backend=backend)
    torch.testing.assert_close(plain[0, 0, 5], v[0, 0, 7])


@every_backend
@pytest.mark.parametrize("gap", [30.0, 80.0, 200.0, 1e4])
def test_what_is_left_may_be_far_below_what_was_dropped(backend, gap):
    """Without the dropped key the others are a softmax of their own, though next to it they underflow."""
    device = device_of(backend)
    q, k, v, grad = attention_inputs((1, 1, 10, 30, 16), device=device)
    q[..., 0], k[..., 0] = 1.0, 0.0
    k[:, :, 7, 0] = 4 * gap
    (out, dq, dk, dv), stats = forward_backward(q, k, v, grad, backend=backend)
    assert stats.mask[0, 0].nonzero().flatten().tolist() == [7]
    others = [j for j in range(30) if j != 7]
    want = oracle.replay(q, k[:, :, others], v[:, :, others], grad)
    torch.testing.assert_close(out.cpu().double(), want.out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dq.cpu().double(), want.dq, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dk[:, :, others].cpu().double(), want.dk, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dv[:, :, others].cpu().double(), want.dv, rtol=1e-4, atol=1e-5)
    assert (dk[:, :, 7] == 0).all() and (dv[:, :, 7] == 0).all()


@every_backend
@pytest.mark.parametrize("drop", ["none", "key", "soft", "entry", "random"])
def test_nan_stays_in_its_row_and_stops_dropping_in_its_head(backend, drop):
    device = device_of(backend)
    q, k, v, _ = attention_inputs((1, 2, 12, 20, 16), device=device)
    q[0, 0, 5, 3] = torch.nan
    options = with_noise(drop, 1, 2, 20, device, return_stats=True, backend=backend)
    out, stats = jad_attention(q, k, v, **options)
    plain = jad_attention(q, k, v, drop="none", backend=backend)
    assert out[0, 0, 5].isnan().all() and stats.column_mean[0, 0].isnan().all()
    rest = [i for i in range(12) if i != 5]
    assert torch.equal(out[0, 0, rest], plain[0, 0, rest]) and not stats.mask[0, 0].any()
    assert out[0, 1].isfinite().all()
    assert stats.mask[0, 1].any() == (drop not in ("none", "soft"))


@every_backend
@every_mode
def test_nan_only_where_plain_attention_has_it(backend, drop):
    device = device_of(backend)
    q, k, v, _ = attention_inputs((2, 2, 12, 20, 16), device=device)
    q[0, 0, 2], k[1, 0, 4], v[1, 1, 3, 2] = torch.inf, -torch.inf, torch.nan
    q[0, 1, 7, 0] = 3e38
    options = with_noise(drop, 2, 2, 20, device, backend=backend)
    out = jad_attention(q, k, v, **options)
    plain = (q.cpu() @ k.cpu().mT * 0.25).softmax(-1) @ v.cpu()
    assert not (out.cpu().isnan() & ~plain.isnan()).any()


# ---- arguments ----


@every_backend
@pytest.mark.parametrize("drop", ["key", "entry"])
def test_not_contiguous(backend, drop):
    device = device_of(backend)
    packed = normal(2, 24, 3, 4, 16, device=device)  # as a qkv projection leaves them
    views = [packed.permute(2, 0, 3, 1, 4).unbind(0)]
    views.append(tuple(normal(2, 4, 16, 24, seed=i, device=device).mT for i in range(3)))
    views.append(tuple(normal(2, 4, 48, 16, seed=i, device=device)[:, :, ::2] for i in range(3)))
    views.append(tuple(normal(1, 1, 24, 16, seed=i, device=device).expand(2, 4, -1, -1) for i in range(3)))
    for q, k, v in views:
        grad = normal(2, 24, 4, 16, seed=9, device=device).transpose(1, 2)
        got, stats = forward_backward(q, k, v, grad, drop=drop, backend=backend)
        straight = [t.contiguous() for t in (q, k, v, grad)]
        want, other = forward_backward(*straight, drop=drop, backend=backend)
        assert torch.equal(stats.mask, other.mask)
        for mine, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    gate = torch.ones(4, 2, device=device).T
    gate[0, 1] = 0
    noise = uniform_noise(2, 4, 48, device=device)[..., ::2]
    calls = [
        jad_attention(*tensors, gate=gate, drop="dropkey", noise=noise, return_stats=True, backend=backend)
        for tensors, gate, noise in [((q, k, v), gate, noise), (straight[:3], gate.clone(), noise.clone())]
    ]
    assert torch.equal(calls[0][1].mask, calls[1][1].mask) and calls[0][1].mask.any()
    torch.testing.assert_close(calls[0][0], calls[1][0], rtol=1e-5, atol=1e-5)


@every_backend
@every_mode
def test_empty_batch(backend, drop):
    device = device_of(backend)
    q, k, v = (torch.empty(0, 2, n, 8, device=device, requires_grad=True) for n in (5, 7, 7))
    options = with_noise(drop, 0, 2, 7, device, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of statistics of nothing
        out, stats = jad_attention(q, k, v, **options, return_stats=True)
    assert out.shape == (0, 2, 5, 8) and stats.column_mean.shape == (0, 2, 7)
    assert all(g.shape[0] == 0 for g in torch.autograd.grad(out.sum(), (q, k, v)))
    assert attention_column_mean(q, k, backend=backend).shape == (0, 2, 7)


@every_backend
@every_mode
def test_only_the_wanted_gradients(backend, drop):
    device = device_of(backend)
    q, k, v, grad = attention_inputs((1, 2, 10, 14, 8), device=device)
    options = with_noise(drop, 1, 2, 14, device, backend=backend)
    full, _ = forward_backward(q, k, v, grad, **options)
    for position in range(3):
        leaves = [t.detach().requires_grad_(i == position) for i, t in enumerate((q, k, v))]
        out = jad_attention(*leaves, **options)
        (found,) = torch.autograd.grad(out, leaves[position], grad)
        assert torch.equal(found, full[1 + position])


@every_backend
@every_mode
def test_repeats_are_bitwise_equal(backend, drop, two_threads):
    device = device_of(backend)
    small = slow_when_interpreted(backend)
    for shape in [(2, 2, 20, 24, 16)] if small else [(2, 2, 50, 50, 32), (1, 1, 30, 300, 16)]:
        q, k, v, grad = attention_inputs(shape, device=device)
        options = with_noise(drop, shape[0], shape[1], shape[3], device, backend=backend)
        first, stats = forward_backward(q, k, v, grad, **options)
        for _ in range(3 if small else 200):
            again, other = forward_backward(q, k, v, grad, **options)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
            assert torch.equal(stats.mask, other.mask)
            assert torch.equal(stats.column_mean, other.column_mean)


# ---- gradients ----


@pytest.mark.parametrize("backend", [b for b in backends("jad") if torch.float64 in dtypes_of(b)])
@pytest.mark.parametrize("drop", [mode for mode in MODES if mode != "soft"])  # soft's bias moves with q and k
def test_gradcheck(backend, drop):
    q, k, v, _ = attention_inputs((1, 2, 5, 7, 4), torch.float64)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    options = with_noise(drop, 1, 2, 7, backend=backend)

    def call(q, k, v):
        return jad_attention(q, k, v, **options)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("backend", [b for b in backends("jad") if torch.float64 in dtypes_of(b)])
def test_gradcheck_of_column_means(backend):
    q, k, _, _ = attention_inputs((1, 2, 5, 7, 4), torch.float64)
    leaves = [t.requires_grad_() for t in (q, k)]
    assert torch.autograd.gradcheck(lambda q, k: attention_column_mean(q, k, backend=backend), leaves)
    assert torch.autograd.gradgradcheck(lambda q, k: attention_column_mean(q, k, backend=backend), leaves)


@every_backend
@every_mode
def test_second_derivatives(backend, drop):
    """A gradient penalty, against autograd through float64 attention under the same bias."""
    device = device_of(backend)
    q, k, v, grad = attention_inputs((1, 2, 10, 12, 8), device=device)
    options = with_noise(drop, 1, 2, 12, device, backend=backend)

    def penalty(attend, *tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = attend(*leaves)
        first = torch.autograd.grad(out, leaves, grad.to(out), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    _, stats = jad_attention(q, k, v, **options, return_stats=True)
    bias = bias_of(stats, drop, **({"soft": 0.5} if drop == "soft" else {}))
    got = penalty(lambda q, k, v: jad_attention(q, k, v, **options), q, k, v)
    want = penalty(lambda q, k, v: (q @ k.mT * 8**-0.5 + bias).softmax(-1) @ v, *oracle.double(q, k, v))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine.cpu().double(), theirs, rtol=1e-3, atol=1e-3)


@every_backend
def test_what_is_saved_for_backward(backend):
    """The inputs, the output, a number a row, and a number a key or a bit an entry."""
    device = device_of(backend)
    q, k, v, _ = attention_inputs((2, 3, 40, 64, 16), device=device)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    given = sum(t.nbytes for t in leaves)
    extra = {"none": 0, "key": 4 * 64, "soft": 4 * 64, "entry": 40 * 64 // 8}
    for drop, a_head in extra.items():
        saved = {}

        def keep(tensor, saved=saved):
            saved[tensor.data_ptr(), tensor.shape] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = jad_attention(*leaves, drop=drop, backend=backend)
        assert sum(saved.values()) <= given + out.nbytes + 2 * 3 * (4 * 40 + a_head)


def test_entry_without_its_bits_has_no_backward():
    q, k, v, _ = attention_inputs((1, 1, 4, 6, 8))
    arguments = (None, None, MODES.index("entry"), 1.0, 0.3, 1, 0.5, 0.3, False, 0.3)
    out = OPERATOR.registered["reference"](q.requires_grad_(), k, v, *arguments, False, False)[0]
    with pytest.raises(RuntimeError, match="save=False, which is for calls without a backward"):
        out.sum().backward()


# ---- the compiled CPU code ----


@pytest.mark.skipif(not compiled("jad"), reason="no compiled CPU kernel")
def test_threads_and_instruction_sets_agree(cpu_isas, two_threads):
    for shape, drop, dtype in itertools.product(
        [(3, 2, 33, 49, 20), (1, 1, 40, 300, 64)], MODES, (torch.float32, torch.float64, torch.bfloat16)
    ):
        b, h, _, m, _ = shape
        q, k, v, grad = attention_inputs(shape, dtype)
        options = with_noise(drop, b, h, m, backend="cpu")
        for isa in cpu_isas.supported_isas():
            cpu_isas.set_isa(isa)
            torch.set_num_threads(2)
            got, stats = forward_backward(q, k, v, grad, **options)
            bias = bias_of(stats, drop, **({"soft": 0.5} if drop == "soft" else {}))
            oracle.assert_within_rounding(got, oracle.replay(q, k, v, grad, bias), q, k, v, grad, bias)
            for threads in (1, 3, 4):
                torch.set_num_threads(threads)
                again, other = forward_backward(q, k, v, grad, **options)
                assert all(torch.equal(x, y) for x, y in zip(got, again, strict=True))
                assert torch.equal(stats.mask, other.mask)


@pytest.mark.skipif("cpu" not in backends("jad"), reason="no compiled CPU module")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_cpu_on_anything(data):
    draw = data.draw
    drop = draw(st.sampled_from(MODES), "drop")
    shape = (
        draw(st.integers(1, 3), "batch"),
        draw(st.integers(1, 3), "heads"),
        draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 130, 260])), "queries"),
        draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 197, 256, 257, 300])), "keys"),
        draw(st.integers(1, 80), "width"),
    )
    b, h, n, m, _ = shape
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]), "dtype")
    seed = draw(st.integers(0, 2**31), "seed")
    q, k, v, grad = attention_inputs(shape, dtype, seed=seed, joint=draw(st.sampled_from([0.0, 1.5, 4.0])))
    rule = {
        "beta": draw(st.sampled_from([0.0, 0.5, 1.0, 3.0]), "beta"),
        "max_drop": draw(st.sampled_from([0.0, 0.1, 0.3, 0.95]), "max_drop"),
        "protect": draw(st.integers(0, m - 1), "protect"),
        "tau": draw(st.sampled_from([0.0, 0.3, 1.5]), "tau"),
    }
    over_head = draw(st.booleans(), "over head")
    gate = None
    if draw(st.booleans(), "gate"):
        gate = torch.randint(0, 2, (b, h), generator=torch.Generator().manual_seed(seed))
    options = with_noise(drop, b, 1 if over_head else h, m, **rule, gate=gate, backend="cpu")
    options["joint_over"] = "head" if over_head else "query"
    got, stats = forward_backward(q, k, v, grad, **options)
    if n < 2:
        assert not stats.mask.any()
    elif drop == "key":
        want = oracle.key_mask(stats.column_mean, rule["beta"], rule["max_drop"], rule["protect"], over_head)
        assert torch.equal(stats.mask, want if gate is None else want & gate.bool().unsqueeze(-1))
    elif drop == "entry":
        arguments = {"tau": rule["tau"], "protect": rule["protect"], "gate": gate, "over_head": over_head}
        oracle.assert_entry_mask(stats.mask, q, k, **arguments)
    elif drop in CONTROLS:
        key = oracle.key_mask(stats.column_mean, rule["beta"], rule["max_drop"], rule["protect"], over_head)
        noise = options["noise"].expand(b, h, m)
        want = oracle.control_mask(drop, noise, key, rule["max_drop"], rule["protect"])
        assert torch.equal(stats.mask, want if gate is None else want & gate.bool().unsqueeze(-1))
    soft = {"soft": 0.5, "gate": gate, "over_head": over_head} if drop == "soft" and n > 1 else {}
    bias = oracle.soft_bias(stats.column_mean, **soft) if soft else oracle.as_bias(stats.mask)
    oracle.assert_within_rounding(got, oracle.replay(q, k, v, grad, bias), q, k, v, grad, bias)


PEAK = """
import gc, sys, torch, fer_kernels
torch.set_num_threads(2)
which, drop = sys.argv[1:3]

def eager(q, k, v):
    p = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    c = p.mean(2)
    bias = torch.zeros_like(c).masked_fill(c > 1 / c.shape[-1] + c.std(-1, keepdim=True), -torch.inf)
    return (q @ k.mT * q.shape[-1] ** -0.5 + bias.unsqueeze(2)).softmax(-1) @ v

def step(n):
    q, k, v = (torch.randn(1, 6, n, 64, requires_grad=True) for _ in range(3))
    gc.collect()
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = peak_kib()
    out = eager(q, k, v) if which == "eager" else fer_kernels.jad_attention(q, k, v, drop=drop, backend="cpu")
    out.sum().backward()
    results = sum(t.nbytes for t in (out, q, k, v)) // 1024  # the output and three gradients
    return peak_kib() - before - results

def peak_kib():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

step(40)  # threads, code
print(step(3137))
"""


@pytest.mark.skipif(not compiled("jad"), reason="no compiled CPU kernel")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("drop", ["none", "key", "soft", "entry"])
def test_memory_is_a_small_part_of_eagers(drop):
    def peak(which):
        command = [sys.executable, "-c", PEAK, which, drop]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert peak("cpu") < peak("eager") / 20


# ---- torch's machinery ----


@every_backend
@every_mode
def test_opcheck(backend, drop):
    device = device_of(backend)
    q, k, v, _ = attention_inputs((2, 2, 9, 12, 8), device=device)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    noise = uniform_noise(2, 2, 12, device=device) if drop in CONTROLS else None
    gate = torch.tensor([[True, False], [True, True]], device=device)
    numbers = (MODES.index(drop), 1.0, 0.3, 1, 0.5, 0.3)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for given_gate, over_head, return_stats in [(None, False, False), (gate, True, True)]:
        arguments = (*leaves, given_gate, noise, *numbers, over_head, 0.35, return_stats, True)
        torch.library.opcheck(OPERATOR.registered[backend], arguments, test_utils=tests)
    with torch.no_grad():
        out, lse, _, bias, bits = OPERATOR.registered[backend](*arguments)
    arguments = (torch.ones_like(out), *leaves, out, lse, bias, bits, 0.35)
    torch.library.opcheck(op._BACKWARD[backend], arguments, test_utils=tests)


@every_backend
def test_opcheck_of_column_means(backend):
    device = device_of(backend)
    q, k, _, _ = attention_inputs((2, 2, 9, 12, 8), device=device)
    leaves = [t.requires_grad_() for t in (q, k)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op._COLUMN_MEAN[backend], (*leaves, 0.35), test_utils=tests)
    means, lse = op._COLUMN_MEAN[backend](q.detach(), k.detach(), 0.35)
    arguments = (torch.ones_like(means), *leaves, lse, 0.35)
    torch.library.opcheck(op._COLUMN_MEAN_BACKWARD[backend], arguments, test_utils=tests)


@every_backend
@every_mode
def test_compile_fullgraph_and_dynamic_sizes(backend, drop):
    device = device_of(backend)
    torch._dynamo.reset()

    def graph(q, k, v, gate, noise):
        options = {"noise": noise} if drop in CONTROLS else {}
        out, stats = jad_attention(
            q * 2, k, v, drop=drop, gate=gate, return_stats=True, backend=backend, **options
        )
        return out.relu(), stats.mask, attention_column_mean(q, k, backend=backend)

    compiled_graph = torch.compile(graph, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, n, m in [(2, 10, 14), (3, 12, 20), (5, 9, 33)]:
        q, k, v, grad = attention_inputs((batch, 2, n, m, 8), device=device)
        gate = torch.ones(batch, 2, device=device)
        gate[0] = 0
        noise = uniform_noise(batch, 2, m, device=device)
        results = []
        for call in (graph, compiled_graph):
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            found = call(*leaves, gate, noise)
            results.append((*found, *torch.autograd.grad(found[0], leaves, grad)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter process is for kernels")
def test_compile_with_inductor():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch._dynamo.reset()
    q, k, v, grad = attention_inputs((2, 2, 20, 24, 8), device=device)

    def graph(q, k, v):
        return jad_attention(q.relu(), k, v) + 1

    results = []
    for call in (graph, torch.compile(graph, fullgraph=True)):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = call(*leaves)
        results.append((out, *torch.autograd.grad(out, leaves, grad)))
    for mine, want in zip(*results, strict=True):
        torch.testing.assert_close(mine, want)


def test_noise_is_drawn_under_compile():
    torch._dynamo.reset()
    q, k, v, _ = attention_inputs((2, 2, 20, 60, 8))
    call = torch.compile(
        lambda q: jad_attention(q, k, v, drop="dropkey", return_stats=True)[1].mask,
        fullgraph=True,
        backend="aot_eager",
    )
    assert not torch.equal(call(q), call(q))


def test_compile_for_cuda_without_one():
    """What the front reads for CUDA tensors must be traceable too: fake tensors need no device."""
    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(2, 2, 20, 8, device="cuda")
        gate = torch.ones(2, 2, device="cuda")
        call = torch.compile(
            lambda q, gate: jad_attention(q, q, q, gate=gate, backend="reference"),
            fullgraph=True,
            backend="eager",
        )
        assert call(q, gate).shape == (2, 2, 20, 8)


@every_backend
@pytest.mark.parametrize("drop", ["key", "entry"])
def test_export(backend, drop):
    class Attend(torch.nn.Module):
        def forward(self, q, k):
            return jad_attention(q, k, k, drop=drop, backend=backend), attention_column_mean(
                q, k, backend=backend
            )

    device = device_of(backend)
    batch, keys = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("keys", min=2, max=512)
    q, k, _, _ = attention_inputs((2, 2, 12, 20, 8), device=device)
    program = torch.export.export(
        Attend(), (q, k), dynamic_shapes={"q": {0: batch}, "k": {0: batch, 2: keys}}
    )
    q, k, _, _ = attention_inputs((5, 2, 12, 33, 8), device=device)
    for mine, want in zip(program.module()(q, k), Attend()(q, k), strict=True):
        assert torch.equal(mine, want)


@every_backend
def test_autocast(backend):
    device = device_of(backend)
    q, k, v, grad = attention_inputs((1, 2, 20, 24, 16), device=device)
    half = [t.bfloat16() for t in (q, k, v)]
    want = [jad_attention(q, k, v, backend=backend), jad_attention(*half, backend=backend)]
    with torch.autocast(device, torch.bfloat16):
        leaves = [t.requires_grad_() for t in (q, k, v)]
        got = jad_attention(*leaves, backend=backend)
        assert torch.equal(got, want[0]) and got.dtype == torch.float32
        assert torch.equal(jad_attention(*half, backend=backend), want[1])
        projected = [t @ torch.eye(16, device=device) for t in leaves]
        out = jad_attention(*projected, backend=backend)
        assert out.dtype == torch.bfloat16
    gradients = torch.autograd.grad(out, leaves, grad.bfloat16())
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


@every_backend
def test_cuda_graph_capture(backend):
    if device_of(backend) != "cuda":
        pytest.skip("captures a CUDA graph")
    q, k, v, grad = attention_inputs((2, 2, 49, 49, 16), device="cuda")
    leaves = [t.requires_grad_() for t in (q, k, v)]
    gate = torch.ones(2, 2, device="cuda")

    def step():
        out = jad_attention(*leaves, gate=gate, backend=backend)
        return (out, *torch.autograd.grad(out, leaves, grad))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        q.copy_(normal(2, 2, 49, 16, seed=9, device="cuda"))
    graph.replay()
    assert all(torch.equal(mine, want) for mine, want in zip(captured, step(), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_mode
def test_reference_on_cuda(drop):
    q, k, v, grad = attention_inputs((2, 2, 20, 60, 16), torch.float64, "cuda")
    options = with_noise(drop, 2, 2, 60, "cuda", backend="reference")
    got, stats = forward_backward(q, k, v, grad, **options)
    bias = bias_of(stats, drop, **({"soft": 0.5} if drop == "soft" else {}))
    oracle.assert_within_rounding(got, oracle.replay(q, k, v, grad, bias), q, k, v, grad, bias)


# ---- bad input ----

Q, K = torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 7, 8)
NAN = float("nan")


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"q": [1.0]}, TypeError, "q must be a tensor, got list"),
        ({"q": Q.long()}, TypeError, "q must be float32, float64, bfloat16 or float16, got torch.int64"),
        ({"q": Q[0]}, ValueError, r"q must be \(B, H, N, D\), got 3-D \(3, 5, 8\)"),
        ({"v": K[0]}, ValueError, r"v must be \(B, H, M, D\), got 3-D \(3, 7, 8\)"),
        ({"k": K.to_sparse()}, TypeError, "k must be a dense tensor, got layout torch.sparse_coo"),
        (
            {"k": torch.zeros(2, 4, 7, 8)},
            ValueError,
            r"^jad_attention: k must be \(B, H, M, D\) with B = 2, H = 3 and D = 8 "
            r"\(q: \(2, 3, 5, 8\)\), got \(2, 4, 7, 8\)$",
        ),
        ({"k": torch.zeros(1, 3, 7, 8)}, ValueError, r"got \(1, 3, 7, 8\)"),
        ({"k": torch.zeros(2, 3, 7, 9)}, ValueError, r"and D = 8 .* got \(2, 3, 7, 9\)"),
        ({"v": torch.zeros(2, 3, 6, 8)}, ValueError, r"M = 7 and D = 8 .* got \(2, 3, 6, 8\)"),
        ({"v": torch.zeros(2, 3, 7, 16)}, ValueError, r"got \(2, 3, 7, 16\)"),
        ({"k": K.double()}, TypeError, "k must have q's dtype torch.float32, got torch.float64"),
        ({"v": K.bfloat16()}, TypeError, "v must have q's dtype torch.float32, got torch.bfloat16"),
        ({"k": K.to("meta")}, ValueError, "k is on meta and q on cpu"),
        ({"q": torch.zeros(2, 3, 0, 8)}, ValueError, "H, N and M must be at least 1"),
        ({"k": K[:, :, :0], "v": K[:, :, :0]}, ValueError, "H, N and M must be at least 1"),
        ({"q": Q[:, :0], "k": K[:, :0], "v": K[:, :0]}, ValueError, "H, N and M must be at least 1"),
        (
            {name: torch.zeros(1, 1, 2, 257) for name in "qkv"},
            ValueError,
            r"D must lie between 1 and 256, got q \(1, 1, 2, 257\)",
        ),
        ({name: torch.zeros(1, 1, 2, 0) for name in "qkv"}, ValueError, "D must lie between 1 and 256"),
        ({"drop": "keys"}, ValueError, "unknown drop 'keys': expected one of 'none', 'key', 'soft'"),
        ({"drop": None}, ValueError, "unknown drop None"),
        ({"joint_over": "batch"}, ValueError, "unknown joint_over 'batch': expected one of 'query', 'head'"),
        ({"beta": -0.1}, ValueError, "beta must be at least 0, got -0.1"),
        ({"beta": NAN}, ValueError, "beta must be at least 0, got nan"),
        ({"beta": "1"}, TypeError, r"beta must be a number, got '1' \(str\)"),
        ({"tau": -1}, ValueError, "tau must be at least 0, got -1"),
        ({"tau": NAN}, ValueError, "tau must be at least 0, got nan"),
        ({"max_drop": 1.0}, ValueError, r"max_drop must be in \[0, 1\), got 1.0"),
        ({"max_drop": -0.1}, ValueError, r"max_drop must be in \[0, 1\), got -0.1"),
        ({"max_drop": NAN}, ValueError, "max_drop must be in"),
        ({"max_drop": True}, TypeError, "max_drop must be a number, got True"),
        ({"soft": 1}, ValueError, r"soft must be in \[0, 1\), got 1"),
        ({"soft": -0.5}, ValueError, "soft must be in"),
        ({"soft": NAN}, ValueError, "soft must be in"),
        ({"protect": -1}, ValueError, "protect must be at least 0 and below the M = 7 keys, got -1"),
        ({"protect": 7}, ValueError, r"below the M = 7 keys, got 7 \(k: \(2, 3, 7, 8\)\)"),
        ({"protect": 1.0}, TypeError, r"protect must be an int, got 1.0 \(float\)"),
        ({"protect": True}, TypeError, "protect must be an int, got True"),
        ({"gate": torch.ones(2)}, ValueError, r"gate must be \(B, H\) = \(2, 3\), got \(2,\)"),
        ({"gate": torch.ones(3, 2)}, ValueError, r"gate must be \(B, H\) = \(2, 3\), got \(3, 2\)"),
        ({"gate": torch.ones(2, 3, 1)}, ValueError, r"got \(2, 3, 1\)"),
        ({"gate": torch.full((2, 3), 0.5)}, ValueError, "gate must hold 0 and 1 alone, got 0.5"),
        ({"gate": torch.full((2, 3), 2)}, ValueError, "gate must hold 0 and 1 alone, got 2"),
        ({"gate": torch.full((2, 3), -1)}, ValueError, "gate must hold 0 and 1 alone, got -1"),
        ({"gate": torch.full((2, 3), NAN)}, ValueError, "gate must hold 0 and 1 alone, got nan"),
        ({"gate": torch.ones(2, 3, dtype=torch.complex64)}, TypeError, "gate must be real"),
        ({"gate": [[1, 1, 1]]}, TypeError, "gate must be a tensor, got list"),
        ({"gate": torch.ones(2, 3, device="meta")}, ValueError, "gate is on meta and q on cpu"),
        ({"scale": NAN}, ValueError, "scale must be finite, got nan"),
        ({"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
        ({"scale": torch.tensor(1.0)}, TypeError, "scale must be a number"),
        ({"noise": torch.zeros(2, 3, 7)}, ValueError, "drop='key' takes no noise"),
        (
            {"drop": "random", "noise": torch.zeros(2, 1, 7)},
            ValueError,
            r"noise must be \(B, H, M\) = \(2, 3, 7\), got \(2, 1, 7\)",
        ),
        (
            {"drop": "dropkey", "noise": torch.zeros(2, 3, 7), "joint_over": "head"},
            ValueError,
            r"noise must be \(B, 1, M\) = \(2, 1, 7\), got \(2, 3, 7\)",
        ),
        (
            {"drop": "random", "noise": torch.zeros(2, 3, 7, dtype=torch.float64)},
            TypeError,
            "noise must be float32, got torch.float64",
        ),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator, got int"),
        ({"return_stats": 1}, TypeError, "return_stats must be a bool, got 1"),
        (
            {"backend": "tpu"},
            ValueError,
            "unknown backend 'tpu': expected 'auto' or one of 'reference', 'cpu'",
        ),
        ({"q": torch.nested.nested_tensor([torch.ones(3, 2)])}, TypeError, "got a nested one"),
    ],
)
def test_bad_input(arguments, error, words):
    call = {"q": Q, "k": K, "v": K} | arguments
    with pytest.raises(error, match=words):
        jad_attention(call.pop("q"), call.pop("k"), call.pop("v"), **call)


def test_protect_matters_only_where_something_drops():
    out = jad_attention(Q, K[:, :, :1], K[:, :, :1], drop="none")
    assert out.shape == Q.shape
    with pytest.raises(ValueError, match="below the M = 1 keys, got 1"):
        jad_attention(Q, K[:, :, :1], K[:, :, :1])


@pytest.mark.parametrize(
    "q, k, error, words",
    [
        (
            Q,
            K[:, :2],
            ValueError,
            r"^attention_column_mean: k must be \(B, H, M, D\) with B = 2, H = 3 and D = 8",
        ),
        (Q, K.half(), TypeError, "k must have q's dtype"),
        (Q, K[:, :, :0], ValueError, "must be at least 1"),
        (Q, None, TypeError, "k must be a tensor, got NoneType"),
    ],
)
def test_bad_input_of_column_means(q, k, error, words):
    with pytest.raises(error, match=words):
        attention_column_mean(q, k)


@pytest.mark.parametrize("backend", [b for b in ("reference", "cpu") if b in backends("jad")])
def test_bad_direct_calls_reach_no_memory(backend):
    """torch.ops skips the Python checks; compiled code must stay inside its memory."""
    if backend == "cpu":
        noise = torch.zeros(2, 3, 7)
        for mode, protect, max_drop in [("random", -1, 0.3), ("dropkey", -1, 0.3), ("key", 1, NAN)]:
            numbers = (MODES.index(mode), 1.0, max_drop, protect, 0.5, 0.3, False, 0.3, False, True)
            with pytest.raises(RuntimeError, match="max_drop" if max_drop != max_drop else "protect"):
                OPERATOR.registered[backend](Q, K, K, None, noise, *numbers)
    numbers = (MODES.index("key"), 1.0, 0.3, 1, 0.5, 0.3, False, 0.3, False, True)
    for q, k, v, gate in [
        (Q, K[:, :2], K, None),
        (Q, K, K[:, :, :3], None),
        (Q, K[..., :4], K, None),
        (Q, K, K, torch.ones(2, 2, dtype=torch.bool)),
    ]:
        with pytest.raises((RuntimeError, IndexError, ValueError)):
            OPERATOR.registered[backend](q, k, v, gate, None, *numbers)


def test_use_backend():
    with fer_kernels.use_backend("reference"):
        assert torch.equal(jad_attention(Q, K, K), jad_attention(Q, K, K, backend="reference"))
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="jad: backend 'cuda' cannot take this call"):
            jad_attention(Q, K, K, backend="cuda")
        with pytest.raises(RuntimeError, match="jad: backend 'cuda' cannot take this call"):
            attention_column_mean(Q, K, backend="cuda")
    chosen = OPERATOR.choose("auto", Q)
    assert chosen is OPERATOR.registered["cpu" if "cpu" in backends("jad") else "reference"]
