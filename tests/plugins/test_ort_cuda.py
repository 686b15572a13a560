"""The ONNX Runtime op for GPUs, without one: its adapter with the emulated kernels, under ONNX Runtime's CPU provider and under
a host that plays ONNX Runtime; and onnxruntime-gpu itself where it was downloaded."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_cases import DTYPES, cast, hostile_cases
from oracles import OpCase, make_case
from test_ort import ELEMENT, feeds, model

from mra_export import libraries
from mra_export.contract import Attributes

ort = pytest.importorskip("onnxruntime")

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "mra_export" / "plugins"
sys.path.insert(0, str(ROOT / "tests" / "emulator"))
import emulated  # noqa: E402

SOURCES = (
    *emulated.SOURCES,
    PLUGINS / "mra_attention_ort.cc",
    PLUGINS / "ort" / "node.cc",
    PLUGINS / "ort" / "cuda_node.cc",
    Path(__file__).parent / "ort_host.cc",
)
INCLUDE = (
    *(PLUGINS / name for name in ("include", "cuda", "common", "ort", ".", "third_party/onnxruntime")),
    ROOT / "tests" / "emulator",
    ROOT / "tests" / "tensorrt" / "host",
)


@pytest.fixture(scope="module")
def adapter() -> Any:
    """The adapter for the GPU with emulated kernels, and the host that plays ONNX Runtime. `path` is its file."""
    if os.environ.get("CXX", "g++") and not emulated.shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("no C++ compiler: install g++")
    path = emulated.build(SOURCES, INCLUDE)
    lib = ctypes.CDLL(str(path))
    for name in ("host_run", "host_take_events", "host_reload", "host_create_on_gpu"):
        getattr(lib, name).restype = ctypes.c_char_p
    lib.host_run.argtypes = (ctypes.POINTER(ctypes.c_void_p), *[ctypes.c_int64] * 5, ctypes.c_void_p)
    lib.path = path
    return lib


def session(adapter: Any, serialized: bytes) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(adapter.path))
    return ort.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_as_the_kernel_in_onnxruntime(adapter: Any, dtype: str) -> None:
    for made in hostile_cases()[:8]:
        attributes = made.attributes.as_dict()
        attributes["num_blocks"] = min(attributes["num_blocks"], 2**62)
        attributes["padding_invariant"] = int(attributes["padding_invariant"])
        actual = session(adapter, model(dtype, **attributes)).run(None, feeds(made))[0]
        wanted = emulated.attention(*cast(made, dtype).arrays, made.attributes).astype(np.float32)
        assert actual.tobytes() == wanted.tobytes(), made
    assert set(ELEMENT) == set(DTYPES)


def test_errors_of_the_kernel_are_statuses(adapter: Any) -> None:
    one = session(adapter, model(num_heads=2, num_blocks=5, scale=0.25))
    x = np.zeros((2, 40, 32), np.float32)
    good = {"query": x, "key": x, "value": x, "mask": np.ones((2, 40), np.int32)}
    with pytest.raises(Exception, match=r"layer\.0': key has shape \(2, 39, 32\), query \(2, 40, 32\)"):
        one.run(None, good | {"key": x[:, 1:]})
    adapter.mra_emulation_fail_after(1)
    with pytest.raises(Exception, match=r"layer\.0': .*: the text of the CUDA error \(query has shape \(2, 40, 32\)\)"):
        one.run(None, good)
    adapter.mra_emulation_fail_after(-1)
    assert not one.run(None, good)[0].any(), "a refused call leaves the session usable"
    with pytest.raises(Exception, match=r"attribute num_heads \(int\) is missing"):
        session(adapter, model(num_blocks=5, scale=0.25))


def host_run(adapter: Any, made: OpCase, stream: int) -> tuple[str, np.ndarray]:
    """What a call of the op says, and its context."""
    context = np.full_like(made.query, np.nan)
    arrays = [*made.arrays, context]
    tensors = (ctypes.c_void_p * 5)(*(array.ctypes.data for array in arrays))
    attributes = made.attributes
    said = adapter.host_run(tensors, *made.query.shape, attributes.num_heads, attributes.num_blocks, stream)
    return said.decode(), context


def test_workspace_is_scratch_memory_of_the_stream(adapter: Any) -> None:
    made = make_case(Attributes(2, 9, 0.25), batch=2, length=140, head_size=16, masking="holes")
    wanted = emulated.attention(*made.arrays, made.attributes)
    for stream, how in ((0x1234, "scratch"), (0, "alloc")):
        said, context = host_run(adapter, made, stream)
        assert said == ""
        assert context.tobytes() == wanted.tobytes()
        assert adapter.host_take_events().decode().split() == ["allocator", "stream", how, "free", "released"]


def test_no_memory_for_the_workspace_is_an_error(adapter: Any) -> None:
    made = make_case(Attributes(1, 2, 0.25), batch=1, length=40, head_size=8, masking="none")
    adapter.host_out_of_memory(1)
    said, _ = host_run(adapter, made, 1)
    adapter.host_out_of_memory(0)
    assert "no device memory for a workspace of" in said
    assert adapter.host_take_events().decode().split() == ["allocator", "stream", "scratch", "released"]


def test_float32_products_are_chosen_by_the_environment(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_case(Attributes(2, 9, 0.25), batch=2, length=140, head_size=16, masking="holes")
    monkeypatch.setenv("MRA_ATTENTION_FLOAT32", "fma")
    said, exact = host_run(adapter, made, 1)
    assert said == ""
    assert exact.tobytes() == emulated.attention(*made.arrays, made.attributes).tobytes()
    monkeypatch.setenv("MRA_ATTENTION_FLOAT32", "tf32x3")
    said, context = host_run(adapter, made, 1)
    assert said == ""
    np.testing.assert_allclose(context, exact, atol=1e-4)
    for wrong in ("tf32", ""):
        monkeypatch.setenv("MRA_ATTENTION_FLOAT32", wrong)
        with pytest.raises(Exception, match=rf"layer\.0': .*MRA_ATTENTION_FLOAT32 is '{wrong}': set it to fma or tf32x3"):
            session(adapter, model(num_heads=2, num_blocks=5, scale=0.25))


@pytest.fixture
def ort_ops(tmp_path: Path) -> bytes:
    """Path of a copy of libmra_ort: other tests' sessions keep the original loaded."""
    found = libraries.find("ort_ops")
    if found is None:
        pytest.skip("libmra_ort is not built: pip install -e .")
    return str(shutil.copy(found, tmp_path)).encode()


def test_nothing_is_left_when_the_library_is_unloaded(adapter: Any, ort_ops: bytes) -> None:
    counts = (ctypes.c_int * 2)(-1, -1)
    assert adapter.host_reload(ort_ops, 20, counts) == b""
    assert counts[0] == 0
    assert counts[1] in (3, 6)  # without and with CUDA


def test_the_gpu_op_needs_onnxruntime_1_18(adapter: Any, ort_ops: bytes) -> None:
    said = adapter.host_create_on_gpu(ort_ops, b"1.31.0").decode()
    if said == "no op for CUDAExecutionProvider":
        pytest.skip("libmra_ort was built without CUDA")
    assert said == ""
    said = adapter.host_create_on_gpu(ort_ops, b"1.17.3").decode()
    assert said == "MraAttention on a GPU needs ONNX Runtime 1.18 or newer, this is 1.17: upgrade onnxruntime-gpu"
