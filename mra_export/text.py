"""From text to tokens and from logits to words: what `mra-export run --text` does for each task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mra_export.errors import BundleError, ContractError

Inputs = dict[str, npt.NDArray[np.int64]]
Logits = npt.NDArray[Any]
_TOKENIZER = "tokenizer.json"
_SLOW_FILES = ("vocab.json", "vocab.txt", "sentencepiece.bpe.model", "spiece.model")
_MASKS = ("<mask>", "[MASK]")
"""Tried where no configuration file names the mask token."""
_MAX_ANSWER_TOKENS = 30


def has_tokenizer(folder: Path) -> bool:
    """True where the folder holds tokenizer files that `Tokenizer` reads."""
    return any((folder / name).is_file() for name in (_TOKENIZER, *_SLOW_FILES))


class Tokenizer:
    """The bundle's tokenizer: tokenizer.json through the tokenizers library, else what transformers makes of the vocabulary files.

    Raises BundleError where there is none.
    """

    def __init__(self, folder: Path) -> None:
        if not has_tokenizer(folder):
            raise BundleError(
                f"{folder} has no tokenizer: export a checkpoint folder with its tokenizer.json, or pass token ids with --npz"
            )
        settings = {**_json(folder / "special_tokens_map.json"), **_json(folder / "tokenizer_config.json")}
        mask = _token_text(settings.get("mask_token"))
        try:
            if (folder / _TOKENIZER).is_file():
                import tokenizers

                self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / _TOKENIZER))
            else:
                from transformers import AutoTokenizer

                made = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
                self._tokenizer, mask = made.backend_tokenizer, made.mask_token
        except Exception as error:  # tokenizers raises plain Exception
            raise BundleError(f"the tokenizer in {folder} cannot be read: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._pad = _json(folder / "config.json").get("pad_token_id") or 0
        known = (token for token in (mask, *_MASKS) if token and self._tokenizer.token_to_id(token) is not None)
        self.mask_token: str | None = next(known, None)
        self.mask_id: int | None = self._tokenizer.token_to_id(self.mask_token) if self.mask_token else None

    def encode(self, texts: Sequence[str], max_length: int, pairs: Sequence[str] | None = None) -> Inputs:
        """Texts, or pairs of texts -> input_ids, attention_mask, token_type_ids, each (texts, longest) int64, padded at the end.

        Raises ContractError for a text of more than max_length tokens.
        """
        encodings = self._encodings(texts, max_length, pairs)
        length = max(len(encoding.ids) for encoding in encodings)
        inputs = {
            "input_ids": np.full((len(encodings), length), self._pad, dtype=np.int64),
            "attention_mask": np.zeros((len(encodings), length), dtype=np.int64),
            "token_type_ids": np.zeros((len(encodings), length), dtype=np.int64),
        }
        for row, encoding in enumerate(encodings):
            size = len(encoding.ids)
            inputs["input_ids"][row, :size] = encoding.ids
            inputs["attention_mask"][row, :size] = 1
            inputs["token_type_ids"][row, :size] = encoding.type_ids
        return inputs

    def encode_pair(self, first: str, second: str, max_length: int) -> tuple[Inputs, list[int | None], list[tuple[int, int]]]:
        """Also says, for each token, which of the two texts it is from (None: neither) and its (start, end) characters there."""
        encoding = self._encodings([first], max_length, [second])[0]
        return self.encode([first], max_length, [second]), list(encoding.sequence_ids), list(encoding.offsets)

    def offsets(self, text: str, max_length: int) -> list[tuple[int, int]]:
        """(start, end) characters of each token; equal for tokens that are not in the text."""
        return list(self._encodings([text], max_length, None)[0].offsets)

    def tokens(self, text: str) -> list[int]:
        """The text's token ids, however many, without special tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    @property
    def frame(self) -> tuple[list[int], list[int]]:
        """The special tokens that go before and after a text."""
        bare, whole = self.tokens("a"), list(self._tokenizer.encode("a").ids)
        start = next(index for index in range(len(whole)) if whole[index : index + len(bare)] == bare)
        return whole[:start], whole[start + len(bare) :]

    @property
    def special_ids(self) -> list[int]:
        """Ids of tokens that stand for no text: start, end, padding, mask."""
        return [number for number, token in self._tokenizer.get_added_tokens_decoder().items() if token.special]

    def decode(self, token: int) -> str:
        return str(self._tokenizer.decode([token], skip_special_tokens=False))

    def cut(self, text: str, tokens: int) -> str:
        """The longest start of the text that encodes to at most this many tokens."""
        encoding = self._tokenizer.encode(text)
        if len(encoding.ids) <= tokens:
            return text
        added = len(encoding.ids) - len(self._tokenizer.encode(text, add_special_tokens=False).ids)
        kept = self._tokenizer.encode(text, add_special_tokens=False).offsets[: tokens - added]
        return text[: kept[-1][1]]

    def _encodings(self, texts: Sequence[str], max_length: int, pairs: Sequence[str] | None) -> list[Any]:
        batch = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        encodings = self._tokenizer.encode_batch(batch)
        for text, encoding in zip(texts, encodings, strict=True):
            size = len(encoding.ids)
            if not size:
                raise ContractError(f"the text {_short(text)} has no tokens: pass some text")
            if size > max_length:
                raise ContractError(f"the text {_short(text)} has {size} tokens, the model takes {max_length}: shorten it")
        return list(encodings)


def fill_mask(tokenizer: Tokenizer, logits: Logits, top: int = 5) -> list[list[dict[str, Any]]]:
    """logits: (masks, vocabulary). For each mask token of one text, the best: token, id, score (probability)."""
    answers = []
    for row in logits:
        scores = _softmax(row)
        least = np.partition(scores, -min(top, scores.size))[-min(top, scores.size)]
        good = np.flatnonzero(scores >= least)  # a few, where sorting the whole vocabulary would take longer than the model
        best = good[np.argsort(-scores[good], kind="stable")][:top]
        answers.append([{"token": tokenizer.decode(int(i)), "id": int(i), "score": float(scores[i])} for i in best])
    return answers


def class_scores(logits: Logits, labels: dict[int, str]) -> list[dict[str, Any]]:
    """logits: (classes,) -> label and score (probability) of each class, best first. One class is a regression: its value."""
    scores = logits.astype(np.float64) if logits.shape[0] == 1 else _softmax(logits)
    return [{"label": labels.get(int(i), f"LABEL_{i}"), "score": float(scores[i])} for i in np.argsort(-scores, kind="stable")]


def token_labels(text: str, offsets: Sequence[tuple[int, int]], logits: Logits, labels: dict[int, str]) -> list[dict[str, Any]]:
    """logits: (length, classes) -> the best label and its probability for each token of the text."""
    answers = []
    for (start, end), row in zip(offsets, logits, strict=False):
        if end > start:
            scores = _softmax(row)
            best = int(scores.argmax())
            answers.append(
                {
                    "token": text[start:end],
                    "start": start,
                    "end": end,
                    "label": labels.get(best, f"LABEL_{best}"),
                    "score": float(scores[best]),
                }
            )
    return answers


def answer_span(
    context: str, sources: Sequence[int | None], offsets: Sequence[tuple[int, int]], start_logits: Logits, end_logits: Logits
) -> dict[str, Any]:
    """start_logits, end_logits: (length,) -> the likeliest span of up to 30 tokens in the context: answer, start, end, score."""
    inside = np.array([source == 1 for source in sources])
    if not inside.any():
        raise ContractError("the context is empty: pass a text to find the answer in")
    start, end = (_softmax(np.where(inside, logits[: len(inside)], -np.inf)) for logits in (start_logits, end_logits))
    score = np.triu(np.outer(start, end)) - np.triu(np.outer(start, end), _MAX_ANSWER_TOKENS)
    first, last = divmod(int(score.argmax()), score.shape[1])
    begin, finish = offsets[first][0], offsets[last][1]
    return {"answer": context[begin:finish], "start": begin, "end": finish, "score": float(score[first, last])}


def read_labels(folder: Path) -> dict[int, str]:
    """id2label of config.json."""
    return {int(key): str(value) for key, value in (_json(folder / "config.json").get("id2label") or {}).items()}


def _softmax(logits: Logits) -> npt.NDArray[np.float64]:
    weights = np.exp(np.asarray(logits, dtype=np.float64) - float(np.max(logits)))
    return np.asarray(weights / weights.sum())


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{path} is not JSON ({error}): export the bundle again") from error
    return content if isinstance(content, dict) else {}


def _token_text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
