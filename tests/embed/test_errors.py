"""Two runtimes, one truth: what the Python runtime refuses, libmra_session refuses, with the same class and the same words."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import put_empty_op_library
from session_library import Session

from mra_export import gpu, tensorrt_api
from mra_export.bundle import OP_LIBRARY, file_entry
from mra_export.errors import BackendError, BundleError, ContractError, EngineError, MraExportError
from mra_export.runtime import MraRuntime


def refusal(act: Callable[[], Any]) -> MraExportError:
    with pytest.raises(MraExportError) as caught:
        act()
    return caught.value


def both_refuse(bundle: Path | str, **options: Any) -> str:
    """The message with which both runtimes refuse to load."""
    python = refusal(lambda: MraRuntime.load(bundle, **{"backend": "onnxruntime", **options}))
    cpp = refusal(lambda: Session(bundle, **options))
    assert (type(cpp), str(cpp)) == (type(python), str(python))
    return str(cpp)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any], relist: bool = False) -> None:
    """Change the manifest; relist: let it say what the files are now."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    if relist:
        manifest["files"] = {name: file_entry(folder / name).model_dump() for name in manifest["files"] if (folder / name).exists()}
    change(manifest)
    path.write_text(json.dumps(manifest))


# The folder


def test_no_folder_and_no_manifest(tmp_path) -> None:
    assert "is not a folder" in both_refuse(tmp_path / "nothing")
    assert "has no manifest.json" in both_refuse(tmp_path)
    with pytest.raises(BundleError, match=r"/\?\?é is not a folder"):  # not UTF-8, then UTF-8
        Session(os.fsdecode(bytes(tmp_path) + b"/\xff\xc0\xc3\xa9"))
    assert both_refuse(f"{tmp_path}//./").startswith(f"{tmp_path} has no manifest.json")


@pytest.mark.parametrize("name", ["model.onnx", "config.json", "golden.npz", "model.safetensors", OP_LIBRARY])
@pytest.mark.parametrize("damage", ["missing", "truncated", "longer", "altered"])
def test_damaged_files(copied, name, damage) -> None:
    path = copied / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        damaged = {"truncated": content[:-1], "longer": content + b"x", "altered": content[:-1] + bytes([content[-1] ^ 1])}
        path.write_bytes(damaged[damage])
    assert Path(name).name in both_refuse(copied)
    if damage == "altered" and name != OP_LIBRARY and name != "model.onnx":
        Session(copied, verify_hashes=0).close()


@pytest.mark.parametrize("version", [0, 2, 99, None, "1", True, [1], {"a": None}, 1.5])
@pytest.mark.parametrize("name", ["schema_version", "contract_version"])
def test_other_versions(copied, name, version) -> None:
    edit(copied, lambda manifest: manifest.update({name: version}))
    assert name in both_refuse(copied)
    edit(copied, lambda manifest: manifest.pop(name))
    assert f"{name} None" in both_refuse(copied)


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "field missing": lambda m: m.pop("task"),
    "field unknown": lambda m: m.update(colour="red"),
    "text as number": lambda m: m.update(task=3),
    "number as list": lambda m: m.update(opset=[18]),
    "no boolean": lambda m: m.update(padding_invariant="perhaps"),
    "no dictionary": lambda m: m.update(files=[]),
    "no list": lambda m: m.update(inputs={}),
    "dtype": lambda m: m.update(dtype="fp8"),
    "model field missing": lambda m: m["model"].pop("vocab_size"),
    "model field unknown": lambda m: m["model"].update(colour="red"),
    "model no dictionary": lambda m: m.update(model=[]),
    "tensor field missing": lambda m: m["outputs"][0].pop("axes"),
    "hash": lambda m: m["files"]["model.onnx"].update(sha256="xyz"),
    "size": lambda m: m["files"]["model.onnx"].update(size=-1),
    "attribute missing": lambda m: m["attributes"].pop("num_heads"),
    "attribute value": lambda m: m["attributes"].update(num_blocks=0),
    "attribute mode": lambda m: m["attributes"].update(approx_mode="dense"),
    "attribute scale": lambda m: m["attributes"].update(scale=0),
    "attribute prior": lambda m: m["attributes"].update(initial_prior_diagonal_n_blocks=-1),
    "required file": lambda m: m["files"].pop("golden.npz"),
    **{
        f"file name {name}": lambda m, name=name: m["files"].update({name: m["files"]["config.json"]})
        for name in ("../config.json", "/etc/passwd", "a/../b", "a//b", "./a", "a/", "a\\b", "c:d", "manifest.json")
    },
    "file name quoted": lambda m: m["files"].update({"../it's": m["files"]["config.json"]}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_manifests_that_are_not_ours(copied, change) -> None:
    edit(copied, CHANGES[change])
    assert "export the bundle again" in both_refuse(copied)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": 1,}', "\xff"])
def test_manifests_that_are_no_json(copied, text) -> None:
    (copied / "manifest.json").write_bytes(text.encode("latin-1"))
    python, cpp = (refusal(lambda load=load: load(copied)) for load in (MraRuntime.load, Session))
    assert type(cpp) is type(python)
    assert str(cpp).partition("(")[0] == str(python).partition("(")[0]  # the parser's own words are in between
    assert str(cpp).rpartition(")")[2] == str(python).rpartition(")")[2]


# Options and backends


def test_options(bundles) -> None:
    assert both_refuse(bundles("fp32"), device="tpu") == "device is 'tpu': use one of cpu, cuda"
    assert "it must be 1 or more" in both_refuse(bundles("fp32"), intra_op_threads=-1)
    assert "are for backend 'tensorrt'" in both_refuse(bundles("fp32"), engine="a.plan")
    with pytest.raises(BackendError, match="backend is 'torch': use one of onnxruntime, tensorrt"):
        Session(bundles("fp32"), backend="torch")
    with pytest.raises(ContractError, match="device_index is -1: it must be 0 or more"):
        Session(bundles("fp32"), device_index=-1)
    assert "runs on device 'cuda' only" in both_refuse(bundles("fp32"), backend="tensorrt", device="cpu")
    assert "are not for backend 'tensorrt'" in both_refuse(bundles("fp32"), backend="tensorrt", intra_op_threads=2)


def test_a_dtype_that_onnx_runtime_lacks(bundles) -> None:
    assert "no bfloat16 MatMul" in both_refuse(bundles("bf16"))


def test_a_gpu_that_is_not_there_is_an_error(bundles) -> None:
    from mra_export.backends import onnx_runtime

    if onnx_runtime.cuda_available():
        pytest.skip("this onnxruntime has a CUDA provider")
    assert "no CUDAExecutionProvider" in both_refuse(bundles("fp32"), device="cuda")
    assert "graph is for CPUs" in both_refuse(bundles("int8"), device="cuda")


def test_an_onnx_runtime_that_is_not_there(bundles, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("MRA_ONNXRUNTIME_LIBRARY", str(tmp_path / "libonnxruntime.so"))
    for options in ({}, {"onnxruntime_library": tmp_path / "other.so"}):
        with pytest.raises(BackendError, match=r"backend is 'onnxruntime', but onnxruntime is not installed \(.*\): install"):
            Session(bundles("fp32"), **options)
    with pytest.raises(BackendError, match=r"has no OrtGetApiBase: pass the path of libonnxruntime.so"):
        Session(bundles("fp32"), onnxruntime_library=bundles("fp32") / OP_LIBRARY)


def test_a_bundle_without_the_op_library(copied) -> None:
    shutil.rmtree(copied / "lib")
    edit(copied, lambda _: None, relist=True)
    assert "holds no op library" in both_refuse(copied)
    Session(copied, use_op_library=0).close()


def test_a_library_that_does_not_load(copied) -> None:
    (copied / OP_LIBRARY).write_bytes(b"not a library")
    edit(copied, lambda _: None, relist=True)
    assert "does not load into ONNX Runtime" in both_refuse(copied)


def test_a_library_without_the_operator(copied, tmp_path) -> None:
    put_empty_op_library(copied / OP_LIBRARY, tmp_path)
    edit(copied, lambda _: None, relist=True)
    assert "brings no mra.MraAttention for fp32 on cpu" in both_refuse(copied)


def test_a_graph_that_does_not_load(copied) -> None:
    (copied / "model.onnx").write_bytes(b"not a graph")
    edit(copied, lambda _: None, relist=True)
    assert "cannot load the graph" in both_refuse(copied)


# Inputs


IDS = np.ones((2, 100), dtype=np.int64)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({}, "input_ids is missing"),
        ({"input_ids": None}, "input_ids is missing"),
        ({"input_ids": IDS, "attention_mask": IDS[:, :50]}, r"attention_mask has shape (2, 50), input_ids (2, 100): pass a mask"),
        ({"input_ids": IDS, "attention_mask": IDS[0]}, "attention_mask has shape (100,)"),
        ({"input_ids": IDS, "token_type_ids": IDS.T}, "pass token_type_ids of the same shape"),
        ({"input_ids": IDS[0]}, "input_ids has shape (100,): pass 2 axes"),
        ({"input_ids": np.ones((), np.int64)}, "input_ids has shape (): pass 2 axes"),
        ({"input_ids": IDS[None]}, "input_ids has shape (1, 2, 100): pass 2 axes"),
        ({"input_ids": IDS[:0]}, "input_ids has shape (0, 100): every axis must be 1 or more"),
        ({"input_ids": IDS[:, :0]}, "every axis must be 1 or more"),
        ({"input_ids": np.ones((1, 257), np.int64)}, "input_ids has length 257, the model's max_position_embeddings is 256"),
        ({"input_ids": IDS * 261}, "input_ids holds 261, the model's vocab_size is 261: pass values from 0 to 260"),
        ({"input_ids": -IDS}, "input_ids holds -1"),
        ({"input_ids": IDS * 2**40}, "input_ids holds 1099511627776"),
        ({"input_ids": IDS, "token_type_ids": IDS}, "token_type_ids holds 1, the model's type_vocab_size is 1"),
        ({"input_ids": IDS, "position_ids": IDS}, "position_ids is not an input of this model"),
    ],
)
def test_inputs(bundles, arrays, words) -> None:
    with Session(bundles("fp32")) as session, MraRuntime.load(bundles("fp32"), "onnxruntime") as runtime:
        python, cpp = (refusal(lambda run=run: run(**arrays)) for run in (runtime.run, session.run))
        assert (type(cpp), str(cpp)) == (type(python), str(python))
        assert words in str(cpp)
        assert session.run(input_ids=IDS)["logits"].shape == (2, 100, 261)  # and it goes on


def test_inputs_of_multiple_choice(bundles) -> None:
    with Session(bundles("choices")) as session, MraRuntime.load(bundles("choices"), "onnxruntime") as runtime:
        python, cpp = (refusal(lambda run=run: run(input_ids=IDS)) for run in (runtime.run, session.run))
        assert str(cpp) == str(python)


# TensorRT: what can be said about an engine without a GPU


def plan(folder: Path, **changes: Any) -> None:
    """An engine of the newest TensorRT-RTX that no GPU has seen, and its row in the manifest."""
    fields = {
        "file": "engines/a.plan",
        "backend": "tensorrt-rtx",
        "builder": "1.7.1.116",
        "dtype": "fp32",
        "profiles": [{"input_ids": {"min": [1, 1], "opt": [1, 64], "max": [8, 256]}}],
        "plugin_layers": 0,
        "plugin": None,
        "compute_capabilities": ["8.0+"],
        "driver": None,
        "options": {},
    }
    entry = {**fields, **{name: value for name, value in changes.items() if name in fields}}
    header = changes.get("header", b"vtrt" + bytes(12) + (32).to_bytes(8, "little") + bytes([1, 7, 1, 116]) + bytes(4))
    (folder / "engines").mkdir(exist_ok=True)
    (folder / entry["file"]).write_bytes(header)

    def add(manifest: dict[str, Any]) -> None:
        manifest["files"][entry["file"]] = file_entry(folder / entry["file"]).model_dump()
        manifest["engines"] = [*manifest.get("engines", []), entry]

    edit(folder, add)


PLUGIN = {
    "name": "MraAttention",
    "version": "1",
    "namespace": "",
    "library": "lib/libmra_trt.so",
    "sha256": "0" * 64,
    "embedded": False,
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"header": b"vtrt"}, "is truncated: it has 4 bytes"),
        ({"header": b"\x00PLAN'\\\n" * 4}, "is not a TensorRT plan: it begins with"),
        ({"header": b"vtrt" + bytes(12) + (99).to_bytes(8, "little") + bytes([1, 7, 1, 116])}, "its header says 99"),
        ({"builder": "1.6.0.1"}, "is a plan of tensorrt-rtx 1.7.1.116, the manifest says tensorrt-rtx 1.6.0.1"),
        ({"backend": "tensorrt"}, "the manifest says tensorrt 1.7.1.116"),
        ({"plugin": {**PLUGIN, "version": "2"}}, "needs plugin MraAttention version '2'"),
        ({"plugin": {**PLUGIN, "embedded": True}}, "brings its own plugin code"),
        ({"plugin": PLUGIN}, "holds no lib/libmra_trt.so, which engines/a.plan needs"),
        ({"plugin": {**PLUGIN, "library": OP_LIBRARY}}, "was built with another lib/libmra_ort.so"),
    ],
)
def test_engines_that_do_not_fit_their_manifest(copied, changes, words) -> None:
    plan(copied, **changes)
    assert words in both_refuse(copied, backend="tensorrt")


def test_no_engine_and_none_of_that_name(copied) -> None:
    assert "holds no engine: mra-export engine" in both_refuse(copied, backend="tensorrt")
    plan(copied)
    assert "has no engine b.plan: it has engines/a.plan" in both_refuse(copied, backend="tensorrt", engine="b.plan")


def test_rows_of_engines_that_are_not_ours(copied) -> None:
    plan(copied)
    edit(copied, lambda manifest: manifest["engines"][0].pop("builder"))
    assert "engines: builder: Field required: build the engine again" in both_refuse(copied, backend="tensorrt")


def test_several_engines_give_each_ones_reason(copied) -> None:
    plan(copied, builder="1.6.0.1")
    plan(copied, file="engines/b.plan", header=b"")
    assert "none of the engines of" in both_refuse(copied, backend="tensorrt")


def test_an_engine_that_needs_what_is_not_here(copied, tmp_path) -> None:
    """Nothing of the plan is loaded: first comes the library, then the GPU."""
    plan(copied)
    missing = refusal(lambda: Session(copied, backend="tensorrt", tensorrt_library=tmp_path / "none.so"))
    assert isinstance(missing, EngineError)
    if "is not in this libmra_session" in str(missing):
        assert "build it where TensorRT's headers are (TENSORRT_ROOT)" in str(missing)
        return
    assert str(missing).startswith("tensorrt-rtx is not installed (")
    if tensorrt_api.installed("tensorrt-rtx") and not gpu.devices():
        import tensorrt_rtx_libs

        found = refusal(
            lambda: Session(
                copied, backend="tensorrt", tensorrt_library=next(Path(tensorrt_rtx_libs.__path__[0]).glob("*rtx.so.1"))
            )
        )
        assert "was built with the headers of TensorRT" in str(found) or "runs on an NVIDIA GPU, and" in str(found)
