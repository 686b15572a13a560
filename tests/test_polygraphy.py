"""Polygraphy on a bundle: as `verify` uses it, and by the commands of docs/tensorrt.md, with TensorRT-RTX."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from engines import need_plugin, needs_rtx

from mra_export import polygraphy_compare
from mra_export.bundle import Bundle
from mra_export.parity import FAIL, PASS
from mra_export.runtime import MraRuntime
from mra_export.verify import verify

ROOT = Path(__file__).resolve().parent.parent

if importlib.util.find_spec("polygraphy") is None:
    pytest.skip("polygraphy is not installed: pip install polygraphy", allow_module_level=True)


@pytest.mark.parametrize("kind", ["fp32", "choices", "answers"])
def test_polygraphy_finds_no_difference_between_the_runtimes(bundles, kind) -> None:
    bundle = Bundle.load(bundles(kind))
    inputs = bundle.golden()[0]
    rows = polygraphy_compare.compare(bundle, ["onnxruntime", "onnxruntime-function"], inputs)
    assert len(rows) == len(inputs) * len(bundle.manifest.outputs)
    assert {row.status for row in rows} == {PASS}
    assert all("against onnxruntime-function" in row.case for row in rows)


@pytest.mark.parametrize("wrong", [0.01, float("nan")])
def test_polygraphy_finds_a_difference(bundles, monkeypatch, wrong) -> None:
    """One number that is off, at a real token; the same at padding means nothing."""
    bundle = Bundle.load(bundles("fp32"))
    inputs = bundle.golden()[0][1:2]  # rows of 33 and 20 tokens
    real = MraRuntime.run

    def spoil(where: int):
        def run(self, **arrays):
            outputs = real(self, **arrays)
            if self.use_function_body:
                outputs["logits"][1, where, 5] += wrong
            return outputs

        return run

    load = MraRuntime.load.__func__

    def marked(cls, *args, use_op_library: bool = True, **options):
        runtime = load(cls, *args, use_op_library=use_op_library, **options)
        runtime.use_function_body = not use_op_library
        return runtime

    monkeypatch.setattr(MraRuntime, "load", classmethod(marked))
    for where, status in ((25, PASS), (3, FAIL)):
        monkeypatch.setattr(MraRuntime, "run", spoil(where))
        (row,) = polygraphy_compare.compare(bundle, ["onnxruntime", "onnxruntime-function"], inputs)
        assert row.status == status
        if status == FAIL:
            assert "differs from onnxruntime-function by up to" in row.reason


def test_verify_has_polygraphy_rows_for_runtimes_of_one_graph(bundles, monkeypatch) -> None:
    bundle = Bundle.load(bundles("fp32"))
    monkeypatch.setattr("mra_export.verify.sweep", lambda *_: [])
    monkeypatch.setattr("mra_export.verify.text_cases", lambda *_: [])
    rows = verify(bundle, ["torch", "onnxruntime", "onnxruntime-function"]).rows
    compared = [row for row in rows if row.check == "polygraphy"]
    assert {(row.backend, row.status) for row in compared} == {("onnxruntime", PASS)}
    alone = verify(bundle, ["torch", "onnxruntime"]).rows
    assert not [row for row in alone if row.check == "polygraphy"]


def test_outputs_at_padding_are_left_as_they_are_unless_asked(bundles) -> None:
    bundle = Bundle.load(bundles("fp32"))
    feed = bundle.golden()[0][1]
    padding = feed["attention_mask"] == 0
    for blank in (True, False):
        with polygraphy_compare.runner(bundle, "onnxruntime", blank_padding=blank) as runner:
            logits = runner.infer(feed)["logits"]
            assert runner.last_inference_time() > 0
        assert bool((logits[padding] == 0).all()) == blank
        assert np.abs(logits[~padding]).max() > 0


@needs_rtx
def test_the_commands_of_the_documentation_run(tmp_path) -> None:
    from test_docs import blocks, commands

    need_plugin()
    extensions = importlib.metadata.entry_points(group="polygraphy.run.plugins")
    assert "mra-export" in {extension.name for extension in extensions}, "pip install mra_export again: its entry point is new"
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    found = [body for _, info, body in blocks(ROOT / "docs" / "tensorrt.md") if info == "title=tensorrt-rtx"]
    assert len(found) == 3
    for command in (command for body in found for command in commands(body)):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        if "grep PLUGIN_V3" in command:
            assert done.stdout.count("MraAttention") == 2
        if "polygraphy run" in command:
            assert "Passed: 4/4 iterations" in done.stdout
    assert Bundle.load(tmp_path / "bundle").manifest.engines[0]["profiles"][0]["input_ids"]["max"] == [16, 256]
