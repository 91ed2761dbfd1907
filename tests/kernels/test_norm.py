"""norm against float64, torch's own two functions in the same dtype, and itself."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from support import backends
from torch import Tensor, nn

import fer_kernels
from fer_kernels import batch_norm_act
from fer_kernels.nn import Projection, norm_act_maps
from fer_kernels.nn.norm import fuses

BACKENDS = backends("norm")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
EPS = 1e-5


ACTS = [None, "relu", "gelu"]


def eager(x, weight, bias, residual, gain, act):
    y = F.batch_norm(x, None, None, weight, bias, True, 0.1, EPS)
    if gain is not None:
        y = y * gain.to(y.dtype).repeat_interleave(len(x) // len(gain)).unsqueeze(1)
    y = y if residual is None else residual + y
    return {None: y, "relu": F.relu(y), "gelu": F.gelu(y)}[act]


def ours(backend: str):
    def run(x, weight, bias, residual, gain, act):
        options = {"residual": residual, "gain": gain, "act": act}
        return batch_norm_act(x, weight, bias, eps=EPS, backend=backend, **options)

    return run


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


class Problem:
    """x, weight, bias, residual, gain and y's gradient, exact in their dtypes."""

    def __init__(
        self,
        rows: int,
        channels: int,
        dtype: torch.dtype,
        act=None,
        affine=True,
        seed=0,
        mean=0.0,
        residual: torch.dtype | None = None,
        samples: int = 0,
    ):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, like: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(like).double()

        self.x = (draw(rows, channels) * 2 + mean).to(dtype).double()
        self.weight, self.bias = (draw(channels, like=wide(dtype)) if affine else None for _ in range(2))
        self.grad = draw(rows, channels)
        self.residual = None if residual is None else draw(rows, channels, like=residual)
        self.gain = draw(samples, like=wide(dtype)).abs() if samples else None
        self.dtype, self.act, self.outside = dtype, act, residual or dtype

    def run(self, function, dtype: torch.dtype) -> list[Tensor]:
        """y and the gradients of x, weight, bias and residual."""
        exact = dtype == torch.float64
        kinds = [
            (self.x, dtype),
            (self.weight, wide(dtype)),
            (self.bias, wide(dtype)),
            (self.residual, dtype if exact else self.outside),
        ]
        leaves = [None if t is None else t.to(like).clone().requires_grad_() for t, like in kinds]
        gain = None if self.gain is None else self.gain.to(wide(dtype))
        y = function(*leaves, gain, self.act)
        expected = dtype if exact else self.outside
        y.backward(self.grad.to(y.dtype))
        assert y.dtype == expected and y.is_contiguous()
        return [y.detach().double(), *(leaf.grad.double() for leaf in leaves if leaf is not None)]

    def names(self) -> list[str]:
        return ["y", "dx", *(["dw", "db"] if self.weight is not None else []), "dresidual"]

    def scales(self) -> dict[str, Tensor]:
        """Of each result by channel: of sums, what is summed, for the sums themselves may cancel."""
        one = torch.ones(())
        weight = one if self.weight is None else self.weight.abs()
        bias = one * 0 if self.bias is None else self.bias.abs()
        gain = one if self.gain is None else self.gain.max().clamp(min=1)
        rstd = torch.rsqrt(self.x.var(0, correction=0) + EPS)
        size = self.grad.square().mean(0).sqrt()
        outside = 0 if self.residual is None else 1
        return {
            "y": (weight + bias) * gain + outside,
            "dx": weight * rstd * size * gain,
            "dw": size * len(self.x) * gain,
            "db": size * len(self.x) * gain,
            "dresidual": size,
        }


def check(problem: Problem, backend: str) -> None:
    truth = problem.run(eager, torch.float64)
    theirs, found = (problem.run(f, problem.dtype) for f in (eager, ours(backend)))
    # torch's may happen to be exact. A value is rounded four times on its way, by half a unit each, the mean
    # by half a unit of its own size; and in float64 the truth rounds too.
    lost = (problem.x.mean(0).abs() * torch.rsqrt(problem.x.var(0, correction=0) + EPS)).max().item()
    unit = torch.finfo(problem.dtype).eps * (2 + lost) * (4 if problem.dtype == torch.float64 else 1)
    scales = problem.scales()
    assert len(truth) == len(found)
    for name, t, e, o in zip(problem.names(), truth, theirs, found, strict=False):
        # A relu opens or shuts where rounding moves its argument across zero, which is nobody's error.
        near = (
            torch.zeros_like(t, dtype=torch.bool)
            if problem.act != "relu" or t.dim() < 2
            else argument(problem).abs() < 4 * unit * scales["y"]
        )
        errors = [
            ((value - t) / scales[name]).masked_fill(near, 0).square().mean().sqrt().item()
            for value in (e, o)
        ]
        assert errors[1] <= 2 * errors[0] + unit, (name, errors)


def argument(problem: Problem) -> Tensor:
    """What the activation is of, in float64."""
    leaves = (problem.x, problem.weight, problem.bias, problem.residual, problem.gain)
    return eager(*leaves, None)


@each_backend
@settings(max_examples=60)
@given(
    rows=st.integers(2, 200),
    channels=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    act=st.sampled_from(ACTS),
    affine=st.booleans(),
    residual=st.sampled_from([None, "as x", "wide"]),
    samples=st.integers(0, 4),
    seed=st.integers(0, 1000),
)
def test_agrees_with_float64(backend, rows, channels, dtype, act, affine, residual, samples, seed):
    rows = max(samples, 1) * -(-rows // max(samples, 1))
    outside = {None: None, "as x": dtype, "wide": wide(dtype)}[residual]
    check(Problem(rows, channels, dtype, act, affine, seed, 0.0, outside, samples), backend)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("residual", [None, torch.float32])
def test_sizes_of_networks(backend, dtype, act, residual):
    check(Problem(3136, 192, dtype, act, residual=residual, samples=16), backend)


@each_backend
def test_a_large_mean(backend):
    check(Problem(500, 20, torch.float32, "gelu", mean=3000.0), backend)


@each_backend
def test_gelu_and_its_slope_everywhere(backend):
    """Also where torch's own float32 is off by more: far below zero it cancels."""
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    x = z.float().unsqueeze(1).requires_grad_()
    y = batch_norm_act(x, torch.full((1,), float(z.std(correction=0))), act="gelu", eps=0, backend=backend)
    exact = F.gelu(z)
    assert (y.detach()[:, 0].double() - exact).abs().max() <= 4e-6 and y.detach().isfinite().all()
    y.backward(torch.ones_like(y))
    assert x.grad.isfinite().all()


def test_instruction_sets_agree(cpu_isas):
    found = {}
    for isa in cpu_isas.supported_isas():
        cpu_isas.set_isa(isa)
        for act, dtype in itertools.product(ACTS, (torch.float32, torch.bfloat16)):
            problem = Problem(130, 37, dtype, act, residual=torch.float32, samples=5)
            found[isa, act, dtype] = problem.run(ours("cpu"), dtype)
    for (_, act, dtype), results in found.items():
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        for one, two in zip(results, found["baseline", act, dtype], strict=True):
            torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_for_any_number_of_threads(dtype, two_threads):
    if "cpu" not in BACKENDS:
        pytest.skip("no compiled kernel")
    problem = Problem(1000, 50, dtype, "gelu", residual=torch.float32, samples=10)
    two = problem.run(ours("cpu"), dtype)
    torch.set_num_threads(1)
    for one, other in zip(problem.run(ours("cpu"), dtype), two, strict=True):
        assert torch.equal(one, other)


@each_backend
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_stays_in_its_channel(backend, value):
    x = torch.randn(90, 20)
    x[70, 3] = value
    y = batch_norm_act(x, act="gelu", backend=backend)
    assert y[:, 3].isnan().all() and y.isnan().sum() == 90
    constant = batch_norm_act(torch.full((5, 2), 7.0), bias=torch.tensor([0.5, -1.0]), backend=backend)
    torch.testing.assert_close(constant, torch.tensor([0.5, -1.0]).expand(5, 2))


@each_backend
def test_derivatives(backend):
    for act in ACTS:
        torch.manual_seed(0)
        x, r, w, b = (
            torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((6, 3), (6, 3), (3,), (3,))
        )

        def run(x, w, b, r, gain, act=act):
            return batch_norm_act(x, w, b, act=act, residual=r, gain=gain, backend=backend)

        for inputs in ((x, w, b, None, None), (x, w, b, r, torch.tensor([2.0, 0.5, 1.0]).double())):
            assert torch.autograd.gradcheck(run, inputs)
            assert torch.autograd.gradgradcheck(run, inputs)
        assert torch.autograd.gradcheck(lambda x, run=run: run(x, None, None, None, None), (x,))


@each_backend
def test_a_shift_moves_the_tracked_mean_alone(backend):
    x, weight, shift = torch.randn(40, 5), torch.rand(5), torch.randn(5, requires_grad=True)
    bias = torch.randn(5, requires_grad=True)
    for b in (bias, None):
        means = [torch.zeros(5), torch.zeros(5)]
        y = batch_norm_act(x, weight, b, shift=shift, running_mean=means[0], backend=backend)
        F.batch_norm(x + shift.detach(), means[1], torch.ones(5), training=True)
        torch.testing.assert_close(*means)
        assert torch.equal(y, batch_norm_act(x, weight, b, backend=backend))
        (gradient,) = torch.autograd.grad(y.square().sum(), shift)
        assert torch.equal(gradient, torch.zeros(5))
    spoiled = batch_norm_act(x, shift=torch.tensor([0, torch.nan, 0, torch.inf, 0]), backend=backend)
    assert spoiled.isnan().any(0).tolist() == [False, True, False, True, False]


@each_backend
def test_running_statistics(backend):
    x, ours_, theirs = (
        torch.randn(50, 6) * 3 + 1,
        [torch.zeros(6), torch.ones(6)],
        [torch.zeros(6), torch.ones(6)],
    )
    for _ in range(3):
        options = {"running_mean": ours_[0], "running_var": ours_[1], "momentum": 0.3}
        batch_norm_act(x, **options, backend=backend)
        F.batch_norm(x, *theirs, training=True, momentum=0.3)
    torch.testing.assert_close(ours_, theirs)


def test_modules_do_without_it_where_another_backend_is_asked_for():
    x = torch.randn(2, 5, 8)
    for wish in fer_kernels.dispatch.BACKENDS:
        layer = Projection(8, 8, groups=1)
        with fer_kernels.use_backend(wish):
            assert fuses(layer.norm, layer.act, x) == (wish == "cpu" and "cpu" in BACKENDS)
            layer(x).sum().backward()


def test_saves_its_input_alone():
    kept = []
    x = torch.randn(100, 8, requires_grad=True)
    weight = torch.ones(8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        batch_norm_act(x, weight, weight, act="gelu")
    assert [t.data_ptr() for t in kept if t.numel() > 8] == [x.data_ptr()]


def test_a_residual_is_saved_for_an_activation_alone():
    x, residual = (torch.randn(100, 8, requires_grad=True) for _ in range(2))
    for act, expected in ((None, {x.data_ptr()}), ("relu", {x.data_ptr(), residual.data_ptr()})):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            batch_norm_act(x, act=act, residual=residual)
        assert {t.data_ptr() for t in kept if t.numel() > 8} == expected


@each_backend
def test_strides_and_registration(backend):
    x = torch.randn(40, 12).T.requires_grad_()
    plain = x.detach().contiguous().requires_grad_()
    for t in (x, plain):
        batch_norm_act(t, act="gelu", backend=backend).square().sum().backward()
    torch.testing.assert_close(x.grad, plain.grad)
    for act in range(len(ACTS)):
        for residual in (None, torch.randn(9, 5, requires_grad=True)):
            weight, gain = torch.ones(5, requires_grad=True), torch.rand(3)
            inputs = (torch.randn(9, 5, requires_grad=True), weight, None, residual, gain, EPS, act)
            torch.library.opcheck(fer_kernels.norm.op.OPERATOR.registered[backend], inputs)


def test_compiles_whole():
    compiled = torch.compile(
        lambda x, m, v: batch_norm_act(x, act="gelu", running_mean=m, running_var=v), fullgraph=True
    )
    x, statistics, others = (
        torch.randn(30, 7),
        [torch.zeros(7), torch.ones(7)],
        [torch.zeros(7), torch.ones(7)],
    )
    expected = batch_norm_act(x, act="gelu", running_mean=others[0], running_var=others[1])
    torch.testing.assert_close(compiled(x, *statistics), expected)
    torch.testing.assert_close(statistics, others)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x must be \(rows, C\), got 3-D \(2, 3, 4\)"),
        ({"x": torch.zeros(1, 4)}, r"at least 2 rows, and a channel, got \(1, 4\)"),
        ({"x": torch.zeros(4, 4, dtype=torch.int64)}, "x must be float32, float64"),
        ({"x": [1.0]}, "x must be a tensor, got list"),
        ({"weight": torch.ones(3)}, r"weight must be \(C,\) with C = 4 .*got \(3,\)"),
        ({"bias": torch.ones(4, dtype=torch.float64)}, "bias must be torch.float32 as x or float32"),
        ({"running_var": torch.ones(5)}, r"running_var must be \(C,\)"),
        ({"act": "silu"}, "unknown act 'silu': expected one of None, 'relu', 'gelu'"),
        ({"residual": torch.zeros(4, 5)}, r"residual must be as x \(4, 4\), got \(4, 5\)"),
        ({"residual": torch.zeros(4, 4).double()}, "residual must be torch.float32 as x or float32"),
        ({"gain": torch.ones(3)}, r"gain must be \(S,\) with S a divisor of 4 rows, got \(3,\)"),
        ({"gain": torch.ones(2, requires_grad=True)}, "gain is a constant and has no gradient"),
        ({"shift": torch.ones(3)}, r"shift must be \(C,\)"),
        ({"eps": -1.0}, "eps must be a number of at least 0, got -1.0"),
        ({"backend": "cuda"}, "norm: backend 'cuda' cannot take this call: there is no such kernel"),
    ],
)
def test_refused(change, message):
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        batch_norm_act(**({"x": torch.zeros(4, 4)} | change))


# In a projection


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projection_by_kernel_and_by_modules(dtype):
    results = []
    for backend in ("auto", "reference"):
        torch.manual_seed(0)
        layer = Projection(12, 24, groups=2)
        x = torch.randn(4, 20, 12, requires_grad=True)
        with fer_kernels.use_backend(backend), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = layer(x)
        (y.float() * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
        results.append(
            [y.float(), x.grad, layer.norm.weight.grad, layer.linear.weight.grad, *layer.norm.buffers()]
        )
    for one, two in zip(*results, strict=True):
        scale = two.abs().max().item()
        torch.testing.assert_close(one, two, rtol=0, atol=(1e-5 if dtype == torch.float32 else 3e-2) * scale)


@pytest.mark.parametrize("norm", [nn.SyncBatchNorm, lambda c: nn.BatchNorm1d(c, momentum=None)])
def test_other_norms_stay_modules(norm):
    x = torch.randn(6, 8)
    assert not fuses(norm(8), nn.GELU(), x)
    assert not fuses(nn.BatchNorm1d(8), nn.SiLU(), x)
    assert not fuses(nn.BatchNorm1d(8), nn.GELU("tanh"), x)
    assert not fuses(nn.BatchNorm1d(8).eval(), nn.GELU(), x)
    assert not fuses(nn.BatchNorm1d(8), nn.GELU(), x[:1])
    for act in (nn.GELU(), nn.ReLU(), nn.Identity()):
        assert fuses(nn.BatchNorm1d(8), act, x) == ("cpu" in BACKENDS)


@pytest.mark.parametrize("act", [nn.GELU(), nn.ReLU(), nn.Identity(), nn.SiLU()])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("residual", [False, True])
def test_maps_by_kernel_and_by_modules(act, layout, residual):
    def run(backend: str) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        x, other = (
            torch.randn(3, 6, 4, 5, generator=generator).contiguous(memory_format=layout).requires_grad_()
            for _ in range(2)
        )
        norm = nn.BatchNorm2d(6)
        with fer_kernels.use_backend(backend):
            y = norm_act_maps(norm, act, x, residual=other if residual else None)
        (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
        assert y.is_contiguous(memory_format=layout)
        return [y, x.grad, norm.weight.grad, *norm.buffers(), *([other.grad] if residual else [])]

    for one, two in zip(run("auto"), run("reference"), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_residual_and_gain_of_a_projection():
    """In training by the kernel, in training by modules, and folded into the weights: one meaning."""
    layer = Projection(6, 8, groups=2, act=None)
    x, residual, gain = torch.randn(3, 7, 6), torch.randn(3, 7, 8), torch.tensor([0.0, 1.0, 2.5])
    for train, backend in ((True, "auto"), (True, "reference"), (False, "auto")):
        layer.train(train)
        with fer_kernels.use_backend(backend):
            expected = residual + gain.view(3, 1, 1) * layer(x)
            torch.testing.assert_close(layer(x, residual=residual, gain=gain), expected)
