"""relation: one set of cases for every backend that can run here."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from relation_oracle import (
    LEAVES,
    Answer,
    Problem,
    assert_answer,
    assert_exact,
    gradients,
    reverse,
    solve,
)
from support import backends, device_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fer_kernels
from fer_kernels import dispatch, relation_aggregate, reverse_graph
from fer_kernels.relation.op import OPERATOR

INTERPRETED = dispatch.TRITON_INTERPRETED
MODES = ("mr", "rmr", "rsum")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
every_backend = pytest.mark.parametrize("backend", backends("relation"))
every_mode = pytest.mark.parametrize("mode", MODES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
needs_cpu = pytest.mark.skipif("cpu" not in backends("relation"), reason="no compiled CPU module")


def slow_when_interpreted(backend: str) -> bool:
    return backend == "triton" and INTERPRETED


def skip_untaken(backend: str, dtype: torch.dtype) -> None:
    if dtype not in OPERATOR.dtypes[backend]:
        pytest.skip(f"{backend} does not take {dtype}")


def operator(backend: str, suffix: str = ""):
    """The torch operator that a backend's forward, "_backward" or "_reverse" is registered as."""
    variant = {"reference": "_reference", "triton": "_triton"}.get(backend, "")
    return getattr(torch.ops.fer_kernels, f"relation{suffix}{variant}").default


def integers(*shape: int, high: int = 3, seed: int = 0) -> torch.Tensor:
    """Small integers: every product and sum is exact, and ties abound."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-high, high + 1, shape, generator=generator).float()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def problem(
    shape: tuple, mode: str, dtype=torch.float32, *, weights=False, make=normal, slope=0.2, seed=0
) -> Problem:
    """Neighbours drawn with replacement; `shape` is B, N, M, C, R, H, k, M None for the centres as keys."""
    b, n, m, c, r, h, k = shape
    keys = n if m is None else m
    generator = torch.Generator().manual_seed(seed + 99)
    made = Problem(
        x=make(b, n, c, seed=seed),
        idx=torch.randint(0, max(keys, 1), (b, n, k), generator=generator),
        y=None if m is None else make(b, m, c, seed=seed + 1),
        mode=mode,
        slope=slope,
        grad=make(b, n, c, seed=seed + 2),
    )
    if mode != "mr":
        made.p, made.q = make(b, n, r, seed=seed + 3), make(b, keys, r, seed=seed + 4)
        made.a = make(h, r // h, seed=seed + 5)
        made.grad_weights = make(b, n, k, h, seed=seed + 6) if weights else None
    return made.map(lambda t: t.to(dtype))


def to_device(made: Problem, backend: str) -> Problem:
    device = device_of(backend)
    return replace(made.map(lambda t: t.to(device)), idx=made.idx.to(device))


def aggregate(backend: str, made: Problem, leaves: dict | None = None, **more):
    """The public function on a problem's tensors, or on `leaves` in their place."""
    tensors = {name: getattr(made, name) for name in LEAVES} | (leaves or {})
    return relation_aggregate(
        tensors.pop("x"),
        made.idx,
        tensors.pop("y"),
        **tensors,
        **{"mode": made.mode, "negative_slope": made.slope, "backend": backend} | more,
    )


def answer_of(backend: str, made: Problem, order=1, reversed_graph=None, public=True) -> Answer:
    """The registered operator's outputs and gradients, and the slots that those gradients went to."""
    made = to_device(made, backend)
    leaves = made.leaves()
    weighted = made.grad_weights is not None
    out, weights, slots = OPERATOR.registered[backend](
        *(leaves["x"], made.idx, leaves.get("y"), leaves.get("p"), leaves.get("q"), leaves.get("a")),
        *(reversed_graph, MODES.index(made.mode), made.slope, weighted, made.mode != "rsum"),
    )
    answer = {"out": out.detach()}
    if weighted:
        answer["weights"] = weights.detach()
    if made.mode != "rsum":
        answer["slots"] = slots
    answer |= gradients(made, out, weights if weighted else None, leaves, order)
    if public:
        result = aggregate(backend, made, leaves, return_weights=weighted)
        assert same(result[0] if weighted else result, out), "the public function answers otherwise"
    return answer


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal, NaN with NaN."""
    return (
        one.dtype == other.dtype
        and torch.equal(one.isnan(), other.isnan())
        and torch.equal(one.nan_to_num(nan=0.0), other.nan_to_num(nan=0.0))
    )


def assert_same_answer(one: Answer, other: Answer) -> None:
    assert set(one) == set(other)
    for name in one:
        assert same(one[name], other[name]), f"{name} differs"


# ---- exact agreement on integers ----

EXACT = [  # B, N, M, C, R, H, k; M None: the keys are the centres
    (2, 7, None, 3, 0, 1, 1),
    (1, 1, None, 1, 0, 1, 1),
    (2, 49, None, 16, 0, 1, 9),
    (2, 30, 49, 17, 0, 1, 9),
    (1, 20, 130, 40, 0, 1, 18),
    (1, 9, 12, 5, 0, 1, 128),
    (3, 5, 40, 33, 0, 1, 64),
    (1, 40, 2, 70, 0, 1, 17),
]
EXACT_LARGE = [
    (2, 196, None, 96, 0, 1, 9),
    (1, 400, 196, 48, 0, 1, 18),
    (1, 50, 1000, 320, 0, 1, 9),
    (5, 33, 65, 1, 0, 1, 128),
]


@pytest.mark.sanitize
@every_backend
@every_dtype
@pytest.mark.parametrize("shape", EXACT, ids=str)
def test_mr_exact_on_integers(backend, dtype, shape):
    skip_untaken(backend, dtype)
    made = problem(shape, "mr", dtype, make=integers)
    assert_exact(made, answer_of(backend, made))


@every_backend
@pytest.mark.parametrize("shape", EXACT_LARGE, ids=str)
def test_mr_exact_on_integers_large(backend, shape):
    if slow_when_interpreted(backend):
        pytest.skip("too slow interpreted")
    want = solve(problem(shape, "mr", make=integers))
    for dtype in OPERATOR.dtypes[backend]:
        made = problem(shape, "mr", dtype, make=integers)
        assert_exact(made, answer_of(backend, made), want)


@pytest.mark.sanitize
@every_backend
def test_ties_send_the_gradient_to_the_first_slot(backend):
    """Every neighbour is the same: slot 0 takes all, and its key all of the gradient."""
    made = problem((1, 5, 9, 6, 0, 1, 17), "mr", make=integers)
    made.y = made.y[:, :1].expand(1, 9, 6).contiguous()
    made.idx = torch.arange(17).remainder(9).expand(1, 5, 17).contiguous() + torch.arange(5).view(1, 5, 1)
    made.idx = made.idx.remainder(9)
    answer = answer_of(backend, made)
    assert (answer["slots"] == 0).all()
    wanted = torch.zeros(1, 9, 6)
    wanted[:, :5] = made.grad
    assert torch.equal(answer["y"].cpu(), wanted) and torch.equal(answer["x"].cpu(), -made.grad)


WEIGHTED = [  # B, N, M, C, width of a head, H, pairs of neighbours
    (2, 9, 14, 8, 3, 1, 4),
    (1, 11, 20, 12, 4, 3, 3),
    (1, 6, None, 16, 3, 16, 2),
    (2, 5, 8, 6, 4, 2, 1),
]


def weighted_integers(shape: tuple, mode: str, dtype: torch.dtype, weights: bool) -> Problem:
    """A call whose weights are exactly 0 and 1/2, in float32 and float64, so that only results are rounded.

    The keys are pairs of equal score, and scores of different pairs lie so far apart that all but the
    highest vanish. A pair scores the same by different relations, so that p, q and a get gradients.
    """
    b, n, m, c, width, h, pairs = shape
    keys = n if m is None else m
    made = problem((b, n, m, c, width * h, h, 2 * pairs), mode, weights=weights, make=integers, slope=0.5)
    generator = torch.Generator().manual_seed(4)
    half = torch.rand(b, n, keys // 2, generator=generator).argsort(-1)[..., :pairs]
    made.idx = torch.cat([2 * half + 1, 2 * half.flip(-1)], -1)
    p, q = (t.clamp(-1, 1).unflatten(-1, (h, width)) for t in (made.p, made.q))
    # The first relation channel of a head ranks the pairs, the others shift scores by less than its step;
    # of those, the first two are exchanged within a pair.
    rank = torch.rand(b, keys // 2, h, generator=generator).argsort(1).float()
    q = q[:, ::2].repeat_interleave(2, 1)
    q[:, 1::2, :, 1], q[:, 1::2, :, 2] = q[:, ::2, :, 2].clone(), q[:, ::2, :, 1].clone()
    q[..., 0] = 2 * rank.repeat_interleave(2, 1) - keys // 2
    p[..., 2] = p[..., 1]
    made.p, made.q = p.flatten(2), q.flatten(2)
    made.a = 1024 * made.a.clamp(-1, 1)
    made.a[:, 0], made.a[:, 1:3] = 16384, -1024
    return made.map(lambda t: t.to(dtype))


@pytest.mark.sanitize
@every_backend
@every_dtype
@pytest.mark.parametrize("mode", ["rmr", "rsum"])
def test_weighted_exact_on_integers(backend, dtype, mode):
    skip_untaken(backend, dtype)
    for shape, weights in itertools.product(WEIGHTED, (False, True)):
        made = weighted_integers(shape, mode, dtype, weights)
        answer = answer_of(backend, made)
        assert_exact(made, answer)
        assert all(answer[name].any() for name in ("p", "q", "a")), "a test of nothing"


@every_backend
@every_dtype
def test_rmr_of_equal_scores_is_mr(backend, dtype):
    skip_untaken(backend, dtype)
    every = (1, 3, 9) if slow_when_interpreted(backend) else range(1, 129)
    for shape in [*((1, 2, 13, 3, 3, 1, k) for k in every), (1, 7, None, 32, 16, 16, 9)]:
        made = to_device(problem(shape, "rmr", dtype), backend)
        made.a = torch.zeros_like(made.a)
        out, weights = aggregate(backend, made, return_weights=True)
        plain = replace(made, p=None, q=None, a=None, mode="mr")
        assert torch.equal(out, aggregate(backend, plain))
        assert torch.equal(weights, torch.full_like(weights, 1 / shape[-1]))


@every_backend
@every_dtype
def test_mr_is_plain_pytorch_bit_for_bit(backend, dtype):
    """Rounding is monotone: the maximum of rounded differences is the rounded largest difference."""
    skip_untaken(backend, dtype)
    shapes = [(2, 30, 17, 24, 0, 1, 9), (1, 20, None, 7, 0, 1, 18)]
    if not slow_when_interpreted(backend):
        shapes += [(2, 196, None, 192, 0, 1, 9), (2, 130, 61, 33, 0, 1, 64)]
    for shape in shapes:
        made = to_device(problem(shape, "mr", dtype), backend)
        keys = made.x if made.y is None else made.y
        index = made.idx.flatten(1).unsqueeze(-1).expand(-1, -1, keys.shape[2])
        edges = keys.gather(1, index).unflatten(1, made.idx.shape[1:])
        assert torch.equal(aggregate(backend, made), (edges - made.x.unsqueeze(2)).amax(2))


# ---- real values ----

REAL = [
    (2, 49, None, 48, 24, 4, 9),
    (1, 50, 33, 21, 6, 3, 9),
    (1, 37, 61, 80, 48, 16, 18),
    (2, 23, 70, 7, 5, 1, 64),
    (1, 19, 150, 33, 9, 3, 128),
    (3, 41, 10, 16, 4, 4, 1),
    (1, 31, 5, 13, 7, 1, 9),
]
REAL_SMALL = [(1, 9, 6, 12, 9, 3, 5), (1, 5, None, 16, 16, 16, 9)]
REAL_MEDIUM = [(1, 196, None, 96, 24, 4, 9), (1, 200, 90, 40, 16, 1, 18)]


@every_backend
@every_mode
@every_dtype
def test_real_values(backend, mode, dtype):
    skip_untaken(backend, dtype)
    shapes = REAL_SMALL if slow_when_interpreted(backend) else REAL
    for number, shape in enumerate(shapes):
        made = problem(shape, mode, dtype, weights=number % 2 == 0)
        assert_answer(made, answer_of(backend, made))


@every_backend
@every_mode
@pytest.mark.parametrize("shape", REAL_MEDIUM, ids=str)
def test_real_values_medium(backend, mode, shape):
    if slow_when_interpreted(backend):
        pytest.skip("too slow interpreted")
    for dtype in (torch.float32, torch.bfloat16):
        made = problem(shape, mode, dtype, weights=mode == "rmr")
        assert_answer(made, answer_of(backend, made))


@every_backend
@pytest.mark.parametrize("slope", [0.0, -0.5, 1.0, 1.7, 0.01])
def test_slopes(backend, slope):
    for mode in ("rmr", "rsum"):
        made = problem((1, 8, 11, 6, 4, 2, 7), mode, weights=True, slope=slope)
        assert_answer(made, answer_of(backend, made))


@every_backend
def test_steep_scores(backend):
    """Scores in the hundreds: weights of 1, and of 0 where float32 holds no less."""
    for mode, scale in itertools.product(("rmr", "rsum"), (30.0, 1000.0)):
        made = problem((1, 12, 20, 8, 6, 2, 9), mode, weights=True)
        made.a = made.a * scale
        assert_answer(made, answer_of(backend, made))


@every_backend
@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_scale_of_features(backend, scale):
    for mode in MODES:
        made = problem((1, 8, 11, 6, 4, 2, 7), mode)
        made.x, made.y = made.x * scale, made.y * scale
        assert_answer(made, answer_of(backend, made))


# ---- NaN and infinity ----


@pytest.mark.sanitize
@every_backend
@every_mode
def test_nan_in_features_wins_the_maximum(backend, mode):
    made = problem((1, 8, 10, 6, 4, 2, 5), mode)
    made.x[0, 2, 3] = torch.nan
    made.y[0, 7, 1] = torch.nan
    got = aggregate(backend, to_device(made, backend)).cpu()
    delta = made.y[0][made.idx[0]] - made.x[0].unsqueeze(1)
    wanted = delta.amax(1).isnan()
    assert wanted[2, 3] and wanted[:, 1].any() and not wanted[:, 1].all()
    assert torch.equal(got[0].isnan(), wanted)
    assert_answer(made, answer_of(backend, made))


@every_backend
def test_the_first_of_several_nans_is_the_winner(backend):
    made = problem((1, 3, 12, 5, 0, 1, 12), "mr")
    made.idx = torch.arange(12).expand(1, 3, 12).contiguous()
    made.y[0, [4, 5, 9, 11]] = torch.nan
    answer = answer_of(backend, made)
    assert (answer["slots"] == 4).all() and answer["out"].isnan().all()
    assert torch.equal(answer["y"][0, 4].cpu(), made.grad[0, 0] + made.grad[0, 1] + made.grad[0, 2])
    assert not answer["y"].cpu()[0, [5, 9, 11]].any()


@pytest.mark.sanitize
@every_backend
@pytest.mark.parametrize("mode", ["rmr", "rsum"])
def test_nan_in_scores_spreads_through_its_head(backend, mode):
    made = problem((1, 8, 10, 6, 4, 2, 5), mode, weights=True)
    made.p[0, 2, 0] = torch.nan  # node 2, head 0
    made.q[0, 7, 3] = torch.nan  # key 7, head 1
    answer = answer_of(backend, made)
    wanted = torch.zeros(8, 2, dtype=torch.bool)
    wanted[2, 0] = True
    wanted[:, 1] = (made.idx[0] == 7).any(1)
    assert wanted[:, 1].any() and not wanted.all()
    assert torch.equal(answer["out"][0].isnan().cpu(), wanted.repeat_interleave(3, 1))
    assert torch.equal(answer["weights"][0].isnan().cpu(), wanted.unsqueeze(1).expand(8, 5, 2))
    assert_answer(made, answer)


@every_backend
@pytest.mark.parametrize("mode", ["rmr", "rsum"])
def test_scores_of_minus_infinity(backend, mode):
    """All of a row: NaN. Some of them: weights of zero."""
    made = problem((1, 6, 9, 6, 1, 1, 4), mode, weights=True, slope=1.0)
    made.a = torch.ones(1, 1)
    made.idx = torch.tensor([[0, 1, 2, 3]] * 6).unsqueeze(0)
    made.q[0, [1, 3]] = -torch.inf
    made.p[0, 5] = -torch.inf
    answer = answer_of(backend, made)
    weights = answer["weights"][0].cpu().squeeze(-1)
    assert weights[5].isnan().all() and answer["out"][0, 5].isnan().all()
    assert (weights[:5, [1, 3]] == 0).all() and torch.allclose(weights[:5].sum(1), torch.ones(5))
    assert not answer["out"][0, :5].isnan().any()
    made.q[0, :4] = -torch.inf
    assert answer_of(backend, made)["out"].isnan().all()


@every_backend
def test_infinities_follow_ieee(backend):
    """Forward only, against the formulas in float64: inf - inf, 0 * inf, max(NaN, inf), exp(inf - inf)."""
    for mode, name in itertools.product(MODES, ("x", "y", "p", "q", "a")):
        made = problem((1, 14, 12, 6, 4, 2, 5), mode, weights=True)
        tensor = getattr(made, name)
        if tensor is None:
            continue
        for sign in (1, -1):
            spoiled = tensor.clone()
            spoiled.view(-1)[1 :: 3 if name == "a" else 13] = sign * torch.inf
            one = replace(made, **{name: spoiled})
            moved = to_device(one, backend)
            weighted = mode != "mr"
            got = aggregate(backend, moved, return_weights=weighted)
            want = solve(replace(one, grad=None))
            for key, value in zip(("out", "weights"), got if weighted else (got,), strict=weighted):
                value, true = value.cpu().double(), want[key]
                assert torch.equal(value.isnan(), true.isnan()), (mode, name, sign, key)
                assert torch.equal(value.isinf(), true.isinf()), (mode, name, sign, key)
                assert torch.allclose(value, true, rtol=1e-4, atol=1e-5, equal_nan=True)
    x = torch.tensor([[[0.0, 0.0, torch.inf, 1.0]]], device=device_of(backend))
    y = torch.tensor(
        [[[torch.inf, -torch.inf, torch.inf, -torch.inf], [1.0, -torch.inf, 0.0, torch.nan]]],
        device=device_of(backend),
    )
    out = relation_aggregate(x, torch.tensor([[[0, 1]]], device=x.device), y, mode="mr", backend=backend)
    assert out[0, 0, 0] == torch.inf and out[0, 0, 1] == -torch.inf
    assert out[0, 0, 2].isnan() and out[0, 0, 3].isnan()


# ---- anything ----


@needs_cpu
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_cpu_is_right_on_anything(data):
    draw = data.draw
    mode = draw(st.sampled_from(MODES), "mode")
    dtype = draw(st.sampled_from(DTYPES), "dtype")
    heads, width = draw(st.sampled_from([1, 2, 3, 4, 16]), "heads"), draw(st.integers(0, 9), "width")
    shape = (
        draw(st.integers(1, 3), "batch"),
        draw(st.integers(1, 24), "nodes"),
        draw(st.one_of(st.none(), st.integers(1, 40)), "keys"),
        heads * draw(st.integers(1, 70 // heads), "channels of a head"),
        heads * width,
        heads,
        draw(st.one_of(st.integers(1, 20), st.integers(1, 128)), "k"),
    )
    slope = draw(st.sampled_from([0.2, 0.0, 1.0, -0.3, 1.5]), "slope")
    seed = draw(st.integers(0, 2**31), "seed")
    made = problem(shape, mode, dtype, weights=draw(st.booleans(), "weights"), slope=slope, seed=seed)
    if mode != "mr":
        made.a = made.a * draw(st.sampled_from([1, 0, 4]), "scale of a")
    name = draw(st.sampled_from([None, None, *LEAVES]), "where NaN is")
    if name is not None and getattr(made, name) is not None:
        tensor = getattr(made, name)
        generator = torch.Generator().manual_seed(seed)
        tensor[torch.rand(tensor.shape, generator=generator) < 0.02] = torch.nan
    assert_answer(made, answer_of("cpu", made), proved=True)


# ---- autograd ----


@pytest.mark.parametrize("backend", [b for b in backends("relation") if b in ("reference", "cpu")])
@every_mode
def test_gradcheck(backend, mode):
    """In float64; gradgradcheck differentiates the backward formulas once more."""
    for shape, weights in itertools.product([(2, 2, 3, 4, 4, 2, 2), (1, 3, None, 2, 1, 1, 3)], (False, True)):
        if mode == "mr" and weights:
            continue
        made = problem(shape, mode, torch.float64)
        leaves = made.leaves()

        def call(*tensors, made=made, names=tuple(leaves), weights=weights):
            return aggregate(backend, made, dict(zip(names, tensors, strict=True)), return_weights=weights)

        assert torch.autograd.gradcheck(call, tuple(leaves.values()))
        assert torch.autograd.gradgradcheck(call, tuple(leaves.values()))


@every_backend
@every_mode
def test_second_derivatives_in_float32(backend, mode):
    shapes = [(1, 5, 6, 4, 4, 2, 3)] if slow_when_interpreted(backend) else [(2, 9, 7, 6, 4, 2, 5)]
    for shape, weights in itertools.product(shapes, (False, True)):
        made = problem(shape, mode, weights=weights)
        assert_answer(made, answer_of(backend, made, order=2), order=2)


@every_backend
@every_mode
def test_gradient_through_the_weights_alone(backend, mode):
    if mode == "mr":
        pytest.skip("has no weights")
    made = problem((2, 9, 7, 6, 4, 2, 5), mode, weights=True)
    with_zeros = answer_of(backend, replace(made, grad=torch.zeros_like(made.grad)))
    moved = to_device(made, backend)
    leaves = moved.leaves()
    out, weights = aggregate(backend, moved, leaves, return_weights=True)
    found = torch.autograd.grad(weights, list(leaves.values()), moved.grad_weights, retain_graph=True)
    for name, gradient in zip(leaves, found, strict=True):
        assert torch.equal(gradient, with_zeros[name])
        assert gradient.any() == (name not in ("x", "y"))
    # Weights that are returned and not used change no gradient.
    unused = torch.autograd.grad(out, list(leaves.values()), moved.grad)
    alone = answer_of(backend, replace(made, grad_weights=None))
    for name, gradient in zip(leaves, unused, strict=True):
        assert torch.equal(gradient, alone[name])


class Calls(TorchDispatchMode):
    """Records this package's operators as they are called."""

    def __enter__(self):
        self.seen = []
        super().__enter__()
        return self.seen

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fer_kernels":
            self.seen.append((function._schema, args))
        return function(*args, **(kwargs or {}))


def argument(call, name: str):
    schema, args = call
    return args[[a.name for a in schema.arguments].index(name)]


@every_backend
@every_mode
def test_only_wanted_gradients_are_computed(backend, mode):
    made = problem((2, 7, 6, 4, 4, 2, 5), mode, weights=True)
    full = answer_of(backend, made)
    moved = to_device(made, backend)
    names = [name for name in LEAVES if getattr(made, name) is not None]
    subsets = [s for n in range(1, len(names) + 1) for s in itertools.combinations(names, n)]
    if slow_when_interpreted(backend):
        subsets = subsets[: len(names)]
    for wanted in subsets:
        leaves = moved.leaves()
        for name in set(leaves) - set(wanted):
            leaves[name].requires_grad_(False)
        outputs = aggregate(backend, moved, leaves, return_weights=mode != "mr")
        outputs = (outputs,) if mode == "mr" else outputs
        with Calls() as calls:
            torch.autograd.backward(
                *zip(
                    *[
                        (o, g)
                        for o, g in zip(outputs, (moved.grad, moved.grad_weights), strict=False)
                        if o.requires_grad
                    ],
                    strict=True,
                )
            )
        for name, leaf in leaves.items():
            if name in wanted:
                assert torch.equal(leaf.grad, full[name]), (wanted, name)
            else:
                assert leaf.grad is None
        call = next(c for c in calls if c[0].name.startswith("fer_kernels::relation_backward"))
        assert argument(call, "need_nodes") == bool({"x", "y"} & set(wanted))
        assert argument(call, "need_relation") == bool({"p", "q", "a"} & set(wanted))


@every_backend
@every_mode
def test_inference_asks_for_no_slots(backend, mode):
    made = to_device(problem((1, 7, 6, 4, 4, 2, 5), mode), backend)
    leaves = made.leaves()
    plain = {name: t.detach() for name, t in leaves.items()}
    with Calls() as calls:
        trained = aggregate(backend, made, leaves)
        with torch.no_grad():
            quiet = aggregate(backend, made, leaves)
        still = aggregate(backend, made, plain)
    asked = [argument(c, "save_slots") for c in calls if argument(c, "save_slots") is not None]
    assert asked == [mode != "rsum", False, False]
    assert trained.requires_grad and not quiet.requires_grad and not still.requires_grad
    assert torch.equal(trained, quiet) and torch.equal(trained, still)


def saved_by(backend: str, made: Problem, trained: tuple[str, ...], **more) -> list[torch.Tensor]:
    saved: list[torch.Tensor] = []
    leaves = made.leaves()
    for name in set(leaves) - set(trained):
        leaves[name].requires_grad_(False)

    def keep(tensor):
        if not any(tensor.data_ptr() == other.data_ptr() for other in saved):
            saved.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = aggregate(backend, made, leaves, **more)
    named = {t.data_ptr(): name for name, t in leaves.items()} | {made.idx.data_ptr(): "idx"}
    kept = sorted(
        named.get(t.data_ptr(), f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}") for t in saved
    )
    del result
    return kept


@every_backend
def test_what_is_kept_for_backward(backend):
    b, n, m, c = 2, 7, 6, 4
    shape = (b, n, m, c, 4, 2, 5)
    slots = f"uint8 {(b, n, c)}"
    everything = ("x", "y", "p", "q", "a")
    mr = to_device(problem(shape, "mr"), backend)
    assert saved_by(backend, mr, ("x", "y")) == ["idx", slots]
    assert saved_by(backend, mr, ("y",)) == ["idx", slots]
    own = replace(mr, y=None, idx=mr.idx.clamp_max(n - 1))
    assert saved_by(backend, own, ("x",)) == ["idx", slots]
    for weights in (False, True):
        rmr = to_device(problem(shape, "rmr"), backend)
        assert saved_by(backend, rmr, everything, return_weights=weights) == sorted(
            ["idx", slots, "x", "y", "p", "q", "a"]
        )
        assert saved_by(backend, rmr, ("x", "y"), return_weights=weights) == sorted(
            ["idx", slots, "p", "q", "a"]
        )
        rsum = replace(rmr, mode="rsum")
        assert saved_by(backend, rsum, everything, return_weights=weights) == sorted(
            ["idx", "x", "y", "p", "q", "a"]
        )
        assert saved_by(backend, rsum, ("x", "y"), return_weights=weights) == sorted(["idx", "p", "q", "a"])
    for made in (mr, rmr, rsum):
        with torch.no_grad():
            assert saved_by(backend, made, everything) == []
        assert saved_by(backend, made, ()) == []


@every_backend
def test_backward_without_slots_says_so(backend):
    x = normal(1, 4, 3).to(device_of(backend)).requires_grad_()
    idx = torch.zeros(1, 4, 2, dtype=torch.int64, device=x.device)
    out, _, slots = operator(backend)(x, idx, None, None, None, None, None, 0, 0.2, False, False)
    assert slots.numel() == 0
    with pytest.raises(RuntimeError, match="save_slots=False, which is for calls without a backward"):
        out.sum().backward()


@every_backend
@every_mode
def test_incoming_gradients_of_any_layout(backend, mode):
    made = to_device(problem((2, 8, 6, 4, 4, 2, 5), mode), backend)
    leaves = made.leaves()
    weighted = mode != "mr"

    def backward(grad, grad_weights):
        result = aggregate(backend, made, leaves, return_weights=weighted)
        outputs, incoming = (result, (grad, grad_weights)) if weighted else ((result,), (grad,))
        return torch.autograd.grad(outputs, list(leaves.values()), incoming, allow_unused=True)

    weight_shape = (2, 8, 5, 2)
    device = made.x.device
    layouts = [
        (torch.ones((), device=device).expand(2, 8, 4), torch.ones((), device=device).expand(weight_shape)),
        (normal(2, 4, 8).to(device).mT, normal(2, 8, 2, 5).to(device).mT),
        (normal(2, 8, 9).to(device)[..., 1::2], normal(2, 16, 5, 2).to(device)[:, ::2]),
        (normal(8, 4).to(device).expand(2, 8, 4), normal(2, 1, 5, 1).to(device).expand(weight_shape)),
    ]
    for grad, grad_weights in layouts:
        got, want = backward(grad, grad_weights), backward(grad.contiguous(), grad_weights.contiguous())
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one, other)
    out = aggregate(backend, made, leaves)
    out.sum().backward()
    ones = torch.autograd.grad(aggregate(backend, made, leaves), list(leaves.values()), torch.ones_like(out))
    for leaf, gradient in zip(leaves.values(), ones, strict=True):
        assert torch.equal(leaf.grad, gradient)


# ---- the same bits every time ----


@every_backend
@every_mode
def test_repeats_are_bitwise_equal(backend, mode, two_threads):
    shape = (1, 6, 5, 6, 4, 2, 3) if slow_when_interpreted(backend) else (2, 31, 17, 24, 12, 4, 5)
    made = problem(shape, mode, weights=True)
    first = answer_of(backend, made)
    if slow_when_interpreted(backend):
        assert_same_answer(answer_of(backend, made), first)
        return
    for repeat in range(200):
        if repeat % 50 == 0:
            torch.set_num_threads((1, 2, 4, 3)[repeat // 50])
        assert_same_answer(answer_of(backend, made, public=False), first)


UNEVEN = [  # as batches, nodes, keys and edges that no number of threads divides
    (3, 257, 61, 21, 9, 3, 9),
    (1, 1031, 40, 32, 8, 1, 5),
    (5, 7, 130, 48, 16, 16, 18),
    (1, 3, 700, 5, 3, 1, 128),
    (7, 99, None, 17, 6, 1, 4),
    (2, 1500, 3, 16, 16, 2, 9),
]


@every_backend
@pytest.mark.parametrize("shape", UNEVEN, ids=str)
def test_any_number_of_threads(backend, shape, two_threads):
    if device_of(backend) == "cuda" or slow_when_interpreted(backend):
        pytest.skip("runs no threads")
    dtypes = (torch.float32,) if backend == "reference" else (torch.float32, torch.bfloat16)
    for mode, dtype in itertools.product(MODES, dtypes):
        made = problem(shape, mode, dtype, weights=True)
        answers = []
        for threads in (1, 2, 4, 3):
            torch.set_num_threads(threads)
            answers.append(answer_of(backend, made))
        for other in answers[1:]:
            assert_same_answer(answers[0], other)


@every_backend
@every_mode
def test_samples_do_not_touch_each_other(backend, mode):
    """A batch is its samples, bit for bit; only a's gradient is joint."""
    made = problem((3, 9, 7, 6, 4, 2, 5), mode, weights=True)
    whole = answer_of(backend, made)
    for b in range(3):
        one = replace(made.map(lambda t, b=b: t[b : b + 1] if t.dim() > 2 else t), idx=made.idx[b : b + 1])
        for name, value in answer_of(backend, one).items():
            if name != "a":
                assert torch.equal(value, whole[name][b : b + 1]), name


# ---- the compiled CPU code ----


@needs_cpu
def test_cpu_is_compiled_code():
    """Without a kernel of its own the operator falls back to the reference, and `cpu` would test that."""
    for suffix in ("", "_backward", "_reverse"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fer_kernels::relation{suffix}", "CPU"), suffix
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("fer_kernels::relation_reference", "CPU")


def test_instruction_sets_agree(cpu_isas, two_threads):
    for isa in cpu_isas.supported_isas():
        cpu_isas.set_isa(isa)
        for dtype in DTYPES:
            for shape in EXACT[2:6]:
                made = problem(shape, "mr", dtype, make=integers)
                assert_exact(made, answer_of("cpu", made))
            for shape, mode in itertools.product(WEIGHTED, ("rmr", "rsum")):
                made = weighted_integers(shape, mode, dtype, True)
                assert_exact(made, answer_of("cpu", made))
            for shape, mode in itertools.product((REAL[1], REAL[3])[: 2 if dtype == DTYPES[0] else 1], MODES):
                made = problem(shape, mode, dtype, weights=True)
                answer = answer_of("cpu", made)
                assert_answer(made, answer)
                for threads in (1, 4, 2):
                    torch.set_num_threads(threads)
                    assert_same_answer(answer_of("cpu", made), answer)


def test_every_width_in_every_instruction_set(cpu_isas):
    """Channels around the length of a vector: tails in every position."""
    for isa, dtype in itertools.product(cpu_isas.supported_isas(), (torch.float32, torch.bfloat16)):
        cpu_isas.set_isa(isa)
        for channels in (*range(1, 20), 31, 32, 33, 63, 64, 65):
            made = problem((1, 4, 5, channels, 0, 1, 3), "mr", dtype, make=integers)
            assert_exact(made, answer_of("cpu", made))
            made = weighted_integers((1, 4, 6, channels, channels % 3 + 3, 1, 2), "rmr", dtype, True)
            assert_exact(made, answer_of("cpu", made))


PEAK = """
import gc, sys, torch, fer_kernels
from relation_oracle import eager

torch.set_num_threads(2)
B, N, M, C, k, H, R = 16, 3136, 196, 96, 9, 4, 24
x, y, p, q, a = (
    torch.randn(s, requires_grad=True) for s in ((B, N, C), (B, M, C), (B, N, R), (B, M, R), (H, R // H))
)
idx = torch.randint(0, M, (B, N, k))
grad = torch.randn(B, N, C)

def run(b, n):
    if sys.argv[1] == "ours":
        relation = {"p": p[:b, :n], "q": q[:b], "a": a}
        out = fer_kernels.relation_aggregate(x[:b, :n], idx[:b, :n], y[:b], **relation, backend="cpu")
    else:
        out, _, _ = eager(x[:b, :n], idx[:b, :n], y[:b], p[:b, :n], q[:b], a, "rmr", 0.2)
    return torch.autograd.grad(out, (x, y, p, q, a), grad[:b, :n])

def peak_kib():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

run(1, 50)  # threads, code
gc.collect()
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")
before = peak_kib()
results = run(B, N)
print(peak_kib() - before)
"""


@needs_cpu
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_cpu_takes_a_sixth_of_plain_pytorchs_memory():
    peak = {}
    for who in ("ours", "eager"):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, who],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        )
        peak[who] = int(done.stdout)
    assert peak["ours"] * 6 <= peak["eager"], f"KiB beyond the inputs: {peak}"


# ---- the reverse graph ----

GRAPHS = [(2, 9, 5, 7), (1, 40, 3, 300), (3, 1, 1, 1), (1, 257, 9, 61), (2, 30, 128, 4)]  # B, N, k, M


def graph_devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.mark.sanitize
@pytest.mark.parametrize("device", graph_devices())
@pytest.mark.parametrize("shape", GRAPHS, ids=str)
def test_reverse_graph(device, shape):
    b, n, k, m = shape
    idx = torch.randint(0, m, (b, n, k), generator=torch.Generator().manual_seed(3))
    want = reverse(idx, m)
    for index in (idx, idx.int(), idx.transpose(1, 2).contiguous().transpose(1, 2)):
        index = index.to(device)
        graphs = [reverse_graph(index, m)]
        graphs += [operator(backend, "_reverse")(index.long(), m) for backend in ("reference", "cpu")]
        for graph in graphs:
            assert graph.dtype == torch.int32 and graph.is_contiguous() and torch.equal(graph.cpu(), want)
    # In words: row j of the offsets holds exactly the edges to j, ascending.
    edges = idx[0].flatten()
    for j in range(m):
        lo, hi = want[0, j], want[0, j + 1]
        assert want[0, m + 1 + lo : m + 1 + hi].tolist() == (edges == j).nonzero().flatten().tolist()


@pytest.mark.parametrize("device", graph_devices())
def test_reverse_graph_of_keys_without_edges(device):
    idx = torch.full((1, 3, 2), 4, device=device)
    assert reverse_graph(idx, 7).tolist() == [[0, 0, 0, 0, 0, 6, 6, 6, 0, 1, 2, 3, 4, 5]]
    for shape, keys in [((0, 3, 2), 5), ((2, 0, 2), 5), ((0, 0, 1), 1)]:
        graph = reverse_graph(torch.empty(shape, dtype=torch.int64, device=device), keys)
        assert graph.shape == (shape[0], keys + 1 + shape[1] * shape[2]) and not graph.any()


@every_backend
@every_mode
def test_a_given_reverse_graph_changes_nothing(backend, mode):
    made = problem((2, 9, 7, 6, 4, 2, 5), mode, weights=True)
    graph = reverse_graph(made.idx, 7).to(device_of(backend))
    assert_same_answer(answer_of(backend, made, reversed_graph=graph), answer_of(backend, made))
    moved = to_device(made, backend)
    leaves, others = moved.leaves(), moved.leaves()
    aggregate(backend, moved, leaves, reverse=graph).sum().backward()
    aggregate(backend, moved, others).sum().backward()
    for name in leaves:
        assert torch.equal(leaves[name].grad, others[name].grad)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (([[0]], 3), TypeError, "^reverse_graph: idx must be a tensor, got list"),
        ((torch.zeros(1, 2, 3), 3), TypeError, "idx must be int64 or int32, got torch.float32"),
        ((torch.zeros(2, 3, dtype=torch.int64), 3), ValueError, r"idx must be \(B, N, k\), got 2-D \(2, 3\)"),
        ((torch.zeros(1, 2, 0, dtype=torch.int64), 3), ValueError, "k must lie between 1 and 128, got 0"),
        ((torch.zeros(1, 2, 129, dtype=torch.int64), 3), ValueError, "k must lie between 1 and 128, got 129"),
        ((torch.zeros(1, 2, 3, dtype=torch.int64), 0), ValueError, "num_keys must be at least 1, got 0"),
        ((torch.zeros(1, 2, 3, dtype=torch.int64), 2.0), TypeError, r"num_keys must be an int, got 2.0"),
        ((torch.zeros(1, 2, 3, dtype=torch.int64), True), TypeError, "num_keys must be an int, got True"),
        ((torch.full((1, 2, 3), 60), 49), RuntimeError, r"idx must lie in \[0, M\) with M = 49.*60"),
        ((torch.full((1, 2, 3), -1), 49), RuntimeError, r"^relation_aggregate: idx must lie in \[0, M\)"),
    ],
)
def test_bad_input_of_reverse_graph(arguments, error, words):
    with pytest.raises(error, match=words):
        reverse_graph(*arguments)


# ---- arguments ----


@every_backend
@every_mode
def test_not_contiguous(backend, mode):
    base = problem((2, 8, 6, 4, 4, 2, 5), mode, weights=True)

    def transposed(t):
        return t.mT.contiguous().mT

    def strided(t):
        return t.repeat_interleave(2, -1)[..., ::2]

    def offset(t):
        return torch.cat([torch.full_like(t, torch.nan), t], 0)[t.shape[0] :]

    moved = to_device(base, backend)
    want = answer_of(backend, base)
    for change in (transposed, strided, offset):
        views = {n: change(t.detach()).requires_grad_() for n, t in moved.leaves().items()}
        index = change(moved.idx.float()).long() if change is offset else change(moved.idx)
        made = replace(moved, idx=index)
        result = aggregate(backend, made, views, return_weights=mode != "mr")
        outputs, incoming = (result, (moved.grad, moved.grad_weights))
        if mode == "mr":
            outputs, incoming = (result,), (moved.grad,)
        assert torch.equal(outputs[0], want["out"])
        found = torch.autograd.grad(outputs, list(views.values()), incoming)
        for name, gradient in zip(views, found, strict=True):
            assert torch.equal(gradient, want[name]), (change.__name__, name)
    # One row expanded over the batch and the nodes.
    row = moved.x[:1, :1].expand(2, 8, 4)
    assert torch.equal(
        aggregate(backend, replace(moved, x=row)), aggregate(backend, replace(moved, x=row.contiguous()))
    )
    keys = moved.y[:1].expand(2, 6, 4)
    assert torch.equal(
        aggregate(backend, replace(moved, y=keys)), aggregate(backend, replace(moved, y=keys.contiguous()))
    )


@every_backend
@every_mode
def test_int32_idx(backend, mode):
    made = to_device(problem((2, 8, 6, 4, 4, 2, 5), mode), backend)
    leaves, others = made.leaves(), made.leaves()
    out = aggregate(backend, replace(made, idx=made.idx.int()), leaves)
    want = aggregate(backend, made, others)
    assert torch.equal(out, want)
    out.backward(made.grad)
    want.backward(made.grad)
    for name in leaves:
        assert torch.equal(leaves[name].grad, others[name].grad)


@every_backend
@every_mode
def test_empty(backend, mode):
    for b, n, m in [(0, 5, None), (0, 5, 7), (2, 0, None), (2, 0, 9), (2, 0, 0), (0, 0, None), (0, 0, 0)]:
        made = problem((b, n, m, 4, 4, 2, 3), mode, weights=True)
        answer = answer_of(backend, made)
        assert answer["out"].shape == (b, n, 4)
        for name in made.leaves():
            assert answer[name].shape == getattr(made, name).shape and not answer[name].any()
        if mode != "mr":
            assert answer["weights"].shape == (b, n, 3, 2)


@every_backend
@every_mode
def test_no_channels(backend, mode):
    made = problem((2, 5, 6, 0, 4, 2, 3), mode, weights=True)
    answer = answer_of(backend, made)
    assert answer["out"].shape == (2, 5, 0)
    if mode != "mr":
        assert_answer(made, answer)


@every_backend
@pytest.mark.parametrize("mode", ["rmr", "rsum"])
def test_no_relation_channels(backend, mode):
    """R = 0: all scores are zero and the neighbours weigh the same."""
    made = problem((2, 5, 6, 4, 0, 2, 3), mode, weights=True)
    answer = answer_of(backend, made)
    assert made.a.shape == answer["a"].shape == (2, 0) and answer["p"].shape == (2, 5, 0)
    assert_answer(made, answer)


@every_backend
@every_mode
def test_more_neighbours_than_keys(backend, mode):
    made = problem((1, 3, None, 4, 4, 2, 40), mode, weights=True)
    assert_answer(made, answer_of(backend, made))
    made = problem((2, 4, 1, 4, 4, 2, 9), mode)
    assert torch.equal(made.idx, torch.zeros_like(made.idx))
    assert_answer(made, answer_of(backend, made))


@every_backend
def test_own_keys_are_the_centres_given_twice(backend):
    for mode in MODES:
        made = problem((2, 9, None, 6, 4, 2, 5), mode, weights=True, make=integers)
        own, twice = answer_of(backend, made), answer_of(backend, replace(made, y=made.x))
        for name in ("out", "slots", "p", "q", "a", "weights"):
            if name in own:
                assert torch.equal(own[name], twice[name]), name
        if mode == "mr":
            assert torch.equal(own["x"], twice["x"] + twice["y"])


# ---- torch's machinery ----


@every_backend
@every_mode
def test_opcheck(backend, mode):
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    number = MODES.index(mode)
    for shape in [(2, 6, 5, 4, 4, 2, 3), (1, 5, None, 4, 2, 1, 2)]:
        made = to_device(problem(shape, mode, weights=True), backend)
        keys = made.q.shape[1] if mode != "mr" else (made.x if made.y is None else made.y).shape[1]
        graph = reverse_graph(made.idx, keys)
        calls = [(True, mode != "mr", None), (True, False, graph), (False, False, None)]
        for trained, weights, handed in calls[: 1 if made.y is None else 3]:
            leaves = made.leaves()
            if not trained:
                leaves = {n: t.detach() for n, t in leaves.items()}
            tensors = (leaves["x"], made.idx, *(leaves.get(n) for n in ("y", "p", "q", "a")), handed)
            constants = (number, made.slope, weights, trained and mode != "rsum")
            torch.library.opcheck(operator(backend), (*tensors, *constants), test_utils=tests)
        slots = None if mode == "rsum" else answer_of(backend, made)["slots"]
        calls = {(True, mode != "mr"), (True, False)} | ({(False, True)} if mode != "mr" else set())
        for nodes, relation in [(True, mode != "mr")] if made.y is None else sorted(calls):
            leaves = made.leaves()
            grad = made.grad.clone().requires_grad_()
            features = (leaves["x"], made.idx, leaves.get("y")) if relation else (None, made.idx, None)
            torch.library.opcheck(
                operator(backend, "_backward"),
                (
                    *(grad, made.grad_weights if relation else None, *features),
                    *(leaves.get("p"), leaves.get("q"), leaves.get("a"), slots, graph, keys, made.y is None),
                    *(number, made.slope, nodes, relation),
                ),
                test_utils=tests,
            )
        if backend != "triton":
            torch.library.opcheck(operator(backend, "_reverse"), (made.idx, keys), test_utils=tests)


def loss(backend: str, made: Problem):
    """A function of tensors that uses everything, for compilers."""

    def call(idx, *tensors):
        named = dict(zip((n for n in LEAVES if getattr(made, n) is not None), tensors, strict=True))
        named["x"] = named["x"] * 2
        moved = replace(made, idx=idx)
        if made.mode == "mr":
            return aggregate(backend, moved, named).square().sum()
        out, weights = aggregate(backend, moved, named, return_weights=True)
        return out.square().sum() + (weights * weights).sum()

    return call


def value_and_gradients(function, made: Problem) -> tuple[torch.Tensor, ...]:
    leaves = list(made.leaves().values())
    value = function(made.idx, *leaves)
    return (value.detach(), *torch.autograd.grad(value, leaves))


@every_backend
@every_mode
def test_compile_fullgraph_and_dynamic_batch(backend, mode):
    torch._dynamo.reset()
    made = to_device(problem((2, 7, 9, 4, 4, 2, 3), mode), backend)
    function = loss(backend, made)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3, 5):
        made = to_device(problem((batch, 7, 9, 4, 4, 2, 3), mode, seed=batch), backend)
        want = value_and_gradients(function, made)
        for one, other in zip(value_and_gradients(compiled, made), want, strict=True):
            assert torch.equal(one, other)


@every_backend
def test_compile_with_own_keys_and_dynamic_nodes(backend):
    torch._dynamo.reset()
    function = loss(backend, problem((2, 7, None, 4, 4, 2, 3), "rmr"))
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for nodes in (7, 10):
        made = to_device(problem((2, nodes, None, 4, 4, 2, 3), "rmr"), backend)
        want = value_and_gradients(function, made)
        for one, other in zip(value_and_gradients(compiled, made), want, strict=True):
            assert torch.equal(one, other)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter process is for kernels")
def test_compile_with_inductor():
    torch._dynamo.reset()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = problem((2, 12, 9, 8, 4, 2, 3), "rmr")
    made = replace(made.map(lambda t: t.to(device)), idx=made.idx.to(device))
    function = loss("auto", made)
    compiled = torch.compile(function, fullgraph=True)
    want = value_and_gradients(function, made)
    for one, other in zip(value_and_gradients(compiled, made), want, strict=True):
        torch.testing.assert_close(one, other)


@every_backend
def test_use_backend(backend):
    made = to_device(problem((1, 7, 9, 4, 4, 2, 3), "rmr"), backend)
    with fer_kernels.use_backend(backend), Calls() as calls:
        out = aggregate("auto", made)
    assert calls[0][0].name == operator(backend)._schema.name
    assert torch.equal(out, aggregate(backend, made))
    with fer_kernels.use_backend("reference"), Calls() as calls:
        leaves = made.leaves()
        aggregate("auto", made, leaves).sum().backward()
    names = [schema.name.removeprefix("fer_kernels::") for schema, _ in calls]
    assert names == ["relation_reference", "relation_backward_reference"]


@pytest.mark.parametrize("thread", ["this", "fresh"])
def test_compiled_code_follows_a_later_use_backend(thread):
    ran = []
    made = problem((1, 7, 9, 4, 4, 2, 3), "mr")

    def record(graph, inputs):
        ran.append([str(node.target) for node in graph.graph.nodes if "fer_kernels" in str(node.target)])
        return graph

    def work():
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda x, idx: relation_aggregate(x, idx, mode="mr"), fullgraph=True, backend=record
        )
        compiled(made.x, made.idx.clamp_max(6))
        with fer_kernels.use_backend("reference"):
            compiled(made.x, made.idx.clamp_max(6))

    if thread == "this":
        work()
    else:
        worker = threading.Thread(target=work)
        worker.start()
        worker.join()
    assert len(ran) == 2 and "relation_reference" in ran[1][0]


def test_compile_for_cuda_without_one(monkeypatch):
    """What the front reads for CUDA tensors must be traceable too: fake tensors need no device."""
    made = problem((2, 7, 9, 4, 4, 2, 3), "rmr")
    for check, backend in itertools.product((False, True), ("reference", "auto")):
        monkeypatch.setattr(dispatch, "CHECK_VALUES", check)  # values of a fake tensor must stay unread
        torch._dynamo.reset()
        with FakeTensorMode(allow_non_fake_inputs=True):
            tensors = [
                torch.empty(t.shape, device="cuda", requires_grad=True) for t in made.leaves().values()
            ]
            idx = torch.empty(made.idx.shape, dtype=torch.int64, device="cuda")
            function = loss(backend, made)
            for call in (function, torch.compile(function, fullgraph=True, backend="eager")):
                value = call(idx, *tensors)
                assert value.shape == () and value.device.type == "cuda" and value.requires_grad
            graph = reverse_graph(idx, 9)
            assert graph.shape == (2, 9 + 1 + 21) and graph.dtype == torch.int32
            x, y, p, q, a = (t.detach() for t in tensors)
            slots = torch.empty(2, 7, 4, dtype=torch.uint8, device="cuda")
            # autograd's engine asks for the device, so the backward is called without it.
            found = operator("reference", "_backward")(
                x, None, x, idx, y, p, q, a, slots, graph, 9, False, 1, 0.2, True, True
            )
            for gradient, tensor in zip(found, tensors, strict=True):
                assert gradient.shape == tensor.shape and gradient.device.type == "cuda"


@every_backend
def test_export(backend):
    class Layer(torch.nn.Module):
        def __init__(self, mode):
            super().__init__()
            self.mode = mode
            self.a = torch.nn.Parameter(normal(2, 2))

        def forward(self, x, idx, y, p, q):
            if self.mode == "mr":
                return relation_aggregate(x, idx, y, mode="mr", backend=backend)
            return relation_aggregate(
                x, idx, y, p=p, q=q, a=self.a, mode=self.mode, return_weights=True, backend=backend
            )

    batch = torch.export.Dim("batch", min=1, max=64)
    for mode in MODES:
        layer = Layer(mode).to(device_of(backend))
        few, more = (to_device(problem((b, 7, 9, 4, 4, 2, 3), "rmr"), backend) for b in (2, 5))
        program = torch.export.export(
            layer, (few.x, few.idx, few.y, few.p, few.q), dynamic_shapes=[{0: batch}] * 5
        )
        tensors = (more.x, more.idx, more.y, more.p, more.q)
        got, want = program.module()(*tensors), layer(*tensors)
        for one, other in zip(*([r] if mode == "mr" else r for r in (got, want)), strict=True):
            assert torch.equal(one, other)


@every_backend
@every_mode
def test_autocast(backend, mode):
    """Autocast changes nothing: the inputs' dtype decides, so cast a to what the products give."""
    made = to_device(problem((1, 7, 9, 4, 4, 2, 3), mode), backend)
    want = answer_of(backend, made)
    with torch.autocast(device_of(backend), torch.bfloat16):
        assert torch.equal(aggregate(backend, made), want["out"])
        half = (made.y @ torch.eye(4, device=made.x.device)).requires_grad_()
        assert half.dtype == torch.bfloat16
        if mode == "mr":
            out = relation_aggregate(made.x.bfloat16(), made.idx, half, mode=mode, backend=backend)
        else:
            with pytest.raises(TypeError, match="a must have x's dtype"):
                relation_aggregate(
                    *(made.x.bfloat16(), made.idx, half),
                    **{"p": made.p.bfloat16(), "q": made.q.bfloat16(), "a": made.a},
                    **{"mode": mode, "backend": backend},
                )
            out = relation_aggregate(
                *(made.x.bfloat16(), made.idx, half),
                **{n: getattr(made, n).bfloat16() for n in "pqa"},
                **{"mode": mode, "backend": backend},
            )
    assert out.dtype == torch.bfloat16
    out.sum().backward()


@every_backend
@every_mode
def test_checkpoint(backend, mode):
    made = to_device(problem((2, 7, 9, 4, 4, 2, 3), mode), backend)
    function = loss(backend, made)
    want = value_and_gradients(function, made)
    for reentrant in (True, False):

        def again(*tensors, reentrant=reentrant):
            return checkpoint(function, *tensors, use_reentrant=reentrant)

        leaves = list(made.leaves().values())
        value = again(made.idx, *leaves)
        value.backward()
        assert torch.equal(value.detach(), want[0])
        for leaf, gradient in zip(leaves, want[1:], strict=True):
            assert torch.equal(leaf.grad, gradient)


@every_backend
@every_mode
def test_cuda_graph_capture(backend, mode):
    if device_of(backend) != "cuda":
        pytest.skip("captures a CUDA graph")
    made = to_device(problem((2, 49, 60, 16, 8, 2, 9), mode), backend)
    leaves = made.leaves()
    names = list(leaves)
    given = reverse_graph(made.idx, 60)
    for graph_of_keys in (None, given):

        def step(graph_of_keys=graph_of_keys):
            out = aggregate(backend, made, leaves, reverse=graph_of_keys)
            return out, torch.autograd.grad(out, [leaves[n] for n in names], made.grad)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, found = step()
        with torch.no_grad():
            leaves["x"].copy_(normal(2, 49, 16, seed=9))
        graph.replay()
        want, wanted = step()
        assert torch.equal(out, want)
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_mode
def test_reference_on_cuda(mode):
    for dtype in OPERATOR.dtypes["reference"]:
        made = problem((2, 30, 49, 18, 6, 3, 9), mode, dtype, weights=True, make=integers)
        made.x[0, 3, 3] = made.y[1, 5, 5] = torch.nan
        tensors = replace(made.map(lambda t: t.cuda()), idx=made.idx.cuda())
        leaves = tensors.leaves()
        result = aggregate("reference", tensors, leaves, return_weights=mode != "mr")
        answer = {"out": result if mode == "mr" else result[0]}
        again = aggregate("reference", tensors, tensors.leaves(), return_weights=mode != "mr")
        assert same(answer["out"], again if mode == "mr" else again[0])
        want = solve(replace(made, grad=None))["out"]
        assert torch.equal(answer["out"].isnan().cpu(), want.isnan())
        if mode == "mr":
            assert same(answer["out"].cpu().double(), want)
            answer["out"].backward(tensors.grad)
            exact = solve(made)
            for name, leaf in leaves.items():
                assert same(leaf.grad.cpu().double(), exact[name])


# ---- bad input ----

X = torch.zeros(2, 49, 8)
Y = torch.zeros(2, 30, 8)
IDX = torch.zeros(2, 49, 5, dtype=torch.int64)
P, Q, A = torch.zeros(2, 49, 6), torch.zeros(2, 49, 6), torch.zeros(2, 3)
RELATION = {"mode": "rmr", "p": P, "q": Q, "a": A}


def graph_of(*shape: int, dtype=torch.int32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"x": [1.0]}, TypeError, "^relation_aggregate: x must be a tensor, got list"),
        ({"x": torch.zeros(49, 8)}, ValueError, r"x must be \(B, nodes, C\), got 2-D \(49, 8\)"),
        ({"x": X.long()}, TypeError, "x must be float32, float64, bfloat16 or float16, got torch.int64"),
        ({"x": X.to(torch.complex64)}, TypeError, "got torch.complex64"),
        ({"x": X.to_sparse()}, TypeError, "x must be a dense tensor, got layout torch.sparse_coo"),
        ({"x": torch.nested.nested_tensor([torch.ones(3, 2)])}, TypeError, "x must be .* got a nested one"),
        ({"idx": [[0]]}, TypeError, "idx must be a tensor, got list"),
        ({"idx": None}, TypeError, "idx must be a tensor, got NoneType"),
        ({"idx": IDX.float()}, TypeError, "idx must be int64 or int32, got torch.float32"),
        ({"idx": IDX.bool()}, TypeError, "idx must be int64 or int32, got torch.bool"),
        ({"idx": IDX.to_sparse()}, TypeError, "idx must be a dense tensor, got layout torch.sparse_coo"),
        ({"idx": IDX[0]}, ValueError, r"idx must be \(B, N, k\), got 2-D \(49, 5\)"),
        ({"idx": IDX[..., :0]}, ValueError, r"k must lie between 1 and 128, got 0 \(idx: \(2, 49, 0\)\)"),
        ({"idx": IDX[..., :1].expand(2, 49, 129)}, ValueError, "k must lie between 1 and 128, got 129"),
        (
            {"idx": IDX[:1]},
            ValueError,
            r"idx must be \(B, N, k\) with B = 2 and N = 49 as in x \(2, 49, 8\), got \(1, 49, 5\)",
        ),
        ({"idx": IDX[:, :48]}, ValueError, r"B = 2 and N = 49 as in x \(2, 49, 8\), got \(2, 48, 5\)"),
        ({"idx": IDX.to("meta")}, ValueError, "idx is on meta and x on cpu; expected one device"),
        ({"y": [0.0]}, TypeError, "y must be a tensor, got list"),
        ({"y": Y.double()}, TypeError, "y must have x's dtype torch.float32, got torch.float64"),
        ({"y": Y.to("meta")}, ValueError, "y is on meta and x on cpu; expected one device"),
        (
            {"y": Y[..., :7]},
            ValueError,
            r"y must be \(B, M, C\) with B = 2 and C = 8 \(x: \(2, 49, 8\)\), got \(2, 30, 7\)",
        ),
        ({"y": Y[:1]}, ValueError, r"y must be \(B, M, C\) with B = 2 and C = 8 .* got \(1, 30, 8\)"),
        ({"y": Y[0]}, ValueError, r"y must be \(B, nodes, C\), got 2-D \(30, 8\)"),
        ({"mode": "max"}, ValueError, "unknown mode 'max': expected one of 'mr', 'rmr', 'rsum'"),
        ({"mode": None}, ValueError, "unknown mode None"),
        ({"negative_slope": "0.2"}, TypeError, "negative_slope must be a number, got '0.2'"),
        ({"negative_slope": True}, TypeError, "negative_slope must be a number, got True"),
        ({"return_weights": 1}, TypeError, r"return_weights must be a bool, got 1 \(int\)"),
        ({"mode": "mr", "p": P}, ValueError, "mode 'mr' takes no p, q, a, got p$"),
        ({"mode": "mr", "q": Q}, ValueError, "mode 'mr' takes no p, q, a, got q$"),
        ({"mode": "mr", "q": Q, "a": A}, ValueError, "mode 'mr' takes no p, q, a, got q, a$"),
        ({"mode": "mr", "return_weights": True}, ValueError, "mode 'mr' has no weights to return"),
        ({"mode": "rmr"}, ValueError, "mode 'rmr' needs p, q and a \\(mode 'mr' none\\), missing p, q, a$"),
        (RELATION | {"p": None}, ValueError, "mode 'rmr' needs p, q and a \\(mode 'mr' none\\), missing p$"),
        (RELATION | {"q": None}, ValueError, "mode 'rmr' needs p, q and a \\(mode 'mr' none\\), missing q$"),
        (
            RELATION | {"a": None, "mode": "rsum"},
            ValueError,
            "mode 'rsum' needs p, q and a \\(mode 'mr' none\\), missing a$",
        ),
        (RELATION | {"q": None, "a": None}, ValueError, "missing q, a$"),
        (RELATION | {"p": 1.0}, TypeError, "p must be a tensor, got float"),
        (RELATION | {"p": P[0]}, ValueError, r"p must be \(B, nodes, C\), got 2-D \(49, 6\)"),
        (
            RELATION | {"p": P[:1]},
            ValueError,
            r"p must be \(B, N, R\) with B = 2 and N = 49 .* got \(1, 49, 6\)",
        ),
        (RELATION | {"p": P[:, :48]}, ValueError, r"p must be \(B, N, R\) .* got \(2, 48, 6\)"),
        (RELATION | {"p": P.half()}, TypeError, "p must have x's dtype torch.float32, got torch.float16"),
        (RELATION | {"p": P.to("meta")}, ValueError, "p is on meta and x on cpu; expected one device"),
        (
            RELATION | {"q": Q[:, :30]},
            ValueError,
            r"q must be \(B, M, R\) with B = 2 and M = 49 and R = 6 \(x: \(2, 49, 8\)\), got \(2, 30, 6\)",
        ),
        (RELATION | {"y": Y}, ValueError, r"q must be \(B, M, R\) with B = 2 and M = 30 .* got \(2, 49, 6\)"),
        (RELATION | {"q": Q[..., :5]}, ValueError, r"q must be .* R = 6 .* got \(2, 49, 5\)"),
        (RELATION | {"q": Q[:1]}, ValueError, r"q must be .* got \(1, 49, 6\)"),
        (RELATION | {"q": Q.double()}, TypeError, "q must have x's dtype torch.float32, got torch.float64"),
        (RELATION | {"q": Q.to("meta")}, ValueError, "q is on meta and x on cpu; expected one device"),
        (RELATION | {"a": [1.0]}, TypeError, "a must be a tensor, got list"),
        (RELATION | {"a": A.to_sparse()}, TypeError, "a must be a dense tensor"),
        (RELATION | {"a": A.double()}, TypeError, "a must have x's dtype torch.float32, got torch.float64"),
        (RELATION | {"a": A.long()}, TypeError, "a must have x's dtype torch.float32, got torch.int64"),
        (RELATION | {"a": A.to("meta")}, ValueError, "a is on meta and x on cpu; expected one device"),
        (
            RELATION | {"a": torch.zeros(4, 1)},
            ValueError,
            r"a must be \(H, R / H\) with R = 6 as in p \(2, 49, 6\), got \(4, 1\)",
        ),
        (RELATION | {"a": torch.zeros(6)}, ValueError, r"a must be \(H, R / H\) .* got \(6,\)"),
        (RELATION | {"a": torch.zeros(0, 6)}, ValueError, r"a must be \(H, R / H\) .* got \(0, 6\)"),
        (RELATION | {"a": torch.zeros(1, 2, 3)}, ValueError, r"a must be \(H, R / H\) .* got \(1, 2, 3\)"),
        (
            RELATION | {"a": torch.zeros(3, 2)},
            ValueError,
            r"C = 8 must be divisible by the 3 heads of a \(3, 2\)",
        ),
        ({"reverse": 3}, TypeError, "reverse must be a tensor, got int"),
        (
            {"reverse": graph_of(2, 295, dtype=torch.int64)},
            ValueError,
            r"reverse must be reverse_graph\(idx, 49\), an int32 \(2, 295\), got torch.int64 \(2, 295\)",
        ),
        ({"reverse": graph_of(2, 294)}, ValueError, r"an int32 \(2, 295\), got torch.int32 \(2, 294\)"),
        ({"reverse": graph_of(1, 295)}, ValueError, r"an int32 \(2, 295\), got torch.int32 \(1, 295\)"),
        ({"y": Y, "reverse": graph_of(2, 295)}, ValueError, r"reverse_graph\(idx, 30\), an int32 \(2, 276\)"),
        ({"reverse": graph_of(2, 295).to("meta")}, ValueError, "reverse is on meta and idx on cpu"),
        (
            {"backend": "tpu"},
            ValueError,
            "unknown backend 'tpu': expected 'auto' or one of 'reference', 'cpu'",
        ),
    ],
)
def test_bad_input(arguments, error, words):
    call = {"x": X, "idx": IDX, "mode": "mr"} | arguments
    with pytest.raises(error, match=words):
        relation_aggregate(call.pop("x"), call.pop("idx"), call.pop("y", None), **call)


@pytest.mark.parametrize("backend", [b for b in backends("relation") if b in ("reference", "cpu")])
@every_mode
def test_index_out_of_range(backend, mode):
    for keys, index, words in [
        (49, 49, r"idx must lie in \[0, M\) with M = 49, .*\b49\b"),
        (49, 60, r"idx must lie in \[0, M\) with M = 49.*\b60\b"),
        (30, 2**40, rf"idx must lie in \[0, M\) with M = 30.*\b{2**40}\b"),
        (30, -1, r"idx must lie in \[0, M\) with M = 30"),
        (30, -(2**62), r"idx must lie in \[0, M\) with M = 30"),
        (0, 0, r"idx must lie in \[0, M\) with M = 0"),
    ]:
        made = problem((2, 49, 49, 8, 6, 2, 5), mode)
        made.y = made.y[:, :keys].contiguous()
        made.q = made.q[:, :keys].contiguous() if made.q is not None else None
        made.idx = torch.zeros_like(made.idx)
        made.idx[1, 48, 4] = index
        for leaves in (made.leaves(), None):
            with pytest.raises(RuntimeError, match=f"relation_aggregate: {words}"):
                aggregate(backend, made, leaves)


def test_check_values_is_an_environment_variable():
    """Reading the values of a GPU's tensors waits for it, so it must be asked for."""
    script = "from fer_kernels import dispatch; print(dispatch.CHECK_VALUES)"
    for value, wanted in (("1", "True"), ("0", "False")):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"FER_KERNELS_CHECK": value},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == wanted


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_backend
def test_check_values_on_a_gpu(backend, monkeypatch):
    if backend == "cpu":
        pytest.skip("always checks")
    monkeypatch.setattr(dispatch, "CHECK_VALUES", True)
    made = problem((2, 49, 30, 8, 6, 2, 5), "mr")
    made.idx[1, 3, 2] = 30
    moved = replace(made.map(lambda t: t.cuda()), idx=made.idx.cuda())
    with pytest.raises(RuntimeError, match=r"idx must lie in \[0, M\) with M = 30.*\b30\b"):
        aggregate(backend, moved)


DIRECT = {  # of a good call with mode rmr: what to put in its place
    "x of 2 dimensions": {"x": X[0]},
    "idx of 2 dimensions": {"idx": IDX[0]},
    "idx of another batch": {"idx": IDX[:1]},
    "idx of other nodes": {"idx": IDX[:, :48]},
    "no neighbours": {"idx": IDX[..., :0]},
    "too many neighbours": {"idx": IDX[..., :1].expand(2, 49, 200).contiguous()},
    "idx int32": {"idx": IDX.int()},
    "idx float": {"idx": IDX.float()},
    "y of another batch": {"y": X[:1]},
    "y of other channels": {"y": X[..., :7]},
    "y of another dtype": {"y": X.double()},
    "no p": {"p": None},
    "no q": {"q": None},
    "no a": {"a": None},
    "p of other nodes": {"p": P[:, :48]},
    "p of other channels": {"p": P[..., :5]},
    "p of another dtype": {"p": P.double()},
    "q of other keys": {"q": Q[:, :48]},
    "q of another batch": {"q": Q[:1]},
    "q of other channels": {"q": Q[..., :5]},
    "heads that do not divide R": {"a": torch.zeros(4, 1)},
    "heads that do not divide C": {"a": torch.zeros(3, 2)},
    "no heads": {"a": torch.zeros(0, 6)},
    "a of 1 dimension": {"a": torch.zeros(6)},
    "a of another dtype": {"a": A.double()},
    "mode 3": {"mode": 3},
    "mode -1": {"mode": -1},
    "index beyond the keys": {"idx": IDX + 49},
    "index below zero": {"idx": IDX - 1},
}
FORWARD = {"x": X, "idx": IDX, "y": X, "p": P, "q": Q, "a": A, "reverse": None, "mode": 1}
FORWARD |= {"negative_slope": 0.2, "return_weights": True, "save_slots": True}
BACKWARD = {"grad": X, "grad_weights": torch.zeros(2, 49, 5, 2), **FORWARD, "keys": 49, "own_keys": False}
BACKWARD |= {"slots": torch.zeros(2, 49, 8, dtype=torch.uint8), "need_nodes": True, "need_relation": True}
DIRECT_BACKWARD = {
    "no x": {"x": None},
    "x of other channels": {"x": X[..., :7]},
    "x of other nodes": {"x": X[:, :48]},
    "no slots": {"slots": None},
    "slots of another shape": {"slots": BACKWARD["slots"][:, :48]},
    "slots of no size": {"slots": BACKWARD["slots"][:0]},
    "slots of another dtype": {"slots": BACKWARD["slots"].float()},
    "slots out of range": {"slots": BACKWARD["slots"] + 5},
    "slots far out of range": {"slots": BACKWARD["slots"] + 255},
    "grad of 2 dimensions": {"grad": X[0]},
    "grad of other channels": {"grad": X[..., :7]},
    "grad of other nodes": {"grad": X[:, :48]},
    "grad of another dtype": {"grad": X.double()},
    "grad_weights of another shape": {"grad_weights": torch.zeros(2, 49, 4, 2)},
    "grad_weights of other heads": {"grad_weights": torch.zeros(2, 49, 5, 1)},
    "fewer keys": {"keys": 48},
    "more keys": {"keys": 50},
    "no keys": {"keys": 0},
    "a negative number of keys": {"keys": -1},
}


def call_directly(backend: str, suffix: str, arguments: dict):
    function = operator(backend, suffix)
    device = device_of(backend)
    values = [arguments[a.name] for a in function._schema.arguments]
    return function(*(v.to(device) if isinstance(v, torch.Tensor) else v for v in values))


REFUSED = (RuntimeError, ValueError, TypeError, IndexError, AssertionError, ArithmeticError, NameError)


@pytest.mark.parametrize("backend", [b for b in backends("relation") if b in ("reference", "cpu", "cuda")])
def test_a_bad_direct_call_reaches_no_kernel(backend):
    """torch.ops skips the Python checks; compiled code must stay inside its memory."""
    call_directly(backend, "", FORWARD)
    call_directly(backend, "_backward", BACKWARD)
    taken = []
    calls = [("", FORWARD, name, change) for name, change in DIRECT.items()]
    calls += [("_backward", BACKWARD, name, change) for name, change in (DIRECT | DIRECT_BACKWARD).items()]
    for suffix, good, name, change in calls:
        if "index" in name and backend == "cuda":
            continue  # undefined on a GPU
        try:
            call_directly(backend, suffix, good | change)
        except REFUSED:
            continue
        if "out of range" not in name:  # a kernel may as well find no winner
            taken.append(f"relation{suffix}: {name}")
    if backend != "reference":  # which is safe PyTorch, and may broadcast
        assert not taken


@pytest.mark.parametrize("backend", [b for b in backends("relation") if b in ("reference", "cpu")])
def test_bad_values_in_a_direct_call(backend):
    for suffix, good, change in [
        ("", FORWARD, {"idx": IDX + 49}),
        ("", FORWARD, {"idx": IDX - 1}),
        ("_backward", BACKWARD, {"idx": IDX + 49}),
        ("_backward", BACKWARD, {"idx": IDX - 1}),
    ]:
        with pytest.raises(REFUSED):
            call_directly(backend, suffix, good | change)
    for index in (IDX + 49, IDX - 1):
        with pytest.raises(REFUSED):
            operator(backend, "_reverse")(index, 49)


# ---- choice of backend ----


@pytest.mark.skipif(torch.cuda.is_available(), reason="explains the absence of a GPU")
def test_missing_cuda_lists_every_reason():
    with pytest.raises(RuntimeError) as failure:
        relation_aggregate(X.double(), IDX, mode="mr", backend="cuda")
    words = str(failure.value)
    assert words.startswith("relation: backend 'cuda' cannot take this call: ")
    assert "CUDA tensors and these are on cpu" in words and "float64" in words
    assert "cuda" not in backends("relation")


def test_auto_never_picks_an_unproved_gpu_kernel(monkeypatch):
    monkeypatch.setattr(dispatch, "PROVED_ON", {})
    with FakeTensorMode():
        there = torch.empty(2, 49, 8, device="cuda")
    assert OPERATOR.choose("auto", there) is OPERATOR.registered["reference"]
    with FakeTensorMode(), Calls() as calls:
        idx = torch.empty(2, 49, 5, dtype=torch.int64, device="cuda")
        relation_aggregate(torch.empty(2, 49, 8, device="cuda", requires_grad=True), idx, mode="mr")
        reverse_graph(idx, 49)
    assert len(calls) == 2 and all(schema.name.endswith("_reference") for schema, _ in calls)
    if torch.cuda.is_available():
        assert OPERATOR.choose("auto", X.cuda()) is OPERATOR.registered["reference"]
    chosen = OPERATOR.choose("auto", X)
    assert chosen is OPERATOR.registered["cpu" if "cpu" in backends("relation") else "reference"]


def test_available_backends():
    assert fer_kernels.available_backends("relation")[0] == "reference"
