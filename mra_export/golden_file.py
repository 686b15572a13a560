"""golden.npz: a bundle's golden batches, and PyTorch's float32 answers to them.

inputs/<batch>/<name>     what goes in
outputs/<batch>/<name>    a whole output, or of an output that would fill megabytes:
  rows/<batch>/<name>       (chosen, width)            with tokens/<batch>/<name>   (chosen,)  these tokens, every value
  values/<batch>/<name>     (batch, length, chosen)    with columns/<batch>/<name>  (chosen,)  every token, these values
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

_SAMPLED = ("tokens", "rows", "columns", "values")


@dataclass(frozen=True)
class Sampled:
    """Two parts of an output (batch, length, width): some tokens with every value, and every token with some values.

    tokens: (chosen,) int64, numbered through (batch, length). rows: (chosen, width). columns: (chosen,) int64.
    values: (batch, length, chosen). A wrong token shows in the values, a wrong column of the last layer in the rows.
    """

    tokens: npt.NDArray[np.int64]
    rows: Array
    columns: npt.NDArray[np.int64]
    values: Array

    @classmethod
    def of(cls, output: Array, tokens: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]) -> Sampled:
        """The parts of an output. Raises ValueError where its shape does not have them."""
        if output.ndim != 3 or tokens.max() >= output.shape[0] * output.shape[1] or columns.max() >= output.shape[2]:
            raise ValueError(f"shape {output.shape} has no token {tokens.max()} or no value {columns.max()}")
        return cls(tokens, output.reshape(-1, output.shape[2])[tokens], columns, output[..., columns])


Expected = dict[str, Array | Sampled]


def parts(actual: Array, expected: Array | Sampled) -> Iterator[tuple[str, Array, Array, bool]]:
    """(in words, actual, expected, whether it has an entry for every token) of what is kept of an output.

    Raises ValueError where the actual output does not have these parts.
    """
    if not isinstance(expected, Sampled):
        yield "", actual, expected, True
        return
    found = Sampled.of(actual, expected.tokens, expected.columns)
    yield f", {len(expected.tokens)} tokens", found.rows, expected.rows, False
    yield f", {len(expected.columns)} values a token", found.values, expected.values, True


def named(inputs: list[Arrays], outputs: list[Expected]) -> Arrays:
    """The arrays of the npz file by their names."""
    arrays: Arrays = {}
    for index, (batch, answers) in enumerate(zip(inputs, outputs, strict=True)):
        arrays |= {f"inputs/{index}/{name}": array for name, array in batch.items()}
        for name, answer in answers.items():
            if isinstance(answer, Sampled):
                arrays |= {f"{side}/{index}/{name}": getattr(answer, side) for side in _SAMPLED}
            else:
                arrays[f"outputs/{index}/{name}"] = answer
    return arrays


def batches(archive: Mapping[str, Array]) -> tuple[list[Arrays], list[Expected]]:
    """(inputs, outputs), one dict per batch, from the file's arrays. Raises ValueError or KeyError for what is no golden file."""
    sides: dict[str, dict[int, Arrays]] = {side: {} for side in ("inputs", "outputs", *_SAMPLED)}
    for key in archive:
        side, batch, name = key.split("/")
        sides[side].setdefault(int(batch), {})[name] = archive[key]
    numbers = sorted(sides["inputs"])
    outputs: list[Expected] = []
    for number in numbers:
        answers: Expected = {**sides["outputs"].get(number, {})}
        for name in sides["rows"].get(number, {}):
            answers[name] = _sampled(*(sides[side][number][name] for side in _SAMPLED))
        outputs.append(answers)
    return [sides["inputs"][number] for number in numbers], outputs


def _sampled(tokens: Array, rows: Array, columns: Array, values: Array) -> Sampled:
    for name, chosen, shape, axis in (("tokens", tokens, rows.shape, 0), ("columns", columns, values.shape, -1)):
        if chosen.dtype != np.int64 or chosen.ndim != 1 or not chosen.size or chosen.min() < 0 or shape[axis] != len(chosen):
            raise ValueError(f"{name} are {chosen.dtype} {chosen.shape} for an array of shape {shape}")
    return Sampled(tokens, rows, columns, values)
