"""Masked-token accuracy on held-out text: how often a runtime names the hidden token, beside how often PyTorch in float32 does.

Both see the same rows with the same tokens hidden, so what is judged is a paired difference: the tokens that both name, or neither,
cancel out, and its standard error is that of the few that differ.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from mra_export import corpus
from mra_export.bundle import Bundle
from mra_export.errors import ContractError
from mra_export.golden_file import Arrays
from mra_export.parity import FAIL, PASS, SKIP, Row
from mra_export.text import Tokenizer

CHECK = "accuracy"
ALLOWED_LOSS = 0.5
"""Percentage points that a runtime may lose."""
ROWS = 128
LONGEST = 512
_PER_RUN = 1024
"""Tokens of one call: their logits may be many."""

Run = Callable[[Arrays], Arrays]
Named = npt.NDArray[np.bool_]


class HeldOut:
    """Up to ROWS rows of up to LONGEST tokens of a text, with 15 % of the tokens hidden. Raises ContractError (text, task)."""

    def __init__(self, bundle: Bundle, path: str | os.PathLike[str]) -> None:
        manifest = bundle.manifest
        if manifest.task != "fill-mask":
            raise ContractError(
                f"held-out text measures masked-token accuracy, this bundle's task is {manifest.task}: leave it out, and measure "
                "the task's own score with MraRuntime"
            )
        if manifest.quantization is not None and manifest.quantization.calibration is not None:
            corpus.check_apart(manifest.quantization.calibration.text, path)
        tokenizer = Tokenizer(bundle.path)
        length = min(manifest.model.max_position_embeddings, LONGEST)
        self.text = str(path)
        self._names = [tensor.name for tensor in manifest.inputs]
        self._masked = corpus.mask(tokenizer, corpus.rows(tokenizer, corpus.read_texts(path), length, ROWS), seed=0)
        if not self._masked.hidden.any():
            raise ContractError(f"{path} is too short: no token of it was hidden, pass more text")

    def named(self, run: Run) -> Named:
        """Which hidden tokens a runtime names, in order."""
        masked, named = self._masked, []
        step = max(1, _PER_RUN // masked.ids.shape[1])
        for start in range(0, len(masked.ids), step):
            part = slice(start, start + step)
            hidden = masked.hidden[part]
            logits = np.asarray(run(corpus.feed(masked.ids[part], self._names, 2))["logits"])
            named.append(logits[hidden].argmax(axis=-1) == masked.tokens[part][hidden])
        return np.concatenate(named)


def judge(backend: str, precision: str, text: str, named: Named, expected: Named) -> Row:
    """named, expected: which hidden tokens the runtime and PyTorch named. Too few tokens to tell ALLOWED_LOSS are no comparison."""
    points = 100.0 * (named.astype(np.float64) - expected)
    difference, error = float(points.mean()), float(points.std() / np.sqrt(points.size))
    detail = {
        "tokens": named.size,
        "accuracy": 100.0 * float(named.mean()),
        "reference_accuracy": 100.0 * float(expected.mean()),
        "difference": difference,
        "standard_error": error,
    }
    found = (
        f"{detail['accuracy']:.2f} % of {named.size} masked tokens, PyTorch {detail['reference_accuracy']:.2f} %: "
        f"{difference:+.2f} points, standard error {error:.2f}"
    )
    status = PASS if -difference <= ALLOWED_LOSS else FAIL
    if 2 * error > ALLOWED_LOSS:
        status, found = SKIP, f"{found}; too little text to tell {ALLOWED_LOSS} points, pass more"
    return Row(CHECK, backend, precision, text, "logits", status, found, ALLOWED_LOSS, None, max(0.0, -difference), detail)
