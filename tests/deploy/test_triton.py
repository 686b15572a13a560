"""`mra-export triton`: every config.pbtxt is one of Triton's, every file it names is there, and what would not run is refused."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from engines import ENGINE, PLAN, bring_plugin, rewrite, state, with_engines

from mra_export import kernel, libraries
from mra_export.bundle import MODEL, OP_LIBRARY, Bundle
from mra_export.cli import main
from mra_export.errors import BackendError, BundleError, ContractError, EngineError, PluginLoadError
from mra_export.serve import pbtxt
from mra_export.serve.triton import MANIFEST, TritonOptions, write_repository


def model_config(file: Path) -> Any:
    """config.pbtxt as Triton's own message; unknown fields and wrong types do not parse."""
    from google.protobuf import text_format

    proto = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    return text_format.Parse(file.read_text(), proto.ModelConfig())


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["triton", *map(str, arguments)])


# What is written


@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8", "answers", "choices", "classes", "tokens", "features"])
@pytest.mark.parametrize("backend", ["onnxruntime", "python"])
def test_every_config_is_one_of_tritons_and_says_what_the_bundle_says(bundles, tmp_path, kind, backend) -> None:
    bundle = Bundle.load(bundles(kind))
    options = TritonOptions(backend, instances=2, max_batch_size=16, max_delay_ms=1.5, max_queue=7, threads=1)
    assert write_repository(bundle, tmp_path / "repository", options).models == ["mra"]
    config = model_config(tmp_path / "repository" / "mra" / "config.pbtxt")
    assert (config.name, config.backend, config.max_batch_size) == ("mra", backend, 16)
    types = {"int64": "TYPE_INT64", "float32": "TYPE_FP32", "float16": "TYPE_FP16"}
    named = config.DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_number
    for written, tensors in ((config.input, bundle.manifest.inputs), (config.output, bundle.manifest.outputs)):
        for tensor, original in zip(written, tensors, strict=True):
            assert tensor.name == original.name
            assert named[tensor.data_type].name == types[original.dtype]
            assert list(tensor.dims) == [axis if isinstance(axis, int) else -1 for axis in original.axes[1:]]
    assert config.dynamic_batching.max_queue_delay_microseconds == 1500
    assert config.dynamic_batching.default_queue_policy.max_queue_size == 7
    assert config.version_policy.latest.num_versions == 1
    group = config.instance_group[0]
    assert (group.count, group.Kind.Name(group.kind)) == (2, "KIND_CPU")
    assert config.parameters["intra_op_thread_count" if backend == "onnxruntime" else "threads"].string_value == "1"
    assert all(tensor.allow_ragged_batch for tensor in config.input) is (backend == "python")


def test_warm_up_requests_are_golden_rows(bundles, tmp_path) -> None:
    bundle = Bundle.load(bundles("choices"))
    write_repository(bundle, tmp_path / "repository", TritonOptions("onnxruntime"))
    config = model_config(tmp_path / "repository" / "mra" / "config.pbtxt")
    golden = bundle.golden()[0]
    assert len(config.model_warmup) == len(golden)
    for sample, batch in zip(config.model_warmup, golden, strict=True):
        assert set(sample.inputs) == set(batch)
        for name, tensor in sample.inputs.items():
            raw = (tmp_path / "repository" / "mra" / "warmup" / tensor.input_data_file).read_bytes()
            np.testing.assert_array_equal(np.frombuffer(raw, "<i8").reshape(tensor.dims), batch[name][0])


def test_onnx_runtime_gets_graph_and_op_library(bundles, tmp_path) -> None:
    import onnxruntime

    bundle = Bundle.load(bundles("fp32"))
    target = tmp_path / "repository"
    write_repository(bundle, target, TritonOptions("onnxruntime", mount=str(target), name="my.model-1"))
    config = model_config(target / "my.model-1" / "config.pbtxt")
    options = onnxruntime.SessionOptions()
    for library in config.model_operations.op_library_filename:
        options.register_custom_ops_library(library)
    graph = target / "my.model-1" / "1" / config.default_model_filename
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    inputs, outputs = (side[1] for side in bundle.golden())
    np.testing.assert_allclose(session.run(["logits"], inputs)[0], outputs["logits"], atol=1e-4)

    write_repository(bundle, tmp_path / "plain", TritonOptions("onnxruntime", op_library=False, device="cuda"))
    plain = model_config(tmp_path / "plain" / "mra" / "config.pbtxt")
    assert not plain.model_operations.op_library_filename
    assert plain.instance_group[0].Kind.Name(plain.instance_group[0].kind) == "KIND_GPU"
    assert [path.name for path in (tmp_path / "plain" / "mra" / "1").iterdir()] == [MODEL]


def test_on_a_gpu_the_op_library_must_have_its_kernel(bundles, tmp_path, monkeypatch) -> None:
    bundle = Bundle.load(bundles("fp32"))
    monkeypatch.setattr(kernel, "has_cuda", lambda path: path != bundle.file(OP_LIBRARY))
    with pytest.raises(BackendError, match=r"libmra_ort\.so has no CUDA kernel for ONNX Runtime: export again"):
        write_repository(bundle, tmp_path / "repository", TritonOptions("onnxruntime", device="cuda"))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(kernel, "has_cuda", lambda path: path == bundle.file(OP_LIBRARY))
    write_repository(bundle, tmp_path / "repository", TritonOptions("onnxruntime", device="cuda"))
    config = model_config(tmp_path / "repository" / "mra" / "config.pbtxt")
    assert len(config.model_operations.op_library_filename) == 1
    assert config.instance_group[0].Kind.Name(config.instance_group[0].kind) == "KIND_GPU"


def test_tensorrt_gets_the_engine_its_profiles_and_its_batch(bundles, tmp_path) -> None:
    bundle = with_engines(
        bundles("fp32"), tmp_path / "bundle", ENGINE, {**ENGINE, "file": "engines/rtx.plan", "backend": "tensorrt-rtx"}
    )
    write_repository(bundle, tmp_path / "repository", TritonOptions("tensorrt"))
    config = model_config(tmp_path / "repository" / "mra" / "config.pbtxt")
    assert (tmp_path / "repository" / "mra" / "1" / config.default_model_filename).read_bytes() == b"a plan"
    assert config.max_batch_size == 16
    assert list(config.instance_group[0].profile) == ["0", "1"]
    assert config.instance_group[0].Kind.Name(config.instance_group[0].kind) == "KIND_GPU"
    assert len(config.model_warmup) == 4
    readme = (tmp_path / "repository" / "README.md").read_text()
    assert "--backend-config=tensorrt,version-compatible=true" in readme
    assert "10.14.1.48" in readme
    assert "--gpus all" in readme

    files = {path.name for path in (tmp_path / "repository" / "mra" / "1").iterdir()}
    assert files == {"model.plan"}, "the plan brings its plugin"
    assert "plugins=" not in readme

    narrow = {**ENGINE, "profiles": ENGINE["profiles"][1:], "plugin": None, "plugin_layers": 0}
    write_repository(rewrite(tmp_path / "bundle", PLAN, engines=[narrow]), tmp_path / "narrow", TritonOptions("tensorrt"))
    config = model_config(tmp_path / "narrow" / "mra" / "config.pbtxt")
    assert [sample.inputs["input_ids"].dims[0] for sample in config.model_warmup] == [100, 256], "shapes the engine takes"
    readme = (tmp_path / "narrow" / "README.md").read_text()
    assert "version-compatible" not in readme
    assert "plugins=" not in readme


def test_an_engine_that_needs_its_plugin_gets_it_and_what_registers_it(bundles, tmp_path) -> None:
    bundle = bring_plugin(with_engines(bundles("fp32"), tmp_path / "bundle"), b"a plugin library")
    write_repository(bundle, tmp_path / "repository", TritonOptions("tensorrt", name="tiny", mount="/srv/models"))
    version = tmp_path / "repository" / "tiny" / "1"
    assert {path.name for path in version.iterdir()} == {"model.plan", "libmra_trt.so", "libmra_trt_register.so"}
    assert (version / "libmra_trt.so").read_bytes() == b"a plugin library"
    assert (version / "libmra_trt_register.so").read_bytes() == libraries.require("trt_register").read_bytes()
    readme = (tmp_path / "repository" / "README.md").read_text()
    path = "/srv/models/tiny/1/libmra_trt_register.so"
    assert readme.count(f"tritonserver --model-repository=/srv/models --backend-config=tensorrt,plugins={path}\n```") == 2
    assert f"`env LD_PRELOAD={path} tritonserver --model-repository=/srv/models`" in readme
    assert "version-compatible" not in readme


def test_a_plugin_that_is_missing_or_of_another_build_is_refused(bundles, tmp_path, monkeypatch) -> None:
    bundle = bring_plugin(with_engines(bundles("fp32"), tmp_path / "bundle"), b"a plugin library")
    target = tmp_path / "repository"
    with monkeypatch.context() as patch:
        patch.setenv(libraries.DIRECTORY_VARIABLE, str(tmp_path))
        with pytest.raises(PluginLoadError, match=r"libmra_trt_register\.so is not in .*pip install"):
            write_repository(bundle, target, TritonOptions("tensorrt"))
    (bundle.path / "lib" / "libmra_trt.so").write_bytes(b"another library.")
    with pytest.raises(BundleError, match=r"libmra_trt\.so is altered"):
        write_repository(bundle, target, TritonOptions("tensorrt"))
    with pytest.raises(EngineError, match=r"was built with another lib/libmra_trt\.so .*mra-export engine"):
        write_repository(rewrite(bundle.path), target, TritonOptions("tensorrt"))
    (bundle.path / "lib" / "libmra_trt.so").unlink()
    with pytest.raises(PluginLoadError, match=r"holds no lib/libmra_trt\.so, which .* needs: mra-export engine"):
        write_repository(rewrite(bundle.path), target, TritonOptions("tensorrt"))
    assert not target.exists()


def test_the_ensemble_joins_tokenizer_and_model(bundles, tmp_path) -> None:
    bundle = Bundle.load(bundles("tokens"))
    written = write_repository(bundle, tmp_path / "repository", TritonOptions("onnxruntime", tokenizer=True))
    assert written.models == ["mra", "mra-tokenizer", "mra-text"]
    configs = {name: model_config(tmp_path / "repository" / name / "config.pbtxt") for name in written.models}
    names = {
        name: {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in config.output} for name, config in configs.items()
    }
    assert names["mra-text"] == {**names["mra-tokenizer"], **names["mra"]}
    for step in configs["mra-text"].ensemble_scheduling.step:
        used = configs[step.model_name]
        assert set(step.input_map) == {tensor.name for tensor in used.input}
        assert set(step.output_map) == {tensor.name for tensor in used.output}
    assert (tmp_path / "repository" / "mra-text" / "1").is_dir()


def test_bfloat16_comes_as_float32_from_our_own_runtime(bundles, tmp_path) -> None:
    write_repository(Bundle.load(bundles("bf16")), tmp_path / "repository", TritonOptions("python"))
    config = model_config(tmp_path / "repository" / "mra" / "config.pbtxt")
    assert config.output[0].data_type == config.DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_name["TYPE_FP32"].number


def test_the_copied_bundle_is_a_bundle_and_the_list_of_files_is_complete(bundles, tmp_path) -> None:
    write_repository(Bundle.load(bundles("fp32")), tmp_path / "repository", TritonOptions("python", tokenizer=True))
    assert Bundle.load(tmp_path / "repository" / "mra" / "1" / "bundle").manifest == Bundle.load(bundles("fp32")).manifest
    listed = set(json.loads((tmp_path / "repository" / MANIFEST).read_text())["files"])
    there = {str(path.relative_to(tmp_path / "repository")) for path in (tmp_path / "repository").rglob("*") if path.is_file()}
    assert there == listed | {MANIFEST}


# Overwriting


def test_force_replaces_a_repository_and_nothing_else(bundles, tmp_path) -> None:
    target = tmp_path / "repository"
    assert call(bundles("fp32"), target, "--backend", "python").exit_code == 0
    first = state(target)
    again = call(bundles("fp32"), target, "--backend", "onnxruntime")
    assert again.exit_code == 4
    assert "already holds a Triton model repository: pass --force" in again.output
    assert state(target) == first
    assert call(bundles("fp32"), target, "--backend", "onnxruntime", "--name", "other", "--force").exit_code == 0
    assert not (target / "mra").exists()
    (target / "notes.txt").write_text("mine")
    refused = call(bundles("fp32"), target, "--backend", "python", "--force")
    assert refused.exit_code == 4
    assert "holds notes.txt, which no Triton model repository lists" in refused.output
    shutil.copytree(bundles("fp32"), tmp_path / "bundle")
    assert call(bundles("fp32"), tmp_path / "bundle", "--backend", "python", "--force").exit_code == 4
    assert Bundle.load(tmp_path / "bundle")


def test_a_write_that_fails_leaves_what_was_there(bundles, tmp_path, monkeypatch) -> None:
    target = tmp_path / "repository"
    bundle = Bundle.load(bundles("fp32"))
    write_repository(bundle, target, TritonOptions("python"))
    before = state(tmp_path)
    copies = itertools.count()
    copy = shutil.copyfile

    def full(source: Path, destination: Path) -> None:
        if next(copies) == 3:
            raise OSError(28, "No space left on device")
        copy(source, destination)

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space"):
        write_repository(bundle, target, TritonOptions("python"), force=True)
    assert state(tmp_path) == before


# What is refused


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        ("bf16", {"backend": "onnxruntime"}, BackendError, "use --backend python"),
        ("bf16", {"backend": "python", "runtime": "onnxruntime"}, BackendError, "no bfloat16 MatMul"),
        ("int8", {"backend": "onnxruntime", "device": "cuda"}, BackendError, "use --device cpu"),
        ("int8", {"backend": "tensorrt"}, EngineError, "no engine is built from an int8 graph"),
        ("int8-dynamic", {"backend": "onnxruntime"}, ContractError, "pass --max-batch-size 1"),
        ("fp32", {"backend": "tensorrt"}, EngineError, "has no engine: build one with `mra-export engine"),
        ("fp32", {"backend": "tensorrt", "device": "cpu"}, BackendError, "runs on device 'cuda' only"),
        ("answers", {"backend": "python", "tokenizer": True}, ContractError, "this bundle's is question-answering"),
    ],
)
def test_a_bundle_that_does_not_fit_is_refused_and_nothing_is_left(bundles, tmp_path, kind, options, error, message) -> None:
    with pytest.raises(error, match=message):
        write_repository(Bundle.load(bundles(kind)), tmp_path / "new" / "repository", TritonOptions(**options))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"backend": "tensorrt-rtx"}], {}, "TensorRT-RTX engines only"),
        ([{}, {"file": "engines/b.plan"}], {}, "has 2 TensorRT engines: pass one of"),
        ([{}], {"engine": "c.plan"}, "no TensorRT engine c.plan"),
        ([{}], {"max_batch_size": 17}, "pass 16 or less"),
    ],
)
def test_engines_that_do_not_fit(bundles, tmp_path, rows, options, message) -> None:
    bundle = with_engines(bundles("fp32"), tmp_path / "bundle", *({**ENGINE, **row} for row in rows))
    with pytest.raises(EngineError, match=message):
        write_repository(bundle, tmp_path / "repository", TritonOptions("tensorrt", **options))


def test_a_bundle_without_op_library_or_tokenizer(bundles, tmp_path) -> None:
    shutil.copytree(bundles("fp32"), tmp_path / "bundle")
    for name in (OP_LIBRARY, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "bundle" / name).unlink(missing_ok=True)
    bundle = rewrite(tmp_path / "bundle")
    with pytest.raises(BackendError, match="--no-op-library"):
        write_repository(bundle, tmp_path / "repository", TritonOptions("onnxruntime"))
    with pytest.raises(BundleError, match="has no tokenizer"):
        write_repository(bundle, tmp_path / "repository", TritonOptions("python", tokenizer=True))
    write_repository(bundle, tmp_path / "repository", TritonOptions("onnxruntime", op_library=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "openvino"}, "backend is 'openvino'"),
        ({"backend": "python", "device": "tpu"}, "device is 'tpu'"),
        ({"backend": "python", "runtime": "jax"}, "runtime is 'jax'"),
        ({"backend": "python", "max_batch_size": 0}, "max_batch_size is 0"),
        ({"backend": "python", "instances": 0}, "instances is 0"),
        ({"backend": "python", "max_queue": 0}, "max_queue is 0"),
        ({"backend": "python", "threads": 0}, "threads is 0"),
        ({"backend": "python", "max_delay_ms": -1}, "max_delay_ms is -1"),
        ({"backend": "python", "name": "../up"}, "name is '../up'"),
        ({"backend": "python", "mount": "models"}, "mount is 'models'"),
        ({"backend": "tensorrt", "threads": 2}, "threads is for backend onnxruntime or python"),
        ({"backend": "onnxruntime", "runtime": "torch"}, "runtime is for backend python"),
        ({"backend": "onnxruntime", "engine": "a.plan"}, "engine is for backend tensorrt or python"),
        ({"backend": "tensorrt", "op_library": False}, "op_library is for backend onnxruntime or python"),
    ],
)
def test_options_that_make_no_sense(options, message) -> None:
    with pytest.raises(ContractError, match=message):
        TritonOptions(**options)


# The text format


def test_text_format_is_protobufs() -> None:
    from google.protobuf import struct_pb2, text_format

    text = 'quote " backslash \\ newline \n tab \t äöü 🙂 \x01'
    value = {
        "fields": [{"key": text, "value": {"string_value": text}}, {"key": "b", "value": {"bool_value": True, "missing": None}}]
    }
    parsed = text_format.Parse(pbtxt.dumps(value), struct_pb2.Struct())
    assert dict(parsed.items()) == {text: text, "b": True}
    numbers = {"values": [{"number_value": 0.1}, {"null_value": pbtxt.Name("NULL_VALUE")}]}
    assert list(text_format.Parse(pbtxt.dumps(numbers), struct_pb2.ListValue()).items()) == [0.1, None]
