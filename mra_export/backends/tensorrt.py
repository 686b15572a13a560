"""TensorRT and TensorRT-RTX: a bundle's engine on an NVIDIA GPU. torch holds the device memory and the streams."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mra_export import gpu, profiles, tensorrt_api
from mra_export.bundle import Bundle
from mra_export.contract import DTYPES
from mra_export.engine_checks import choose_engine, rebuild, verify_hash
from mra_export.errors import BackendError, ContractError, EngineError
from mra_export.profiles import Shape

logger = logging.getLogger(__name__)

_GRAPHS_PER_CONTEXT = 16
"""CUDA graphs that one context keeps, each with its own input and output buffers; the oldest makes room."""
_loaded_plugins: dict[str, str] = {}
"""Backend -> sha256 of the plugin library this process has given it: a second one would be ignored."""


@dataclass
class _Graph:
    """A captured call: copy into inputs, replay, copy out of outputs."""

    graph: Any
    inputs: dict[str, Any]
    outputs: dict[str, Any]


@dataclass
class _Slot:
    """An execution context, which serves one call at a time. done: the CUDA event of its last call; graphs: by shape."""

    context: Any
    stream: Any
    done: Any
    graphs: dict[Shape, _Graph] = field(default_factory=dict)


class TensorRtBackend:
    """One engine, and as many execution contexts as threads call it at once.

    Shapes below every profile's minimum are padded up to it and the outputs cut back. The operator's row maxima see padding unless
    the bundle is padding-invariant, so such a call may differ, slightly, from the same call without padding.

    engine: file name in the bundle, where it holds several; none: the first that fits this machine.
    allow_embedded_plugin: let a plan bring its own plugin code. cuda_graphs: capture each shape once and replay it.
    Raises EngineError, PluginLoadError or BundleError before anything of the plan is loaded.
    """

    name = "tensorrt"
    device = "cuda"

    def __init__(
        self, bundle: Bundle, *, engine: str | None = None, allow_embedded_plugin: bool = False, cuda_graphs: bool = False
    ) -> None:
        devices = gpu.devices()
        index = _torch_device() if devices else 0
        entry = choose_engine(
            bundle,
            engine,
            allow_embedded_plugin=allow_embedded_plugin,
            devices=devices,
            driver=gpu.driver_version(),
            device_index=index,
        )
        self.entry = entry
        self._bundle = bundle
        self._graphs = cuda_graphs
        self._device = f"cuda:{index}"
        self._problems: list[str] = []
        self._trt = tensorrt_api.load(entry.backend)
        self._logger = tensorrt_api.make_logger(self._trt, self._told)
        self._runtime = self._trt.Runtime(self._logger)  # kept: the engine does not own it
        self._engine = self._deserialize(allow_embedded_plugin)
        self._inputs = self._names(self._trt.TensorIOMode.INPUT)  # without those that no node of the graph reads
        self._outputs = self._names(self._trt.TensorIOMode.OUTPUT)
        self._dtype = _torch_dtype(entry.dtype)
        self._free: list[_Slot] = []
        self._lock = threading.Lock()
        self._told_of_padding = False
        logger.info("%s: engine %s on %s", bundle.path, entry.file, devices[index].name)

    def run(self, inputs: Mapping[str, npt.NDArray[np.int64]]) -> dict[str, Any]:
        """Host arrays in, host arrays out; see `run_cuda` for tensors that stay on the GPU."""
        import torch

        with self._slot() as slot, torch.cuda.stream(slot.stream):
            slot.stream.wait_event(slot.done)
            tensors = {name: torch.from_numpy(array).to(self._device, non_blocking=True) for name, array in inputs.items()}
            return {name: tensor.cpu() for name, tensor in self._enqueue(slot, tensors).items()}

    def run_cuda(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """int64 CUDA tensors in, CUDA tensors out, on torch's current stream, without a copy and without waiting for the result."""
        import torch

        with self._slot() as slot:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(slot.done)  # the context's scratch memory may still be in use on another stream
            outputs = self._enqueue(slot, dict(inputs))
            slot.done.record(stream)
        return outputs

    def refuses(self, shape: Shape) -> str | None:
        try:
            profiles.pick(self.entry.profiles, shape)
        except ContractError as error:
            return str(error)
        return None

    def _enqueue(self, slot: _Slot, tensors: dict[str, Any]) -> dict[str, Any]:
        """Put one call on torch's current stream. Outputs have the shape the caller asked for, padding cut off."""
        import torch

        asked = tuple(next(iter(tensors.values())).shape)
        index, shape = profiles.pick(self.entry.profiles, asked)
        if shape != asked:
            self._tell_of_padding(asked, shape)
            tensors = {name: _padded(tensor, shape) for name, tensor in tensors.items()}
        tensors = {name: tensor.to(self._device).contiguous() for name, tensor in tensors.items()}
        with torch.cuda.device(self._device):
            if self._graphs and self.entry.backend == "tensorrt":
                outputs = self._replay(slot, index, shape, tensors)
            else:
                outputs = self._execute(slot, index, shape, tensors)
            for tensor in tensors.values():
                tensor.record_stream(torch.cuda.current_stream())
        return {name: cut(self._bundle, name, tensor, asked) for name, tensor in outputs.items()}

    def _execute(self, slot: _Slot, index: int, shape: Shape, tensors: Mapping[str, Any]) -> dict[str, Any]:
        import torch

        context, stream = slot.context, torch.cuda.current_stream().cuda_stream
        if context.active_optimization_profile != index and not context.set_optimization_profile_async(index, stream):
            raise self._failed(f"it refuses profile {index}")
        for name in self._inputs:
            if not context.set_input_shape(name, shape):
                raise self._failed(f"it refuses {name} of shape {profiles.text(shape)}")
            context.set_tensor_address(name, tensors[name].data_ptr())
        outputs = {}
        for name in self._outputs:
            outputs[name] = torch.empty(tuple(context.get_tensor_shape(name)), dtype=self._dtype, device=self._device)
            context.set_tensor_address(name, outputs[name].data_ptr())
        if not context.execute_async_v3(stream):
            raise self._failed(f"shape {profiles.text(shape)}")
        return outputs

    def _replay(self, slot: _Slot, index: int, shape: Shape, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """As `_execute`, through a CUDA graph of this shape. TensorRT-RTX captures by itself and does not come here."""
        import torch

        captured = slot.graphs.get(shape)
        if captured is None:
            own = {name: tensor.clone() for name, tensor in tensors.items()}
            self._execute(slot, index, shape, own)  # TensorRT wants one call of a shape before it is captured
            torch.cuda.current_stream().synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=slot.stream, capture_error_mode="thread_local"):
                outputs = self._execute(slot, index, shape, own)
            captured = _Graph(graph, own, outputs)
            if len(slot.graphs) >= _GRAPHS_PER_CONTEXT:
                torch.cuda.synchronize()  # the oldest graph may still be running
                del slot.graphs[next(iter(slot.graphs))]
            slot.graphs[shape] = captured
        for name, tensor in tensors.items():
            captured.inputs[name].copy_(tensor)
        captured.graph.replay()
        return {name: tensor.clone() for name, tensor in captured.outputs.items()}

    @contextlib.contextmanager
    def _slot(self) -> Iterator[_Slot]:
        """A context nobody else uses at this moment; made where all are busy."""
        with self._lock:
            slot = self._free.pop() if self._free else self._new_slot()
        try:
            yield slot
        finally:
            with self._lock:
                self._free.append(slot)

    def _new_slot(self) -> _Slot:
        import torch

        with torch.cuda.device(self._device):
            if self.entry.backend == "tensorrt-rtx" and self._graphs:
                settings = self._engine.create_runtime_config()
                settings.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
                context = self._engine.create_execution_context(settings)
            else:
                context = self._engine.create_execution_context()
            if context is None:
                raise self._failed("there may be too little GPU memory for another execution context")
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
            return _Slot(context, torch.cuda.Stream(), done)  # type: ignore[no-untyped-call]

    def _deserialize(self, allow_embedded_plugin: bool) -> Any:
        plugin, path = self.entry.plugin, self._bundle.file(self.entry.file)
        data = path.read_bytes()
        verify_hash(
            self._bundle, self.entry.file, hashlib.sha256(data).hexdigest()
        )  # these very bytes, not what the file held a moment ago
        embedded = plugin is not None and plugin.embedded and allow_embedded_plugin
        self._runtime.engine_host_code_allowed = embedded
        if plugin is not None and not embedded:
            before = _loaded_plugins.setdefault(self.entry.backend, plugin.sha256)
            if before != plugin.sha256:
                raise EngineError(
                    f"{path} needs the plugin library with sha256 {plugin.sha256[:16]}..., this process already loaded the one "
                    f"with {before[:16]}...: load the two bundles in processes of their own, or {rebuild(self._bundle, self.entry)}"
                )
            tensorrt_api.register_plugin(self._trt, self._bundle.file(plugin.library), self._reasons)
        if self.entry.backend == "tensorrt-rtx":
            validity, diagnostics = self._runtime.get_engine_validity(data)
            if validity == self._trt.EngineValidity.INVALID:
                flags = self._trt.EngineInvalidityDiagnostics.__members__
                names = ", ".join(name for name, flag in flags.items() if diagnostics & int(flag))
                raise self._failed(f"it does not fit: {names or 'no reason given'}")
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise self._failed("it does not load")
        return engine

    def _names(self, mode: Any) -> list[str]:
        names = (self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors))
        return [name for name in names if self._engine.get_tensor_mode(name) == mode]

    def _tell_of_padding(self, asked: Shape, shape: Shape) -> None:
        if self._told_of_padding:
            return
        self._told_of_padding = True
        changes = "" if self._bundle.manifest.padding_invariant or asked[-1] == shape[-1] else ", which changes the result slightly"
        logger.warning(
            "%s: input of shape %s is padded to %s, the least that the engine takes%s",
            self.entry.file,
            profiles.text(asked),
            profiles.text(shape),
            changes,
        )

    def _told(self, level: str, text: str) -> None:
        if level == "error":
            self._problems.append(text)
        logger.log(logging.DEBUG if level == "info" else logging.WARNING, "%s: %s", self.entry.backend, text)

    def _reasons(self) -> str:
        return "; ".join(self._problems[-3:])

    def _failed(self, what: str) -> EngineError:
        reasons = f" ({self._reasons()})" if self._problems else ""
        return EngineError(
            f"{self.entry.file} failed in {self.entry.backend} {self._trt.__version__}: {what}{reasons}. "
            f"Build it again here: {rebuild(self._bundle, self.entry)}"
        )


def cut(bundle: Bundle, output: str, tensor: Any, asked: Shape) -> Any:
    """The part of an output that belongs to inputs of shape `asked`; a view. Takes numpy arrays and torch tensors."""
    sizes = dict(zip(bundle.manifest.inputs[0].axes, asked, strict=True))
    axes = next(entry.axes for entry in bundle.manifest.outputs if entry.name == output)
    return tensor[tuple(slice(sizes.get(axis)) for axis in axes)]


def _padded(tensor: Any, shape: Shape) -> Any:
    import torch

    wanted = [size for had, now in zip(reversed(tensor.shape), reversed(shape), strict=True) for size in (0, now - had)]
    return torch.nn.functional.pad(tensor, wanted)


def _torch_dtype(dtype: str) -> Any:
    import torch

    return getattr(torch, DTYPES[dtype])


def _torch_device() -> int:
    """torch's current GPU. Raises BackendError where torch cannot use the GPU that is here."""
    import torch

    if not torch.cuda.is_available():
        raise BackendError(
            f"a GPU is here, but torch {torch.__version__} cannot use it, and it holds the engine's inputs and outputs: "
            "install a torch built for CUDA"
        )
    return torch.cuda.current_device()
