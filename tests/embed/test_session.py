"""mra::Session through its C API: the Python runtime's answers, from any number of threads."""

from __future__ import annotations

import concurrent.futures
import ctypes
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from session_library import Session, check, library

from mra_export.bundle import GOLDEN, Bundle, file_entry, write_golden
from mra_export.contract import CONTRACT_VERSION, TOLERANCES
from mra_export.errors import BundleError, ContractError, ParityError
from mra_export.runtime import MraRuntime


def tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 261, shape)


@pytest.mark.parametrize("kind", ["fp32", "fp16", "wide", "int8", "answers", "choices", "classes", "tokens", "features"])
def test_golden_rows_are_those_of_python(bundles, kind) -> None:
    with Session(bundles(kind)) as session, MraRuntime.load(bundles(kind), "onnxruntime") as runtime:
        rows, wanted = session.compare_golden(), runtime.compare_golden()
        session.validate()
        assert (session.fact("backend"), session.fact("device")) == ("onnxruntime", "cpu")
        assert session.fact("task") == runtime.bundle.manifest.task
    assert [(row["name"], row["output"], row["status"], row["reason"]) for row in rows] == [
        (row.case, row.output, row.status, row.reason) for row in wanted
    ]
    assert {row["status"] for row in rows} == {"pass"}
    for row, expected in zip(rows, wanted, strict=True):
        assert row["tolerance"] == expected.tolerance == TOLERANCES[runtime.precision].model_free
        assert row["max_abs"] == pytest.approx(expected.difference.max_abs, rel=0.05, abs=1e-6)  # threads sum in any order
        assert row["needed"] == pytest.approx(expected.needed, rel=0.05, abs=1e-6)


@pytest.mark.parametrize("kind", ["fp32", "fp16", "choices"])
def test_outputs_are_those_of_python(bundles, kind) -> None:
    shape = (2, 3, 40) if kind == "choices" else (2, 70)
    ids, mask = tokens(*shape), np.ones(shape, dtype=np.int64)
    mask[1, ..., 30:] = 0
    with Session(bundles(kind)) as session, MraRuntime.load(bundles(kind), "onnxruntime") as runtime:
        for arrays in (
            {"input_ids": ids},
            {"input_ids": ids, "attention_mask": mask * 7},
            {"input_ids": ids[:1], "attention_mask": None},
        ):
            found, wanted = session.run(**arrays), runtime.run(**arrays)
            for name, expected in wanted.items():
                assert (found[name].dtype, found[name].shape) == (expected.dtype, expected.shape)
                np.testing.assert_allclose(found[name], expected, atol=1e-5, rtol=1e-3)
                np.testing.assert_array_equal(found[f"{name}/float32"], found[name].astype(np.float32))


def test_token_types_reach_the_model(bundles) -> None:
    ids = tokens(1, 20)
    with Session(bundles("answers")) as session, MraRuntime.load(bundles("answers"), "onnxruntime") as runtime:
        arrays = {"input_ids": ids, "token_type_ids": np.arange(20)[None] % 2}
        found = session.run(**arrays)["start_logits"]
        np.testing.assert_allclose(found, runtime.run(**arrays)["start_logits"], atol=1e-5)
        assert np.abs(found - session.run(input_ids=ids)["start_logits"]).max() > 1e-3


def test_the_function_body_gives_the_same_answer(bundles) -> None:
    with Session(bundles("fp32"), use_op_library=0, intra_op_threads=1) as session:
        session.validate()


def test_many_threads_get_their_own_answers(bundles) -> None:
    inputs = [tokens(1 + seed % 3, 5 + 23 * (seed % 8), seed=seed) for seed in range(24)]
    with Session(bundles("fp32")) as session, concurrent.futures.ThreadPoolExecutor(8) as pool:
        wanted = [session.run(input_ids=ids)["logits"] for ids in inputs]
        for found, expected in zip(pool.map(lambda ids: session.run(input_ids=ids)["logits"], inputs * 2), wanted * 2, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_facts_of_the_bundle(bundles) -> None:
    with Session(bundles("fp32")) as session:
        assert (session.fact("vocab_size"), session.fact("max_length")) == (261, 256)
        assert json.loads(session.fact("manifest")) == json.loads((bundles("fp32") / "manifest.json").read_text())
    assert library().mra_session_contract_version() == CONTRACT_VERSION


def test_outputs_outlive_their_session(bundles) -> None:
    lib, session, outputs = library(), Session(bundles("fp32")), ctypes.c_void_p()
    ids, shape = (ctypes.c_int64 * 3)(0, 5, 2), (ctypes.c_int64 * 2)(1, 3)
    from session_library import Input

    given = Input(b"input_ids", ctypes.addressof(ids), shape, 2)
    check(lib.mra_session_run(session._handle, given, 1, outputs))
    wanted = session.run(input_ids=np.array([[0, 5, 2]]))["logits"]
    session.close()
    found = np.empty(wanted.shape, np.float32)
    lib.mra_outputs_copy_float32(outputs, 0, found.ctypes.data)
    lib.mra_outputs_free(outputs)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_null_pointers_are_errors_where_they_are_not_allowed(bundles) -> None:
    lib, handle = library(), ctypes.c_void_p()
    with pytest.raises(ContractError, match="bundle is NULL: pass a pointer"):
        check(lib.mra_session_open(None, None, handle))
    with pytest.raises(ContractError, match="session is NULL: pass a pointer"):
        check(lib.mra_session_open(b"bundle", None, None))
    with pytest.raises(ContractError, match="session is NULL: pass a pointer"):
        check(lib.mra_session_run(None, None, 0, handle))
    with pytest.raises(ContractError, match="session is NULL"):
        check(lib.mra_session_validate(None))
    for free in ("error", "outputs", "golden"):
        getattr(lib, f"mra_{free}_free")(None)
    lib.mra_session_close(None)


def test_options_of_another_version_are_refused(bundles) -> None:
    with pytest.raises(ContractError, match=r"struct_size is 8, this library's is \d+: call mra_session_options_init"):
        Session(bundles("fp32"), struct_size=8)


def test_an_input_given_twice_or_without_a_name(bundles) -> None:
    from session_library import Input

    ids, shape = (ctypes.c_int64 * 3)(0, 5, 2), (ctypes.c_int64 * 2)(1, 3)
    with Session(bundles("fp32")) as session:
        for names, message in (((b"input_ids", b"input_ids"), "given twice"), ((None,), r"\(null\) is not an input")):
            inputs = (Input * len(names))(*(Input(name, ctypes.addressof(ids), shape, 2) for name in names))
            with pytest.raises(ContractError, match=message):
                check(library().mra_session_run(session._handle, inputs, len(names), ctypes.c_void_p()))


def relist(folder: Path) -> None:
    """Let the manifest say what the golden file is now."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][GOLDEN] = file_entry(folder / GOLDEN).model_dump()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("value", ["far", "nan", "missing", "shape"])
def test_validate_fails_where_the_golden_outputs_differ_in_pythons_words(copied, value) -> None:
    inputs, outputs = Bundle.load(copied).golden()
    if value == "missing":
        outputs[1]["pooler"] = outputs[1].pop("logits")
    elif value == "shape":
        outputs[1]["logits"] = outputs[1]["logits"][:, :20]
    else:
        outputs[1]["logits"][0, 3, 5] = np.nan if value == "nan" else outputs[1]["logits"][0, 3, 5] + 1
    write_golden(copied / GOLDEN, inputs, outputs)
    relist(copied)
    messages = []
    for runtime in (MraRuntime.load(copied, "onnxruntime"), Session(copied)):
        with runtime, pytest.raises(ParityError) as caught:
            runtime.validate()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_golden_files_that_are_none_are_refused(copied) -> None:
    whole = (copied / GOLDEN).read_bytes()
    for damaged in (
        b"",
        b"not a zip",
        whole[: len(whole) // 2],
        whole[:-4],
        whole.replace(b"'<i8'", b"'<i2'"),
        b"PK\5\6" + b"\xff" * 18,
    ):
        (copied / GOLDEN).write_bytes(damaged)
        relist(copied)
        with (
            Session(copied) as session,
            pytest.raises(BundleError, match=r"golden.npz cannot be read as golden inputs and outputs \("),
        ):
            session.validate()
    np.savez_compressed(copied / GOLDEN, **{"inputs/0/input_ids": np.zeros((1, 400), np.int64)})
    relist(copied)
    with Session(copied) as session, pytest.raises(BundleError, match="compressed"):
        session.validate()


@pytest.mark.parametrize(
    ("side", "change"),
    [
        ("tokens", lambda array: array + 10**9),
        ("tokens", lambda array: array - 1),
        ("tokens", lambda array: array[:-1]),
        ("tokens", lambda array: array.astype(np.int32)),
        ("tokens", lambda array: array[:0]),
        ("columns", lambda array: array + 10**9),
        ("columns", lambda array: array * 0 - 1),
        ("columns", lambda array: array[:, None]),
        ("rows", lambda array: array[:, :3]),
        ("values", lambda array: array[0]),
        ("values", None),
        ("columns", None),
    ],
)
def test_sampled_golden_outputs_that_do_not_fit(bundles, tmp_path, side, change) -> None:
    """Refused as a file or as an answer, in C++ and in Python, and nothing outside of an array is read."""
    shutil.copytree(bundles("wide"), tmp_path / "bundle")
    path = tmp_path / "bundle" / GOLDEN
    with np.load(path) as archive:
        arrays = dict(archive)
    changed = arrays.pop(f"{side}/1/logits")
    np.savez(path, **arrays, **({} if change is None else {f"{side}/1/logits": change(changed)}))
    relist(tmp_path / "bundle")
    for runtime in (MraRuntime.load(tmp_path / "bundle", "onnxruntime"), Session(tmp_path / "bundle")):
        with runtime, pytest.raises((BundleError, ParityError)):
            runtime.validate()


def test_sampled_golden_outputs_that_differ_are_found(bundles, tmp_path) -> None:
    shutil.copytree(bundles("wide"), tmp_path / "bundle")
    for side in ("rows", "values"):
        inputs, outputs = Bundle.load(bundles("wide")).golden()
        getattr(outputs[1]["logits"], side)[:] += 1
        write_golden(tmp_path / "bundle" / GOLDEN, inputs, outputs)
        relist(tmp_path / "bundle")
        messages = []
        for runtime in (MraRuntime.load(tmp_path / "bundle", "onnxruntime"), Session(tmp_path / "bundle")):
            with runtime, pytest.raises(ParityError) as caught:
                runtime.validate()
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
        assert ("6 tokens" if side == "rows" else "64 values a token") in messages[0]
