"""What int8's scales are made from: pieces of the user's own text, as the model will meet them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mra_export import corpus
from mra_export.bundle import Arrays
from mra_export.errors import ContractError
from mra_export.onnx_model import Signature
from mra_export.text import Tokenizer, has_tokenizer

LONGEST = 512
"""Tokens of a piece at most: calibration runs the operator's function body, which is N x N."""
SHARES = (1, 4, 16)
"""Pieces as long as the model's limit, a quarter and a sixteenth of it: what attention gives varies more the fewer tokens there are."""
PIECES = 16
"""Of each length."""


def calibration_inputs(path: str | os.PathLike[str], signature: Signature, config: Any, folder: Path) -> list[Arrays]:
    """Up to PIECES batches of one row for each of SHARES, by input name; for a fill-mask model with masks in them.

    folder: where the tokenizer is. Raises ContractError where there is no text or no tokenizer.
    """
    if not has_tokenizer(folder):
        raise ContractError(
            f"the checkpoint has no tokenizer to read calibration text {path} with: put its tokenizer.json there, or leave "
            "calibration out, which makes the scales dynamic"
        )
    tokenizer = Tokenizer(folder)
    texts = corpus.read_texts(path)
    axes = signature.inputs["input_ids"]
    fill_mask = tokenizer.mask_id is not None and next(iter(signature.outputs.values()))[-1] == config.vocab_size
    samples: list[Arrays] = []
    for share in SHARES:
        length = max(min(config.max_position_embeddings, LONGEST) // share, 8)
        pieces = corpus.rows(tokenizer, texts, min(length, config.max_position_embeddings), PIECES)
        if pieces.max() >= config.vocab_size:
            raise ContractError(f"the tokenizer gives token {pieces.max()}, vocab_size is {config.vocab_size}: put the model's own there")
        if fill_mask:
            pieces = corpus.mask(tokenizer, pieces, seed=share).ids
        samples += [corpus.feed(piece[None], list(signature.inputs), len(axes)) for piece in pieces]
    return samples
