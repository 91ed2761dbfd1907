"""The CUDA kernels on the host emulator: knn against a stable sort in numpy, relation against its reference.

The emulator (cuda_emulator.h) runs the kernels' own code, so what is tested here is all of it but
the compiler and the hardware: indexing, barriers, copies, tensor-core layouts, selection, ties.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import pathlib
import shutil
import subprocess

import numpy as np
import pytest
import torch

from fer_kernels.relation import reference
from fer_kernels.relation.reference import MODES, MR, RMR, RSUM

ROOT = pathlib.Path(__file__).resolve().parents[2]
DTYPES = {"f32": 0, "bf16": 2, "f16": 3}  # fer::Dtype
EPSILON = float(np.finfo(np.float32).eps)


def build(name: str, folder: pathlib.Path) -> ctypes.CDLL:
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler: neither CXX nor g++")
    target = folder / f"{name}.so"
    command = [compiler, "-x", "c++", "-std=c++20", "-O2", "-fPIC", "-shared", "-fno-strict-aliasing"]
    command += ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error", "-ffp-contract=off"]
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DFER_EMULATED_CUDA"]
    command += [f"-I{ROOT / part}" for part in ("tests/build/emulator", "csrc/include", "csrc/cuda")]
    command += [str(ROOT / f"tests/build/{name}.cpp"), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(target))


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return build("knn_emulated", tmp_path_factory.mktemp("emulated"))


def to_bits(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as the array the kernel reads; bfloat16 as uint16, rounded to nearest even."""
    if dtype == "f32":
        return np.ascontiguousarray(values, np.float32)
    if dtype == "f16":
        return np.ascontiguousarray(values, np.float16)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def from_bits(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def pointer(array):
    return None if array is None else array.ctypes.data_as(ctypes.c_void_p)


def knn(
    library, x, k, dilation, dtype, *, y=None, bias=None, bias_dtype="f32", ranks=None, normalize=False,
    distances=True, allow_tf32=False, seed=0, shift=0,
):  # fmt: skip
    """The kernel's answer for arrays that to_bits() made; bias (b, i, j) with sizes 1 for broadcast."""
    batch, queries, channels = x.shape
    keys = (x if y is None else y).shape[1]
    idx = np.empty((batch, queries, k), np.int64)
    dist = np.empty((batch, queries, k), np.float32) if distances else None
    stride = [0, 0, 0]
    if bias is not None:
        stride = [
            0 if size == 1 else step // bias.itemsize
            for size, step in zip(bias.shape, bias.strides, strict=True)
        ]
    message = ctypes.create_string_buffer(200)
    code = library.knn_emulated(
        (ctypes.c_int64 * 4)(batch, queries, keys, channels), k, dilation, DTYPES[dtype], int(normalize),
        int(allow_tf32), pointer(x), pointer(y), pointer(bias), DTYPES[bias_dtype],
        ctypes.c_int64(0 if bias is None else bias.size), (ctypes.c_int64 * 3)(*stride),
        pointer(None if ranks is None else np.asarray(ranks, np.int64)), pointer(idx), pointer(dist),
        ctypes.c_uint64(seed), ctypes.c_int64(shift), message, ctypes.c_int64(len(message)),
    )  # fmt: skip
    assert code == 0, f"error {code}: {message.value.decode()}"
    return idx, dist


def ranking(x, y, bias, normalize):
    """In float64: the values that order the keys of each query, and what a distance adds to them."""

    def rows(array):
        array = from_bits(array).astype(np.float64)
        if not normalize:
            return array
        square = (array * array).sum(-1, keepdims=True)
        return array / np.where(np.isfinite(square), np.maximum(np.sqrt(square), 1e-12), np.nan)

    with np.errstate(invalid="ignore"):
        left, right = rows(x), rows(x if y is None else y)
        values = (right * right).sum(-1)[:, None, :] - 2 * left @ right.transpose(0, 2, 1)
        if bias is not None:
            values = values + from_bits(bias)
    return values, (left * left).sum(-1, keepdims=True)


def oracle(x, k, dilation, *, y=None, bias=None, ranks=None, normalize=False):
    values, square = ranking(x, y, bias, normalize)
    order = np.argsort(values, axis=-1, kind="stable")  # numpy, too, sorts NaN behind all else
    positions = np.arange(0, k * dilation, dilation) if ranks is None else np.clip(ranks, 0, k * dilation - 1)
    idx = order[..., positions]
    return idx, np.take_along_axis(values, idx, -1) + square


def integers(generator, *shape, high=4):
    return generator.integers(-high, high + 1, shape).astype(np.float32)


def check_exactly(library, x, k, dilation, dtype, **options):
    idx, dist = knn(library, x, k, dilation, dtype, **options)
    for name in ("bias_dtype", "seed", "shift", "allow_tf32"):
        options.pop(name, None)
    want_idx, want_dist = oracle(x, k, dilation, **options)
    np.testing.assert_array_equal(idx, want_idx)
    np.testing.assert_array_equal(dist, want_dist.astype(np.float32))


# k * dilation from 1 to the limit, for one tile of keys, a few left over, and several tiles.
NEIGHBOURS = [(1, 1), (9, 1), (4, 4), (17, 1), (18, 2), (16, 4), (18, 4), (32, 4)]
SIZES = [
    (k, dilation, keys)
    for (k, dilation), keys in itertools.product(NEIGHBOURS, [0, 49, 196, 300, 600])
    if keys == 0 or keys >= k * dilation
]


@pytest.mark.parametrize(("k", "dilation", "keys"), SIZES)
def test_integers_exactly(library, k, dilation, keys):
    """Few distinct distances, so most places are decided by the index."""
    keys = keys or k * dilation  # as few keys as there may be
    dtype = list(DTYPES)[(k + keys) % 3]
    generator = np.random.default_rng(k * 1000 + keys)
    x = to_bits(integers(generator, 1, 11, 24, high=1), dtype)
    y = to_bits(integers(generator, 1, keys, 24, high=1), dtype)
    check_exactly(library, x, k, dilation, dtype, y=y, seed=keys)


# One key more or less than fit a narrow tile (64), a shortlist (128), one and two wide tiles (224, 448).
@pytest.mark.parametrize("keys", [64, 65, 128, 129, 223, 224, 225, 352, 353, 448, 449])
@pytest.mark.parametrize(("k", "dilation"), [(9, 1), (16, 4), (32, 4)])
def test_sizes_at_the_limits(library, keys, k, dilation):
    if k * dilation > keys:
        pytest.skip("more neighbours than keys")
    generator = np.random.default_rng(keys)
    x = to_bits(integers(generator, 1, 5, 16), "f16")
    y = to_bits(integers(generator, 1, keys, 16), "f16")
    check_exactly(library, x, k, dilation, "f16", y=y, seed=k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 7, 8, 16, 63, 64, 80, 129])
def test_any_channel_count(library, dtype, channels):
    generator = np.random.default_rng(channels)
    x = to_bits(integers(generator, 2, 37, channels), dtype)
    check_exactly(library, x, 9, 1, dtype, seed=channels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 16, 28, 29, 61])
def test_any_query_count(library, dtype, queries):
    generator = np.random.default_rng(queries)
    x = to_bits(integers(generator, 2, queries, 16), dtype)
    y = to_bits(integers(generator, 2, 70, 16), dtype)
    check_exactly(library, x, 5, 2, dtype, y=y)
    check_exactly(library, x, 1, 1, dtype)  # a query among its own keys


def test_one_of_everything(library):
    x = to_bits(np.full((1, 1, 1), 3.0), "f32")
    for normalize in (False, True):
        idx, dist = knn(library, x, 1, 1, "f32", normalize=normalize)
        assert idx.tolist() == [[[0]]] and dist.tolist() == [[[0.0]]]


def test_no_channels(library):
    """All distances are zero."""
    x = np.empty((1, 70, 0), np.float32)
    idx, dist = knn(library, x, 3, 2, "f32")
    assert (idx == [0, 2, 4]).all() and (dist == 0).all()


@pytest.mark.parametrize(("batch", "queries"), [(0, 5), (2, 0)])
def test_empty(library, batch, queries):
    x = np.empty((batch, queries, 8), np.float32)
    y = np.zeros((batch, 6, 8), np.float32)
    idx, dist = knn(library, x, 3, 1, "f32", y=y)
    assert idx.shape == dist.shape == (batch, queries, 3)


@pytest.mark.parametrize("keys", [49, 196, 600])
@pytest.mark.parametrize("value", [0.0, 2.0, np.nan])
def test_all_keys_alike(library, keys, value):
    x = to_bits(np.full((1, 3, 8), 1.0), "bf16")
    y = to_bits(np.full((1, keys, 8), value), "bf16")
    check_exactly(library, x, 9, 4, "bf16", y=y)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [40, 150, 300])
def test_nan_and_repeated_rows(library, dtype, keys, normalize):
    """Rows of one coordinate, so that distances stay exact when normalised."""
    generator = np.random.default_rng(keys)
    rows = np.eye(12, dtype=np.float32)[generator.integers(0, 12, (2, keys))]
    rows[generator.random((2, keys)) < 0.6] = np.nan  # more than half of the slots asked for are NaN
    rows[:, 5] = 0.0
    x = to_bits(rows, dtype)
    check_exactly(library, x, 10, 3, dtype, normalize=normalize, seed=keys)


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_norms_are_nan(library, dtype):
    generator = np.random.default_rng(2)
    values = integers(generator, 1, 40, 16)
    values[0, ::3, 4] = np.inf if dtype == "f16" else 3e38  # f16 has no number whose square overflows
    x = to_bits(values, dtype)
    idx, dist = knn(library, x, 40, 1, dtype, normalize=True)
    spoilt = np.zeros(40, bool)
    spoilt[::3] = True
    assert np.isnan(dist[0, spoilt]).all() and (idx[0, spoilt] == np.arange(40)).all()
    assert np.isnan(dist[0, ~spoilt, 26:]).all() and np.isfinite(dist[0, ~spoilt, :26]).all()
    assert (idx[0, ~spoilt, 26:] == np.flatnonzero(spoilt)).all()


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_infinite_bias(library, value):
    """Infinities have no midpoint to guess a pivot from."""
    generator = np.random.default_rng(3)
    x = to_bits(integers(generator, 1, 150, 8), "bf16")
    bias = np.where(generator.random((1, 150, 150)) < 0.8, value, 0).astype(np.float32)
    check_exactly(library, x, 18, 4, "bf16", bias=bias)


@pytest.mark.parametrize("shape", [(2, 30, 70), (1, 30, 70), (2, 1, 70), (2, 30, 1), (1, 1, 70), (1, 1, 1)])
@pytest.mark.parametrize(
    ("dtype", "bias_dtype"), [("f32", "f32"), ("bf16", "f32"), ("bf16", "bf16"), ("f16", "f16")]
)
def test_bias_broadcasts(library, dtype, bias_dtype, shape):
    generator = np.random.default_rng(4)
    x = to_bits(integers(generator, 2, 30, 8, high=2), dtype)
    y = to_bits(integers(generator, 2, 70, 8, high=2), dtype)
    bias = to_bits(integers(generator, *shape, high=9), bias_dtype)
    check_exactly(library, x, 6, 3, dtype, y=y, bias=bias, bias_dtype=bias_dtype)


def test_bias_of_any_strides(library):
    """Over several tiles of keys; transposed, as a relative position table is cheapest to view."""
    generator = np.random.default_rng(5)
    x = to_bits(integers(generator, 1, 20, 8), "bf16")
    y = to_bits(integers(generator, 1, 460, 8), "bf16")
    bias = integers(generator, 460, 20, 1, high=30).transpose(2, 1, 0)
    check_exactly(library, x, 9, 2, "bf16", y=y, bias=bias)


@pytest.mark.parametrize("ranks", [[3, 0, 11, 7], [0, 1, 2, 3], [-5, 12, 2**40, -(2**40)]])
def test_ranks(library, ranks):
    """Those out of range are clamped: Python checks them where it can see them."""
    generator = np.random.default_rng(6)
    x = to_bits(integers(generator, 2, 50, 16), "f16")
    check_exactly(library, x, 4, 3, "f16", ranks=ranks)


def test_ascending_keys_refill_the_shortlist(library):
    """Each key is nearer than all before it: every tile overflows the shortlist."""
    keys = -np.arange(700, dtype=np.float32).reshape(1, 700, 1)
    x = np.full((1, 4, 1), -2000, np.float32)
    check_exactly(library, x, 18, 4, "f32", y=keys)
    check_exactly(library, x, 32, 4, "f32", y=keys)
    check_exactly(
        library, x, 18, 4, "f32", y=np.ascontiguousarray(keys[:, ::-1])
    )  # only the first tile counts


@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_memory(library, dtype):
    """Rows of whole units that do not start at a multiple of 16 bytes."""
    generator = np.random.default_rng(7)
    x = to_bits(integers(generator, 1, 30, 16), dtype)
    y = to_bits(integers(generator, 1, 75, 16), dtype)
    check_exactly(library, x, 9, 1, dtype, y=y, shift=4 if dtype == "f32" else 2)


def test_large_integers_in_float32(library):
    """3xTF32 keeps integers up to 2048 exact, a single TF32 product those of 11 bits."""
    generator = np.random.default_rng(8)
    x = to_bits(integers(generator, 1, 90, 3, high=1300), "f32")
    check_exactly(library, x, 20, 2, "f32")
    check_exactly(library, x, 20, 2, "f32", allow_tf32=True)


@pytest.mark.parametrize(
    ("dtype", "allow_tf32"), [("f32", False), ("f32", True), ("bf16", False), ("f16", False)]
)
@pytest.mark.parametrize(
    ("keys", "channels", "k", "dilation"), [(49, 40, 9, 1), (196, 72, 18, 4), (500, 33, 9, 2)]
)
def test_real_features(library, dtype, allow_tf32, keys, channels, k, dilation):
    """A slot may differ from the oracle's only by keys whose distances rounding could exchange."""
    generator = np.random.default_rng(keys)
    values = generator.standard_normal((1, keys, channels)) + generator.standard_normal((1, 1, channels))
    y = to_bits(values, dtype)
    x = np.ascontiguousarray(y[:, :30])
    idx, dist = knn(library, x, k, dilation, dtype, y=y, normalize=True, allow_tf32=allow_tf32)
    _, want_dist = oracle(x, k, dilation, y=y, normalize=True)
    exact, square = ranking(x, y, None, True)
    mine = np.take_along_axis(exact, idx, -1) + square
    # Unit rows: two sums of `channels` terms and a handful of scalings, each a rounding of at most 1.
    band = EPSILON * (channels + 16)
    if allow_tf32:
        band += 2.0**-10 * 2  # both factors of 2 x̂·ŷ rounded to 11 bits
    assert np.abs(mine - want_dist).max() <= 2 * band
    assert np.abs(dist - mine).max() <= band
    for row in idx[0]:
        assert len(set(row)) == k


@pytest.mark.parametrize("channels", [16, 320, 1024])
def test_float32_is_as_accurate_as_float32(library, channels):
    """Products of split floats, cut off by the tensor cores, against the same formula in float32."""
    generator = np.random.default_rng(9)
    x = to_bits(generator.standard_normal((1, 70, channels)) + 1, "f32")
    idx, dist = knn(library, x, 70, 1, "f32", normalize=True)
    values, square = ranking(x, None, None, True)
    exact = values + square
    unit = x / np.sqrt((x * x).sum(-1, keepdims=True))
    norms = (unit * unit).sum(-1)
    plain = norms[:, None, :] - 2 * unit @ unit.transpose(0, 2, 1) + norms[:, :, None]
    error = np.abs(dist - np.take_along_axis(exact, idx, -1))
    assert error.max() <= 2 * np.abs(plain - exact).max()
    assert np.sqrt((error**2).mean()) <= 2 * np.sqrt(((plain - exact) ** 2).mean())


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny_and_zero_rows(library, dtype):
    """Zero rows are divided by 1e-12, not by zero: their distance is the other row's |ŷ|²."""
    generator = np.random.default_rng(10)
    values = generator.standard_normal((1, 30, 16))
    values[0, 4] = 0.0
    values[0, 9] *= 1e-3
    x = to_bits(values, dtype)
    idx, dist = knn(library, x, 30, 1, dtype, normalize=True)
    assert dist[0, 4, 0] == 0 and idx[0, 4, 0] == 4
    np.testing.assert_allclose(dist[0, 4, 1:], 1.0, rtol=1e-6)


@pytest.mark.parametrize(("keys", "k", "dilation"), [(60, 9, 2), (196, 18, 4), (300, 32, 4)])
def test_thread_order_does_not_matter(library, keys, k, dilation):
    """A missing barrier, or a wait for a copy that comes too late, would show here."""
    generator = np.random.default_rng(keys)
    y = to_bits(generator.standard_normal((1, keys, 150)), "bf16")  # three chunks of channels
    x = np.ascontiguousarray(y[:, :20])
    first = knn(library, x, k, dilation, "bf16", y=y, normalize=True)
    for seed in range(1, 6):
        again = knn(library, x, k, dilation, "bf16", y=y, normalize=True, seed=seed)
        for a, b in zip(first, again, strict=True):
            assert a.tobytes() == b.tobytes()


def test_no_distances(library):
    generator = np.random.default_rng(11)
    x = to_bits(integers(generator, 1, 66, 8), "bf16")
    idx, dist = knn(library, x, 4, 2, "bf16", distances=False)
    assert dist is None
    np.testing.assert_array_equal(idx, oracle(x, 4, 2)[0])


# ---------------------------------------------------------------------------------------------
# relation

TORCH_DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}  # fer::Dtype
SLOPE = 0.25  # exact, so that integers stay so


class RelationCall(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "queries", "keys", "channels", "heads", "width")),
        *((name, ctypes.c_int) for name in ("k", "dtype", "mode")),
        ("negative_slope", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("idx", "x", "y", "p", "q", "a")),
    ]


class RelationForward(RelationCall):
    _fields_ = [(name, ctypes.c_void_p) for name in ("out", "weights", "slots")]


class RelationBackward(RelationCall):
    _fields_ = [
        *((name, ctypes.c_bool) for name in ("own_keys", "need_nodes", "need_relation")),
        *((name, ctypes.c_void_p) for name in ("grad", "grad_weights", "slots", "reverse")),
        *((name, ctypes.c_void_p) for name in ("dx", "dy", "dp", "dq", "da")),
    ]


@pytest.fixture(scope="session")
def relation_library(tmp_path_factory):
    return build("relation_emulated", tmp_path_factory.mktemp("emulated"))


def address(tensor):
    return None if tensor is None else tensor.data_ptr()


def run_emulated(function, *arguments):
    message = ctypes.create_string_buffer(200)
    code = function(*arguments, message, ctypes.c_int64(len(message)))
    assert code == 0, f"error {code}: {message.value.decode()}"


class Graph:
    """One call's tensors; `own` takes the keys from the centres."""

    def __init__(self, make, mode, batch, queries, keys, channels, k, heads=1, width=4, dtype=torch.float32,
                 own=False, seed=0):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        self.mode, self.dtype, self.k, self.own = mode, dtype, k, own
        self.keys = queries if own else keys
        self.x = make(generator, batch, queries, channels).to(dtype)
        self.y = None if own else make(generator, batch, keys, channels).to(dtype)
        self.idx = torch.randint(0, self.keys, (batch, queries, k), generator=generator)
        self.p = self.q = self.a = None
        self.heads, self.width = 1, 0
        if mode != MR:
            self.heads, self.width = heads, width
            self.p = make(generator, batch, queries, heads * width).to(dtype)
            self.q = make(generator, batch, self.keys, heads * width).to(dtype)
            self.a = make(generator, heads, width).to(dtype)
        self.grad = make(generator, batch, queries, channels).to(dtype)
        self.grad_weights = None
        if mode != MR and seed % 2:
            self.grad_weights = make(generator, batch, queries, k, self.heads).to(dtype)

    def tensors(self):
        return self.x, self.idx, self.y, self.p, self.q, self.a

    def cast(self, dtype):
        return [t if t is None or not t.is_floating_point() else t.to(dtype) for t in self.tensors()]

    def fill(self, call):
        call.batch, call.queries, call.channels = self.x.shape
        call.keys, call.k, call.heads, call.width = self.keys, self.k, self.heads, self.width
        call.dtype, call.mode, call.negative_slope = TORCH_DTYPES[self.dtype], self.mode, SLOPE
        for name in ("idx", "x", "y", "p", "q", "a"):
            setattr(call, name, address(getattr(self, name)))
        call.y = call.y or call.x
        return call


def relation_forward(library, graph, *, slots=True, weights=True, seed=0, shift=0):
    out = torch.empty_like(graph.x)
    winners = torch.empty(graph.x.shape, dtype=torch.uint8) if slots and graph.mode != RSUM else None
    alpha = graph.x.new_empty((*graph.idx.shape, graph.heads)) if weights and graph.mode != MR else None
    call = graph.fill(RelationForward())
    call.out, call.weights, call.slots = address(out), address(alpha), address(winners)
    run_emulated(library.relation_emulated, ctypes.byref(call), ctypes.c_uint64(seed), ctypes.c_int64(shift))
    return out, alpha, winners


def relation_reverse(library, idx, keys, *, seed=0):
    batch, queries, k = idx.shape
    reverse = torch.empty((batch, keys + 1 + queries * k), dtype=torch.int32)
    run_emulated(
        library.relation_reverse_emulated, ctypes.c_void_p(address(idx)),
        *map(ctypes.c_int64, (batch, queries, keys)), ctypes.c_int(k), ctypes.c_void_p(address(reverse)),
        ctypes.c_uint64(seed),
    )  # fmt: skip
    return reverse


def relation_backward(library, graph, slots, reverse, *, nodes=True, relation=True, seed=0, shift=0):
    relation = relation and graph.mode != MR
    like = [
        graph.x if nodes else None,
        graph.y if nodes and not graph.own else None,
        *((t if relation else None) for t in (graph.p, graph.q, graph.a)),
    ]
    outputs = [None if t is None else torch.empty_like(t) for t in like]
    call = graph.fill(RelationBackward())
    call.own_keys, call.need_nodes, call.need_relation = graph.own, nodes, relation
    if not relation:
        call.x = call.y = None
    call.grad, call.grad_weights = address(graph.grad), address(graph.grad_weights)
    call.slots, call.reverse = address(slots), address(reverse)
    call.dx, call.dy, call.dp, call.dq, call.da = map(address, outputs)
    run_emulated(
        library.relation_backward_emulated, ctypes.byref(call), ctypes.c_uint64(seed), ctypes.c_int64(shift)
    )
    return outputs


def wanted_forward(graph, dtype):
    return reference.relation(
        *graph.cast(dtype), None, graph.mode, SLOPE, graph.mode != MR, graph.mode != RSUM
    )


def wanted_backward(graph, slots, dtype):
    x, idx, y, p, q, a = graph.cast(dtype)
    weights = None if graph.grad_weights is None else graph.grad_weights.to(dtype)
    found = reference.relation_backward(
        graph.grad.to(dtype), weights, x, idx, y, p, q, a, slots, None,
        graph.keys, graph.own, graph.mode, SLOPE, True, graph.mode != MR,
    )  # fmt: skip
    return [None if t.shape[0] == 0 and t.dim() == 1 else t for t in found]


def check_equal(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def check_near(got, want, terms):
    """`want` in float64; `terms` roundings in float32 at its largest size, then one to `got`'s dtype."""
    scale = 1.0 if want.numel() == 0 else max(1.0, float(want.abs().max()))
    slack = terms * EPSILON * scale
    one_rounding = 0.0 if got.dtype == torch.float32 else torch.finfo(got.dtype).eps / 2
    bound = slack + one_rounding * (want.abs() + slack) + torch.finfo(got.dtype).tiny
    assert got.shape == want.shape
    assert bool(((got.double() - want).abs() <= bound).all())


def few_integers(generator, *shape):
    """Many ties."""
    return torch.randint(-2, 3, shape, generator=generator).float()


def real(generator, *shape):
    return torch.randn(shape, generator=generator)


def check_winners(graph, slots):
    """Each maximum lies within rounding of the largest candidate."""
    x, idx, y, p, q, a = graph.cast(torch.float64)
    delta = reference.neighbours(x if y is None else y, idx) - x.unsqueeze(2)
    if graph.mode == RMR:
        _, powers, total = reference._softmax(p, idx, q, a, SLOPE)
        factor = graph.k * powers / total
        delta = (delta.unflatten(-1, (graph.heads, -1)) * factor.unsqueeze(-1)).flatten(-2)
    chosen = delta.gather(2, slots.long().unsqueeze(2)).squeeze(2)
    assert bool((delta.amax(2) - chosen <= 100 * EPSILON * (1 + delta.abs().amax(2))).all())


def check_relation(library, graph, seed=0, shift=0):
    """Everything against the reference: in float64, or exactly where nothing rounds."""
    out, alpha, slots = relation_forward(library, graph, seed=seed, shift=shift)
    if graph.mode == MR:
        want, _, want_slots = wanted_forward(graph, graph.dtype)
        check_equal(out, want)
        check_equal(slots, want_slots)
    else:
        want, want_alpha, _ = wanted_forward(graph, torch.float64)
        terms = 8 * (graph.k + graph.width + 8)
        check_near(out, want, terms)
        check_near(alpha, want_alpha, terms)
        if slots is not None:
            check_winners(graph, slots)
    plain, _, _ = relation_forward(library, graph, slots=False, weights=False, seed=seed, shift=shift)
    assert plain.tolist() == out.tolist()  # equal, and no NaN

    reverse = relation_reverse(library, graph.idx, graph.keys, seed=seed)
    check_equal(reverse, reference.reverse_graph(graph.idx, graph.keys))
    found = relation_backward(library, graph, slots, reverse, seed=seed, shift=shift)
    wanted = wanted_backward(graph, slots, torch.float64)
    terms = 16 * (graph.k + graph.width + graph.x.shape[2] + 16) + graph.idx[0].numel() // 4
    for got, want in zip(found, wanted, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            check_near(got, want, terms)
    return out, alpha, slots, reverse, found


# Units of 8, 4 and 1 channels and relation elements; groups of one head and of several; chunks.
RELATION_SIZES = [  # N, M, C, k, H, R / H
    (20, 20, 32, 9, 4, 12),
    (33, 12, 48, 4, 4, 3),
    (9, 40, 30, 5, 3, 4),
    (17, 23, 24, 3, 2, 8),
    (12, 12, 200, 6, 1, 80),
    (7, 11, 21, 18, 7, 5),
    (5, 6, 1, 2, 1, 1),
    (6, 150, 16, 128, 2, 2),
    (1, 1, 8, 1, 2, 0),
]


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
@pytest.mark.parametrize("mode", [MR, RMR, RSUM], ids=MODES)
@pytest.mark.parametrize("sizes", RELATION_SIZES, ids=str)
def test_relation(relation_library, sizes, mode, dtype):
    queries, keys, channels, k, heads, width = sizes
    own = queries == keys and dtype != torch.float16
    graph = Graph(real, mode, 2, queries, keys, channels, k, heads, width, dtype, own=own, seed=k)
    check_relation(relation_library, graph, seed=channels)


@pytest.mark.parametrize("mode", [RMR, RSUM])
@pytest.mark.parametrize("channels", [40, 6])
def test_relation_of_zero_scores_exactly(relation_library, mode, channels):
    """k a power of two and a = 0: weights of exactly 1 / k, so integers stay integers and ties are many."""
    graph = Graph(few_integers, mode, 2, 30, 20, channels, 8, 2, 4, torch.bfloat16, seed=4)
    graph.a.zero_()
    out, alpha, slots = relation_forward(relation_library, graph)
    for got, want in zip((out, alpha), wanted_forward(graph, graph.dtype)[:2], strict=True):
        check_equal(got, want)
    if mode == RMR:
        plain = Graph(few_integers, MR, 1, 1, 1, 1, 1)
        plain.__dict__.update(graph.__dict__, mode=MR, p=None, q=None, a=None, heads=1, width=0)
        same, _, same_slots = relation_forward(relation_library, plain)
        check_equal(out, same)
        check_equal(slots, same_slots)
        check_equal(slots, wanted_forward(graph, graph.dtype)[2])
    reverse = relation_reverse(relation_library, graph.idx, graph.keys)
    found = relation_backward(relation_library, graph, slots, reverse)
    for got, want in zip(found, wanted_backward(graph, slots, graph.dtype), strict=True):
        check_equal(got, want)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_max_relative_exactly(relation_library, dtype, own):
    graph = Graph(few_integers, MR, 2, 40, 25, 24, 9, dtype=dtype, own=own)
    _, _, slots, reverse, _ = check_relation(relation_library, graph)
    found = relation_backward(relation_library, graph, slots, reverse)
    for got, want in zip(found, wanted_backward(graph, slots, dtype), strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            check_equal(got, want)


@pytest.mark.parametrize("mode", [MR, RMR, RSUM], ids=MODES)
@pytest.mark.parametrize("channels", [16, 5])
def test_relation_keeps_nan(relation_library, mode, channels):
    """The first NaN wins a maximum and stays; infinities of both signs make more of them."""
    graph = Graph(few_integers, mode, 2, 30, 30, channels, 8, 1, 4, own=mode == MR, seed=2)
    spoilt = graph.x if graph.own else graph.y
    generator = torch.Generator().manual_seed(channels)
    for value, share in ((float("nan"), 0.1), (float("inf"), 0.1), (float("-inf"), 0.1)):
        spoilt[torch.rand(spoilt.shape, generator=generator) < share] = value
        graph.x[0, :, 0] = value
    if mode != MR:
        graph.a.zero_()
        graph.p[1, 3] = float("nan")
    got = relation_forward(relation_library, graph)
    want = wanted_forward(graph, graph.dtype)
    check_equal(got[0], want[0])
    if mode != RSUM:
        check_equal(got[2], want[2])
    if mode != MR:
        check_equal(got[1], want[1])
    check_equal(relation_forward(relation_library, graph, slots=False)[0], want[0])


def test_scores_of_minus_infinity_are_nan(relation_library):
    graph = Graph(real, RMR, 1, 4, 6, 8, 3, 2, 4)
    graph.a[0] = 1.0
    graph.p[0, 1, :4] = float("-inf")
    out, alpha, slots = relation_forward(relation_library, graph)
    assert bool(out[0, 1, :4].isnan().all()) and bool(alpha[0, 1, :, 0].isnan().all())
    assert not out[0, 1, 4:].isnan().any() and not out[0, 0].isnan().any()
    assert slots[0, 1, :4].tolist() == [0] * 4


@pytest.mark.parametrize(
    ("queries", "keys", "k"),
    [(40, 767, 5), (40, 768, 5), (61, 769, 5), (150, 4100, 9), (600, 3, 16), (1, 9, 1)],
)
def test_reverse_graph(relation_library, queries, keys, k):
    """Keys of one range and of several, empty keys, all edges at one key."""
    idx = torch.randint(0, keys, (2, queries, k), generator=torch.Generator().manual_seed(keys))
    idx[1] = keys // 2
    check_equal(relation_reverse(relation_library, idx, keys, seed=k), reference.reverse_graph(idx, keys))


@pytest.mark.parametrize("mode", [MR, RMR, RSUM], ids=MODES)
def test_relation_of_many_keys_and_of_many_queries(relation_library, mode):
    check_relation(relation_library, Graph(real, mode, 1, 13, 1700, 8, 4, 2, 4, torch.bfloat16))
    check_relation(relation_library, Graph(real, mode, 1, 700, 10, 8, 4, 2, 4, torch.bfloat16))


def test_many_heads(relation_library):
    """More than one block has room for, of a single channel each."""
    check_relation(relation_library, Graph(real, RMR, 1, 3, 5, 130, 100, 130, 1))
    check_relation(relation_library, Graph(real, RSUM, 1, 3, 5, 130, 100, 130, 1))


@pytest.mark.parametrize("rows", [260, 300])
def test_da_of_many_blocks(relation_library, rows):
    """More partial sums than one block of the last kernel adds up."""
    check_relation(relation_library, Graph(real, RSUM, rows, 2, 2, 4, 2, 1, 4, own=True))


@pytest.mark.parametrize("mode", [MR, RMR, RSUM], ids=MODES)
@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_relation_in_unaligned_memory(relation_library, mode, dtype):
    graph = Graph(real, mode, 1, 10, 14, 16, 4, 2, 8, dtype)
    check_relation(relation_library, graph, shift=4 if dtype == torch.float32 else 2)


@pytest.mark.parametrize("mode", [MR, RMR, RSUM], ids=MODES)
def test_relation_writes_what_is_wanted_only(relation_library, mode):
    graph = Graph(real, mode, 2, 15, 15, 16, 4, 2, 4, own=True, seed=1)
    _, _, slots, reverse, everything = check_relation(relation_library, graph)
    nodes = relation_backward(relation_library, graph, slots, reverse, relation=False)
    relation = relation_backward(relation_library, graph, slots, reverse, nodes=False)
    for got, want in zip((nodes[0], *relation[2:]), (everything[0], *everything[2:]), strict=True):
        if want is not None:
            assert got.tolist() == want.tolist()


@pytest.mark.parametrize("mode", [MR, RMR, RSUM], ids=MODES)
def test_wrong_indices_slots_and_reverse_reach_no_other_memory(relation_library, mode):
    """The results mean nothing; the fences around every array are the test."""
    graph = Graph(real, mode, 2, 12, 9, 16, 5, 2, 4)
    graph.idx[:] = torch.tensor([-1, 9, 2**40, -(2**63), 2**63 - 1])
    _, _, slots = relation_forward(relation_library, graph)
    reverse = relation_reverse(relation_library, graph.idx, graph.keys)
    sorted_edges = reverse[:, graph.keys + 1 :].sort(1).values
    check_equal(sorted_edges, torch.arange(60, dtype=torch.int32).expand(2, -1))
    if slots is not None:
        slots.fill_(255)
    for value in (-(2**31), -1, 59, 60, 2**31 - 1):
        relation_backward(relation_library, graph, slots, reverse.fill_(value))
    reverse[:, : graph.keys + 1] = torch.tensor([0, 2**31 - 1] * 5)
    relation_backward(relation_library, graph, slots, reverse)


@pytest.mark.parametrize("mode", [MR, RMR, RSUM], ids=MODES)
@pytest.mark.parametrize(
    ("batch", "queries", "keys", "channels"), [(0, 5, 4, 8), (2, 0, 4, 8), (2, 0, 0, 8), (2, 5, 4, 0)]
)
def test_empty_relation(relation_library, mode, batch, queries, keys, channels):
    graph = Graph(real, mode, batch, queries, max(keys, 1), channels, 2, 2, 4, seed=1)
    if keys == 0:
        graph.keys = 0
        graph.y = graph.y[:, :0]
        graph.q = None if graph.q is None else graph.q[:, :0].contiguous()
    out, _, slots = relation_forward(relation_library, graph)
    reverse = relation_reverse(relation_library, graph.idx, graph.keys)
    check_equal(reverse, reference.reverse_graph(graph.idx, graph.keys))
    found = relation_backward(relation_library, graph, slots, reverse)
    assert out.shape == graph.x.shape
    if queries == 0 or batch == 0:
        assert all(got is None or not got.any() for got in found)
    elif mode != MR:
        for got, want in zip(found[2:], wanted_backward(graph, slots, torch.float64)[2:], strict=True):
            check_near(got, want, 200)


@pytest.mark.parametrize("mode", [MR, RMR, RSUM], ids=MODES)
def test_thread_order_does_not_matter_to_relation(relation_library, mode):
    graph = Graph(real, mode, 1, 70, 50, 72, 9, 2, 20, torch.bfloat16, seed=1)
    runs = []
    for seed in range(4):
        out, alpha, slots = relation_forward(relation_library, graph, seed=seed)
        reverse = relation_reverse(relation_library, graph.idx, graph.keys, seed=seed)
        found = relation_backward(relation_library, graph, slots, reverse, seed=seed)
        runs.append([t for t in (out, alpha, slots, reverse, *found) if t is not None])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))
