"""transformers' own MRA, run on a CPU, against ours: same weights, same outputs, and its known defects beside our answers.

Its four CUDA primitives are supplied here in plain torch. Blocks of a sparse product are stored key-major: tile[key, query].
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import mra_export.model as ours
from mra_export.contract import Attributes, attention_scale
from mra_export.model.attention import mra_attention

transformers = pytest.importorskip("transformers")
upstream = pytest.importorskip("transformers.models.mra.modeling_mra")

HEADS = (
    "MraModel",
    "MraForMaskedLM",
    "MraForSequenceClassification",
    "MraForMultipleChoice",
    "MraForTokenClassification",
    "MraForQuestionAnswering",
)
# Upstream's eps is not relative to a token's own largest weight, so an exact copy in float64 still differs by about 1e-6.
TOLERANCE = {torch.float64: 5e-6, torch.float32: 5e-5}


def _pick(blocks: Tensor, index: Tensor) -> Tensor:
    """blocks: (b, n, ...), index: (b, K) -> (b, K, ...)."""
    return blocks[torch.arange(len(blocks))[:, None], index.long()]


def index_max(values: Tensor, indices: Tensor, query_blocks: int, key_blocks: int) -> tuple[Tensor, Tensor]:
    """values: (b, 32, K), each chosen block's maximum for its 32 queries -> (b, N) row maxima, and (b, 32, K) those spread back."""
    row = torch.div(indices, key_blocks, rounding_mode="floor").long()[:, None].expand_as(values)
    start = values.new_full((len(values), 32, query_blocks), -1e5)
    maximum = start.scatter_reduce(2, row, values.detach(), "amax")
    return maximum.transpose(1, 2).flatten(1), maximum.gather(2, row)


def mm_to_sparse(query: Tensor, key: Tensor, indices: Tensor) -> Tensor:
    """query, key: (b, blocks, D, 32); indices: (b, K) -> (b, K, 32 keys, 32 queries)."""
    count = key.shape[1]
    return _pick(key, indices % count).transpose(-1, -2) @ _pick(query, torch.div(indices, count, rounding_mode="floor"))


def sparse_dense_mm(tiles: Tensor, indices: Tensor, key: Tensor, query_blocks: int) -> Tensor:
    """tiles: (b, K, 32 keys, 32 queries); key: (b, blocks, D, 32) -> (b, query_blocks, D, 32)."""
    count = key.shape[1]
    products = _pick(key, indices % count) @ tiles
    row = torch.div(indices, count, rounding_mode="floor").long()[:, :, None, None].expand_as(products)
    return products.new_zeros(len(key), query_blocks, *key.shape[2:]).scatter_add(1, row, products)


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """transformers' module with working primitives, computing in its inputs' precision."""
    primitives = SimpleNamespace(index_max=index_max, mm_to_sparse=mm_to_sparse, sparse_dense_mm=sparse_dense_mm)
    monkeypatch.setattr(upstream, "mra_cuda_kernel", primitives)
    narrow = torch.Tensor.float  # it calls .float() on whatever it is given
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x.double() if torch.get_default_dtype() == torch.float64 else narrow(x))
    return upstream


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> Any:
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def pair(theirs: ModuleType, head: str, **values: Any) -> tuple[Any, Any]:
    """The same weights in both; queries and keys are enlarged, so that block selection is as uneven as after training."""
    settings = {
        "vocab_size": 100,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 256,
        "block_per_row": 2,
        "hidden_dropout_prob": 0.0,
        "num_labels": 3,
        "type_vocab_size": 2,
        **values,
    }
    torch.manual_seed(0)
    model = getattr(theirs, head)(transformers.MraConfig(**settings)).to(torch.get_default_dtype()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("self.query.weight", "self.key.weight")):
                parameter.mul_(4)
            elif "bias" in name:
                parameter.normal_(std=0.1)
    copy = getattr(ours, head)(ours.MraConfig(**settings)).to(torch.get_default_dtype()).eval()
    assert copy.load_state_dict(model.state_dict()) is not None  # strict: raises for a missing or unexpected key
    copy.set_reference_attention(True)
    return model, copy


def tokens(batch: int, length: int, vocabulary: int = 100) -> Tensor:
    return torch.randint(5, vocabulary, (batch, length), generator=torch.Generator().manual_seed(batch + length))


def padding_mask(length: int, *real: int) -> Tensor:
    return (torch.arange(length)[None] < torch.tensor(real)[:, None]).long()


def assert_same(actual: Any, expected: Any) -> None:
    assert list(actual.keys()) == list(expected.keys())
    tolerance = TOLERANCE[torch.get_default_dtype()]
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, atol=tolerance, rtol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("head", HEADS)
def test_every_head_with_losses_and_hidden_states(theirs: ModuleType, head: str, dtype: torch.dtype) -> None:
    model, copy = pair(theirs, head)
    labels: dict[str, dict[str, Tensor]] = {
        "MraModel": {},
        "MraForMaskedLM": {"labels": tokens(2, 256).masked_fill(torch.rand(2, 256) < 0.8, -100)},
        "MraForSequenceClassification": {"labels": torch.tensor([0, 2])},
        "MraForMultipleChoice": {"labels": torch.tensor([0])},
        "MraForTokenClassification": {"labels": torch.randint(3, (2, 256))},
        "MraForQuestionAnswering": {"start_positions": torch.tensor([3, 7]), "end_positions": torch.tensor([9, 300])},
    }
    ids = tokens(2, 256)
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": ids % 2}
    if head == "MraForMultipleChoice":
        arguments = {name: value[None] for name, value in arguments.items()}
    arguments |= labels[head]
    assert_same(copy(**arguments, output_hidden_states=True), model(**arguments, output_hidden_states=True))
    for a, b in zip(copy(**arguments, return_dict=False), model(**arguments, return_dict=False), strict=True):
        torch.testing.assert_close(a, b, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    "values",
    [
        {"approx_mode": "sparse"},
        {"initial_prior_first_n_blocks": 1, "initial_prior_diagonal_n_blocks": 2},
        {"initial_prior_diagonal_n_blocks": 1, "approx_mode": "sparse"},
        {"num_attention_heads": 8},  # heads of 8, which upstream pads to 32
        {"hidden_act": "gelu_new", "block_per_row": 8},
        {"position_embedding_type": "relative_key"},
    ],
    ids=lambda values: "-".join(map(str, values.values())),
)
def test_modes_priors_and_head_sizes_with_and_without_padding(
    theirs: ModuleType, values: dict[str, Any], dtype: torch.dtype
) -> None:
    model, copy = pair(theirs, "MraModel", **values)
    batch = {"input_ids": tokens(2, 256), "attention_mask": torch.ones(2, 256, dtype=torch.int64)}
    assert_same(copy(**batch), model(**batch))
    alone = {"input_ids": tokens(1, 256), "attention_mask": padding_mask(256, 150)}
    assert_same(copy(**alone), model(**alone))


@pytest.mark.parametrize("dtype", [torch.float64], indirect=True)
@pytest.mark.parametrize(
    ("length", "values"),
    [
        (512, {"max_position_embeddings": 512, "block_per_row": 4}),
        (
            1536,
            {
                "max_position_embeddings": 4096,
                "block_per_row": 8,
                "initial_prior_first_n_blocks": 3,
                "initial_prior_diagonal_n_blocks": 1,
            },
        ),
    ],
    ids=["base-512-4", "base-4096-8-d3"],
)
def test_the_published_configurations(theirs: ModuleType, length: int, values: dict[str, Any], dtype: torch.dtype) -> None:
    """Two of their twelve layers, a smaller vocabulary and feed-forward: what shapes attention is as published."""
    model, copy = pair(theirs, "MraModel", hidden_size=768, num_attention_heads=12, vocab_size=1000, **values)
    ids = tokens(1, length, 1000)
    mask = padding_mask(length, length - 100)
    with torch.no_grad():
        assert_same(copy(ids, attention_mask=mask), model(ids, attention_mask=mask))


@pytest.mark.parametrize("dtype", [torch.float64], indirect=True)
def test_gradients(theirs: ModuleType, dtype: torch.dtype) -> None:
    ids = tokens(2, 256)
    gradients = []
    for model in pair(theirs, "MraForMaskedLM"):
        model(ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[1].items():
        torch.testing.assert_close(
            gradients[0][name], expected, atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("dtype", [torch.float64], indirect=True)
def test_defect_rows_of_a_ragged_batch_read_each_others_mask(theirs: ModuleType, dtype: torch.dtype) -> None:
    model, copy = pair(theirs, "MraModel", num_hidden_layers=1)
    ids, reals = tokens(3, 128), (128, 70, 33)
    mask = padding_mask(128, *reals)
    theirs_together, ours_together = (m(ids, attention_mask=mask).last_hidden_state for m in (model, copy))
    wrong = 0
    for row, real in enumerate(reals):
        alone = model(ids[row : row + 1], attention_mask=mask[row : row + 1]).last_hidden_state[0, :real]
        torch.testing.assert_close(ours_together[row, :real], alone, atol=5e-6, rtol=5e-6)
        wrong += not torch.allclose(theirs_together[row, :real], alone, atol=1e-3)
    assert wrong, "upstream repeats the mask correctly now: update docs/operator.md"


@pytest.mark.parametrize("dtype", [torch.float64], indirect=True)
@pytest.mark.parametrize("length", [64, 100])
def test_defect_short_and_odd_lengths_fail(theirs: ModuleType, length: int, dtype: torch.dtype) -> None:
    model, copy = pair(theirs, "MraModel")
    ids = tokens(1, length)
    with pytest.raises((RuntimeError, ValueError)):
        model(ids)
    assert copy(ids).last_hidden_state.shape == (1, length, 64)
    # What upstream gives the same tokens padded to a length it can run is what we give them at that length.
    padded = torch.nn.functional.pad(ids, (0, 256 - length), value=1)
    mask = padding_mask(256, length)
    a, b = (m(padded, attention_mask=mask).last_hidden_state[:, :length] for m in (copy, model))
    torch.testing.assert_close(a, b, atol=5e-6, rtol=5e-6)


def test_defect_without_its_cuda_kernels_attention_is_zero() -> None:
    query = torch.randn(1, 2, 64, 32)
    assert not upstream.mra2_attention(query, query, query, torch.ones(2, 64), 4, "full").any()


@pytest.mark.parametrize("dtype", [torch.float64], indirect=True)
def test_defect_weights_far_below_the_maximum_vanish(theirs: ModuleType, dtype: torch.dtype) -> None:
    """A full budget is exact attention here; there, masked keys count as logit 0, and a token whose logits are all -40 gets 0."""
    query = torch.ones(1, 1, 64, 32)
    key = -query * 40 / 32**0.5
    mask = padding_mask(64, 40)
    value = torch.randn(1, 1, 64, 32)
    attributes = Attributes(1, 4, attention_scale(32))
    context = mra_attention(query[0], key[0], value[0], mask, attributes)
    torch.testing.assert_close(context[0, 0], value[0, 0, :40].mean(0), atol=1e-5, rtol=1e-5)
    assert theirs.mra2_attention(query, key, value, mask.double(), 4, "full")[0, 0, 0].abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64], indirect=True)
def test_the_trained_checkpoint_on_real_text(theirs: ModuleType, dtype: torch.dtype) -> None:
    """Trained attention is far from even, which random weights never are."""
    folder = Path(__file__).parents[2] / "examples" / "mra-tiny-python"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"{folder} is not there: examples/train_tiny.py makes it")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(Path(__file__).read_text(), return_tensors="pt", truncation=True, max_length=512)
    ids, mask = batch["input_ids"], padding_mask(512, 470)
    assert ids.shape == (1, 512)
    copy = ours.load(folder, dtype=torch.float64)
    copy.set_reference_attention(True)
    model = theirs.MraForMaskedLM.from_pretrained(folder).double().eval()
    with torch.no_grad():
        assert_same(copy(ids, attention_mask=mask), model(ids, attention_mask=mask))
