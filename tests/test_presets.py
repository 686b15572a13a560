"""Random checkpoints of the published shapes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from mra_export.errors import BundleError, ContractError
from mra_export.model import load
from mra_export.presets import PRESETS, init_checkpoint


def test_tiny_is_a_checkpoint_with_a_tokenizer(tmp_path):
    state = torch.random.get_rng_state()
    folder = init_checkpoint("tiny", tmp_path / "made" / "tiny", seed=3)
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers go on as before"
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    model = load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "naïve <mask> 漢字\n\t\x00"
    ids = tokenizer(text)["input_ids"]
    assert (ids[0], ids[-1]) == (0, 2)
    assert tokenizer.mask_token_id in ids
    assert max(ids) < model.config.vocab_size
    assert tokenizer.decode(tokenizer("naïve 漢字\n")["input_ids"], skip_special_tokens=True) == "naïve 漢字\n"
    assert model(input_ids=torch.tensor([ids])).logits.shape == (1, len(ids), 261)


def test_the_seed_decides(tmp_path):
    first, again, other = (
        load_file(init_checkpoint("tiny", tmp_path / name, seed=seed) / "model.safetensors")
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    name = "mra.encoder.layer.0.attention.self.query.weight"
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize(("preset", "expected"), [("base-512-4", (512, 4, 0, 0, 64)), ("base-4096-8-d3", (4096, 8, 3, 1, 1024))])
def test_published_shapes(preset, expected, tmp_path):
    folder = init_checkpoint(preset, tmp_path / "base", num_hidden_layers=1)
    config = load(folder).config
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size, config.vocab_size) == (768, 12, 3072, 50265)
    assert config.num_hidden_layers == 1
    attributes = config.attributes()
    assert (
        config.max_position_embeddings,
        config.block_per_row,
        attributes.initial_prior_first_n_blocks,
        attributes.initial_prior_diagonal_n_blocks,
        attributes.num_blocks,
    ) == expected
    assert "byte-level" in (folder / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(folder).model_max_length == config.max_position_embeddings


def test_refusals(tmp_path):
    with pytest.raises(ContractError, match=f"preset is 'huge': use one of {', '.join(PRESETS)}"):
        init_checkpoint("huge", tmp_path / "x")
    with pytest.raises(ContractError, match="seed is -1"):
        init_checkpoint("tiny", tmp_path / "x", seed=-1)
    with pytest.raises(ContractError, match="num_hidden_layers is -1"):
        init_checkpoint("tiny", tmp_path / "x", num_hidden_layers=-1)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match="taken already exists"):
        init_checkpoint("tiny", tmp_path / "taken")
    with pytest.raises(BundleError, match="cannot be written to"):
        init_checkpoint("tiny", "/proc/tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    def fail(model, folder):
        raise OSError("disk full")

    monkeypatch.setattr("mra_export.presets.save_checkpoint", fail)
    with pytest.raises(OSError, match="disk full"):
        init_checkpoint("tiny", tmp_path / "tiny")
    assert list(tmp_path.iterdir()) == []
