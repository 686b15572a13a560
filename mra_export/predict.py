"""Text in, answers out, for each task: what `mra-export run --text` and the text routes of `mra-export serve` do.

A question is put in two steps, so that whoever runs the model may batch: `Predictor.text`, `question` or `choices` gives a `Prompt`
with the model's inputs; its `answer` makes the answer of the model's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mra_export.errors import ContractError
from mra_export.inputs import Integers, stacked
from mra_export.runtime import MraRuntime
from mra_export.text import Tokenizer, answer_span, class_scores, fill_mask, read_labels, token_labels

Outputs = Mapping[str, Any]
POOLINGS = ("none", "mean", "first")


@dataclass(frozen=True)
class Prompt:
    """inputs: one row, (1, length) or (1, choices, length) int64. answer: makes it of that row's outputs, (1, ...), or, where
    tokens, (chosen,) int64, names those whose outputs it takes, of their outputs, (chosen, ...).
    """

    inputs: dict[str, Integers]
    answer: Callable[[Outputs], dict[str, Any]]
    tokens: Integers | None = None


class Predictor:
    """A runtime with its bundle's tokenizer. Raises BundleError where the bundle has none."""

    def __init__(self, runtime: MraRuntime) -> None:
        self.runtime = runtime
        self.task = runtime.bundle.manifest.task
        self.tokenizer = Tokenizer(runtime.bundle.path)
        self.labels = read_labels(runtime.bundle.path)
        self._longest = runtime.bundle.manifest.model.max_position_embeddings

    def texts(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """One answer per text, in one call of the model: fill-mask, classification, token classification or features."""
        if self.task in ("question-answering", "multiple-choice"):
            wants = "--question and --context" if self.task == "question-answering" else "--text once and --choice for each choice"
            raise ContractError(f"this bundle's task is {self.task}: pass {wants}")
        prompts = [self.text(text) for text in texts]
        outputs = self.runtime.run(**stacked([prompt.inputs for prompt in prompts]))
        answers = []
        for row, prompt in enumerate(prompts):
            part: Any = slice(row, row + 1) if prompt.tokens is None else (row, prompt.tokens)
            answers.append(prompt.answer({name: value[part] for name, value in outputs.items()}))
        return answers

    def answer(self, question: str, context: str) -> dict[str, Any]:
        """The span of the context that answers the question: answer, start and end characters, score."""
        if self.task != "question-answering":
            raise ContractError(
                f"--question and --context are for question-answering, this bundle's task is {self.task}: pass --text"
            )
        return self._run(self.question(question, context))

    def choose(self, text: str, choices: Sequence[str]) -> dict[str, Any]:
        """Label (the choice) and score (probability) of each choice, the likeliest first."""
        if self.task != "multiple-choice":
            raise ContractError(f"--choice is for multiple-choice, this bundle's task is {self.task}: pass --text alone")
        return self._run(self.choices(text, choices))

    def text(self, text: str, *, top: int = 5, pooling: str = "none") -> Prompt:
        """For the tasks that take one text. top: of fill-mask, tokens for each mask. pooling: of features, "none" for those of each
        token, or one vector: "first", the first token's, or "mean", over all.
        """
        inputs = self._inputs(self.tokenizer.encode([text], self._longest))
        ids = inputs["input_ids"][0]
        if self.task == "fill-mask":
            self._check_mask(text, ids)
            masks = np.flatnonzero(ids == self.tokenizer.mask_id)
            return Prompt(inputs, lambda outputs: {"text": text, "masks": fill_mask(self.tokenizer, outputs["logits"], top)}, masks)
        if self.task == "text-classification":
            return Prompt(inputs, lambda outputs: {"text": text, "labels": class_scores(outputs["logits"][0], self.labels)})
        if self.task == "token-classification":
            offsets = self.tokenizer.offsets(text, self._longest)
            return Prompt(
                inputs, lambda outputs: {"text": text, "tokens": token_labels(text, offsets, outputs["logits"][0], self.labels)}
            )
        if self.task == "feature-extraction":
            return Prompt(
                inputs, lambda outputs: {"text": text, "features": _pooled(outputs["last_hidden_state"][0, : len(ids)], pooling)}
            )
        raise ContractError(f"this bundle's task is {self.task}, which does not take one text")

    def question(self, question: str, context: str) -> Prompt:
        """For question-answering."""
        inputs, sources, offsets = self.tokenizer.encode_pair(question, context, self._longest)
        return Prompt(
            self._inputs(inputs),
            lambda outputs: {
                "question": question,
                **answer_span(context, sources, offsets, outputs["start_logits"][0], outputs["end_logits"][0]),
            },
        )

    def choices(self, text: str, choices: Sequence[str]) -> Prompt:
        """For multiple-choice."""
        if len(choices) < 2:
            raise ContractError(f"there is {len(choices)} choice: pass two choices or more")
        inputs = self.tokenizer.encode([text] * len(choices), self._longest, list(choices))
        labels = dict(enumerate(choices))
        return Prompt(
            self._inputs({name: value[None] for name, value in inputs.items()}),
            lambda outputs: {"text": text, "choices": class_scores(outputs["logits"][0], labels)},
        )

    def _run(self, prompt: Prompt) -> dict[str, Any]:
        return prompt.answer(self.runtime.run(**prompt.inputs))

    def _inputs(self, inputs: dict[str, Integers]) -> dict[str, Integers]:
        if self.runtime.bundle.manifest.model.type_vocab_size == 1:
            # Tokenizers of pairs say which text a token is from; a model with one token type was not trained on that.
            return {name: value for name, value in inputs.items() if name != "token_type_ids"}
        return inputs

    def _check_mask(self, text: str, ids: Integers) -> None:
        if self.tokenizer.mask_id is None:
            raise ContractError("this bundle's tokenizer has no mask token: pass token ids")
        if not (ids == self.tokenizer.mask_id).any():
            raise ContractError(f"the text {text!r} has no {self.tokenizer.mask_token}: write it where a word is missing")


def _pooled(hidden: Any, pooling: str) -> list[Any]:
    """hidden: (length, width) -> a list for each token, or of one vector."""
    values = np.asarray(hidden, dtype=np.float64)
    if pooling == "none":
        return list(values.tolist())
    return list((values[0] if pooling == "first" else values.mean(axis=0)).tolist())
