"""MraRuntime: load a bundle and run it, whatever is underneath.

runtime = MraRuntime.load("bundle")
logits = runtime.run(input_ids=ids, attention_mask=mask)["logits"]
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mra_export import kernel, parity
from mra_export.backends import CudaBackend, TokenBackend
from mra_export.bundle import MODEL, OP_LIBRARY, Bundle
from mra_export.contract import INT8, TOLERANCES, float_dtype
from mra_export.errors import BackendError, ContractError, ParityError
from mra_export.golden_file import parts as golden_parts
from mra_export.inputs import InputSpec, Integers, check_tokens, is_torch, like

if TYPE_CHECKING:
    from mra_export.backends import Backend

logger = logging.getLogger(__name__)

BACKENDS = ("torch", "onnxruntime", "tensorrt")
DEVICES = ("cpu", "cuda")


class MraRuntime:
    """A loaded bundle. Thread-safe; batch and length may change from call to call. Use `load`, and `close` or a with statement.

    backend: "torch", "onnxruntime" or "tensorrt", the one that runs. device: "cpu" or "cuda". precision: the bundle's dtype, but
    "fp32" for torch with an int8 bundle, whose weights are the float model's.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle = bundle
        self.backend = backend.name
        self.device = backend.device
        dtype = bundle.manifest.dtype
        self.precision = float_dtype(dtype) if backend.name == "torch" else dtype
        self._running: Backend | None = backend
        self._inputs = input_spec(bundle)

    @classmethod
    def load(
        cls,
        bundle: str | Path | Bundle,
        backend: str = "auto",
        device: str | None = None,
        *,
        use_op_library: bool = True,
        intra_op_threads: int | None = None,
        engine: str | None = None,
        allow_embedded_plugin: bool = False,
        cuda_graphs: bool = False,
        chosen_tokens: bool = False,
    ) -> MraRuntime:
        """Check a bundle's files and contract version, then load it.

        backend: "torch", "onnxruntime", or "auto", which takes ONNX Runtime where it can run the bundle's dtype on the device, else
        torch, and logs which and why. "tensorrt" runs an engine that `mra-export engine` built, TensorRT's or TensorRT-RTX's.
        device: "cpu" or "cuda", no fallback from one to the other; None: "cuda" for tensorrt, "cpu" for the others.
        use_op_library: False runs the operator's definition in place of the compiled library, slower: ONNX Runtime the graph's own
        function body, which needs N x N memory, and torch the reference attention.
        intra_op_threads: threads of one ONNX Runtime call; torch has its own torch.set_num_threads.
        engine, allow_embedded_plugin: for tensorrt, see backends/tensorrt.py.
        cuda_graphs: tensorrt and onnxruntime on a GPU capture each shape once and replay it.
        chosen_tokens: for ONNX Runtime on a CPU, load the graph so that `run` with `tokens` does no more than these tokens need;
        for the bundles of Manifest.chooses_tokens.

        Raises BundleError (missing, altered, another contract), BackendError (cannot run here), PluginLoadError (a library),
        EngineError (an engine does not fit this machine; the message has the command that rebuilds it).
        """
        _check_choice("backend", backend, ("auto", *BACKENDS))
        device = device or ("cuda" if backend == "tensorrt" else "cpu")
        _check_choice("device", device, DEVICES)
        if intra_op_threads is not None and intra_op_threads < 1:
            raise ContractError(f"intra_op_threads is {intra_op_threads}: it must be 1 or more")
        if chosen_tokens and (backend not in ("auto", "onnxruntime") or device != "cpu"):
            raise ContractError(
                f"chosen_tokens is for ONNX Runtime on a CPU, not for {backend!r} on {device!r}: `run` takes tokens without it too"
            )
        if backend != "tensorrt" and (engine is not None or allow_embedded_plugin):
            raise ContractError("engine and allow_embedded_plugin are for backend 'tensorrt'")
        loaded = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
        if backend == "auto":
            backend, why = choose_backend(loaded, device, use_op_library)
            logger.info("%s: backend %s on %s, because %s", loaded.path, backend, device, why)
        if cuda_graphs and (backend == "torch" or device != "cuda"):
            raise ContractError("cuda_graphs is for backends 'tensorrt' and 'onnxruntime' on device 'cuda'")
        if backend == "torch":
            if intra_op_threads is not None:
                raise ContractError("intra_op_threads is for ONNX Runtime: call torch.set_num_threads for the torch backend")
            return cls(loaded, _torch(loaded, device, use_op_library))
        if backend == "tensorrt":
            if not use_op_library or intra_op_threads is not None:
                raise ContractError(
                    "use_op_library and intra_op_threads are not for backend 'tensorrt': `mra-export engine --no-plugin` builds an "
                    "engine without the operator's library"
                )
            return cls(loaded, _tensorrt(loaded, device, engine, allow_embedded_plugin, cuda_graphs))
        if device == "cuda":
            return cls(loaded, _onnx_runtime_cuda(loaded, use_op_library, intra_op_threads, cuda_graphs))
        return cls(loaded, _onnx_runtime(loaded, use_op_library, intra_op_threads, chosen_tokens))

    def run(self, *, tokens: Any = None, **arrays: Any) -> dict[str, Any]:
        """Run the model once. Give input_ids and, where wanted, attention_mask (1 = real token) and token_type_ids.

        Each is a numpy array or torch tensor of integers, (batch, length), or (batch, choices, length) for multiple choice.
        tokens: (chosen,) integers, for bundles whose outputs have an entry per token: the tokens, numbered through (batch, length),
        whose entries are wanted; outputs are then (chosen, ...). None: all, (batch, length, ...).
        Returns the outputs by transformers' names, numpy for numpy and torch for torch (input_ids decides); with tensorrt, and
        with onnxruntime on a GPU, CUDA tensors go in and come out without a copy, on torch's current stream. numpy has no bfloat16:
        bfloat16 outputs come as float32 arrays. Raises ContractError for inputs the model cannot take.
        """
        running = self._running
        if running is None:
            raise BackendError(f"{self.bundle.path}: this runtime is closed, load it again")
        ids = arrays.get("input_ids")
        if ids is not None and is_torch(ids) and ids.is_cuda and isinstance(running, CudaBackend):
            outputs = running.run_cuda(self._inputs.prepare_tensors(arrays))
            return outputs if tokens is None else self._chosen(outputs, self.check_tokens(tokens, tuple(ids.shape)))
        prepared = self._inputs.prepare(arrays)
        if tokens is None:
            return like(running.run(prepared), ids)
        tokens = self.check_tokens(tokens, prepared["input_ids"].shape)
        if isinstance(running, TokenBackend):
            return like(running.run_tokens(prepared, tokens), ids)
        return self._chosen(like(running.run(prepared), ids), tokens)

    def _chosen(self, outputs: dict[str, Any], tokens: Integers) -> dict[str, Any]:
        axes = self._inputs.rank
        return {name: value.reshape(-1, *value.shape[axes:])[tokens] for name, value in outputs.items()}

    def check_tokens(self, tokens: Any, shape: tuple[int, ...]) -> Integers:
        """What `run` takes as `tokens` for inputs of this shape, as int64. Raises ContractError."""
        manifest = self.bundle.manifest
        if whole := [tensor.name for tensor in manifest.outputs if tensor.name not in manifest.token_outputs]:
            raise ContractError(f"{', '.join(whole)} has no entry per token: leave tokens out")
        return check_tokens(tokens, shape)

    def check(self, **arrays: Any) -> dict[str, npt.NDArray[np.int64]]:
        """What `run` would give to the model: one int64 array per graph input, with what was left out filled in.

        Raises ContractError for inputs the model cannot take.
        """
        return self._inputs.prepare(arrays)

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """Why inputs of this shape are not taken, or None: an engine takes the shapes it was built for."""
        return self._running.refuses(shape) if isinstance(self._running, CudaBackend) else None

    def validate(self) -> list[parity.Row]:
        """Compare with the golden outputs that PyTorch wrote at export. Returns the rows; raises ParityError if one fails."""
        rows = self.compare_golden()
        failed = [row for row in rows if row.status == parity.FAIL]
        if failed:
            worst = failed[0]
            where = f"{self.backend} on {self.device} differs from PyTorch in {worst.output}, {worst.case}"
            raise ParityError(f"{self.bundle.path}: {where}: {worst.reason}")
        return rows

    def compare_golden(self) -> list[parity.Row]:
        """The rows of `validate`, whatever they say."""
        dtype = self.precision
        tolerance = TOLERANCES[dtype].model_free
        rows = []
        for inputs, expected in zip(*self.bundle.golden(), strict=True):
            case = f"golden {'x'.join(str(n) for n in inputs['input_ids'].shape)}"
            too_much = self.refuses(inputs["input_ids"].shape)
            if too_much:
                rows.append(parity.Row("golden", self.backend, dtype, case, "", parity.SKIP, too_much))
                continue
            actual = self.run(**inputs)
            for name, wanted in expected.items():
                if name not in actual:
                    rows.append(parity.Row("golden", self.backend, dtype, case, name, parity.FAIL, "this output is missing"))
                    continue
                keep = real_positions(self.bundle, name, inputs)
                try:
                    parts = list(golden_parts(actual[name], wanted))
                except ValueError as error:
                    rows.append(parity.Row("golden", self.backend, dtype, case, name, parity.FAIL, str(error), tolerance))
                    continue
                rows += [
                    parity.judge(
                        *("golden", self.backend, dtype, f"{case}{words}", name, found, right, tolerance),
                        keep=keep if every_token else None,
                        free=True,
                    )
                    for words, found, right, every_token in parts
                ]
        return rows

    def close(self) -> None:
        """Let go of the model: it is freed when calls in flight have finished. Later calls raise BackendError."""
        self._running = None

    def __enter__(self) -> MraRuntime:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def input_spec(bundle: Bundle) -> InputSpec:
    """What the bundle's graph takes."""
    manifest = bundle.manifest
    return InputSpec(
        names=tuple(tensor.name for tensor in manifest.inputs),
        rank=len(manifest.inputs[0].axes),
        vocab_size=manifest.model.vocab_size,
        type_vocab_size=manifest.model.type_vocab_size,
        max_length=manifest.model.max_position_embeddings,
    )


def real_positions(bundle: Bundle, output: str, inputs: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.bool_] | None:
    """For an output with one entry per token, (B, N) bool, True at real tokens; None for an output with one entry per text."""
    if output not in bundle.manifest.token_outputs:
        return None
    return np.asarray(inputs["attention_mask"]).astype(bool)


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise BackendError(f"{name} is {value!r}: use one of {', '.join(allowed)}")


def choose_backend(bundle: Bundle, device: str, use_op_library: bool) -> tuple[str, str]:
    """The backend that "auto" takes for this device ("cpu" or "cuda"), and why."""
    dtype = bundle.manifest.dtype
    if importlib.util.find_spec("onnxruntime") is None:
        return "torch", "onnxruntime is not installed"
    from mra_export.backends import onnx_runtime

    if use_op_library and OP_LIBRARY not in bundle.manifest.files:
        return "torch", "the bundle holds no op library for ONNX Runtime"
    if device == "cuda" and dtype == INT8:
        return "torch", "int8 graphs are for CPUs; torch runs the float model"
    if device == "cuda" and not onnx_runtime.cuda_available():
        return "torch", "this onnxruntime has no CUDA provider"
    if device == "cuda" and use_op_library and not kernel.has_cuda(bundle.file(OP_LIBRARY)):
        return "torch", "the bundle's op library was built without CUDA"
    if device == "cpu" and dtype == "bf16":
        return "torch", "ONNX Runtime's CPU provider has no bfloat16 MatMul"
    return "onnxruntime", f"it runs {dtype} on {device}"


def _torch(bundle: Bundle, device: str, use_op_library: bool) -> Backend:
    if importlib.util.find_spec("torch") is None:
        raise BackendError("backend is 'torch', but torch is not installed: pip install torch")
    from mra_export.backends.pytorch import TorchBackend

    manifest = bundle.manifest
    return TorchBackend(
        bundle.path,
        task=manifest.task,
        dtype=float_dtype(manifest.dtype),
        padding_invariant=manifest.padding_invariant,
        device=device,
        reference=not use_op_library,
    )


def _tensorrt(bundle: Bundle, device: str, engine: str | None, allow_embedded_plugin: bool, cuda_graphs: bool) -> Backend:
    if device != "cuda":
        raise BackendError(f"device is {device!r}: backend 'tensorrt' runs on device 'cuda' only")
    from mra_export.backends.tensorrt import TensorRtBackend

    return TensorRtBackend(bundle, engine=engine, allow_embedded_plugin=allow_embedded_plugin, cuda_graphs=cuda_graphs)


def _onnx_runtime_cuda(bundle: Bundle, use_op_library: bool, intra_op_threads: int | None, cuda_graphs: bool) -> Backend:
    library = _op_library(bundle, use_op_library)
    from mra_export.backends.onnx_runtime_cuda import OnnxRuntimeCudaBackend

    if bundle.manifest.dtype == INT8:
        raise BackendError("an int8 bundle's graph is for CPUs: use device 'cpu', or export with --dtype fp16 for a GPU")
    return OnnxRuntimeCudaBackend(
        bundle.file(MODEL),
        dtype=float_dtype(bundle.manifest.dtype),
        library=library,
        intra_op_threads=intra_op_threads,
        cuda_graphs=cuda_graphs,
    )


def _onnx_runtime(bundle: Bundle, use_op_library: bool, intra_op_threads: int | None, chosen_tokens: bool) -> Backend:
    library = _op_library(bundle, use_op_library)
    from mra_export.backends.onnx_runtime import OnnxRuntimeBackend, TokenOnnxRuntimeBackend

    manifest = bundle.manifest
    options: dict[str, Any] = {
        "dtype": float_dtype(manifest.dtype),
        "library": library,
        "intra_op_threads": intra_op_threads,
    }
    if not chosen_tokens:
        return OnnxRuntimeBackend(bundle.file(MODEL), **options)
    if not manifest.chooses_tokens:
        raise ContractError(
            f"{bundle.path}: chosen_tokens is for fp32 and calibrated int8 bundles with one output that has an entry per token, "
            f"not for {manifest.dtype}, {manifest.task}: leave it out"
        )
    return TokenOnnxRuntimeBackend(bundle.file(MODEL), hidden_size=manifest.model.hidden_size, **options)


def _op_library(bundle: Bundle, use_op_library: bool) -> Path | None:
    """The bundle's op library for ONNX Runtime, which is there; None where it is not wanted."""
    if importlib.util.find_spec("onnxruntime") is None:
        raise BackendError("backend is 'onnxruntime', but onnxruntime is not installed: pip install onnxruntime")
    if not use_op_library:
        return None
    if OP_LIBRARY not in bundle.manifest.files:
        raise BackendError(
            f"{bundle.path} holds no op library ({OP_LIBRARY}): export it again where `mra-export doctor` shows ort_ops, "
            "or pass use_op_library=False (slower, same answer)"
        )
    return bundle.file(OP_LIBRARY)
