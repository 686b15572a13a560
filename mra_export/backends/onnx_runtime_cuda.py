"""ONNX Runtime on an NVIDIA GPU: its CUDA provider with the op library's kernel. Where torch can use the GPU, it holds the tensors.

ONNX Runtime keeps one CUDA stream for a session's whole life, so calls are ordered by events between it and the caller's stream: no
call waits for the GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import logging
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.helper
import onnxruntime as ort

from mra_export import gpu, kernel
from mra_export.backends.onnx_runtime import CPU, CUDA, check_device, first_line, load_session, probe_library, session_options
from mra_export.contract import DTYPES
from mra_export.errors import BackendError, ContractError

logger = logging.getLogger(__name__)

_GRAPHS = 16
"""Shapes that one session captures: ONNX Runtime keeps each graph as long as the session, so further shapes run without one."""
_NO_GRAPH = -1
"""gpu_graph_id of a call that neither captures nor replays."""
_SHAPE_OPS = frozenset({"Shape", "Slice", "Gather", "Concat", "Unsqueeze", "Squeeze", "Cast", "Range", "Identity", "Constant"})
"""What ONNX Runtime may move to the CPU on purpose: arithmetic on shapes."""
_ELEMENTS: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": onnx.TensorProto.BFLOAT16}
"""A torch dtype's name -> what IO binding calls it; numpy has no bfloat16."""


class OnnxRuntimeCudaBackend:
    """One session on torch's current GPU, or, where torch cannot use it, on the first. Everything but shape arithmetic runs there.

    cuda_graphs: capture each of the first 16 shapes and replay it. Needs a torch built for CUDA.
    Raises BackendError saying why where the GPU or the dtype cannot run, PluginLoadError where the library does not.
    """

    name = "onnxruntime"
    device = "cuda"

    def __init__(
        self,
        model: Path | bytes,
        *,
        dtype: str,
        library: Path | None,
        intra_op_threads: int | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        check_device(dtype, "cuda")
        start_provider()
        memory = TorchMemory.on_current_gpu()
        if memory is None and (cuda_graphs or dtype == "bf16"):
            what = "CUDA graphs need" if cuda_graphs else "bfloat16, which numpy does not have, needs"
            raise BackendError(f"{what} a torch that can use the GPU: install a torch built for CUDA")
        if library is not None:
            check_library(library, dtype)
        self._dtype = DTYPES[dtype]
        self._open(model, library, intra_op_threads, cuda_graphs, memory)

    def _open(
        self, model: Path | bytes, library: Path | None, threads: int | None, cuda_graphs: bool, memory: TorchMemory | None
    ) -> None:
        provider = {"device_id": "0", "use_tf32": "0"}  # a float32 model's products are float32, as on the CPU
        if memory is not None:
            provider |= memory.provider_options()
        if cuda_graphs:
            provider["enable_cuda_graph"] = "1"
        options = session_options(library, threads, "cuda")
        if hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"):  # from 1.24
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        self._session = load_session(model, options, [(CUDA, provider)])
        if CUDA not in self._session.get_providers():
            raise BackendError(f"ONNX Runtime {ort.__version__} left the graph to {', '.join(self._session.get_providers())}")
        if library is not None:
            check_placement(self._session)
        self._memory = memory
        self._inputs = {entry.name: entry.shape for entry in self._session.get_inputs()}
        self._outputs = {entry.name: entry.shape for entry in self._session.get_outputs()}
        self._turn = threading.Lock()  # one stream: calls run one after another on the GPU anyway
        self._graphs: dict[tuple[int, ...], _Graph] = {}
        # ONNX Runtime keeps captured graphs by the thread that calls.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="onnxruntime-cuda-graphs") if cuda_graphs else None
        self._told = False

    def run(self, inputs: Mapping[str, npt.NDArray[np.int64]]) -> dict[str, Any]:
        """Host arrays in, host arrays or tensors out; see `run_cuda` for tensors that stay on the GPU."""
        if self._memory is None:
            with self._turn, _failures():
                return dict(zip(self._outputs, self._session.run(list(self._outputs), dict(inputs)), strict=True))
        outputs = self.run_cuda({name: self._memory.upload(array) for name, array in inputs.items()})
        return {name: tensor.cpu() for name, tensor in outputs.items()}

    def run_cuda(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """int64 CUDA tensors in, CUDA tensors out, on torch's current stream: without a copy but for CUDA graphs, whose buffers are
        their own, and without waiting for the result. Raises ContractError for tensors on another GPU.
        """
        memory = self._memory
        assert memory is not None  # no torch for this GPU, no tensors on it
        for name, tensor in inputs.items():
            if tensor.device != memory.device:
                raise ContractError(
                    f"{name} is on {tensor.device}, this runtime on {memory.device}: move it, or load under torch.cuda.device(...)"
                )
        shape = tuple(next(iter(inputs.values())).shape)
        if self._thread is None:
            with self._turn, _failures():
                outputs = self._make_outputs(inputs)  # of the caller's stream, before the session's waits for it
                with memory.ordered(memory.current_stream()):
                    self._enqueue(inputs, outputs, None)
                return outputs
        caller = memory.current_stream()
        return self._thread.submit(self._with_graph, shape, inputs, caller).result()

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        return None

    def _with_graph(self, shape: tuple[int, ...], inputs: Mapping[str, Any], caller: Any) -> dict[str, Any]:
        memory = self._memory
        assert memory is not None
        with _failures(), memory.ordered(caller):
            graph = self._graphs.get(shape)
            if graph is None:
                graph = self._new_graph(shape, inputs)
            for name, tensor in inputs.items():
                graph.inputs[name].copy_(tensor)
            self._enqueue(graph.inputs, graph.outputs, graph.number)
            outputs = {name: tensor.clone() for name, tensor in graph.outputs.items()}
        memory.hand_over(outputs.values(), caller)
        return outputs

    def _new_graph(self, shape: tuple[int, ...], inputs: Mapping[str, Any]) -> _Graph:
        own = {name: tensor.clone() for name, tensor in inputs.items()}
        number = len(self._graphs) + 1  # 0 is ONNX Runtime's own
        if number > _GRAPHS:
            if not self._told:
                logger.warning("onnxruntime: %s shapes have a CUDA graph each: further ones run without", _GRAPHS)
                self._told = True
            return _Graph(_NO_GRAPH, own, self._make_outputs(own))
        graph = self._graphs[shape] = _Graph(number, own, self._make_outputs(own))
        return graph

    def _make_outputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Empty tensors for the outputs of these inputs: their axes have the names of the inputs' axes."""
        assert self._memory is not None
        sizes: dict[Any, int] = {}
        for name, axes in self._inputs.items():
            sizes |= {axis: size for axis, size in zip(axes, inputs[name].shape, strict=True) if isinstance(axis, str)}
        return {
            name: self._memory.empty(tuple(sizes[axis] if isinstance(axis, str) else axis for axis in axes), self._dtype)
            for name, axes in self._outputs.items()
        }

    def _enqueue(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any], graph: int | None) -> None:
        """Put one call on the session's stream."""
        assert self._memory is not None
        place = self._memory.place
        binding = self._session.io_binding()
        for name in self._inputs:
            tensor = inputs[name]
            binding.bind_input(name, *place, np.int64, tuple(tensor.shape), tensor.data_ptr())
        for name, tensor in outputs.items():
            binding.bind_output(name, *place, _ELEMENTS[self._dtype], tuple(tensor.shape), tensor.data_ptr())
        options = ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if graph is not None:
            options.add_run_config_entry("gpu_graph_id", str(graph))
        self._session.run_with_iobinding(binding, options)


@dataclass(frozen=True)
class _Graph:
    """Buffers whose addresses a captured graph holds. number: ONNX Runtime's gpu_graph_id."""

    number: int
    inputs: dict[str, Any]
    outputs: dict[str, Any]


class TorchMemory:
    """torch's side of a session: tensors on its GPU, its stream, and the order of work between that and a caller's."""

    def __init__(self, index: int) -> None:
        import torch

        self.device = torch.device("cuda", index)
        self.place = ("cuda", index)
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    @classmethod
    def on_current_gpu(cls) -> TorchMemory | None:
        """None where torch is not installed or cannot use a GPU."""
        try:
            import torch
        except ImportError:
            return None
        return cls(torch.cuda.current_device()) if torch.cuda.is_available() else None

    def provider_options(self) -> dict[str, str]:
        return {"device_id": str(self.device.index), "user_compute_stream": str(self._stream.cuda_stream)}

    def upload(self, array: npt.NDArray[np.int64]) -> Any:
        import torch

        return torch.from_numpy(array).to(self.device)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)

    def current_stream(self) -> Any:
        import torch

        return torch.cuda.current_stream(self.device)

    @contextlib.contextmanager
    def ordered(self, caller: Any) -> Iterator[None]:
        """What is queued within comes after what the caller's stream has now, and before what it gets later."""
        import torch

        self._stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            caller.wait_stream(self._stream)

    def hand_over(self, tensors: Any, caller: Any) -> None:
        """Tensors made on the session's stream are the caller's from here on."""
        for tensor in tensors:
            tensor.record_stream(caller)


@functools.cache
def start_provider() -> None:
    """Make sure that ONNX Runtime can start its CUDA provider. Raises BackendError saying why not."""
    if not gpu.devices():
        raise BackendError(f"device is 'cuda', but {gpu.why_none()}: use device 'cpu'")
    missing = _preload()
    identity = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])],
        "start",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])],
    )
    model = onnx.helper.make_model(identity, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    session = load_session(model.SerializeToString(), session_options(None, device="cuda"), [CUDA])
    if CUDA not in session.get_providers():
        reason = why_not_loaded() or "it loads, but does not start: ONNX Runtime's own words are on stderr"
        raise BackendError(f"onnxruntime {ort.__version__} cannot use its {CUDA}: {'; '.join([reason, *missing])}")


def _preload() -> list[str]:
    """Load CUDA's libraries from NVIDIA's Python packages, where ONNX Runtime itself does not look; what it says is missing."""
    if not hasattr(ort, "preload_dlls"):  # before 1.21
        return []
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        ort.preload_dlls()
    return [line.strip() for line in said.getvalue().splitlines() if line.startswith("Failed")]


def why_not_loaded() -> str | None:
    """The loader's own words on why ONNX Runtime's CUDA library does not load, or None where it does."""
    folder = Path(ort.__file__).parent / "capi"
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / "libonnxruntime_providers_cuda.so"))
    except OSError as error:
        return (
            f"{error}. Install the CUDA libraries of the version it was built for (pip install 'onnxruntime-gpu[cuda,cudnn]', or "
            "CUDA and cuDNN), or use device 'cpu'"
        )
    return None


def check_library(library: Path, dtype: str) -> None:
    """Make sure that the op library has the GPU's kernel. Raises BackendError where it was built without CUDA, PluginLoadError."""
    if not kernel.has_cuda(library):
        raise BackendError(
            f"{library} was built without CUDA: build it with an nvcc on PATH (pip install . in the repository), then export the "
            "bundle again; or use device 'cpu'"
        )
    probe_library(library, dtype, "cuda")


def check_placement(session: ort.InferenceSession) -> None:
    """Refuse a session that leaves work to the CPU. Raises BackendError naming the operators."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return  # `probe_library` has shown that the operator itself runs on the GPU
    left = {
        node.op_type for part in session.get_provider_graph_assignment_info() if part.ep_name == CPU for node in part.get_nodes()
    }
    if left - _SHAPE_OPS:
        names = ", ".join(sorted(left - _SHAPE_OPS))
        raise BackendError(f"onnxruntime {ort.__version__} has no CUDA kernel for {names} of this graph: upgrade onnxruntime-gpu")


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise BackendError(f"ONNX Runtime {ort.__version__} failed to run the graph: {first_line(error)}") from error
