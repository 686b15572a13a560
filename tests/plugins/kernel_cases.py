"""Fixed calls of the operator that every build of the kernel must get right, and what the tests compare with."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from oracles import OpCase, dense_attention, make_case

from mra_export import kernel
from mra_export.contract import BLOCK_SIZE, Attributes, attention_scale

DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Half a unit in the last place, relative: what storing a correct result in T may cost."""


def case(
    batch: int, length: int, heads: int, head_size: int, budget: int, masking: str = "none", seed: int = 0, **attributes: Any
) -> OpCase:
    made = Attributes(heads, budget, attention_scale(head_size), **attributes)
    return make_case(made, batch, length, head_size, masking, spread=0.5, seed=seed)


def hostile_cases() -> list[OpCase]:
    """Odd lengths and head sizes, every kind of mask, budgets of one block and of more than all, priors, both modes."""
    return [
        case(1, 1, 1, 8, 1),
        case(2, 33, 2, 20, 2, "right padding"),
        case(2, 31, 1, 9, 10**12),
        case(3, 190, 2, 40, 7, "holes"),
        case(2, 257, 2, 256, 5, "dead blocks", approx_mode="sparse", initial_prior_first_n_blocks=2),
        case(1, 512, 2, 64, 64, initial_prior_first_n_blocks=1, initial_prior_diagonal_n_blocks=3),
        case(2, 300, 1, 37, 20, "right padding", padding_invariant=True, initial_prior_diagonal_n_blocks=1),
        case(2, 96, 3, 16, 4, "one row all masked"),
        case(1, 1100, 1, 32, 90, "holes"),
        case(1, 640, 5, 8, 1, initial_prior_first_n_blocks=100),
    ]


def cast(made: OpCase, dtype: str) -> OpCase:
    """The same call with query, key and value rounded to dtype."""
    return OpCase(made.attributes, *(x.astype(DTYPES[dtype]) for x in (made.query, made.key, made.value)), made.mask)


def tolerance(made: OpCase, dtype: str, expected: np.ndarray) -> np.ndarray:
    """What float32 arithmetic and storing in dtype may cost, elementwise.

    A logit is a sum of D rounded products: its error is a few roundings of its absolute terms, and it moves a weight, relatively,
    by as much.
    """
    real = made.mask.astype(bool)[:, :, None]
    query, key, value = (np.where(real, x.astype(np.float64), 0) for x in (made.query, made.key, made.value))
    heads = made.attributes.num_heads
    size = query.shape[2] // heads
    norm = [np.linalg.norm(x.reshape(*x.shape[:2], heads, size), axis=-1).max() for x in (query, key)]
    logit = made.attributes.scale * norm[0] * norm[1]
    return np.abs(expected) * ROUNDING[dtype] + (2e-6 + 8 * 2.0**-24 * logit) * max(np.abs(value).max(), 1)


def assert_close(made: OpCase, dtype: str, actual: np.ndarray, expected: np.ndarray) -> None:
    actual = actual.astype(np.float64)
    assert np.isfinite(actual).all(), f"{made}: not finite"
    excess = np.abs(actual - expected) - tolerance(made, dtype, expected)
    assert excess.max() <= 0, f"{made} {dtype}: error is {excess.max():.3g} above the tolerance"


def selection_by_contract(made: OpCase) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """chosen, excluded (B, H, nb, nb) bool and score float32, step by step as docs/kernels.md fixes the arithmetic."""
    batch, length, hidden = made.query.shape
    attributes = made.attributes
    heads = attributes.num_heads
    nb = -(-length // BLOCK_SIZE)
    real = np.zeros((batch, nb * BLOCK_SIZE), bool)
    real[:, :length] = made.mask != 0
    count = real.reshape(batch, nb, BLOCK_SIZE).sum(2)

    def means(x: np.ndarray) -> np.ndarray:
        padded = np.zeros((batch, nb * BLOCK_SIZE, hidden), np.float32)
        padded[:, :length] = x.astype(np.float32)
        padded[~real] = 0
        blocks = padded.reshape(batch, nb, BLOCK_SIZE, heads, hidden // heads)
        total = np.zeros((batch, nb, heads, hidden // heads), np.float32)
        for token in range(BLOCK_SIZE):
            total += blocks[:, :, token]
        divisor = count.astype(np.float32) + np.float32(1e-6)
        return (total / divisor[:, :, None, None]).transpose(0, 2, 1, 3)

    query_mean, key_mean = means(made.query), means(made.key)
    logit = np.zeros((batch, heads, nb, nb), np.float32)
    for d in range(hidden // heads):
        # Extended precision holds the product exactly, so the sum rounds (as good as) once.
        product = query_mean[..., :, None, d].astype(np.longdouble) * key_mean[..., None, :, d].astype(np.longdouble)
        logit = (product + logit.astype(np.longdouble)).astype(np.float32)
    logit = logit * np.float32(attributes.scale)

    live = (count > 0)[:, None, :, None] & (count > 0)[:, None, None, :]
    counted = live if attributes.padding_invariant else np.ones_like(live)
    row_max = np.where(counted, logit, -np.inf).max(3, keepdims=True)
    row_max = np.where(counted.any(3, keepdims=True), row_max, 0).astype(np.float32)
    score = logit - row_max
    bits = (score + np.float32(0)).view(np.uint32)
    key = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)).astype(np.int64)

    row, column = np.indices((nb, nb))
    first, diagonal = attributes.initial_prior_first_n_blocks, attributes.initial_prior_diagonal_n_blocks
    prior = (row < first).astype(int) + (column < first)
    if diagonal:
        prior += abs(row - column) <= diagonal // 2
    rank = (prior - 2 * ~live) * 2**32 + key  # (class, key) as one integer
    chosen = np.zeros((batch, heads, nb, nb), bool)
    excluded = np.zeros_like(chosen)
    for b in range(batch):
        for h in range(heads):
            flat = rank[b, h].ravel()
            order = np.argsort(-flat, kind="stable")[: attributes.num_blocks]
            chosen[b, h].ravel()[order] = True
            excluded[b, h] = rank[b, h] >= flat[order[-1]]
    return chosen, excluded, score


def check_against_formula(made: OpCase, dtype: str, num_threads: int = 2) -> None:
    """Selection and scores bit for bit as the contract says; arithmetic as the formula says, with the selection forced equal."""
    made = cast(made, dtype)
    chosen, excluded, score = kernel.selection(made.query, made.key, made.mask, made.attributes, num_threads=num_threads)
    expected_chosen, expected_excluded, expected_score = selection_by_contract(made)
    np.testing.assert_array_equal(score, expected_score)
    np.testing.assert_array_equal(chosen, expected_chosen)
    np.testing.assert_array_equal(excluded, expected_excluded)

    wide = [x.astype(np.float64) for x in made.arrays[:3]]
    expected = dense_attention(*wide, made.mask, made.attributes, chosen=chosen, excluded=excluded)
    assert_close(made, dtype, kernel.attention(*made.arrays, made.attributes, num_threads=num_threads), expected.context)
