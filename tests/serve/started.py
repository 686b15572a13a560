"""A server that is really started: `mra-export serve` in a process of its own, on a free port of the loopback address."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from processes import started

WAIT = 240
"""Seconds that a test waits for what takes few: other processes may hold the processor."""

COMMAND = (sys.executable, "-c", "from mra_export.cli import main; main()")


class Server:
    """log: the file that its stderr goes to. As a context manager it is gone after the block, whatever happened in it."""

    def __init__(self, bundle: Path, log: Path, *options: str, environment: dict[str, str] | None = None) -> None:
        self.log = log
        command = [*COMMAND, "serve", str(bundle), "--port", "0", "--name", "mra", *options]
        self._kept = contextlib.ExitStack()
        with log.open("wb") as stream:
            whole = {**os.environ, **(environment or {})}
            self.process = self._kept.enter_context(started(command, stderr=stream, stdout=stream, env=whole))
        self.port = int(self.wait_for("listening")["url"].rsplit(":", 1)[1])

    def lines(self, event: str) -> list[dict[str, Any]]:
        """The log's complete lines about this event."""
        whole = self.log.read_text().rpartition("\n")[0].splitlines()
        return [line for line in map(json.loads, filter(lambda text: text.startswith("{"), whole)) if line["event"] == event]

    def wait_for(self, event: str, count: int = 1) -> dict[str, Any]:
        """The line about the last one. A server that does not come to say it is ended, since the caller may not have it yet."""
        end = time.monotonic() + WAIT
        while len(found := self.lines(event)) < count:
            if self.process.poll() is not None or time.monotonic() > end:
                self._kept.close()
                raise AssertionError(self.log.read_text())
            time.sleep(0.02)
        return found[-1]

    def ready(self) -> Server:
        self.wait_for("ready")
        return self

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON (or text) and headers. body: bytes as they are, anything else as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        connection.request(method, path, body, sent)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        kind = response.headers.get("Content-Type", "")
        return response.status, json.loads(content) if kind == "application/json" else content.decode(), dict(response.headers)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(WAIT)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._kept.close()


def tensor(values: Any, name: str = "input_ids", datatype: str = "INT64", **more: Any) -> dict[str, Any]:
    """One of the protocol's inputs, its shape taken from nested lists."""
    shape, inner = [], values
    while isinstance(inner, list):
        shape.append(len(inner))
        inner = inner[0] if inner else None
    return {"name": name, "shape": shape, "datatype": datatype, "data": values, **more}
