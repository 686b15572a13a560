"""How the GPU benchmarks time: contestants that take turns, CUDA events, CUDA graphs, and the profiler's view of single kernels."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from measure import Timing

Call = Callable[[], object]


@dataclass
class Contestant:
    """calls: one for each set of inputs. how: what it ran on. left_out: why there are no times.

    one_graph: also time graphs of a single call. times: "calls" (plain calls), "graph" (one graph of all sets), "one" (a graph
    for each set) -> microseconds of one call.
    """

    name: str
    how: str = ""
    calls: list[Call] = field(default_factory=list)
    capturable: bool = True
    one_graph: bool = False
    left_out: str = ""
    times: dict[str, Timing] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {"how": self.how, "left_out": self.left_out, "times_us": {kind: asdict(t) for kind, t in self.times.items()}}


class Clock:
    """Times runs of queued work, in microseconds: CUDA events, or the host's clock where there is no GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def elapsed(self, run: Call) -> float:
        if not self.is_cuda:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e6
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) * 1e3

    def captured(self, calls: Sequence[Call]) -> Call:
        """All calls as one CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # what a first call allocates or plans must not be captured
                calls[0]()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay


def in_turn(calls: Sequence[Call]) -> Call:
    """All calls, one after another."""

    def run() -> None:
        for call in calls:
            call()

    return run


def take_turns(clock: Clock, contestants: Sequence[Contestant], seconds: float) -> None:
    """Fills in the times: rounds of one run each until `seconds` are over, at least three. One that cannot be captured says why."""
    runs: list[tuple[Contestant, str, Call, list[float]]] = []
    for contestant in contestants:
        if contestant.left_out:
            continue
        runs.append((contestant, "calls", in_turn(contestant.calls), []))
        if not (contestant.capturable and clock.is_cuda):
            continue
        try:
            runs.append((contestant, "graph", clock.captured(contestant.calls), []))
            if contestant.one_graph:
                runs.append((contestant, "one", in_turn([clock.captured([call]) for call in contestant.calls]), []))
        except RuntimeError as error:
            torch.cuda.synchronize()
            contestant.how += f", no CUDA graph: {first_line(error)}"
    for _, _, run, _ in runs:
        clock.elapsed(run)
    end = time.monotonic() + seconds
    rounds = 0
    while rounds < 3 or time.monotonic() < end:
        for contestant, _, run, times in runs:
            times.append(clock.elapsed(run) / len(contestant.calls))
        rounds += 1
    for contestant, kind, _, times in runs:
        contestant.times[kind] = Timing.of(times, "us")


@dataclass(frozen=True)
class KernelTime:
    """Of one launch of a call. name: the kernel's. us: median microseconds; count: launches seen."""

    name: str
    us: float
    count: int


def kernel_times(calls: Sequence[Call], own: str, repeats: int = 3) -> list[KernelTime]:
    """The kernels of one call in order, as the profiler timed them over all calls; empty where it sees none (no CUPTI).

    own: what the names of our kernels contain.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            in_turn(calls)()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    found = [event for event in profiler.events() if event.device_type == cuda and own in event.name]
    found.sort(key=lambda event: event.time_range.start)
    return launches_of([(event.name, float(event.time_range.elapsed_us())) for event in found], repeats * len(calls))


def launches_of(events: Sequence[tuple[str, float]], calls: int) -> list[KernelTime]:
    """events: kernel and microseconds in order of time, of `calls` calls that launch the same kernels. Raises ValueError if not."""
    if len(events) % calls:
        raise ValueError(f"{len(events)} kernels of {calls} calls: not the same number in each")
    each = len(events) // calls
    found = []
    for place in range(each):
        mine = events[place::each]
        names = {name for name, _ in mine}
        if len(names) != 1:
            raise ValueError(f"launch {place + 1} of a call is {', '.join(sorted(names))}")
        found.append(KernelTime(short_name(mine[0][0]), statistics.median(us for _, us in mine), len(mine)))
    return found


def short_name(kernel: str) -> str:
    """ "void mra::AttendKernel<float, 64>(mra::Problem)" -> "AttendKernel<float, 64>"."""
    name = re.sub(r"\(anonymous namespace\)::|\bmra::|^void ", "", kernel)
    return name.split("(")[0]


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
