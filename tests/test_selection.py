"""The numpy selection and dense formula that `verify` judges by, against the tests' own formula."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracles
import pytest

from mra_export.contract import Attributes
from mra_export.selection import CLEAR_GAP, Choice, block_scores, clear_budget, dense_attention, overlap, select


def case(length=200, batch=2, heads=2, size=16, seed=0, **attributes):
    random = np.random.default_rng(seed)
    query, key, value = random.normal(size=(3, batch, length, heads * size)).astype(np.float32)
    mask = np.ones((batch, length), dtype=np.int64)
    mask[-1, length * 2 // 3 :] = 0
    return query, key, value, mask, Attributes(num_heads=heads, num_blocks=11, scale=0.5, **attributes)


@pytest.mark.parametrize("length", [1, 31, 33, 200])
@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"approx_mode": "sparse"},
        {"padding_invariant": True},
        {"initial_prior_first_n_blocks": 1, "initial_prior_diagonal_n_blocks": 2},
        {"initial_prior_diagonal_n_blocks": 1},
    ],
)
def test_it_is_the_formula_of_the_operator(length, attributes) -> None:
    query, key, value, mask, attributes = case(length, **attributes)
    wanted = oracles.dense_attention(query, key, value, mask, attributes)
    # A row's own maximum scores exactly 0, so exact ties are common and mean the same everywhere; near-ties would say nothing.
    assert ((wanted.margin == 0) | (wanted.margin > 1e-5)).all(), "take another seed"
    found = select(block_scores(query, key, mask, attributes), attributes.num_blocks)
    live = ~block_scores(query, key, mask, attributes).dead
    assert np.array_equal(found.chosen & live, wanted.chosen & live)
    assert np.array_equal(found.excluded & live, wanted.excluded & live)
    np.testing.assert_allclose(dense_attention(query, key, value, mask, attributes), wanted.context, atol=1e-12)


def test_equal_scores_go_to_the_lower_index_and_are_all_excluded() -> None:
    tokens = np.ones((1, 96, 32), dtype=np.float32)
    scores = block_scores(tokens, tokens, np.ones((1, 96)), Attributes(num_heads=1, num_blocks=4, scale=1.0))
    found = select(scores, 4)
    assert found.chosen.reshape(-1).tolist() == [True] * 4 + [False] * 5
    assert found.excluded.all()


def test_overlap_says_how_far_a_difference_was_from_a_tie() -> None:
    query, key, _, mask, attributes = case()
    scores = block_scores(query, key, mask, attributes)
    own = select(scores, attributes.num_blocks)
    same = overlap(scores, attributes.num_blocks, own)
    assert (same.share, same.differing, same.largest_margin) == (1.0, 0, 0.0)

    flat = np.where(scores.level[0, 0] == scores.level.max(), scores.score[0, 0], -np.inf).reshape(-1)
    order = np.argsort(-flat)
    last, following, far = order[attributes.num_blocks - 1], order[attributes.num_blocks], order[-1]
    chosen = own.chosen.copy()
    chosen[0, 0].reshape(-1)[[last, following]] = [False, True]
    near = overlap(scores, attributes.num_blocks, Choice(chosen, chosen))
    assert near.differing == 2
    assert near.largest_margin == pytest.approx(flat[last] - flat[following])
    assert near.share < 1.0

    chosen = own.chosen.copy()
    chosen[0, 0].reshape(-1)[[last, far]] = [False, True]
    assert overlap(scores, attributes.num_blocks, Choice(chosen, chosen)).largest_margin > 10 * near.largest_margin


def test_a_difference_on_another_level_is_no_near_tie() -> None:
    query, key, _, mask, attributes = case(initial_prior_diagonal_n_blocks=1)
    scores = block_scores(query, key, mask, attributes)
    chosen = select(scores, attributes.num_blocks).chosen.copy()
    chosen[0, 0, 0, 0] = False  # preferred by the prior: no runtime may leave it out
    assert overlap(scores, attributes.num_blocks, Choice(chosen, chosen)).largest_margin == np.inf


def test_pairs_that_weigh_nothing_do_not_count() -> None:
    query, key, _, mask, attributes = case()
    scores = block_scores(query, key, mask, attributes)
    assert scores.dead.any()
    own = select(scores, attributes.num_blocks)
    assert overlap(scores, attributes.num_blocks, Choice(own.chosen ^ scores.dead, own.excluded ^ scores.dead)).differing == 0


def test_a_clear_budget_leaves_no_doubt() -> None:
    query, key, value, mask, attributes = case()
    scores = block_scores(query, key, mask, attributes)
    budget, gap = clear_budget(scores, attributes.num_blocks)
    assert attributes.num_blocks // 2 <= budget <= 2 * attributes.num_blocks
    assert gap >= CLEAR_GAP
    shaken = scores.score + np.random.default_rng(1).uniform(-gap / 3, gap / 3, scores.score.shape).astype(np.float32)
    assert np.array_equal(select(scores, budget).chosen, select(replace(scores, score=shaken), budget).chosen)
    del value


def test_without_a_clear_budget_all_blocks_are_exact() -> None:
    tokens = np.ones((1, 96, 32), dtype=np.float32)
    scores = block_scores(tokens, tokens, np.ones((1, 96)), Attributes(num_heads=1, num_blocks=4, scale=1.0))
    assert clear_budget(scores, 4) == (9, np.inf)
