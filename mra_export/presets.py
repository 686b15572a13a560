"""Checkpoints of known shape with random weights: for tests, demos and timing, where a trained one is not at hand."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mra_export.checkpoint import save_checkpoint
from mra_export.errors import BundleError, ContractError
from mra_export.model import MraConfig, MraForMaskedLM

_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")

PRESETS: dict[str, dict[str, Any]] = {
    # The published uw-madison/mra-base-512-4 and mra-base-4096-8-d3; MraConfig's defaults are the former.
    "base-512-4": {},
    "base-4096-8-d3": {
        "max_position_embeddings": 4096,
        "block_per_row": 8,
        "initial_prior_first_n_blocks": 3,
        "initial_prior_diagonal_n_blocks": 1,
    },
    # Small enough for tests, long enough that most blocks are not exact: 16 of 64.
    "tiny": {
        "vocab_size": len(_SPECIAL) + len(_BYTES),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "max_position_embeddings": 256,
        "block_per_row": 2,
    },
}


def init_checkpoint(preset: str, out: str | os.PathLike[str], seed: int = 0, num_hidden_layers: int | None = None) -> Path:
    """Write a masked-language-model checkpoint with random weights to the new folder `out`; returns its path.

    preset: one of PRESETS. seed: 0 or more; the same seed gives the same weights. num_hidden_layers: instead of the preset's.
    The tokenizer is byte-level, one token per byte of UTF-8 and five special ones: any text runs, with few of the vocabulary's ids.
    Raises ContractError for an unknown preset or a bad number, BundleError where `out` is taken or cannot be written.
    """
    if preset not in PRESETS:
        raise ContractError(f"preset is {preset!r}: use one of {', '.join(PRESETS)}")
    if not 0 <= seed < 2**63:
        raise ContractError(f"seed is {seed}: use 0 to 2^63 - 1")
    layers = {} if num_hidden_layers is None else {"num_hidden_layers": num_hidden_layers}
    config = MraConfig(**{**PRESETS[preset], **layers})
    target = Path(out).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BundleError(f"{out} already exists: choose a folder that does not")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
        folder.mkdir()
    except OSError as error:
        raise BundleError(f"{target.parent} cannot be written to ({error.strerror}): choose another folder") from error
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = MraForMaskedLM(config)
        save_checkpoint(model, folder)
        byte_tokenizer(config.max_position_embeddings).save_pretrained(folder)
        (folder / "README.md").write_text(_readme(preset, seed, config), encoding="utf-8")
        folder.replace(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Path(out)


def byte_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """One token per byte: ids 0 to 4 are <s>, <pad>, </s>, <unk>, <mask>; 5 to 260 the bytes. Text becomes <s> ... </s>."""
    vocabulary = {token: index for index, token in enumerate((*_SPECIAL, *_BYTES))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(token, special=True, lstrip=token == "<mask>") for token in _SPECIAL])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
    )


def _readme(preset: str, seed: int, config: MraConfig) -> str:
    return f"""# MRA {preset}, random weights

Made by `mra-export init {preset} --seed {seed}`: {config.num_hidden_layers} layers, {config.hidden_size} wide,
{config.num_attention_heads} heads, {config.max_position_embeddings} positions. The weights are random, so the answers mean nothing.

The tokenizer is byte-level: one token per byte of UTF-8 (ids 5 to 260) and <s>, <pad>, </s>, <unk>, <mask> (0 to 4). The model's
vocabulary has {config.vocab_size} entries; the tokenizer of a published checkpoint is not part of this package.
"""
