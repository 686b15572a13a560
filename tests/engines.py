"""What the tests of TensorRT engines share. TensorRT-RTX builds them on any machine; running one needs a GPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import programs
import pytest

from mra_export import libraries, tensorrt_api
from mra_export.bundle import Bundle, file_entry

needs_rtx = pytest.mark.skipif(
    not tensorrt_api.installed("tensorrt-rtx"),
    reason="tensorrt-rtx is not installed: " + tensorrt_api.FLAVOURS["tensorrt-rtx"].install,
)
SMALLEST = {"min_shapes": ("input_ids:1x1",), "opt_shapes": ("input_ids:1x32",), "max_shapes": ("input_ids:2x64",)}

PLAN = "engines/tensorrt-10.14.1.48-sm90-fp32.plan"
ENGINE: dict[str, Any] = {
    "file": PLAN,
    "backend": "tensorrt",
    "builder": "10.14.1.48",
    "dtype": "fp32",
    "profiles": [
        {name: {"min": [1, 1], "opt": [1, 64], "max": [2, 64]} for name in ("input_ids", "attention_mask")},
        {name: {"min": [1, 65], "opt": [4, 256], "max": [16, 256]} for name in ("input_ids", "attention_mask")},
    ],
    "plugin_layers": 2,
    "plugin": {
        "name": "MraAttention",
        "version": "1",
        "namespace": "",
        "library": "lib/libmra_trt.so",
        "sha256": "0" * 64,
        "embedded": True,
    },
    "compute_capabilities": ["9.0"],
    "driver": "13.0",
    "options": {},
}


def need_plugin() -> Path:
    """The built plugin library. Skips where it could not be built; a machine that can build it must have it."""
    if libraries.find("trt_plugin") is None and programs.nvcc() is None:
        pytest.skip("libmra_trt.so is not built: there is no nvcc")
    return libraries.require("trt_plugin")


def copy(folder: Path, target: Path) -> Bundle:
    shutil.copytree(folder, target)
    return Bundle.load(target)


def rewrite(folder: Path, *added: str, **fields: Any) -> Bundle:
    """Give the manifest the files' real hashes, as a forger would, and other fields; files that are gone are taken out."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"] = {
        name: file_entry(folder / name).model_dump() for name in (*manifest["files"], *added) if (folder / name).exists()
    }
    path.write_text(json.dumps({**manifest, **fields}))
    return Bundle.load(folder)


def with_engines(bundle: Path, folder: Path, *rows: dict[str, Any]) -> Bundle:
    """A copy of a bundle with plans that no TensorRT would take, and rows of the manifest for them; without rows, ENGINE's."""
    rows = rows or (ENGINE,)
    shutil.copytree(bundle, folder)
    (folder / "engines").mkdir()
    for row in rows:
        (folder / row["file"]).write_bytes(b"a plan")
    return rewrite(folder, *(row["file"] for row in rows), engines=list(rows))


def bring_plugin(bundle: Bundle, library: bytes) -> Bundle:
    """Its engine ENGINE no longer has its plugin embedded, but needs this library."""
    path = bundle.path / ENGINE["plugin"]["library"]
    path.write_bytes(library)
    plugin = {**ENGINE["plugin"], "embedded": False, "sha256": file_entry(path).sha256}
    return rewrite(bundle.path, ENGINE["plugin"]["library"], engines=[{**ENGINE, "plugin": plugin}])


def state(folder: Path) -> dict[str, Any]:
    """Every file and folder with its content's hash."""
    return {str(path.relative_to(folder)): file_entry(path) if path.is_file() else None for path in sorted(folder.rglob("*"))}
