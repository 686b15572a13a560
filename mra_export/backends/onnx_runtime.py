"""ONNX Runtime on a CPU: the bundle's graph with the op library's kernel, or, without the library, with its own function body."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.helper
import onnxruntime as ort

from mra_export.contract import OP_DOMAIN, OP_TYPE, OP_VERSION, Attributes
from mra_export.errors import BackendError, PluginLoadError
from mra_export.token_graph import TOKENS, choose_tokens

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
BF16_REFUSED = (
    "ONNX Runtime's CPU provider has no bfloat16 MatMul: run this bundle with backend 'torch' or on a GPU (CUDA, TensorRT), "
    "or export again with --dtype fp32"
)
_ELEMENT_TYPES = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
_ERRORS_ONLY, _FATAL_ONLY = 3, 4
"""ONNX Runtime's log levels. Its warnings are about its own optimiser: float16 constants that it cannot fold on a CPU."""
_SLOWER_FUSIONS = "SkipLayerNormFusion"
"""What ONNX Runtime should not fuse on a CPU: its SkipLayerNormalization takes 2.5 times as long as the Adds and the
LayerNormalization that it replaces (docs/onnxruntime.md)."""
_PROBE = Attributes(num_heads=1, num_blocks=1, scale=1.0)


class OnnxRuntimeBackend:
    """One session on the CPU. folder: of the weights beside a graph that is given as bytes.

    Raises BackendError where the dtype cannot run, PluginLoadError where the library does not load.
    """

    name = "onnxruntime"
    device = "cpu"

    def __init__(
        self,
        model: Path | bytes,
        *,
        dtype: str,
        library: Path | None,
        intra_op_threads: int | None = None,
        folder: Path | None = None,
    ) -> None:
        check_device(dtype, "cpu")
        if library is not None:
            probe_library(library, dtype, "cpu")
        options = session_options(library, intra_op_threads)
        if folder is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        self._session = load_session(model, options, [CPU])
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, npt.NDArray[np.int64]]) -> dict[str, Any]:
        try:
            return dict(zip(self._outputs, self._session.run(self._outputs, dict(inputs)), strict=True))
        except Exception as error:
            raise BackendError(f"ONNX Runtime {ort.__version__} failed to run the graph: {first_line(error)}") from error


class TokenOnnxRuntimeBackend(OnnxRuntimeBackend):
    """The graph with what follows the last attention layer for chosen tokens only (token_graph.py). Arguments as above.

    Raises ContractError for a graph that cannot be changed so.
    """

    def __init__(self, model: Path, *, hidden_size: int, **options: Any) -> None:
        graph = onnx.load(model, load_external_data=False)
        choose_tokens(graph, hidden_size)
        super().__init__(graph.SerializeToString(), folder=model.parent, **options)

    def run(self, inputs: Mapping[str, npt.NDArray[np.int64]]) -> dict[str, Any]:
        shape = inputs["input_ids"].shape
        outputs = self.run_tokens(inputs, np.arange(np.prod(shape), dtype=np.int64))
        return {name: value.reshape(*shape, *value.shape[1:]) for name, value in outputs.items()}

    def run_tokens(self, inputs: Mapping[str, npt.NDArray[np.int64]], tokens: npt.NDArray[np.int64]) -> dict[str, Any]:
        return {name: value[:, 0] for name, value in super().run({**inputs, TOKENS: tokens}).items()}


def cuda_available() -> bool:
    return CUDA in ort.get_available_providers()


def check_device(dtype: str, device: str) -> None:
    """Refuse what this onnxruntime cannot run. Raises BackendError saying why and what can."""
    if device == "cuda" and not cuda_available():
        raise BackendError(
            f"onnxruntime {ort.__version__} here has no {CUDA} (it has {', '.join(ort.get_available_providers())}): "
            "install onnxruntime-gpu, or use device 'cpu'"
        )
    if device == "cpu" and dtype == "bf16":
        raise BackendError(BF16_REFUSED)


def session_options(library: Path | None, intra_op_threads: int | None = None, device: str = "cpu") -> ort.SessionOptions:
    """Options with the op library registered, without the fusions that are slower on the device.

    Raises PluginLoadError with ONNX Runtime's own words where the library does not load.
    """
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if intra_op_threads is not None:
        options.intra_op_num_threads = intra_op_threads
    if device == "cpu":
        options.add_session_config_entry("optimization.disable_specified_optimizers", _SLOWER_FUSIONS)
    if library is not None:
        try:
            options.register_custom_ops_library(str(library))
        except Exception as error:
            raise PluginLoadError(
                f"{library} does not load into ONNX Runtime {ort.__version__}: {first_line(error)}. "
                "Export again on this machine, or pass use_op_library=False (slower, same answer)"
            ) from error
    return options


def probe_library(library: Path, dtype: str, device: str) -> None:
    """Make sure the library really brings the operator for this dtype and device.

    A library that loads but registers nothing would leave the function body to run: right, but slow, and nobody told. This graph
    has no function body, and, on a GPU, no CPU to fall back to.
    """
    node = onnx.helper.make_node(
        OP_TYPE, ["query", "key", "value", "mask"], ["context"], domain=OP_DOMAIN, **_node_attributes(_PROBE)
    )
    element = _ELEMENT_TYPES[dtype]
    tensors = [onnx.helper.make_tensor_value_info(name, element, ("b", "n", 32)) for name in ("query", "key", "value")]
    mask = onnx.helper.make_tensor_value_info("mask", onnx.TensorProto.INT32, ("b", "n"))
    context = onnx.helper.make_tensor_value_info("context", element, ("b", "n", 32))
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid(OP_DOMAIN, OP_VERSION)]
    graph = onnx.helper.make_graph([node], "probe", [*tensors, mask], [context])
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = session_options(library, device=device)
    options.log_severity_level = _FATAL_ONLY  # what goes wrong here is raised below, with the fix
    if device == "cuda":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        load_session(model.SerializeToString(), options, [CUDA if device == "cuda" else CPU])
    except BackendError as error:
        words = first_line(error.__cause__ or error)
        raise PluginLoadError(
            f"{library} loads, but brings no {OP_DOMAIN}.{OP_TYPE} for {dtype} on {device} to ONNX Runtime {ort.__version__}: "
            f"{words}. Export again with this mra-export, or pass use_op_library=False (slower, same answer)"
        ) from error


def _node_attributes(attributes: Attributes) -> dict[str, Any]:
    return {name: int(value) if isinstance(value, bool) else value for name, value in attributes.as_dict().items()}


def load_session(
    model: Path | bytes, options: ort.SessionOptions, providers: Sequence[str | tuple[str, dict[str, str]]]
) -> ort.InferenceSession:
    """A session that never goes on with other providers by itself. Raises BackendError with ONNX Runtime's own words."""
    source = model if isinstance(model, bytes) else str(model)
    try:
        session = ort.InferenceSession(source, options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise BackendError(f"ONNX Runtime {ort.__version__} cannot load the graph: {first_line(error)}") from error
    session.disable_fallback()  # what enable_fallback says, for versions that do not know it
    return session


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
