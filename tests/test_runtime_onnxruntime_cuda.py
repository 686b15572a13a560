"""The onnxruntime backend on a GPU, without one: why it cannot run, each in its own words; and, with torch's CPU memory and ONNX
Runtime's CPU provider in place of the GPU's, what it binds, keeps and refuses."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mra_export import gpu, kernel, libraries
from mra_export.backends import CudaBackend, onnx_runtime, onnx_runtime_cuda
from mra_export.backends.onnx_runtime_cuda import OnnxRuntimeCudaBackend
from mra_export.bundle import MODEL, OP_LIBRARY, Bundle
from mra_export.errors import BackendError, ContractError, PluginLoadError
from mra_export.runtime import MraRuntime, choose_backend

ROOT = Path(__file__).resolve().parents[1]
ONE_GPU = (gpu.Gpu("an imagined GPU", "9.0"),)


# Why not


@pytest.fixture
def with_provider(monkeypatch) -> None:
    """As if this onnxruntime had the CUDA provider."""
    monkeypatch.setattr(onnx_runtime.ort, "get_available_providers", lambda: [onnx_runtime.CUDA, onnx_runtime.CPU])
    onnx_runtime_cuda.start_provider.cache_clear()


def load(bundles: Any, **options: Any) -> MraRuntime:
    return MraRuntime.load(bundles("fp32"), "onnxruntime", "cuda", **options)


@pytest.mark.skipif(onnx_runtime.cuda_available(), reason="this onnxruntime has the CUDA provider")
def test_an_onnxruntime_without_the_provider(bundles) -> None:
    with pytest.raises(BackendError, match=r"here has no CUDAExecutionProvider \(it has .*\): install onnxruntime-gpu"):
        load(bundles)


@pytest.mark.usefixtures("with_provider")
def test_a_machine_without_a_driver_or_gpu(bundles, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "devices", lambda: ())
    monkeypatch.setattr(gpu, "why_none", lambda: "this machine has no NVIDIA driver (libcuda.so.1)")
    with pytest.raises(BackendError, match=r"device is 'cuda', but this machine has no NVIDIA driver \(libcuda\.so\.1\)"):
        load(bundles)


@pytest.mark.usefixtures("with_provider")
@pytest.mark.skipif(onnx_runtime.cuda_available(), reason="this onnxruntime has the CUDA provider")
def test_a_provider_library_that_does_not_load(bundles, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "devices", lambda: ONE_GPU)
    monkeypatch.setattr(onnx_runtime_cuda, "load_session", lambda model, options, providers: _Session([onnx_runtime.CPU]))
    with pytest.raises(BackendError, match=r"cannot use its CUDAExecutionProvider: .*providers_\w+\.so: cannot open shared object"):
        load(bundles)
    assert not onnx_runtime_cuda.start_provider.cache_info().currsize, "a failure is not remembered"


def test_an_op_library_without_cuda(monkeypatch, tmp_path) -> None:
    if not kernel.available():
        pytest.skip("libmra_attention is not built")
    library = libraries.require("kernels")
    if not kernel.has_cuda(library):
        with pytest.raises(BackendError, match=r"was built without CUDA: build it with an nvcc"):
            onnx_runtime_cuda.check_library(library, "fp32")
    monkeypatch.setattr(kernel, "has_cuda", lambda path: False)
    with pytest.raises(BackendError, match=r"libmra_attention\.so was built without CUDA.*then export the bundle again"):
        onnx_runtime_cuda.check_library(library, "fp32")


def test_a_library_that_is_none_has_no_cuda(tmp_path) -> None:
    path = tmp_path / "lib.so"
    path.write_bytes(b"no library")
    with pytest.raises(PluginLoadError, match=r"lib\.so does not load"):
        kernel.has_cuda(path)


@pytest.mark.usefixtures("with_provider")
def test_what_needs_a_torch_for_the_gpu(bundles, monkeypatch) -> None:
    monkeypatch.setattr(onnx_runtime_cuda, "start_provider", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="CUDA graphs need a torch that can use the GPU"):
        load(bundles, cuda_graphs=True)
    with pytest.raises(BackendError, match="bfloat16, which numpy does not have, needs a torch that can use the GPU"):
        MraRuntime.load(bundles("bf16"), "onnxruntime", "cuda")


@pytest.mark.usefixtures("with_provider")
def test_auto_takes_onnxruntime_where_the_op_library_has_cuda(bundles, monkeypatch) -> None:
    bundle = Bundle.load(bundles("fp32"))
    monkeypatch.setattr(kernel, "has_cuda", lambda path: path == bundle.file(OP_LIBRARY))
    assert choose_backend(bundle, "cuda", True) == ("onnxruntime", "it runs fp32 on cuda")
    monkeypatch.setattr(kernel, "has_cuda", lambda path: False)
    assert choose_backend(bundle, "cuda", True) == ("torch", "the bundle's op library was built without CUDA")


def test_cuda_graphs_are_for_a_gpu(bundles) -> None:
    for backend, device in (("onnxruntime", "cpu"), ("torch", "cuda")):
        with pytest.raises(ContractError, match="cuda_graphs is for backends 'tensorrt' and 'onnxruntime' on device 'cuda'"):
            MraRuntime.load(bundles("fp32"), backend, device, cuda_graphs=True)


# What it does


class _Session:
    """A session that says where its nodes are."""

    def __init__(self, providers: list[str], nodes: dict[str, list[str]] | None = None) -> None:
        self._providers = providers
        self._nodes = nodes or {}

    def get_providers(self) -> list[str]:
        return self._providers

    def get_provider_graph_assignment_info(self) -> list[Any]:
        return [_Part(name, ops) for name, ops in self._nodes.items()]


class _Part:
    def __init__(self, ep_name: str, ops: list[str]) -> None:
        self.ep_name, self._ops = ep_name, ops

    def get_nodes(self) -> list[Any]:
        return [type("Node", (), {"op_type": op}) for op in self._ops]


def test_work_that_is_left_to_the_cpu_is_refused() -> None:
    cuda, cpu = onnx_runtime.CUDA, onnx_runtime.CPU
    onnx_runtime_cuda.check_placement(_Session([cuda, cpu], {cuda: ["MatMul", "MraAttention"], cpu: ["Shape", "Slice"]}))
    with pytest.raises(BackendError, match=r"has no CUDA kernel for Gelu, MatMul of this graph: upgrade onnxruntime-gpu"):
        onnx_runtime_cuda.check_placement(_Session([cuda, cpu], {cuda: ["MraAttention"], cpu: ["MatMul", "Shape", "Gelu"]}))


class HostMemory:
    """TorchMemory on the CPU. `order` is what was asked of the streams."""

    device = torch.device("cpu")
    place = ("cpu", 0)

    def __init__(self) -> None:
        self.order: list[str] = []

    def provider_options(self) -> dict[str, str]:
        return {"device_id": "0"}

    def upload(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array)

    def empty(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        self.order.append("empty")
        return torch.full(shape, float("nan"), dtype=getattr(torch, dtype))

    def current_stream(self) -> str:
        return "caller"

    @contextlib.contextmanager
    def ordered(self, caller: str) -> Iterator[None]:
        self.order.append(f"after {caller}")
        yield
        self.order.append(f"before {caller}")

    def hand_over(self, tensors: Any, caller: str) -> None:
        self.order.append(f"{len(list(tensors))} to {caller}")


@pytest.fixture
def on_host(bundles, monkeypatch) -> Any:
    """Makes (backend, memory): the GPU's backend with its session and memory on the CPU."""
    if libraries.find("ort_ops") is None:
        pytest.skip("libmra_ort is not built")
    bundle = Bundle.load(bundles("fp32"))
    asked: list[Any] = []

    def session(model: Any, options: Any, providers: Any) -> Any:
        asked.append(providers[0])
        made = onnx_runtime.load_session(model, options, [onnx_runtime.CPU])
        made.get_providers = lambda: [onnx_runtime.CUDA]
        return made

    monkeypatch.setattr(onnx_runtime_cuda, "load_session", session)
    monkeypatch.setattr(onnx_runtime_cuda, "check_placement", lambda session: None)
    monkeypatch.setattr(onnx_runtime_cuda, "check_device", lambda dtype, device: None)
    monkeypatch.setattr(onnx_runtime_cuda, "check_library", lambda library, dtype: None)
    monkeypatch.setattr(onnx_runtime_cuda, "start_provider", lambda: None)

    def make(memory: HostMemory | None, cuda_graphs: bool = False) -> Any:
        monkeypatch.setattr(onnx_runtime_cuda.TorchMemory, "on_current_gpu", lambda: memory)
        backend = OnnxRuntimeCudaBackend(bundle.file(MODEL), dtype="fp32", library=bundle.file(OP_LIBRARY), cuda_graphs=cuda_graphs)
        assert isinstance(backend, CudaBackend)
        return backend

    make.bundle = bundle  # type: ignore[attr-defined]
    make.asked = asked  # type: ignore[attr-defined]
    return make


def inputs(batch: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = rng.integers(5, 250, (batch, length))
    mask = np.ones_like(ids)
    mask[0, length // 2 + 1 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


SHAPES = [(1, 1), (2, 33), (1, 64), (3, 7)]


@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "cuda-graphs"])
def test_tensors_are_bound_as_they_are(on_host, graphs) -> None:
    memory = HostMemory()
    backend = on_host(memory, graphs)
    cpu = MraRuntime.load(on_host.bundle, "onnxruntime")
    for seed in range(2):  # a second time each: with graphs, new data in the same buffers
        for shape in SHAPES:
            given = inputs(*shape, seed=seed)
            wanted = cpu.run(**given)["logits"]
            tensors = {name: torch.from_numpy(array) for name, array in given.items()}
            memory.order.clear()
            out = backend.run_cuda(tensors)["logits"]
            np.testing.assert_allclose(out.numpy(), wanted, atol=1e-5)
            np.testing.assert_allclose(backend.run(given)["logits"].numpy(), wanted, atol=1e-5)
    assert memory.order[:3] == (
        ["after caller", "before caller", "1 to caller"] if graphs else ["empty", "after caller", "before caller"]
    )
    assert ("enable_cuda_graph" in on_host.asked[-1][1]) is graphs
    assert on_host.asked[-1][1]["use_tf32"] == "0"


def test_a_result_is_not_overwritten_by_the_next_call(on_host) -> None:
    backend = on_host(HostMemory(), True)
    first = backend.run(inputs(1, 20))["logits"]
    kept = first.clone()
    backend.run(inputs(1, 20, seed=9))
    assert torch.equal(first, kept)


def test_so_many_shapes_have_a_graph_and_the_rest_run_without(on_host, caplog, monkeypatch) -> None:
    backend = on_host(HostMemory(), True)
    monkeypatch.setattr(onnx_runtime_cuda, "_GRAPHS", 2)
    numbers: list[int] = []
    enqueue = backend._enqueue
    monkeypatch.setattr(backend, "_enqueue", lambda i, o, number: (numbers.append(number), enqueue(i, o, number)))
    cpu = MraRuntime.load(on_host.bundle, "onnxruntime")
    for shape in (*SHAPES, *SHAPES):
        given = inputs(*shape)
        np.testing.assert_allclose(backend.run(given)["logits"].numpy(), cpu.run(**given)["logits"], atol=1e-5)
    assert numbers == [1, 2, -1, -1] * 2
    assert caplog.text.count("2 shapes have a CUDA graph each") == 1


def test_many_threads_through_one_backend(on_host) -> None:
    backend = on_host(HostMemory(), True)
    cpu = MraRuntime.load(on_host.bundle, "onnxruntime")
    calls = [inputs(*SHAPES[n % 4], seed=n) for n in range(24)]
    wanted = [cpu.run(**given)["logits"] for given in calls]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        for out, want in zip(threads.map(lambda given: backend.run(given)["logits"], calls), wanted, strict=True):
            np.testing.assert_allclose(out.numpy(), want, atol=1e-5)


def test_without_a_torch_for_the_gpu_arrays_go_through_onnxruntime(on_host) -> None:
    backend = on_host(None)
    given = inputs(2, 40)
    wanted = MraRuntime.load(on_host.bundle, "onnxruntime").run(**given)["logits"]
    np.testing.assert_allclose(backend.run(given)["logits"], wanted, atol=1e-5)
    with pytest.raises(BackendError, match=r"ONNX Runtime .* failed to run the graph: .*input_ids"):
        backend.run({"input_ids": given["input_ids"][0], "attention_mask": given["attention_mask"]})


def test_tensors_on_another_gpu_are_refused(on_host) -> None:
    backend = on_host(HostMemory())
    elsewhere = {name: torch.empty(array.shape, dtype=torch.int64, device="meta") for name, array in inputs(1, 8).items()}
    with pytest.raises(ContractError, match="input_ids is on meta, this runtime on cpu: move it"):
        backend.run_cuda(elsewhere)


# onnxruntime-gpu itself


@pytest.mark.heavy
def test_onnxruntime_gpu_on_a_machine_without_a_gpu(bundles) -> None:
    """The real package: its CPU provider runs the same bundle, and asking for CUDA says why not."""
    folder = ROOT / ".downloads" / "onnxruntime-gpu"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there: make test-heavy fetches it")
    if gpu.devices():
        pytest.skip("this machine has a GPU: make gpu-check")
    code = """
import sys, onnxruntime
from mra_export import gpu
from mra_export.backends import onnx_runtime, onnx_runtime_cuda
from mra_export.runtime import MraRuntime
from mra_export.errors import BackendError
assert "CUDAExecutionProvider" in onnxruntime.get_available_providers()
MraRuntime.load(sys.argv[1], "onnxruntime").validate()
try:
    MraRuntime.load(sys.argv[1], "onnxruntime", "cuda")
except BackendError as error:
    print("driver:", error)
gpu.devices = lambda: (gpu.Gpu("imagined", "9.0"),)
try:
    MraRuntime.load(sys.argv[1], "onnxruntime", "cuda")
except BackendError as error:
    print("library:", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundles("fp32"))],
        env={**os.environ, "PYTHONPATH": str(folder), "LD_LIBRARY_PATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    driver, library = (next(line for line in done.stdout.splitlines() if line.startswith(name)) for name in ("driver:", "library:"))
    assert "device is 'cuda', but " in driver
    assert "cannot use its CUDAExecutionProvider: lib" in library
    assert "cannot open shared object file" in library
    assert "onnxruntime-gpu[cuda,cudnn]" in library
