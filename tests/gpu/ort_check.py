"""The operator inside ONNX Runtime's CUDA provider on this GPU: export, run, compare with PyTorch. Needs the whole package.

    python tests/gpu/ort_check.py [--json FILE]

For fp32, fp16 and bf16, a bundle of examples/mra-tiny-python through MraRuntime: the sweep of `mra-export verify --quick`, golden
outputs, torch CUDA tensors that go in and out without a copy and in order with other streams, and CUDA graphs replayed with new
data. One line for each check; exit status 1 if one failed, 0 if all passed, 77 if there is nothing to run on.
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
from engine_check import CHECKPOINT, NEEDED

SHAPES = ((1, 1), (2, 33), (1, 300), (3, 100))


def main(arguments: list[str] | None = None, write: Callable[[str], Any] = sys.stdout.write) -> int:
    parser = argparse.ArgumentParser(description="Run the operator in ONNX Runtime's CUDA provider on this GPU.")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args(arguments)
    gone = needs.missing(NEEDED)
    if gone:
        return needs.skip(gone, write)
    import onnxruntime

    from mra_export import gpu, kernel, libraries
    from mra_export.backends.onnx_runtime import cuda_available
    from mra_export.errors import BackendError

    if not cuda_available():
        return needs.skip(f"onnxruntime {onnxruntime.__version__} has no CUDA provider: pip install onnxruntime-gpu", write)
    if not options.checkpoint.is_dir():
        return needs.skip(f"{options.checkpoint} is not there: examples/train_tiny.py makes it", write)
    library = libraries.find("ort_ops")
    if library is None or not kernel.has_cuda(library):
        return needs.skip(f"{libraries.FILES['ort_ops']} is not built with CUDA: {libraries.GET['trt_plugin']}", write)
    if not gpu.devices():
        return needs.skip(gpu.why_none(), write)
    try:
        from mra_export.backends.onnx_runtime_cuda import start_provider

        start_provider()
    except BackendError as error:
        return needs.skip(str(error), write)  # onnxruntime-gpu is there, its CUDA libraries are not

    check = _Check(write)
    with tempfile.TemporaryDirectory(prefix="mra-ort-check-") as folder:
        for dtype in ("fp32", "fp16", "bf16"):
            check.bundle(options.checkpoint, Path(folder) / dtype, dtype)
    if options.json:
        options.json.write_text(json.dumps({"rows": check.rows}, indent=1) + "\n")
    write(f"{check.failed} failed\n")
    return 1 if check.failed else 0


class _Check:
    def __init__(self, write: Callable[[str], Any]) -> None:
        self.write = write
        self.rows: list[dict[str, Any]] = []
        self.failed = 0

    def bundle(self, checkpoint: Path, path: Path, dtype: str) -> None:
        from mra_export.bundle import Bundle
        from mra_export.export import export_bundle

        if not self._one(f"{dtype} export", lambda: str(export_bundle(checkpoint, path, dtype=dtype).name)):
            return
        bundle = Bundle.load(path)
        self._one(f"{dtype} verify", lambda: self._verify(bundle))
        self._one(f"{dtype} tensors", lambda: _tensors(bundle))
        self._one(f"{dtype} cuda graphs", lambda: _graphs(bundle))

    def _one(self, name: str, run: Callable[[], str]) -> bool:
        try:
            text, word = run(), "ok  "
        except Exception as error:
            text, word = f"{type(error).__name__}: {error}", "FAIL"
            self.failed += 1
        self.write(f"{word} {name}: {text}\n")
        return word == "ok  "

    def _verify(self, bundle: Any) -> str:
        from mra_export.verify import verify

        report = verify(bundle, ["onnxruntime-cuda"], quick=True)
        self.rows += [row.as_dict() for row in report.rows]
        if not report.passed:
            worst = report.failed_rows[0]
            raise AssertionError(f"{worst.check} {worst.case}: {worst.reason}")
        return f"{len(report.rows)} comparisons"


def _inputs(bundle: Any, batch: int, length: int, seed: int) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, bundle.manifest.model.vocab_size, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, length * 3 // 5 + 1 :] = 0
    return {"input_ids": ids.cuda(), "attention_mask": mask.cuda()}


def _tensors(bundle: Any) -> str:
    """Tensors in, tensors out, the same bits as for arrays; and in order with work that is still queued on the caller's stream."""
    import torch

    from mra_export.runtime import MraRuntime

    with MraRuntime.load(bundle, "onnxruntime", "cuda") as runtime:
        for seed, shape in enumerate(SHAPES):
            given = _inputs(bundle, *shape, seed)
            out = runtime.run(**given)["logits"]
            _expect(out.is_cuda, "the output left the GPU")
            arrays = runtime.run(**{name: tensor.cpu().numpy() for name, tensor in given.items()})["logits"]
            _expect(torch.equal(out.float().cpu(), torch.from_numpy(arrays).float()), f"{shape}: tensors and arrays differ")
        running = runtime._running
        given = _inputs(bundle, 2, 300, 9)
        wanted = runtime.run(**given)["logits"]
        late = {name: torch.zeros_like(tensor) for name, tensor in given.items()}
        torch.cuda.synchronize()
        for _ in range(5):
            with torch.cuda.stream(torch.cuda.Stream()):
                torch.cuda._sleep(100_000_000)  # about 50 ms: the data is far from there when the call is queued
                for name, tensor in given.items():
                    late[name].copy_(tensor)
                out = running.run_cuda(late)["logits"]  # type: ignore[union-attr]
                copied = out.clone()  # in order with what comes next on this stream, too
                for tensor in late.values():
                    tensor.zero_()
            torch.cuda.synchronize()
            _expect(torch.equal(copied, wanted), "a call did not wait for the caller's stream, or the stream for the call")
    return f"{len(SHAPES)} shapes, and behind 5 busy streams"


def _graphs(bundle: Any) -> str:

    from mra_export.runtime import MraRuntime

    replays, dtype = 0, bundle.manifest.dtype
    with (
        MraRuntime.load(bundle, "onnxruntime", "cuda") as plain,
        MraRuntime.load(bundle, "onnxruntime", "cuda", cuda_graphs=True) as graphs,
    ):
        graphs.validate()
        for seed in range(4):
            for shape in SHAPES:
                given = _inputs(bundle, *shape, 10 + seed)
                out, wanted = graphs.run(**given)["logits"], plain.run(**given)["logits"]
                _close(out, wanted, dtype, f"{shape}, call {seed + 1}")
                replays += seed > 0
        for length in range(1, 21):  # more shapes than graphs
            given = _inputs(bundle, 1, length, length)
            _close(graphs.run(**given)["logits"], plain.run(**given)["logits"], dtype, f"length {length}")
    return f"{len(SHAPES)} graphs, {replays} replays with new data, 20 more shapes"


def _close(actual: Any, wanted: Any, dtype: str, name: str) -> None:
    """In a graph, cuBLAS may choose other products: not the same bits."""
    limit = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 2e-2}[dtype] * float(wanted.abs().max())
    worst = float((actual - wanted).abs().max())
    _expect(worst <= limit, f"{name}: a graph's result differs from a plain call's by {worst:.1e}, more than {limit:.1e}")


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


if __name__ == "__main__":
    raise SystemExit(main())
