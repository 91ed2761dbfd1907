"""normed_conv, and modules that chain by it: against float64, torch's own functions, and plain modules."""

from typing import Any

import hypothesis.strategies as st
import normed_oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from normed_oracle import ACTS, EPS, Problem, normed, row_norm
from support import backends
from torch import Tensor, nn

import fer_kernels
from fer_kernels import RowNorm, extension, normed_conv
from fer_kernels.conv import op
from fer_kernels.linear import op as linear_op
from fer_kernels.nn import conv_norm_act, maps
from fer_kernels.norm.op import ACTS as NUMBERED

BACKENDS = backends("conv")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
RUNS = [(b, t) for b in BACKENDS for t in (torch.float32, torch.bfloat16) if t in op.OPERATOR.dtypes[b]]
each_run = pytest.mark.parametrize("backend, dtype", RUNS)


class MapProblem(Problem):
    """`Problem`, of a map (images, height, width, channels)."""

    def __init__(
        self,
        shape,
        out,
        sides,
        stride=1,
        padding=0,
        norm=True,
        affine=True,
        act=None,
        seed=0,
        mean=0.0,
        **options,
    ):
        super().__init__(1, shape[3], 1, norm=norm, affine=affine, act=act, seed=seed, mean=mean, **options)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(shape, generator=generator).double() + mean
        self.leaves["x"] = x.to(self.dtype).double()
        self.leaves["weight"] = torch.randn(out, shape[3], *sides, generator=generator).double()
        self.stride, self.padding = stride, padding
        down, across = ((n + 2 * padding - s) // stride + 1 for n, s in zip(shape[1:3], sides, strict=True))
        grad = torch.randn(shape[0], down, across, out, generator=generator)
        statistics = (torch.randn(out, generator=generator).double() for _ in range(2))
        self.grads = grad.to(self.dtype).double(), *statistics

    def columns_of(self, t: Tensor) -> torch.Size:
        return t.shape[1:] if t.shape == self.leaves["weight"].shape else t.shape[-1:]


def eager(leaves: dict[str, Tensor], problem: MapProblem, noise: torch.Generator | None = None) -> tuple:
    """Products of numbers as x's dtype holds them, summed in float32: torch's bfloat16 has for maps of few
    pixels weights' gradients that differ from call to call."""
    x, weight = normed(problem, leaves, noise), leaves["weight"]
    maps, wide = x.permute(0, 3, 1, 2).to(weight.dtype), weight.to(x.dtype).to(weight.dtype)
    y = F.conv2d(maps, wide, stride=problem.stride, padding=problem.padding)
    y = y.permute(0, 2, 3, 1).to(x.dtype)
    var, mean = torch.var_mean(y.flatten(0, 2).to(weight.dtype), 0, correction=0)
    return y, mean, var


def ours(backend: str):
    def run(leaves, problem):
        options = {"norm": row_norm(problem, leaves), "stride": problem.stride, "padding": problem.padding}
        return normed_conv(leaves["x"], leaves["weight"], **options, backend=backend)

    return run


def check(problem: MapProblem, backend: str) -> None:
    normed_oracle.check(problem, eager, ours(backend))


@each_run
@settings(max_examples=60, deadline=None)
@given(
    images=st.integers(1, 3),
    size=st.tuples(st.integers(1, 12), st.integers(1, 30)),
    channels=st.integers(1, 40),
    out=st.integers(1, 40),
    sides=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    data=st.data(),
    kind=st.sampled_from(["plain", "norm", "affine"]),
    act=st.sampled_from(ACTS),
    seed=st.integers(0, 99),
)
def test_any_shape(backend, dtype, images, size, channels, out, sides, data, kind, act, seed):
    stride = data.draw(st.integers(1, min(sides)), "stride")
    padding = data.draw(st.integers(0, min(sides) - 1), "padding")
    assume(all(n + 2 * padding >= side for n, side in zip(size, sides, strict=True)))
    norm = kind != "plain"
    options = {"norm": norm, "affine": kind == "affine", "act": act if norm else None}
    check(
        MapProblem((images, *size, channels), out, sides, stride, padding, seed=seed, dtype=dtype, **options),
        backend,
    )


# Those of networks: windows side by side in whole tiles, lines longer than a stretch, narrow and wide pixels.
@each_run
@pytest.mark.parametrize(
    "shape, out, stride, norm",
    [
        ((2, 56, 56, 3), 24, 2, False),
        ((2, 56, 56, 24), 48, 2, True),
        ((2, 28, 28, 96), 50, 2, True),
        ((2, 27, 27, 96), 33, 2, True),
        ((2, 14, 14, 200), 40, 1, True),
        ((3, 7, 7, 64), 64, 1, True),
        ((1, 14, 14, 65), 70, 1, False),
    ],
)
def test_large(backend, dtype, shape, out, stride, norm):
    act = "gelu" if norm else None
    check(MapProblem(shape, out, (3, 3), stride, 1, norm=norm, act=act, mean=1.0, dtype=dtype), backend)


@pytest.mark.parametrize("act", ACTS)
def test_every_instruction_set(cpu_isas, act):
    for isa in cpu_isas.supported_isas():
        cpu_isas.set_isa(isa)
        check(MapProblem((2, 12, 12, 17), 37, (3, 3), 2, 1, act=act), "cpu")
        check(MapProblem((2, 6, 14, 16), 37, (3, 3), 1, 1, act=act), "cpu")


def test_the_same_bits_every_time_and_for_any_number_of_threads(two_threads):
    if "cpu" not in BACKENDS:
        pytest.skip("no kernel runs here")
    for dtype in (t for b, t in RUNS if b == "cpu"):
        problem = MapProblem((3, 28, 28, 24), 40, (3, 3), 2, 1, act="gelu", dtype=dtype)
        normed_oracle.check_same_bits(problem, ours("cpu"))


@each_run
@pytest.mark.parametrize("stride", [1, 2])
def test_what_statistics_add_is_not_lost_in_rounding(backend, dtype, stride):
    """As in test_normed_linear."""
    add, generator = 1e-3, torch.Generator().manual_seed(0)
    x = torch.randn(10, 64, 64, 24, generator=generator).to(dtype).requires_grad_()
    weight = torch.zeros(24, 24, 3, 3)
    weight[:, :, 1, 1] = torch.randn(24, 24, generator=generator).bfloat16()
    y, mean, _ = normed_conv(x, weight, stride=stride, padding=1, backend=backend)
    grad = torch.randn(y.shape, generator=generator).to(dtype)
    torch.autograd.backward([y, mean], [grad, torch.full((24,), add * y[..., 0].numel())])
    exact = weight[:, :, 1, 1].double()
    added = (x.grad[:, ::stride, ::stride].double() - grad.double() @ exact).flatten(0, 2).mean(0)
    expected = add * exact.sum(0)
    assert (added - expected).norm() <= 0.2 * expected.norm()


@each_run
def test_nan_stays_in_its_windows(backend, dtype):
    problem = MapProblem((2, 9, 9, 20), 12, (3, 3), 1, 1, act="gelu", dtype=dtype)
    problem.leaves["x"][1, 4, 5, 3] = torch.nan
    found = problem.run(ours(backend))
    spoilt = torch.zeros(2, 9, 9, dtype=torch.bool)
    spoilt[1, 3:6, 4:7] = True
    assert found["y"][spoilt].isnan().all() and found["y"][~spoilt].isfinite().all()
    assert found["y_mean"].isnan().all() and found["y_var"].isnan().all()


@each_backend
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.filterwarnings("ignore:Input .* is not a double precision")
def test_derivatives(backend, stride):
    problem = MapProblem((1, 4, 4, 2), 3, (3, 2), stride, 1, act="gelu")
    normed_oracle.check_derivatives(problem, ours, backend)


@each_run
def test_registration(backend, dtype):
    for norm in (True, False):
        problem = MapProblem((2, 5, 6, 4), 3, (3, 3), 2, 1, norm=norm, act="relu" if norm else None)
        leaf = {
            n: t.to(dtype if n == "x" else torch.float32).requires_grad_() for n, t in problem.leaves.items()
        }
        inputs = [leaf["x"], leaf["weight"].permute(0, 2, 3, 1)]
        inputs += [leaf.get(name) for name in ("mean", "var", "scale", "shift")]
        constants = (2, 1, EPS, NUMBERED.index(problem.act))
        torch.library.opcheck(op.OPERATOR.registered[backend], (*inputs, *constants))
        y, mean, _ = op.OPERATOR.registered[backend](*inputs, *constants)
        grads = [problem.grads[0].to(dtype), *(g.float() for g in problem.grads[1:])]
        plain = [None if t is None else t.detach() for t in inputs]
        for need in ((True, True), (True, False), (False, True)):
            back = (*grads, *plain, y.detach(), mean.detach(), *constants, *need)
            torch.library.opcheck(op._BACKWARD[backend], back)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"x": torch.zeros(4, 4, 6)},
            r"x must be \(B, H, W, C\) and not empty, got \(4, 4, 6\)",
        ),
        ({"x": torch.zeros(0, 4, 4, 6)}, r"and not empty, got \(0, 4, 4, 6\)"),
        ({"x": torch.zeros(2, 0, 4, 6), "padding": 2}, r"and not empty, got \(2, 0, 4, 6\)"),
        (
            {"x": torch.zeros(1, 4, 4, 6).int()},
            "x must be float32, float64, bfloat16 or float16, got torch.int32",
        ),
        ({"weight": torch.ones(8, 5, 3, 3)}, r"weight must be \(C_out, C, high, wide\) with C = 6"),
        ({"weight": torch.ones(8, 6, 3)}, r"weight must be \(C_out, C, high, wide\)"),
        ({"weight": torch.ones(8, 6, 3, 3).double()}, "weight must be torch.float32 as x or torch.float32"),
        (
            {"weight": torch.ones(8, 6, 5, 3)},
            r"x \(2, 4, 4, 6\) with padding = 0 is smaller than the weight's",
        ),
        ({"stride": 0}, "stride must be"),
        ({"stride": 4}, "stride must be at most 3, a side of the weight, got 4"),
        ({"padding": 3}, "padding must be an int from 0 to 2"),
        ({"padding": -1}, "padding must be an int from 0 to 2"),
        ({"padding": "same"}, "padding must be an int from 0 to 2.*got 'same'"),
        ({"norm": RowNorm(torch.zeros(6), torch.ones(5))}, r"norm.var must be \(6,\)"),
        ({"norm": (1, 2)}, "norm must be a RowNorm, got tuple"),
        ({"backend": "cuda"}, "conv: backend 'cuda' cannot take this call"),
    ],
)
def test_bad_input(change, message):
    arguments = {"x": torch.zeros(2, 4, 4, 6), "weight": torch.ones(8, 6, 3, 3)} | change
    with pytest.raises((ValueError, TypeError, fer_kernels.dispatch.BackendError), match=message):
        normed_conv(**arguments)


def test_direct_calls_stay_in_their_memory():
    """What the Python front would refuse, of torch's operator itself."""
    if "cpu" not in BACKENDS:
        pytest.skip("no kernel runs here")
    x, weight = torch.zeros(1, 4, 4, 6), torch.zeros(8, 3, 3, 6)
    for change in (
        {"x": x[0]},
        {"weight": weight[..., :5]},
        {"stride": 4},
        {"padding": 3},
        {"x": x[:, :2]},
        {"x": x[:0]},
        {"x": x[:, :0], "padding": 2},
        {"mean": torch.zeros(5), "var": torch.zeros(5)},
    ):
        given = {"x": x, "weight": weight, "mean": None, "var": None, "stride": 1, "padding": 0} | change
        with pytest.raises(RuntimeError):
            torch.ops.fer_kernels.conv(
                *(given[name] for name in ("x", "weight", "mean", "var")),
                None,
                None,
                given["stride"],
                given["padding"],
                1e-5,
                0,
            )


# ---- modules ----


@pytest.fixture
def chained(monkeypatch):
    """A switch: whether convolutions leave norms to those that take their results, wherever a kernel runs."""
    if "cpu" not in BACKENDS:
        pytest.skip("no kernel runs here")

    def switch(on: bool) -> None:
        def chain_dtype(x: Tensor, weight: Tensor) -> torch.dtype | None:
            dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype
            return dtype if on and dtype in op.OPERATOR.dtypes["cpu"] else None

        monkeypatch.setattr(maps, "chain_dtype", chain_dtype)

    for limit in ("NARROW", "IMAGE"):
        monkeypatch.setattr(maps, limit, 1000)
    switch(True)
    return switch


def stems() -> Any:
    """The modules of fer_models that chain, where that and what it needs are installed."""
    return pytest.importorskip("fer_models.layers.stem", exc_type=ImportError)


def sequence() -> nn.Module:
    layers = [nn.Conv2d(5, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    layers += [
        nn.Conv2d(16, 24, 3, 1, 1),
        nn.BatchNorm2d(24),
        nn.Conv2d(24, 16, 2),
        nn.BatchNorm2d(16),
        nn.GELU(),
    ]
    return stems().ConvSequence(*layers, nn.MaxPool2d(2))


NETWORKS = {
    "sequence": (sequence, 5),
    "stem": (lambda: stems().ConvStem(3, (12, 24, 24), (2, 2, 1)), 3),
    "tapped": (lambda: stems().ConvStem(3, (12, 24, 24), (2, 2, 1), taps=(0, 1)), 3),
    "blocks": (lambda: stems().ConvStem(3, (12, 24), (2, 2), blocks=(1, 2)), 3),
    "residual": (lambda: stems().Residual(20), 20),
}


def run(kind: str, x: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """The maps, and all gradients and buffers, of a network of random norms."""
    torch.manual_seed(seed)
    network = NETWORKS[kind][0]().to(x.dtype).train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    x = x.clone(memory_format=torch.channels_last).requires_grad_()
    outputs = network.maps(x) if hasattr(network, "maps") else [network(x)]
    torch.autograd.backward(outputs, [torch.randn(y.shape).to(y.dtype) for y in outputs])
    # A convolution's bias has no gradient but rounding, before a norm.
    biases = {id(module.bias) for module in network.modules() if isinstance(module, nn.Conv2d)}
    gradients = {f"d{name}": p.grad for name, p in network.named_parameters() if id(p) not in biases}
    found = {f"y{i}": y.detach() for i, y in enumerate(outputs)} | {"dx": x.grad} | gradients
    return found | dict(network.named_buffers())


@pytest.mark.parametrize("kind", NETWORKS)
def test_chained_or_not_is_the_same(kind, chained, monkeypatch):
    x = torch.randn(3, NETWORKS[kind][1], 20, 20, generator=torch.Generator().manual_seed(0))
    calls = []
    real = maps.normed_conv
    monkeypatch.setattr(maps, "normed_conv", lambda *a, **k: calls.append(1) or real(*a, **k))
    one = run(kind, x)
    assert calls
    chained(False)
    del calls[:]
    other = run(kind, x)
    assert not calls and one.keys() == other.keys()
    for name, value in one.items():
        scale = max(1.0, other[name].abs().max().item())
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-5 * scale)
        assert value.stride() == other[name].stride()


@pytest.mark.skipif("cpu" not in BACKENDS or not extension.BFLOAT16_PRODUCTS, reason="no kernel for bfloat16")
@pytest.mark.parametrize("kind", NETWORKS)
def test_chained_under_autocast(kind, chained):
    """As far from float32 as the same modules without a chain, or nearer, over some draws; same dtypes."""

    def draw(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
        x = torch.randn(8, NETWORKS[kind][1], 24, 24, generator=torch.Generator().manual_seed(seed))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return run(kind, x.bfloat16().float(), seed)

    normed_oracle.as_near(draw, chained)


@pytest.mark.parametrize(
    "change",
    [
        {"groups": 2},
        {"dilation": 2},
        {"padding_mode": "reflect"},
        {"padding": "same"},
        {"padding": (1, 0)},
        {"stride": (1, 2)},
        {"kernel_size": 1, "stride": 2, "padding": 0},
        {"padding": 3},
    ],
    ids=str,
)
def test_other_convolutions_are_torchs(change, chained):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, **{"kernel_size": 3, "padding": 1} | change)
    norm, x = nn.BatchNorm2d(16), torch.randn(2, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    expected = F.relu(nn.BatchNorm2d(16)(conv(x)))
    torch.testing.assert_close(conv_norm_act(conv, norm, nn.ReLU(), x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "channels, stride, takes", [(3, 1, True), (24, 1, False), (24, 2, True), (96, 2, True), (128, 2, False)]
)
def test_which_convolutions_are_ours(channels, stride, takes, monkeypatch):
    if "cpu" not in BACKENDS:
        pytest.skip("no kernel runs here")
    monkeypatch.setattr(extension, "FAST_PRODUCTS", "avx512")
    calls = []
    real = maps.normed_conv
    monkeypatch.setattr(maps, "normed_conv", lambda *a, **k: calls.append(1) or real(*a, **k))
    x = torch.randn(1, channels, 40, 40).contiguous(memory_format=torch.channels_last)
    conv_norm_act(nn.Conv2d(channels, 24, 3, stride, 1), nn.BatchNorm2d(24), None, x)
    assert bool(calls) == takes


def test_hooks_see_maps(chained):
    torch.manual_seed(0)
    stem, seen = stems().ConvStem(3, (12, 24), (2, 2)), []
    stem.convs[3].register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    x = torch.randn(2, 3, 16, 16)
    y = stem(x)
    ((before, after),) = seen
    assert before.shape == (2, 12, 8, 8) and after.shape == (2, 24, 4, 4)
    chained(False)
    torch.testing.assert_close(stem(x), y, rtol=1e-4, atol=1e-5)


def test_a_residual_is_never_left_unfinished(chained):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(8, 16, 3, 1, 1), nn.BatchNorm2d(16)
    x, residual = (torch.randn(2, c, 9, 9).contiguous(memory_format=torch.channels_last) for c in (8, 16))
    found = conv_norm_act(conv, norm, nn.ReLU(), x, residual=residual, unfinished=True)
    expected = F.relu(nn.BatchNorm2d(16)(conv(x)) + residual)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_evaluation_and_narrow_maps_are_as_ever(chained):
    """The tracked statistics count; and a map of one pixel has none of its own, as torch says."""
    stem = stems().ConvStem(3, (12, 24), (2, 2)).eval()
    x = torch.randn(2, 3, 16, 16)
    expected = nn.Sequential.forward(stem.convs, x).permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(stem(x), expected)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        stems().ConvStem(3, (12, 24), (2, 2)).train()(torch.randn(1, 3, 4, 4))


def test_where_modules_chain(monkeypatch):
    """By the size of windows, where this processor's products are the faster ones."""
    monkeypatch.setattr(extension, "FAST_PRODUCTS", "avx512")
    x = torch.randn(1, 40, 40, 3)
    here = torch.float32 if "cpu" in BACKENDS else None
    assert linear_op.chain_dtype(x, torch.randn(24, 3, 3, 3)) == here
    assert linear_op.chain_dtype(x, torch.randn(24, 3, 1, 1)) is None
    assert linear_op.chain_dtype(x, torch.randn(8, 3, 3, 3)) is None
    assert linear_op.chain_dtype(x[:, :20], torch.randn(24, 3, 3, 3)) is None
