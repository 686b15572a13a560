"""Export: every task's graph in plain ONNX Runtime against PyTorch, what the graph promises, and what is refused before work."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from processes import started
from transformers import BertConfig, BertModel

from mra_export import libraries
from mra_export.backends.onnx_runtime import session_options
from mra_export.bundle import GOLDEN, Bundle
from mra_export.contract import ATTRIBUTE_NAMES
from mra_export.errors import BundleError, CheckpointError, ContractError, PluginLoadError
from mra_export.export import export_bundle
from mra_export.model import TASKS, MraConfig, MraModel, load
from mra_export.presets import byte_tokenizer

CONFIG = {
    "vocab_size": 261,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.3,
    "num_labels": 3,
    "max_position_embeddings": 128,
    "block_per_row": 2,
}


@pytest.fixture(scope="module", autouse=True)
def op_library(tmp_path_factory):
    """An export copies the op library without looking into it; where it is not built, any file will do for these tests."""
    with pytest.MonkeyPatch.context() as patch:
        if libraries.find("ort_ops") is None:
            folder = tmp_path_factory.mktemp("lib")
            (folder / "libmra_ort.so").write_bytes(b"not built")
            patch.setenv("MRA_EXPORT_LIBRARY_DIR", str(folder))
        yield


def make_model(task: str = "fill-mask", **values):
    torch.manual_seed(0)
    return TASKS[task](MraConfig(**{**CONFIG, **values})).eval()


@pytest.fixture(scope="module")
def exported(op_library, tmp_path_factory) -> Path:
    """The bundle of make_model() with all defaults, for tests that only read it."""
    return export_bundle(make_model(), tmp_path_factory.mktemp("exported") / "bundle")


@pytest.fixture
def old_bundle(exported, tmp_path) -> Path:
    """A copy of it at tmp_path / "bundle"."""
    shutil.copytree(exported, tmp_path / "bundle")
    return tmp_path / "bundle"


def session(bundle: Path, library: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    if library is not None:
        options.register_custom_ops_library(str(library))
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(bundle / "model.onnx"), options, providers=["CPUExecutionProvider"])


def random_inputs(model, batch: int, length: int, choices: int = 0, seed: int = 0):
    rng = np.random.default_rng(seed)
    shape = (batch, choices, length) if choices else (batch, length)
    mask = np.ones(shape, np.int64)
    for row in range(1, batch):
        mask[row, ..., length - row * length // 4 :] = 0
    inputs = {"input_ids": rng.integers(0, model.config.vocab_size, shape), "attention_mask": mask}
    if model.config.type_vocab_size > 1:
        inputs["token_type_ids"] = rng.integers(0, model.config.type_vocab_size, shape)
    return inputs


def torch_outputs(model, inputs):
    model.set_reference_attention(True)
    with torch.inference_mode():
        result = model.float()(**{name: torch.from_numpy(array) for name, array in inputs.items()}, return_dict=True)
    return {name: value.numpy() for name, value in result.items()}


OUTPUTS = {
    "fill-mask": {"logits": ["batch", "sequence", 261]},
    "text-classification": {"logits": ["batch", 3]},
    "multiple-choice": {"logits": ["batch", "choices"]},
    "token-classification": {"logits": ["batch", "sequence", 3]},
    "question-answering": {"start_logits": ["batch", "sequence"], "end_logits": ["batch", "sequence"]},
    "feature-extraction": {"last_hidden_state": ["batch", "sequence", 64]},
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_agrees_with_torch_at_any_length_and_batch(task, tmp_path):
    types = 2 if task in ("question-answering", "multiple-choice") else 1
    model = make_model(task, type_vocab_size=types, hidden_act="gelu_new" if task == "text-classification" else "gelu")
    bundle = Bundle.load(export_bundle(model, tmp_path / "bundle", task=task))
    manifest = bundle.manifest
    assert (manifest.task, manifest.model.architecture) == (task, type(model).__name__)
    assert {tensor.name: tensor.axes for tensor in manifest.outputs} == OUTPUTS[task]

    run = session(bundle.path)
    assert {entry.name: entry.shape for entry in run.get_outputs()} == OUTPUTS[task]
    names = ["input_ids", "attention_mask"] + ["token_type_ids"] * (types > 1)
    assert [(entry.name, entry.type) for entry in run.get_inputs()] == [(name, "tensor(int64)") for name in names]
    assert [tensor.name for tensor in manifest.inputs] == names
    axes = ["batch", "choices", "sequence"] if task == "multiple-choice" else ["batch", "sequence"]
    assert all(entry.shape == axes for entry in run.get_inputs())

    for batch, length, choices in ((1, 1, 1), (3, 33, 2), (1, 128, 3), (2, 100, 5)):
        inputs = random_inputs(model, batch, length, choices if task == "multiple-choice" else 0)
        expected = torch_outputs(model, inputs)
        for name, array in zip(OUTPUTS[task], run.run(None, inputs), strict=True):
            assert array.shape == expected[name].shape
            np.testing.assert_allclose(array, expected[name], rtol=0, atol=2e-4)


def test_the_reference_evaluator_agrees(exported):
    inputs = random_inputs(make_model(), 2, 100)
    (array,) = onnx.reference.ReferenceEvaluator(str(exported / "model.onnx")).run(None, inputs)
    np.testing.assert_allclose(array, torch_outputs(make_model(), inputs)["logits"], rtol=0, atol=2e-4)


def test_the_op_library_agrees(exported):
    library = exported / "lib" / "libmra_ort.so"
    if library.read_bytes() == b"not built":
        pytest.skip("libmra_ort.so is not built")
    inputs = random_inputs(make_model(), 2, 100)
    (array,) = session(exported, library).run(None, inputs)
    np.testing.assert_allclose(array, torch_outputs(make_model(), inputs)["logits"], rtol=0, atol=2e-4)


def test_attention_is_not_lost(exported):
    run = session(exported)
    inputs = random_inputs(make_model(), 1, 100)
    before = run.run(None, inputs)[0]
    inputs["input_ids"][0, 0] += 1
    assert np.abs(run.run(None, inputs)[0] - before)[0, 1:].max() > 1e-3


@pytest.mark.parametrize("opset", [18, 20, 23])
def test_the_graph(opset, tmp_path):
    model = make_model(num_hidden_layers=3, initial_prior_first_n_blocks=1, approx_mode="sparse")
    bundle = Bundle.load(export_bundle(model, tmp_path / "bundle", opset=opset, padding_invariant=True))
    graph = onnx.load(bundle.file("model.onnx"))
    onnx.checker.check_model(graph, full_check=True)
    assert {entry.domain: entry.version for entry in graph.opset_import} == {"": opset, "mra": 1}
    assert graph.ir_version == {18: 8, 20: 9, 23: 11}[opset], "the lowest that the opset allows: old runtimes load it"
    assert [(function.domain, function.name) for function in graph.functions] == [("mra", "MraAttention")]

    nodes = [node for node in graph.graph.node if node.op_type == "MraAttention"]
    assert [node.name for node in nodes] == [f"/mra/encoder/layer.{index}/attention/self/MraAttention" for index in range(3)]
    for node in nodes:
        attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert set(attributes) == {*ATTRIBUTE_NAMES, "plugin_version", "plugin_namespace"}
        assert attributes["plugin_version"] == b"1"
        assert attributes["plugin_namespace"] == b""
        wanted = model.config.attributes(padding_invariant=True)
        assert attributes["scale"] == np.float32(wanted.scale)
        assert attributes["approx_mode"] == b"sparse"
        assert attributes["padding_invariant"] == 1
        assert (attributes["num_heads"], attributes["num_blocks"]) == (wanted.num_heads, wanted.num_blocks)
        assert attributes["initial_prior_first_n_blocks"] == 1
    assert bundle.manifest.attributes == model.config.attributes(padding_invariant=True).as_dict()

    # One mask, int32, cast once; no Transpose on either side of the operator.
    assert len({node.input[3] for node in nodes}) == 1
    producers = {output: node for node in graph.graph.node for output in node.output}
    cast = producers[nodes[0].input[3]]
    assert (cast.op_type, cast.attribute[0].i) == ("Cast", TensorProto.INT32)
    for node in nodes:
        assert all(producers[name].op_type != "Transpose" for name in node.input)
        assert all(other.op_type != "Transpose" for other in graph.graph.node if node.output[0] in other.input)

    # Every node is named by its place, and nothing of this machine is in the file.
    names = Counter(node.name for node in graph.graph.node)
    assert max(names.values()) == 1
    assert "/mra/encoder/layer.2/output/LayerNorm/LayerNormalization" in names
    assert "mra.encoder.layer.0.attention.self.query.weight" in {tensor.name for tensor in graph.graph.initializer}
    assert b".py" not in bundle.file("model.onnx").read_bytes()

    inferred = onnx.shape_inference.infer_shapes(graph, check_type=True, strict_mode=True)
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in inferred.graph.value_info
    }
    assert all(shapes[node.output[0]] == ["batch", "sequence", 64] for node in nodes)


def optimized(bundle: Path, target: Path, options: onnxruntime.SessionOptions) -> Counter[str]:
    """How often each operator is in the graph that ONNX Runtime makes of the bundle's."""
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(bundle / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(target).graph.node)


@pytest.mark.parametrize("opset", [18, 20])
def test_onnxruntime_fuses_what_is_faster_fused(opset, tmp_path):
    if libraries.find("ort_ops") is None:
        pytest.skip("libmra_ort.so is not built")
    bundle = export_bundle(make_model("feature-extraction"), tmp_path / "bundle", task="feature-extraction", opset=opset)
    library = bundle / "lib" / "libmra_ort.so"

    # ONNX Runtime's own choice: each feed-forward layer's bias and GELU, and every residual with its bias and normalisation.
    usual = onnxruntime.SessionOptions()
    usual.register_custom_ops_library(str(library))
    found = optimized(bundle, tmp_path / "usual.onnx", usual)
    assert (found["BiasGelu"], found["SkipLayerNormalization"], found["LayerNormalization"]) == (2, 4, 1)
    assert (found["MatMul"], found["MraAttention"], found["Gelu"], found["Erf"]) == (12, 2, 0, 0)
    assert found["Add"] == 2 * 3 + 2, "the biases of query, key and value, and the embeddings"

    # Ours: without SkipLayerNormalization, which is slower than its parts.
    found = optimized(bundle, tmp_path / "ours.onnx", session_options(library))
    assert (found["BiasGelu"], found["SkipLayerNormalization"], found["LayerNormalization"]) == (2, 0, 5)

    # The mask and the positions are made once, whatever the number of layers.
    assert all(found[name] <= 1 for name in ("Cast", "Equal", "Not", "Shape", "Slice")), found
    assert found["Gather"] == 2


def test_rows_of_the_feed_forward_layers_do_not_share_cache_sets(tmp_path):
    model = make_model(intermediate_size=1024, hidden_size=64)
    with torch.no_grad():
        for layer in model.mra.encoder.layer:
            torch.nn.init.normal_(layer.intermediate.dense.bias)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bundle = Bundle.load(export_bundle(model, tmp_path / "bundle"))
    shapes = {tensor.name: list(tensor.dims) for tensor in onnx.load(bundle.file("model.onnx")).graph.initializer}
    for index in range(2):
        layer = f"mra.encoder.layer.{index}"
        assert shapes[f"{layer}.intermediate.dense.weight"] == [64, 1040], "16 columns more than 4096 bytes"
        assert shapes[f"{layer}.intermediate.dense.bias"] == [1040]
        assert shapes[f"{layer}.output.dense.weight"] == [1040, 64]
    inputs = random_inputs(model, 2, 100)
    (array,) = session(bundle.path).run(None, inputs)
    np.testing.assert_allclose(array, torch_outputs(model, inputs)["logits"], rtol=0, atol=2e-4)

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the caller's model"
    stored = load(bundle.path, dtype=torch.float32).state_dict()
    assert all(torch.equal(stored[name], value) for name, value in before.items()), "the checkpoint in the bundle, too"

    half = Bundle.load(export_bundle(model, tmp_path / "half", dtype="fp16"))
    assert [1040] not in [list(tensor.dims) for tensor in onnx.load(half.file("model.onnx")).graph.initializer]


@pytest.mark.parametrize(("dtype", "element"), [("fp16", TensorProto.FLOAT16), ("bf16", TensorProto.BFLOAT16)])
def test_half_precision(dtype, element, tmp_path):
    model = make_model(initializer_range=0.05)
    bundle = Bundle.load(export_bundle(model, tmp_path / "bundle", dtype=dtype))
    graph = onnx.load(bundle.file("model.onnx"))
    assert graph.graph.output[0].type.tensor_type.elem_type == element
    assert {tensor.data_type for tensor in graph.graph.initializer} == {element, TensorProto.INT64}
    assert model.dtype == torch.float32, "the caller's model is left as it was"
    stored = load(bundle.path, dtype=torch.float32)
    assert torch.equal(
        stored.mra.encoder.layer[0].output.dense.weight,
        model.mra.encoder.layer[0].output.dense.weight.to({"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]).float(),
    )
    # Golden outputs are float32 arithmetic on the rounded weights.
    for inputs, outputs in zip(*bundle.golden(), strict=True):
        assert outputs["logits"].dtype == np.float32
        np.testing.assert_allclose(outputs["logits"], torch_outputs(stored, inputs)["logits"], rtol=0, atol=1e-5)
        if dtype == "fp16":
            (array,) = session(bundle.path).run(None, inputs)
            assert array.dtype == np.float16
            np.testing.assert_allclose(array, outputs["logits"], rtol=0, atol=2e-2)


def test_padding_invariance(tmp_path):
    run = session(export_bundle(make_model(), tmp_path / "bundle", padding_invariant=True))
    alone = random_inputs(make_model(), 1, 50)
    padded = {name: np.pad(array, [(0, 2), (0, 70)]) for name, array in alone.items()}
    padded["attention_mask"][1:] = 1
    np.testing.assert_allclose(run.run(None, padded)[0][:1, :50], run.run(None, alone)[0], rtol=0, atol=1e-5)


def test_a_checkpoint_folder_with_its_tokenizer(tmp_path):
    make_model().save_pretrained(tmp_path / "checkpoint")
    byte_tokenizer(128).save_pretrained(tmp_path / "checkpoint")
    bundle = Bundle.load(export_bundle(tmp_path / "checkpoint", tmp_path / "bundle"))
    assert bundle.file("tokenizer.json").read_bytes() == (tmp_path / "checkpoint" / "tokenizer.json").read_bytes()
    inputs, outputs = bundle.golden()
    assert [batch["input_ids"].shape for batch in inputs] == [(1, 1), (2, 33), (3, 100), (2, 128)]
    assert inputs[2]["attention_mask"].sum(1).tolist() == [100, 57, 1]
    assert inputs[1]["input_ids"][0, 0] == 0, "the text starts with <s>"
    assert (inputs[1]["input_ids"][1, 20:] == 1).all(), "padding is <pad>"
    assert bytes(byte_tokenizer(128).decode(inputs[1]["input_ids"][0, 1:8]), "utf-8").startswith(b"A river")
    for batch, answer in zip(inputs, outputs, strict=True):
        np.testing.assert_allclose(answer["logits"], torch_outputs(make_model(), batch)["logits"], rtol=0, atol=1e-5)
    assert bundle.manifest.source == str(tmp_path / "checkpoint")
    assert json.loads(bundle.file("config.json").read_text())["architectures"] == ["MraForMaskedLM"]
    assert {"torch", "onnx", "transformers", "mra_export"} <= bundle.manifest.versions.keys()
    load(bundle.path)  # the bundle is a checkpoint, too


def test_a_model_whose_folder_is_gone_has_no_tokenizer(tmp_path):
    make_model().save_pretrained(tmp_path / "checkpoint")
    model = load(tmp_path / "checkpoint")
    shutil.rmtree(tmp_path / "checkpoint")
    steps = []
    bundle = Bundle.load(export_bundle(model, tmp_path / "bundle", progress=steps.append))
    assert "tokenizer: the checkpoint has none" in steps
    assert not [name for name in bundle.manifest.files if "token" in name]


def test_a_head_can_be_left_out(tmp_path):
    make_model("text-classification").save_pretrained(tmp_path / "checkpoint")
    bundle = Bundle.load(export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", task="feature-extraction"))
    assert (bundle.manifest.task, bundle.manifest.model.architecture) == ("feature-extraction", "MraModel")
    assert type(load(bundle.path)) is MraModel


def test_without_weights(tmp_path):
    bundle = Bundle.load(export_bundle(make_model(), tmp_path / "bundle", weights=False))
    with pytest.raises(BundleError, match=r"has no file model\.safetensors"):
        bundle.file("model.safetensors")
    session(bundle.path)


def test_weights_above_the_limit_get_a_file_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("mra_export.onnx_model._SINGLE_FILE_LIMIT", 10_000)
    model = make_model()
    bundle = Bundle.load(export_bundle(model, tmp_path / "bundle"))
    assert bundle.file("model.onnx.data").stat().st_size > 10_000
    inputs = random_inputs(model, 1, 40)
    np.testing.assert_allclose(session(bundle.path).run(None, inputs)[0], torch_outputs(model, inputs)["logits"], rtol=0, atol=2e-4)
    (bundle.path / "model.onnx.data").write_bytes(b"")
    with pytest.raises(BundleError, match=r"model\.onnx\.data is truncated"):
        Bundle.load(bundle.path)


def test_check_sees_the_bundle_and_its_rows_are_kept(tmp_path):
    seen, steps = [], []

    def check(folder: Path):
        seen.append((folder, Bundle.load(folder).manifest.parity))
        assert not (tmp_path / "bundle").exists()
        return [{"backend": "torch", "status": "pass"}]

    export_bundle(make_model(), tmp_path / "bundle", check=check, progress=steps.append)
    assert seen[0][1] is None
    assert seen[0][0].parent == tmp_path
    assert Bundle.load(tmp_path / "bundle").manifest.parity == [{"backend": "torch", "status": "pass"}]
    assert any("checkpoint" in step for step in steps)
    assert any("opset 20" in step for step in steps)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def failing_check(folder: Path):
    raise RuntimeError("parity")


def test_a_failed_check_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="parity"):
        export_bundle(make_model(), tmp_path / "bundle", check=failing_check)
    assert list(tmp_path.iterdir()) == []


def test_an_old_bundle_is_replaced_by_force_and_by_a_good_one_only(old_bundle):
    before = (old_bundle / "manifest.json").read_bytes()
    with pytest.raises(BundleError, match="pass --force"):
        export_bundle(make_model(), old_bundle)
    with pytest.raises(RuntimeError, match="parity"):
        export_bundle(make_model(), old_bundle, dtype="fp16", force=True, check=failing_check)
    assert (old_bundle / "manifest.json").read_bytes() == before
    export_bundle(make_model(), old_bundle, dtype="fp16", force=True)
    assert Bundle.load(old_bundle).manifest.dtype == "fp16"
    assert [path.name for path in old_bundle.parent.iterdir()] == ["bundle"]


def test_a_killed_export_leaves_nothing_that_loads(tmp_path):
    make_model().save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "out").mkdir()
    script = f"""
import time
from mra_export.export import export_bundle
def check(folder):
    print("checking", flush=True)
    time.sleep(60)
export_bundle({str(tmp_path / "checkpoint")!r}, {str(tmp_path / "out" / "bundle")!r}, check=check)
"""
    with started([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "checking\n"
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    assert not (tmp_path / "out" / "bundle").exists()
    for left in (tmp_path / "out").iterdir():
        with pytest.raises(BundleError, match="is not a complete bundle"):
            Bundle.load(left)


REFUSED = [
    ({"dtype": "fp64"}, ContractError, "dtype is 'fp64': use one of fp32, fp16, bf16"),
    ({"opset": 17}, ContractError, "opset is 17: use 18 to 23"),
    ({"opset": 24}, ContractError, "opset is 24: use 18 to 23"),
    ({"task": "translation"}, ContractError, "task is 'translation': use auto or one of fill-mask"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED)
def test_bad_arguments_are_refused_before_any_work(arguments, error, message, tmp_path):
    start = time.perf_counter()
    with pytest.raises(error, match=message):
        export_bundle("no/such-checkpoint", tmp_path / "bundle", **arguments)
    assert time.perf_counter() - start < 1
    assert list(tmp_path.iterdir()) == []


def test_a_taken_place_is_refused_before_the_checkpoint_is_read(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(BundleError, match=r"holds notes\.txt"):
            export_bundle("no/such-checkpoint", tmp_path, force=force)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_missing_op_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MRA_EXPORT_LIBRARY_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(PluginLoadError, match=r"libmra_ort\.so is not in .*nowhere"):
        export_bundle("no/such-checkpoint", tmp_path / "bundle")


def test_checkpoints_that_do_not_fit(tmp_path):
    make_model("feature-extraction").save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"classifier\..* missing for text-classification"):
        export_bundle(tmp_path / "base", tmp_path / "bundle", task="text-classification")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    (tmp_path / "bert" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="model_type is 'bert'"):
        export_bundle(tmp_path / "bert", tmp_path / "bundle")
    with pytest.raises(CheckpointError, match="no such folder"):
        export_bundle(str(tmp_path / "nowhere"), tmp_path / "bundle")
    with pytest.raises(
        CheckpointError, match="model is a MraForMaskedLM, task 'text-classification' needs a MraForSequenceClassification"
    ):
        export_bundle(make_model(), tmp_path / "bundle", task="text-classification")
    bert = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50))
    with pytest.raises(CheckpointError, match="save it with save_pretrained"):
        export_bundle(bert, tmp_path / "bundle")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "bert"]


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    make_model(vocab_size=50).save_pretrained(tmp_path / "checkpoint")
    byte_tokenizer(128).save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="vocab_size is 50: put the model's own tokenizer there"):
        export_bundle(tmp_path / "checkpoint", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_model_with_reference_attention_still_exports_its_operator(tmp_path):
    model = make_model()
    model.set_reference_attention(True)
    bundle = Bundle.load(export_bundle(model, tmp_path / "bundle"))
    graph = onnx.load(bundle.file("model.onnx"))
    assert sum(node.op_type == "MraAttention" for node in graph.graph.node) == model.config.num_hidden_layers
    assert all(module.reference_attention for module in model.modules() if hasattr(module, "reference_attention"))


def test_a_graph_that_lost_its_attention_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "mra_export.model.modeling.MraSelfAttention.forward", lambda self, hidden, mask, head_mask: self.value(hidden)
    )
    with pytest.raises(ContractError, match="the exported graph has 0 MraAttention nodes, the model 2 layers"):
        export_bundle(make_model(), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [GOLDEN, "model.onnx", "model.safetensors", "config.json", "lib/libmra_ort.so"])
def test_every_file_is_hashed(old_bundle, name):
    content = bytearray((old_bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (old_bundle / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name} is altered"):
        Bundle.load(old_bundle)
