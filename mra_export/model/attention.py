"""MRA attention in plain torch: the reference that every other implementation is compared with.

docs/operator.md is the meaning; "step n" below is its numbering. Block-sparse: the largest tensors have one 32 x 32 tile for each
chosen block, never N x N. Any device; differentiable with the selection held fixed. No shape depends on data and no value is read
back: nothing waits for a GPU, and calls may be captured into a CUDA graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from mra_export.contract import BLOCK_SIZE, Attributes, check_shapes
from mra_export.errors import ContractError

EPSILON = 1e-6
"""Guards both divisions: by a block's token count (step 1) and by a token's sum of weights (step 6)."""
BACKWARD_BYTES = 512 << 20
"""About what the backward's tiles take at once: heads beyond it wait for their turn."""

FLOAT_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Selection:
    """Which block pairs are exact, and how close the decision was. nb = ceil(N / 32).

    chosen: (B, H, nb, nb) bool, the min(K, nb * nb) block pairs computed exactly; axis 2 is query block i, axis 3 key block j.
    excluded: (B, H, nb, nb) bool, the pairs without a low-resolution weight: the chosen ones and those tied with the last of them.
    score_class: (B, H, nb, nb) int64, priors that the pair has, less 2 when it is dead; compared first.
    score: (B, H, nb, nb) float32 (float64 for float64 inputs), l_ij - r_i; compared second.
    margin: (B, H), distance from the lowest chosen score to the best one not chosen in the same class; inf when there is none.
    """

    chosen: Tensor
    excluded: Tensor
    score_class: Tensor
    score: Tensor
    margin: Tensor


class _Blocks(NamedTuple):
    """Inputs cut into blocks, with masked tokens zeroed."""

    query: Tensor  # (B, H, nb, 32, D)
    key: Tensor  # (B, H, nb, 32, D)
    value: Tensor  # (B, H, nb, 32, D)
    real: Tensor  # (B, 1, nb, 32) bool
    token_count: Tensor  # (B, 1, nb) real tokens of each block


@overload
def mra_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    attributes: Attributes,
    *,
    selection: Selection | None = None,
    return_selection: Literal[False] = False,
) -> Tensor: ...


@overload
def mra_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    attributes: Attributes,
    *,
    selection: Selection | None = None,
    return_selection: Literal[True],
) -> tuple[Tensor, Selection]: ...


def mra_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    attributes: Attributes,
    *,
    selection: Selection | None = None,
    return_selection: bool = False,
) -> Tensor | tuple[Tensor, Selection]:
    """MRA attention of query, key and value, each (B, N, H * D) of one dtype: float64, float32, float16 or bfloat16.

    mask: (B, N) of any dtype, nonzero = real token. Values at masked tokens, NaN included, have no effect and get a gradient of 0.
    selection: use these chosen and excluded blocks in place of those the scores give.
    return_selection: also return the Selection that was used.

    Returns context, (B, N, H * D) of the inputs' dtype. Selection, softmax and sums are float32 (float64 for float64 inputs).
    Raises ContractError for shapes or dtypes outside the contract.
    """
    head_size = check_inputs(query, key, value, mask, attributes.num_heads)
    # Autocast would send the products below to 16 bits, and with them the selection.
    with torch.autocast(query.device.type, enabled=False):
        blocks = _cut(query, key, value, mask, attributes.num_heads, head_size)
        logit = _block_logit(blocks, attributes.scale)
        if selection is None:
            selection = _select(logit.detach(), blocks.token_count, attributes)
        context = _join(_attend(blocks, logit, selection, attributes), query)
    return (context, selection) if return_selection else context


def check_inputs(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, num_heads: int) -> int:
    """Refuse tensors outside the contract; returns the head size D. Raises ContractError."""
    head_size = check_shapes(tuple(query.shape), tuple(key.shape), tuple(value.shape), tuple(mask.shape), num_heads)
    if query.dtype not in FLOAT_TYPES:
        names = ", ".join(str(dtype) for dtype in FLOAT_TYPES)
        raise ContractError(f"query is {query.dtype}: use one of {names}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise ContractError(f"{name} is {tensor.dtype}, query {query.dtype}: pass query, key and value of the same dtype")
    for name, tensor in (("key", key), ("value", value), ("mask", mask)):
        if tensor.device != query.device:
            raise ContractError(f"{name} is on {tensor.device}, query on {query.device}: move them to the same device")
    return head_size


def _cut(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, num_heads: int, head_size: int) -> _Blocks:
    batch, length, _ = query.shape
    padding = -length % BLOCK_SIZE
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    real = mask != 0

    real_blocks = torch.nn.functional.pad(real, (0, padding)).view(batch, 1, -1, BLOCK_SIZE)
    cut = [_cut_tensor(x, real, num_heads, head_size, compute) for x in (query, key, value)]
    return _Blocks(cut[0], cut[1], cut[2], real_blocks, real_blocks.sum(-1).to(compute))


def _cut_tensor(x: Tensor, real: Tensor, num_heads: int, head_size: int, compute: torch.dtype) -> Tensor:
    """x (B, N, H * D), real (B, N) -> (B, H, nb, 32, D)."""
    batch, length, _ = x.shape
    # Zero before any arithmetic: 0 * NaN is NaN, in the gradient too.
    x = x.masked_fill(~real[:, :, None], 0.0).to(compute)
    x = torch.nn.functional.pad(x, (0, 0, 0, -length % BLOCK_SIZE))
    return x.view(batch, -1, BLOCK_SIZE, num_heads, head_size).permute(0, 3, 1, 2, 4).contiguous()


def _block_logit(blocks: _Blocks, scale: float) -> Tensor:
    """l_ij of step 2, not lowered for dead pairs: (B, H, nb, nb)."""
    divisor = (blocks.token_count + EPSILON)[..., None]
    query_mean = blocks.query.sum(-2) / divisor
    key_mean = blocks.key.sum(-2) / divisor
    return scale * (query_mean @ key_mean.transpose(-1, -2))


@torch.no_grad()
def _select(logit: Tensor, count: Tensor, attributes: Attributes) -> Selection:
    """Steps 2 to 5. logit: (B, H, nb, nb); count: (B, 1, nb)."""
    nb = logit.shape[-1]
    live = (count[..., :, None] > 0) & (count[..., None, :] > 0)
    row_logit = logit.masked_fill(~live, -math.inf) if attributes.padding_invariant else logit
    row_max = row_logit.amax(-1, keepdim=True)
    score = logit - row_max.masked_fill(row_max == -math.inf, 0.0)  # a row with no live pair has no maximum
    prior = _prior_count(nb, attributes, logit.device)
    score_class = (prior - 2 * (~live).long()).expand_as(logit)

    # Sorting by score and then, stably, by class orders pairs by (class, score, -flat index), the order of steps 4 and 5.
    flat_score, flat_class = score.flatten(-2), score_class.flatten(-2)
    order = flat_score.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, flat_class.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
    order = order[..., : attributes.num_blocks]
    chosen = torch.zeros_like(flat_score, dtype=torch.bool).scatter_(-1, order, True)

    last = order[..., -1:]
    last_score, last_class = flat_score.gather(-1, last), flat_class.gather(-1, last)
    same_class = flat_class == last_class
    excluded = chosen | (flat_class > last_class) | (same_class & (flat_score >= last_score))
    runner_up = flat_score.masked_fill(chosen | ~same_class, -math.inf).amax(-1)
    margin = (last_score.squeeze(-1) - runner_up).masked_fill(runner_up == -math.inf, math.inf)
    return Selection(chosen.view_as(logit), excluded.view_as(logit), score_class, score, margin)


def _prior_count(nb: int, attributes: Attributes, device: torch.device) -> Tensor:
    """How many priors prefer each block pair (step 4): (nb, nb) int64."""
    index = torch.arange(nb, device=device)
    first = (index < attributes.initial_prior_first_n_blocks).long()
    prior = first[:, None] + first[None, :]
    if attributes.initial_prior_diagonal_n_blocks > 0:
        prior = prior + ((index[:, None] - index[None, :]).abs() <= attributes.initial_prior_diagonal_n_blocks // 2).long()
    return prior


class _Weights(NamedTuple):
    """Step 6's weights of each query token, relative to its largest one: then eps is too, and exp never overflows.

    R = B * H * nb block rows; M = B * H * min(K, nb * nb) chosen block pairs. One without a key, or too many, weighs nothing.
    """

    query_row: Tensor  # (M,) query block of each pair, an index into R
    key_row: Tensor  # (M,) its key block, the same
    tile: Tensor  # (M, 32, 32) weight of each key token for each query token
    block: (
        Tensor | None
    )  # (B, H, nb, nb) weight of each token of key block j for block i, relative to i's largest; mode "full" only
    correction: Tensor | None  # (R, 32) what turns a `block` weight into one relative to the token's largest
    total: Tensor  # (R, 32) sum of the token's weights, plus eps


def _weights(blocks: _Blocks, logit: Tensor, selection: Selection, attributes: Attributes) -> _Weights:
    batch, heads, nb = blocks.query.shape[:3]
    rows = batch * heads * nb
    has_keys = blocks.token_count[:, :, None, :] > 0  # (B, 1, 1, nb)

    pair, there = _pairs(selection.chosen, attributes.num_blocks)
    first_row = torch.arange(0, rows, nb, device=logit.device).view(batch, heads, 1)  # of each batch row and head
    query_row, key_row = ((first_row + index).flatten() for index in (pair // nb, pair % nb))
    key_real = blocks.real.expand(-1, heads, -1, -1).reshape(rows, BLOCK_SIZE)[key_row] & there.view(-1, 1)
    query_tile, key_tile = _tiles(attributes.scale * blocks.query, query_row), _tiles(blocks.key, key_row)
    tile_logit = (query_tile @ key_tile.transpose(-1, -2)).masked_fill(~key_real[:, None, :], -math.inf)

    # The largest logit of each query token. It cancels out of the result but for eps, so it carries no gradient.
    with torch.no_grad():
        token_max = logit.new_full((rows, BLOCK_SIZE), -math.inf)
        token_max.scatter_reduce_(0, query_row[:, None].expand(-1, BLOCK_SIZE), tile_logit.amax(-1), "amax")
    low_logit = low_max = None
    if attributes.approx_mode == "full":
        low_logit = logit.masked_fill(selection.excluded | ~has_keys, -math.inf)
        low_max = low_logit.detach().amax(-1).view(rows, 1)
        token_max = torch.maximum(token_max, low_max)
    token_max = token_max.masked_fill(token_max == -math.inf, 0.0)  # no weight at all

    tile = torch.exp(tile_logit - token_max.index_select(0, query_row)[..., None])
    total = logit.new_full((rows, BLOCK_SIZE), EPSILON).index_add(0, query_row, tile.sum(-1))
    block = correction = None
    if low_logit is not None and low_max is not None:
        # All queries of block i share exp(l_ij) up to their own maximum: sums over j are taken once per block.
        block_max = low_max.masked_fill(low_max == -math.inf, 0.0).view(batch, heads, nb, 1)
        block = torch.exp(low_logit - block_max)
        correction = torch.exp(low_max - token_max)
        total = total + correction * (block * blocks.token_count[:, :, None, :]).sum(-1).view(rows, 1)
    return _Weights(query_row, key_row, tile, block, correction, total)


def _pairs(chosen: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """The chosen pairs as flat indices i * nb + j, and which of them there are; each (B, H, min(K, nb * nb)).

    chosen: (B, H, nb, nb). Where it has fewer than K, the rest point anywhere.
    """
    flat = chosen.flatten(-2)
    rank = torch.arange(1, min(num_blocks, flat.shape[-1]) + 1, device=chosen.device, dtype=torch.int32)
    rank = rank.expand(*flat.shape[:2], -1).contiguous()
    pair = torch.searchsorted(flat.cumsum(-1, dtype=torch.int32), rank)
    last = flat.shape[-1] - 1
    return pair.clamp(max=last), pair <= last


def _tiles(x: Tensor, row: Tensor) -> Tensor:
    """The blocks of x (B, H, nb, 32, D) that row (M,) names: (M, 32, D)."""
    return x.flatten(0, 2).index_select(0, row)


def _attend(blocks: _Blocks, logit: Tensor, selection: Selection, attributes: Attributes) -> Tensor:
    """Step 6: context (B, H, nb, 32, D)."""
    weights = _weights(blocks, logit, selection, attributes)
    context = torch.zeros_like(blocks.query).flatten(0, 2)
    context = context.index_add(0, weights.query_row, weights.tile @ _tiles(blocks.value, weights.key_row))
    if weights.block is not None and weights.correction is not None:
        block_context = (weights.block @ blocks.value.sum(-2)).flatten(0, 2)
        context = context + weights.correction[..., None] * block_context[:, None, :]
    context = (context / weights.total[..., None]).view_as(blocks.query)
    return context.masked_fill(~blocks.real[..., None], 0.0)


@torch.no_grad()
def mra_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    attributes: Attributes,
    selection: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value for grad, that of the context; all (B, N, H * D) of one dtype. The selection is held fixed.

    selection: the chosen and excluded blocks of the forward, each (B, H, nb, nb) bool; None: those that the scores give.
    Written out because an operator cannot run autograd inside itself; it equals autograd of `mra_attention`. Memory is that of the
    inputs in float32 and of BACKWARD_BYTES of tiles, or one head's where that is more.
    """
    head_size = check_inputs(query, key, value, mask, attributes.num_heads)
    with torch.autocast(query.device.type, enabled=False):
        blocks = _cut(query, key, value, mask, attributes.num_heads, head_size)
        d_context = _cut_tensor(grad, mask != 0, attributes.num_heads, head_size, blocks.query.dtype)
        gradients = tuple(torch.empty_like(blocks.query) for _ in range(3))
        # Heads share nothing: each batch row and head is a batch row of one head here.
        batch, heads, nb = blocks.query.shape[:3]
        rows = [
            x.flatten(0, 1)[:, None] for x in (*blocks[:3], *(x.expand(-1, heads, *x.shape[2:]) for x in blocks[3:]), d_context)
        ]
        chosen, excluded = (None if x is None else x.flatten(0, 1)[:, None] for x in selection or (None, None))
        at_once = _heads_at_once(nb, head_size, attributes.num_blocks, blocks.query.element_size())
        for start in range(0, batch * heads, at_once):
            part = slice(start, start + at_once)
            some = _Blocks(*(x[part] for x in rows[:-1]))
            fixed = None if chosen is None or excluded is None else (chosen[part], excluded[part])
            for gradient, found in zip(gradients, _backward(rows[-1][part], some, attributes, fixed), strict=True):
                gradient.flatten(0, 1)[part] = found[:, 0]
        d_query, d_key, d_value = (_join(x.masked_fill_(~blocks.real[..., None], 0.0), query) for x in gradients)
        return d_query, d_key, d_value


def _heads_at_once(nb: int, head_size: int, num_blocks: int, item: int) -> int:
    tiles = min(num_blocks, nb * nb) * BLOCK_SIZE * (5 * head_size + 4 * BLOCK_SIZE) * item
    scores = nb * nb * 64  # sorting them: values, classes, their order
    return max(1, BACKWARD_BYTES // (tiles + scores))


def _backward(
    d_context: Tensor, blocks: _Blocks, attributes: Attributes, fixed: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """d_context and the gradients: (B, H, nb, 32, D). fixed: chosen and excluded, (B, H, nb, nb)."""
    logit = _block_logit(blocks, attributes.scale)
    if fixed is None:
        selection = _select(logit, blocks.token_count, attributes)
    else:
        nothing = logit.new_empty(0)
        selection = Selection(*fixed, nothing, nothing, nothing)
    weights = _weights(blocks, logit, selection, attributes)
    query_row, key_row = weights.query_row, weights.key_row
    query_tile, key_tile, value_tile = (
        _tiles(blocks.query, query_row),
        _tiles(blocks.key, key_row),
        _tiles(blocks.value, key_row),
    )
    value_sum = blocks.value.sum(-2)

    # context = numerator / total. The gradient of total is -<d numerator, context>, summed from the parts below.
    d_numerator = d_context.flatten(0, 2) / weights.total[..., None]
    numerator = torch.zeros_like(d_numerator).index_add_(0, query_row, weights.tile @ value_tile)
    if weights.block is not None and weights.correction is not None:
        numerator += weights.correction[..., None] * (weights.block @ value_sum).flatten(0, 2)[:, None, :]
    d_total = -(d_numerator * numerator).sum(-1) / weights.total

    # Chosen blocks.
    d_numerator_tile = d_numerator.index_select(0, query_row)
    d_tile = d_numerator_tile @ value_tile.transpose(-1, -2) + d_total.index_select(0, query_row)[..., None]
    d_tile_logit = attributes.scale * d_tile * weights.tile
    d_query = torch.zeros_like(d_numerator).index_add_(0, query_row, d_tile_logit @ key_tile)
    d_key = torch.zeros_like(d_numerator).index_add_(0, key_row, d_tile_logit.transpose(-1, -2) @ query_tile)
    d_value = torch.zeros_like(d_numerator).index_add_(0, key_row, weights.tile.transpose(-1, -2) @ d_numerator_tile)

    # The others, a whole block at a time.
    if weights.block is not None and weights.correction is not None:
        d_block_numerator = (weights.correction[..., None] * d_numerator).sum(1).view_as(value_sum)
        d_block_total = (weights.correction * d_total).sum(1).view(*value_sum.shape[:-1], 1)
        d_block = d_block_numerator @ value_sum.transpose(-1, -2) + d_block_total * blocks.token_count[:, :, None, :]
        d_logit = attributes.scale * d_block * weights.block
        divisor = (blocks.token_count + EPSILON)[..., None]
        query_mean, key_mean = blocks.query.sum(-2) / divisor, blocks.key.sum(-2) / divisor
        d_query += ((d_logit @ key_mean) / divisor).flatten(0, 2)[:, None, :]
        d_key += ((d_logit.transpose(-1, -2) @ query_mean) / divisor).flatten(0, 2)[:, None, :]
        d_value += (weights.block.transpose(-1, -2) @ d_block_numerator).flatten(0, 2)[:, None, :]
    return d_query.view_as(blocks.query), d_key.view_as(blocks.query), d_value.view_as(blocks.query)


def _join(x: Tensor, like: Tensor) -> Tensor:
    """(B, H, nb, 32, D) -> (B, N, H * D), in the dtype of `like` (B, N, H * D)."""
    batch, length, hidden = like.shape
    return x.permute(0, 2, 3, 1, 4).reshape(batch, -1, hidden)[:, :length].to(like.dtype).contiguous()
