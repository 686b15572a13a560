"""Dynamic batching: requests of many callers become few calls of the model, and no answer depends on its batch mates.

with BatchingRuntime(MraRuntime.load("bundle")) as batching:
    future = batching.submit(input_ids=ids)  # from any thread; in asyncio: await asyncio.wrap_future(future)
    logits = future.result()["logits"]
"""

from __future__ import annotations

import bisect
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mra_export.contract import BLOCK_SIZE
from mra_export.errors import BackendError, BusyError, ContractError
from mra_export.inputs import Integers, is_torch, like, stacked

if TYPE_CHECKING:
    from mra_export.runtime import MraRuntime

Outputs = dict[str, Any]
_Key = tuple[int, ...]
CPU_BATCH_TOKENS = 512
"""On a CPU a call of this many tokens already keeps its threads as busy as they get; a longer one only makes its requests wait."""
GPU_BATCH_TOKENS = 16384


@dataclass(frozen=True)
class Batch:
    """One call of the model, as `on_batch` is told.

    requests, rows: how many it answered. tokens: of them all, without padding; padded: with it. waited: seconds that each request
    was in the queue. seconds: that the call took. failed: True where it raised.
    """

    requests: int
    rows: int
    tokens: int
    padded: int
    waited: tuple[float, ...]
    seconds: float
    failed: bool


@dataclass(eq=False)
class _Request:
    """inputs: checked (inputs.py), (rows, length) or (rows, choices, length) int64. tokens: as for `submit`. key: requests of one
    key may share a call.
    """

    inputs: dict[str, Integers]
    tokens: Integers | None
    key: _Key
    arrived: float
    example: Any
    future: Future[Outputs] = field(default_factory=Future)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inputs["input_ids"].shape

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def wanted(self) -> int:
        """Tokens whose outputs it wants."""
        return math.prod(self.shape) if self.tokens is None else len(self.tokens)


class BatchingRuntime:
    """An `MraRuntime` for many callers at once. Thread-safe; use `close` or a with statement, which leave the runtime open.

    max_batch_size: rows of one call, at most. max_batch_tokens: tokens of one call with padding, at most, but one request always
    fits; None: 512 on a CPU, 16384 on a GPU. max_delay_ms: how long a request may wait for batch mates while a worker is free.
    max_queue: requests that may wait; one more raises BusyError. length_buckets: only requests whose length falls between the same
    two of these share a call, which is as long as its longest; None: chosen so that little is padded. workers: calls of the model
    at the same time. on_batch: called after each call of the model, from the worker's thread.

    A request gives the same answer whatever it was batched with. Without --padding-invariant a bundle's answers depend on how many
    blocks of 32 tokens the input has, so then only requests of equally many blocks share a call.

    Raises ContractError for values out of range, for buckets wider than a block where the bundle is not padding invariant, and for
    max_batch_size > 1 where an int8 bundle takes its scales from each call ("dynamic").
    """

    def __init__(
        self,
        runtime: MraRuntime,
        *,
        max_batch_size: int = 8,
        max_delay_ms: float = 0.0,
        max_queue: int = 256,
        length_buckets: Sequence[int] | None = None,
        max_batch_tokens: int | None = None,
        workers: int = 1,
        on_batch: Callable[[Batch], None] | None = None,
    ) -> None:
        for name, value, least in (
            ("max_batch_size", max_batch_size, 1),
            ("max_queue", max_queue, 1),
            ("workers", workers, 1),
            ("max_delay_ms", max_delay_ms, 0),
            ("max_batch_tokens", 1 if max_batch_tokens is None else max_batch_tokens, 1),
        ):
            if value < least:
                raise ContractError(f"{name} is {value}: it must be {least} or more")
        manifest = runtime.bundle.manifest
        quantization = manifest.quantization
        if max_batch_size > 1 and quantization is not None and quantization.method == "dynamic" and runtime.backend != "torch":
            raise ContractError(
                f"max_batch_size is {max_batch_size}, but this int8 bundle takes its scales from each call, so an answer would "
                "depend on its batch mates: pass max_batch_size 1, or export with --calibration"
            )
        self.runtime = runtime
        self.max_batch_size = max_batch_size
        self.max_queue = max_queue
        self.max_batch_tokens = max_batch_tokens or (GPU_BATCH_TOKENS if runtime.device == "cuda" else CPU_BATCH_TOKENS)
        self.length_buckets = _buckets(length_buckets, manifest.model.max_position_embeddings, manifest.padding_invariant)
        self._delay = max_delay_ms / 1e3
        self._on_batch = on_batch
        self._token_outputs = frozenset(manifest.token_outputs)
        self._changed = threading.Condition()
        self._queues: dict[_Key, deque[_Request]] = {}
        self._waiting = 0
        self._closed = False
        self._workers = [threading.Thread(target=self._work, name=f"mra-batching-{n}", daemon=True) for n in range(workers)]
        for worker in self._workers:
            worker.start()

    def submit(self, *, tokens: Any = None, **arrays: Any) -> Future[Outputs]:
        """Queue one request; tokens and arrays as for `MraRuntime.run`. The future gives what that gives, without padding.

        Cancelling the future takes the request out of the queue; one that already runs is finished. Outputs may be views of the
        batch's arrays: copy what is kept for long. Raises ContractError for inputs the model cannot take, BusyError where the queue
        is full, BackendError after `close`.
        """
        inputs = self.runtime.check(**arrays)
        shape = inputs["input_ids"].shape
        if tokens is not None:
            tokens = self.runtime.check_tokens(tokens, shape)
        if shape[0] > self.max_batch_size:
            raise ContractError(
                f"input_ids has {shape[0]} rows, max_batch_size is {self.max_batch_size}: "
                f"send {self.max_batch_size} rows or fewer at once"
            )
        bucket = self.length_buckets[bisect.bisect_left(self.length_buckets, shape[-1])]
        request = _Request(inputs, tokens, (*shape[1:-1], bucket), time.monotonic(), arrays["input_ids"])
        with self._changed:
            if self._closed:
                raise BackendError(f"{self.runtime.bundle.path}: this runtime is closing and takes no more requests")
            if self._waiting >= self.max_queue:
                raise BusyError(f"{self._waiting} requests are waiting, max_queue is {self.max_queue}: try again later")
            self._queues.setdefault(request.key, deque()).append(request)
            self._waiting += 1
            self._changed.notify()
        request.future.add_done_callback(lambda future: self._forget(request) if future.cancelled() else None)
        return request.future

    def run(self, *, tokens: Any = None, **arrays: Any) -> Outputs:
        """`submit`, and wait for the answer."""
        future = self.submit(tokens=tokens, **arrays)
        try:
            return future.result()
        finally:
            future.cancel()  # of use where waiting was interrupted

    @property
    def queue_length(self) -> int:
        """Requests that wait now, without those that run."""
        return self._waiting

    @property
    def closed(self) -> bool:
        """True from the beginning of `close`."""
        return self._closed

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests, answer those that wait (drain) or cancel them, and end the workers.

        timeout: seconds to wait for that; what then still waits is cancelled. May be called again.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if drain:
            self._join(deadline)
        with self._changed:
            left = [request for queue in self._queues.values() for request in queue]
        for request in left:
            request.future.cancel()
        if not drain:
            self._join(deadline)

    def __enter__(self) -> BatchingRuntime:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(drain=kind is None)

    def _join(self, deadline: float | None) -> None:
        for worker in self._workers:
            if worker is not threading.current_thread():
                worker.join(None if deadline is None else max(0.0, deadline - time.monotonic()))

    def _forget(self, request: _Request) -> None:
        """Give a cancelled request's place in the queue to another."""
        with self._changed:
            queue = self._queues.get(request.key)
            if queue is not None and request in queue:
                queue.remove(request)
                self._waiting -= 1
                if not queue:
                    del self._queues[request.key]

    def _work(self) -> None:
        while True:
            requests = self._next()
            if requests is None:
                return
            self._answer(requests)
            del requests  # a worker that waits holds on to nobody's arrays

    def _next(self) -> list[_Request] | None:
        """Wait for requests that are due, and take them from the queue; None when there will be no more."""
        with self._changed:
            while True:
                now = time.monotonic()
                key, due = self._first_due(now)
                if key is not None and due <= now:
                    requests = self._take(key)
                    if requests:
                        return requests
                elif key is None and self._closed:
                    return None
                else:
                    self._changed.wait(None if key is None else due - now)

    def _first_due(self, now: float) -> tuple[_Key | None, float]:
        """Whose turn is next and when: the queue of the oldest request, unless it may still wait and another is full."""
        oldest: _Key | None = None
        due = 0.0
        for key, queue in self._queues.items():
            if oldest is None or queue[0].arrived + self._delay < due:
                oldest, due = key, queue[0].arrived + self._delay
        if oldest is None or due <= now or self._closed:
            return oldest, min(due, now)
        for key, queue in self._queues.items():
            if len(queue) >= self.max_batch_size or len(queue) * key[-1] >= self.max_batch_tokens:
                return key, now
        return oldest, due

    def _take(self, key: _Key) -> list[_Request]:
        """The oldest of a queue, as many as one call takes; the lock is held."""
        queue = self._queues[key]
        requests: list[_Request] = []
        rows = longest = 0
        while queue:
            shape = queue[0].shape
            together = (rows + shape[0], *shape[1:-1], max(longest, shape[-1]))
            too_many = together[0] > self.max_batch_size or int(np.prod(together)) > self.max_batch_tokens
            if requests and (too_many or self.runtime.refuses(together) is not None):
                break
            request = queue.popleft()
            self._waiting -= 1
            if request.future.set_running_or_notify_cancel():
                requests.append(request)
                rows, longest = together[0], together[-1]
        if not queue:
            del self._queues[key]
        return requests

    def _answer(self, requests: list[_Request]) -> None:
        started = time.monotonic()
        inputs = stacked([request.inputs for request in requests])
        tokens = _chosen(requests, inputs["input_ids"].shape[-1])
        failure: BaseException | None = None
        try:
            outputs = self.runtime.run(**inputs) if tokens is None else self.runtime.run(tokens=tokens, **inputs)
        except BaseException as error:  # the workers outlive any failure; the callers get it
            failure = error
        finished = time.monotonic()
        if self._on_batch is not None:
            shape = inputs["input_ids"].shape
            self._on_batch(
                Batch(
                    requests=len(requests),
                    rows=shape[0],
                    tokens=sum(int(np.prod(request.shape)) for request in requests),
                    padded=int(np.prod(shape)),
                    waited=tuple(started - request.arrived for request in requests),
                    seconds=finished - started,
                    failed=failure is not None,
                )
            )
        start = 0
        for request in requests:
            if failure is not None:
                request.future.set_exception(failure)
                continue
            end = start + (request.rows if tokens is None else request.wanted)
            own = {name: self._own(name, value[start:end], request, tokens is None) for name, value in outputs.items()}
            request.future.set_result(like(own, request.example) if is_torch(request.example) else own)
            start = end

    def _own(self, name: str, part: npt.NDArray[Any], request: _Request, whole: bool) -> npt.NDArray[Any]:
        """An output as its request wants it. part: its rows of a whole call, (rows, ...), else its tokens, (wanted, ...)."""
        if not whole:
            return part if request.tokens is not None else part.reshape(*request.shape, *part.shape[1:])
        if name not in self._token_outputs:
            return part
        axis = len(request.shape) - 1
        return part[(slice(None),) * axis + (slice(request.shape[-1]),)]


def _chosen(requests: Sequence[_Request], length: int) -> Integers | None:
    """The tokens that a call's requests want, numbered through its rows of this length; None: all want all of theirs."""
    if all(request.tokens is None for request in requests):
        return None
    parts, row = [], 0
    for request in requests:
        own = np.arange(request.wanted) if request.tokens is None else request.tokens
        line, place = np.divmod(own, request.shape[-1])
        parts.append((row + line) * length + place)
        row += math.prod(request.shape[:-1])
    return np.concatenate(parts)


def share_processors(
    backend: str, device: str, workers: int | None = None, threads: int | None = None, copies: int = 1
) -> tuple[int, int | None]:
    """Workers of a BatchingRuntime and threads of each of their calls, where they are not given; None: the backend's own choice.

    With ONNX Runtime on a CPU two calls on half the processors each do more than one on all of them, and the threads of a call
    that could have more than there are processors wait for each other spinning. copies: processes on this machine that do the same.
    """
    if backend != "onnxruntime" or device != "cpu":
        return workers or 1, threads
    workers = workers or 2
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return workers, threads or max(1, processors // (workers * copies))


def _buckets(wanted: Sequence[int] | None, longest: int, padding_invariant: bool) -> tuple[int, ...]:
    """Upper ends of the buckets, ascending, the last one the model's longest input."""
    if wanted is None:
        wider = [2**k // 4 * quarters for k in range(5, longest.bit_length()) for quarters in (4, 5, 6, 7)]
        wanted = [8, 16, 24, *wider] if padding_invariant else range(BLOCK_SIZE, longest, BLOCK_SIZE)
    elif list(wanted) != sorted(set(wanted)) or any(n < 1 for n in wanted):
        raise ContractError(f"length_buckets is {list(wanted)}: pass lengths of 1 or more in ascending order")
    ends = (*(n for n in wanted if n < longest), longest)
    if not padding_invariant:
        for start, end in zip((0, *ends), ends, strict=False):
            if start // BLOCK_SIZE != (end - 1) // BLOCK_SIZE:
                raise ContractError(
                    f"length_buckets puts lengths {start + 1} to {end} together, but this bundle is not padding invariant, so an "
                    f"answer would depend on its batch mates: use buckets of {BLOCK_SIZE}, or export with --padding-invariant"
                )
    return ends
