"""Text in, answers out: one call of a runtime for each task of `mra-export run`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mra_export.errors import ContractError
from mra_export.runtime import MraRuntime
from mra_export.text import Tokenizer, answer_span, class_scores, fill_mask, read_labels, token_labels


class Predictor:
    """A runtime with its bundle's tokenizer. Raises BundleError where the bundle has none."""

    def __init__(self, runtime: MraRuntime) -> None:
        self.runtime = runtime
        self.task = runtime.bundle.manifest.task
        self.tokenizer = Tokenizer(runtime.bundle.path)
        self.labels = read_labels(runtime.bundle.path)
        self._longest = runtime.bundle.manifest.model.max_position_embeddings

    def texts(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """One answer per text, of what the task gives: fill-mask, classification, token classification or features."""
        if self.task in ("question-answering", "multiple-choice"):
            wants = "--question and --context" if self.task == "question-answering" else "--text once and --choice for each choice"
            raise ContractError(f"this bundle's task is {self.task}: pass {wants}")
        inputs = self.tokenizer.encode(texts, self._longest)
        if self.task == "fill-mask":
            self._check_masks(texts, inputs)
        outputs = self._run(inputs)
        if self.task == "fill-mask":
            return [
                {"text": text, "masks": fill_mask(self.tokenizer, inputs["input_ids"][row], outputs["logits"][row])}
                for row, text in enumerate(texts)
            ]
        if self.task == "text-classification":
            return [{"text": text, "labels": class_scores(outputs["logits"][row], self.labels)} for row, text in enumerate(texts)]
        if self.task == "token-classification":
            return [
                {
                    "text": text,
                    "tokens": token_labels(text, self.tokenizer.offsets(text, self._longest), outputs["logits"][row], self.labels),
                }
                for row, text in enumerate(texts)
            ]
        hidden = outputs["last_hidden_state"]
        return [
            {
                "text": text,
                "features": np.asarray(hidden[row, : int(inputs["attention_mask"][row].sum())], dtype=np.float64).tolist(),
            }
            for row, text in enumerate(texts)
        ]

    def answer(self, question: str, context: str) -> dict[str, Any]:
        """The span of the context that answers the question: answer, start and end characters, score."""
        if self.task != "question-answering":
            raise ContractError(
                f"--question and --context are for question-answering, this bundle's task is {self.task}: pass --text"
            )
        inputs, sources, offsets = self.tokenizer.encode_pair(question, context, self._longest)
        outputs = self._run(inputs)
        span = answer_span(context, sources, offsets, outputs["start_logits"][0], outputs["end_logits"][0])
        return {"question": question, **span}

    def choose(self, text: str, choices: Sequence[str]) -> dict[str, Any]:
        """Label (the choice) and score (probability) of each choice, the likeliest first."""
        if self.task != "multiple-choice":
            raise ContractError(f"--choice is for multiple-choice, this bundle's task is {self.task}: pass --text alone")
        if len(choices) < 2:
            raise ContractError(f"--choice was given {len(choices)} time: pass two choices or more")
        inputs = self.tokenizer.encode([text] * len(choices), self._longest, list(choices))
        outputs = self._run({name: value[None] for name, value in inputs.items()})
        return {"text": text, "choices": class_scores(outputs["logits"][0], dict(enumerate(choices)))}

    def _run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if self.runtime.bundle.manifest.model.type_vocab_size == 1:
            # Tokenizers of pairs say which text a token is from; a model with one token type was not trained on that.
            inputs = {name: value for name, value in inputs.items() if name != "token_type_ids"}
        return self.runtime.run(**inputs)

    def _check_masks(self, texts: Sequence[str], inputs: dict[str, Any]) -> None:
        if self.tokenizer.mask_id is None:
            raise ContractError("this bundle's tokenizer has no mask token: pass token ids with --npz")
        for row, text in enumerate(texts):
            if not (inputs["input_ids"][row] == self.tokenizer.mask_id).any():
                raise ContractError(f"the text {text!r} has no {self.tokenizer.mask_token}: write it where a word is missing")
