"""The model behind the HTTP server: loaded and checked in a thread while the server already says that it lives."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.requests import Request

from mra_export.bundle import Bundle
from mra_export.predict import Predictor
from mra_export.runtime import MraRuntime, choose_backend
from mra_export.serve.batching import Batch, BatchingRuntime, share_processors
from mra_export.serve.gate import Refused
from mra_export.serve.settings import Settings
from mra_export.text import has_tokenizer

logger = logging.getLogger("mra_export.serve")

T = TypeVar("T")
_POOL = 2
"""Threads that turn text into tokens and outputs into answers, so that the event loop never waits for that."""


class ServedModel:
    """One bundle. bundle: its manifest is read here, its files in `load`. name: in URLs.

    Raises BundleError where there is no bundle.
    """

    def __init__(self, bundle: Bundle, settings: Settings) -> None:
        self.bundle = bundle
        self.settings = settings
        self.name = settings.name or bundle.path.resolve().name
        self.on_batch: Callable[[Batch], None] | None = None
        self.batching: BatchingRuntime | None = None
        self.predictor: Predictor | None = None
        self.failure: Exception | None = None
        self._pool = ThreadPoolExecutor(_POOL, thread_name_prefix="mra-text")

    @property
    def ready(self) -> bool:
        return self.batching is not None and not self.batching.closed

    @property
    def queue_length(self) -> int:
        return 0 if self.batching is None else self.batching.queue_length

    def load(self) -> None:
        """Load the model, compare it with its golden outputs, take requests. Raises what MraRuntime.load and validate raise."""
        started = time.monotonic()
        settings = self.settings
        device = settings.device or ("cuda" if settings.backend == "tensorrt" else "cpu")
        bundle = Bundle.load(self.bundle.path)
        backend = choose_backend(bundle, device, True)[0] if settings.backend == "auto" else settings.backend
        workers, threads = share_processors(backend, device, settings.workers, settings.threads)
        on_cpu = (backend, device) == ("onnxruntime", "cpu")
        chosen = on_cpu and bundle.manifest.chooses_tokens  # of fill-mask's logits few are answers
        runtime = MraRuntime.load(bundle, backend, device, intra_op_threads=threads, chosen_tokens=chosen)
        runtime.validate()
        if has_tokenizer(bundle.path):
            self.predictor = Predictor(runtime)
        self.batching = BatchingRuntime(
            runtime,
            max_batch_size=settings.max_batch_size,
            max_batch_tokens=settings.max_batch_tokens,
            max_delay_ms=settings.max_delay_ms,
            max_queue=settings.max_queue,
            length_buckets=settings.length_buckets,
            workers=workers,
            on_batch=self.on_batch,
        )
        fields = {"model": self.name, "backend": backend, "device": device, "workers": workers, "threads": threads}
        logger.info("ready", extra={"fields": {**fields, "seconds": round(time.monotonic() - started, 2)}})

    def close(self) -> None:
        """Answer what waits, for as long as the settings give."""
        if self.batching is not None:
            self.batching.close(timeout=self.settings.drain)
            self.batching.runtime.close()
        self._pool.shutdown(wait=False)

    def require(self) -> BatchingRuntime:
        """Raises Refused until the model is ready, and again once it drains."""
        if self.batching is None:
            why = "is being loaded and checked" if self.failure is None else f"could not be loaded: {self.failure}"
            raise Refused(
                503, f"the model {self.name} {why}: ask /v2/health/ready and try again", "not_ready", {"Retry-After": "1"}
            )
        if self.batching.closed:
            raise Refused(503, "the server is stopping: send the request to another", "draining")
        return self.batching

    async def aside(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call it in a thread of the pool."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    async def run(self, request: Request, asked: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Each of asked is what one request to the batching runtime takes (`submit`). One answer each.

        What has not run is cancelled when one is refused, the request's time is over or its client goes away.
        """
        batching = self.require()
        futures: list[Future[dict[str, Any]]] = []
        try:
            for arguments in asked:
                futures.append(batching.submit(**arguments))
            answers = await self._wait(request, futures)
        finally:
            for future in futures:
                future.cancel()
        request.state.log["rows"] = request.state.log.get("rows", 0) + sum(len(arguments["input_ids"]) for arguments in asked)
        return answers

    async def _wait(self, request: Request, futures: Sequence[Future[dict[str, Any]]]) -> list[dict[str, Any]]:
        answers: asyncio.Future[Any] = asyncio.gather(*map(asyncio.wrap_future, futures))
        gone: asyncio.Future[Any] = asyncio.ensure_future(_disconnected(request))
        try:
            left = request.state.deadline - time.monotonic()
            await asyncio.wait({answers, gone}, timeout=max(0.0, left), return_when=asyncio.FIRST_COMPLETED)
            if answers.done():
                return list(answers.result())
            if gone.done():
                raise Refused(499, "the client went away")
            raise Refused(504, f"there was no answer within {self.settings.timeout:g} s: send less at once, or try again later")
        finally:
            gone.cancel()
            answers.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
