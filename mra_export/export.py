"""From a checkpoint to a bundle: model.onnx and everything a server needs beside it, in one folder, all or nothing."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxscript
import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import PreTrainedModel

import mra_export
from mra_export import bundle as bundles
from mra_export import libraries
from mra_export.bundle import Manifest, ModelInfo, Quantization, Tensor
from mra_export.calibration import calibration_inputs
from mra_export.checkpoint import no_progress_bars, save_checkpoint
from mra_export.contract import DTYPES, INT8, PRECISIONS, Attributes, float_dtype
from mra_export.errors import CheckpointError, ContractError
from mra_export.golden import golden_inputs, golden_outputs
from mra_export.model import TASKS, MraPreTrainedModel, load
from mra_export.onnx_function import check_opset
from mra_export.onnx_model import Signature, save_checked, signature, to_onnx

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def export_bundle(
    model: str | os.PathLike[str] | PreTrainedModel,
    out: str | os.PathLike[str],
    *,
    task: str = "auto",
    dtype: str = "fp32",
    opset: int = 20,
    padding_invariant: bool = False,
    calibration: str | os.PathLike[str] | None = None,
    force: bool = False,
    weights: bool = True,
    finish: Callable[[Path], None] | None = None,
    check: Callable[[Path], list[dict[str, Any]]] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write the bundle of an MRA model to the folder `out`; returns its path. It is there whole or, on any error, not at all.

    model: checkpoint folder, hub id, or a model of `mra_export.model`, which is left as it is.
    task: one of `mra_export.model.TASKS`, or "auto", from the checkpoint's architecture.
    dtype: "fp32", "fp16" or "bf16", of weights and float outputs, or "int8": matrix products of 8-bit integers, all else float32,
    for CPUs (docs/quantization.md). opset: 18 to 23.
    calibration: with int8, a text file or a folder of them, to fix the scales of the activations with; None: each call's own.
    padding_invariant: a sequence gives the same result alone and in any batch (docs/operator.md, "Row maximum").
    force: overwrite a bundle at `out`; anything else there is never touched.
    weights: also keep model.safetensors, which the torch backend and `verify` need; `check` always has it.
    finish: called with the folder when it is complete, to add to it and its manifest (a TensorRT engine, say).
    check: called with the finished folder before it is published; its rows become the manifest's parity report.
    progress: told each step in a few words.

    Raises ContractError (dtype, opset, task), BundleError (`out`), PluginLoadError (no op library), all before any work;
    ContractError for calibration text that cannot be used; CheckpointError for what is not an MRA checkpoint or lacks the task's
    head.
    """
    tell = progress or (lambda text: None)
    _check_dtype(dtype, calibration, padding_invariant)
    check_opset(opset)
    if task != "auto" and task not in TASKS:
        raise ContractError(f"task is {task!r}: use auto or one of {', '.join(TASKS)}")
    op_library = libraries.require("ort_ops")
    with bundles.staged(out, force) as folder:
        tell("load the checkpoint")
        network, source, tokenizer = _network(model, task, float_dtype(dtype))
        network.set_padding_invariant(padding_invariant)
        task = next(name for name, kind in TASKS.items() if type(network) is kind)
        attributes = network.config.attributes(padding_invariant)
        promised = signature(task, network.config)
        _copy_tokenizer(tokenizer, folder, tell)
        inputs = golden_inputs(promised, network.config, folder)
        samples = [] if calibration is None else calibration_inputs(calibration, promised, network.config, folder)

        tell(f"export {task}, {dtype}, opset {opset}")
        graph = to_onnx(network, task, attributes, float_dtype(dtype), opset)
        quantization = None
        if dtype == INT8:
            from mra_export.quantize import quantize  # here, because it needs onnxruntime

            tell(f"quantise to int8, {f'calibrated with {len(samples)} pieces of {calibration}' if samples else 'dynamic'}")
            graph, quantization = quantize(graph, samples, str(calibration))
        tell("write model.onnx and check it")
        save_checked(graph, folder)
        del graph
        tell("write config and weights")
        save_checkpoint(network, folder)
        tell("compute golden outputs")
        network.float().set_reference_attention(True)
        bundles.write_golden(folder / bundles.GOLDEN, inputs, golden_outputs(network, promised, inputs))
        library = folder / bundles.OP_LIBRARY
        library.parent.mkdir()
        shutil.copy(op_library, library)

        tell("write the manifest")
        manifest = _manifest(network, task, dtype, opset, attributes, promised, source, quantization)
        manifest.files = bundles.list_files(folder)
        bundles.write_manifest(folder, manifest)
        del network
        if finish is not None:
            finish(folder)
            manifest = bundles.Bundle.load(folder, verify_hashes=False).manifest
        if check is not None:
            tell("check the bundle")
            manifest.parity = check(folder)
            bundles.write_manifest(folder, manifest)
        if not weights:
            (folder / bundles.WEIGHTS).unlink()
            del manifest.files[bundles.WEIGHTS]
            bundles.write_manifest(folder, manifest)
        tell(f"publish {out}")
    return Path(out)


def _check_dtype(dtype: str, calibration: object, padding_invariant: bool) -> None:
    if dtype not in PRECISIONS:
        raise ContractError(f"dtype is {dtype!r}: use one of {', '.join(PRECISIONS)}")
    if calibration is not None and dtype != INT8:
        raise ContractError(
            f"calibration text {calibration} is for dtype int8, dtype is {dtype}: leave it out, or export with int8"
        )
    if padding_invariant and dtype == INT8 and calibration is None:
        raise ContractError(
            "a padding-invariant int8 bundle needs calibration text: without it the scales are taken from all of a batch, so a "
            "text would not give the same in another one"
        )


def _network(model: str | os.PathLike[str] | PreTrainedModel, task: str, dtype: str) -> tuple[MraPreTrainedModel, str, Path | None]:
    """An eval-mode model on the CPU that is ours to change, what to call its source, and the folder of its tokenizer."""
    torch_dtype = getattr(torch, DTYPES[dtype])
    if not isinstance(model, PreTrainedModel):
        with no_progress_bars():
            network = load(model if isinstance(model, str) else Path(model), task=task, dtype=torch_dtype)
            return network, str(model), _tokenizer_folder(str(model), download=True)
    if not isinstance(model, MraPreTrainedModel):
        raise CheckpointError(
            f"model is a {type(model).__module__}.{type(model).__name__}: pass a model of mra_export.model, "
            "or save it with save_pretrained and pass the folder"
        )
    if task != "auto" and type(model) is not TASKS[task]:
        raise CheckpointError(f"model is a {type(model).__name__}, task {task!r} needs a {TASKS[task].__name__}: pass task='auto'")
    own = copy.deepcopy(model).to(device="cpu", dtype=torch_dtype).eval()
    own.set_reference_attention(False)
    origin = model.config._name_or_path
    return own, origin or type(model).__name__, _tokenizer_folder(origin, download=False) if origin else None


def _copy_tokenizer(folder: Path | None, target: Path, tell: Callable[[str], None]) -> None:
    found = []
    for name in TOKENIZER_FILES:
        if folder is not None and (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
            found.append(name)
    tell(f"tokenizer: {', '.join(found) or 'the checkpoint has none'}")


def _tokenizer_folder(source: str, download: bool) -> Path | None:
    """Where the tokenizer files of a checkpoint folder or hub id are on this machine, or None."""
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, allow_patterns=list(TOKENIZER_FILES), local_files_only=not download))
    except (OSError, ValueError) as error:  # no such hub id, or never downloaded
        if download:
            raise CheckpointError(f"{source}: the tokenizer files cannot be downloaded: {error}") from error
        return None


def _manifest(
    network: MraPreTrainedModel,
    task: str,
    dtype: str,
    opset: int,
    attributes: Attributes,
    promised: Signature,
    source: str,
    quantization: Quantization | None,
) -> Manifest:
    config = network.config
    return Manifest(
        model=ModelInfo(
            architecture=type(network).__name__,
            model_type=config.model_type,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            max_position_embeddings=config.max_position_embeddings,
            vocab_size=config.vocab_size,
            type_vocab_size=config.type_vocab_size,
            num_labels=config.num_labels,
        ),
        task=task,
        dtype=dtype,
        opset=opset,
        padding_invariant=attributes.padding_invariant,
        attributes=attributes.as_dict(),
        inputs=[Tensor(name=name, dtype="int64", axes=list(axes)) for name, axes in promised.inputs.items()],
        outputs=[Tensor(name=name, dtype=DTYPES[float_dtype(dtype)], axes=list(axes)) for name, axes in promised.outputs.items()],
        files={},
        versions={
            "mra_export": mra_export.__version__,
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxscript": onnxscript.__version__,
            "transformers": transformers.__version__,
        },
        source=source,
        quantization=quantization,
    )
