"""From a bundle to a TensorRT engine, with TensorRT-RTX: what is built, what is refused, and what an interruption leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import onnx
import psutil
import pytest
from click.testing import CliRunner
from engines import SMALLEST, copy, need_plugin, needs_rtx, rewrite, state
from processes import started

from mra_export import bundle as bundle_module
from mra_export import cli, engine, gpu, libraries, tensorrt_api
from mra_export.bundle import MODEL, OP_LIBRARY, Bundle
from mra_export.contract import OP_TYPE
from mra_export.engine import PLUGIN_LIBRARY, EngineOptions, build_engine, choose_backend
from mra_export.errors import BundleError, ContractError, EngineError, PluginLoadError
from mra_export.gpu import Gpu
from mra_export.plan import read_header
from mra_export.profiles import describe, make_profiles


@pytest.fixture
def plugin() -> Path:
    return need_plugin()


@pytest.fixture
def own(bundles, tmp_path) -> Bundle:
    return copy(bundles("fp32"), tmp_path / "bundle")


# Builds


@needs_rtx
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_every_dtype_builds_with_one_plugin_layer_per_layer(bundles, plugin, tmp_path, dtype) -> None:
    bundle = copy(bundles(dtype), tmp_path / "bundle")
    said: list[str] = []
    entry = build_engine(bundle, EngineOptions(backend="tensorrt-rtx", **SMALLEST), lambda text, passing: said.append(text))
    assert entry.plugin_layers == bundle.manifest.model.num_hidden_layers == 2
    version = tensorrt_api.version("tensorrt-rtx")
    assert entry.file == f"engines/tensorrt-rtx-{version}-portable-{dtype}.plan"
    loaded = Bundle.load(bundle.path)  # hashes and all
    assert loaded.manifest.engines == [entry.model_dump()] == bundle.manifest.engines
    header = read_header(loaded.file(entry.file))
    assert (header.backend, header.version) == ("tensorrt-rtx", version)
    assert header.size == loaded.file(entry.file).stat().st_size
    assert entry.plugin is not None
    assert entry.plugin.sha256 == loaded.manifest.files[PLUGIN_LIBRARY].sha256 == bundle_module.file_entry(plugin).sha256
    assert any("Building engine" in text for text in said), "TensorRT's own progress is passed on"
    assert not list(bundle.path.rglob("*.partial"))


@needs_rtx
def test_without_the_plugin_the_function_body_is_built_in(own, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv(libraries.DIRECTORY_VARIABLE, str(tmp_path))  # no library anywhere
    entry = build_engine(own.path, EngineOptions(plugin=False, **SMALLEST))
    assert (entry.plugin_layers, entry.plugin, entry.options) == (0, None, {"plugin": False})
    assert PLUGIN_LIBRARY not in Bundle.load(own.path).manifest.files


@needs_rtx
def test_a_second_build_of_the_same_name_replaces_the_first(own, plugin) -> None:
    shapes = {"min_shapes": ("input_ids:1x1",) * 2, "opt_shapes": ("input_ids:1x32", "input_ids:8x64"), "max_shapes": ()}
    first = build_engine(own, EngineOptions(**SMALLEST))
    second = build_engine(own, EngineOptions(embed_plugin=True, **shapes))
    assert first.file == second.file
    manifest = Bundle.load(own.path).manifest
    assert manifest.engines == [second.model_dump()]
    assert describe(second.profiles) == "1x1 to 8x256 (best 1x32) or 1x1 to 8x256 (best 8x64)"
    assert second.plugin is not None
    assert second.plugin.embedded
    one_gpu = build_engine(own, EngineOptions(compute_capabilities=("8.9",), builder_opt_level=0, workspace_mb=64, **SMALLEST))
    assert one_gpu.file.endswith("-sm89-fp32.plan")
    assert one_gpu.compute_capabilities == ["8.9"]
    assert one_gpu.options == {"compute_capabilities": ["8.9"], "builder_opt_level": 0, "workspace_mb": 64}
    assert [row["file"] for row in Bundle.load(own.path).manifest.engines] == [second.file, one_gpu.file]


@needs_rtx
def test_multiple_choice_and_token_types(bundles, plugin, tmp_path) -> None:
    for kind, names in (
        ("choices", ["input_ids", "attention_mask"]),
        ("answers", ["input_ids", "attention_mask", "token_type_ids"]),
    ):
        bundle = copy(bundles(kind), tmp_path / kind)
        shapes = (("input_ids:1x1x1",), ("input_ids:2x3x64",)) if kind == "choices" else (("input_ids:1x1",), ("input_ids:2x64",))
        entry = build_engine(bundle, EngineOptions(min_shapes=shapes[0], max_shapes=shapes[1]))
        assert entry.plugin_layers == 2
        assert list(entry.profiles[0]) == names
        assert entry.profiles[0]["attention_mask"]["max"] == ([2, 3, 64] if kind == "choices" else [2, 64])


# Refusals, each of which leaves the bundle as it was


@needs_rtx
def test_a_missing_plugin_library_is_named_with_what_gets_it(own, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv(libraries.DIRECTORY_VARIABLE, str(tmp_path))
    before = state(own.path)
    with pytest.raises(PluginLoadError, match=r"libmra_trt\.so is not in .*pip install.*--no-plugin"):
        build_engine(own)
    assert state(own.path) == before


@needs_rtx
def test_a_library_that_is_no_plugin_is_refused(own, monkeypatch, tmp_path) -> None:
    shutil.copy(own.file(OP_LIBRARY), tmp_path / "libmra_trt.so")
    monkeypatch.setenv(libraries.DIRECTORY_VARIABLE, str(tmp_path))
    before = state(own.path)
    with pytest.raises(PluginLoadError, match=r"does not load as a TensorRT plugin library: .*getCreators"):
        build_engine(own)
    assert state(own.path) == before


@needs_rtx
def test_a_library_of_another_plugin_version_is_refused(plugin) -> None:
    code = (
        "from pathlib import Path; from mra_export import tensorrt_api as api; api.PLUGIN_VERSION = '2';"
        "trt = api.load('tensorrt-rtx');"
        f"logger = api.make_logger(trt, print); builder = trt.Builder(logger); api.register_plugin(trt, Path({str(plugin)!r}), str)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "brings no plugin MraAttention version '2', namespace ''; it brings version '1'" in done.stderr


@needs_rtx
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_graph_for_another_plugin_version_is_refused(own, plugin, nodes) -> None:
    graph = onnx.load(own.file(MODEL))
    for node in [node for node in graph.graph.node if node.op_type == OP_TYPE][:nodes]:
        next(attribute for attribute in node.attribute if attribute.name == "plugin_version").s = b"2"
    onnx.save(graph, own.file(MODEL))
    bundle = rewrite(own.path)
    before = state(own.path)
    with pytest.raises(EngineError, match=rf"the network has {2 - nodes} plugin layers, the model 2 .*MraAttention, version '1'"):
        build_engine(bundle, EngineOptions(**SMALLEST))
    assert state(own.path) == before


@needs_rtx
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timing_cache": Path("timings")}, "--timing-cache is not for tensorrt-rtx"),
        ({"version_compatible": True}, "--version-compatible is not for tensorrt-rtx"),
        ({"hardware_compatibility": "ampere-plus"}, "--hardware-compatibility is not for tensorrt-rtx"),
        ({"compute_capabilities": ("9.9",)}, "cannot build for compute capability 9.9: it knows .*8.9"),
    ],
)
def test_options_the_backend_does_not_know(own, plugin, options, message) -> None:
    before = state(own.path)
    with pytest.raises(EngineError, match=message):
        build_engine(own, EngineOptions(backend="tensorrt-rtx", **options))
    assert state(own.path) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "onnx"}, "backend is 'onnx'"),
        ({"workspace_mb": 0}, "workspace_mb is 0"),
        ({"builder_opt_level": 6}, "builder_opt_level is 6"),
        ({"embed_plugin": True, "plugin": False}, "contradict"),
        ({"compute_capabilities": ("sm89",)}, "'sm89': write it as 8.9"),
        ({"hardware_compatibility": "all"}, "'all'"),
    ],
)
def test_option_values_that_make_no_sense(options, message) -> None:
    with pytest.raises(ContractError, match=message):
        EngineOptions(**options)


@needs_rtx
def test_a_builder_that_dies_is_an_error_and_no_more(own, plugin, monkeypatch, tmp_path) -> None:
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\necho terminate called without an active exception >&2\nkill -ABRT $$\n")
    dying.chmod(0o755)
    monkeypatch.setattr(engine.sys, "executable", str(dying))
    before = state(own.path)
    with pytest.raises(EngineError, match=r"ended by signal 6 \(SIGABRT\): terminate called"):
        build_engine(own)
    assert state(own.path) == before


@needs_rtx
def test_a_bundle_that_cannot_be_written_is_refused_before_any_work(own, plugin, monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # tests may run as root, whom no permission stops
    with pytest.raises(BundleError, match="cannot be written to"):
        build_engine(own)


@needs_rtx
def test_a_write_that_fails_half_way_leaves_a_bundle_that_loads(own, plugin, monkeypatch) -> None:
    build_engine(own, EngineOptions(**SMALLEST))
    real, calls = bundle_module.write_manifest, []

    def fails_the_second_time(folder, manifest) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError("no space left")
        real(folder, manifest)

    monkeypatch.setattr(bundle_module, "write_manifest", fails_the_second_time)
    with pytest.raises(OSError, match="no space left"):
        build_engine(own, EngineOptions(embed_plugin=True, **SMALLEST))  # a plan of other bytes
    assert Bundle.load(own.path).manifest.engines == []  # neither the old engine with a new file's hash nor the reverse


# What "auto" takes


@pytest.mark.parametrize(
    ("installed", "devices", "chosen"),
    [
        ({"tensorrt", "tensorrt-rtx"}, (Gpu("GPU", "9.0"),), "tensorrt"),
        ({"tensorrt", "tensorrt-rtx"}, (), "tensorrt-rtx"),
        ({"tensorrt-rtx"}, (Gpu("GPU", "9.0"),), "tensorrt-rtx"),
        ({"tensorrt"}, (), "tensorrt is installed, but .*pip install tensorrt-rtx"),
        (set(), (), "tensorrt is not installed, .*pip install tensorrt-rtx"),
    ],
)
def test_auto_takes_what_works_here(monkeypatch, installed, devices, chosen) -> None:
    monkeypatch.setattr(tensorrt_api, "installed", lambda name: name in installed)
    monkeypatch.setattr(gpu, "devices", lambda: devices)
    if chosen in installed:
        assert choose_backend("auto") == chosen
        return
    with pytest.raises(EngineError, match=chosen):
        choose_backend("auto")


def test_tensorrt_without_a_gpu_says_what_needs_none(monkeypatch) -> None:
    monkeypatch.setattr(tensorrt_api, "installed", lambda name: True)
    monkeypatch.setattr(gpu, "devices", lambda: ())
    with pytest.raises(EngineError, match=r"tensorrt builds engines only where a GPU is.*use tensorrt-rtx"):
        choose_backend("tensorrt")


# Shapes


def test_profiles_from_the_checkpoint(bundles) -> None:
    assert describe(make_profiles(Bundle.load(bundles("fp32")), (), (), (), True)) == "1x1 to 8x256 (best 1x256)"
    assert describe(make_profiles(Bundle.load(bundles("choices")), (), (), (), True)) == "1x1x1 to 8x4x256 (best 1x4x256)"
    long = Bundle.load(bundles("fp32"))
    long.manifest.model.max_position_embeddings = 8192  # 512 MB for each N x N tensor of a row's two heads
    assert describe(make_profiles(long, (), (), (), False)) == "1x1 to 2x8192 (best 1x8192)"
    assert describe(make_profiles(long, (), (), (), True)) == "1x1 to 8x8192 (best 1x8192)"


def test_what_is_left_out_adapts_to_what_is_given(bundles) -> None:
    bundle = Bundle.load(bundles("answers"))
    assert describe(make_profiles(bundle, (), (), ("input_ids:4x64",), True)) == "1x1 to 4x64 (best 1x64)"
    assert describe(make_profiles(bundle, ("input_ids:16x32",), (), (), True)) == "16x32 to 16x256 (best 16x256)"
    assert describe(make_profiles(bundle, (), ("input_ids:32x128",), (), True)) == "1x1 to 32x256 (best 32x128)"
    both = make_profiles(bundle, (), (), ("input_ids:4x64,token_type_ids:4x64", "attention_mask:2x128"), True)
    assert [profile["token_type_ids"]["max"] for profile in both] == [[4, 64], [2, 128]]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("512", "is not NAME:SIZExSIZE: write it as input_ids:1x512"),
        ("input_ids:1x", "is not NAME:SIZExSIZE"),
        ("input_ids:-1x5", "is not NAME:SIZExSIZE"),
        ("input_ids:1x5;", "is not NAME:SIZExSIZE"),
        ("", "is not NAME:SIZExSIZE"),
        ("ids:1x5", "names ids, the graph's inputs are input_ids, attention_mask"),
        ("input_ids:5", "has 1 axes, the input 2"),
        ("input_ids:1x2x3", "has 3 axes, the input 2"),
        ("input_ids:0x5", "axis of 0"),
        ("input_ids:1x257", "max_position_embeddings is 256"),
        ("input_ids:99999999999x5", "below 2\\^31"),
        ("input_ids:1x5,attention_mask:1x6", "different shapes"),
    ],
)
@pytest.mark.parametrize("kind", ["min", "opt", "max"])
def test_shapes_that_are_refused(bundles, spec, message, kind) -> None:
    given = {"min": (), "opt": (), "max": (), kind: (spec,)}
    with pytest.raises(ContractError, match=f"--{kind}-shapes.*{message}"):
        make_profiles(Bundle.load(bundles("fp32"), verify_hashes=False), given["min"], given["opt"], given["max"], True)


def test_profiles_that_contradict_themselves(bundles) -> None:
    bundle = Bundle.load(bundles("fp32"))
    with pytest.raises(ContractError, match="min 2x1, opt 1x8, max 8x256: no axis may shrink"):
        make_profiles(bundle, ("input_ids:2x1",), ("input_ids:1x8",), (), True)
    with pytest.raises(ContractError, match="min 1x64, opt 1x32, max 1x32"):
        make_profiles(bundle, ("input_ids:1x64",), (), ("input_ids:1x32",), True)
    with pytest.raises(ContractError, match="2 --min-shapes, 0 --opt-shapes, 1 --max-shapes: give each kind as often"):
        make_profiles(bundle, ("input_ids:1x1", "input_ids:1x2"), (), ("input_ids:1x32",), True)


# The command line


@needs_rtx
@pytest.mark.parametrize(
    ("ignored", "sent", "code"),
    [([], signal.SIGINT, cli.INTERRUPTED), ([signal.SIGINT], signal.SIGTERM, cli.TERMINATED)],
)
def test_a_build_that_is_stopped_leaves_the_bundle_as_it_was(own, ignored, sent, code) -> None:
    before = state(own.path)
    command = [sys.executable, "-c", "import sys; from mra_export.cli import main; main(sys.argv[1:])"]
    with started([*command, "engine", own.path, "--no-plugin"], ignored, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if "Building engine" in line:
                break
        (builder,) = psutil.Process(process.pid).children()
        process.send_signal(sent)
        rest = process.communicate(timeout=30)[1]
        assert process.returncode == code, rest
        assert not builder.is_running()
    assert "Traceback" not in rest
    assert state(own.path) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_last_step_waits_for_its_end(number) -> None:
    came: list[int] = []
    before = signal.signal(number, lambda number, frame: came.append(number))
    try:
        with engine._uninterrupted():
            signal.raise_signal(number)
            assert came == []
        assert came == [number]
        signal.signal(number, signal.SIG_IGN)
        with engine._uninterrupted():
            signal.raise_signal(number)
        assert came == [number], "what is ignored stays ignored"
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


@needs_rtx
def test_export_builds_the_engine_before_it_publishes(plugin, tmp_path) -> None:
    from exported import checkpoint

    source = checkpoint(tmp_path / "checkpoint")
    arguments = ["export", str(source), str(tmp_path / "out"), "--no-verify", "--dtype", "fp16", "--engine", "tensorrt-rtx"]
    done = CliRunner().invoke(cli.main, [*arguments, "--max-shapes", "input_ids:2x64"])
    assert done.exit_code == 0, done.output
    shown = CliRunner().invoke(cli.main, ["inspect", str(tmp_path / "out"), "--json"])
    (entry,) = json.loads(shown.stdout)["engines"]
    assert (entry["plugin_layers"], entry["dtype"]) == (2, "fp16")
    assert entry["builder"] == tensorrt_api.version("tensorrt-rtx")
    assert entry["profiles"][0]["input_ids"] == {"min": [1, 1], "opt": [1, 64], "max": [2, 64]}
    table = CliRunner().invoke(cli.main, ["inspect", str(tmp_path / "out")]).stdout
    assert entry["file"] in table
    assert "1x1 to 2x64 (best 1x64)" in table


@pytest.mark.parametrize("wanted", ["auto", "tensorrt-rtx", "none"])
def test_export_where_nothing_is_installed(monkeypatch, tmp_path, wanted) -> None:
    import mra_export.export

    exported: list[object] = []
    monkeypatch.setattr(tensorrt_api, "installed", lambda name: False)
    monkeypatch.setattr(mra_export.export, "export_bundle", lambda *args, finish, **options: exported.append(finish))
    done = CliRunner().invoke(cli.main, ["export", "checkpoint", str(tmp_path), "--engine", wanted])
    if wanted == "tensorrt-rtx":
        assert done.exit_code == EngineError.exit_code
        assert "tensorrt-rtx is not installed: pip install" in done.output
        assert not exported
    else:
        assert done.exit_code == 0, done.output
        assert exported == [None]
        assert ("No engine: no engine can be built here" in done.output) == (wanted == "auto")


def test_engine_options_without_an_engine_are_a_mistake(tmp_path) -> None:
    done = CliRunner().invoke(cli.main, ["export", "checkpoint", str(tmp_path / "out"), "--no-plugin"])
    assert done.exit_code == 2
    assert "--no-plugin says how to build an engine: add --engine" in done.output


def test_bad_shapes_are_wrong_usage(bundles, monkeypatch) -> None:
    monkeypatch.setattr(engine, "check_can_build", lambda options: ("tensorrt-rtx", None))
    done = CliRunner().invoke(cli.main, ["engine", str(bundles("fp32")), "--max-shapes", "input_ids:8"])
    assert done.exit_code == 2
    assert "has 1 axes" in done.output
