"""The MraAttention operator's contract: the only place its name, version, attributes, dtypes and tolerances are written.

Meaning of the operator: docs/operator.md. No framework is imported here.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from mra_export.errors import ContractError

CONTRACT_VERSION = 1
"""Raised by every change of meaning; written into each bundle's manifest and checked on load."""

OP_DOMAIN = "mra"
OP_TYPE = "MraAttention"
OP_VERSION = 1
PLUGIN_NAME = OP_TYPE
PLUGIN_VERSION = "1"
PLUGIN_NAMESPACE = ""
TORCH_OP = "mra::attention"

BLOCK_SIZE = 32
MIN_HEAD_SIZE = 8
MAX_HEAD_SIZE = 256
APPROX_MODES = ("full", "sparse")
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Command-line name -> numpy / torch name of the operator's tensor type T."""
INT8 = "int8"
"""A precision of bundles, not of the operator: the matrix products with weights take 8-bit integers, all else is float32."""
PRECISIONS = (*DTYPES, INT8)
"""What `export --dtype` takes and a manifest's dtype may be."""


def float_dtype(precision: str) -> str:
    """The name in DTYPES of a bundle's float tensors: the operator's inputs, the outputs, and the weights in model.safetensors."""
    return "fp32" if precision == INT8 else precision


@dataclass(frozen=True)
class Tolerance:
    """How far a runtime may be from the reference: t in |actual - expected| <= t + t * |expected|.

    operator: one operator against its formula in float64, same inputs, selection forced equal.
    model: a whole model against PyTorch in float32, selection forced equal.
    model_free: a whole model against PyTorch in float32, each with its own selection, so that near-ties may fall either way; asked
    of 99 % of the values (parity.FREE_SHARE).
    near_tie: logit units. Two runtimes may choose different blocks where the scores are closer than this, nowhere else.
    """

    operator: float
    model: float
    model_free: float
    near_tie: float


TOLERANCES = {
    "fp32": Tolerance(operator=2e-5, model=1e-4, model_free=2e-3, near_tie=1e-4),
    "fp16": Tolerance(operator=1e-3, model=3e-2, model_free=1e-1, near_tie=2e-2),
    "bf16": Tolerance(operator=8e-3, model=2e-1, model_free=5e-1, near_tie=2e-1),
    INT8: Tolerance(operator=2e-5, model=7.5e-1, model_free=1.0, near_tie=2e-1),
}
"""Per precision (PRECISIONS).

operator: for 16 bits, twice the rounding of the result itself (2^-11 and 2^-8); for 32, four times what PyTorch needs.
model: twice what PyTorch itself needs at that precision on weights with sharp attention (fp16 1.3e-2, bf16 1.0e-1; measured by
tests/test_verify.py) and a floor of a few units in the last place; for fp32, where PyTorch is the reference, ten times the
largest difference seen between two correct runtimes (1.2e-5).
model_free: near-ties of one layer move the scores of the next, so more than `model`, for the outputs that no flip hit.
int8: the operator is float32's. Rounding is a share of a tensor's range, not of each value: twice what the shipped checkpoint and
random weights with sharp attention need (model 3.6e-1, model_free 2.9e-1, near_tie 6.3e-2, two seeds of the whole sweep; a floor in
model_free for batches of a single token). This bounds damage; whether the answers are as good, accuracy.py says.
near_tie: at least ten times the widest seen in PyTorch at that precision (fp32 2.4e-6, fp16 1.4e-3, bf16 1.7e-2).
"""


@dataclass(frozen=True)
class Attributes:
    """The operator's attributes, in the operator's own order. Validated on construction.

    num_heads: H; the last axis of query, key and value is H * D.
    num_blocks: K, the budget of exact 32x32 blocks per batch row and head.
    scale: the factor on each logit (see `attention_scale`).
    approx_mode: "full" approximates what is not exact at low resolution, "sparse" drops it.
    initial_prior_first_n_blocks: F, the first F block rows and block columns are preferred.
    initial_prior_diagonal_n_blocks: G, blocks with abs(i - j) <= G // 2 are preferred.
    padding_invariant: row maxima run over live block pairs only.
    """

    num_heads: int
    num_blocks: int
    scale: float
    approx_mode: str = "full"
    initial_prior_first_n_blocks: int = 0
    initial_prior_diagonal_n_blocks: int = 0
    padding_invariant: bool = False

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_blocks"):
            if getattr(self, name) < 1:
                raise ContractError(f"{name} is {getattr(self, name)}: it must be 1 or more")
        for name in ("initial_prior_first_n_blocks", "initial_prior_diagonal_n_blocks"):
            if getattr(self, name) < 0:
                raise ContractError(f"{name} is {getattr(self, name)}: it must be 0 or more")
        if self.approx_mode not in APPROX_MODES:
            raise ContractError(f"approx_mode is {self.approx_mode!r}: use one of {', '.join(APPROX_MODES)}")
        if not 0 < self.scale < float("inf"):
            raise ContractError(f"scale is {self.scale}: it must be positive and finite")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


ATTRIBUTE_NAMES = tuple(field.name for field in fields(Attributes))


def attention_scale(head_size: int) -> float:
    """The scale a checkpoint with this head size was trained with: 1/sqrt(D), and 1/sqrt(32) below 32.

    Upstream zero-pads heads smaller than 32 to 32 and scales by the padded size.
    """
    return math.pow(max(head_size, BLOCK_SIZE), -0.5)


def block_budget(max_position_embeddings: int, block_per_row: int) -> int:
    """K, the number of exact blocks per head, as upstream: not rescaled for shorter inputs."""
    blocks = max_position_embeddings // BLOCK_SIZE
    return min(blocks * block_per_row, blocks * blocks)


def check_shapes(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], mask: tuple[int, ...], num_heads: int
) -> int:
    """Refuse shapes outside the contract; returns the head size D.

    query, key, value: (B, N, H * D); mask: (B, N). Raises ContractError.
    """
    if len(query) != 3:
        raise ContractError(f"query has shape {query}: pass (batch, length, num_heads * head_size)")
    for name, shape in (("key", key), ("value", value)):
        if shape != query:
            raise ContractError(f"{name} has shape {shape}, query {query}: pass query, key and value of the same shape")
    if mask != query[:2]:
        raise ContractError(f"mask has shape {mask}, query {query}: pass a mask of shape {query[:2]}, 1 = real token")
    if query[0] < 1 or query[1] < 1:
        raise ContractError(f"query has shape {query}: batch and length must be 1 or more")
    hidden = query[2]
    if num_heads < 1 or hidden % num_heads:
        raise ContractError(f"query's last axis is {hidden}, num_heads {num_heads}: it must be a multiple of num_heads")
    head_size = hidden // num_heads
    if not MIN_HEAD_SIZE <= head_size <= MAX_HEAD_SIZE:
        raise ContractError(
            f"head size is {head_size} ({hidden} / {num_heads} heads): it must be {MIN_HEAD_SIZE} to {MAX_HEAD_SIZE}"
        )
    return head_size
