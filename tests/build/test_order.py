"""csrc/include/fer/order.h, compiled for the host: the order that every backend sorts by."""

import ctypes
import math
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def order(tmp_path_factory):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("order") / "order.so"
    source = Path(__file__).with_name("order.cpp")
    command = [
        compiler,
        "-std=c++17",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unused-function",
        "-fPIC",
        "-shared",
        f"-I{ROOT / 'csrc' / 'include'}",
        str(source),
        "-o",
        str(library),
    ]
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.key.argtypes, loaded.key.restype = [ctypes.c_float], ctypes.c_uint32
    loaded.value.argtypes, loaded.value.restype = [ctypes.c_uint32], ctypes.c_float
    loaded.packed.argtypes, loaded.packed.restype = [ctypes.c_float, ctypes.c_uint32], ctypes.c_uint64
    loaded.packed_index.argtypes, loaded.packed_index.restype = [ctypes.c_uint64], ctypes.c_uint32
    loaded.packed_value.argtypes, loaded.packed_value.restype = [ctypes.c_uint64], ctypes.c_float
    return loaded


floats = st.floats(width=32, allow_nan=True, allow_infinity=True)


def test_keys_order_as_floats(order):
    @given(floats, floats)
    def check(a, b):
        if math.isnan(a) or math.isnan(b):
            assert (order.key(a) < order.key(b)) == (math.isnan(b) and not math.isnan(a))
        else:
            assert (order.key(a) < order.key(b)) == (a < b)
            assert (order.key(a) == order.key(b)) == (a == b)  # also -0 and +0

    check()


def test_keys_give_their_value_back(order):
    @given(floats)
    def check(a):
        back = order.value(order.key(a))
        assert math.isnan(back) if math.isnan(a) else back == a

    check()


def test_edges(order):
    values = [-math.inf, -3.4e38, -1.0, -1e-45, 0.0, 1e-45, 1.0, 3.4e38, math.inf, math.nan]
    keys = [order.key(value) for value in values]
    assert keys == sorted(keys) and len(set(keys)) == len(keys)
    assert order.key(-0.0) == order.key(0.0)
    negative_nan = struct.unpack("<f", struct.pack("<I", 0xFFC00001))[0]
    assert order.key(negative_nan) == order.key(math.nan) == 0xFFFFFFFF


def test_packed_keys_break_ties_by_index(order):
    assert order.packed(1.0, 3) < order.packed(1.0, 4) < order.packed(1.5, 0) < order.packed(math.nan, 0)
    assert order.packed(math.nan, 1) < order.packed(math.nan, 2)
    assert order.packed_index(order.packed(-2.5, 77)) == 77
    assert order.packed_value(order.packed(-2.5, 77)) == -2.5
