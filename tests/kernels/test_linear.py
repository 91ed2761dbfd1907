"""linear against float64, torch's own product in the same dtype, and itself."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from support import backends
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fer_kernels
from fer_kernels import extension, linear
from fer_kernels.linear import op
from fer_kernels.nn import GroupedLinear, interleave

BACKENDS = backends("linear")
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def eager(x: Tensor, m: Tensor | None, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    nodes = x if m is None else interleave(x, m)
    return F.linear(nodes, torch.block_diag(*weight.chunk(groups)), bias)


class Problem:
    """x, m, weight, bias and y's gradient, in float32."""

    def __init__(self, rows, width, out, groups=1, m=False, bias=False, seed=0, spread=0.0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:  # magnitudes apart by e to the power of `spread`
            numbers = torch.randn(*shape, generator=generator)
            return numbers * torch.exp(spread * torch.randn(*shape, generator=generator))

        self.groups = groups
        self.x = draw(rows, groups * width)
        self.m = draw(rows, groups * width) if m else None
        self.weight = draw(groups * out, width * (2 if m else 1))
        self.bias = draw(groups * out) if bias else None
        self.grad = draw(rows, groups * out)

    def run(self, function, dtype=torch.float32) -> dict[str, Tensor]:
        given = {"x": self.x, "m": self.m, "weight": self.weight, "bias": self.bias}
        leaves = {n: None if t is None else t.to(dtype, copy=True).requires_grad_() for n, t in given.items()}
        y = function(*leaves.values(), self.groups)
        y.backward(self.grad.to(dtype))
        assert y.dtype == dtype and y.is_contiguous()
        found = {f"d{n}": leaf.grad for n, leaf in leaves.items() if leaf is not None}
        return {n: t.double() for n, t in {"y": y.detach(), **found}.items()}

    def scales(self) -> dict[str, Tensor]:
        """Of each result: the 2-norm of the products that it is the sum of."""
        squares = Problem.__new__(Problem)
        squares.groups = self.groups
        for name, tensor in vars(self).items():
            if isinstance(tensor, Tensor):
                setattr(squares, name, tensor.double().square())
            elif name != "groups":
                setattr(squares, name, None)
        return {name: t.sqrt() for name, t in squares.run(eager, torch.float64).items()}


def ours(backend: str):
    def run(x, m, weight, bias, groups):
        return linear(x, weight, bias, m=m, groups=groups, backend=backend)

    return run


def check(problem: Problem, backend: str) -> None:
    """Twice what torch's float32 is off by and half a unit, for sums of one term, as a root mean square over
    results enough for one; and each by no more than roundings may come to: 8 of the largest, and one for
    every term in a random walk, doubled."""
    truth, scales = problem.run(eager, torch.float64), problem.scales()
    theirs, found = problem.run(eager), problem.run(ours(backend))
    unit = torch.finfo(torch.float32).eps / 2
    rows, width, out = len(problem.x), problem.weight.shape[1], problem.weight.shape[0] // problem.groups
    terms = {"y": width + 1, "dx": out, "dm": out, "dweight": rows, "dbias": rows}
    for name, expected in truth.items():
        if not expected.numel():
            continue
        scale = scales[name] + expected.abs() + torch.finfo(torch.float32).tiny
        off, peer = ((result[name] - expected) / scale for result in (found, theirs))
        assert off.abs().max().item() <= unit * (8 + 2 * terms[name] ** 0.5), name
        if expected.numel() >= 1000:
            rms = 2 * peer.square().mean().sqrt().item() + unit / 2
            assert off.square().mean().sqrt().item() <= rms, name


@each_backend
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 150),
    width=st.integers(1, 70),
    out=st.integers(1, 70),
    groups=st.integers(1, 4),
    m=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 99),
    spread=st.sampled_from([0.0, 1.0, 4.0]),
)
def test_any_shape(backend, rows, width, out, groups, m, bias, seed, spread):
    check(Problem(rows, width, out, groups, m, bias, seed, spread), backend)


# Over the bounds at which the kernel turns to something else: rows of a turn and of a part, steps at once, a
# weight that does not stay in the cache, blocks of a panel; and every combination of full and narrow tiles.
LARGE = [
    (2100, 96, 96, 1, False),
    (1030, 300, 40, 1, False),
    (515, 64, 1100, 1, False),
    (300, 500, 900, 1, False),
    (129, 1000, 200, 1, False),
    (1500, 48, 96, 4, True),
    (260, 33, 500, 3, True),
    (3, 2000, 17, 1, True),
]


@each_backend
@pytest.mark.parametrize("rows, width, out, groups, m", LARGE)
def test_large(backend, rows, width, out, groups, m):
    check(Problem(rows, width, out, groups, m, bias=True), backend)


@each_backend
def test_a_number_is_the_sum_of_its_pieces(backend):
    """Times one, every number comes out as it went in: all 24 bits are multiplied."""
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * 1e4
    x[0, :5] = torch.tensor([1 + 2**-23, 1 - 2**-24, 3.0e38, 1e-30, -0.0])
    x.requires_grad_()
    y = linear(x, torch.eye(40), backend=backend)
    y.backward(x.detach())
    assert torch.equal(y, x) and torch.equal(x.grad, x)


@each_backend
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row(backend, value):
    x, weight = torch.randn(90, 40), torch.randn(30, 40)
    clean = linear(x, weight, backend=backend)
    x[70, 3] = value
    y = linear(x, weight, backend=backend)
    rest = torch.arange(90) != 70
    assert not y[70].isfinite().any() and torch.equal(y[rest], clean[rest])
    weight[7, 5] = value
    y = linear(x[rest], weight, backend=backend)
    assert not y[:, 7].isfinite().any() and y.isfinite().sum() == 89 * 29
    of_weight = weight.clone().requires_grad_()
    linear(x, of_weight, backend=backend).backward(torch.ones(90, 30))
    assert (~of_weight.grad.isfinite()).any(0).tolist() == [c == 3 for c in range(40)]


def test_the_same_bits_every_time_and_for_any_number_of_threads(two_threads):
    if "cpu" not in BACKENDS:
        pytest.skip("no kernel runs here")
    for shape in ((2500, 70, 100, 1, False), (700, 20, 40, 4, True), (100, 600, 500, 1, False)):
        problem = Problem(*shape)
        expected = problem.run(ours("cpu"))
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            for _ in range(5):
                for name, found in problem.run(ours("cpu")).items():
                    assert torch.equal(found, expected[name]), (shape, threads, name)


@each_backend
@pytest.mark.filterwarnings("ignore:Input .* is not a double precision")
def test_derivatives(backend):
    torch.manual_seed(0)
    dtype = torch.float64 if backend == "reference" else torch.float32
    options = {} if backend == "reference" else {"eps": 1e-2, "atol": 1e-2, "rtol": 1e-3, "nondet_tol": 0}

    def leaf(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    x, m, weight, bias = leaf(5, 4), leaf(5, 4), leaf(6, 4), leaf(6)

    def run(x, weight, bias, m=None):
        return linear(x, weight, bias, m=m, groups=1 if m is None else 2, backend=backend)

    for inputs in ((x, weight, bias), (x, weight, bias, m)):
        assert torch.autograd.gradcheck(run, inputs, **options)
        assert torch.autograd.gradgradcheck(run, inputs, **options)


@each_backend
@pytest.mark.parametrize("wanted", ["x", "m", "weight", "bias"])
def test_only_what_is_wanted(backend, wanted):
    problem = Problem(40, 10, 12, groups=2, m=True, bias=True)
    leaves = {name: getattr(problem, name).clone() for name in ("x", "m", "weight", "bias")}
    leaves[wanted].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = linear(leaves["x"], leaves["weight"], leaves["bias"], m=leaves["m"], groups=2, backend=backend)
    needed = {"x": {"weight"}, "m": {"weight"}, "weight": {"x", "m"}, "bias": set()}[wanted]
    assert {t.data_ptr() for t in kept} == {leaves[name].data_ptr() for name in needed}
    y.backward(problem.grad)
    expected = problem.run(eager, torch.float64)[f"d{wanted}"]
    torch.testing.assert_close(leaves[wanted].grad.double(), expected, rtol=1e-5, atol=1e-4)


@each_backend
def test_shapes_strides_and_registration(backend):
    x, weight, m = torch.randn(3, 5, 12), torch.randn(8, 6), torch.randn(3, 12, 5).mT
    y = linear(x, weight, m=m.contiguous(), groups=4, backend=backend)
    assert y.shape == (3, 5, 8)
    strided = (x.mT.contiguous().mT, weight.T.contiguous().T)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(y, linear(*strided, m=m, groups=4, backend=backend))
    grad = torch.randn(7, 8)
    for other in (None, torch.randn(7, 12, requires_grad=True)):
        of_weight = torch.randn(8, 3 if other is None else 6, requires_grad=True)
        for bias in (None, torch.randn(8, requires_grad=True)):
            inputs = (torch.randn(7, 12, requires_grad=True), other, of_weight, bias, 4)
            torch.library.opcheck(op.OPERATOR.registered[backend], inputs)
        back = (grad, *(None if t is None else t.detach() for t in inputs[:3]), 4)
        for need in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(op._BACKWARD[backend], (*back, *need))


def test_compiles_whole():
    run = torch.compile(lambda x, w: linear(x, w).relu(), fullgraph=True)
    x, weight = torch.randn(2, 30, 20), torch.randn(10, 20)
    torch.testing.assert_close(run(x, weight), linear(x, weight).relu())


def test_modules_take_the_kernel_where_it_is_faster(monkeypatch):
    calls = []
    monkeypatch.setattr(fer_kernels.nn.conv, "linear", lambda *a, **k: calls.append(1) or linear(*a, **k))
    width = max(op.WIDTH, 32)
    layer = GroupedLinear(2 * width, width, groups=4)
    x, m = torch.randn(2, op.ROWS // 2, width), torch.randn(2, op.ROWS // 2, width)
    with fer_kernels.use_backend("auto"):
        y = layer.interleaved(x, m)
        assert len(calls) == (extension.FAST_PRODUCTS is not None)
        torch.testing.assert_close(y, eager(x, m, layer.weight, layer.bias, 4))
        mixed = layer.interleaved(x, m.bfloat16())
        torch.testing.assert_close(mixed, y, rtol=0.02, atol=0.1)
    del calls[:]
    layer.interleaved(x[:, 1:], m[:, 1:])
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.interleaved(x, m).dtype == torch.bfloat16
    layer.bfloat16().interleaved(x.bfloat16(), m.bfloat16())
    layer.float()
    with fer_kernels.use_backend("reference"):
        layer.interleaved(x, m)
    parameters = dict(layer.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, (interleave(x, m),)).square().mean()

    slopes = torch.func.grad(loss)(parameters)
    assert slopes.keys() == parameters.keys()
    _, moved = torch.func.jvp(loss, (parameters,), (slopes,))
    assert moved > 0
    with FlopCounterMode(display=False) as counter:
        layer.interleaved(x, m)
    assert counter.get_total_flops() == 2 * op.ROWS * layer.weight.numel()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        layer.interleaved(x, m)
    finally:
        torch.set_float32_matmul_precision(before)
    assert not calls


def test_modules_do_without_it_where_another_backend_is_asked_for(monkeypatch):
    monkeypatch.setattr(extension, "FAST_PRODUCTS", "avx512")
    x, weight = torch.randn(op.ROWS, 96), torch.randn(96, 96)
    layer = GroupedLinear(96, 96, groups=1)
    for wish in ("reference", "triton", "cuda"):
        with fer_kernels.use_backend(wish):
            assert not op.is_faster(x, weight) and op.chain_dtype(x, weight) is None
            layer(x)
    assert op.is_faster(x, weight) == ("cpu" in BACKENDS)
    assert op.chain_dtype(x, weight) == (torch.float32 if "cpu" in BACKENDS else None)
    monkeypatch.setattr(extension, "FAST_PRODUCTS", "amx")
    assert op.chain_dtype(x, weight) is None
    monkeypatch.setattr(extension, "FAST_PRODUCTS", None)
    assert not op.is_faster(x, weight)


@pytest.mark.parametrize(
    "shape", [(700, 70, 100, 1, False, True), (333, 20, 40, 4, True, False), (30, 9, 5, 1)]
)
def test_every_instruction_set(cpu_isas, shape):
    for isa in cpu_isas.supported_isas():
        cpu_isas.set_isa(isa)
        check(Problem(*shape), "cpu")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(4)}, r"x must be \(..., C_in\) .*got \(4,\)"),
        ({"x": torch.zeros(4, 7)}, r"C_in divisible by groups = 2, got \(4, 7\)"),
        ({"x": torch.zeros(4, 6, dtype=torch.int64)}, "x must be float32, float64"),
        ({"x": [1.0]}, "x must be a tensor, got list"),
        ({"weight": None}, "weight must be a tensor, got NoneType"),
        ({"weight": torch.ones(8, 6)}, r"weight must be \(C_out, 3\) .*got \(8, 6\)"),
        ({"weight": torch.ones(7, 3)}, r"C_out divisible by groups = 2 .*got \(7, 3\)"),
        ({"weight": torch.ones(8, 3).double()}, "weight must be torch.float32 as x, got torch.float64"),
        ({"bias": torch.ones(7)}, r"bias must be \(8,\), got \(7,\)"),
        ({"m": torch.ones(4, 6)}, r"weight must be \(C_out, 6\) .*and m\), got \(8, 3\)"),
        ({"m": torch.ones(4, 5), "weight": torch.ones(8, 6)}, r"m must be as x \(4, 6\), got \(4, 5\)"),
        ({"groups": 0}, "groups must be"),
        ({"backend": "triton"}, "linear: backend 'triton' cannot take this call: there is no such kernel"),
    ],
)
def test_bad_input(change, message):
    arguments = {"x": torch.zeros(4, 6), "weight": torch.ones(8, 3), "groups": 2} | change
    with pytest.raises((ValueError, TypeError, fer_kernels.dispatch.BackendError), match=message):
        linear(**arguments)
