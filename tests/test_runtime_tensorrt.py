"""The tensorrt backend: what it refuses before TensorRT sees a plan, which profile a call gets, and, on a GPU, the answers."""

from __future__ import annotations

import concurrent.futures
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import SMALLEST, copy, need_plugin, needs_rtx, rewrite
from hypothesis import given
from hypothesis import strategies as st

from mra_export import gpu
from mra_export.backends.tensorrt import cut
from mra_export.bundle import Bundle
from mra_export.engine import PLUGIN_LIBRARY, EngineOptions, build_engine
from mra_export.engine_checks import check_gpu, check_version
from mra_export.errors import BackendError, BundleError, ContractError, EngineError, PluginLoadError
from mra_export.gpu import Gpu
from mra_export.inputs import InputSpec
from mra_export.plan import EngineEntry, read_header
from mra_export.profiles import pad, pick
from mra_export.runtime import MraRuntime

SHAPE = {"input_ids": {"min": [1, 1], "opt": [1, 32], "max": [2, 64]}}
no_gpu = pytest.mark.skipif(bool(gpu.devices()), reason="this machine has a GPU")


@pytest.fixture(scope="module")
def built(bundles, tmp_path_factory) -> Path:
    """A bundle with a TensorRT-RTX engine, to read only."""
    need_plugin()
    bundle = copy(bundles("fp32"), tmp_path_factory.mktemp("built") / "bundle")
    build_engine(bundle, EngineOptions(backend="tensorrt-rtx", **SMALLEST))
    return bundle.path


@pytest.fixture
def own(built, tmp_path) -> Bundle:
    return copy(built, tmp_path / "bundle")


def plan_of(bundle: Bundle) -> Path:
    return bundle.file(bundle.manifest.engines[0]["file"])


def entry_of(bundle: Bundle, **fields: object) -> EngineEntry:
    return EngineEntry.model_validate({**bundle.manifest.engines[0], **fields})


def load(bundle: Bundle, **options: object) -> MraRuntime:
    return MraRuntime.load(bundle, "tensorrt", **options)


# Refused before TensorRT sees it


@needs_rtx
@no_gpu
def test_without_a_gpu_there_is_one_clear_error(built) -> None:
    for again in range(2):
        with pytest.raises(
            EngineError, match=r"runs on an NVIDIA GPU, and .*(driver|GPU).*: use backend 'onnxruntime' here"
        ) as error:
            load(Bundle.load(built))
        assert error.value.exit_code == 4, again


def test_a_bundle_without_an_engine_says_how_to_get_one(bundles) -> None:
    with pytest.raises(EngineError, match=r"holds no engine: mra-export engine .*bundle"):
        MraRuntime.load(bundles("fp32"), "tensorrt")


def test_what_tensorrt_does_not_take(bundles) -> None:
    folder = bundles("fp32")
    with pytest.raises(BackendError, match="device is 'cpu': backend 'tensorrt' runs on device 'cuda' only"):
        MraRuntime.load(folder, "tensorrt", "cpu")
    with pytest.raises(ContractError, match="--no-plugin"):
        MraRuntime.load(folder, "tensorrt", use_op_library=False)
    with pytest.raises(ContractError, match="for backend 'tensorrt'"):
        MraRuntime.load(folder, "onnxruntime", allow_embedded_plugin=True)


@needs_rtx
def test_a_truncated_plan(own) -> None:
    plan = plan_of(own)
    plan.write_bytes(plan.read_bytes()[:-1000])
    with pytest.raises(BundleError, match=r"\.plan is truncated"):
        MraRuntime.load(own.path, "tensorrt")
    forged = rewrite(own.path)
    with pytest.raises(EngineError, match=r"is truncated: \d+ bytes, its header says \d+"):
        load(forged)
    plan.write_bytes(plan.read_bytes()[:20])
    with pytest.raises(EngineError, match="is truncated: it has 20 bytes, less than the header"):
        load(rewrite(own.path))
    plan.write_bytes(b"")
    with pytest.raises(EngineError, match="it has 0 bytes"):
        load(rewrite(own.path))


@needs_rtx
def test_an_altered_plan_is_refused_even_if_nobody_looked_at_load(own) -> None:
    plan = plan_of(own)
    data = bytearray(plan.read_bytes())
    data[len(data) // 2] ^= 1
    plan.write_bytes(data)
    with pytest.raises(BundleError, match="altered: its sha256"):
        MraRuntime.load(own.path, "tensorrt")
    with pytest.raises(BundleError, match="altered: its sha256"):
        load(Bundle.load(own.path, verify_hashes=False))


@needs_rtx
def test_a_file_that_is_no_plan(own) -> None:
    plan_of(own).write_bytes(b"\x7fELF" + bytes(100))
    with pytest.raises(EngineError, match="is not a TensorRT plan: it begins with"):
        load(rewrite(own.path))


@needs_rtx
def test_a_plan_of_another_version(own) -> None:
    plan = plan_of(own)
    data = bytearray(plan.read_bytes())
    data[25] += 1  # the minor version
    plan.write_bytes(data)
    other = read_header(plan).version
    again = "mra-export engine .* --backend tensorrt-rtx"
    with pytest.raises(EngineError, match=rf"is a plan of tensorrt-rtx {other}, the manifest says .*: {again}"):
        load(rewrite(own.path))
    row = {**own.manifest.engines[0], "builder": other}
    with pytest.raises(EngineError, match=rf"was built by tensorrt-rtx {other}, installed is .*: {again}, or install that version"):
        load(rewrite(own.path, engines=[row]))


@needs_rtx
def test_a_missing_or_other_plugin_library(own) -> None:
    library = own.file(PLUGIN_LIBRARY)
    kept = library.read_bytes()
    library.unlink()
    with pytest.raises(PluginLoadError, match=r"libmra_trt\.so is missing"):
        load(own)  # loaded before it went away
    with pytest.raises(PluginLoadError, match=r"holds no lib/libmra_trt\.so, which engines/.* needs: mra-export engine"):
        load(rewrite(own.path))
    library.write_bytes(kept + b"\0")
    with pytest.raises(BundleError, match="altered"):
        load(own)
    with pytest.raises(EngineError, match=r"was built with another lib/libmra_trt\.so .*mra-export engine"):
        load(rewrite(own.path, PLUGIN_LIBRARY))
    library.write_bytes(kept)
    plugin = {**own.manifest.engines[0]["plugin"], "version": "2"}
    with pytest.raises(EngineError, match="needs plugin MraAttention version '2', this package has version '1'"):
        load(rewrite(own.path, engines=[{**own.manifest.engines[0], "plugin": plugin}]))


@needs_rtx
@no_gpu
def test_plugin_code_inside_a_plan_stays_off_unless_asked_for(own) -> None:
    plugin = {**own.manifest.engines[0]["plugin"], "embedded": True}
    bundle = rewrite(own.path, engines=[{**own.manifest.engines[0], "plugin": plugin}])
    with pytest.raises(EngineError, match=r"brings its own plugin code.*allow_embedded_plugin=True"):
        load(bundle)
    with pytest.raises(EngineError, match="NVIDIA GPU"):  # the next check
        load(bundle, allow_embedded_plugin=True)


@needs_rtx
@no_gpu
def test_several_engines_and_names(own) -> None:
    row = own.manifest.engines[0]
    other = "engines/tensorrt-rtx-0.0.0.0-sm89-fp32.plan"
    shutil.copy(plan_of(own), own.path / other)
    bundle = rewrite(own.path, other, engines=[row, {**row, "file": other, "builder": "0.0.0.0"}])
    with pytest.raises(EngineError, match=rf"none of the engines of .* fits here. \(.*NVIDIA GPU.*\) \(.*{other} is a plan of"):
        load(bundle)
    with pytest.raises(EngineError, match="NVIDIA GPU"):
        load(bundle, engine=Path(row["file"]).name)
    with pytest.raises(EngineError, match=rf"has no engine some.plan: it has {row['file']}, {other}"):
        load(bundle, engine="some.plan")
    with pytest.raises(BundleError, match=r"manifest\.json, engines: profiles: .*build the engine again"):
        load(rewrite(own.path, engines=[{**row, "profiles": 3}]))


@needs_rtx
@pytest.mark.parametrize(
    ("capabilities", "here", "fits"),
    [
        (["8.0+"], "8.0", True),
        (["8.0+"], "12.0", True),
        (["8.0+"], "7.5", False),
        (["8.9"], "8.9", True),
        (["8.9"], "9.0", False),
        (["8.6", "8.9"], "8.9", True),
        ([], "8.9", False),
    ],
)
def test_the_gpu_must_be_one_it_was_built_for(built, capabilities, here, fits) -> None:
    bundle = Bundle.load(built, verify_hashes=False)
    entry = entry_of(bundle, compute_capabilities=capabilities)
    if fits:
        check_gpu(bundle, entry, [Gpu("Some GPU", here)], "13.0")
        return
    with pytest.raises(EngineError, match=f"Some GPU has {here}: mra-export engine .* --backend tensorrt-rtx here"):
        check_gpu(bundle, entry, [Gpu("Some GPU", here)], "13.0")


@needs_rtx
def test_the_driver_and_the_version(built) -> None:
    bundle = Bundle.load(built, verify_hashes=False)
    devices = [Gpu("Some GPU", "9.0")]
    entry = entry_of(bundle, driver="13.0")
    check_gpu(bundle, entry, devices, "13.1")
    check_gpu(bundle, entry_of(bundle, driver="13.2"), devices, "13.1")  # CUDA's minor versions are compatible
    for driver in ("12.9", None):
        with pytest.raises(EngineError, match=f"driver runs CUDA 13.0, here it runs CUDA {driver}: update the driver"):
            check_gpu(bundle, entry, devices, driver)
    flexible = entry_of(bundle, backend="tensorrt", builder="10.14.1.48", options={"version_compatible": True})
    check_version(bundle, flexible, "10.15.0.1")
    for installed in ("10.13.0.1", "11.0.0.1"):
        with pytest.raises(EngineError, match=r"was built by tensorrt 10.14.1.48, installed is"):
            check_version(bundle, flexible, installed)
    check_version(bundle, entry_of(bundle, builder="10.14.1.48"), "10.14.1.50")
    with pytest.raises(EngineError, match=r"installed is 10.15.0.1"):
        check_version(bundle, entry_of(bundle, builder="10.14.1.48"), "10.15.0.1")


@no_gpu
def test_no_gpu_is_told_apart_from_no_driver() -> None:
    assert gpu.devices() == ()
    assert "driver" in gpu.why_none()


# Profiles and padding


def profile(low, best, high):
    return {"input_ids": {"min": list(low), "opt": list(best), "max": list(high)}}


def test_the_profile_with_the_least_padding_and_then_the_nearest_best_shape() -> None:
    profiles = [profile((1, 64), (1, 128), (8, 512)), profile((8, 1), (32, 64), (64, 128)), profile((1, 64), (8, 512), (8, 512))]
    assert pick(profiles, (1, 64)) == (0, (1, 64))
    assert pick(profiles, (8, 512)) == (2, (8, 512))
    assert pick(profiles, (8, 20)) == (1, (8, 20))
    assert pick(profiles, (1, 5)) == (1, (8, 5))  # 40 tokens; 64 in the others
    assert pick(profiles, (1, 20)) == (0, (1, 64))
    assert pick(profiles, (64, 64)) == (1, (64, 64))
    with pytest.raises(
        ContractError, match=r"shape 65x1, the engine takes 1x64 to 8x512 \(best 1x128\) or 8x1 to 64x128 .*--max-shapes"
    ):
        pick(profiles, (65, 1))
    with pytest.raises(ContractError, match="shape 9x129"):
        pick(profiles, (9, 129))


_sizes = st.tuples(st.integers(1, 6), st.integers(1, 6))


@given(st.lists(st.tuples(_sizes, _sizes, _sizes), min_size=1, max_size=3), _sizes)
def test_what_is_picked_fits_and_nothing_with_less_padding_does(bounds, shape) -> None:
    profiles = []
    for triple in bounds:
        low, best, high = (tuple(sorted(axis)[rank] for axis in zip(*triple, strict=True)) for rank in range(3))
        profiles.append(profile(low, best, high))
    padded_shapes = {}
    for index, entry in enumerate(profiles):
        low, high = entry["input_ids"]["min"], entry["input_ids"]["max"]
        padded = tuple(max(a, b) for a, b in zip(low, shape, strict=True))
        if all(a <= b for a, b in zip(padded, high, strict=True)):
            padded_shapes[index] = padded
    if not padded_shapes:
        with pytest.raises(ContractError):
            pick(profiles, shape)
        return
    index, padded = pick(profiles, shape)
    assert padded == padded_shapes[index]
    assert np.prod(padded) == min(np.prod(other) for other in padded_shapes.values())


@pytest.mark.parametrize("kind", ["answers", "choices", "fp32"])
def test_padding_and_cutting_give_the_answer_without(bundles, kind) -> None:
    """What the backend does around an engine, around ONNX Runtime instead. "answers" is padding-invariant; for the others the batch
    alone is padded, or to the block in which the text ends, which leaves the row maxima as they are."""
    bundle = Bundle.load(bundles(kind))
    inputs = bundle.golden()[0][1]
    asked = inputs["input_ids"].shape
    wanted = {"answers": (5, 200), "choices": (3, 4, 64), "fp32": (4, 64)}[kind]
    with MraRuntime.load(bundle, "onnxruntime") as runtime:
        plain = runtime.run(**inputs)
        padded = runtime.run(**pad(inputs, wanted))
    for name, output in plain.items():
        mine = cut(bundle, name, padded[name], asked)
        assert mine.shape == output.shape
        real = inputs["attention_mask"].astype(bool) if output.shape[: len(asked)] == asked else slice(None)
        np.testing.assert_allclose(mine[real], output[real], rtol=1e-4, atol=1e-5)


def test_tensors_are_checked_where_they_are_as_arrays_are() -> None:
    spec = InputSpec(("input_ids", "attention_mask", "token_type_ids"), 2, vocab_size=50, type_vocab_size=2, max_length=16)
    arrays = {"input_ids": np.arange(12).reshape(2, 6), "attention_mask": np.array([[1] * 6, [3, 1, 1, 0, 0, 0]])}
    expected = spec.prepare(arrays)
    for dtype in (torch.int32, torch.int64):
        tensors = {name: torch.from_numpy(array).to(dtype) for name, array in arrays.items()}
        prepared = spec.prepare_tensors({**tensors, "token_type_ids": None})
        assert list(prepared) == list(expected)
        for name, tensor in prepared.items():
            assert tensor.dtype == torch.int64
            assert np.array_equal(tensor.numpy(), expected[name])
    ids = torch.zeros(2, 6, dtype=torch.int64)
    assert spec.prepare_tensors({"input_ids": ids})["input_ids"].data_ptr() == ids.data_ptr(), "no copy"
    wrong = {
        "input_ids holds 50": {"input_ids": ids + 50},
        "input_ids holds -1": {"input_ids": ids - 1},
        "token_type_ids holds 2": {"input_ids": ids, "token_type_ids": ids + 2},
        "has dtype torch.float32": {"input_ids": ids.float()},
        "attention_mask is a ndarray": {"input_ids": ids, "attention_mask": np.ones((2, 6))},
        "pass a mask of the same shape": {"input_ids": ids, "attention_mask": ids[:1]},
        "all inputs on one device": {"input_ids": ids, "attention_mask": torch.ones(2, 6, dtype=torch.int64, device="meta")},
        "labels is not an input": {"input_ids": ids, "labels": ids},
        "input_ids is missing": {"attention_mask": ids},
        "has length 17": {"input_ids": torch.zeros(1, 17, dtype=torch.int64)},
        "every axis must be 1 or more": {"input_ids": ids[:0]},
    }
    for message, tensors in wrong.items():
        with pytest.raises(ContractError, match=message):
            spec.prepare_tensors(tensors)


# On a GPU


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "cuda-graphs"])
def on_gpu(request, bundles, tmp_path_factory) -> MraRuntime:
    if not gpu.devices():
        pytest.skip(f"no GPU: {gpu.why_none()}")
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} cannot use the GPU")
    need_plugin()
    bundle = copy(bundles("fp32"), tmp_path_factory.mktemp("gpu") / "bundle")
    build_engine(bundle, EngineOptions(min_shapes=("input_ids:1x16",)))
    return MraRuntime.load(bundle, "tensorrt", cuda_graphs=request.param)


def test_gpu_gives_the_golden_outputs(on_gpu) -> None:
    on_gpu.validate()
    on_gpu.validate()  # through contexts and graphs that are there already


def test_gpu_takes_cuda_tensors_and_gives_cuda_tensors(on_gpu) -> None:
    inputs, outputs = on_gpu.bundle.golden()
    for given_arrays, wanted in zip(inputs, outputs, strict=True):
        answer = on_gpu.run(**{name: torch.from_numpy(array).cuda() for name, array in given_arrays.items()})
        for name, tensor in answer.items():
            assert tensor.is_cuda
            real = given_arrays["attention_mask"].astype(bool)
            np.testing.assert_allclose(tensor.cpu().numpy()[real], wanted[name][real], rtol=2e-3, atol=2e-3)


def test_gpu_serves_many_threads(on_gpu) -> None:
    inputs = on_gpu.bundle.golden()[0]
    expected = [on_gpu.run(**batch) for batch in inputs]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda number: on_gpu.run(**inputs[number % len(inputs)]), range(64)))
    for number, answer in enumerate(answers):
        for name, array in answer.items():
            assert np.array_equal(array, expected[number % len(inputs)][name])
