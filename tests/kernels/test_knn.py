"""knn: one set of cases for every backend that can run here."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from knn_oracle import assert_neighbours, distances, neighbours, rounding_band
from support import backends, device_of
from torch._subclasses.fake_tensor import FakeTensorMode

import fer_kernels
from fer_kernels import dilated_knn, dispatch, to_edge_index
from fer_kernels.knn.op import MAX_NEIGHBOURS, OPERATOR

INTERPRETED = dispatch.TRITON_INTERPRETED
every_backend = pytest.mark.parametrize("backend", backends("knn"))


def slow_when_interpreted(backend: str) -> bool:
    return backend == "triton" and INTERPRETED


def dtypes_of(backend: str) -> list[torch.dtype]:
    return list(OPERATOR.dtypes[backend])


def integers(*shape: int, high: int = 4, seed: int = 0, dtype=torch.float32, device="cpu") -> torch.Tensor:
    """Small integers: every product and sum is exact, and ties abound."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-high, high + 1, shape, generator=generator).to(dtype).to(device)


def normal(*shape: int, seed: int = 0, dtype=torch.float32, device="cpu") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def check_exact(backend, x, y=None, *, k, dilation=1, bias=None, ranks=None):
    idx, dist = dilated_knn(
        x,
        y,
        k=k,
        dilation=dilation,
        bias=bias,
        ranks=ranks,
        normalize=False,
        return_distance=True,
        backend=backend,
    )
    want = distances(x, y, bias, False)
    expected = neighbours(want, k, dilation, ranks)
    assert torch.equal(idx.cpu(), expected)
    assert torch.equal(
        dist.cpu().double().nan_to_num(nan=-7.0), want.gather(2, expected).nan_to_num(nan=-7.0)
    )


# ---- exact agreement on integers ----

EXACT = [  # B, N, M, C, k, dilation; M None: keys are the queries
    (2, 7, None, 3, 1, 1),
    (1, 1, None, 1, 1, 1),
    (2, 49, None, 16, 9, 1),
    (2, 30, 49, 17, 9, 2),
    (1, 20, 130, 40, 18, 4),
    (1, 9, 128, 5, 128, 1),
    (1, 9, 200, 5, 16, 8),
    (1, 5, 300, 3, 17, 1),
]
EXACT_LARGE = [
    (3, 196, None, 192, 9, 2),
    (2, 196, None, 320, 18, 4),
    (1, 130, 3136, 48, 9, 1),
    (1, 40, 4096, 31, 128, 1),
    (1, 300, 777, 1024, 12, 3),
    (1, 33, 4096, 1024, 18, 4),
    (1, 50, 65, 1, 32, 2),
]


@pytest.mark.sanitize
@every_backend
@pytest.mark.parametrize("shape", EXACT, ids=str)
def test_exact_on_integers(backend, shape):
    b, n, m, c, k, dilation = shape
    device = device_of(backend)
    x = integers(b, n, c, device=device)
    y = None if m is None else integers(b, m, c, seed=1, device=device)
    check_exact(backend, x, y, k=k, dilation=dilation)


@every_backend
@pytest.mark.parametrize("shape", EXACT_LARGE, ids=str)
def test_exact_on_integers_large(backend, shape):
    if slow_when_interpreted(backend):
        pytest.skip("too slow interpreted")
    b, n, m, c, k, dilation = shape
    device = device_of(backend)
    for dtype in dtypes_of(backend):
        x = integers(b, n, c, dtype=dtype, device=device)
        y = None if m is None else integers(b, m, c, seed=1, dtype=dtype, device=device)
        check_exact(backend, x, y, k=k, dilation=dilation)


@pytest.mark.sanitize
@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_and_bias(backend, dtype):
    device = device_of(backend)
    x = integers(2, 21, 19, dtype=dtype, device=device)
    y = integers(2, 37, 19, seed=1, dtype=dtype, device=device)
    if dtype not in dtypes_of(backend):
        with pytest.raises(RuntimeError, match="it takes"):
            dilated_knn(x, y, k=3, backend=backend)
        return
    for shape, bias_dtype in itertools.product(
        [(2, 21, 37), (1, 21, 37), (2, 1, 37), (21, 1), (37,), ()], {dtype, torch.float32}
    ):
        bias = integers(*shape, seed=2, dtype=bias_dtype, device=device)
        check_exact(backend, x, y, k=5, dilation=3, bias=bias)
    transposed = integers(2, 37, 21, seed=3, dtype=dtype, device=device).mT
    check_exact(backend, x, y, k=5, dilation=3, bias=transposed)


@every_backend
def test_every_k(backend):
    device = device_of(backend)
    x, y = integers(1, 6, 4, device=device), integers(1, 140, 4, seed=1, device=device)
    wanted = (
        [1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 127, 128] if slow_when_interpreted(backend) else range(1, 129)
    )
    for k in wanted:
        check_exact(backend, x, y, k=k)


@every_backend
@pytest.mark.parametrize("keys", [1, 15, 16, 17, 31, 33, 48, 64, 255, 256, 257, 300])
def test_key_counts_around_tile_edges(backend, keys):
    if slow_when_interpreted(backend) and keys in (15, 31, 48, 255):
        pytest.skip("too slow interpreted")
    device = device_of(backend)
    x, y = integers(2, 5, 3, device=device), integers(2, keys, 3, seed=1, device=device)
    check_exact(backend, x, y, k=min(keys, 20))


@every_backend
def test_all_keys_equal(backend):
    """Every distance ties: the answer is 0, 1, 2, ..."""
    x = torch.ones(1, 5, 8, device=device_of(backend))
    y = torch.ones(1, 300, 8, device=device_of(backend))
    for k in (1, 9, 128):
        idx = dilated_knn(x, y, k=k, backend=backend)
        assert torch.equal(idx.cpu(), torch.arange(k).expand(1, 5, k))


@every_backend
def test_duplicated_rows(backend):
    """Equal keys have bit-equal distances, so they stand in index order, also with normalize."""
    device = device_of(backend)
    x = normal(1, 11, 24, device=device)
    y = normal(1, 30, 24, seed=1, device=device).repeat(1, 7, 1)
    idx, dist = dilated_knn(x, y, k=64, return_distance=True, backend=backend)
    same = dist[..., 1:] == dist[..., :-1]
    assert same.float().mean() > 0.8
    assert (idx[..., 1:] > idx[..., :-1])[same].all()


@every_backend
def test_descending_and_ascending_keys(backend):
    """Keys that come ever nearer replace the running list at every step."""
    device = device_of(backend)
    x = torch.zeros(1, 3, 1, device=device)
    y = torch.arange(600.0, 0, -1, device=device).view(1, 600, 1)
    check_exact(backend, x, y, k=20)
    check_exact(backend, x, y.flip(1).contiguous(), k=20)


# ---- NaN, infinity, zero ----


@pytest.mark.sanitize
@every_backend
@pytest.mark.parametrize("normalize", [True, False])
def test_nan_keys_come_last_in_index_order(backend, normalize):
    device = device_of(backend)
    x = integers(1, 6, 4, high=3, device=device)
    y = integers(1, 40, 4, high=3, seed=1, device=device)
    y[0, 3, 2] = y[0, 20, 0] = y[0, 39, 1] = torch.nan
    idx, dist = dilated_knn(x, y, k=40, normalize=normalize, return_distance=True, backend=backend)
    assert torch.equal(idx[..., -3:].cpu(), torch.tensor([3, 20, 39]).expand(1, 6, 3))
    assert dist[..., -3:].isnan().all() and not dist[..., :-3].isnan().any()


@every_backend
def test_nan_query_takes_keys_in_index_order(backend):
    x = integers(1, 4, 5, device=device_of(backend))
    x[0, 2, 1] = torch.nan
    y = integers(1, 300, 5, seed=1, device=device_of(backend))
    idx, dist = dilated_knn(x, y, k=70, return_distance=True, backend=backend)
    assert torch.equal(idx[0, 2].cpu(), torch.arange(70))
    assert dist[0, 2].isnan().all() and not dist[0, [0, 1, 3]].isnan().any()


@every_backend
@pytest.mark.parametrize("normalize", [True, False])
def test_infinite_rows_are_nan(backend, normalize):
    x = normal(1, 4, 8, device=device_of(backend))
    x[0, 3, 2] = -torch.inf
    y = normal(1, 33, 8, seed=1, device=device_of(backend))
    y[0, 7, 3] = torch.inf
    y[0, 9] = 3e38  # finite, but not its squared norm
    idx, dist = dilated_knn(x, y, k=33, normalize=normalize, return_distance=True, backend=backend)
    assert torch.equal(idx[:, :3, -2:].cpu(), torch.tensor([7, 9]).expand(1, 3, 2))
    assert torch.equal(idx[0, 3].cpu(), torch.arange(33)) and dist[0, 3].isnan().all()
    assert dist[:, :3, -2:].isnan().all() and not dist[:, :3, :-2].isnan().any()


@every_backend
def test_infinite_bias(backend):
    device = device_of(backend)
    x = integers(1, 3, 4, device=device)
    bias = torch.zeros(1, 1, 50, device=device)
    bias[..., ::2] = torch.inf
    bias[..., 1] = -torch.inf
    idx = dilated_knn(
        x, integers(1, 50, 4, seed=1, device=device), k=30, bias=bias, normalize=False, backend=backend
    )
    assert (idx[..., 0] == 1).all()
    assert (idx[..., :25] % 2 == 1).all()
    assert torch.equal(idx[..., 25:].cpu(), torch.arange(0, 10, 2).expand(1, 3, 5))


@every_backend
def test_zero_rows(backend):
    """A zero row has norm 1e-12 by definition: distance 1 to any unit row, 0 to another zero row."""
    x = normal(1, 5, 6, device=device_of(backend))
    x[0, 1] = 0
    x[0, 3] = 0
    idx, dist = dilated_knn(x, k=5, return_distance=True, backend=backend)
    assert idx[0, 1, :2].tolist() == [1, 3] and idx[0, 3, :2].tolist() == [1, 3]
    assert dist[0, 1, 0] == 0 and torch.allclose(dist[0, 1, 2:].cpu(), torch.ones(3), atol=1e-6)


@every_backend
@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-14, 1e-8, 1e8, 1e15])
def test_scale_of_rows(backend, scale):
    """Below 1e-12 rows are x / 1e-12, down to what float32 holds; GPU backends may stop at 1e-19."""
    x = normal(1, 20, 12, device=device_of(backend)) * scale
    idx = dilated_knn(x, k=4, backend=backend)
    if scale < 1e-19 and backend in ("triton", "cuda"):
        assert ((idx >= 0) & (idx < 20)).all()
        return
    assert_neighbours(idx, distances(x, None, None, True), rounding_band(x, None, None, True), 4, 1)


# ---- real values ----


@every_backend
@pytest.mark.parametrize("normalize", [True, False])
def test_real_values(backend, normalize):
    device = device_of(backend)
    shapes = (
        [(2, 20, 40, 24, 5, 2)]
        if slow_when_interpreted(backend)
        else [
            (2, 49, 49, 640, 9, 1),
            (2, 196, 196, 192, 9, 2),
            (1, 400, 196, 48, 9, 1),
            (1, 150, 700, 33, 18, 4),
        ]
    )
    for (b, n, m, c, k, dilation), dtype in itertools.product(shapes, dtypes_of(backend)):
        x, y = (
            normal(b, n, c, dtype=dtype, device=device),
            normal(b, m, c, seed=1, dtype=dtype, device=device),
        )
        bias = normal(n, m, seed=2, device=device)
        idx, dist = dilated_knn(
            x,
            y,
            k=k,
            dilation=dilation,
            bias=bias,
            normalize=normalize,
            return_distance=True,
            backend=backend,
        )
        want, band = distances(x, y, bias, normalize), rounding_band(x, y, bias, normalize)
        assert_neighbours(idx, want, band, k, dilation)
        off = (dist.cpu().double() - want.gather(2, idx.cpu())).abs()
        assert (off <= band.gather(2, idx.cpu())).all()
        assert dist.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@every_backend
def test_error_is_within_twice_the_eager_path(backend):
    """Returned distances against float64, compared with what plain PyTorch loses in the same dtype."""
    device = device_of(backend)
    for dtype in dtypes_of(backend):
        x = normal(1, 48, 96, dtype=dtype, device=device)
        idx, dist = dilated_knn(x, k=8, return_distance=True, backend=backend)
        want = distances(x, None, None, True).gather(2, idx.cpu())
        unit = torch.nn.functional.normalize(x, dim=-1)
        eager = (unit * unit).sum(-1, keepdim=True) - 2 * unit @ unit.mT + (unit * unit).sum(-1).unsqueeze(1)
        eager_error = (eager.cpu().double() - distances(x, None, None, True)).abs().max()
        assert (dist.cpu().double() - want).abs().max() <= 2 * eager_error


@every_backend
def test_self_is_the_nearest(backend):
    x = normal(2, 64, 32, device=device_of(backend))
    assert torch.equal(dilated_knn(x, k=1, backend=backend)[..., 0].cpu(), torch.arange(64).expand(2, 64))


# ---- arguments ----


@every_backend
def test_ranks_pick_positions_in_their_order(backend):
    device = device_of(backend)
    x = integers(1, 10, 6, device=device)
    y = integers(1, 64, 6, seed=1, device=device)
    for values, dtype in [([7, 0, 11, 3], torch.int64), ([1, 2, 3, 0], torch.int32)]:
        for rank_device in {"cpu", device}:
            ranks = torch.tensor(values, dtype=dtype, device=rank_device)
            check_exact(backend, x, y, k=4, dilation=3, ranks=ranks)


@every_backend
def test_not_contiguous(backend):
    device = device_of(backend)
    base = normal(2, 24, 40, device=device)
    for x in (
        base.mT,
        base[:, ::2],
        base[..., 3:27],
        base.expand(2, 24, 40)[:, :, ::3],
        base[:1].expand(3, 24, 40),
    ):
        idx = dilated_knn(x, k=5, dilation=2, backend=backend)
        assert torch.equal(idx, dilated_knn(x.contiguous(), k=5, dilation=2, backend=backend))
        y = x.flip(1)
        assert torch.equal(
            dilated_knn(x, y, k=5, backend=backend),
            dilated_knn(x.contiguous(), y.contiguous(), k=5, backend=backend),
        )


@every_backend
def test_empty(backend):
    device = device_of(backend)
    for shape, keys in [((0, 5, 4), None), ((2, 0, 4), None), ((2, 0, 4), (2, 9, 4)), ((0, 0, 4), None)]:
        x = torch.empty(shape, device=device)
        y = None if keys is None else torch.empty(keys, device=device)
        idx, dist = dilated_knn(x, y, k=3, return_distance=True, backend=backend)
        assert idx.shape == dist.shape == (shape[0], shape[1], 3) and idx.dtype == torch.int64


@every_backend
def test_no_channels(backend):
    idx = dilated_knn(torch.empty(1, 4, 0, device=device_of(backend)), k=2, backend=backend)
    assert torch.equal(idx.cpu(), torch.tensor([[0, 1]] * 4).unsqueeze(0))


@every_backend
def test_no_gradient_flows(backend):
    x = normal(1, 12, 4, device=device_of(backend)).requires_grad_()
    bias = torch.zeros(12, 12, device=device_of(backend), requires_grad=True)
    idx, dist = dilated_knn(x, k=3, bias=bias, return_distance=True, backend=backend)
    assert not idx.requires_grad and not dist.requires_grad and dist.grad_fn is None


@every_backend
def test_repeats_are_bitwise_equal(backend, two_threads):
    device = device_of(backend)
    x = normal(2, 20 if slow_when_interpreted(backend) else 196, 48, device=device)
    first = dilated_knn(x, k=9, dilation=2, return_distance=True, backend=backend)
    for _ in range(3 if slow_when_interpreted(backend) else 200):
        again = dilated_knn(x, k=9, dilation=2, return_distance=True, backend=backend)
        assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])


# ---- the compiled CPU code ----


def test_threads_and_instruction_sets_agree(cpu_isas, two_threads):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        x = integers(3, 70, 33, dtype=dtype)
        y = integers(3, 700, 33, seed=1, dtype=dtype)
        real = normal(2, 60, 50, dtype=dtype)
        bias = normal(60, 60, seed=4)
        for isa in cpu_isas.supported_isas():
            cpu_isas.set_isa(isa)
            assert cpu_isas.current_isa() == isa
            check_exact("cpu", x, y, k=18, dilation=4)
            check_exact("cpu", x, k=9, dilation=2)
            idx = dilated_knn(real, k=9, dilation=2, bias=bias, backend="cpu")
            assert_neighbours(
                idx, distances(real, None, bias, True), rounding_band(real, None, bias, True), 9, 2
            )
            for threads in (1, 3, 4):
                torch.set_num_threads(threads)
                assert torch.equal(dilated_knn(real, k=9, dilation=2, bias=bias, backend="cpu"), idx)
            y_nan = y.clone()
            y_nan[:, ::3, 0] = torch.nan
            check_exact("cpu", x, y_nan, k=64)


def test_few_keys_in_every_instruction_set(cpu_isas):
    for isa in cpu_isas.supported_isas():
        cpu_isas.set_isa(isa)
        for dtype, keys in itertools.product((torch.float32, torch.float64), (1, 2, 3, 4, 5, 7, 8, 9)):
            check_exact("cpu", integers(1, 3, 7, dtype=dtype), integers(1, keys, 7, seed=1, dtype=dtype), k=1)


def test_unknown_instruction_set(cpu_isas):
    with pytest.raises(ValueError, match="no instruction set 'neon512'"):
        cpu_isas.set_isa("neon512")


@pytest.mark.skipif("cpu" not in backends("knn"), reason="no compiled CPU module")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_cpu_agrees_with_the_reference_on_anything(data):
    draw = data.draw
    k = draw(st.integers(1, 32), "k")
    dilation = draw(st.integers(1, MAX_NEIGHBOURS // k), "dilation")
    keys = draw(st.integers(k * dilation, max(k * dilation, draw(st.sampled_from([50, 300, 700])))), "keys")
    batch, queries = draw(st.integers(1, 3), "batch"), draw(st.integers(1, 40), "queries")
    channels = draw(st.integers(1, 70), "channels")
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]), "dtype")
    high = draw(st.sampled_from([0, 1, 3, 8]), "high")
    seed = draw(st.integers(0, 2**31), "seed")
    x = integers(batch, queries, channels, high=high, seed=seed, dtype=dtype)
    y = integers(batch, keys, channels, high=high, seed=seed + 1, dtype=dtype)
    if draw(st.booleans(), "nan"):
        y[torch.rand(y.shape[:2], generator=torch.Generator().manual_seed(seed)) < 0.2] = torch.nan
    bias = integers(queries, keys, high=high, seed=seed + 2) if draw(st.booleans(), "bias") else None
    ranks = None
    if draw(st.booleans(), "ranks"):
        ranks = torch.randperm(k * dilation, generator=torch.Generator().manual_seed(seed))[:k]
    arguments = {"k": k, "dilation": dilation, "bias": bias, "ranks": ranks, "return_distance": True}
    arguments["normalize"] = False
    got = dilated_knn(x, y, **arguments, backend="cpu")
    want = dilated_knn(x, y, **arguments, backend="reference")
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1].nan_to_num(nan=-1.0), want[1].nan_to_num(nan=-1.0))
    # Normalised, the same rows are real numbers.
    arguments["normalize"] = True
    idx, _ = dilated_knn(x, y, **arguments, backend="cpu")
    assert_neighbours(idx, distances(x, y, bias, True), rounding_band(x, y, bias, True), k, dilation, ranks)


# ---- torch's machinery ----


@every_backend
def test_opcheck(backend):
    device = device_of(backend)
    op = OPERATOR.registered[backend]
    x = normal(2, 12, 5, device=device).requires_grad_()
    y = normal(2, 20, 5, seed=1, device=device)
    bias = normal(1, 12, 20, seed=2, device=device)
    ranks = torch.tensor([0, 3, 1], device=device)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for arguments in [(x, None, None, None, 3, 2), (x, y, bias, ranks, 3, 2)]:
        for return_distance in (True, False):
            torch.library.opcheck(op, (*arguments, True, return_distance, False), test_utils=tests)


@every_backend
def test_compile_fullgraph_and_dynamic_batch(backend):
    device = device_of(backend)
    torch._dynamo.reset()

    def graph(x, y):
        idx = dilated_knn(x * 2, y, k=3, dilation=2, backend=backend)
        return y.gather(1, idx.flatten(1).unsqueeze(-1).expand(-1, -1, y.shape[2])).sum(1)

    compiled = torch.compile(graph, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3, 5):
        x = normal(batch, 10, 4, device=device)
        y = normal(batch, 14, 4, seed=1, device=device)
        assert torch.equal(compiled(x, y), graph(x, y))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter process is for kernels")
def test_compile_with_inductor():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch._dynamo.reset()
    x = normal(2, 20, 8, device=device)

    def graph(x):
        return dilated_knn(x.relu(), k=4, dilation=2) + 1

    assert torch.equal(torch.compile(graph, fullgraph=True)(x), graph(x))


@every_backend
def test_use_backend_under_compile(backend):
    torch._dynamo.reset()
    x = normal(1, 12, 4, device=device_of(backend))
    compiled = torch.compile(lambda x: dilated_knn(x, k=2), fullgraph=True, backend="eager")
    with fer_kernels.use_backend("reference"):
        first = compiled(x)
    with fer_kernels.use_backend(backend):
        assert torch.equal(compiled(x), first)


@pytest.mark.parametrize("thread", ["this", "fresh"])
def test_compiled_code_follows_a_later_use_backend(thread):
    """The first compile happens before any use_backend of that thread."""
    ran = []

    def record(graph, inputs):
        ran.append([str(node.target) for node in graph.graph.nodes if "fer_kernels" in str(node.target)])
        return graph

    def work():
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: dilated_knn(x, k=2), fullgraph=True, backend=record)
        compiled(X)
        with fer_kernels.use_backend("reference"):
            compiled(X)

    if thread == "this":
        work()
    else:
        worker = threading.Thread(target=work)
        worker.start()
        worker.join()
    assert len(ran) == 2 and "knn_reference" in ran[1][0]


def test_compile_for_cuda_without_one():
    """What the front reads for CUDA tensors must be traceable too: fake tensors need no device."""
    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 20, 8, device="cuda")
        compiled = torch.compile(
            lambda x: dilated_knn(x, k=3, backend="reference"), fullgraph=True, backend="eager"
        )
        assert compiled(x).shape == (2, 20, 3)


def test_tf32_is_read_from_either_setting():
    script = (
        "import torch; from fer_kernels.knn import op; m = torch.backends.cuda.matmul\n"
        "assert not op._tf32_is_allowed()\n"
        "torch.set_float32_matmul_precision('high'); assert op._tf32_is_allowed()\n"
        "torch.set_float32_matmul_precision('highest'); assert not op._tf32_is_allowed()\n"
    )
    new = (
        "import torch; from fer_kernels.knn import op; m = torch.backends.cuda.matmul\n"
        "m.fp32_precision = 'tf32'; assert op._tf32_is_allowed()\n"
    )
    for text in (script, new):  # in processes of their own: the two ways of setting do not mix
        subprocess.run([sys.executable, "-c", text], check=True)


def test_fake_ranks():
    with FakeTensorMode():
        idx = dilated_knn(torch.empty(1, 9, 4), k=2, dilation=2, ranks=torch.tensor([0, 3]))
    assert idx.shape == (1, 9, 2)


@every_backend
def test_export(backend):
    class Graph(torch.nn.Module):
        def forward(self, x):
            return dilated_knn(x, k=3, dilation=2, backend=backend)

    x = normal(2, 12, 4, device=device_of(backend))
    program = torch.export.export(
        Graph(), (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    )
    more = normal(5, 12, 4, device=device_of(backend))
    assert torch.equal(program.module()(more), Graph()(more))


@every_backend
def test_autocast(backend):
    device = device_of(backend)
    x = normal(1, 30, 16, device=device)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(dilated_knn(x, k=4, backend=backend), dilated_knn(x, k=4, backend=backend))
        half = x @ torch.eye(16, device=device)
        idx = dilated_knn(half, k=4, backend=backend)
    assert half.dtype == torch.bfloat16
    assert torch.equal(idx, dilated_knn(half, k=4, backend=backend))


@every_backend
def test_cuda_graph_capture(backend):
    if device_of(backend) != "cuda":
        pytest.skip("captures a CUDA graph")
    x = normal(2, 49, 16, device="cuda")
    dilated_knn(x, k=9, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        idx = dilated_knn(x, k=9, backend=backend)
    x.copy_(normal(2, 49, 16, seed=9, device="cuda"))
    graph.replay()
    assert torch.equal(idx, dilated_knn(x, k=9, backend=backend))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_reference_on_cuda():
    x, y = integers(2, 60, 20), integers(2, 90, 20, seed=1)
    x[0, 3, 3] = y[1, 5, 5] = torch.nan
    for dtype in dtypes_of("reference"):
        check_exact("reference", x.to("cuda", dtype), y.to("cuda", dtype), k=9, dilation=3)


# ---- edge index ----


def test_to_edge_index():
    idx = dilated_knn(normal(2, 5, 3), normal(2, 7, 3, seed=1), k=2)
    edges = to_edge_index(idx, 7)
    assert edges.shape == (2, 20) and edges.dtype == torch.int64
    for edge, (b, i, s) in zip(
        edges.T.tolist(), itertools.product(range(2), range(5), range(2)), strict=True
    ):
        assert edge == [b * 7 + idx[b, i, s].item(), b * 5 + i]
    with pytest.raises(ValueError, match=r"idx must be an integer \(B, N, k\), got torch.float32 \(3, 3\)"):
        to_edge_index(torch.ones(3, 3), 3)
    with pytest.raises(ValueError, match="num_keys must be at least 1, got 0"):
        to_edge_index(idx, 0)
    with pytest.raises(RuntimeError, match="num_keys = 4, but idx holds values from 0 to"):
        to_edge_index(idx, 4)


# ---- bad input ----

X = torch.zeros(2, 49, 8)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.zeros(49, 8)}, ValueError, r"x must be \(B, nodes, C\), got 2-D \(49, 8\)"),
        ({"x": X.long()}, TypeError, "x must be float32, float64, bfloat16 or float16, got torch.int64"),
        ({"x": X.to(torch.complex64)}, TypeError, "got torch.complex64"),
        ({"x": X.to_sparse()}, TypeError, "x must be a dense tensor, got layout torch.sparse_coo"),
        ({"y": torch.zeros(2, 49, 9)}, ValueError, r"y must be \(B, M, C\) with B = 2 and C = 8"),
        ({"y": torch.zeros(3, 49, 8)}, ValueError, r"got \(3, 49, 8\)"),
        ({"y": X.double()}, TypeError, "y must have x's dtype torch.float32, got torch.float64"),
        ({"y": X.to("meta")}, ValueError, "y is on meta and x on cpu"),
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"k": 2.0}, TypeError, r"k must be an int, got 2.0 \(float\)"),
        ({"k": True}, TypeError, r"k must be an int, got True \(bool\)"),
        ({"dilation": -1}, ValueError, "dilation must be at least 1, got -1"),
        ({"dilation": "2"}, TypeError, "dilation must be an int"),
        (
            {"k": 18, "dilation": 4},
            ValueError,
            r"^dilated_knn: k \* dilation = 72 exceeds the 49 keys \(x: \(2, 49, 8\), k=18, dilation=4\)$",
        ),
        ({"y": torch.zeros(2, 10, 8), "k": 11}, ValueError, r"exceeds the 10 keys \(y: \(2, 10, 8\)"),
        ({"k": 43, "dilation": 3}, ValueError, r"k \* dilation = 129 exceeds the limit of 128"),
        (
            {"bias": torch.zeros(49, 48)},
            ValueError,
            r"bias must broadcast to \(B, N, M\) = \(2, 49, 49\), got \(49, 48\)",
        ),
        ({"bias": torch.zeros(1, 2, 49, 49)}, ValueError, "bias must broadcast"),
        ({"bias": torch.zeros(49, 49, dtype=torch.float64)}, TypeError, "bias must be float32 or x's dtype"),
        ({"bias": torch.zeros(49, 49, device="meta")}, ValueError, "bias is on meta and x on cpu"),
        ({"bias": 1.0}, TypeError, "bias must be a tensor, got float"),
        (
            {"ranks": torch.tensor([0, 1])},
            ValueError,
            r"ranks must be \(3,\), one position a neighbour, got \(2,\)",
        ),
        ({"ranks": torch.tensor([0.0, 1, 2])}, TypeError, "ranks must be int32 or int64, got torch.float32"),
        ({"ranks": torch.tensor([0, 1, 6])}, ValueError, r"ranks must lie in \[0, 6\)"),
        ({"ranks": torch.tensor([-1, 1, 2])}, ValueError, r"ranks must lie in \[0, 6\)"),
        ({"ranks": torch.tensor([1, 1, 2])}, ValueError, r"ranks must not repeat, got \[1, 1, 2\]"),
        ({"x": torch.nested.nested_tensor([torch.ones(3, 2)])}, TypeError, "got a nested one"),
        ({"ranks": [0, 1, 2]}, TypeError, "ranks must be a tensor, got list"),
        ({"normalize": 1}, TypeError, "normalize must be a bool, got 1"),
        ({"return_distance": None}, TypeError, "return_distance must be a bool"),
        (
            {"backend": "tpu"},
            ValueError,
            "unknown backend 'tpu': expected 'auto' or one of 'reference', 'cpu'",
        ),
    ],
)
def test_bad_input(arguments, error, words):
    call = {"x": X, "k": 3, "dilation": 2} | arguments
    with pytest.raises(error, match=words):
        dilated_knn(call.pop("x"), **call)


def test_bad_ranks_in_a_direct_call_reach_no_kernel():
    """torch.ops skips the Python checks; compiled code must stay inside its memory."""
    for backend in ("reference", "cpu"):
        if backend in backends("knn"):
            with pytest.raises((RuntimeError, IndexError, ValueError)):
                OPERATOR.registered[backend](
                    X, None, None, torch.tensor([0, 99, 2]), 3, 2, True, False, False
                )


# ---- choice of backend ----


@pytest.mark.skipif(torch.cuda.is_available(), reason="explains the absence of a GPU")
def test_missing_cuda_lists_every_reason():
    with pytest.raises(RuntimeError) as failure:
        dilated_knn(X.double(), k=3, backend="cuda")
    words = str(failure.value)
    assert words.startswith("knn: backend 'cuda' cannot take this call: ")
    assert "CUDA tensors and these are on cpu" in words and "float64" in words
    if torch.version.cuda is None:
        assert "build without CUDA" in words or "not built" in words
    assert "cuda" not in backends("knn")


def test_use_backend():
    assert torch.equal(dilated_knn(X, k=3), dilated_knn(X, k=3, backend="reference"))
    with pytest.raises(ValueError, match="unknown backend 'gpu'"), fer_kernels.use_backend("gpu"):
        pass
    if not torch.cuda.is_available():
        with fer_kernels.use_backend("cuda"), pytest.raises(RuntimeError, match="backend 'cuda' cannot take"):
            dilated_knn(X, k=3)
        with fer_kernels.use_backend("cuda"), fer_kernels.use_backend("auto"):
            dilated_knn(X, k=3)


def test_auto_never_picks_an_unproved_gpu_kernel(monkeypatch):
    monkeypatch.setattr(dispatch, "PROVED_ON", {})
    if torch.cuda.is_available():
        assert OPERATOR.choose("auto", X.cuda()) is OPERATOR.registered["reference"]
    chosen = OPERATOR.choose("auto", X)
    assert chosen is OPERATOR.registered["cpu" if "cpu" in backends("knn") else "reference"]


def test_available_backends():
    assert fer_kernels.available_backends("knn")[0] == "reference"
    with pytest.raises(ValueError, match="unknown operator 'nkk'"):
        fer_kernels.available_backends("nkk")
