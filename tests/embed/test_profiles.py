"""Which profile an engine's call takes, and padding to it: the C++ library beside mra_export/profiles.py."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mra_export import profiles
from mra_export.errors import ContractError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler: install g++")
    target = tmp_path_factory.mktemp("profiles") / "libprofiles.so"
    folders = [f"-I{ROOT / 'mra_export/embed' / name}" for name in ("src", "include")]
    sources = [ROOT / "mra_export/embed/src/profiles.cc", ROOT / "tests/cpp/mra_profiles_driver.cc"]
    subprocess.run([compiler, "-std=c++17", "-shared", "-fPIC", *folders, *map(str, sources), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def sizes(shape: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(shape))(*shape)


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[profiles.Profile], tuple[int, ...]]:
    rank = draw(st.sampled_from([2, 3]))
    made = []
    for _ in range(draw(st.integers(1, 4))):
        axes = [sorted(draw(st.tuples(*[st.integers(1, 12)] * 3))) for _ in range(rank)]
        made.append({"input_ids": dict(zip(("min", "opt", "max"), map(list, zip(*axes, strict=True)), strict=True))})
    return made, draw(st.tuples(*[st.integers(1, 14)] * rank))


@given(calls())
def test_the_profile_and_the_shape_are_those_of_python(driver, call) -> None:
    made, shape = call
    flat = sizes(tuple(size for profile in made for kind in ("min", "opt", "max") for size in profile["input_ids"][kind]))
    padded, message = sizes((0,) * len(shape)), ctypes.create_string_buffer(4096)
    picked = driver.driver_pick(flat, len(made), len(shape), sizes(shape), padded, message, ctypes.c_size_t(4096))
    if picked >= 0:
        assert (picked, tuple(padded)) == profiles.pick(made, shape)
        return
    with pytest.raises(ContractError) as caught:
        profiles.pick(made, shape)
    assert message.value.decode() == str(caught.value)


@given(
    st.integers(1, 4).flatmap(lambda rank: st.tuples(*[st.tuples(*[st.integers(1, 5)] * rank)] * 2)),
    st.sampled_from(["<i8", "<f2"]),
)
def test_what_two_shapes_have_in_common_is_copied(driver, shapes, dtype) -> None:
    source = np.arange(1, 1 + np.prod(shapes[0])).reshape(shapes[0]).astype(dtype)
    found, wanted = np.zeros(shapes[1], dtype), np.zeros(shapes[1], dtype)
    common = tuple(slice(min(pair)) for pair in zip(*shapes, strict=True))
    wanted[common] = source[common]
    pointers = (ctypes.c_void_p(source.ctypes.data), sizes(shapes[0]), ctypes.c_void_p(found.ctypes.data), sizes(shapes[1]))
    driver.driver_copy(*pointers, len(shapes[0]), ctypes.c_size_t(source.itemsize))
    np.testing.assert_array_equal(found, wanted)
