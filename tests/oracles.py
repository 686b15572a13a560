"""The operator's meaning (docs/operator.md) as a dense O(N^2) float64 formula in numpy, and hypothesis strategies for its inputs.

Written from that page alone, with loops where they read better: nothing of mra_export but the contract is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from mra_export.contract import BLOCK_SIZE, Attributes

EPS = 1e-6


@dataclass(frozen=True)
class Dense:
    """context: (B, N, H * D) float64. chosen, excluded: (B, H, nb, nb) bool.

    margin: (B, H), how far the last chosen score is above the next one of its class that is not chosen; where this is below an
    implementation's rounding, it may choose otherwise. Dead pairs weigh nothing, so which of them is chosen does not count.
    """

    context: np.ndarray
    chosen: np.ndarray
    excluded: np.ndarray
    margin: np.ndarray


def dense_attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    mask: np.ndarray,
    attributes: Attributes,
    chosen: np.ndarray | None = None,
    excluded: np.ndarray | None = None,
) -> Dense:
    """query, key, value: (B, N, H * D); mask: (B, N). chosen and excluded, (B, H, nb, nb) bool, replace the selection."""
    batch, length, hidden = query.shape
    heads = attributes.num_heads
    nb = math.ceil(length / BLOCK_SIZE)
    context = np.zeros((batch, length, hidden))
    all_chosen = np.zeros((batch, heads, nb, nb), bool)
    all_excluded = np.zeros((batch, heads, nb, nb), bool)
    margin = np.zeros((batch, heads))
    for b in range(batch):
        for h in range(heads):
            columns = slice(h * hidden // heads, (h + 1) * hidden // heads)
            real = np.zeros(nb * BLOCK_SIZE, bool)
            real[:length] = mask[b] != 0
            q, k, v = (_padded(x[b, :, columns], real) for x in (query, key, value))
            level = _block_logit(q, k, real, attributes.scale)
            select = _select(level, real, attributes)
            margin[b, h] = select[2]
            all_chosen[b, h] = select[0] if chosen is None else chosen[b, h]
            all_excluded[b, h] = select[1] if excluded is None else excluded[b, h]
            rows = _attend(q, k, v, real, level, all_chosen[b, h], all_excluded[b, h], attributes)
            context[b, :, columns] = rows[:length]
    return Dense(context, all_chosen, all_excluded, margin)


def _padded(x: np.ndarray, real: np.ndarray) -> np.ndarray:
    out = np.zeros((len(real), x.shape[1]))
    out[: len(x)] = x
    out[~real] = 0
    return out


def _block_logit(q: np.ndarray, k: np.ndarray, real: np.ndarray, scale: float) -> np.ndarray:
    """Steps 1 and 2: l (nb, nb)."""
    count = real.reshape(-1, BLOCK_SIZE).sum(1)
    qm, km = (x.reshape(len(count), BLOCK_SIZE, -1).sum(1) / (count + EPS)[:, None] for x in (q, k))
    return scale * qm @ km.T


def _select(level: np.ndarray, real: np.ndarray, attributes: Attributes) -> tuple[np.ndarray, np.ndarray, float]:
    """Steps 2 to 5: chosen, excluded, margin."""
    nb = len(level)
    live_block = real.reshape(-1, BLOCK_SIZE).any(1)
    first, diagonal = attributes.initial_prior_first_n_blocks, attributes.initial_prior_diagonal_n_blocks
    score: dict[tuple[int, int], tuple[int, float]] = {}
    for i in range(nb):
        candidates = [level[i, j] for j in range(nb) if not attributes.padding_invariant or (live_block[i] and live_block[j])]
        row_max = max(candidates, default=0.0)
        for j in range(nb):
            rank = (i < first) + (j < first) + (diagonal > 0 and abs(i - j) <= diagonal // 2)
            rank -= 0 if live_block[i] and live_block[j] else 2
            score[i, j] = (int(rank), level[i, j] - row_max)
    order = sorted(score, key=lambda pair: (-score[pair][0], -score[pair][1], pair))
    budget = min(attributes.num_blocks, nb * nb)
    chosen = np.zeros((nb, nb), bool)
    for pair in order[:budget]:
        chosen[pair] = True
    last = score[order[budget - 1]]
    excluded = np.array([[score[i, j] >= last for j in range(nb)] for i in range(nb)])
    last_is_live = live_block[list(order[budget - 1])].all()
    rivals = [pair for pair in order[budget:] if score[pair][0] == last[0] and (last_is_live or live_block[list(pair)].all())]
    return chosen, excluded, min((last[1] - score[pair][1] for pair in rivals), default=math.inf)


def _attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    real: np.ndarray,
    level: np.ndarray,
    chosen: np.ndarray,
    excluded: np.ndarray,
    attributes: Attributes,
) -> np.ndarray:
    """Step 6: (nb * 32, D), rows of masked tokens 0."""

    def tokens(blocks: np.ndarray) -> np.ndarray:
        return blocks.repeat(BLOCK_SIZE, 0).repeat(BLOCK_SIZE, 1)

    logit = np.full((len(q), len(q)), -np.inf)
    if attributes.approx_mode == "full":
        logit = np.where(tokens(excluded), logit, tokens(level))
    logit = np.where(tokens(chosen), attributes.scale * q @ k.T, logit)
    logit[:, ~real] = -np.inf
    largest = logit.max(1, keepdims=True)
    weight = np.exp(logit - np.where(np.isinf(largest), 0, largest))
    out = weight @ v / (weight.sum(1, keepdims=True) + EPS)
    out[~real] = 0
    return out


@dataclass(frozen=True)
class OpCase:
    """One call of the operator. query, key, value: (B, N, H * D) float32; mask: (B, N) int32."""

    attributes: Attributes
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    mask: np.ndarray

    def __repr__(self) -> str:  # a failing example prints its shape and mask, not every number
        return f"OpCase({self.attributes}, shape={self.query.shape}, real={self.mask.sum(1).tolist()})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # hypothesis asks for this one
        printer.text(repr(self))

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        return self.query, self.key, self.value, self.mask


MASKS = ("none", "right padding", "holes", "dead blocks", "one row all masked")


def make_case(
    attributes: Attributes, batch: int, length: int, head_size: int, masking: str = "none", spread: float = 1.0, seed: int = 0
) -> OpCase:
    """Normal inputs times `spread`, with a slow drift along the sequence so that blocks differ, and NaN at masked tokens."""
    rng = np.random.default_rng(seed)
    shape = (batch, length, attributes.num_heads * head_size)
    drift = np.cumsum(rng.normal(size=shape), axis=1) / math.sqrt(BLOCK_SIZE)
    query, key = (spread * (rng.normal(size=shape) + drift[:, ::step]) for step in (1, -1))
    value = rng.normal(size=shape)
    mask = np.ones((batch, length), np.int32)
    if masking == "right padding":
        for b in range(batch):
            mask[b, rng.integers(1, length + 1) :] = 0
    elif masking == "holes":
        mask = (rng.random((batch, length)) < 0.6).astype(np.int32)
    elif masking == "dead blocks":
        for b in range(batch):
            mask[b] = (rng.random(math.ceil(length / BLOCK_SIZE)) < 0.6).repeat(BLOCK_SIZE)[:length]
    elif masking == "one row all masked":
        mask[rng.integers(batch)] = 0
    query, key, value = (np.where(mask[:, :, None], x, np.nan).astype(np.float32) for x in (query, key, value))
    return OpCase(attributes, query, key, value, mask)


@st.composite
def op_cases(draw: Any, max_length: int = 200, head_sizes: tuple[int, ...] = (8, 16, 32, 40, 64)) -> OpCase:
    """Calls over the whole contract: shapes, masks, budgets, priors, scales, both modes, both row maxima."""
    length = draw(st.one_of(st.sampled_from([1, 31, 32, 33, 64, 100]), st.integers(1, max_length)))
    length = min(length, max_length)
    nb = math.ceil(length / BLOCK_SIZE)
    attributes = Attributes(
        num_heads=draw(st.integers(1, 3)),
        num_blocks=draw(st.integers(1, nb * nb + 2)),
        scale=draw(st.sampled_from([0.05, 0.125, 0.1767767, 0.5])),
        approx_mode=draw(st.sampled_from(["full", "sparse"])),
        initial_prior_first_n_blocks=draw(st.sampled_from([0, 0, 1, 2, nb + 1])),
        initial_prior_diagonal_n_blocks=draw(st.sampled_from([0, 0, 1, 2, 3])),
        padding_invariant=draw(st.booleans()),
    )
    return make_case(
        attributes,
        batch=draw(st.integers(1, 3)),
        length=length,
        head_size=draw(st.sampled_from(head_sizes)),
        masking=draw(st.sampled_from(MASKS)),
        spread=draw(st.sampled_from([0.2, 1.0])),
        seed=draw(st.integers(0, 2**16)),
    )
