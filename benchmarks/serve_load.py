"""Load on servers over the loopback address: requests of ragged lengths arrive at random times, whatever is still unanswered.

Starts `mra-export serve` and a server that answers one request at a time (serve_naive.py), one after the other, checks that each
gives the runtime's answers, and looks for the highest rate at which it keeps its 99th percentile below a limit. A request's time
counts from when it was due. Then it sends more than the server can do: what it cannot take must be refused as busy, and nothing
else may go wrong. --server names others: Triton's python backend and Ray Serve (start_server.py), which are asked for all logits in
protocol v2, and `mra-export serve` asked for the same. --target adds one that runs already.

    python benchmarks/serve_load.py bundle --json load.json
    python benchmarks/serve_load.py bundle --server serve-v2 --server triton --server ray
    python benchmarks/serve_load.py bundle --target other=v2=http://127.0.0.1:8001/v2/models/mra
    python benchmarks/serve_load.py bundle --soak 100000
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import aiohttp
import click
import numpy as np
import psutil
import uvloop
from measure import machine
from start_server import free_port, ray, triton, why_no_ray, why_no_triton

from mra_export import MraRuntime
from mra_export.corpus import read_texts
from mra_export.predict import Predictor
from mra_export.text import Tokenizer

HERE = Path(__file__).resolve().parent
PROTOCOLS = ("fill-mask", "v2")
SERVERS = ("serve", "naive", "serve-v2", "triton", "ray")
_RATES = (1.0, 20_000.0)
_NEAR = 1.15
"""How far the second rate tried is from the first; each further one is twice as far, as a power."""
_CALLERS = 16
_REPLICAS = 2
"""Of Triton's model and of Ray Serve's: one for each processor of a small machine."""
_START_SECONDS = 120
_MAX_GROWTH = 0.02
_HEADERS = {"Accept-Encoding": "identity"}
"""aiohttp asks for gzip otherwise, and Triton does that: a megabyte of logits takes it 40 ms."""


@dataclass(frozen=True)
class Target:
    """url: for fill-mask the whole of it, for v2 the model's. process: of a server that this script started."""

    name: str
    protocol: str
    url: str
    process: psutil.Process | None = None


@dataclass(frozen=True)
class Question:
    text: str
    ids: list[int]


@dataclass
class Outcome:
    """One run. rate: requests a second that were due; throughput: that were answered. Milliseconds from when a request was due.

    late_ms: how late the client itself sent (99th percentile): its own share of the times. batches: requests in a call -> calls.
    """

    rate: float
    sent: int
    answered: int
    errors: dict[str, int]
    throughput: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    late_ms: float
    batches: dict[str, int] = field(default_factory=dict)


def questions(bundle: Path, corpus: Path, count: int, median: float, spread: float, longest: int, seed: int) -> list[Question]:
    """Pieces of the corpus with one mask each; their lengths in tokens are log-normal."""
    tokenizer = Tokenizer(bundle)
    tokens = tokenizer.tokens("\n".join(read_texts(corpus)))
    before, after = tokenizer.frame
    random = np.random.default_rng(seed)
    lengths = np.clip(np.exp(random.normal(math.log(median), spread, count)), 4, longest).astype(int)
    made = []
    for length in lengths:
        start = int(random.integers(0, len(tokens) - length))
        inner = tokens[start : start + int(length) - len(before) - len(after)]
        inner[int(random.integers(0, len(inner)))] = tokenizer.mask_id or 0
        text = "".join(tokenizer.decode(token) for token in inner)
        ids = tokenizer.encode([text], 10**6)["input_ids"][0].tolist()  # the text may be cut in other places than it was
        if len(ids) <= longest and (np.array(ids) == tokenizer.mask_id).sum() == 1:
            made.append(Question(text, ids))
    return made


def payload(target: Target, question: Question) -> tuple[str, bytes, dict[str, str]]:
    """URL, body and headers."""
    if target.protocol == "fill-mask":
        return target.url, json.dumps({"text": question.text}).encode(), {"Content-Type": "application/json"}
    ids = np.array([question.ids], dtype="<i8")
    shape = list(ids.shape)
    inputs = [
        {"name": name, "shape": shape, "datatype": "INT64", "parameters": {"binary_data_size": ids.nbytes}}
        for name in ("input_ids", "attention_mask")
    ]
    header = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(header))}
    return target.url + "/infer", header + ids.tobytes() + np.ones_like(ids).tobytes(), headers


def expected(predictor: Predictor, question: Question) -> dict[str, Any]:
    """The runtime's answer by protocol: the logits, and of a fill-mask model the best tokens' ids for each mask."""
    answers: dict[str, Any] = {"v2": predictor.runtime.run(input_ids=np.array([question.ids]))["logits"].ravel()}
    if predictor.task == "fill-mask":
        answers["fill-mask"] = [[token["id"] for token in mask] for mask in predictor.texts([question.text])[0]["masks"]]
    return answers


def check(target: Target, checks: list[tuple[Question, dict[str, Any]]]) -> None:
    """Raises ClickException unless the target gives the runtime's answers."""
    for question, wanted in checks:
        url, body, headers = payload(target, question)
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=_START_SECONDS) as response:
            content, size = response.read(), response.headers.get("Inference-Header-Content-Length")
        if target.protocol == "fill-mask":
            same = [[token["id"] for token in mask] for mask in json.loads(content)["answers"][0]["masks"]] == wanted["fill-mask"]
        else:
            got = np.frombuffer(content[int(size) :], np.float32)
            same = got.size == wanted["v2"].size and bool(np.allclose(got, wanted["v2"], atol=1e-3))
        if not same:
            raise click.ClickException(f"{target.name} gives another answer than the runtime to {question.text!r}: not timed")


async def load(target: Target, asked: list[Question], rate: float, seconds: float, seed: int) -> Outcome:
    """Poisson arrivals of this rate for so long; waits for every answer."""
    random = np.random.default_rng(seed)
    due = np.cumsum(random.exponential(1 / rate, int(rate * seconds * 1.5) + 20))
    due = due[due < seconds]
    requests = [payload(target, asked[int(n)]) for n in random.integers(0, len(asked), len(due))]
    times: list[float] = []
    late: list[float] = []
    outcomes: Counter[str] = Counter()
    before = batches(target)
    connector = aiohttp.TCPConnector(limit=900, keepalive_timeout=30)  # no more than the server takes at once
    async with aiohttp.ClientSession(connector=connector, headers=_HEADERS, timeout=aiohttp.ClientTimeout(total=60)) as session:

        async def send(when: float, url: str, body: bytes, headers: dict[str, str]) -> None:
            late.append(time.perf_counter() - when)
            try:
                async with session.post(url, data=body, headers=headers) as response:
                    content = await response.read()
            except (aiohttp.ClientError, asyncio.TimeoutError) as error:
                outcomes[type(error).__name__] += 1
                return
            if response.status == 200:
                outcomes["ok"] += 1
                times.append(time.perf_counter() - when)
            else:
                busy = response.status == 503 and b"max_queue" in content
                outcomes["busy" if busy else f"HTTP {response.status}"] += 1

        tasks = []
        start = time.perf_counter() + 0.05
        for offset, request in zip(due, requests, strict=True):
            wait = start + offset - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.ensure_future(send(start + offset, *request)))
        await asyncio.gather(*tasks)
        took = time.perf_counter() - start
    answered = outcomes.pop("ok", 0)
    p50, p95, p99 = (float(np.percentile(times, q)) * 1e3 if times else math.inf for q in (50, 95, 99))
    after = batches(target)
    formed = {size: after[size] - before.get(size, 0) for size in after if after[size] > before.get(size, 0)}
    return Outcome(
        round(rate, 1),
        len(due),
        answered,
        dict(outcomes),
        round(answered / max(took, seconds), 1),
        round(p50, 2),
        round(p95, 2),
        round(p99, 2),
        round(float(np.percentile(late, 99)) * 1e3, 2),
        formed,
    )


def batches(target: Target) -> dict[str, int]:
    """Calls of the model by the number of requests they answered, up to the histogram's bounds; empty for servers not ours."""
    if target.process is None or target.name == "naive":
        return {}
    base = urlparse(target.url)
    text = urllib.request.urlopen(f"{base.scheme}://{base.netloc}/metrics", timeout=_START_SECONDS).read().decode()
    counts, below = {}, 0.0
    for line in text.splitlines():
        if line.startswith("mra_batch_requests_bucket"):
            bound, value = line.split('le="')[1].split('"')[0], float(line.rsplit(" ", 1)[1])
            counts[bound.removesuffix(".0")] = int(value - below)
            below = value
    return counts


def good(outcome: Outcome, limit_ms: float) -> bool:
    return not outcome.errors and outcome.p99_ms <= limit_ms


def highest_rate(run: Callable[[float], Outcome], limit_ms: float, first: float, steps: int) -> list[Outcome]:
    """Go up from the first rate until it is too much, or down until it is not, then halve the distance so often.

    A rate is too much when it is so twice: a machine that stalls for a moment is not the server's doing. Every run is returned, in
    order; none of them is good where the server is too slow at any rate.
    """
    runs: list[Outcome] = []

    def met(rate: float) -> bool:
        for _ in range(2):
            runs.append(run(rate))
            if good(runs[-1], limit_ms):
                return True
        return False

    rate, up, factor = first, met(first), _NEAR
    while True:
        further = min(max(rate * (factor if up else 1 / factor), _RATES[0]), _RATES[1])
        if further == rate:
            return runs
        if met(further) != up:
            break
        rate, factor = further, factor * factor
    low, high = sorted((rate, further))
    for _ in range(steps):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if met(middle) else (low, middle)
    return runs


def best(runs: list[Outcome], limit_ms: float) -> Outcome | None:
    return max((run for run in runs if good(run, limit_ms)), key=lambda run: run.rate, default=None)


@contextlib.contextmanager
def started(name: str, command: list[str], port: int, log: Path) -> Iterator[psutil.Process]:
    """A server of our own, from when it is ready to its end."""
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
    try:
        end = time.monotonic() + _START_SECONDS
        while True:
            if process.poll() is not None or time.monotonic() > end:
                raise click.ClickException(f"{name} did not start:\n{log.read_text()[-2000:]}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5)
                break
            time.sleep(0.1)
        yield psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_START_SECONDS)
        process.kill()  # one that does not stop must not outlive us
        process.wait()


@contextlib.contextmanager
def target(name: str, bundle: Path, folder: Path, serve_options: Sequence[str] = ()) -> Iterator[Target]:
    """The server of this name of SERVERS, from when it is ready to its end. folder: for its log."""
    log = folder / f"{name}.log"
    if name in ("triton", "ray"):
        with triton_url(bundle, folder, log) if name == "triton" else ray(bundle, log, replicas=_REPLICAS) as url:
            yield Target(name, "v2", f"{url}/v2/models/mra")
        return
    port = free_port()
    command = [sys.executable, str(HERE / "serve_naive.py"), str(bundle), str(port)]
    if name != "naive":
        command = [sys.executable, "-c", "from mra_export.cli import main; main()", "serve", str(bundle), "--port", str(port)]
        command += ["--name", "mra", *serve_options]
    with started(name, command, port, log) as process:
        protocol, path = ("v2", "/v2/models/mra") if name == "serve-v2" else ("fill-mask", "/v1/fill-mask")
        yield Target(name, protocol, f"http://127.0.0.1:{port}{path}", process)


@contextlib.contextmanager
def triton_url(bundle: Path, folder: Path, log: Path) -> Iterator[str]:
    from mra_export import Bundle
    from mra_export.serve.triton import TritonOptions, write_repository

    options = TritonOptions("python", instances=_REPLICAS)
    write_repository(Bundle.load(bundle), folder / "repository", options)
    with triton(folder / "repository", log) as (url, _):
        yield url


def shared_memory() -> int:
    return len(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else 0


def holds(target: Target) -> dict[str, int]:
    assert target.process is not None
    process = target.process
    return {
        "rss_bytes": process.memory_info().rss,
        "threads": process.num_threads(),
        "files": process.num_fds(),
        "shared_memory": shared_memory(),
    }


async def most(target: Target, asked: list[Question], seconds: float) -> float:
    """Requests a second that so many callers get answered, each with its next request when the last is answered."""
    count, start = 0, time.perf_counter()
    async with aiohttp.ClientSession(headers=_HEADERS) as session:

        async def caller(first: int) -> None:
            nonlocal count
            for number in range(first, 10**9, _CALLERS):
                await answered(session, payload(target, asked[number % len(asked)]))
                if time.perf_counter() - start > seconds:
                    return
                count += 1

        await asyncio.gather(*map(caller, range(_CALLERS)))
    return count / seconds


async def answered(session: aiohttp.ClientSession, request: tuple[str, bytes, dict[str, str]]) -> int:
    """Wait for the whole answer; its status."""
    url, body, headers = request
    async with session.post(url, data=body, headers=headers) as response:
        await response.read()
        return response.status


async def soak(target: Target, asked: list[Question], count: int, seconds: float, callers: int) -> dict[str, Any]:
    """So many callers, each with its next request when the last is answered, until so many requests or seconds are over.

    The first fifth warms up; what the server holds after it and at every further tenth is compared. A caller whose connection the
    server closed, as it does with idle ones, opens another: while a machine is stopped, all are idle.
    """
    left, done, reconnected = iter(range(count)), 0, 0
    errors: Counter[str] = Counter()
    marks: list[dict[str, int]] = []
    start = time.perf_counter()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=callers), headers=_HEADERS) as session:

        async def caller() -> None:
            nonlocal done, reconnected
            for number in left:
                if time.perf_counter() - start > seconds:
                    return
                request = payload(target, asked[number % len(asked)])
                try:
                    status = await answered(session, request)
                except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError):
                    reconnected += 1
                    status = await answered(session, request)
                if status != 200:
                    errors[f"HTTP {status}"] += 1
                done += 1
                if done % max(1, count // 10) == 0 and done >= count // 5:
                    marks.append({"requests": done, **holds(target)})

        await asyncio.gather(*(caller() for _ in range(callers)))
    await asyncio.sleep(1)
    marks.append({"requests": done, **holds(target)})
    first, last = marks[0], marks[-1]
    return {
        "requests": done,
        "seconds": round(time.perf_counter() - start, 1),
        "errors": dict(errors),
        "reconnected": reconnected,
        "marks": marks,
        "growth": round(max(mark["rss_bytes"] for mark in marks) / first["rss_bytes"] - 1, 4),
        "leaked": {name: last[name] - first[name] for name in ("threads", "files", "shared_memory")},
    }


def leaks(soaked: dict[str, Any]) -> list[str]:
    """What a soak must not show: errors, memory that grows by more than 2 %, more threads, files or shared memory than before."""
    failed = [f"{count} times {kind}" for kind, count in soaked["errors"].items()]
    if soaked["growth"] > _MAX_GROWTH:
        failed.append(f"memory grew by {soaked['growth']:.1%}")
    return failed + [f"{count} more {name} than before" for name, count in soaked["leaked"].items() if count > 0]


def parse_target(value: str) -> Target:
    """NAME=PROTOCOL=URL. Raises BadParameter, also for any host but the loopback address."""
    name, _, rest = value.partition("=")
    protocol, _, url = rest.partition("=")
    if protocol not in PROTOCOLS or not url:
        raise click.BadParameter(f"{value!r}: pass NAME=PROTOCOL=URL with a protocol of {', '.join(PROTOCOLS)}")
    if urlparse(url).hostname not in ("127.0.0.1", "localhost", "::1"):
        raise click.BadParameter(f"{url}: load only ever goes to 127.0.0.1")
    return Target(name, protocol, url.rstrip("/"))


def line(name: str, outcome: Outcome) -> str:
    errors = ", ".join(f"{count} {kind}" for kind, count in outcome.errors.items()) or "no error"
    return (
        f"{name:>8} {outcome.rate:8.1f}/s: {outcome.throughput:7.1f}/s answered, p50 {outcome.p50_ms:7.1f}, "
        f"p95 {outcome.p95_ms:7.1f}, p99 {outcome.p99_ms:7.1f} ms, {errors}, batches {outcome.batches}"
    )


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--target", "others", multiple=True, callback=lambda c, p, v: [parse_target(t) for t in v], help="NAME=PROTOCOL=URL")
@click.option("--server", "servers", multiple=True, type=click.Choice(SERVERS), default=("serve", "naive"), show_default=True)
@click.option(
    "--corpus", type=click.Path(path_type=Path, exists=True), default=HERE.parent / "mra_export", help="Texts to ask about."
)
@click.option("--median", type=float, default=32, show_default=True, help="Tokens of a request, half are shorter.")
@click.option("--spread", type=float, default=0.8, show_default=True, help="Standard deviation of the lengths' logarithm.")
@click.option("--limit-ms", type=float, default=100, show_default=True, help="What the 99th percentile must stay below.")
@click.option("--seconds", type=float, default=6, show_default=True, help="Of each run.")
@click.option("--steps", type=int, default=3, show_default=True, help="Runs that narrow the highest rate down.")
@click.option("--first-rate", type=float, help="Where the search begins; default 0.8 of what many callers at once get answered.")
@click.option("--rate", "rates", type=float, multiple=True, help="In place of the search: only these rates, several times.")
@click.option(
    "--serve-option", "serve_options", multiple=True, help="Handed to `mra-export serve`, such as --serve-option=--workers=1"
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--soak", "soak_count", type=int, help="In place of the rates: so many requests, and what the server holds.")
@click.option("--soak-seconds", type=float, default=900, show_default=True, help="The soak ends then at the latest.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False))
def main(
    bundle: Path,
    others: list[Target],
    servers: tuple[str, ...],
    corpus: Path,
    median: float,
    spread: float,
    limit_ms: float,
    seconds: float,
    steps: int,
    first_rate: float | None,
    rates: tuple[float, ...],
    serve_options: tuple[str, ...],
    seed: int,
    soak_count: int | None,
    soak_seconds: float,
    json_file: Path | None,
) -> None:
    for name, why in (("triton", why_no_triton()), ("ray", why_no_ray())):
        if name in servers and why is not None:
            raise click.ClickException(why)
    runtime = MraRuntime.load(bundle, "onnxruntime")
    predictor = Predictor(runtime)
    asked = questions(bundle, corpus, 600, median, spread, runtime.bundle.manifest.model.max_position_embeddings, seed)
    checks = [(question, expected(predictor, question)) for question in asked[:8]]
    runtime.close()  # the rest of the time belongs to the servers
    lengths = [len(question.ids) for question in asked]
    results: dict[str, Any] = {
        "machine": machine(),
        "lengths": {
            "median": statistics.median(lengths),
            "mean": round(statistics.mean(lengths), 1),
            "p95": float(np.percentile(lengths, 95)),
            "longest": max(lengths),
        },
        "limit_ms": limit_ms,
        "seconds": seconds,
        "serve_options": list(serve_options),
    }
    click.echo(f"{len(asked)} texts, tokens: {results['lengths']}")
    failed: list[str] = []

    def soaked(server: Target) -> None:
        results["soak"] = uvloop.run(soak(server, asked, soak_count or 0, soak_seconds, _CALLERS))
        click.echo(json.dumps(results["soak"], indent=1))
        failed.extend(leaks(results["soak"]))

    def measured(server: Target) -> None:
        check(server, checks)
        measure = Measure(server, asked, limit_ms, seconds, seed)
        results.setdefault("servers", {})[server.name] = measure.at(rates) if rates else measure.search(first_rate, steps)

    use = measured if soak_count is None else soaked
    with tempfile.TemporaryDirectory() as scratch:
        for name in servers if soak_count is None else ("serve",):
            with target(name, bundle, Path(scratch), serve_options) as server:
                use(server)
        for server in others:
            use(server)
    if soak_count is None and not rates:
        summarize(results)
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1) + "\n")
    if failed:
        raise click.ClickException(", ".join(failed))


@dataclass(frozen=True)
class Measure:
    """Runs of so many seconds on one server."""

    server: Target
    asked: list[Question]
    limit_ms: float
    seconds: float
    seed: int

    def at(self, rates: Sequence[float]) -> dict[str, Any]:
        uvloop.run(most(self.server, self.asked, 1.0))  # warm
        return self._report([self._run(rate) for rate in rates])

    def search(self, first_rate: float | None, steps: int) -> dict[str, Any]:
        """Raises ClickException where `mra-export serve` answers overload with anything but "busy"."""
        closed = uvloop.run(most(self.server, self.asked, min(3.0, self.seconds)))
        click.echo(f"{self.server.name:>8} {closed:8.1f}/s with {_CALLERS} callers at once")
        report = self._report(highest_rate(self._run, self.limit_ms, first_rate or 0.8 * closed, steps))
        report["closed_loop"] = round(closed, 1)
        if self.server.name == "serve" and report["best"] is not None:
            click.echo("more than it can do:")
            overload = self._run(report["best"]["rate"] * 2.5)
            report["overload"] = asdict(overload)
            if set(overload.errors) - {"busy"}:
                raise click.ClickException(f"under overload there were errors other than busy: {overload.errors}")
        return report

    def _run(self, rate: float) -> Outcome:
        outcome = uvloop.run(load(self.server, self.asked, rate, self.seconds, self.seed))
        click.echo(line(self.server.name, outcome))
        return outcome

    def _report(self, runs: list[Outcome]) -> dict[str, Any]:
        found = best(runs, self.limit_ms)
        if found is None:
            click.echo(f"{self.server.name:>8}: none met the limit of {self.limit_ms:g} ms")
        return {"best": asdict(found) if found else None, "runs": [asdict(outcome) for outcome in runs]}


def summarize(results: dict[str, Any]) -> None:
    """How many times the naive server's throughput each has, where both met the limit."""
    found = {name: server["best"]["throughput"] for name, server in results["servers"].items() if server["best"] is not None}
    if "naive" in found:
        results["times_the_naive_throughput"] = {name: round(rate / found["naive"], 2) for name, rate in found.items()}
        for name, times in results["times_the_naive_throughput"].items():
            click.echo(f"{name:>8} {found[name]:8.1f}/s, {times:.2f} times naive, with p99 below {results['limit_ms']:g} ms")


if __name__ == "__main__":
    main()
