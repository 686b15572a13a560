"""Small bundles for the tests of everything that reads bundles. Made once per test run, whatever the number of workers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mra_export.errors import BundleError

SMALL: dict[str, Any] = {
    "vocab_size": 261,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.15,
    "max_position_embeddings": 256,
    "block_per_row": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"dtype": "fp16"},
    "wide": {"config": {"vocab_size": 1000}},  # its golden outputs are kept in parts
    "bf16": {"dtype": "bf16"},
    "invariant": {"padding_invariant": True},
    "int8": {"dtype": "int8", "calibration": Path(__file__).parent.parent / "docs"},
    "int8-dynamic": {"dtype": "int8"},
    "answers": {"task": "question-answering", "padding_invariant": True, "config": {"type_vocab_size": 2, "approx_mode": "sparse"}},
    "choices": {"task": "multiple-choice"},
    "classes": {"task": "text-classification", "config": {"id2label": {0: "good", 1: "bad", 2: "ugly"}}},
    "tokens": {"task": "token-classification", "dtype": "fp16"},
    "features": {"task": "feature-extraction", "config": {"initial_prior_first_n_blocks": 1, "initial_prior_diagonal_n_blocks": 3}},
}


def checkpoint(folder: Path, task: str = "fill-mask", **config: Any) -> Path:
    """A checkpoint with random weights and a byte-level tokenizer: `<mask>` and any text."""
    import torch

    from mra_export.checkpoint import save_checkpoint
    from mra_export.model import TASKS, MraConfig
    from mra_export.presets import byte_tokenizer

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(TASKS[task](MraConfig(**{**SMALL, **config})), folder)
    byte_tokenizer(256).save_pretrained(folder)
    return folder


def bundle(kind: str, shared: Path, own: Path) -> Path:
    """The bundle of this kind. shared: a folder for all workers. own: a folder for this one."""
    from mra_export.export import export_bundle

    target = shared / f"bundle-{kind}"
    if not (target / "manifest.json").exists():
        options = dict(KINDS[kind])
        source = checkpoint(own / f"checkpoint-{kind}", options.get("task", "fill-mask"), **options.pop("config", {}))
        try:
            export_bundle(source, target, **options)
        except BundleError:
            if not (target / "manifest.json").exists():  # else another worker was faster
                raise
    return target


def put_empty_op_library(target: Path, scratch: Path) -> None:
    """Build at `target` a library that ONNX Runtime loads and that brings no operator. Skips without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    source = scratch / "empty.c"
    source.write_text("void* RegisterCustomOps(void* options, void* api) { (void)options; (void)api; return 0; }")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(target), str(source)], check=True)
