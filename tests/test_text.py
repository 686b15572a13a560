"""Tokenizers of every kind a bundle may hold, and the step from logits to answers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from exported import checkpoint

from mra_export.errors import BundleError, ContractError
from mra_export.text import Tokenizer, answer_span, class_scores, fill_mask, has_tokenizer, read_labels, token_labels


@pytest.fixture
def folder(tmp_path):
    return checkpoint(tmp_path / "checkpoint")


def test_texts_are_padded_at_the_end_and_masked(folder) -> None:
    inputs = Tokenizer(folder).encode(["ab", "abcd"], 256)
    assert inputs["input_ids"].shape == (2, 6)
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert (inputs["input_ids"][0, 4:] == 1).all()
    assert all(array.dtype == np.int64 for array in inputs.values())


def test_it_gives_what_transformers_gives(folder) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer(folder)
    for text in ("for i in range(<mask>):\n", "naïve 漢字", "a"):
        assert ours.encode([text], 256)["input_ids"][0].tolist() == theirs(text)["input_ids"]
    assert ours.encode(["a b"], 256, ["c"])["input_ids"][0].tolist() == theirs("a b", "c")["input_ids"]
    assert (ours.mask_token, ours.mask_id) == (theirs.mask_token, theirs.mask_token_id)


def test_the_mask_token_is_found_without_a_configuration_file(folder) -> None:
    (folder / "tokenizer_config.json").unlink()
    assert Tokenizer(folder).mask_token == "<mask>"


def test_vocabulary_files_alone_are_read_through_transformers(folder) -> None:
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    expected = Tokenizer(folder).encode(["a <mask>"], 256)["input_ids"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert not has_tokenizer(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    assert has_tokenizer(folder)
    tokenizer = Tokenizer(folder)
    assert tokenizer.mask_token == "<mask>"
    found = tokenizer.encode(["a <mask>"], 256)["input_ids"]
    assert found[0, 0] == expected[0, 0] == 0
    assert tokenizer.mask_id in found


def test_a_tokenizer_that_is_missing_or_broken_is_named(folder) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"the tokenizer in .* cannot be read"):
        Tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match="has no tokenizer"):
        Tokenizer(folder)


def test_a_text_that_is_too_long_is_refused_and_can_be_cut(folder) -> None:
    tokenizer = Tokenizer(folder)
    with pytest.raises(ContractError, match="has 302 tokens, the model takes 256: shorten it"):
        tokenizer.encode(["x" * 300], 256)
    assert len(tokenizer.encode([tokenizer.cut("x" * 300, 256)], 256)["input_ids"][0]) == 256
    assert tokenizer.cut("short", 256) == "short"


def test_fill_mask_takes_the_likeliest_at_each_mask(folder) -> None:
    tokenizer = Tokenizer(folder)
    logits = np.zeros((2, 261), np.float16)
    for row, letter in enumerate("zy"):
        logits[row, tokenizer.encode([letter], 256)["input_ids"][0, 1]] = 10
    best = fill_mask(tokenizer, logits)
    assert [masks[0]["token"] for masks in best] == ["z", "y"]
    assert len(best[0]) == 5
    assert best[0][0]["score"] == pytest.approx(np.exp(10) / (np.exp(10) + 260), rel=1e-6)


def test_class_scores() -> None:
    scores = class_scores(np.array([0.0, 2.0, 1.0]), {0: "a", 1: "b"})
    assert [entry["label"] for entry in scores] == ["b", "LABEL_2", "a"]
    assert sum(entry["score"] for entry in scores) == pytest.approx(1)
    assert class_scores(np.array([3.5]), {0: "stars"}) == [{"label": "stars", "score": 3.5}]


def test_token_labels_leave_special_tokens_out() -> None:
    logits = np.eye(4, 2)
    found = token_labels("ab", [(0, 0), (0, 1), (1, 2), (0, 0)], logits, {0: "X", 1: "Y"})
    assert [(token["token"], token["label"]) for token in found] == [("a", "Y"), ("b", "X")]


def test_the_answer_is_the_likeliest_span_inside_the_context_in_order() -> None:
    sources = [None, 0, None, *[1] * 40, None]
    offsets = [(0, 0), (0, 3), (0, 0), *[(i, i + 1) for i in range(40)], (0, 0)]
    context = "".join(chr(65 + i % 26) for i in range(40))
    start, end = np.zeros(44), np.zeros(44)
    start[[1, 5]], end[[2, 4, 8]] = [50, 9], [50, 9, 8]  # the question is likelier, and 4 lies before 5
    found = answer_span(context, sources, offsets, start, end)
    assert (found["answer"], found["start"], found["end"]) == (context[2:6], 2, 6)
    far = answer_span(context, sources, offsets, np.where(np.arange(44) == 3, 20.0, 0), np.where(np.arange(44) == 42, 20.0, 0))
    assert far["end"] - far["start"] <= 30


def test_labels_come_from_the_configuration(folder, tmp_path) -> None:
    (folder / "config.json").write_text('{"id2label": {"0": "good", "1": "bad"}}')
    assert read_labels(folder) == {0: "good", 1: "bad"}
    (folder / "config.json").write_text("no json")
    with pytest.raises(BundleError, match=r"config\.json is not JSON"):
        read_labels(folder)
    assert read_labels(tmp_path) == {}
