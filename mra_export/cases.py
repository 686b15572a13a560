"""The inputs that `verify` puts through every runtime: lengths, batches, ragged masks, seeds, and real text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mra_export.bundle import Bundle

Inputs = dict[str, npt.NDArray[np.int64]]
CHOICES = 2
"""Texts per question in the inputs of a multiple-choice model."""


@dataclass(frozen=True)
class Case:
    """name: says shape, mask and seed. inputs: input_ids, attention_mask and, where the graph takes it, token_type_ids."""

    name: str
    inputs: Inputs

    @property
    def tokens(self) -> tuple[int, int]:
        """(rows, length) as the operator sees them: choices are rows too."""
        shape = self.inputs["input_ids"].shape
        return int(np.prod(shape[:-1])), int(shape[-1])


def sweep(bundle: Bundle, seeds: int, quick: bool) -> list[Case]:
    """Random tokens: lengths 1, 31, 32, 33, 100, two thirds of the maximum and the maximum, batches of 1, 2 and 3, for each seed.

    quick: one batch size for each of four lengths. In a batch, row 0 is full, row 1 padded at its end, row 2 at its start.
    """
    longest = bundle.manifest.model.max_position_embeddings
    shapes: Sequence[tuple[int, int]]
    if quick:
        shapes = [(1, 1), (2, 33), (3, 100), (1, longest)]
    else:
        shapes = [(batch, length) for length in (1, 31, 32, 33, 100, longest * 2 // 3, longest) for batch in (1, 2, 3)]
    shapes = sorted({(batch, min(length, longest)) for batch, length in shapes}, key=lambda shape: (shape[1], shape[0]))
    return [random_case(bundle, batch, length, seed) for seed in range(seeds) for batch, length in shapes]


def random_case(bundle: Bundle, batch: int, length: int, seed: int, ragged: bool = True) -> Case:
    """One batch of random tokens, the same for the same arguments."""
    model = bundle.manifest.model
    random = np.random.default_rng((seed, batch, length))
    choices = (CHOICES,) if len(bundle.manifest.inputs[0].axes) == 3 else ()
    shape = (batch, *choices, length)
    mask = np.ones(shape, dtype=np.int64)
    if ragged and length > 1:
        for row, (at_end, share) in enumerate(((True, 0.0), (True, 0.4), (False, 0.3))):
            padding = int(length * share)
            if row < batch and padding:
                mask[row, ..., -padding if at_end else 0 : None if at_end else padding] = 0
    inputs = {
        "input_ids": random.integers(0, model.vocab_size, shape),
        "attention_mask": mask,
        "token_type_ids": random.integers(0, model.type_vocab_size, shape),
    }
    kind = "full" if mask.all() else "ragged"
    name = f"{'x'.join(str(axis) for axis in shape)} {kind} seed {seed}"
    return Case(name, {tensor.name: inputs[tensor.name] for tensor in bundle.manifest.inputs})


def function_body_bytes(bundle: Bundle, rows: int, length: int) -> int:
    """What the graph's function body takes at once for this many rows (choices are rows too): it forms N x N."""
    # Token logits, tiles, mixed, kept, weights and one spare, in float32.
    return 6 * rows * bundle.manifest.model.num_attention_heads * length * length * 4


def text_cases(bundle: Bundle) -> list[Case]:
    """Two short texts in one batch and one of two thirds of the maximum, where the bundle has a tokenizer."""
    from mra_export.text import Tokenizer, has_tokenizer

    if not has_tokenizer(bundle.path):
        return []
    tokenizer = Tokenizer(bundle.path)
    longest = bundle.manifest.model.max_position_embeddings
    long_text = tokenizer.cut(_TEXT * (1 + longest // 16), longest * 2 // 3)
    cases = []
    for name, texts in (("text, 2 lines", _TEXT.splitlines()[1:3]), ("text, long", [long_text])):
        inputs = tokenizer.encode(texts, longest)
        if len(bundle.manifest.inputs[0].axes) == 3:
            inputs = {key: np.repeat(value[:, None], CHOICES, axis=1) for key, value in inputs.items()}
        shape = "x".join(str(axis) for axis in inputs["input_ids"].shape)
        cases.append(Case(f"{name} {shape}", {tensor.name: inputs[tensor.name] for tensor in bundle.manifest.inputs}))
    return cases


_TEXT = """
def read_lines(path):
    with open(path, encoding="utf-8") as stream:  # the caller decides what to do with a missing file
        return [line.rstrip() for line in stream if not line.startswith("#")]

The module reads a file and gives back its lines, without those that are comments. An empty file gives an empty list.
"""
