"""norm against float64, torch's own two functions in the same dtype, and itself."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from support import backends
from torch import Tensor, nn

import fer_kernels
from fer_kernels import batch_norm_act
from fer_kernels.nn import Projection

BACKENDS = backends("norm")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
EPS = 1e-5


def eager(x: Tensor, weight: Tensor | None, bias: Tensor | None, act: str | None) -> Tensor:
    y = F.batch_norm(x, None, None, weight, bias, True, 0.1, EPS)
    return F.gelu(y) if act else y


def ours(backend: str):
    return lambda x, weight, bias, act: batch_norm_act(x, weight, bias, act=act, eps=EPS, backend=backend)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


class Problem:
    """x, weight, bias and y's gradient, exact in `dtype`."""

    def __init__(self, rows: int, channels: int, dtype: torch.dtype, act=None, affine=True, seed=0, mean=0.0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, like: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(like).double()

        self.x = (draw(rows, channels) * 2 + mean).to(dtype).double()
        self.weight, self.bias = (draw(channels, like=wide(dtype)) if affine else None for _ in range(2))
        self.grad = draw(rows, channels)
        self.dtype, self.act = dtype, act

    def run(self, function, dtype: torch.dtype) -> list[Tensor]:
        """y and the gradients of x, weight and bias."""
        leaves = [
            None if t is None else t.to(like).clone().requires_grad_()
            for t, like in ((self.x, dtype), (self.weight, wide(dtype)), (self.bias, wide(dtype)))
        ]
        y = function(*leaves, self.act)
        y.backward(self.grad.to(dtype))
        assert y.dtype == dtype and y.is_contiguous()
        return [y.detach().double(), *(leaf.grad.double() for leaf in leaves if leaf is not None)]

    def scales(self) -> list[Tensor]:
        """Of each result by channel: of sums, what is summed, for the sums themselves may cancel."""
        one = torch.ones(())
        weight = one if self.weight is None else self.weight.abs()
        bias = one * 0 if self.bias is None else self.bias.abs()
        rstd = torch.rsqrt(self.x.var(0, correction=0) + EPS)
        size = self.grad.square().mean(0).sqrt()
        return [weight + bias, weight * rstd * size, size * len(self.x), size * len(self.x)]


def check(problem: Problem, backend: str) -> None:
    truth = problem.run(eager, torch.float64)
    theirs, found = (problem.run(f, problem.dtype) for f in (eager, ours(backend)))
    # torch's may happen to be exact. A value is rounded four times on its way, by half a unit each, the mean
    # by half a unit of its own size; and in float64 the truth rounds too.
    lost = (problem.x.mean(0).abs() * torch.rsqrt(problem.x.var(0, correction=0) + EPS)).max().item()
    unit = torch.finfo(problem.dtype).eps * (2 + lost) * (4 if problem.dtype == torch.float64 else 1)
    for name, t, e, o, scale in zip(
        ["y", "dx", "dw", "db"], truth, theirs, found, problem.scales(), strict=False
    ):
        errors = [((value - t) / scale).square().mean().sqrt().item() for value in (e, o)]
        assert errors[1] <= 2 * errors[0] + unit, (name, errors)


@each_backend
@settings(max_examples=60)
@given(
    rows=st.integers(2, 200),
    channels=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    act=st.sampled_from([None, "gelu"]),
    affine=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_agrees_with_float64(backend, rows, channels, dtype, act, affine, seed):
    check(Problem(rows, channels, dtype, act, affine, seed), backend)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", [None, "gelu"])
def test_sizes_of_networks(backend, dtype, act):
    check(Problem(3136, 192, dtype, act), backend)


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
        for act in (None, "gelu"):
            found[isa, act] = Problem(130, 37, torch.float32, act).run(ours("cpu"), torch.float32)
    for (_, act), results in found.items():
        for one, two in zip(results, found["baseline", act], strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_for_any_number_of_threads(dtype, two_threads):
    if "cpu" not in BACKENDS:
        pytest.skip("no compiled kernel")
    problem = Problem(1000, 50, dtype, "gelu")
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
    for act in (None, "gelu"):
        torch.manual_seed(0)
        x, w, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((6, 3), (3,), (3,)))

        def run(x, w, b, act=act):
            return batch_norm_act(x, w, b, act=act, backend=backend)

        assert torch.autograd.gradcheck(run, (x, w, b))
        assert torch.autograd.gradgradcheck(run, (x, w, b))
        assert torch.autograd.gradcheck(lambda x, run=run: run(x, None, None), (x,))


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


def test_saves_its_input_alone():
    kept = []
    x = torch.randn(100, 8, requires_grad=True)
    weight = torch.ones(8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        batch_norm_act(x, weight, weight, act="gelu")
    assert [t.data_ptr() for t in kept if t.numel() > 8] == [x.data_ptr()]


@each_backend
def test_strides_and_registration(backend):
    x = torch.randn(40, 12).T.requires_grad_()
    plain = x.detach().contiguous().requires_grad_()
    for t in (x, plain):
        batch_norm_act(t, act="gelu", backend=backend).square().sum().backward()
    torch.testing.assert_close(x.grad, plain.grad)
    for act in (False, True):
        inputs = (torch.randn(9, 5, requires_grad=True), torch.ones(5, requires_grad=True), None, EPS, act)
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
        ({"act": "relu"}, "unknown act 'relu': expected one of None, 'gelu'"),
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
def test_other_norms_stay_modules(norm, monkeypatch):
    layer = Projection(4, 8, groups=1, norm=norm, act="gelu")
    assert not layer._fuses(torch.randn(6, 8))
    assert not Projection(4, 8, groups=1, act="relu")._fuses(torch.randn(6, 8))
    assert not Projection(4, 8, groups=1, act=None)._fuses(torch.randn(6, 8))
    assert Projection(4, 8, groups=1)._fuses(torch.randn(6, 8)) == ("cpu" in BACKENDS)
    assert not Projection(4, 8, groups=1).eval()._fuses(torch.randn(6, 8))
