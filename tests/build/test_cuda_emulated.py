"""csrc/cuda/knn.cu on the host emulator, against a stable sort in numpy.

The emulator (cuda_emulator.h) runs the kernel's own code, so what is tested here is all of it but
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

ROOT = pathlib.Path(__file__).resolve().parents[2]
DTYPES = {"f32": 0, "bf16": 2, "f16": 3}  # fer::Dtype
EPSILON = float(np.finfo(np.float32).eps)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler: neither CXX nor g++")
    target = tmp_path_factory.mktemp("emulated") / "knn.so"
    command = [compiler, "-x", "c++", "-std=c++20", "-O2", "-fPIC", "-shared", "-fno-strict-aliasing"]
    command += ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error", "-ffp-contract=off"]
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DFER_EMULATED_CUDA"]
    command += [f"-I{ROOT / part}" for part in ("tests/build/emulator", "csrc/include", "csrc/cuda")]
    command += [str(ROOT / "tests/build/knn_emulated.cpp"), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(target))


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
