"""A bundle's golden batches: a few ragged inputs, and PyTorch's float32 answers to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mra_export.errors import CheckpointError
from mra_export.golden_file import Arrays, Expected, Sampled
from mra_export.onnx_model import Signature
from mra_export.text import Tokenizer, has_tokenizer

CHOICES = 3
LONGEST = 512
_WHOLE_BYTES = 1_500_000
"""Outputs are stored whole up to this size, in all batches together."""
_COLUMNS = 64
"""Values that are kept of every token of a larger output."""

_TEXT = """\
A river carries sand and stones from the hills to the sea. Where the water slows down, the heavy stones settle first, then the
gravel, then the sand; the finest clay travels on until the current has lost all its strength. Whoever digs beside an old river bed
finds these layers again and can read from them how fast the water ran, and in which direction, long before anybody wrote it down.

def settle(grains, speed):
    carried = [grain for grain in grains if grain.weight < speed ** 2]  # what the current still holds
    dropped = [grain for grain in grains if grain not in carried]
    return carried, sorted(dropped, key=lambda grain: -grain.weight)

In 1726, 1834 and 1953 the dam broke, and 40% of the fields were under 2.5 metres of mud; nobody counted the sheep.
"""


def golden_inputs(signature: Signature, config: Any, folder: Path) -> list[Arrays]:
    """Batches of lengths 1, 33, 100 and the longest up to 512, rows of different lengths padded at the end; int64.

    Tokens are real text through the folder's tokenizer where it has one, else random ids, always the same.
    Raises CheckpointError where the tokenizer gives ids that the model does not have.
    """
    longest = min(config.max_position_embeddings, LONGEST)
    rows = [[1], [33, 20], [100, 57, 1], [longest, longest * 2 // 3]]
    text = _text_tokens(folder, config.vocab_size)
    random = np.random.default_rng(0)
    batches = []
    for lengths in rows:
        shape = [
            {"batch": len(lengths), "choices": CHOICES, "sequence": max(lengths)}[str(axis)]
            for axis in signature.inputs["input_ids"]
        ]
        ids = np.empty(shape, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        ids[...] = config.pad_token_id or 0
        for position in np.ndindex(*shape[:-1]):
            length = lengths[position[0]]
            # Rows differ: each starts elsewhere in the text, the first at its start.
            start = 29 * sum(position)
            ids[position][:length] = random.integers(0, config.vocab_size, length) if text is None else text[start : start + length]
            mask[position][:length] = 1
        batch = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in signature.inputs:
            batch["token_type_ids"] = (np.arange(shape[-1]) % config.type_vocab_size + np.zeros_like(ids)) * mask
        batches.append(batch)
    return batches


def golden_outputs(model: torch.nn.Module, signature: Signature, inputs: list[Arrays]) -> list[Expected]:
    """What a float32 model in eval mode answers, as float32 arrays; of large outputs the parts that `_sample` keeps."""
    tokens = sum(batch["input_ids"].size for batch in inputs)
    large = 4 * tokens * sum(int(axes[-1]) for axes in signature.outputs.values() if isinstance(axes[-1], int)) > _WHOLE_BYTES
    outputs = []
    with torch.inference_mode():
        for batch in inputs:
            result = model(**{name: torch.from_numpy(array) for name, array in batch.items()}, return_dict=True)
            answers: Expected = {}
            for name, axes in signature.outputs.items():
                array = result[name].numpy()
                whole = not large or array.ndim != 3 or axes[:2] != signature.inputs["input_ids"] or array.shape[-1] <= _COLUMNS
                answers[name] = array if whole else _sample(array, batch["attention_mask"])
            outputs.append(answers)
    return outputs


def _sample(output: npt.NDArray[np.float32], mask: npt.NDArray[np.int64]) -> Sampled:
    """Of each text the first, the middle and the last token whole; of every token values spread over all of them."""
    length = mask.shape[1]
    real = mask.sum(axis=1)
    tokens = np.unique([row * length + place for row, n in enumerate(real) for place in (0, n // 2, n - 1)])
    columns = np.sort(np.random.default_rng(0).choice(output.shape[-1], _COLUMNS, replace=False))
    return Sampled.of(output, tokens.astype(np.int64), columns.astype(np.int64))


def _text_tokens(folder: Path, vocab_size: int) -> npt.NDArray[np.int64] | None:
    """At least 2 * LONGEST tokens of text, or None where the folder has no tokenizer."""
    if not has_tokenizer(folder):
        return None
    tokenizer = Tokenizer(folder)
    once = len(tokenizer.encode([_TEXT], len(_TEXT) * 8)["input_ids"][0])
    text = _TEXT * -(-2 * LONGEST // once)
    ids: npt.NDArray[np.int64] = tokenizer.encode([text], len(text) * 8)["input_ids"][0]
    if ids.max() >= vocab_size:
        raise CheckpointError(
            f"the checkpoint's tokenizer gives token {ids.max()}, vocab_size is {vocab_size}: put the model's own tokenizer there"
        )
    return ids
