"""normed_linear, and norms by its statistics: against float64, torch's own functions, and plain modules."""

import hypothesis.strategies as st
import normed_oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from normed_oracle import ACTS, EPS, GELU_OFF, Problem, normed, row_norm
from support import backends
from torch import Tensor, nn

import fer_kernels
from fer_kernels import RowNorm, batch_norm_act, extension, normed_linear
from fer_kernels.linear import op
from fer_kernels.nn import DilatedKnnGraph, DynamicGraphConv, MaxRelativeConv, Projection, RelationConv, conv
from fer_kernels.nn.conv import Unfinished
from fer_kernels.norm import op as norm_op

BACKENDS = backends("linear")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
RUNS = [(b, t) for b in BACKENDS for t in (torch.float32, torch.bfloat16) if t in op.NORMED.dtypes[b]]
each_run = pytest.mark.parametrize("backend, dtype", RUNS)


def eager(leaves: dict[str, Tensor], problem: Problem, noise: torch.Generator | None = None) -> tuple:
    """What is multiplied is of x's dtype; norms and statistics are computed in what accumulates that."""
    x, weight, wide = normed(problem, leaves, noise), leaves["weight"], leaves["weight"].dtype
    if "m" in leaves:
        x = torch.stack((x, leaves["m"]), -1).flatten(-2)
    y = F.linear(x, torch.block_diag(*weight.chunk(problem.groups)).to(x.dtype))
    var, mean = torch.var_mean(y.to(wide), 0, correction=0)
    return y, mean, var


def ours(backend: str):
    def run(leaves, problem):
        norm = row_norm(problem, leaves)
        options = {"norm": norm, "m": leaves.get("m"), "groups": problem.groups, "backend": backend}
        return normed_linear(leaves["x"], leaves["weight"], **options)

    return run


def check(problem: Problem, backend: str) -> None:
    normed_oracle.check(problem, eager, ours(backend))


@each_run
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 150),
    width=st.integers(1, 70),
    out=st.integers(1, 70),
    groups=st.integers(1, 3),
    kind=st.sampled_from(["plain", "m", "norm", "affine"]),
    act=st.sampled_from(ACTS),
    seed=st.integers(0, 99),
)
def test_any_shape(backend, dtype, rows, width, out, groups, kind, act, seed):
    norm = kind in ("norm", "affine")
    options = {"norm": norm, "m": kind == "m", "affine": kind == "affine", "act": act if norm else None}
    check(Problem(rows, width, out, groups, seed=seed, dtype=dtype, **options), backend)


# Beyond a chunk of rows, a stretch of a sum, a block of a weight's gradient and its panels at once.
@each_run
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("rows, width, out", [(1701, 401, 70), (300, 500, 33), (130, 48, 450)])
def test_large(backend, dtype, rows, width, out, act):
    check(Problem(rows, width, out, act=act, mean=5.0, dtype=dtype), backend)


@pytest.mark.parametrize("act", ACTS)
def test_every_instruction_set(cpu_isas, act):
    for isa in cpu_isas.supported_isas():
        cpu_isas.set_isa(isa)
        check(Problem(260, 70, 37, groups=2, act=act), "cpu")


def test_the_same_bits_every_time_and_for_any_number_of_threads(two_threads):
    if "cpu" not in BACKENDS:
        pytest.skip("no kernel runs here")
    problems = [Problem(2500, 70, 100, act="gelu"), Problem(700, 20, 40, groups=4, norm=False, m=True)]
    if torch.bfloat16 in op.NORMED.dtypes["cpu"]:
        problems.append(Problem(2501, 71, 100, act="gelu", dtype=torch.bfloat16))
    for problem in problems:
        normed_oracle.check_same_bits(problem, ours("cpu"))


@each_run
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row(backend, dtype, value):
    problem = Problem(200, 40, 30, act="gelu", dtype=dtype)
    problem.leaves["x"][70, 3] = value
    found = problem.run(ours(backend))
    rest = torch.arange(200) != 70
    assert found["y"][70].isnan().all() or value == torch.inf
    assert found["y"][rest].isfinite().all()
    assert not found["y_mean"].isfinite().any() and not found["y_var"].isfinite().any()


@each_run
def test_what_statistics_add_is_not_lost_in_rounding(backend, dtype):
    """Over many rows it is less than half a unit in the last place of each, and more than all their noise."""
    rows, add = 40_000, 1e-3
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(rows, 48, generator=generator) for _ in range(2))
    x, grad = (x + 1).to(dtype).requires_grad_(), grad.to(dtype)
    weight = torch.randn(48, 48, generator=generator).bfloat16().float().requires_grad_()
    y, mean, _ = normed_linear(x, weight, backend=backend)
    torch.autograd.backward([y, mean], [grad, torch.full((48,), add * rows)])
    exact = weight.detach().double()
    added, expected = (x.grad.double() - grad.double() @ exact).mean(0), add * exact.sum(0)
    assert (added - expected).norm() <= 0.2 * expected.norm()
    of_weight = weight.grad.double() - grad.double().T @ x.double()
    expected = add * x.double().sum(0).expand(48, 48)
    assert (of_weight - expected).norm() <= 0.2 * expected.norm()


@each_backend
@pytest.mark.parametrize("kind", ["norm", "m"])
@pytest.mark.filterwarnings("ignore:Input .* is not a double precision")
def test_derivatives(backend, kind):
    problem = Problem(
        6, 4, 3, groups=2, norm=kind == "norm", m=kind == "m", act="gelu" if kind == "norm" else None
    )
    normed_oracle.check_derivatives(problem, ours, backend)


@each_run
def test_registration(backend, dtype):
    for problem in (Problem(7, 6, 4, act="relu"), Problem(7, 6, 4, norm=False, m=True, groups=2)):
        leaf = {n: t.to(dtype if n in ("x", "m") else torch.float32) for n, t in problem.leaves.items()}
        leaf = {n: t.requires_grad_() for n, t in leaf.items()}
        names = ("x", "m", "weight", "mean", "var", "scale", "shift")
        inputs = [leaf.get(name) for name in names]
        constants = (problem.groups, EPS, norm_op.ACTS.index(problem.act))
        torch.library.opcheck(op._NORMED[backend], (*inputs, *constants))
        y, mean, _ = op._NORMED[backend](*inputs, *constants)
        grads = [problem.grads[0].to(dtype), *(g.float() for g in problem.grads[1:])]
        plain = [None if t is None else t.detach() for t in inputs]
        for need in ((True, True), (True, False), (False, True)):
            back = (*grads, *plain, y.detach(), mean.detach(), *constants, *need)
            torch.library.opcheck(op._NORMED_BACKWARD[backend], back)


def test_compiles_whole():
    def run(x, weight, of_next):
        y, mean, var = normed_linear(x, weight)
        return normed_linear(y, of_next, norm=RowNorm(mean, var, act="gelu"))[0]

    x, weight, of_next = torch.randn(30, 20), torch.randn(10, 20), torch.randn(5, 10)
    expected = run(x, weight, of_next)
    torch.testing.assert_close(torch.compile(run, fullgraph=True)(x, weight, of_next), expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 3, 6)}, r"x must be \(rows, C_in\) with a row, got \(2, 3, 6\)"),
        ({"x": torch.zeros(0, 6)}, r"with a row, got \(0, 6\)"),
        ({"x": torch.zeros(4, 6).int()}, "x must be float32, float64, bfloat16 or float16, got torch.int32"),
        (
            {"x": torch.zeros(4, 6).bfloat16(), "weight": torch.zeros(8, 6).half()},
            "weight must be torch.bfloat16",
        ),
        (
            {"x": torch.zeros(4, 6).bfloat16(), "norm": RowNorm(torch.zeros(6).bfloat16(), torch.ones(6))},
            r"norm.mean must be \(6,\) of torch.float32, got .* of torch.bfloat16",
        ),
        ({"x": torch.zeros(4, 6).half(), "backend": "cpu"}, "it takes float32.* and the input is float16"),
        ({"weight": torch.ones(8, 5)}, r"normed_linear: weight must be \(C_out, 6\)"),
        ({"norm": (1, 2)}, "norm must be a RowNorm, got tuple"),
        (
            {"norm": RowNorm(torch.zeros(6), torch.ones(5))},
            r"norm.var must be \(6,\) of torch.float32, got \(5,\)",
        ),
        ({"norm": RowNorm(torch.zeros(6), None)}, "norm.var must be a tensor, got NoneType"),
        ({"norm": RowNorm(torch.zeros(6), torch.ones(6).double())}, "norm.var must be .* of torch.float64"),
        ({"norm": RowNorm(torch.zeros(6), torch.ones(6), act="silu")}, "unknown act 'silu'"),
        ({"norm": RowNorm(torch.zeros(6), torch.ones(6), eps=-1.0)}, "eps must be a number of at least 0"),
        (
            {
                "norm": RowNorm(torch.zeros(6), torch.ones(6)),
                "m": torch.ones(4, 6),
                "weight": torch.ones(8, 12),
            },
            "m comes without a norm",
        ),
        ({"backend": "cuda"}, "linear: backend 'cuda' cannot take this call"),
    ],
)
def test_bad_input(change, message):
    arguments = {"x": torch.zeros(4, 6), "weight": torch.ones(8, 6)} | change
    with pytest.raises((ValueError, TypeError, fer_kernels.dispatch.BackendError), match=message):
        normed_linear(**arguments)


# ---- batch_norm_act(statistics=...) ----

each_norm_backend = pytest.mark.parametrize("backend", backends("norm"))


@each_norm_backend
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("residual", [False, True])
def test_norm_by_given_statistics(backend, act, residual):
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    inputs = [leaf(12, 5), leaf(5), leaf(5).detach().square().add(0.3).requires_grad_(), leaf(5), leaf(5)]
    gain = torch.rand(3, generator=generator).double()

    def run(x, mean, var, weight, bias, along=None):
        options = {"residual": along, "gain": gain, "act": act, "eps": EPS, "backend": backend}
        return batch_norm_act(x, weight, bias, statistics=(mean, var), **options)

    inputs += [leaf(12, 5)] if residual else []
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)
    raw = (*inputs[:5], inputs[5] if residual else None, gain, EPS, norm_op.ACTS.index(act))
    torch.library.opcheck(norm_op._GIVEN[backend], raw)
    back = (leaf(12, 5).detach(), *(t.detach() if isinstance(t, Tensor) else t for t in raw))
    torch.library.opcheck(norm_op._GIVEN_BACKWARD[backend], back)


@each_norm_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_own_statistics_given_make_its_own_norm(backend, dtype):
    """With the statistics' gradients led back to x, also its own gradient."""
    found = []
    for given_statistics in (False, True):
        torch.manual_seed(0)
        x = torch.randn(300, 37).to(dtype).requires_grad_()
        weight, bias = (torch.randn(37, requires_grad=True) for _ in range(2))
        tracked = torch.zeros(37), torch.ones(37)
        var, mean = torch.var_mean(x.float(), 0, correction=0)
        options = {"statistics": (mean, var)} if given_statistics else {}
        options |= {"running_mean": tracked[0], "running_var": tracked[1], "act": "gelu", "backend": backend}
        y = batch_norm_act(x, weight, bias, **options)
        y.backward(torch.randn(300, 37).to(dtype))
        found.append([y.detach(), x.grad, weight.grad, bias.grad, *tracked])
    loose = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **loose)


@each_norm_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ACTS)
def test_norm_by_given_statistics_in_every_dtype(backend, dtype, act):
    """Against the reference in float64; a residual in float32, and channels that fill no vector."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(130, 37, generator=generator).to(dtype) for _ in range(2))
    along = torch.randn(130, 37, generator=generator)
    mean, weight, bias = (torch.randn(37, generator=generator) for _ in range(3))
    var, gain = torch.rand(37, generator=generator) + 0.3, torch.rand(13, generator=generator)
    found = []
    for exact in (False, True):
        leaves = [t.double() if exact else t.clone() for t in (x, mean, var, weight, bias, along)]
        leaves = [t.requires_grad_() for t in leaves]
        y = batch_norm_act(
            leaves[0],
            *leaves[3:5],
            statistics=(leaves[1], leaves[2]),
            residual=leaves[5],
            gain=gain.double() if exact else gain,
            act=act,
            backend="reference" if exact else backend,
        )
        y.backward(grad.to(y.dtype))
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
        if not exact:
            assert y.dtype == torch.float32 and leaves[0].grad.dtype == dtype
    for i, (ours_, expected) in enumerate(zip(*found, strict=True)):
        coarse = 2**-8 if dtype == torch.bfloat16 and i == 1 else 1e-5  # dx is rounded
        torch.testing.assert_close(
            ours_.double(), expected, rtol=coarse, atol=1e-5 * max(1, expected.abs().max().item())
        )


@each_norm_backend
@pytest.mark.parametrize("dtype, off, off_slope", [(torch.float32, 2e-6, 2e-6), (torch.bfloat16, 7e-6, 7e-5)])
def test_gelu_and_its_slope(backend, dtype, off, off_slope):
    """To what the documents say, and never of the wrong sign."""
    z = torch.linspace(-9, 9, 30_001).to(dtype).unsqueeze(1).requires_grad_()
    standard = torch.zeros(1), torch.ones(1)
    y = batch_norm_act(z, statistics=standard, act="gelu", eps=0.0, backend=backend)
    y.sum().backward()
    exact = z.detach().double().requires_grad_()
    expected = F.gelu(exact)
    expected.sum().backward()
    rounding = torch.finfo(dtype).eps / 2
    assert ((y.double() - expected).abs() <= off + rounding * expected.abs()).all()
    assert ((z.grad.double() - exact.grad).abs() <= off_slope + rounding * exact.grad.abs()).all()
    assert (y * z >= 0).all()
    far = torch.tensor([[-3e4], [3e4], [torch.nan]]).to(dtype)
    y = batch_norm_act(far, statistics=standard, act="gelu", eps=0.0, backend=backend).flatten()
    assert -3e4 * GELU_OFF[torch.float32] <= y[0] <= 0 and y[2].isnan()
    torch.testing.assert_close(y[1], far[1, 0])


@pytest.mark.parametrize(
    "statistics, message",
    [
        (torch.zeros(5), "statistics must be a mean and a variance, got Tensor"),
        ((torch.zeros(5),), "statistics must be a mean and a variance"),
        ((torch.zeros(5), torch.ones(4)), r"variance must be \(C,\) with C = 5"),
        ((torch.zeros(5), torch.ones(5).double()), "variance must be float32"),
        ((torch.zeros(5), None), "variance must be a tensor, got NoneType"),
    ],
)
def test_bad_statistics(statistics, message):
    with pytest.raises((ValueError, TypeError), match=message):
        batch_norm_act(torch.zeros(4, 5), statistics=statistics)


# ---- modules ----


@pytest.fixture
def chained(monkeypatch):
    """A switch: whether projections leave norms to those that take their results, wherever a kernel runs."""
    if "cpu" not in BACKENDS:
        pytest.skip("no kernel runs here")

    def switch(on: bool) -> None:
        def chain_dtype(x: Tensor, weight: Tensor) -> torch.dtype | None:
            dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype
            return dtype if on and dtype in op.NORMED.dtypes["cpu"] else None

        monkeypatch.setattr(conv, "chain_dtype", chain_dtype)

    switch(True)
    return switch


class Two(nn.Module):
    def __init__(self, act, bias):
        super().__init__()
        self.first = Projection(24, 40, groups=1, act=act, bias=bias)
        self.second = Projection(40, 24, groups=4, act=None, bias=bias)

    def forward(self, x, gain):
        return self.second(self.first(x, unfinished=True), residual=x, gain=gain)


class Graph(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.graph = DynamicGraphConv(DilatedKnnGraph(4), layer)
        self.second = Projection(48, 24, groups=1, act=None)

    def forward(self, x, gain):
        found, _ = self.graph(x, return_graph=True, unfinished=True)
        return self.second(found, residual=x, gain=gain)


NETWORKS = {
    "relu": lambda: Two("relu", False),
    "gelu": lambda: Two("gelu", True),
    "no activation": lambda: Two(None, True),
    "mr": lambda: Graph(MaxRelativeConv(24, 48)),
    "rmr": lambda: Graph(RelationConv(24, 48)),
    "both": lambda: Graph(RelationConv(24, 48, conv="both")),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_chained_or_not_is_the_same(name, chained):
    found = []
    for on in (True, False):
        chained(on)
        torch.manual_seed(0)
        network = NETWORKS[name]().train()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm1d):
                nn.init.normal_(module.weight), nn.init.normal_(module.bias)
        x = torch.randn(6, 16, 24, requires_grad=True)
        y = network(x, torch.tensor([0.0, 1.5, 1.5, 0.0, 1.5, 1.5]))
        y.backward(torch.randn(y.shape))
        gradients = {f"d{n}": p.grad for n, p in network.named_parameters()}
        found.append({"y": y.detach(), "dx": x.grad} | gradients | dict(network.named_buffers()))
    one, other = found
    assert one.keys() == other.keys()
    for name, value in one.items():
        scale = max(1.0, other[name].abs().max().item())  # a bias before a norm has none but of rounding
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.skipif("cpu" not in BACKENDS or not extension.BFLOAT16_PRODUCTS, reason="no kernel for bfloat16")
@pytest.mark.parametrize("whole", [False, True], ids=["autocast", "all of it"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_chained_in_bfloat16(kind, chained, whole):
    """As far from float32 as the same modules without a chain, or nearer, over some draws; same dtypes."""

    def run(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        network = NETWORKS[kind]().train()
        x = torch.randn(12, 49, 24).bfloat16().to(dtype if whole else torch.float32).requires_grad_()
        network.to(dtype if whole else torch.float32)
        gain = torch.tensor([0.0, 1.5, 1.5, 0.0, 1.5, 1.5] * 2)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16 and not whole):
            y = network(x, gain.to(x.dtype))
        assert y.dtype == x.dtype
        y.backward(torch.randn(y.shape).to(y.dtype))
        gradients = {f"d{n}": p.grad for n, p in network.named_parameters() if not n.endswith("linear.bias")}
        return {"y": y.detach(), "dx": x.grad} | gradients | dict(network.named_buffers())

    normed_oracle.as_near(run, chained, zero={"no activation": "dfirst.norm.bias"}.get(kind))


def test_in_which_dtype_modules_chain(monkeypatch):
    """As autocast says, where this processor has the kernel."""
    monkeypatch.setattr(extension, "FAST_PRODUCTS", "avx512")
    x, weight = torch.randn(op.ROWS, 96), torch.randn(96, 96)
    here = "cpu" in BACKENDS
    low = torch.bfloat16 if here and extension.BFLOAT16_PRODUCTS else None
    assert op.chain_dtype(x, weight) == (torch.float32 if here else None)
    assert op.chain_dtype(x.bfloat16(), weight.bfloat16()) == low
    assert op.chain_dtype(x.bfloat16(), weight) is None  # torch's product says why
    assert op.chain_dtype(x.half(), weight) is None and op.chain_dtype(x.double(), weight) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert op.chain_dtype(x, weight) == op.chain_dtype(x.bfloat16(), weight) == low
        assert op.chain_dtype(x.double(), weight) is None
        assert op.chain_dtype(x, weight.bfloat16()) == low and op.chain_dtype(x, weight.double()) is None
    with torch.autocast("cpu", torch.float16):
        assert op.chain_dtype(x, weight) is None and op.chain_dtype(x.bfloat16(), weight) is None
    monkeypatch.setattr(extension, "BFLOAT16_PRODUCTS", False)
    assert op.chain_dtype(x.bfloat16(), weight.bfloat16()) is None


@pytest.mark.skipif("cpu" not in BACKENDS or not extension.BFLOAT16_PRODUCTS, reason="no kernel for bfloat16")
def test_pairs_keep_what_is_not_finite_apart():
    """The bits of an infinity and of its neighbour are those of a NaN, as one number."""
    x, weight = torch.ones(40, 6).bfloat16(), torch.ones(5, 6)
    weight[2, 3] = torch.inf
    x[7, 1] = -torch.inf
    y, _, _ = normed_linear(x, weight, backend="cpu")
    expected = F.linear(x, weight.bfloat16())
    assert torch.equal(y.nan_to_num(9.0), expected.nan_to_num(9.0))
    assert y[7, 2].isnan() and y[7, 1] == -torch.inf and y[3, 2] == torch.inf


def test_what_a_chain_keeps(chained):
    """The input, two products and parameters' size: no normed rows, no activation."""
    network, x = Two("gelu", True).train(), torch.randn(50, 40, 24, requires_grad=True)

    def kept(on: bool) -> int:
        chained(on)
        storages = {}

        def pack(t: Tensor) -> Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            network(x, None)
        return sum(storages.values())

    rows, small = 50 * 40 * 4, 20_000  # bytes a column, and of parameters and statistics
    assert rows * (24 + 40 + 24) <= kept(True) <= rows * (24 + 40 + 24) + small
    assert kept(False) >= rows * (24 + 40 + 40 + 24)


def test_evaluation_and_hooks_see_finished_nodes(chained):
    network, x = Two("gelu", True), torch.randn(50, 40, 24)
    assert isinstance(network.first(x, unfinished=True), Unfinished)
    assert isinstance(network.first(x), Tensor)
    network.eval()
    assert isinstance(network.first(x, unfinished=True), Tensor)
    network.train()
    seen = []
    handle = network.first.register_forward_hook(lambda module, args, result: seen.append(result))
    y = network(x, None)
    assert isinstance(seen[0], Tensor) and seen[0].shape == (50, 40, 40)
    handle.remove()
    torch.testing.assert_close(network(x, None), y)
    assert len(seen) == 1


HOOKS = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook")


@pytest.mark.parametrize("place", ["graph", "graph.conv", "graph.conv.projection"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_in_a_graph_see_nodes(chained, kind, place):
    network, seen = Graph(MaxRelativeConv(24, 48)), []
    getattr(network.get_submodule(place), kind)(lambda module, *rest: seen.append(rest[-1]))
    x = torch.randn(6, 16, 24, requires_grad=True)
    network(x, None).sum().backward()
    found = [t for entry in seen for t in (entry if isinstance(entry, tuple) else (entry,))]
    assert found and all(isinstance(t, Tensor | None) for t in found)
    assert not any(isinstance(entry, Unfinished) for entry in seen)


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_of_blocks_see_nodes(chained, kind):
    fer_models = pytest.importorskip("fer_models")
    model = fer_models.create_model("face2nodes_nano", num_classes=7, img_size=48, drop_path_rate=0.0).train()
    block = next(module for module in model.modules() if type(module).__name__ == "Block")
    seen = []
    for part in (block.grapher.fc2, block.ffn.fc2):
        getattr(part, kind)(lambda module, *rest: seen.append(rest[0]))
    model(torch.randn(2, 3, 48, 48)).sum().backward()
    assert len(seen) == 2 and all(isinstance(entry[0], Tensor) for entry in seen)


def test_the_rest_of_a_projection(chained):
    network, x = Two("gelu", True), torch.randn(50, 40, 24)
    y = network(x, None)
    interleaved = Projection(80, 24, groups=4)
    m = torch.randn(50, 40, 40)
    expected = interleaved(network.first(x), m)
    torch.testing.assert_close(interleaved(network.first(x, unfinished=True), m), expected)
    also = network.second(network.first(x, unfinished=True), also=torch.zeros(50, 40, 24), residual=x)
    torch.testing.assert_close(also, y, rtol=1e-4, atol=1e-4)
