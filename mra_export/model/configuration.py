"""MRA's configuration, with the parameter names and defaults of transformers' own."""

from __future__ import annotations

import logging
from typing import Any

from transformers import PretrainedConfig

from mra_export.contract import (
    APPROX_MODES,
    BLOCK_SIZE,
    MAX_HEAD_SIZE,
    MIN_HEAD_SIZE,
    Attributes,
    attention_scale,
    block_budget,
)
from mra_export.errors import ContractError

logger = logging.getLogger(__name__)

HIDDEN_ACTS = ("gelu", "relu", "selu", "gelu_new")
POSITION_EMBEDDING_TYPES = ("absolute", "relative_key", "relative_key_query")

_warned_of_relative_positions = False


class MraConfig(PretrainedConfig):  # type: ignore[misc]
    """What shapes an MRA model. A config.json written by transformers loads here, and the other way round.

    hidden_act: one of gelu, relu, selu, gelu_new.
    max_position_embeddings: longest input in tokens, 32 or more; with block_per_row it sets the budget of exact blocks.
    position_embedding_type: absolute; relative_key and relative_key_query are accepted and, as in transformers, change nothing.
    block_per_row: exact 32 x 32 blocks for each block row of the longest input.
    approx_mode: "full" approximates the other blocks at low resolution, "sparse" drops them.
    initial_prior_first_n_blocks: the first block rows and columns that are preferred.
    initial_prior_diagonal_n_blocks: width in blocks of the preferred diagonal band.
    attention_probs_dropout_prob: kept for compatibility; as in transformers, attention weights are never dropped.

    Raises ContractError, naming the parameter and what it may be, for values no MRA model can have.
    """

    model_type = "mra"

    def __init__(
        self,
        vocab_size: int = 50265,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        max_position_embeddings: int = 512,
        type_vocab_size: int = 1,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-5,
        position_embedding_type: str = "absolute",
        block_per_row: int = 4,
        approx_mode: str = "full",
        initial_prior_first_n_blocks: int = 0,
        initial_prior_diagonal_n_blocks: int = 0,
        pad_token_id: int | None = 1,
        bos_token_id: int | None = 0,
        eos_token_id: int | list[int] | None = 2,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.position_embedding_type = position_embedding_type
        self.block_per_row = block_per_row
        self.approx_mode = approx_mode
        self.initial_prior_first_n_blocks = initial_prior_first_n_blocks
        self.initial_prior_diagonal_n_blocks = initial_prior_diagonal_n_blocks
        self.check()

    def check(self) -> None:
        """Refuse values that no MRA model can have. Models call it too: attributes may be set after construction."""
        for name, least in (
            ("vocab_size", 1),
            ("hidden_size", 1),
            ("num_hidden_layers", 0),
            ("num_attention_heads", 1),
            ("intermediate_size", 1),
            ("max_position_embeddings", BLOCK_SIZE),
            ("type_vocab_size", 1),
            ("block_per_row", 1),
            ("initial_prior_first_n_blocks", 0),
            ("initial_prior_diagonal_n_blocks", 0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ContractError(f"{name} is {value!r}: it must be an integer, {least} or more")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ContractError(f"{name} is {value!r}: it must be a number from 0 to 1")
        for name, allowed in (
            ("hidden_act", HIDDEN_ACTS),
            ("approx_mode", APPROX_MODES),
            ("position_embedding_type", POSITION_EMBEDDING_TYPES),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ContractError(f"{name} is {value!r}: use one of {', '.join(allowed)}")
        if self.hidden_size % self.num_attention_heads:
            raise ContractError(
                f"hidden_size is {self.hidden_size}, num_attention_heads {self.num_attention_heads}: hidden_size must be a multiple"
            )
        head_size = self.hidden_size // self.num_attention_heads
        if not MIN_HEAD_SIZE <= head_size <= MAX_HEAD_SIZE:
            raise ContractError(
                f"hidden_size / num_attention_heads is {head_size}: the head size must be {MIN_HEAD_SIZE} to {MAX_HEAD_SIZE}"
            )
        if self.position_embedding_type != "absolute":
            _warn_of_relative_positions(self.position_embedding_type)

    def attributes(self, padding_invariant: bool = False) -> Attributes:
        """The operator's attributes for this configuration."""
        return Attributes(
            num_heads=self.num_attention_heads,
            num_blocks=block_budget(self.max_position_embeddings, self.block_per_row),
            scale=attention_scale(self.hidden_size // self.num_attention_heads),
            approx_mode=self.approx_mode,
            initial_prior_first_n_blocks=self.initial_prior_first_n_blocks,
            initial_prior_diagonal_n_blocks=self.initial_prior_diagonal_n_blocks,
            padding_invariant=padding_invariant,
        )


def _warn_of_relative_positions(value: str) -> None:
    global _warned_of_relative_positions
    if not _warned_of_relative_positions:
        _warned_of_relative_positions = True
        logger.warning("position_embedding_type %r has no effect: MRA in transformers uses absolute positions for it too", value)
