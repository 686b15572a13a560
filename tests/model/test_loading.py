"""Checkpoints in both directions, of old and new releases of transformers, and every way one can be unfit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mra_export.errors import CheckpointError, ContractError
from mra_export.model import TASKS, MraForSequenceClassification, MraModel, load

NAMES = {task: model_class.__name__ for task, model_class in TASKS.items()}


def upstream(config: Any, name: str) -> Any:
    torch.manual_seed(0)
    values = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "transformers_version")}
    return getattr(transformers, name)(transformers.MraConfig(**values)).eval()


def assert_same_weights(a: Any, b: Any) -> None:
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_config: Callable[..., Any]) -> Path:
    """A masked-LM checkpoint that transformers wrote."""
    upstream(tiny_config(), "MraForMaskedLM").save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("task", TASKS)
def test_every_head_goes_to_transformers_and_back(task: str, tmp_path: Path, tiny_config: Any) -> None:
    theirs = upstream(tiny_config(num_labels=3, type_vocab_size=2), NAMES[task])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(str(tmp_path / "theirs"))
    assert type(ours) is TASKS[task]
    assert not ours.training
    assert_same_weights(ours, theirs)
    ours.save_pretrained(tmp_path / "ours")
    back, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert_same_weights(back, theirs)


@pytest.mark.parametrize("task", TASKS)
def test_a_base_checkpoint_starts_any_head(task: str, tmp_path: Path, tiny_config: Any) -> None:
    base = upstream(tiny_config(), "MraModel")
    base.save_pretrained(tmp_path)
    model = TASKS[task].from_pretrained(tmp_path)
    assert_same_weights(getattr(model, "mra", model), base)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("task", TASKS)
def test_pytorch_model_bin_of_transformers_4_37(task: str, tmp_path: Path, tiny_config: Any) -> None:
    """That release stored both constants of the embeddings and each tied weight under both of its names."""
    theirs = upstream(tiny_config(), NAMES[task])
    state = {name: value.clone() for name, value in theirs.state_dict().items()}
    prefix = "" if task == "feature-extraction" else "mra."
    assert f"{prefix}embeddings.position_ids" in state
    state[f"{prefix}embeddings.token_type_ids"] = torch.zeros(1, 128, dtype=torch.int64)
    torch.save(state, tmp_path / "pytorch_model.bin")
    values = {**theirs.config.to_dict(), "architectures": [NAMES[task]], "torch_dtype": "float32", "transformers_version": "4.37.2"}
    values |= {"gradient_checkpointing": False, "position_embedding_type": "absolute", "use_cache": True}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert_same_weights(load(tmp_path), theirs)
    # Neither constant is needed.
    for name in ("position_ids", "token_type_ids"):
        del state[f"{prefix}embeddings.{name}"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_same_weights(load(tmp_path), theirs)


@pytest.mark.slow
def test_the_oldest_supported_transformers(tmp_path: Path) -> None:
    old = os.environ.get("MRA_TEST_TRANSFORMERS_OLD")
    if not old or not Path(old).is_dir():
        pytest.skip("MRA_TEST_TRANSFORMERS_OLD names no folder with an old transformers")
    script = Path(__file__).with_name("old_transformers.py")
    package = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([old, str(package)])}
    command = [sys.executable, str(script), "4.51", str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    # What it wrote loads here and gives the same answer.
    torch.manual_seed(0)
    tokens = torch.randint(5, 100, (2, 2, 40))
    for task, name in NAMES.items():
        for writer in ("theirs", "ours"):
            model = load(tmp_path / name / writer)
            logits = model(tokens if task == "multiple-choice" else tokens[0])[0]
            torch.testing.assert_close(logits, torch.load(tmp_path / name / "logits.pt", weights_only=True), atol=1e-5, rtol=1e-5)


def test_the_dtype_asked_for_whatever_the_file_holds(checkpoint: Path, tmp_path: Path) -> None:
    load(checkpoint, dtype=torch.float16).save_pretrained(tmp_path / "half")
    assert load_file(tmp_path / "half" / "model.safetensors")["cls.predictions.transform.dense.weight"].dtype == torch.float16
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        model = load(tmp_path / "half", dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert model.mra.embeddings.position_ids.dtype == torch.int64
    torch.testing.assert_close(
        load(tmp_path / "half").mra.embeddings.word_embeddings.weight,
        load(checkpoint).get_input_embeddings().weight,
        atol=1e-3,
        rtol=1e-3,
    )


def test_feature_extraction_leaves_a_head_out(checkpoint: Path) -> None:
    model = load(checkpoint, task="feature-extraction")
    assert type(model) is MraModel
    assert_same_weights(model, load(checkpoint).mra)


def test_our_classes_leave_the_auto_classes_alone() -> None:
    assert type(transformers.AutoConfig.for_model("mra")) is transformers.MraConfig
    assert transformers.AutoModelForMaskedLM._model_mapping[transformers.MraConfig] is transformers.MraForMaskedLM


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "another model": (lambda f: edit_config(f, model_type="bert"), "model_type is 'bert'"),
    "no model type": (lambda f: (f / "config.json").write_text("{}"), "model_type is None"),
    "impossible config": (lambda f: edit_config(f, approx_mode="dense"), "approx_mode is 'dense'"),
    "no architecture": (lambda f: edit_config(f, architectures=None), r"architectures in config.json is \[\]: pass a task"),
    "unknown architecture": (lambda f: edit_config(f, architectures=["MraForCausalLM"]), "MraForCausalLM"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "truncated weights": (lambda f: truncate(f / "model.safetensors"), "weights cannot be read as MraForMaskedLM"),
    "weights are text": (lambda f: (f / "model.safetensors").write_text("not weights"), "weights cannot be read"),
    "a weight missing": (
        lambda f: edit_weights(f, lambda w: w.pop("mra.encoder.layer.1.attention.self.query.weight")),
        "mra.encoder.layer.1.attention.self.query.weight is missing for fill-mask",
    ),
    "a weight too many": (
        lambda f: edit_weights(f, lambda w: w.update(extra=torch.ones(1))),
        "extra is not part of fill-mask",
    ),
    "a weight of another shape": (
        lambda f: edit_weights(f, lambda w: w.update({"cls.predictions.transform.dense.weight": torch.ones(3, 3)})),
        "cls.predictions.transform.dense.weight is of another shape",
    ),
    "more layers promised": (lambda f: edit_config(f, num_hidden_layers=3), "and 11 more are missing"),
    "fewer layers promised": (lambda f: edit_config(f, num_hidden_layers=1), "are not part of fill-mask"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_with_the_reason(damage: str, checkpoint: Path) -> None:
    harm, message = DAMAGE[damage]
    harm(checkpoint)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(checkpoint)
    assert str(checkpoint) in str(caught.value)


def test_a_pickle_that_runs_code_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "ran"),))

    (checkpoint / "model.safetensors").unlink()
    torch.save({"weight": Payload()}, checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="weights cannot be read"):
        load(checkpoint)
    assert not (tmp_path / "ran").exists()


def test_a_task_the_checkpoint_was_not_trained_for_is_refused(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="are missing for question-answering"):
        load(checkpoint, task="question-answering")
    assert isinstance(MraForSequenceClassification.from_pretrained(checkpoint), MraForSequenceClassification)  # to fine-tune it


def test_wrong_arguments(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="task is 'translation': use auto or one of fill-mask, "):
        load(checkpoint, task="translation")
    with pytest.raises(ContractError, match=r"dtype is torch\.int8"):
        load(checkpoint, dtype=torch.int8)
    with pytest.raises(CheckpointError, match="no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no such folder"):
        load("../nowhere")
    with pytest.raises(CheckpointError, match="is a file"):
        load(checkpoint / "config.json")


def test_a_hub_id_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="somebody/no-such-model: no such folder, nor could the hub give it"):
        load("somebody/no-such-model")


def test_sharded_weights(checkpoint: Path, tmp_path: Path) -> None:
    model = load(checkpoint)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    assert_same_weights(load(tmp_path / "sharded"), model)
