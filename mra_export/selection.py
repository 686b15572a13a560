"""Which blocks the operator computes exactly, recomputed in numpy from the queries and keys a runtime really had.

This is how `verify` compares two runtimes' selections without asking either of them, and how it judges arithmetic with the
selection forced equal. Steps and letters are those of docs/operator.md; B batch, N length, H heads, D head size, nb = ceil(N / 32).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mra_export.contract import BLOCK_SIZE, Attributes

Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Scores:
    """level: (B, H, nb, nb) int, prior count - 2 * dead, compared first. score: (B, H, nb, nb) float32, l_ij - r_i, in logit
    units, compared second. dead: (B, H, nb, nb) bool, pairs that weigh nothing, chosen or not."""

    level: npt.NDArray[np.int64]
    score: Float32
    dead: Bool


@dataclass(frozen=True)
class Choice:
    """chosen, excluded: (B, H, nb, nb) bool, steps 5 and 6 of docs/operator.md."""

    chosen: Bool
    excluded: Bool


@dataclass(frozen=True)
class Overlap:
    """A runtime's choice in one layer beside the one that the reference's scores give.

    share: chosen by both / chosen by the reference. differing: number of live block pairs that only one of them chose or excluded.
    margins: how far, in logit units, each differing pair was from falling the other way; inf where it was not even on the level of
    the last choice.
    """

    share: float
    differing: int
    margins: Float32

    @property
    def largest_margin(self) -> float:
        return float(self.margins.max()) if self.margins.size else 0.0


def block_scores(query: npt.ArrayLike, key: npt.ArrayLike, mask: npt.ArrayLike, attributes: Attributes) -> Scores:
    """Steps 1 to 4. query, key: (B, N, H * D) of any float type; mask: (B, N), nonzero = real token."""
    real = np.asarray(mask) != 0
    batch, length = real.shape
    blocks = -(-length // BLOCK_SIZE)
    count = _blocked(real, blocks).sum(axis=-1)  # (B, nb) real tokens per block
    means = []
    for tensor in (query, key):
        tokens = np.where(real[..., None], np.asarray(tensor).astype(np.float32), np.float32(0))
        heads = tokens.reshape(batch, length, attributes.num_heads, -1).transpose(0, 2, 3, 1)  # (B, H, D, N)
        sums = _blocked(heads, blocks).sum(axis=-1)  # (B, H, D, nb)
        means.append((sums / (count[:, None, None, :] + np.float32(1e-6))).astype(np.float32))
    logit = np.float32(attributes.scale) * np.einsum("bhdi,bhdj->bhij", *means)
    dead = ((count[:, :, None] * count[:, None, :]) == 0)[:, None]  # (B, 1, nb, nb)
    ranked = np.where(dead, -np.inf, logit) if attributes.padding_invariant else logit
    row_max = ranked.max(axis=-1, keepdims=True)
    score = logit - np.where(np.isfinite(row_max), row_max, 0)
    level = np.broadcast_to(_prior_count(blocks, attributes) - 2 * dead.astype(np.int64), score.shape)
    return Scores(level, score.astype(np.float32), np.broadcast_to(dead, score.shape))


def select(scores: Scores, num_blocks: int) -> Choice:
    """Step 5: the num_blocks highest pairs; equal scores go to the lower flat index."""
    return _select(scores, num_blocks)[0]


def overlap(scores: Scores, num_blocks: int, other: Choice) -> Overlap:
    """Compare a runtime's choice with the one the reference's scores give."""
    own, last_level, last, following = _select(scores, num_blocks)
    differs = ((own.chosen != other.chosen) | (own.excluded != other.excluded)) & ~scores.dead
    # A chosen pair would have had to fall to the best one not chosen, another to rise to the last one chosen.
    distance = np.where(own.chosen, scores.score - following, last - scores.score)
    margins = np.where(scores.level == last_level, distance, np.inf)[differs].astype(np.float32)
    both, wanted = int((own.chosen & other.chosen & ~scores.dead).sum()), int((own.chosen & ~scores.dead).sum())
    return Overlap(both / wanted if wanted else 1.0, int(differs.sum()), margins)


def _select(scores: Scores, num_blocks: int) -> tuple[Choice, npt.NDArray[np.int64], Float32, Float32]:
    """The choice; then, each (B, H, 1, 1): level and score of the last pair chosen, and score of the best one on that level not
    chosen, -inf without one."""
    shape = scores.score.shape
    level, score = scores.level.reshape(*shape[:2], -1), scores.score.reshape(*shape[:2], -1)
    kept = min(num_blocks, level.shape[-1])
    order = np.lexsort((-score, -level), axis=-1)  # stable: ties keep the lower flat index first
    chosen = np.zeros(level.shape, dtype=bool)
    np.put_along_axis(chosen, order[..., :kept], True, axis=-1)
    last = order[..., kept - 1 : kept]
    last_level, last_score = np.take_along_axis(level, last, axis=-1), np.take_along_axis(score, last, axis=-1)
    excluded = chosen | (level > last_level) | ((level == last_level) & (score >= last_score))
    following = np.where(~chosen & (level == last_level), score, -np.inf).max(axis=-1, keepdims=True)
    choice = Choice(chosen.reshape(shape), excluded.reshape(shape))
    return choice, last_level[..., None], last_score[..., None], following[..., None].astype(np.float32)


def clear_budget(scores: Scores, wanted: int) -> tuple[int, float]:
    """A budget near `wanted` (half to twice it) at which every runtime must choose the same blocks, and its gap.

    The gap is the smallest over batch and heads, in logit units. With the full budget there is no choice, so its gap is inf; it is
    taken only where nothing else is wide apart.
    """
    flat_level = scores.level.reshape(-1, scores.level.shape[-1] ** 2)
    flat_score = scores.score.reshape(flat_level.shape)
    order = np.lexsort((-flat_score, -flat_level), axis=-1)
    level, score = np.take_along_axis(flat_level, order, axis=-1), np.take_along_axis(flat_score, order, axis=-1)
    step = np.where(level[:, :-1] == level[:, 1:], score[:, :-1] - score[:, 1:], np.inf).min(axis=0)  # gap below budget k + 1
    total = level.shape[-1]
    low, high = max(1, min(wanted, total) // 2), min(2 * wanted, total - 1)
    if high < low:
        return total, float("inf")
    best = low + int(step[low - 1 : high].argmax())
    gap = float(step[best - 1])
    return (best, gap) if gap >= CLEAR_GAP else (total, float("inf"))


CLEAR_GAP = 1e-4
"""Logit units. float32 pooling of D <= 256 products differs between runtimes by some 1e-6."""


def dense_attention(
    query: npt.ArrayLike, key: npt.ArrayLike, value: npt.ArrayLike, mask: npt.ArrayLike, attributes: Attributes
) -> npt.NDArray[np.float64]:
    """The operator's formula, dense and in float64: the judge of every runtime's arithmetic. (B, N, H * D) -> (B, N, H * D).

    N x N memory per head. The choice is the one `select` makes from these inputs.
    """
    real = np.asarray(mask) != 0
    batch, length = real.shape
    choice = select(block_scores(query, key, mask, attributes), attributes.num_blocks)
    q, k, v = (
        np.where(real[..., None], np.asarray(tensor).astype(np.float64), 0.0)
        .reshape(batch, length, attributes.num_heads, -1)
        .transpose(0, 2, 1, 3)
        for tensor in (query, key, value)
    )
    blocks = choice.chosen.shape[-1]
    count = _blocked(real, blocks).sum(axis=-1)[:, None, :, None] + 1e-6
    qm, km = (_blocked(tensor.swapaxes(-1, -2), blocks).sum(axis=-1).swapaxes(-1, -2) / count for tensor in (q, k))
    low = attributes.scale * qm @ km.swapaxes(-1, -2)  # (B, H, nb, nb) block logits
    exact = attributes.scale * q @ k.swapaxes(-1, -2)  # (B, H, N, N) token logits
    coarse = np.where(choice.excluded, -np.inf, low) if attributes.approx_mode == "full" else np.full_like(low, -np.inf)
    logits = np.where(_spread(choice.chosen, length), exact, _spread(coarse, length))
    logits = np.where(real[:, None, None, :], logits, -np.inf)
    largest = logits.max(axis=-1, keepdims=True)
    weights = np.exp(logits - np.where(np.isfinite(largest), largest, 0.0))
    context = (weights @ v) / (weights.sum(axis=-1, keepdims=True) + 1e-6)
    context = context.transpose(0, 2, 1, 3).reshape(batch, length, -1)
    return np.where(real[..., None], context, 0.0)


def _prior_count(blocks: int, attributes: Attributes) -> npt.NDArray[np.int64]:
    index = np.arange(blocks)
    first = (index < attributes.initial_prior_first_n_blocks).astype(np.int64)
    count = first[:, None] + first[None, :]
    if attributes.initial_prior_diagonal_n_blocks:
        count = count + (np.abs(index[:, None] - index[None, :]) <= attributes.initial_prior_diagonal_n_blocks // 2)
    return count


def _blocked(array: npt.NDArray[Any], blocks: int) -> npt.NDArray[Any]:
    """(..., N) -> (..., nb, 32), padded with zeros."""
    padding = [(0, 0)] * (array.ndim - 1) + [(0, blocks * BLOCK_SIZE - array.shape[-1])]
    return np.pad(array, padding).reshape(*array.shape[:-1], blocks, BLOCK_SIZE)


def _spread(blocks: npt.NDArray[Any], length: int) -> npt.NDArray[Any]:
    """(B, H, nb, nb) -> (B, H, N, N): each token pair takes its block pair's value."""
    return blocks.repeat(BLOCK_SIZE, axis=-1).repeat(BLOCK_SIZE, axis=-2)[..., :length, :length]
