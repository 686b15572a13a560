"""MraRuntime: what it accepts, what it refuses and how, and that every backend gives PyTorch's answer."""

from __future__ import annotations

import concurrent.futures
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from exported import put_empty_op_library

from mra_export.bundle import GOLDEN, OP_LIBRARY, WEIGHTS, Bundle, file_entry, write_golden
from mra_export.errors import BackendError, BundleError, ContractError, ParityError, PluginLoadError
from mra_export.golden_file import Sampled
from mra_export.parity import PASS
from mra_export.runtime import MraRuntime
from mra_export.token_graph import choose_tokens

BACKENDS = ("torch", "onnxruntime")


def tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 261, shape)


@pytest.fixture(scope="module")
def runtime(bundles) -> MraRuntime:
    return MraRuntime.load(bundles("fp32"), "onnxruntime")


@pytest.fixture
def copied(bundles, tmp_path) -> Path:
    shutil.copytree(bundles("fp32"), tmp_path / "bundle")
    return tmp_path / "bundle"


def rewrite_manifest(folder: Path, **fields) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in [name for name in manifest["files"] if not (folder / name).exists()]:
        del manifest["files"][name]
    for name in manifest["files"]:
        manifest["files"][name] = file_entry(folder / name).model_dump()
    (folder / "manifest.json").write_text(json.dumps({**manifest, **fields}))


# Answers


@pytest.mark.parametrize(
    ("kind", "backend", "library"),
    [
        *((kind, backend, True) for kind in ("fp32", "fp16", "answers", "choices", "classes", "features") for backend in BACKENDS),
        ("bf16", "torch", True),
        ("fp32", "onnxruntime", False),
        ("fp32", "torch", False),
        ("answers", "onnxruntime", False),
        ("wide", "onnxruntime", True),
    ],
)
def test_every_backend_gives_the_golden_outputs(bundles, kind, backend, library) -> None:
    with MraRuntime.load(bundles(kind), backend, use_op_library=library) as runtime:
        rows = runtime.validate()
        assert (runtime.backend, runtime.device) == (backend, "cpu")
    assert rows
    assert {row.status for row in rows} == {PASS}
    assert {row.backend for row in rows} == {backend}


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_of_chosen_tokens(bundles, backend) -> None:
    ids, chosen = tokens(2, 40), np.array([79, 3, 3, 40])
    with MraRuntime.load(bundles("fp32"), backend) as runtime:
        whole = runtime.run(input_ids=ids)["logits"].reshape(80, -1)
        np.testing.assert_array_equal(runtime.run(input_ids=ids, tokens=chosen)["logits"], whole[chosen])
        given = runtime.run(input_ids=torch.from_numpy(ids), tokens=chosen)["logits"]
        assert isinstance(given, torch.Tensor)
        np.testing.assert_array_equal(given.numpy(), whole[chosen])
        for wrong, message in (
            ([80], "tokens holds 80, input_ids of shape (2, 40) has 80: pass numbers from 0 to 79"),
            ([-1, 2], "tokens holds -1,"),
            ([[1]], "tokens has shape (1, 1) and dtype int64: pass one axis of integers, at least one"),
            ([0.5], "dtype float64: pass one axis of integers"),
            ([], "pass one axis of integers, at least one"),
        ):
            with pytest.raises(ContractError, match=re.escape(message)):
                runtime.run(input_ids=ids, tokens=wrong)


def test_tokens_are_chosen_where_each_has_an_answer_of_its_own(bundles) -> None:
    with MraRuntime.load(bundles("classes")) as runtime, pytest.raises(ContractError, match="logits has no entry per token"):
        runtime.run(input_ids=tokens(1, 5), tokens=[0])
    for kind, named in (("classes", "fp32, text-class"), ("answers", "fp32, question"), ("int8-dynamic", "int8"), ("fp16", "fp16")):
        with pytest.raises(ContractError, match=f"chosen_tokens is for fp32 and calibrated int8 bundles .* not for {named}"):
            MraRuntime.load(bundles(kind), "onnxruntime", chosen_tokens=True)
    with pytest.raises(ContractError, match="chosen_tokens is for ONNX Runtime on a CPU, not for 'torch'"):
        MraRuntime.load(bundles("fp32"), "torch", chosen_tokens=True)


def test_weights_beside_the_graph_are_found_when_tokens_are_chosen(copied) -> None:
    """As of a bundle above 2 GB."""
    ids, chosen = tokens(1, 40), [7]
    with MraRuntime.load(copied, "onnxruntime") as runtime:
        wanted = runtime.run(input_ids=ids, tokens=chosen)["logits"]
    graph = onnx.load(copied / "model.onnx")
    (copied / "model.onnx").unlink()
    onnx.save(graph, copied / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["files"]["model.onnx.data"] = {}
    rewrite_manifest(copied, files=manifest["files"])
    rewrite_manifest(copied)
    with MraRuntime.load(copied, "onnxruntime", chosen_tokens=True) as runtime:
        np.testing.assert_array_equal(runtime.run(input_ids=ids, tokens=chosen)["logits"], wanted)


@pytest.mark.parametrize("changed", ["outputs", "residual"])
def test_a_graph_of_another_form_cannot_be_had_for_chosen_tokens(bundles, changed) -> None:
    graph = onnx.load(bundles("fp32") / "model.onnx")
    if changed == "outputs":
        graph.graph.output.append(onnx.helper.make_empty_tensor_value_info("layer_norm"))
    else:
        graph.graph.node[-1].input[1] = graph.graph.input[1].name
    with pytest.raises(ContractError, match="can be computed for chosen tokens"):
        choose_tokens(graph, 64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_and_batches_may_change_per_call(bundles, backend) -> None:
    runtime = MraRuntime.load(bundles("fp32"), backend)
    alone = {}
    for shape in [(1, 1), (3, 33), (1, 256), (2, 100), (1, 1), (2, 31)]:
        logits = runtime.run(input_ids=tokens(*shape))["logits"]
        assert logits.shape == (*shape, 261)
        assert np.isfinite(logits).all()
        if shape in alone:
            np.testing.assert_array_equal(logits, alone[shape])
        alone[shape] = logits


def test_a_mask_that_is_left_out_is_all_ones_and_any_value_counts_as_one(runtime) -> None:
    ids = tokens(2, 40)
    wanted = runtime.run(input_ids=ids)["logits"]
    for mask in (
        np.ones_like(ids),
        np.full_like(ids, 7),
        np.full_like(ids, -1),
        np.ones_like(ids, dtype=bool),
        np.full_like(ids, 2**32),
    ):
        np.testing.assert_array_equal(runtime.run(input_ids=ids, attention_mask=mask)["logits"], wanted)
    np.testing.assert_array_equal(runtime.run(input_ids=ids, attention_mask=None, token_type_ids=None)["logits"], wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_and_its_tokens_have_no_effect_on_real_ones_beyond_the_row_maximum(bundles, backend) -> None:
    runtime = MraRuntime.load(bundles("answers"), backend)  # padding invariant
    ids = tokens(2, 70)
    mask = np.ones_like(ids)
    mask[1, 40:] = 0
    other = ids.copy()
    other[1, 40:] = 3
    first, second = (runtime.run(input_ids=x, attention_mask=mask)["start_logits"] for x in (ids, other))
    np.testing.assert_allclose(first[mask == 1], second[mask == 1], atol=1e-6)
    alone = runtime.run(input_ids=ids[1:, :40])["start_logits"]
    np.testing.assert_allclose(alone[0], first[1, :40], atol=1e-4)


def test_all_masked_rows_are_answered(runtime) -> None:
    ids = tokens(2, 20)
    assert np.isfinite(runtime.run(input_ids=ids, attention_mask=np.zeros_like(ids))["logits"]).all()


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, ">i4"])
def test_any_integer_type_is_taken(runtime, dtype) -> None:
    ids = tokens(1, 10) % 100
    np.testing.assert_array_equal(runtime.run(input_ids=ids.astype(dtype))["logits"], runtime.run(input_ids=ids)["logits"])


def test_views_are_taken(runtime) -> None:
    ids = tokens(4, 30)
    np.testing.assert_array_equal(
        runtime.run(input_ids=ids[::2, ::-1])["logits"], runtime.run(input_ids=ids[::2, ::-1].copy())["logits"]
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_torch_in_torch_out(bundles, backend, dtype) -> None:
    runtime = MraRuntime.load(bundles("fp16"), backend)
    ids = torch.from_numpy(tokens(2, 50)).to(dtype)
    logits = runtime.run(input_ids=ids, attention_mask=torch.ones_like(ids, dtype=torch.bool))["logits"]
    assert isinstance(logits, torch.Tensor)
    assert logits.dtype == torch.float16
    np.testing.assert_array_equal(logits.numpy(), runtime.run(input_ids=ids.numpy())["logits"])


def test_bfloat16_comes_as_float32_in_numpy_and_as_itself_in_torch(bundles) -> None:
    runtime = MraRuntime.load(bundles("bf16"), "torch")
    ids = tokens(1, 9)
    array, tensor = runtime.run(input_ids=ids)["logits"], runtime.run(input_ids=torch.from_numpy(ids))["logits"]
    assert (array.dtype, tensor.dtype) == (np.float32, torch.bfloat16)
    np.testing.assert_array_equal(array, tensor.float().numpy())


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_threads_get_their_own_answers(bundles, backend) -> None:
    runtime = MraRuntime.load(bundles("fp32"), backend)
    inputs = [tokens(1 + seed % 3, 5 + 23 * (seed % 8), seed=seed) for seed in range(24)]
    wanted = [runtime.run(input_ids=ids)["logits"] for ids in inputs]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for found, expected in zip(pool.map(lambda ids: runtime.run(input_ids=ids)["logits"], inputs * 2), wanted * 2, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5)


# Refused inputs

REFUSED = {
    "no ids": ({}, r"input_ids is missing: pass token ids of shape \(batch, length\)"),
    "unknown": ({"input_ids": tokens(1, 4), "labels": tokens(1, 4)}, "labels is not an input of this model"),
    "mask shape": (
        {"input_ids": tokens(2, 128), "attention_mask": np.ones((2, 100), int)},
        r"attention_mask has shape \(2, 100\), input_ids \(2, 128\): pass a mask of the same shape",
    ),
    "types shape": ({"input_ids": tokens(2, 8), "token_type_ids": np.zeros((1, 8), int)}, r"token_type_ids has shape \(1, 8\)"),
    "rank 1": ({"input_ids": tokens(8)}, r"input_ids has shape \(8,\): pass 2 axes"),
    "rank 3": ({"input_ids": tokens(1, 2, 8)}, r"input_ids has shape \(1, 2, 8\): pass 2 axes"),
    "no rows": ({"input_ids": tokens(0, 8)}, r"input_ids has shape \(0, 8\): every axis must be 1 or more"),
    "no tokens": ({"input_ids": tokens(2, 0)}, r"input_ids has shape \(2, 0\)"),
    "too long": ({"input_ids": tokens(1, 257)}, "length 257, the model's max_position_embeddings is 256: cut the input to 256"),
    "too high": (
        {"input_ids": np.array([[1, 261]])},
        "input_ids holds 261, the model's vocab_size is 261: pass values from 0 to 260",
    ),
    "negative": ({"input_ids": np.array([[1, -2]])}, "input_ids holds -2"),
    "beyond int64": ({"input_ids": np.array([[2**63]], dtype=np.uint64)}, "input_ids holds 9223372036854775808"),
    "types": (
        {"input_ids": tokens(1, 4), "token_type_ids": np.ones((1, 4), int)},
        "token_type_ids holds 1, the model's type_vocab_size is 1",
    ),
    "float ids": ({"input_ids": np.ones((1, 4))}, "input_ids has dtype float64: pass integers"),
    "float mask": ({"input_ids": tokens(1, 4), "attention_mask": np.ones((1, 4), np.float32)}, "attention_mask has dtype float32"),
    "float tensor": ({"input_ids": torch.ones(1, 4)}, "input_ids has dtype torch.float32: pass integers"),
    "list": ({"input_ids": [[1, 2]]}, "input_ids is a list: pass a numpy array or a torch tensor"),
    "text": ({"input_ids": np.array([["a"]])}, "input_ids has dtype <U1: pass integers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_inputs_the_model_cannot_take_are_refused_by_name(runtime, name) -> None:
    arrays, message = REFUSED[name]
    with pytest.raises(ContractError, match=message):
        runtime.run(**arrays)


def test_multiple_choice_takes_three_axes(bundles) -> None:
    runtime = MraRuntime.load(bundles("choices"))
    assert runtime.run(input_ids=tokens(2, 3, 20))["logits"].shape == (2, 3)
    with pytest.raises(ContractError, match=r"input_ids has shape \(2, 20\): pass 3 axes, \(batch, choices, length\)"):
        runtime.run(input_ids=tokens(2, 20))


# Loading


def test_auto_takes_onnx_runtime_and_says_so(bundles, caplog) -> None:
    with caplog.at_level(logging.INFO, "mra_export"):
        assert MraRuntime.load(bundles("fp32")).backend == "onnxruntime"
    assert "backend onnxruntime on cpu, because it runs fp32 on cpu" in caplog.text


def test_auto_takes_torch_where_onnx_runtime_cannot(bundles, copied, caplog) -> None:
    with caplog.at_level(logging.INFO, "mra_export"):
        assert MraRuntime.load(bundles("bf16")).backend == "torch"
    assert "no bfloat16 MatMul" in caplog.text
    shutil.rmtree(copied / "lib")
    rewrite_manifest(copied)
    assert MraRuntime.load(copied).backend == "torch"
    assert MraRuntime.load(copied, use_op_library=False).backend == "onnxruntime"


def test_onnx_runtime_refuses_bfloat16_and_says_what_can_run_it(bundles) -> None:
    for library in (True, False):
        with pytest.raises(BackendError, match=r"no bfloat16 MatMul.*backend 'torch'.*--dtype fp32"):
            MraRuntime.load(bundles("bf16"), "onnxruntime", use_op_library=library)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_a_gpu_that_is_not_there_is_an_error_not_a_fallback(bundles, backend) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(BackendError, match=r"built without CUDA|no usable NVIDIA GPU|no CUDAExecutionProvider"):
        MraRuntime.load(bundles("fp32"), backend, "cuda")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backend": "jax"}, BackendError, "backend is 'jax': use one of auto, torch, onnxruntime"),
        ({"device": "tpu"}, BackendError, "device is 'tpu': use one of cpu, cuda"),
        ({"intra_op_threads": 0}, ContractError, "intra_op_threads is 0"),
        ({"backend": "torch", "intra_op_threads": 1}, ContractError, "call torch.set_num_threads"),
    ],
)
def test_options_that_make_no_sense_are_refused(bundles, options, error, message) -> None:
    with pytest.raises(error, match=message):
        MraRuntime.load(bundles("fp32"), **options)


def test_threads_of_a_session_can_be_set(bundles) -> None:
    runtime = MraRuntime.load(bundles("fp32"), "onnxruntime", intra_op_threads=1)
    assert runtime.run(input_ids=tokens(1, 40))["logits"].shape == (1, 40, 261)


def test_a_closed_runtime_says_so(bundles) -> None:
    with MraRuntime.load(bundles("fp32")) as runtime:
        pass
    with pytest.raises(BackendError, match="this runtime is closed"):
        runtime.run(input_ids=tokens(1, 4))
    runtime.close()


def test_a_loaded_bundle_is_taken_too(bundles) -> None:
    assert MraRuntime.load(Bundle.load(bundles("fp32"))).run(input_ids=tokens(1, 4))["logits"].shape == (1, 4, 261)


@pytest.mark.parametrize("name", ["model.onnx", "config.json", "golden.npz", "model.safetensors", OP_LIBRARY])
@pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
def test_a_damaged_file_is_refused_by_name(copied, name, damage) -> None:
    path = copied / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError, match=Path(name).name):
        MraRuntime.load(copied)


def test_another_contract_is_refused(copied) -> None:
    rewrite_manifest(copied, contract_version=99)
    with pytest.raises(BundleError, match="contract_version 99"):
        MraRuntime.load(copied)


def test_a_bundle_without_the_op_library_needs_to_be_told(copied) -> None:
    shutil.rmtree(copied / "lib")
    rewrite_manifest(copied)
    with pytest.raises(BackendError, match=r"holds no op library.*use_op_library=False"):
        MraRuntime.load(copied, "onnxruntime")
    assert MraRuntime.load(copied, "onnxruntime", use_op_library=False).run(input_ids=tokens(1, 4))["logits"].shape == (1, 4, 261)


def test_a_bundle_without_weights_runs_but_not_in_torch(copied) -> None:
    (copied / WEIGHTS).unlink()
    rewrite_manifest(copied)
    MraRuntime.load(copied, "onnxruntime")
    with pytest.raises(BackendError, match=r"holds no model.safetensors"):
        MraRuntime.load(copied, "torch")


def test_a_library_that_does_not_load_is_named(copied) -> None:
    (copied / OP_LIBRARY).write_bytes(b"not a library")
    rewrite_manifest(copied)
    with pytest.raises(PluginLoadError, match=r"libmra_ort.so does not load into ONNX Runtime"):
        MraRuntime.load(copied, "onnxruntime")


def test_a_library_without_the_operator_is_refused_although_the_function_body_could_run(copied, tmp_path) -> None:
    put_empty_op_library(copied / OP_LIBRARY, tmp_path)
    rewrite_manifest(copied)
    with pytest.raises(PluginLoadError, match=r"brings no mra\.MraAttention for fp32 on cpu"):
        MraRuntime.load(copied, "onnxruntime")


def test_validate_fails_where_the_golden_outputs_differ(copied) -> None:
    inputs, outputs = Bundle.load(copied).golden()
    outputs[1]["logits"][0, 3, 5] += 1.0
    write_golden(copied / GOLDEN, inputs, outputs)
    rewrite_manifest(copied)
    with (
        MraRuntime.load(copied) as runtime,
        pytest.raises(ParityError, match=r"onnxruntime on cpu differs from PyTorch in logits, golden 2x33"),
    ):
        runtime.validate()
    outputs[1]["logits"][0, 3, 5] = np.nan
    write_golden(copied / GOLDEN, inputs, outputs)
    rewrite_manifest(copied)
    with MraRuntime.load(copied) as runtime, pytest.raises(ParityError, match="NaN"):
        runtime.validate()


def edited(monkeypatch, runtime: MraRuntime, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """The backend's logits of texts of 33 tokens are changed."""
    run = runtime._running.run

    def wrong(inputs):
        answers = run(inputs)
        return {name: change(array.copy()) if array.shape[1] == 33 else array for name, array in answers.items()}

    monkeypatch.setattr(runtime._running, "run", wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logits: logits[::-1], "needs a tolerance"),
        (lambda logits: np.roll(logits, 1, axis=1), "needs a tolerance"),
        (lambda logits: np.roll(logits, 1, axis=2), "needs a tolerance"),
        (lambda logits: logits * 1.01, "needs a tolerance"),
        (lambda logits: np.where(np.arange(33)[:, None] == 17, np.nan, logits), "NaN"),
        (lambda logits: np.where(np.arange(33)[:, None] == 17, logits + 1, logits), "needs a tolerance"),
        (lambda logits: np.where(np.arange(1000) == 7, logits + 100, logits), "needs a tolerance"),
        (lambda logits: logits[:, :, :500], r"shape \(2, 33, 500\) has no"),
        (lambda logits: logits[:, :20], r"has no token|expected"),
        (lambda logits: np.concatenate([logits, logits], axis=1), "needs a tolerance"),
    ],
)
def test_sampled_golden_outputs_find_what_is_wrong(bundles, monkeypatch, change, message) -> None:
    """Swapped texts, a shift by a token or by a value, a scale, a wrong token of which no row is kept, a wrong value of all."""
    with MraRuntime.load(bundles("wide")) as runtime:
        _, outputs = runtime.bundle.golden()
        assert isinstance(outputs[1]["logits"], Sampled)
        assert not set(outputs[1]["logits"].tokens) & {17, 33 + 17}
        assert [row.case for row in runtime.validate()][2:4] == ["golden 2x33, 6 tokens", "golden 2x33, 64 values a token"]
        edited(monkeypatch, runtime, change)
        with pytest.raises(ParityError, match=message):
            runtime.validate()


def test_golden_outputs_that_no_longer_exist_fail(copied) -> None:
    inputs, outputs = Bundle.load(copied).golden()
    outputs[0]["pooler"] = outputs[0].pop("logits")
    write_golden(copied / GOLDEN, inputs, outputs)
    rewrite_manifest(copied)
    with pytest.raises(ParityError, match="this output is missing"):
        MraRuntime.load(copied).validate()
