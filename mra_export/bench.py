"""How fast a bundle is here: latency and throughput of its runtimes, side by side in one run.

report = bench(Bundle.load("bundle"), backends=["onnxruntime", "torch"], lengths=[128, 512])
print(report.measurements[0].p50_ms)
"""

from __future__ import annotations

import csv
import io
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mra_export import doctor
from mra_export.bundle import Bundle
from mra_export.cases import Inputs, function_body_bytes, random_case
from mra_export.errors import BackendError, ContractError
from mra_export.report import versions
from mra_export.runtime import MraRuntime, choose_backend, input_spec

if TYPE_CHECKING:
    from rich.console import Group

BACKENDS = ("auto", "torch", "onnxruntime", "onnxruntime-function", "tensorrt")
"""auto: what MraRuntime takes by itself. onnxruntime-function: the graph's function body in place of the op library."""
MASKS = ("full", "ragged")
_REST = 0.05
"""Seconds of quiet before a turn where several runtimes take turns: the threads of the one before spin for more work that long."""
_TURN = 0.25
"""Seconds that a turn lasts; at least one call."""
_SHORTEST_ROW = 0.25
"""Share of the length that the shortest row of a ragged batch has."""
_FUNCTION = "onnxruntime-function"
_ON_GPU = frozenset({"onnxruntime", _FUNCTION})


@dataclass(frozen=True)
class Options:
    """What was asked for. threads: of one call; None: each runtime's own default. concurrency: callers at once on one runtime.

    seconds: measured for each runtime and shape. warmup: seconds of calls before that, not counted; at least one of each caller.
    mask: "full", or "ragged": rows of random lengths from a quarter of the length up, padded at their ends, the first one full.
    engine, allow_embedded_plugin: for tensorrt; cuda_graphs: for tensorrt, and for onnxruntime on a GPU; as in MraRuntime.load.
    """

    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    mask: str = "full"
    device: str | None = None
    threads: int | None = None
    concurrency: int = 1
    seconds: float = 3.0
    warmup: float = 0.5
    seed: int = 0
    engine: str | None = None
    allow_embedded_plugin: bool = False
    cuda_graphs: bool = False


@dataclass(frozen=True)
class Measurement:
    """One runtime at one shape. Milliseconds of one call as its caller sees it: arrays in, arrays out.

    calls: how many were timed. A percentile that no call lies above is None: p99 needs 100 calls, p95 20, p90 10.
    sequences_per_second: rows (each choice of a multiple-choice input is one). tokens_per_second: real tokens, padding left out.
    Both are of all callers together.
    """

    backend: str
    device: str
    length: int
    batch: int
    calls: int
    mean_ms: float
    min_ms: float
    p50_ms: float
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    sequences_per_second: float
    tokens_per_second: float


@dataclass(frozen=True)
class BenchReport:
    """measurements: by shape, then in the order the backends were named. machine: processor and GPUs."""

    bundle: Bundle
    options: Options
    measurements: list[Measurement]
    machine: dict[str, Any] = field(default_factory=lambda: {**doctor.cpu(), "gpus": doctor.gpus()})

    def as_dict(self) -> dict[str, Any]:
        manifest = self.bundle.manifest
        return {
            "bundle": str(self.bundle.path),
            "model": manifest.model.model_dump(),
            "task": manifest.task,
            "dtype": manifest.dtype,
            "options": asdict(self.options),
            "machine": self.machine,
            "versions": versions(),
            "measurements": [asdict(measurement) for measurement in self.measurements],
        }

    def json(self) -> str:
        return json.dumps(self.as_dict(), indent=1) + "\n"

    def csv(self) -> str:
        """A header and one line for each measurement; an empty field where a percentile is None."""
        stream = io.StringIO()
        writer = csv.DictWriter(stream, [column.name for column in fields(Measurement)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(measurement) for measurement in self.measurements)
        return stream.getvalue()

    def table(self) -> Group:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        manifest, options = self.bundle.manifest, self.options
        threads = "default threads" if options.threads is None else f"{options.threads} threads"
        title = f"{manifest.model.architecture}, {manifest.task}, {manifest.dtype}: milliseconds of a call; {threads}, "
        title += f"{options.concurrency} at once, {options.mask} mask; {self.machine['model']}"
        table = Table(highlight=False)
        for name in (
            "runtime",
            "device",
            "length",
            "batch",
            "calls",
            "mean",
            "min",
            "p50",
            "p90",
            "p95",
            "p99",
            "seq/s",
            "tokens/s",
        ):
            table.add_column(name, justify="left" if name in ("runtime", "device") else "right", no_wrap=True)
        previous = None
        for row in self.measurements:
            if previous not in (None, (row.length, row.batch)):
                table.add_section()
            previous = (row.length, row.batch)
            times = [row.mean_ms, row.min_ms, row.p50_ms, row.p90_ms, row.p95_ms, row.p99_ms]
            table.add_row(
                row.backend,
                row.device,
                str(row.length),
                str(row.batch),
                str(row.calls),
                *("-" if value is None else _three_digits(value) for value in times),
                _three_digits(row.sequences_per_second),
                f"{row.tokens_per_second:.0f}",
            )
        things: list[Text | Table] = [Text(title, style="bold"), table]
        if any(row.p99_ms is None for row in self.measurements):
            things.append(Text("-: too few calls to tell (p99 needs 100, p95 20, p90 10): raise --seconds"))
        return Group(*things)


def bench(
    bundle: Bundle,
    *,
    backends: Sequence[str] = ("auto",),
    lengths: Sequence[int] = (),
    batches: Sequence[int] = (),
    mask: str = "full",
    device: str | None = None,
    threads: int | None = None,
    concurrency: int = 1,
    seconds: float = 3.0,
    warmup: float = 0.5,
    seed: int = 0,
    engine: str | None = None,
    allow_embedded_plugin: bool = False,
    cuda_graphs: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> BenchReport:
    """Check every runtime against the bundle's golden outputs, then time them in turns, on the same random token ids.

    backends: of BACKENDS, on `device` ("cpu", "cuda" or None as in MraRuntime.load). lengths: tokens; none: 128 and the model's
    longest. batches: rows; none: 1. The others: see Options. Everything is loaded and every shape judged before anything is timed.

    Raises ContractError for options and shapes that the model, an engine or this machine's memory does not take, ParityError
    where a runtime differs from PyTorch, and what MraRuntime.load raises where one cannot run here.
    """
    longest = bundle.manifest.model.max_position_embeddings
    options = Options(
        lengths=tuple(dict.fromkeys(lengths)) or tuple(sorted({min(128, longest), longest})),
        batches=tuple(dict.fromkeys(batches)) or (1,),
        mask=mask,
        device=device,
        threads=threads,
        concurrency=concurrency,
        seconds=seconds,
        warmup=warmup,
        seed=seed,
        engine=engine,
        allow_embedded_plugin=allow_embedded_plugin,
        cuda_graphs=cuda_graphs,
    )
    names = tuple(dict.fromkeys(_resolve(bundle, name, device) for name in backends))
    _check_options(names, options)
    cases = [(length, batch, _inputs(bundle, length, batch, options)) for length in options.lengths for batch in options.batches]
    measurements = []
    with ExitStack() as stack:
        stack.enter_context(_torch_threads(names, threads))
        subjects = []
        for name in names:
            progress(f"{name}: loading")
            subjects.append(stack.enter_context(_Subject(bundle, name, options)))
        for subject in subjects:
            for _, _, inputs in cases:
                subject.refuse(inputs)
        for subject in subjects:
            progress(f"{subject.name}: comparing with the golden outputs")
            subject.runtime.validate()
        for number, (length, batch, inputs) in enumerate(cases, 1):
            shape = f"length {length}, batch {batch} ({number} of {len(cases)})"
            counts = _measure(subjects, inputs, options, shape, progress)
            measurements += [count.result(length, batch, inputs) for count in counts]
    return BenchReport(bundle, options, measurements)


class _Subject:
    """One loaded runtime and its callers. name: of BACKENDS, never "auto"."""

    def __init__(self, bundle: Bundle, name: str, options: Options) -> None:
        tensorrt, onnx = name == "tensorrt", name.startswith("onnxruntime")
        self.name = name
        self.runtime = MraRuntime.load(
            bundle,
            "onnxruntime" if onnx else name,
            options.device,
            use_op_library=name != _FUNCTION,
            intra_op_threads=options.threads if onnx else None,  # torch's are a setting of the process: _torch_threads
            engine=options.engine if tensorrt else None,
            allow_embedded_plugin=options.allow_embedded_plugin and tensorrt,
            cuda_graphs=options.cuda_graphs and (tensorrt or onnx),
        )
        self._concurrency = options.concurrency
        # Threads that stay: what a runtime keeps for each calling thread is made once, in the warm-up.
        self._callers = ThreadPoolExecutor(options.concurrency, thread_name_prefix=name) if options.concurrency > 1 else None

    def __enter__(self) -> _Subject:
        return self

    def __exit__(self, *error: object) -> None:
        if self._callers is not None:
            self._callers.shutdown()
        self.runtime.close()

    def refuse(self, inputs: Inputs) -> None:
        """Raises ContractError where these inputs are too much for this runtime here."""
        shape = inputs["input_ids"].shape
        reason = self.runtime.refuses(shape)
        if reason is None and self.name == _FUNCTION:
            needed = function_body_bytes(self.runtime.bundle, int(np.prod(shape[:-1])), shape[-1]) * self._concurrency
            if needed > (memory := _memory_bytes()):
                reason = (
                    f"the function body forms N x N: about {needed / 2**30:.0f} GB at once for {self._concurrency} x {shape}, this "
                    f"machine has {memory / 2**30:.0f} GB: use shorter lengths or smaller batches, or backend onnxruntime"
                )
        if reason is not None:
            raise ContractError(f"{self.name}: {reason}")

    def turn(self, inputs: Inputs, seconds: float) -> tuple[list[float], float]:
        """All callers call until `seconds` are over, at least once: seconds of each call, and of them all from first to last."""
        together = threading.Barrier(self._concurrency)

        def calls() -> list[tuple[float, float]]:
            together.wait()
            spans: list[tuple[float, float]] = []
            end = time.perf_counter() + seconds
            while not spans or time.perf_counter() < end:
                start = time.perf_counter()
                self.runtime.run(**inputs)
                spans.append((start, time.perf_counter()))
            return spans

        if self._callers is None:
            spans = calls()
        else:
            futures = [self._callers.submit(calls) for _ in range(self._concurrency)]
            spans = [span for future in futures for span in future.result()]
        wall = max(end for _, end in spans) - min(start for start, _ in spans)
        return [end - start for start, end in spans], wall


@dataclass
class _Count:
    """What one runtime has done at one shape so far. latencies, wall: seconds."""

    subject: _Subject
    latencies: list[float] = field(default_factory=list)
    wall: float = 0.0

    def result(self, length: int, batch: int, inputs: Inputs) -> Measurement:
        times = np.array(self.latencies) * 1e3
        calls = len(times)
        per_second = calls / self.wall
        mask = inputs["attention_mask"]
        return Measurement(
            backend=self.subject.name,
            device=self.subject.runtime.device,
            length=length,
            batch=batch,
            calls=calls,
            mean_ms=float(times.mean()),
            min_ms=float(times.min()),
            p50_ms=float(np.percentile(times, 50)),
            p90_ms=_percentile(times, 90),
            p95_ms=_percentile(times, 95),
            p99_ms=_percentile(times, 99),
            sequences_per_second=per_second * int(np.prod(mask.shape[:-1])),
            tokens_per_second=per_second * int(mask.sum()),
        )


def _measure(
    subjects: Sequence[_Subject], inputs: Inputs, options: Options, shape: str, progress: Callable[[str], None]
) -> list[_Count]:
    """Turns of a fraction of a second, so that whatever else the machine does hits every runtime."""
    progress(f"{shape}: timing {', '.join(subject.name for subject in subjects)}")
    for subject in subjects:
        subject.turn(inputs, options.warmup)
    counts = [_Count(subject) for subject in subjects]
    seconds = min(_TURN, options.seconds)
    while any(count.wall < options.seconds for count in counts):
        for count in counts:
            if len(counts) > 1:
                time.sleep(_REST)
                if not count.latencies or min(count.latencies) < seconds:  # a call that is long cares little for what was before
                    count.subject.turn(inputs, 0.0)
            latencies, wall = count.subject.turn(inputs, seconds)
            count.latencies += latencies
            count.wall += wall
    return counts


def _inputs(bundle: Bundle, length: int, batch: int, options: Options) -> Inputs:
    """Random token ids of this shape. Raises ContractError where the model does not take it."""
    inputs = random_case(bundle, batch, length, options.seed, ragged=False).inputs
    if options.mask == "ragged":
        random = np.random.default_rng((options.seed, batch, length, 1))
        shape = inputs["attention_mask"].shape
        real = random.integers(max(1, int(length * _SHORTEST_ROW)), length, shape[:-1], endpoint=True)
        real.flat[0] = length
        inputs["attention_mask"] = (np.arange(length) < real[..., None]).astype(np.int64)
    return input_spec(bundle).prepare(inputs)


def _resolve(bundle: Bundle, name: str, device: str | None) -> str:
    if name not in BACKENDS:
        raise BackendError(f"backend is {name!r}: use one of {', '.join(BACKENDS)}")
    return choose_backend(bundle, device or "cpu", use_op_library=True)[0] if name == "auto" else name


def _check_options(names: Sequence[str], options: Options) -> None:
    if not names:
        raise ContractError(f"backends is empty: name at least one of {', '.join(BACKENDS)}")
    for name, values in (("length", options.lengths), ("batch", options.batches)):
        for value in values:
            if value < 1:
                raise ContractError(f"{name} is {value}: it must be 1 or more")
    for name in ("threads", "concurrency"):
        number = getattr(options, name)
        if number is not None and number < 1:
            raise ContractError(f"{name} is {number}: it must be 1 or more")
    for name, least in (("seconds", "above 0"), ("warmup", "0 or more")):
        number = getattr(options, name)
        if not 0 <= number < float("inf") or (number == 0 and name == "seconds"):
            raise ContractError(f"{name} is {number}: it must be {least}")
    if options.seed < 0:
        raise ContractError(f"seed is {options.seed}: it must be 0 or more")
    if options.mask not in MASKS:
        raise ContractError(f"mask is {options.mask!r}: use one of {', '.join(MASKS)}")
    if options.threads is not None and "tensorrt" in names:
        raise ContractError(f"threads is {options.threads}: backend 'tensorrt' runs on a GPU, leave threads out")
    if "tensorrt" not in names and (options.engine is not None or options.allow_embedded_plugin):
        raise ContractError("engine and allow_embedded_plugin are for backend 'tensorrt': add it, or leave them out")
    if options.cuda_graphs and "tensorrt" not in names and not (options.device == "cuda" and _ON_GPU & set(names)):
        raise ContractError(
            "cuda_graphs is for backend 'tensorrt' and for 'onnxruntime' on device 'cuda': add one of them, or leave it out"
        )


@contextmanager
def _torch_threads(names: Sequence[str], threads: int | None) -> Iterator[None]:
    """torch's number of threads belongs to the process: set for the run, then put back."""
    if threads is None or "torch" not in names:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _percentile(times: npt.NDArray[np.float64], percent: int) -> float | None:
    return float(np.percentile(times, percent)) if len(times) * (100 - percent) >= 100 else None


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _three_digits(value: float) -> str:
    """Such as 0.123, 1.23, 12.3, 123, 1234."""
    digits = max(0, 2 - int(np.floor(np.log10(value)))) if value > 0 else 0
    return f"{value:.{digits}f}"
