"""MraConfig: defaults and names of transformers', and what it refuses."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import transformers

from mra_export.contract import Attributes
from mra_export.errors import ContractError
from mra_export.model import MraConfig, MraModel, configuration


def test_defaults_are_those_of_transformers() -> None:
    ours, theirs = MraConfig().to_dict(), transformers.MraConfig().to_dict()
    assert {name: ours[name] for name in theirs if name in ours} == {name: theirs[name] for name in theirs if name in ours}
    assert set(theirs) - set(ours) <= {"add_cross_attention"}


def test_every_parameter_survives_a_file_and_reads_in_transformers(tmp_path: Any) -> None:
    values = {
        "vocab_size": 99,
        "hidden_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 5,
        "intermediate_size": 7,
        "hidden_act": "selu",
        "hidden_dropout_prob": 0.2,
        "attention_probs_dropout_prob": 0.3,
        "max_position_embeddings": 1000,
        "type_vocab_size": 3,
        "initializer_range": 0.5,
        "layer_norm_eps": 1e-7,
        "position_embedding_type": "relative_key_query",
        "block_per_row": 3,
        "approx_mode": "sparse",
        "initial_prior_first_n_blocks": 2,
        "initial_prior_diagonal_n_blocks": 4,
        "pad_token_id": 4,
        "bos_token_id": 5,
        "eos_token_id": 6,
        "num_labels": 7,
    }
    MraConfig(**values).save_pretrained(tmp_path)
    for config_class in (MraConfig, transformers.MraConfig):
        config = config_class.from_pretrained(tmp_path)
        assert {name: getattr(config, name) for name in values} == values


def test_attributes() -> None:
    config = MraConfig(
        block_per_row=8, max_position_embeddings=4096, initial_prior_first_n_blocks=3, initial_prior_diagonal_n_blocks=1
    )
    assert config.attributes() == Attributes(12, 1024, 0.125, "full", 3, 1, False)
    small = MraConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=100, block_per_row=9, approx_mode="sparse")
    assert small.attributes(padding_invariant=True) == Attributes(4, 9, 32**-0.5, "sparse", 0, 0, True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"approx_mode": "dense"}, "approx_mode is 'dense': use one of full, sparse"),
        ({"hidden_act": "tanh"}, "hidden_act is 'tanh': use one of gelu, relu, selu, gelu_new"),
        (
            {"position_embedding_type": "rotary"},
            "position_embedding_type is 'rotary': use one of absolute, relative_key, relative_key_query",
        ),
        ({"hidden_size": 100, "num_attention_heads": 12}, "hidden_size is 100, num_attention_heads 12"),
        ({"hidden_size": 48, "num_attention_heads": 12}, "head size must be 8 to 256"),
        ({"hidden_size": "768"}, "hidden_size is '768': it must be an integer, 1 or more"),
        ({"max_position_embeddings": 31}, "max_position_embeddings is 31: it must be an integer, 32 or more"),
        ({"block_per_row": 0}, "block_per_row is 0"),
        ({"initial_prior_first_n_blocks": -1}, "initial_prior_first_n_blocks is -1"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob is 1.5: it must be a number from 0 to 1"),
    ],
)
def test_values_no_model_can_have_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        MraConfig(**values)


def test_a_model_refuses_what_was_set_after_construction(tiny_config: Any) -> None:
    config = tiny_config()
    config.approx_mode = "dense"
    with pytest.raises(ContractError, match="approx_mode is 'dense'"):
        MraModel(config)


def test_relative_positions_are_accepted_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(configuration, "_warned_of_relative_positions", False)
    with caplog.at_level(logging.WARNING):
        for kind in ("relative_key", "relative_key_query", "absolute"):
            assert MraConfig(position_embedding_type=kind).position_embedding_type == kind
    assert len(caplog.messages) == 1
    assert "'relative_key' has no effect" in caplog.messages[0]
