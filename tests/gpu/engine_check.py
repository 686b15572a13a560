"""The plugin inside a real TensorRT engine on this GPU: export, build, run, compare with PyTorch. Needs the whole package.

    python tests/gpu/engine_check.py [--json FILE]

For each of TensorRT and TensorRT-RTX that is installed, and for fp32, fp16 and bf16: an engine of examples/mra-tiny-python with one
plugin layer for each MRA layer, run through MraRuntime on the sweep of `mra-export verify --quick`. One line for each; exit status
1 if one failed, 0 if all passed, 77 if there is nothing to run on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import needs

NEEDED = {
    **{name: name for name in ("numpy", "torch", "transformers", "safetensors", "tokenizers", "ml_dtypes", "pydantic", "rich")},
    **{name: name for name in ("onnx", "onnx_ir", "onnxscript", "onnxruntime")},
}
CHECKPOINT = Path(__file__).resolve().parents[2] / "examples" / "mra-tiny-python"
RTX_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")
"""What TensorRT-RTX's documentation lists; on another GPU a failure is its own affair."""


def main(arguments: list[str] | None = None, write: Callable[[str], Any] = sys.stdout.write) -> int:
    parser = argparse.ArgumentParser(description="Run the plugin in TensorRT engines on this GPU.")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args(arguments)
    gone = needs.missing(NEEDED)
    if gone:
        return needs.skip(gone, write)
    from mra_export import gpu, libraries, tensorrt_api

    flavours = [name for name in tensorrt_api.FLAVOURS if tensorrt_api.installed(name)]
    if not flavours:
        return needs.skip("neither TensorRT nor TensorRT-RTX is installed: pip install tensorrt", write)
    if not options.checkpoint.is_dir():
        return needs.skip(f"{options.checkpoint} is not there: examples/train_tiny.py makes it", write)
    for library in ("trt_plugin", "ort_ops"):
        if libraries.find(library) is None:
            return needs.skip(f"{libraries.FILES[library]} is not built: {libraries.GET[library]}", write)
    if not gpu.devices():
        return needs.skip(gpu.why_none(), write)

    rows: list[dict[str, Any]] = []
    failed = 0
    with tempfile.TemporaryDirectory(prefix="mra-engine-check-") as folder:
        for dtype in ("fp32", "fp16", "bf16"):
            for flavour in flavours:
                ok, text, found = _engine(options.checkpoint, Path(folder), dtype, flavour)
                rows += found
                failed += ok is False
                write(f"{ {True: 'ok  ', False: 'FAIL', None: 'SKIP'}[ok] } {flavour} {dtype}: {text}\n")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    if not failed and not rows:
        return needs.skip("no TensorRT here supports this GPU", write)
    write(f"{failed} failed\n")
    return 1 if failed else 0


def _engine(checkpoint: Path, folder: Path, dtype: str, flavour: str) -> tuple[bool | None, str, list[dict[str, Any]]]:
    """Whether it is right (None: left out), why, and the comparisons."""
    from mra_export import gpu
    from mra_export.bundle import Bundle
    from mra_export.engine import EngineOptions, build_engine
    from mra_export.errors import EngineError, MraExportError
    from mra_export.export import export_bundle
    from mra_export.verify import verify

    here = gpu.devices()[0]
    try:
        path = export_bundle(checkpoint, folder / f"{flavour}-{dtype}", dtype=dtype)
        entry = build_engine(Bundle.load(path), EngineOptions(backend=flavour))
        bundle = Bundle.load(path)
        layers = bundle.manifest.model.num_hidden_layers
        if entry.plugin_layers != layers:
            return False, f"{entry.plugin_layers} plugin layers, the model has {layers}", []
        report = verify(bundle, ["tensorrt"], quick=True)
    except EngineError as error:
        if flavour == "tensorrt-rtx" and here.compute_capability not in RTX_CAPABILITIES:
            return None, f"TensorRT-RTX does not list {here.name}'s compute capability {here.compute_capability}: {error}", []
        return False, str(error), []
    except MraExportError as error:
        return False, str(error), []
    rows = [row.as_dict() for row in report.rows]
    if not report.passed:
        worst = report.failed_rows[0]
        return False, f"{worst.check} {worst.case}: {worst.reason}", rows
    return True, f"{entry.builder}, {entry.plugin_layers} plugin layers, {len(rows)} comparisons", rows


if __name__ == "__main__":
    raise SystemExit(main())
