"""Times whole encoders on a GPU, side by side in one run: MRA in torch, ONNX Runtime and TensorRT, and dense RoBERTa in torch.

    python benchmarks/gpu_model.py [--json FILE] [--dtype float16] [--seconds S] [--limit S]

base-512-4 at B 1, 8 and 32 (N 512) and base-4096-8-d3 at B 1 and 8 (N 4096), random weights, no padding. Ids and mask are on the
GPU and the hidden states stay there. Each answer is checked beside float32 in torch before it is timed: MRA's beside the reference
attention, dense RoBERTa's beside itself. All that runs takes turns; times are from CUDA events, "calls" with what the host adds,
"graph" from a captured CUDA graph. What cannot run is left out with the reason. `--device cpu` runs toy shapes: a test of this
script, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "gpu"))
import needs

NEEDED = {name: name for name in ("numpy", "torch", "transformers", "safetensors", "tokenizers", "ml_dtypes", "pydantic")}
DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
"""torch's name -> the bundle's."""


@dataclass(frozen=True)
class Case:
    preset: str
    length: int
    batches: tuple[int, ...]


CASES = (Case("base-512-4", 512, (1, 8, 32)), Case("base-4096-8-d3", 4096, (1, 8)))
TOY_CASES = (Case("tiny", 64, (1, 2)),)


class LeftOutError(Exception):
    """Why a peer is not timed."""


Run = Callable[[Any, Any], Any]
"""input_ids and attention_mask, (B, N) int64 on the device -> last_hidden_state, (B, N, width)."""


class Setup:
    """One preset in one dtype: its models, and what runs them, opened when first asked for."""

    def __init__(self, case: Case, dtype: str, device: Any, folder: Path, layers: int | None, compile_seconds: float) -> None:
        import torch

        from mra_export.model import load
        from mra_export.presets import init_checkpoint

        self.case, self.dtype, self.device, self.folder, self.layers = case, dtype, device, folder, layers
        self.compile_seconds = compile_seconds
        checkpoint = folder / "checkpoint"
        if not checkpoint.exists():
            init_checkpoint(case.preset, checkpoint, num_hidden_layers=layers)
        self.checkpoint = checkpoint
        self.type = getattr(torch, dtype)
        self.reference = load(checkpoint, task="feature-extraction").to(device)
        self.reference.set_reference_attention(True)
        self.mra = load(checkpoint, task="feature-extraction", dtype=self.type).to(device)
        torch.compiler.reset()

    @cached_property
    def wide_dense(self) -> Any:
        from dense_roberta import dense_model

        return dense_model(self.case.preset, "sdpa", self.layers).to(self.device)

    @cached_property
    def dense(self) -> Any:
        import copy

        return copy.deepcopy(self.wide_dense).to(self.type)

    @cached_property
    def bundle(self) -> Path:
        """A bundle without weights. Raises LeftOutError where it cannot be made."""
        gone = needs.missing({name: name for name in ("onnx", "onnx_ir", "onnxscript", "onnxruntime")})
        if gone:
            raise LeftOutError(gone)
        from mra_export.errors import MraExportError
        from mra_export.export import export_bundle

        target = self.folder / f"bundle-{self.dtype}"
        try:
            return export_bundle(self.checkpoint, target, task="feature-extraction", dtype=DTYPES[self.dtype], weights=False)
        except MraExportError as error:
            raise LeftOutError(str(error)) from error

    @cached_property
    def engine(self) -> Path:
        """The bundle with an engine for this case's shapes in it."""
        if self.device.type != "cuda":
            raise LeftOutError("TensorRT needs a GPU")
        from mra_export import tensorrt_api
        from mra_export.engine import EngineOptions, build_engine
        from mra_export.errors import MraExportError

        if not any(tensorrt_api.installed(name) for name in tensorrt_api.FLAVOURS):
            raise LeftOutError("neither TensorRT nor TensorRT-RTX is installed: pip install tensorrt")
        least, usual, most = (f"input_ids:{b}x{self.case.length}" for b in _three(self.case.batches))
        try:
            build_engine(self.bundle, EngineOptions(min_shapes=(least,), opt_shapes=(usual,), max_shapes=(most,)))
        except MraExportError as error:
            raise LeftOutError(str(error)) from error
        return self.bundle


def _three(batches: Sequence[int]) -> tuple[int, int, int]:
    return batches[0], batches[len(batches) // 2], batches[-1]


def mra_torch(setup: Setup) -> Run:
    return lambda ids, mask: setup.mra(input_ids=ids, attention_mask=mask).last_hidden_state


def dense_torch(setup: Setup) -> Run:
    return lambda ids, mask: setup.dense(input_ids=ids).last_hidden_state  # without a mask its attention is the fastest


def compiled(eager: Callable[[Setup], Run], mode: str) -> Callable[[Setup], Run]:
    """mode: torch.compile's; reduce-overhead uses CUDA graphs."""

    def opened(setup: Setup) -> Run:
        import torch
        from measure import why_not_compiled

        if mode == "reduce-overhead" and setup.device.type != "cuda":
            raise LeftOutError("CUDA graphs need a GPU")
        if reason := why_not_compiled():
            raise LeftOutError(reason)
        call = torch.compile(eager(setup), dynamic=False, mode=mode)

        def run(ids: Any, mask: Any) -> Any:
            torch.compiler.cudagraph_mark_step_begin()
            return call(ids, mask)

        return run

    return opened


def runtime(backend: str, graphs: bool) -> Callable[[Setup], Run]:
    def opened(setup: Setup) -> Run:
        from mra_export import MraRuntime
        from mra_export.errors import MraExportError

        cuda = setup.device.type == "cuda"
        if graphs and not cuda:
            raise LeftOutError("CUDA graphs need a GPU")
        bundle = setup.engine if backend == "tensorrt" else setup.bundle
        try:
            loaded = MraRuntime.load(bundle, backend, setup.device.type, cuda_graphs=graphs)
        except MraExportError as error:
            raise LeftOutError(str(error)) from error
        return lambda ids, mask: loaded.run(input_ids=ids, attention_mask=mask)["last_hidden_state"]

    return opened


PEERS: dict[str, Callable[[Setup], Run]] = {
    "mra torch": mra_torch,
    "dense torch": dense_torch,
    "mra onnxruntime": runtime("onnxruntime", graphs=False),
    "mra onnxruntime, graphs": runtime("onnxruntime", graphs=True),
    "mra tensorrt": runtime("tensorrt", graphs=False),
    "mra tensorrt, graphs": runtime("tensorrt", graphs=True),
    "mra compiled": compiled(mra_torch, "default"),
    "mra compiled, graphs": compiled(mra_torch, "reduce-overhead"),
    "dense compiled": compiled(dense_torch, "default"),
    "dense compiled, graphs": compiled(dense_torch, "reduce-overhead"),
}
"""What opens fast first, should the time not suffice."""


class Benchmark:
    """The rows of one call of the script. What needs torch is imported here."""

    def __init__(self, options: argparse.Namespace, write: Callable[[str], Any]) -> None:
        self.options, self.write = options, write
        self.end = self.until = time.monotonic() + options.limit  # of everything, and of one preset in one dtype
        self.rows: list[dict[str, Any]] = []
        self.wrong = 0

    def run(self) -> int:
        import torch
        import transformers

        if self.options.device == "cuda" and not torch.cuda.is_available():
            return needs.skip(f"torch {torch.__version__} finds no CUDA GPU", self.write)
        transformers.logging.set_verbosity_error()
        device = torch.device(self.options.device)
        cases = CASES if device.type == "cuda" else TOY_CASES
        todo = [(case, dtype) for dtype in self.options.dtype or ("float16", "bfloat16") for case in cases]
        todo = [(case, dtype) for case, dtype in todo if self.options.preset in (None, case.preset)]
        with tempfile.TemporaryDirectory(prefix="mra-gpu-model-") as folder, torch.no_grad():
            for index, (case, dtype) in enumerate(todo):
                now = time.monotonic()
                self.until = now + (self.end - now) / (len(todo) - index)
                if now > self.until:
                    self.write(f"SKIP {case.preset} {dtype}: the time of --limit was over\n")
                    continue
                place = Path(folder) / case.preset
                place.mkdir(exist_ok=True)
                self._case(Setup(case, dtype, device, place, self.options.layers, self.options.compile_seconds))
                if device.type == "cuda":
                    torch.cuda.empty_cache()
        self.write(f"{len(self.rows)} rows, {self.wrong} wrong\n")
        return 1 if self.wrong or not self.rows else 0

    def _case(self, setup: Setup) -> None:
        opened: dict[str, Run | str] = {}
        for batch in setup.case.batches:
            ids, mask = tokens(batch, setup.case.length, setup.device)
            contestants = [self._contestant(setup, name, opened, ids, mask) for name in self.options.peer or PEERS]
            self._measure(setup, batch, contestants)
            self._save()

    def _contestant(self, setup: Setup, name: str, opened: dict[str, Run | str], ids: Any, mask: Any) -> Any:
        """opened: what was opened for an earlier batch, or why it could not be."""
        import torch
        from gpu_measure import Contestant, first_line
        from measure import TimeIsUp, time_limit

        contestant = Contestant(name, capturable=name in ("mra torch", "dense torch"))
        if time.monotonic() > self.until:
            contestant.left_out = "the time of --limit was over"
            return contestant
        try:
            if name not in opened:
                opened[name] = PEERS[name](setup)
            run = opened[name]
            if isinstance(run, str):
                raise LeftOutError(run)
            with time_limit(min(setup.compile_seconds, max(1.0, self.until - time.monotonic()))):
                actual = run(ids, mask)
        except LeftOutError as reason:
            contestant.left_out = opened[name] = str(reason)
        except TimeIsUp:
            contestant.left_out = opened[name] = "its first call took longer than its time"
        except torch.cuda.OutOfMemoryError:
            contestant.left_out = "the GPU has too little memory"
        except Exception as reason:  # torch's compiler raises whatever its parts do
            contestant.left_out = opened[name] = f"{type(reason).__name__}: {first_line(reason)}"
        else:
            contestant.calls = [lambda: run(ids, mask)]
            self._check(setup, contestant, actual, ids, mask)
        return contestant

    def _check(self, setup: Setup, contestant: Any, actual: Any, ids: Any, mask: Any) -> None:
        from mra_export import parity
        from mra_export.contract import TOLERANCES

        precision = DTYPES[setup.dtype]
        dense = contestant.name.startswith("dense")
        expected = (
            setup.wide_dense(input_ids=ids).last_hidden_state
            if dense
            else setup.reference(input_ids=ids, attention_mask=mask).last_hidden_state
        )
        tolerance = TOLERANCES[precision].model if dense else TOLERANCES[precision].model_free
        arrays = (x.float().cpu().numpy() for x in (actual, expected))
        case = f"{ids.shape[0]}x{ids.shape[1]}"
        row = parity.judge("benchmark", contestant.name, precision, case, "last_hidden_state", *arrays, tolerance, free=not dense)
        if row.status != parity.PASS:
            contestant.left_out = f"wrong, so not timed: {row.reason}"
            self.wrong += 1
        else:
            contestant.how = f"error {row.difference.max_abs:.1e}"

    def _measure(self, setup: Setup, batch: int, contestants: Sequence[Any]) -> None:
        from gpu_measure import Clock, take_turns

        take_turns(Clock(setup.device), contestants, self.options.seconds)
        dense = [fastest(c) for c in contestants if c.name.startswith("dense") and c.times]
        for contestant in contestants:
            row: dict[str, Any] = {"preset": setup.case.preset, "batch": batch, "length": setup.case.length}
            row |= {"dtype": setup.dtype, "peer": contestant.name, **contestant.as_dict()}
            if contestant.times:
                taken = fastest(contestant)
                row["tokens_per_second"] = batch * setup.case.length / taken * 1e6
                row["vs_dense"] = min(dense) / taken if dense else None
            self.rows.append(row)
            self.write(line(row) + "\n")

    def _save(self) -> None:
        """After each shape: what was measured stays where the time is over."""
        import torch

        if self.options.json:
            gpu = torch.cuda.get_device_name() if self.options.device == "cuda" else None
            result = {"gpu": gpu, "torch": torch.__version__, "layers": self.options.layers, "rows": self.rows}
            self.options.json.write_text(json.dumps(result, indent=1) + "\n")


def fastest(contestant: Any) -> float:
    """Median microseconds, of the graph where that is the faster way."""
    return min(timing.median for timing in contestant.times.values())


def tokens(batch: int, length: int, device: Any) -> tuple[Any, Any]:
    """Random ids, none of them padding, and a mask of ones."""
    import torch

    ids = torch.randint(5, 260, (batch, length), generator=torch.Generator().manual_seed(length + batch)).to(device)
    return ids, torch.ones_like(ids)


def line(row: dict[str, Any]) -> str:
    """A row for a terminal."""
    head = f"{row['preset']} B {row['batch']} N {row['length']} {row['dtype']} {row['peer']}:"
    if row["left_out"]:
        return f"{head} left out ({row['left_out']})"
    times = ", ".join(f"{kind} {t['median'] / 1e3:.2f} ms" for kind, t in row["times_us"].items())
    return f"{head} {times}, {row['tokens_per_second']:.0f} tokens/s" + (
        f", {row['vs_dense']:.2f}x dense" if row["vs_dense"] else ""
    )


def main(arguments: list[str] | None = None, write: Callable[[str], Any] = sys.stdout.write) -> int:
    parser = argparse.ArgumentParser(description="Time whole models on a GPU beside dense RoBERTa.")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: toy shapes, a test of this script")
    parser.add_argument("--preset", choices=[case.preset for case in CASES], help="this one alone")
    parser.add_argument("--dtype", action="append", choices=tuple(DTYPES), help="repeat for several; default: float16, bfloat16")
    parser.add_argument("--peer", action="append", choices=tuple(PEERS), help="repeat for several; default: all")
    parser.add_argument("--layers", type=int, help="instead of the preset's")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each shape (default %(default)s)")
    parser.add_argument("--compile-seconds", type=float, default=90.0, help="for a peer's first call (default %(default)s)")
    parser.add_argument("--limit", type=float, default=math.inf, help="open no peer after this many seconds")
    parser.add_argument("--json", type=Path, help="write the rows to this file, after each shape")
    options = parser.parse_args(arguments)
    gone = needs.missing(NEEDED)
    if gone:
        return needs.skip(gone, write)
    return Benchmark(options, write).run()


if __name__ == "__main__":
    raise SystemExit(main())
