"""What /metrics shows, and the log's lines as JSON."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from mra_export.serve.batching import Batch

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The counters of one app, in a registry of their own. queue_length and ready are asked at each scrape."""

    def __init__(self, queue_length: Callable[[], float], ready: Callable[[], float]) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("mra_requests", "HTTP requests answered", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            "mra_request_seconds", "From a request's header to its answer", ["route"], buckets=_SECONDS, registry=registry
        )
        self.errors = Counter("mra_errors", "Requests that were not answered with 200", ["kind"], registry=registry)
        self._waited = Histogram("mra_queue_seconds", "Wait of a request for its batch", buckets=_SECONDS, registry=registry)
        self._model = Histogram("mra_model_seconds", "One call of the model", buckets=_SECONDS, registry=registry)
        self._size = Histogram(
            "mra_batch_requests", "Requests that one call of the model answered", buckets=_SIZES, registry=registry
        )
        self._rows = Counter("mra_rows", "Rows that the model was given", registry=registry)
        self._tokens = Counter("mra_tokens", "Tokens that the model was given, without padding", registry=registry)
        self._padding = Counter("mra_padding_tokens", "Tokens of padding that the model was given", registry=registry)
        Gauge("mra_queue_length", "Requests that wait for a batch", registry=registry).set_function(queue_length)
        Gauge("mra_ready", "1 once the model agrees with its golden outputs", registry=registry).set_function(ready)

    def batch(self, batch: Batch) -> None:
        """One call of the model: what BatchingRuntime's `on_batch` is given."""
        self._size.observe(batch.requests)
        self._model.observe(batch.seconds)
        self._rows.inc(batch.rows)
        self._tokens.inc(batch.tokens)
        self._padding.inc(batch.padded - batch.tokens)
        for seconds in batch.waited:
            self._waited.observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class JsonFormatter(logging.Formatter):
    """A log record as one line of JSON: time, level, event, the record's `fields`. What requests say is never logged."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line: dict[str, Any] = {"time": moment, "level": record.levelname.lower(), "event": record.getMessage()}
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)
