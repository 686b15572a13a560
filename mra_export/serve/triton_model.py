"""What Triton's python backend runs: the model of a bundle, and its tokenizer. The repository's model.py names one of the classes.

Triton's own module triton_python_backend_utils is there only inside its server.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mra_export.bundle import Bundle
from mra_export.errors import BackendError, BusyError, ContractError, MraExportError
from mra_export.runtime import MraRuntime, choose_backend
from mra_export.serve.batching import BatchingRuntime, share_processors
from mra_export.text import Tokenizer

BUNDLE = "bundle"
"""Folder of the bundle in a model's version folder."""
TOKENIZER = "tokenizer"
"""Folder of the tokenizer's files in a tokenizer's version folder."""
TEXT = "TEXT"
_GATHERING_MS = 0.5
"""Triton hands over a batch at once, this module request by request: how long the first of them waits for the last."""


class MraModel:
    """One instance. It loads only when it gives the golden outputs; a request that does not fit fails alone.

    Requests of one batch may have any lengths: BatchingRuntime puts those together that do not change each other's answers.
    """

    def initialize(self, args: dict[str, str]) -> None:
        config, folder = json.loads(args["model_config"]), _version_folder(args)
        settings = {key: value["string_value"] for key, value in config["parameters"].items()}
        bundle, device, use_op_library = Bundle.load(folder / BUNDLE), settings["device"], settings["op_library"] == "true"
        backend = settings["runtime"] if settings["runtime"] != "auto" else choose_backend(bundle, device, use_op_library)[0]
        threads = int(settings["threads"]) if "threads" in settings else None
        copies = sum(int(group["count"]) for group in config["instance_group"])
        workers, threads = share_processors(backend, device, None, threads, copies)
        self._runtime = MraRuntime.load(
            bundle, backend, device, use_op_library=use_op_library, intra_op_threads=threads, engine=settings.get("engine")
        )
        self._runtime.validate()
        self._inputs = [tensor["name"] for tensor in config["input"]]
        size = int(config["max_batch_size"])
        self._batching = BatchingRuntime(
            self._runtime,
            max_batch_size=size,
            max_queue=size,
            max_delay_ms=_GATHERING_MS if size > 1 else 0,
            workers=workers,
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        import triton_python_backend_utils as triton

        futures = [self._submit(request, triton) for request in requests]
        return [_respond(future, triton) for future in futures]

    def finalize(self) -> None:
        self._batching.close()
        self._runtime.close()

    def _submit(self, request: Any, triton: Any) -> Any:
        tensors = {name: triton.get_input_tensor_by_name(request, name) for name in self._inputs}
        try:
            return self._batching.submit(**{name: tensor.as_numpy() for name, tensor in tensors.items() if tensor is not None})
        except MraExportError as error:
            return error


class MraTokenizer:
    """TEXT, (batch, 1) strings -> input_ids, attention_mask and, if the model has it, token_type_ids, (batch, longest) int64."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        self._tokenizer = Tokenizer(_version_folder(args) / TOKENIZER)
        self._longest = int(config["parameters"]["longest"]["string_value"])
        self._outputs = [tensor["name"] for tensor in config["output"]]

    def execute(self, requests: list[Any]) -> list[Any]:
        import triton_python_backend_utils as triton

        return [_respond(self._encode(request, triton), triton) for request in requests]

    def _encode(self, request: Any, triton: Any) -> Any:
        texts = triton.get_input_tensor_by_name(request, TEXT).as_numpy().reshape(-1)
        try:
            encoded = self._tokenizer.encode([text.decode() for text in texts], self._longest)
        except UnicodeDecodeError as error:
            return ContractError(f"{TEXT} is not UTF-8 ({error}): send UTF-8 strings")
        except MraExportError as error:
            return error
        return {name: encoded[name] for name in self._outputs}


def _version_folder(args: dict[str, str]) -> Path:
    return Path(args["model_repository"]) / args["model_version"]


def _respond(answer: Any, triton: Any) -> Any:
    """answer: outputs by name, a future of them, or an error."""
    try:
        if isinstance(answer, BaseException):
            raise answer
        outputs = answer if isinstance(answer, dict) else answer.result()
    except Exception as error:  # one request's error is its own answer, not the end of the batch
        return triton.InferenceResponse(error=triton.TritonError(str(error), _code(error, triton)))
    return triton.InferenceResponse([triton.Tensor(name, np.ascontiguousarray(value)) for name, value in outputs.items()])


def _code(error: Exception, triton: Any) -> Any:
    if isinstance(error, ContractError):
        return triton.TritonError.INVALID_ARG
    return triton.TritonError.UNAVAILABLE if isinstance(error, (BusyError, BackendError)) else triton.TritonError.INTERNAL
