"""examples/train_tiny.py in pieces and as a whole, and the checkpoint that it made."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from transformers import AutoTokenizer
from transformers import MraForMaskedLM as UpstreamMaskedLM

from mra_export.model import MraForMaskedLM

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "examples" / "mra-tiny-python"


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_tiny", ROOT / "examples" / "train_tiny.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_tiny"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


tt: Any = _script()


@pytest.fixture(scope="module")
def texts() -> list[Any]:
    return tt.documents()


@pytest.fixture(scope="module")
def small_tokenizer() -> Any:
    return tt.train_tokenizer([Path(tt.__file__).read_text()] * 2, 400)


@pytest.fixture
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------ text


def test_documents_are_sources_and_topics_in_order(texts: list[Any]) -> None:
    names = [document.name for document in texts]
    assert names == sorted(names)
    assert len(set(names)) == len(names)
    assert {"ast.py", "json/decoder.py", "pydoc_data/topics.py#assert"} <= set(names)
    assert not [name for name in names if {"test", "tests", "site-packages", "encodings"} & set(name.split("/"))]
    assert "pydoc_data/topics.py" not in names


@pytest.mark.parametrize(
    ("path", "out"),
    [
        ("ast.py", False),
        ("json/decoder.py", False),
        ("unittest/case.py", False),
        ("test/test_ast.py", True),
        ("sqlite3/test/a.py", True),
        ("site-packages/torch/nn.py", True),
        ("_sysconfigdata__linux_x86_64-linux-gnu.py", True),
        ("config-3.11-x86_64-linux-gnu/python-config.py", True),
    ],
)
def test_excluded(path: str, out: bool) -> None:
    assert tt.excluded(Path(path)) is out


def test_the_split_depends_on_names_alone(texts: list[Any]) -> None:
    held = {document.name for document in texts if document.held_out}
    assert held == {document.name for document in texts if tt.Document(document.name, "other text").held_out}
    assert 0.01 < len(held) / len(texts) < 0.08


def test_a_broken_source_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_bytes(b"x = '\xff'\n")
    with pytest.raises(tt.click.ClickException, match=r"bad\.py"):
        tt.documents(tmp_path)


# ---------------------------------------------------------------------------------- tokenizer and batches


def test_tokenizer_round_trip_and_specials(small_tokenizer: Any, tmp_path: Path) -> None:
    tt.save_tokenizer(small_tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    text = "def f(x):\n    return {'é': x ** 2}  # 雪\n"
    ids = loaded(text)["input_ids"]
    assert ids[0] == tt.BOS
    assert ids[-1] == tt.EOS
    assert tt.UNK not in ids
    assert loaded.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text
    assert loaded.convert_tokens_to_ids(list(tt.SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    assert (loaded.bos_token_id, loaded.pad_token_id, loaded.eos_token_id, loaded.mask_token_id) == (0, 1, 2, 4)
    assert loaded("import <mask>")["input_ids"][-2] == tt.MASK
    assert json.loads((tmp_path / "special_tokens_map.json").read_text())["mask_token"] == "<mask>"


def test_windows_hold_the_stream_between_specials() -> None:
    tokens = torch.arange(100, 1100)
    rows = tt.all_windows(tokens, 128)
    assert rows.shape == (7, 128)
    assert torch.equal(rows[:, 1:-1].flatten(), tokens[: 7 * 126])
    generator = torch.Generator().manual_seed(0)
    rows = tt.random_windows(tokens[:127], 50, 128, generator)  # two places only: the first and the last
    assert set(rows[:, 1].tolist()) == {100, 101}
    assert set(rows[:, 0].tolist()) == {tt.BOS}
    assert set(rows[:, -1].tolist()) == {tt.EOS}
    assert bool((rows[:, 1:-1].diff(dim=1) == 1).all())


def test_corruption_is_80_10_10_and_spares_specials() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 5000, (64, 512), generator=generator)
    tokens[:, 0], tokens[:, -1], tokens[:, 200] = tt.BOS, tt.EOS, tt.PAD
    chosen = tt.choose(tokens, 0.15, generator)
    assert not chosen[tokens < 5].any()
    assert float(chosen.double().mean()) == pytest.approx(0.15, abs=0.01)
    corrupted = tt.corrupt(tokens, chosen, 5000, generator)
    assert torch.equal(corrupted[~chosen], tokens[~chosen])
    masked = float((corrupted[chosen] == tt.MASK).double().mean())
    kept = float((corrupted[chosen] == tokens[chosen]).double().mean())
    assert masked == pytest.approx(0.8, abs=0.02)
    assert kept == pytest.approx(0.1, abs=0.02)
    assert int(corrupted.min()) >= 0
    assert int(corrupted.max()) < 5000


def test_rates_and_lengths_over_the_training() -> None:
    rates = [tt.rate_factor(i / 1000) for i in range(1001)]
    assert rates[0] == 0
    assert max(rates) == 1
    assert rates[-1] == 0
    assert all(0 <= rate <= 1 for rate in rates)
    lengths = [tt.phase(i / 1000)[0] for i in range(1001)]
    assert lengths == sorted(lengths)
    assert set(lengths) == {32, tt.SHORT, tt.LONG}


# --------------------------------------------------------------------------------------------- training


def test_exact_attention_is_the_model_at_the_short_length() -> None:
    torch.manual_seed(0)
    model = tt.build_model(300).eval()
    tt.wave_positions(model)
    tokens = torch.randint(5, 300, (2, tt.SHORT))
    with torch.no_grad():
        model.set_reference_attention(True)
        expected = model(input_ids=tokens).logits
        with tt.exact_attention(model):
            exact = model(input_ids=tokens).logits
        assert torch.equal(model(input_ids=tokens).logits, expected)  # undone
    torch.testing.assert_close(exact, expected, atol=2e-4, rtol=0)


def test_a_snapshot_resumes_where_it_was(tmp_path: Path, two_threads: None) -> None:
    def trainer() -> Any:
        torch.manual_seed(0)
        return tt.Trainer(tt.build_model(300), torch.arange(2000) % 295 + 5, seed=1, train_mask_rate=0.3, steps=12, minutes=None)

    straight = trainer()
    losses = [straight.train_step() for _ in range(4)]
    halfway = trainer()
    assert [halfway.train_step() for _ in range(2)] == losses[:2]
    halfway.save(tmp_path / "deep" / "snapshot.pt")
    resumed = trainer()
    resumed.load(tmp_path / "deep" / "snapshot.pt")
    assert resumed.step == 2
    assert [resumed.train_step() for _ in range(2)] == losses[2:]
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["snapshot.pt"]


def test_training_learns(two_threads: None) -> None:
    torch.manual_seed(0)
    tokens = torch.tensor([7, 11, 11, 9] * 500)
    trainer = tt.Trainer(tt.build_model(300), tokens, seed=0, train_mask_rate=0.3, steps=30, minutes=None)
    losses = [trainer.train_step() for _ in range(12)]
    assert losses[-1] < 0.5 * losses[0]


def test_interruption_keeps_a_snapshot_and_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tt.Trainer(tt.build_model(300), torch.arange(2000) % 295 + 5, 0, 0.3, steps=5, minutes=None)

    def interrupted() -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "train_step", interrupted)
    with pytest.raises(tt.click.ClickException, match=r"--resume"):
        tt.train(trainer, tmp_path / "snapshot.pt", every_seconds=60)
    assert (tmp_path / "snapshot.pt").exists()


def test_the_command_writes_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two_threads: None) -> None:
    text = Path(tt.__file__).read_text()
    names = ["a.py", "b.py", "c.py", next(f"{i}.py" for i in range(1000) if tt.Document(f"{i}.py", "").held_out)]
    monkeypatch.setattr(tt, "documents", lambda: [tt.Document(name, text) for name in names])
    out = tmp_path / "out"
    common = ["--out", str(out), "--work", str(tmp_path / "work"), "--vocab-size", "400", "--evaluation-rows", "8"]
    result = CliRunner().invoke(tt.main, [*common, "--steps", "2"])
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {"out", "work"}
    assert "2 steps" in (out / "README.md").read_text()
    _loads_upstream(out)
    # An early end is said so, and replaces the folder.
    result = CliRunner().invoke(tt.main, [*common, "--resume", "--minutes", "0"])
    assert result.exit_code == 0, result.output
    assert "Ended early" in (out / "README.md").read_text()


def test_the_command_refuses(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    for arguments, message in (
        (["--out", str(tmp_path)], "not a checkpoint"),
        (["--out", str(tmp_path / "new"), "--resume", "--work", str(tmp_path)], "snapshot.pt"),
        (["--out", str(tmp_path / "new"), "--steps", "1", "--minutes", "1"], "pass one of them"),
    ):
        result = CliRunner().invoke(tt.main, arguments)
        assert result.exit_code == 2
        assert message in " ".join(result.output.replace("│", " ").split())
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# ------------------------------------------------------------------------------------ what the repository ships


def _loads_upstream(folder: Path) -> Any:
    model, info = UpstreamMaskedLM.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert model.dtype == torch.float32
    return model


@pytest.fixture(scope="module")
def shipped() -> Any:
    return MraForMaskedLM.from_pretrained(CHECKPOINT, dtype=torch.float32, local_files_only=True).eval()


@pytest.fixture(scope="module")
def held_out(texts: list[Any]) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT, local_files_only=True)
    return tt.stream(tokenizer, [document.text for document in texts if document.held_out])


def test_shipped_folder_is_small_and_float16() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 12e6
    assert {path.name for path in CHECKPOINT.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as weights:
        dtypes = {weights.get_tensor(name).dtype for name in weights.keys()}  # noqa: SIM118
    assert dtypes - {torch.int64} == {torch.float16}
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert config["architectures"] == ["MraForMaskedLM"]


def test_shipped_model_has_its_size(shipped: Any) -> None:
    config = shipped.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (4, 256, 4)
    assert (config.intermediate_size, config.max_position_embeddings, config.block_per_row) == (1024, 512, 4)
    assert config.attributes().num_blocks == 64


def test_shipped_loads_in_transformers_with_every_key(shipped: Any) -> None:
    upstream = _loads_upstream(CHECKPOINT).state_dict()
    for name, weight in shipped.state_dict().items():
        assert torch.equal(weight, upstream[name]), name


def test_shipped_accuracy_is_what_its_readme_says(shipped: Any, held_out: torch.Tensor, two_threads: None) -> None:
    """On a part of the held-out text, so within some points; and it is attention that does it."""
    said = {
        name: float(share) / 100
        for name, share in re.findall(r"\| (length [^|]+) \| \d+ \| ([\d.]+)% \|", (CHECKPOINT / "README.md").read_text())
    }
    for length, count in ((tt.SHORT, 96), (tt.LONG, 24)):
        rows = tt.all_windows(held_out, length)[:: max(1, len(tt.all_windows(held_out, length)) // count)][:count]
        unigram = tt.unigram_accuracy(held_out, rows)
        right = tt.accuracy(shipped, rows)
        assert right == pytest.approx(said[f"length {length}"], abs=0.08)  # another Python has other texts
        assert right > 3 * unigram
        assert right > 1.5 * tt.accuracy(tt.without_attention(shipped), rows)


def test_shipped_fills_a_mask(shipped: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT, local_files_only=True)
    inputs = tokenizer("def f(self, name):\n    if name is <mask>:\n        return None\n", return_tensors="pt")
    with torch.no_grad():
        logits = shipped(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    place = int((inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero())
    assert " None" in [tokenizer.decode([token]) for token in logits[0, place].topk(5).indices.tolist()]
