"""The runtimes that `verify` compares with PyTorch, each able to say what its attention layers were given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.helper
import onnxruntime as ort
import torch
from onnx.reference import ReferenceEvaluator

from mra_export import kernel
from mra_export.backends.onnx_runtime import OnnxRuntimeBackend, session_options
from mra_export.bundle import MODEL, OP_LIBRARY, Bundle
from mra_export.cases import Case, Inputs, function_body_bytes
from mra_export.contract import (
    DTYPES,
    OP_DOMAIN,
    OP_TYPE,
    OP_VERSION,
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
    Attributes,
    float_dtype,
)
from mra_export.errors import BackendError
from mra_export.model.attention import mra_attention
from mra_export.onnx_function import element_type, function_proto
from mra_export.probe import DebugGraph, Layer, TorchProbe
from mra_export.runtime import MraRuntime

Arrays = dict[str, npt.NDArray[Any]]
Float32 = npt.NDArray[np.float32]
NAMES = ("torch", "torch-reference", "onnxruntime", "onnxruntime-function", "onnxruntime-cuda", "onnx-reference", "tensorrt")
"""torch: the compiled operator. torch-reference: attention in plain torch, in the bundle's dtype. onnxruntime: with the op library.
onnxruntime-function: without it, the graph's own function body. onnxruntime-cuda: with the op library, on a GPU.
onnx-reference: onnx's ReferenceEvaluator, short inputs only. tensorrt: the bundle's engine. The two on a GPU do not show what their
layers are given."""

_FUNCTION_BODY_LIMIT = 2 << 30
"""Bytes of N x N intermediates that the function body may take here before a case is left out."""
_REFERENCE_TOKENS, _REFERENCE_MODEL = 256, 200 << 20
"""onnx's ReferenceEvaluator is plain numpy, node by node: cases of more tokens and larger models (bytes) are left out."""


class Subject(ABC):
    """One runtime under test. opaque: it does not show its layers, so `observe` gives none and `operator` is not to be called.

    precision: what its answer is judged as, a name of contract.TOLERANCES. dtype: of its operator, a name of contract.DTYPES.
    """

    opaque = False

    def __init__(self, name: str, bundle: Bundle) -> None:
        self.name = name
        self.bundle = bundle
        self.precision = bundle.manifest.dtype
        self.dtype = float_dtype(self.precision)
        self.runtime: MraRuntime | None = None

    @abstractmethod
    def observe(self, inputs: Inputs) -> tuple[Arrays, list[Layer]]:
        """Run once: outputs, and what each layer's operator was given."""

    @abstractmethod
    def operator(
        self, attributes: Attributes, query: Float32, key: Float32, value: Float32, mask: npt.NDArray[np.bool_]
    ) -> Float32:
        """The operator alone. Values are of the bundle's dtype, widened to float32: (B, N, H * D); mask: (B, N)."""

    def run(self, inputs: Inputs) -> Arrays:
        return self.observe(inputs)[0]

    def cannot_run(self, case: Case) -> str | None:
        """Why this case is too much for this runtime, or None."""
        return None


def open_subject(name: str, bundle: Bundle) -> Subject:
    """Raises BackendError or EngineError where this runtime cannot run the bundle here, PluginLoadError for a library."""
    if name in ("torch", "torch-reference"):
        return _Torch(name, bundle)
    if name in ("onnxruntime", "onnxruntime-function"):
        return _OnnxRuntime(name, bundle)
    if name == "onnx-reference":
        return _OnnxReference(name, bundle)
    if name in ("onnxruntime-cuda", "tensorrt"):
        return _OnGpu(name, bundle)
    raise BackendError(f"backend is {name!r}: use one of {', '.join(NAMES)}")


class _Torch(Subject):
    def __init__(self, name: str, bundle: Bundle) -> None:
        super().__init__(name, bundle)
        self.precision = self.dtype  # int8 is a matter of the graph: the weights are the float model's
        self._reference = name == "torch-reference"
        if not self._reference and not kernel.available():
            raise BackendError(
                "the compiled operator is not built here: pip install . builds it; `mra-export doctor` shows what is missing"
            )
        self.runtime = MraRuntime.load(bundle, "torch", use_op_library=not self._reference)
        self._running = MraRuntime.load(bundle, "torch") if self._reference else self.runtime

    def run(self, inputs: Inputs) -> Arrays:
        assert self.runtime is not None
        return self.runtime.run(**inputs)

    def observe(self, inputs: Inputs) -> tuple[Arrays, list[Layer]]:
        with TorchProbe(reference=self._reference) as probe:
            outputs = self._running.run(**inputs)
        return outputs, probe.layers

    def operator(
        self, attributes: Attributes, query: Float32, key: Float32, value: Float32, mask: npt.NDArray[np.bool_]
    ) -> Float32:
        dtype = getattr(torch, DTYPES[self.dtype])
        tensors = [torch.from_numpy(array).to(dtype) for array in (query, key, value)]
        real = torch.from_numpy(mask).to(torch.int32)
        with torch.inference_mode():
            if self._reference:
                context = mra_attention(tensors[0], tensors[1], tensors[2], real, attributes)
            else:
                context = torch.ops.mra.attention(*tensors, real, *attributes.as_dict().values())
        return np.asarray(context.float().numpy())


class _OnnxRuntime(Subject):
    def __init__(self, name: str, bundle: Bundle) -> None:
        super().__init__(name, bundle)
        self._library = bundle.file(OP_LIBRARY) if name == "onnxruntime" and OP_LIBRARY in bundle.manifest.files else None
        self.runtime = MraRuntime.load(bundle, "onnxruntime", use_op_library=name == "onnxruntime")
        self._graph = DebugGraph(
            bundle.file(MODEL), bundle.manifest.operator_attributes(), self.dtype, function_choice=self._library is None
        )
        self._debug = OnnxRuntimeBackend(self._graph.take(), dtype=self.dtype, library=self._library)

    def run(self, inputs: Inputs) -> Arrays:
        assert self.runtime is not None
        return self.runtime.run(**inputs)

    def observe(self, inputs: Inputs) -> tuple[Arrays, list[Layer]]:
        return self.run(inputs), self._graph.layers(self._debug.run(inputs))

    def operator(
        self, attributes: Attributes, query: Float32, key: Float32, value: Float32, mask: npt.NDArray[np.bool_]
    ) -> Float32:
        manifest = self.bundle.manifest
        model = operator_model(attributes, query.shape[2], self.dtype, manifest.opset)
        session = ort.InferenceSession(
            model.SerializeToString(), session_options(self._library), providers=["CPUExecutionProvider"]
        )
        return np.asarray(session.run(None, _operator_feed(self.dtype, query, key, value, mask))[0]).astype(np.float32)

    def cannot_run(self, case: Case) -> str | None:
        needed = function_body_bytes(self.bundle, *case.tokens)
        if self._library is not None or needed <= _FUNCTION_BODY_LIMIT:
            return None
        limit = _FUNCTION_BODY_LIMIT >> 30
        return f"the function body forms N x N: about {needed / 2**30:.0f} GB here, more than the {limit} GB verify allows"


class _OnnxReference(Subject):
    def __init__(self, name: str, bundle: Bundle) -> None:
        super().__init__(name, bundle)
        if bundle.manifest.dtype == "bf16":
            raise BackendError("onnx's ReferenceEvaluator computes in numpy, which has no bfloat16")
        size = sum(entry.size for file, entry in bundle.manifest.files.items() if file.startswith(MODEL))
        if size > _REFERENCE_MODEL:
            limit = _REFERENCE_MODEL >> 20
            raise BackendError(
                f"the graph has {size >> 20} MB: onnx's ReferenceEvaluator is plain numpy, verify gives it up to {limit} MB"
            )
        self._graph = DebugGraph(bundle.file(MODEL), bundle.manifest.operator_attributes(), self.dtype, function_choice=True)
        self._evaluator = ReferenceEvaluator(onnx.load_from_string(self._graph.take()))

    def observe(self, inputs: Inputs) -> tuple[Arrays, list[Layer]]:
        with np.errstate(all="ignore"):
            outputs = dict(zip(self._evaluator.output_names, self._evaluator.run(None, dict(inputs)), strict=True))
        return outputs, self._graph.layers(outputs)

    def operator(
        self, attributes: Attributes, query: Float32, key: Float32, value: Float32, mask: npt.NDArray[np.bool_]
    ) -> Float32:
        manifest = self.bundle.manifest
        evaluator = ReferenceEvaluator(operator_model(attributes, query.shape[2], self.dtype, manifest.opset))
        with np.errstate(all="ignore"):
            outputs = list(evaluator.run(None, _operator_feed(self.dtype, query, key, value, mask)))
        return np.asarray(outputs[0]).astype(np.float32)

    def cannot_run(self, case: Case) -> str | None:
        rows, length = case.tokens
        if rows * length <= _REFERENCE_TOKENS:
            return None
        return f"onnx's ReferenceEvaluator is plain numpy: verify gives it up to {_REFERENCE_TOKENS} tokens"


class _OnGpu(Subject):
    opaque = True

    def __init__(self, name: str, bundle: Bundle) -> None:
        super().__init__(name, bundle)
        self.runtime = MraRuntime.load(bundle, name.removesuffix("-cuda"), "cuda")

    def run(self, inputs: Inputs) -> Arrays:
        assert self.runtime is not None
        return self.runtime.run(**inputs)

    def observe(self, inputs: Inputs) -> tuple[Arrays, list[Layer]]:
        return self.run(inputs), []

    def operator(
        self, attributes: Attributes, query: Float32, key: Float32, value: Float32, mask: npt.NDArray[np.bool_]
    ) -> Float32:
        raise NotImplementedError(f"{self.name} runs whole graphs only")

    def cannot_run(self, case: Case) -> str | None:
        assert self.runtime is not None
        return self.runtime.refuses(case.inputs["input_ids"].shape)


def operator_model(attributes: Attributes, hidden: int, dtype: str, opset: int) -> onnx.ModelProto:
    """A model of one MraAttention node and its function body: query, key, value (b, n, hidden), mask (b, n) -> context."""
    values: dict[str, Any] = {name: int(v) if isinstance(v, bool) else v for name, v in attributes.as_dict().items()}
    values |= {"plugin_version": PLUGIN_VERSION, "plugin_namespace": PLUGIN_NAMESPACE}
    node = onnx.helper.make_node(OP_TYPE, ["query", "key", "value", "mask"], ["context"], domain=OP_DOMAIN, **values)
    element = element_type(dtype)
    tensors = {
        name: onnx.helper.make_tensor_value_info(name, element, ("b", "n", hidden)) for name in ("query", "key", "value", "context")
    }
    mask = onnx.helper.make_tensor_value_info("mask", onnx.TensorProto.INT32, ("b", "n"))
    graph = onnx.helper.make_graph(
        [node], "operator", [tensors["query"], tensors["key"], tensors["value"], mask], [tensors["context"]]
    )
    return onnx.helper.make_model(
        graph,
        functions=[function_proto(attributes, dtype, opset)],
        opset_imports=[onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(OP_DOMAIN, OP_VERSION)],
        ir_version=10,
    )


def _operator_feed(
    dtype: str, query: Float32, key: Float32, value: Float32, mask: npt.NDArray[np.bool_]
) -> dict[str, npt.NDArray[Any]]:
    numpy_dtype = np.dtype(DTYPES[dtype])
    feed: dict[str, npt.NDArray[Any]] = {
        "query": query.astype(numpy_dtype),
        "key": key.astype(numpy_dtype),
        "value": value.astype(numpy_dtype),
    }
    return {**feed, "mask": mask.astype(np.int32)}
