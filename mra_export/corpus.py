"""A user's own text as rows of token ids: to calibrate int8 with, and to measure accuracy on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mra_export.errors import ContractError
from mra_export.text import Tokenizer

Ids = npt.NDArray[np.int64]
MASK_RATE = 0.15


@dataclass(frozen=True)
class Masked:
    """Rows of text, some tokens hidden. ids: (R, N) int64 as the model sees them; tokens: what they were; hidden: (R, N) bool."""

    ids: Ids
    tokens: Ids
    hidden: npt.NDArray[np.bool_]


def read_texts(path: str | os.PathLike[str]) -> list[str]:
    """The text of a file, or of every file under a folder that is UTF-8 and not hidden, in the order of their names.

    Raises ContractError where there is no text.
    """
    root = Path(path)
    if not root.exists():
        raise ContractError(f"{path} does not exist: pass a text file, or a folder of them")
    texts = []
    for file in _files(root):
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError) as error:
            if file == root:
                raise ContractError(
                    f"{path} cannot be read as UTF-8 text ({error}): pass a text file, or a folder of them"
                ) from error
            continue
        if text.strip() and "\0" not in text:
            texts.append(text)
    if not texts:
        raise ContractError(f"{path} holds no text: pass a UTF-8 text file, or a folder of them")
    return texts


def check_apart(calibration: str | os.PathLike[str], held_out: str | os.PathLike[str]) -> None:
    """Refuse to measure on the text that the scales were made from. Raises ContractError."""
    one, other = Path(calibration).resolve(), Path(held_out).resolve()
    if one == other or one in other.parents or other in one.parents:
        raise ContractError(
            f"calibration text {calibration} and held-out text {held_out} overlap: an accuracy measured on text that the scales "
            "were made from says nothing, pass text of its own for each"
        )


def rows(tokenizer: Tokenizer, texts: Iterable[str], length: int, limit: int) -> Ids:
    """(R, length): the texts one after the other, cut into full rows, each as the tokenizer would frame a text of its own.

    R: up to limit rows, spread evenly over the text. A text shorter than one row is one row of its own length.
    """
    before, after = tokenizer.frame
    stream = np.concatenate([np.array([*tokenizer.tokens(text), *after], dtype=np.int64) for text in texts])
    inner = min(length - len(before) - len(after), len(stream))
    if inner < 1:
        raise ContractError(f"a row of {length} tokens has no room for text beside {len(before) + len(after)} special tokens")
    count = len(stream) // inner
    cut = stream[: count * inner].reshape(count, inner)
    chosen = cut[np.unique(np.linspace(0, count - 1, min(limit, count)).round().astype(int))]
    frame = [np.tile(np.array(part, np.int64), (len(chosen), 1)) for part in (before, after)]
    return np.concatenate([frame[0], chosen, frame[1]], axis=1)


def mask(tokenizer: Tokenizer, tokens: Ids, seed: int) -> Masked:
    """Hide MASK_RATE of the tokens that are not special ones behind the mask token; the same for the same seed.

    Raises ContractError where the tokenizer has no mask token.
    """
    if tokenizer.mask_id is None:
        raise ContractError("this tokenizer has no mask token: masked-token accuracy cannot be measured with it")
    random = np.random.default_rng(seed)
    hidden = (random.random(tokens.shape) < MASK_RATE) & ~np.isin(tokens, tokenizer.special_ids)
    return Masked(np.where(hidden, tokenizer.mask_id, tokens), tokens, hidden)


def feed(ids: Ids, inputs: Sequence[str], rank: int) -> dict[str, Ids]:
    """A graph's inputs by name for rows without padding. rank: 3 for multiple choice, each row being a single choice."""
    shaped = ids[:, None] if rank == 3 else ids
    arrays = {"input_ids": shaped, "attention_mask": np.ones_like(shaped), "token_type_ids": np.zeros_like(shaped)}
    return {name: arrays[name] for name in inputs}


def _files(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    found = (path for path in root.rglob("*") if path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts))
