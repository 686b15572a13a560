"""From a bundle to a model repository of Triton Inference Server, for its onnxruntime, tensorrt or python backend.

REPO/README.md  mra-repository.json
REPO/<name>/config.pbtxt  warmup/  1/model.onnx and the op library, or 1/model.plan and the plugin's two libraries, or 1/model.py
    and the bundle
REPO/<name>-tokenizer/, REPO/<name>-text/    with `tokenizer`: an ensemble from text to the model's outputs
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict

from mra_export import kernel, libraries, plan, profiles
from mra_export.bundle import (
    GOLDEN,
    MODEL,
    OP_LIBRARY,
    WEIGHTS,
    Bundle,
    FileEntry,
    Tensor,
    check_target,
    list_files,
    staged,
    write_manifest,
)
from mra_export.bundle import MANIFEST as BUNDLE_MANIFEST
from mra_export.contract import INT8
from mra_export.errors import BackendError, ContractError, EngineError
from mra_export.runtime import BACKENDS as RUNTIMES
from mra_export.serve import pbtxt
from mra_export.serve.pbtxt import Name
from mra_export.serve.triton_model import BUNDLE, TEXT, TOKENIZER
from mra_export.serve.triton_readme import readme
from mra_export.text import Tokenizer

BACKENDS = ("onnxruntime", "tensorrt", "python")
MANIFEST = "mra-repository.json"
WHAT = "Triton model repository"
VERSION = "1"
TEXT_TASKS = ("fill-mask", "text-classification", "token-classification", "feature-extraction")
"""Tasks whose input is one text, so that a tokenizer can stand before the model."""
DEFAULT_BATCH = 8
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_TYPES = {"int64": "TYPE_INT64", "float32": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16"}
_GRAPH_FILES = (MODEL, MODEL + ".data")
Config = dict[str, Any]


class Repository(BaseModel):
    """mra-repository.json. bundle: where it came from. models: their names. files: every other file, by relative POSIX path."""

    model_config = ConfigDict(extra="forbid")

    bundle: str
    backend: str
    models: list[str]
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class TritonOptions:
    """What `write_repository` writes.

    backend: of BACKENDS. name: the model's. device: "cpu" or "cuda"; None: "cuda" for tensorrt, "cpu" for the others.
    runtime: python backend: of runtime.BACKENDS, or "auto". engine: file name of the engine, where the bundle has several.
    op_library: False runs the operator's definition, slower. max_batch_size: rows of one call; None: 8, or what the engine takes.
    max_delay_ms: how long Triton may hold a request back for a larger batch. max_queue: requests that may wait; more are refused.
    instances: copies of the model, per GPU on GPUs. threads: of one call in ONNX Runtime; None: its own choice, for
    the python backend the processors shared by its instances and their two calls at once.
    tokenizer: also write the ensemble that takes text. mount: the repository's absolute path as the server sees it.
    """

    backend: str
    name: str = "mra"
    device: str | None = None
    runtime: str = "auto"
    engine: str | None = None
    op_library: bool = True
    max_batch_size: int | None = None
    max_delay_ms: float = 2.0
    max_queue: int = 256
    instances: int = 1
    threads: int | None = None
    tokenizer: bool = False
    mount: str = "/models"

    def __post_init__(self) -> None:
        for option, value, allowed in (
            ("backend", self.backend, BACKENDS),
            ("device", self.device, (None, "cpu", "cuda")),
            ("runtime", self.runtime, ("auto", *RUNTIMES)),
        ):
            if value not in allowed:
                raise ContractError(f"{option} is {value!r}: use one of {', '.join(str(choice) for choice in allowed if choice)}")
        for option, number in (
            ("max_batch_size", self.max_batch_size),
            ("max_queue", self.max_queue),
            ("instances", self.instances),
            ("threads", self.threads),
        ):
            if number is not None and number < 1:
                raise ContractError(f"{option} is {number}: it must be 1 or more")
        if self.max_delay_ms < 0:
            raise ContractError(f"max_delay_ms is {self.max_delay_ms}: it must be 0 or more")
        if not _NAME.fullmatch(self.name):
            raise ContractError(f"name is {self.name!r}: use letters, digits, '_', '-' and '.'; it is a folder and part of a URL")
        if not PurePosixPath(self.mount).is_absolute():
            raise ContractError(f"mount is {self.mount!r}: pass the absolute path at which the server sees the repository")
        for option, given, backends in (
            ("runtime", self.runtime != "auto", ("python",)),
            ("engine", self.engine is not None, ("tensorrt", "python")),
            ("op_library", not self.op_library, ("onnxruntime", "python")),
            ("threads", self.threads is not None, ("onnxruntime", "python")),
        ):
            if given and self.backend not in backends:
                raise ContractError(f"{option} is for backend {' or '.join(backends)}, not {self.backend}: leave it out")

    @property
    def where(self) -> str:
        """The device with its default."""
        return self.device or ("cuda" if "tensorrt" in (self.backend, self.runtime) else "cpu")


def write_repository(
    bundle: Bundle,
    target: str | os.PathLike[str],
    options: TritonOptions,
    *,
    force: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Repository:
    """Write the model repository in one step: it is there whole, or not at all. `force` replaces an older one, and only such.

    Raises BundleError (the target, or no tokenizer), BackendError, EngineError or ContractError where the bundle does not fit what
    the options ask for; the message says what does.
    """
    check_target(target, force, MANIFEST, WHAT)
    entry = _check(bundle, options)
    config = _model_config(bundle, options, entry)
    with staged(target, force, MANIFEST, WHAT) as folder:
        model = folder / options.name
        version = model / VERSION
        version.mkdir(parents=True)
        progress(f"write model {options.name} for Triton's {options.backend} backend")
        if options.backend == "onnxruntime":
            files = [name for name in _GRAPH_FILES if name in bundle.manifest.files] + ([OP_LIBRARY] if options.op_library else [])
            for name in files:
                shutil.copyfile(bundle.file(name), version / Path(name).name)
        elif entry is not None and options.backend == "tensorrt":
            shutil.copyfile(bundle.file(entry.file), version / "model.plan")
            for library in _plugin_libraries(bundle, entry):
                shutil.copyfile(library, version / library.name)
        else:
            for name in (BUNDLE_MANIFEST, *bundle.manifest.files):
                copy = version / BUNDLE / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(bundle.path / name, copy)
            _write_code(version, "MraModel")
        config["model_warmup"] = _warm_up(bundle, entry, model)
        configs = {options.name: config}
        if options.tokenizer:
            progress("write the tokenizer and the ensemble")
            configs.update(_text_models(bundle, options, config, folder))
        for name, content in configs.items():
            (folder / name / "config.pbtxt").write_text(pbtxt.dumps(content), encoding="utf-8")
        register = libraries.FILES["trt_register"]
        opened = PurePosixPath(options.mount, options.name, VERSION, register) if (version / register).exists() else None
        (folder / "README.md").write_text(readme(bundle, options, entry, list(configs), opened), encoding="utf-8")
        repository = Repository(bundle=str(bundle.path), backend=options.backend, models=list(configs), files=list_files(folder))
        write_manifest(folder, repository, MANIFEST)
        progress(f"publish {target}")
    return repository


def _check(bundle: Bundle, options: TritonOptions) -> plan.EngineEntry | None:
    """Refuse what would not run; the engine to serve, for the tensorrt backend."""
    manifest = bundle.manifest
    if options.tokenizer:
        if manifest.task not in TEXT_TASKS:
            raise ContractError(
                f"a tokenizer goes before tasks of one text, this bundle's is {manifest.task}: leave --tokenizer out"
            )
        Tokenizer(bundle.path)
    runs = options.runtime if options.backend == "python" else options.backend
    size = options.max_batch_size or DEFAULT_BATCH
    quantization = manifest.quantization
    if quantization is not None and quantization.method == "dynamic" and size > 1 and runs != "torch":
        raise ContractError(
            f"max_batch_size is {size}, but this int8 bundle takes its scales from each call, so an answer would depend "
            "on its batch mates: pass --max-batch-size 1, or export with --calibration"
        )
    if options.backend == "tensorrt":
        return _check_engine(bundle, options)
    if runs == "onnxruntime":
        _check_onnx_runtime(bundle, options)
    return None


def _check_onnx_runtime(bundle: Bundle, options: TritonOptions) -> None:
    manifest, device = bundle.manifest, options.where
    if device == "cpu" and manifest.dtype == "bf16":
        raise BackendError(
            "ONNX Runtime's CPU provider has no bfloat16 MatMul: use --backend python, which runs torch for it, or export again "
            "with --dtype fp32"
        )
    if device == "cuda" and manifest.dtype == INT8:
        raise BackendError("an int8 bundle's graph is for CPUs: use --device cpu, or export with --dtype fp16 for a GPU")
    if not options.op_library:
        return
    if OP_LIBRARY not in manifest.files:
        raise BackendError(
            f"{bundle.path} holds no op library ({OP_LIBRARY}): export it again where `mra-export doctor` shows ort_ops, "
            "or pass --no-op-library (slower, same answer)"
        )
    if device == "cuda" and not kernel.has_cuda(bundle.file(OP_LIBRARY)):
        raise BackendError(
            f"{bundle.file(OP_LIBRARY)} has no CUDA kernel for ONNX Runtime: export again where it is built with an nvcc, use "
            "--backend tensorrt, or pass --no-op-library (the operator's definition on the GPU: N x N memory, same answer)"
        )


def _check_engine(bundle: Bundle, options: TritonOptions) -> plan.EngineEntry:
    from mra_export.engine import check_dtype

    check_dtype(bundle.manifest.dtype)
    if options.where != "cuda":
        raise BackendError(f"device is {options.where!r}: Triton's tensorrt backend runs on device 'cuda' only")
    everything = plan.entries(bundle)
    fitting = [row for row in everything if row.backend == "tensorrt"]
    build = f"build one with `mra-export engine {bundle.path} --backend tensorrt` on a machine with the server's GPU"
    if not fitting:
        if everything:
            raise EngineError(
                f"{bundle.path} has TensorRT-RTX engines only, which Triton's tensorrt backend does not load: {build}, or use "
                "--backend python --runtime tensorrt"
            )
        raise EngineError(f"{bundle.path} has no engine: {build}")
    wanted = [row for row in fitting if options.engine in (None, row.file, Path(row.file).name)]
    names = ", ".join(Path(row.file).name for row in fitting)
    if not wanted:
        raise EngineError(f"{bundle.path} has no TensorRT engine {options.engine}, it has {names}: pass one of them as --engine")
    if len(wanted) > 1:
        raise EngineError(f"{bundle.path} has {len(wanted)} TensorRT engines: pass one of {names} as --engine")
    entry = wanted[0]
    _plugin_libraries(bundle, entry)
    largest = max(next(iter(profile.values()))["max"][0] for profile in entry.profiles)
    if options.max_batch_size is not None and options.max_batch_size > largest:
        raise EngineError(
            f"max_batch_size is {options.max_batch_size}, {entry.file} takes {profiles.describe(entry.profiles)}: pass "
            f"{largest} or less, or build an engine with --max-shapes"
        )
    return entry


def _plugin_libraries(bundle: Bundle, entry: plan.EngineEntry) -> tuple[Path, ...]:
    """What an engine needs beside it: its plugin, and the library that registers the plugin for a server that only opens it."""
    from mra_export.engine_checks import check_plugin_library

    if entry.plugin is None or entry.plugin.embedded:
        return ()
    return check_plugin_library(bundle, entry, entry.plugin), libraries.require("trt_register")


def _model_config(bundle: Bundle, options: TritonOptions, entry: plan.EngineEntry | None) -> Config:
    manifest = bundle.manifest
    own_code = options.backend == "python"
    size = options.max_batch_size or DEFAULT_BATCH
    if entry is not None and options.max_batch_size is None:
        size = max(next(iter(profile.values()))["max"][0] for profile in entry.profiles)
    config: Config = {
        "name": options.name,
        "backend": options.backend,
        "default_model_filename": {"onnxruntime": MODEL, "tensorrt": "model.plan", "python": "model.py"}[options.backend],
        "max_batch_size": size,
        "input": [_tensor(tensor, own_code) for tensor in manifest.inputs],
        "output": [_tensor(tensor, own_code) for tensor in manifest.outputs],
        "instance_group": [
            {
                "count": options.instances,
                "kind": Name("KIND_GPU" if options.where == "cuda" else "KIND_CPU"),
                "profile": [str(index) for index in range(len(entry.profiles))] if entry is not None else [],
            }
        ],
        "dynamic_batching": {
            "max_queue_delay_microseconds": round(options.max_delay_ms * 1000),
            "default_queue_policy": {"timeout_action": Name("REJECT"), "max_queue_size": options.max_queue},
        },
        "version_policy": {"latest": {"num_versions": 1}},
    }
    if own_code:
        for tensor in config["input"]:
            tensor["allow_ragged_batch"] = True  # MraModel sorts a batch's requests by length itself
            tensor["optional"] = tensor["name"] != "input_ids"
        config["parameters"] = pbtxt.parameters(
            {
                "runtime": options.runtime,
                "device": options.where,
                "op_library": "true" if options.op_library else "false",
                "threads": options.threads,
                "engine": options.engine,
            }
        )
    elif options.backend == "onnxruntime":
        config["parameters"] = pbtxt.parameters({"intra_op_thread_count": options.threads})
        if options.op_library:
            library = PurePosixPath(options.mount, options.name, VERSION, Path(OP_LIBRARY).name)
            config["model_operations"] = {"op_library_filename": [str(library)]}
    return config


def _tensor(tensor: Tensor, own_code: bool) -> Config:
    """A tensor without its batch axis, which max_batch_size stands for. own_code: numpy has no bfloat16, so those are float32."""
    kind = _TYPES["float32" if own_code and tensor.dtype == "bfloat16" else tensor.dtype]
    return {
        "name": tensor.name,
        "data_type": Name(kind),
        "dims": [axis if isinstance(axis, int) else -1 for axis in tensor.axes[1:]],
    }


def _warm_up(bundle: Bundle, entry: plan.EngineEntry | None, model: Path) -> list[Config]:
    """Requests that each instance answers before it is ready: the first row of each golden batch, raw int64 in warmup/."""
    folder = model / "warmup"
    folder.mkdir()
    samples = []
    for number, batch in enumerate(bundle.golden()[0]):
        shape = (1, *batch["input_ids"].shape[1:])
        if entry is not None and not _takes(entry, shape):
            continue
        inputs = []
        for name, array in batch.items():
            file = f"{number}-{name}"
            (folder / file).write_bytes(array[:1].astype("<i8").tobytes())
            tensor = {"data_type": Name("TYPE_INT64"), "dims": list(shape[1:]), "input_data_file": file}
            inputs.append({"key": name, "value": tensor})
        samples.append({"name": f"golden-{'x'.join(str(size) for size in shape)}", "batch_size": 1, "inputs": inputs})
    return samples


def _takes(entry: plan.EngineEntry, shape: tuple[int, ...]) -> bool:
    """Whether an engine takes this shape as it is: Triton, unlike MraRuntime, does not pad up to a profile's least shape."""
    shapes = [next(iter(profile.values())) for profile in entry.profiles]
    return any(all(a <= b <= c for a, b, c in zip(s["min"], shape, s["max"], strict=True)) for s in shapes)


def _text_models(bundle: Bundle, options: TritonOptions, model: Config, folder: Path) -> dict[str, Config]:
    """Write the tokenizer's files; the configs of the tokenizer and of the ensemble, by name."""
    tokenizer_name, ensemble_name = f"{options.name}-tokenizer", f"{options.name}-text"
    version = folder / tokenizer_name / VERSION
    (version / TOKENIZER).mkdir(parents=True)
    for name in bundle.manifest.files:
        if "/" not in name and name not in (*_GRAPH_FILES, WEIGHTS, GOLDEN):
            shutil.copyfile(bundle.file(name), version / TOKENIZER / name)
    _write_code(version, "MraTokenizer")
    (folder / ensemble_name / VERSION).mkdir(parents=True)
    # An empty folder is nothing to whoever copies repositories with git or an object store.
    (folder / ensemble_name / VERSION / ".keep").write_bytes(b"")
    text = [{"name": TEXT, "data_type": Name("TYPE_STRING"), "dims": [1]}]
    tokens = [_tensor(tensor, own_code=True) for tensor in bundle.manifest.inputs]
    names = [tensor["name"] for tensor in tokens]
    tokenizer: Config = {
        "name": tokenizer_name,
        "backend": "python",
        "max_batch_size": model["max_batch_size"],
        "input": text,
        "output": tokens,
        "instance_group": [{"count": 1, "kind": Name("KIND_CPU")}],
        "parameters": pbtxt.parameters({"longest": bundle.manifest.model.max_position_embeddings}),
        "version_policy": model["version_policy"],
    }
    steps = [
        {
            "model_name": tokenizer_name,
            "model_version": -1,
            "input_map": [{"key": TEXT, "value": TEXT}],
            "output_map": [{"key": name, "value": name} for name in names],
        },
        {
            "model_name": options.name,
            "model_version": -1,
            "input_map": [{"key": name, "value": name} for name in names],
            "output_map": [{"key": tensor["name"], "value": tensor["name"]} for tensor in model["output"]],
        },
    ]
    ensemble: Config = {
        "name": ensemble_name,
        "platform": "ensemble",
        "max_batch_size": model["max_batch_size"],
        "input": text,
        "output": [*tokens, *model["output"]],
        "ensemble_scheduling": {"step": steps},
        "version_policy": model["version_policy"],
    }
    return {tokenizer_name: tokenizer, ensemble_name: ensemble}


def _write_code(version: Path, kind: str) -> None:
    code = f'from mra_export.serve.triton_model import {kind} as TritonPythonModel\n\n__all__ = ["TritonPythonModel"]\n'
    (version / "model.py").write_text(code, encoding="utf-8")
