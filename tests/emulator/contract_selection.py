"""The selection contract (docs/kernels.md), literally: float32 numpy, one rounding at a time, in the order that the contract fixes.

It gives the same bits as the compiled kernels; oracles.py, in float64, is the judge of what those bits should mean.
"""

from __future__ import annotations

import numpy as np

from mra_export.contract import BLOCK_SIZE, Attributes

F = np.float32


def fused_multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float32, rounded once. numpy has no such function.

    The product of two float32 is exact in float64. The sum is rounded to odd there (its error, by Knuth's TwoSum, says whether
    and which way it is inexact), and 53 bits rounded to odd, then to 24 to nearest, equal one rounding to nearest.
    """
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = c.astype(np.float64)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    even = total.view(np.int64) % 2 == 0
    odd = np.where(np.isfinite(total) & (error != 0) & even, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)
    return odd.astype(F)


Blocks = tuple[np.ndarray, np.ndarray, np.ndarray]
"""chosen, excluded: (B, H, nb, nb) bool; score: (B, H, nb, nb) float32."""


def select(query: np.ndarray, key: np.ndarray, mask: np.ndarray, attributes: Attributes) -> Blocks:
    """query, key: (B, N, H * D) of any float type; mask: (B, N)."""
    batch, length, _ = query.shape
    heads, nb = attributes.num_heads, -(-length // BLOCK_SIZE)
    chosen = np.zeros((batch, heads, nb * nb), bool)
    excluded = np.zeros_like(chosen)
    score = np.zeros((batch, heads, nb, nb), F)
    real = np.zeros((batch, nb * BLOCK_SIZE), bool)
    real[:, :length] = mask != 0
    with np.errstate(all="ignore"):
        for b in range(batch):
            live = real[b].reshape(nb, BLOCK_SIZE).any(1)
            pair_live = live[:, None] & live[None, :]
            query_mean, key_mean = (_block_means(x[b], real[b], heads) for x in (query, key))
            for h in range(heads):
                logit = _logits(query_mean[h], key_mean[h], attributes.scale)
                counted = np.where(pair_live, logit, -np.inf) if attributes.padding_invariant else logit
                row_max = np.fmax.reduce(counted, axis=1, initial=F(-np.inf))  # NaN never becomes the maximum
                if attributes.padding_invariant:
                    row_max[~live] = 0  # no live pair
                score[b, h] = logit - row_max[:, None]
                chosen[b, h], excluded[b, h] = _choose(score[b, h], pair_live, attributes)
    shape = score.shape
    return chosen.reshape(shape), excluded.reshape(shape), score


def _block_means(x: np.ndarray, real: np.ndarray, heads: int) -> np.ndarray:
    """(N, H * D) -> (H, nb, D): float32 sums over the real tokens in ascending order, divided by count + 1e-6."""
    nb = len(real) // BLOCK_SIZE
    tokens = np.zeros((nb * BLOCK_SIZE, x.shape[1]), F)
    tokens[: len(x)] = x.astype(F)
    tokens[~real] = 0
    tokens = tokens.reshape(nb, BLOCK_SIZE, heads, -1)
    total = np.zeros((nb, heads, tokens.shape[-1]), F)
    for t in range(BLOCK_SIZE):
        total = total + tokens[:, t]
    count = real.reshape(nb, BLOCK_SIZE).sum(1).astype(F) + F(1e-6)
    return (total / count[:, None, None]).transpose(1, 0, 2)


def _logits(query_mean: np.ndarray, key_mean: np.ndarray, scale: float) -> np.ndarray:
    total = np.zeros((len(query_mean), len(key_mean)), F)
    for d in range(query_mean.shape[1]):
        total = fused_multiply_add(query_mean[:, d, None], key_mean[None, :, d], total)
    return F(scale) * total


def _choose(score: np.ndarray, pair_live: np.ndarray, attributes: Attributes) -> tuple[np.ndarray, np.ndarray]:
    nb = len(score)
    index = np.arange(nb)
    first = (index < attributes.initial_prior_first_n_blocks).astype(int)
    rank = first[:, None] + first[None, :] - np.where(pair_live, 0, 2)
    if attributes.initial_prior_diagonal_n_blocks > 0:
        rank = rank + (np.abs(index[:, None] - index[None, :]) <= attributes.initial_prior_diagonal_n_blocks // 2)
    # (class, key) as one integer; -0 equals +0 and NaN lies below everything.
    bits = (score + F(0)).view(np.uint32).astype(np.int64)
    key = np.where(np.isnan(score), 0, np.where(bits >> 31, 0xFFFFFFFF - bits, bits | 0x80000000))
    value = ((rank + 2) * 2**32 + key).reshape(-1)
    order = np.argsort(-value, kind="stable")[: attributes.num_blocks]
    chosen = np.zeros(nb * nb, bool)
    chosen[order] = True
    return chosen, value >= value[order[-1]]
