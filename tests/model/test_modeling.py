"""The models: arguments, losses, errors, export, compile, training. Their numbers are checked in test_upstream.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mra_export.errors import ContractError
from mra_export.model import (
    TASKS,
    MraForMaskedLM,
    MraForMultipleChoice,
    MraForQuestionAnswering,
    MraForSequenceClassification,
    MraForTokenClassification,
    MraModel,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def ids(batch: int = 2, length: int = 70) -> Tensor:
    return torch.randint(5, 100, (batch, length))


def ragged(length: int, *real: int) -> Tensor:
    return (torch.arange(length)[None] < torch.tensor(real)[:, None]).long()


def call(task: str, model: Any, tokens: Tensor, mask: Tensor | None = None) -> Any:
    if task == "multiple-choice":
        return model(tokens[None], None if mask is None else mask[None])
    return model(tokens, mask)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [1, 33, 128])
def test_any_length_up_to_the_limit_for_every_task(task: str, length: int, tiny_config: Any) -> None:
    model = TASKS[task](tiny_config(num_labels=3)).eval()
    output = call(task, model, ids(2, length))
    shapes = {
        "fill-mask": (2, length, 100),
        "text-classification": (2, 3),
        "multiple-choice": (1, 2),
        "token-classification": (2, length, 3),
        "question-answering": (2, length),
        "feature-extraction": (2, length, 32),
    }
    assert output[0].shape == shapes[task]
    assert torch.isfinite(output[0]).all()


@pytest.mark.parametrize("task", TASKS)
def test_a_padding_invariant_model_ignores_the_rest_of_its_batch(task: str, tiny_config: Any) -> None:
    model = TASKS[task](tiny_config()).double().eval()
    model.set_padding_invariant(True)
    tokens, mask = ids(2, 100), ragged(100, 100, 40)
    together = call(task, model, tokens, mask)[0].reshape(2, -1)
    alone = call(task, model, tokens[1:, :40])[0].reshape(1, -1)
    torch.testing.assert_close(together[1:, : alone.shape[1]], alone, atol=1e-9, rtol=1e-9)


def test_without_padding_invariance_padding_counts_as_in_transformers(tiny_config: Any) -> None:
    model = MraModel(tiny_config(block_per_row=1)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("self.query.weight", "self.key.weight")):
                parameter.mul_(20)
    tokens = ids(1, 128)
    outputs = []
    for invariant in (False, True, False):
        model.set_padding_invariant(invariant)
        outputs.append(model(tokens, ragged(128, 90)).last_hidden_state)
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0][:, :90], outputs[1][:, :90], atol=1e-6)


def test_head_mask_removes_a_heads_context(tiny_config: Any) -> None:
    model = MraModel(tiny_config()).eval()
    tokens = ids()
    first = torch.tensor([[0.0, 1.0], [1.0, 0.5]])
    masked = model(tokens, head_mask=first).last_hidden_state
    assert not torch.allclose(masked, model(tokens).last_hidden_state, atol=1e-4)
    # The same by hand: the output projection reads head 0 from its first 16 columns.
    with torch.no_grad():
        model.encoder.layer[0].attention.output.dense.weight[:, :16] = 0
        model.encoder.layer[1].attention.output.dense.weight[:, 16:] *= 0.5
    torch.testing.assert_close(model(tokens).last_hidden_state, masked, atol=1e-5, rtol=1e-5)
    every_layer = model(tokens, head_mask=torch.tensor([0.0, 1.0]), output_hidden_states=True)
    twice = model(tokens, head_mask=torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    assert torch.equal(every_layer.last_hidden_state, twice.last_hidden_state)


def test_embeddings_positions_and_token_types_can_be_given(tiny_config: Any) -> None:
    model = MraModel(tiny_config(type_vocab_size=2)).eval()
    tokens = ids()
    expected = model(tokens).last_hidden_state
    torch.testing.assert_close(model(inputs_embeds=model.embeddings.word_embeddings(tokens)).last_hidden_state, expected)
    positions = torch.arange(2, 72)[None]
    torch.testing.assert_close(model(tokens, position_ids=positions).last_hidden_state, expected)
    assert not torch.allclose(model(tokens, position_ids=positions.flip(1)).last_hidden_state, expected, atol=1e-3)
    torch.testing.assert_close(model(tokens, token_type_ids=torch.zeros_like(tokens)).last_hidden_state, expected)
    assert not torch.allclose(model(tokens, token_type_ids=torch.ones_like(tokens)).last_hidden_state, expected, atol=1e-4)


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.float32])
def test_a_mask_of_any_type_means_the_same(kind: torch.dtype, tiny_config: Any) -> None:
    model = MraModel(tiny_config()).eval()
    tokens, mask = ids(), ragged(70, 70, 30)
    assert torch.equal(model(tokens, mask.to(kind))[0], model(tokens, mask)[0])
    assert torch.equal(model(tokens, torch.ones(2, 70).to(kind))[0], model(tokens)[0])


def test_hidden_states_and_tuples(tiny_config: Any) -> None:
    model = MraForMaskedLM(tiny_config()).eval()
    output = model(ids(), output_hidden_states=True)
    assert [state.shape for state in output.hidden_states] == [(2, 70, 32)] * 3
    assert model(ids()).hidden_states is None
    loss, logits, states = model(ids(), labels=ids(), output_hidden_states=True, return_dict=False)
    assert (loss.dim(), logits.shape, len(states)) == (0, (2, 70, 100), 3)
    model.config.return_dict = False
    assert isinstance(model(ids()), tuple)


def test_masked_lm_loss_ignores_minus_100(tiny_config: Any) -> None:
    model = MraForMaskedLM(tiny_config()).eval()
    tokens = ids()
    labels = torch.full_like(tokens, -100)
    labels[0, 5], labels[1, 7] = 11, 12
    output = model(tokens, labels=labels)
    log = output.logits.log_softmax(-1)
    torch.testing.assert_close(output.loss, -(log[0, 5, 11] + log[1, 7, 12]) / 2)


@pytest.mark.parametrize(
    ("values", "labels", "loss"),
    [
        ({"num_labels": 1}, torch.tensor([0.5, 2.0]), lambda x, y: functional.mse_loss(x[:, 0], y)),
        ({"num_labels": 1}, torch.tensor([[0.5], [2.0]]), functional.mse_loss),
        ({"num_labels": 3, "problem_type": "regression"}, torch.ones(2, 3), functional.mse_loss),
        ({"num_labels": 3}, torch.tensor([0, 2]), functional.cross_entropy),
        ({"num_labels": 3}, torch.tensor([[0.0, 1, 1], [1, 0, 0]]), functional.binary_cross_entropy_with_logits),
        (
            {"num_labels": 3, "problem_type": "multi_label_classification"},
            torch.tensor([[0, 1, 1], [1, 0, 0]]),
            lambda x, y: functional.binary_cross_entropy_with_logits(x, y.float()),
        ),
    ],
    ids=["regression", "regression-column", "regression-3", "single-label", "multi-label", "multi-label-int"],
)
def test_sequence_classification_losses(values: dict[str, Any], labels: Tensor, loss: Any, tiny_config: Any) -> None:
    model = MraForSequenceClassification(tiny_config(**values)).eval()
    output = model(ids(), labels=labels)
    torch.testing.assert_close(output.loss, loss(output.logits, labels))


def test_other_losses(tiny_config: Any) -> None:
    tokens, mask = ids(), ragged(70, 70, 30)
    model = MraForTokenClassification(tiny_config(num_labels=3)).eval()
    labels = torch.randint(3, (2, 70))
    output = model(tokens, mask, labels=labels)
    real = mask.bool()
    torch.testing.assert_close(output.loss, functional.cross_entropy(output.logits[real], labels[real]))

    model = MraForQuestionAnswering(tiny_config()).eval()
    output = model(tokens, start_positions=torch.tensor([3, 500]), end_positions=torch.tensor([[9], [10]]))
    start = functional.cross_entropy(output.start_logits[:1], torch.tensor([3]))  # 500 is outside the text
    torch.testing.assert_close(output.loss, (start + functional.cross_entropy(output.end_logits, torch.tensor([9, 10]))) / 2)

    model = MraForMultipleChoice(tiny_config()).eval()
    output = model(ids(6).view(2, 3, 70), labels=torch.tensor([2, 0]))
    torch.testing.assert_close(output.loss, functional.cross_entropy(output.logits, torch.tensor([2, 0])))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "neither of input_ids and inputs_embeds"),
        ({"input_ids": ids(), "inputs_embeds": torch.zeros(2, 70, 32)}, "both of input_ids and inputs_embeds"),
        ({"input_ids": ids(1, 129)}, "129 tokens long, max_position_embeddings 128"),
        ({"input_ids": ids()[0]}, r"input_ids has shape \(70,\)"),
        ({"input_ids": ids(0)}, "1 or more"),
        ({"inputs_embeds": torch.zeros(2, 70, 31)}, "hidden_size = 32"),
        ({"input_ids": ids(), "attention_mask": torch.ones(2, 69)}, r"attention_mask has shape \(2, 69\), the input \(2, 70\)"),
        ({"input_ids": ids(), "attention_mask": torch.ones(2, 1, 70, 70)}, "pass a mask of the same shape"),
        ({"input_ids": ids(), "token_type_ids": torch.zeros(2, 3, dtype=torch.int64)}, "token_type_ids has shape"),
        ({"input_ids": ids(), "head_mask": torch.ones(3)}, r"head_mask has shape \(3,\): pass \(2,\) or \(2, 2\)"),
        ({"input_ids": ids(), "output_attentions": True}, "never forms the attention matrix"),
    ],
)
def test_unusable_arguments_are_refused(arguments: dict[str, Tensor], message: str, tiny_config: Any) -> None:
    with pytest.raises(ContractError, match=message):
        MraModel(tiny_config())(**arguments)


def test_unusable_labels_are_refused(tiny_config: Any) -> None:
    with pytest.raises(ContractError, match=r"labels have shape \(2, 2\), logits \(2, 3\)"):
        MraForSequenceClassification(tiny_config(num_labels=3))(ids(), labels=torch.ones(2, 2))
    with pytest.raises(ContractError, match=r"input_ids has shape \(2, 70\): pass \(batch, choices, length\)"):
        MraForMultipleChoice(tiny_config())(ids())


def test_export_has_one_attention_node_a_layer_and_dynamic_axes(tiny_config: Any) -> None:
    model = MraForMaskedLM(tiny_config()).eval()
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=128)}
    example = (ids(), torch.ones(2, 70, dtype=torch.int64))
    program = torch.export.export(model, example, dynamic_shapes={"input_ids": axes, "attention_mask": axes}, strict=False)
    nodes = [node for node in program.graph.nodes if node.target is torch.ops.mra.attention.default]
    assert len(nodes) == 2
    for batch, length in ((1, 1), (3, 128)):
        tokens = ids(batch, length)
        mask = torch.ones_like(tokens)
        torch.testing.assert_close(program.module()(tokens, mask).logits, model(tokens, mask).logits)


def test_compile_makes_no_graph_break(tiny_config: Any) -> None:
    model = MraForSequenceClassification(tiny_config()).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (40, 70):
        tokens = ids(2, length)
        torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("reference", [False, True])
def test_fine_tuning_a_classifier(reference: bool, tiny_config: Any) -> None:
    """Does token 7 occur? Only attention can carry the answer to the first position."""
    model = MraForSequenceClassification(tiny_config(num_labels=2, max_position_embeddings=64, block_per_row=1)).train()
    model.set_reference_attention(reference)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(80):
        tokens = torch.randint(8, 100, (32, 48))
        labels = torch.arange(32) % 2
        tokens[labels == 1, 2 + step % 40 :: 5] = 7
        loss = model(tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.3 < losses[0], losses


def test_gradient_checkpointing_gives_the_same_gradients(tiny_config: Any) -> None:
    model = MraForMaskedLM(tiny_config()).train()
    tokens = ids()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.mra.encoder.gradient_checkpointing
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_float32(dtype: torch.dtype, tiny_config: Any) -> None:
    model = MraModel(tiny_config(block_per_row=4)).eval()
    tokens, mask = ids(), ragged(70, 70, 30)
    expected = model(tokens, mask).last_hidden_state
    actual = model.to(dtype)(tokens, mask).last_hidden_state
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected, atol=0.1, rtol=0.05)


def test_the_vocabulary_can_grow(tiny_config: Any) -> None:
    model = MraForMaskedLM(tiny_config()).eval()
    model.resize_token_embeddings(120)
    predictions = model.cls.predictions
    assert model(ids()).logits.shape == (2, 70, 120)
    assert predictions.decoder.weight is model.mra.embeddings.word_embeddings.weight
    assert predictions.decoder.bias is predictions.bias


def test_initial_weights(tiny_config: Any) -> None:
    model = MraForMaskedLM(tiny_config(initializer_range=0.5, hidden_size=64, vocab_size=1000))
    embeddings = model.mra.embeddings
    assert 0.48 < embeddings.word_embeddings.weight[2:].std() < 0.52
    assert not embeddings.word_embeddings.weight[1].any()  # padding
    assert 0.48 < model.mra.encoder.layer[0].intermediate.dense.weight.std() < 0.52
    assert not model.mra.encoder.layer[0].intermediate.dense.bias.any()
    assert embeddings.position_ids.tolist() == [list(range(2, 130))]
