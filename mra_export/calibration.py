"""What int8's scales are made from: pieces of the user's own text, as the model will meet them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mra_export import corpus
from mra_export.errors import ContractError
from mra_export.golden_file import Arrays
from mra_export.onnx_model import Signature
from mra_export.text import Tokenizer, has_tokenizer

LONGEST = 512
"""Tokens of a piece at most: calibration runs the operator's function body, which is N x N."""
SHARES = (1, 4, 16)
"""Pieces as long as the model's limit, a quarter and a sixteenth of it."""
SNIPPETS = (1, 2, 4)
"""And these few tokens: attention over one token gives its value itself, larger than any mean of many, and a scale that was made
without it would cut it off."""
PIECES = 16
"""Of each length."""


def calibration_inputs(path: str | os.PathLike[str], signature: Signature, config: Any, folder: Path) -> list[Arrays]:
    """Up to PIECES batches of one row for each of SHARES and SNIPPETS, by input name; for a fill-mask model with masks in them.

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
    longest = min(config.max_position_embeddings, LONGEST)
    pieces = [corpus.rows(tokenizer, texts, max(longest // share, 8), PIECES) for share in SHARES]
    pieces += [pieces[-1][:, 1 : 1 + length] for length in SNIPPETS]
    samples: list[Arrays] = []
    for seed, rows in enumerate(pieces):
        if rows.max() >= config.vocab_size:
            raise ContractError(
                f"the checkpoint's tokenizer gives token {rows.max()}, vocab_size is {config.vocab_size}: put the model's own there"
            )
        ids = corpus.mask(tokenizer, rows, seed).ids if fill_mask else rows
        samples += [corpus.feed(row[None], list(signature.inputs), len(axes)) for row in ids]
    return samples
