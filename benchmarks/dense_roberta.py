"""The dense peer of whole MRA models: RoBERTa of the same dimensions, random weights."""

from __future__ import annotations

import torch
from transformers import RobertaConfig, RobertaModel

from mra_export.model import MraConfig
from mra_export.presets import PRESETS


def dense_model(preset: str, attention: str = "eager", num_hidden_layers: int | None = None) -> RobertaModel:
    """preset: whose dimensions. attention: transformers' attn_implementation. num_hidden_layers: instead of the preset's."""
    mra = MraConfig(**PRESETS[preset])
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=mra.vocab_size,
        hidden_size=mra.hidden_size,
        num_hidden_layers=num_hidden_layers or mra.num_hidden_layers,
        num_attention_heads=mra.num_attention_heads,
        intermediate_size=mra.intermediate_size,
        max_position_embeddings=mra.max_position_embeddings + 2,
        type_vocab_size=mra.type_vocab_size,
        layer_norm_eps=mra.layer_norm_eps,
        attn_implementation=attention,
    )
    return RobertaModel(config, add_pooling_layer=False).eval()
