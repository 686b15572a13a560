"""`mra-export serve`: the app on uvicorn, with JSON logs, until SIGTERM or SIGINT; then what is in flight is answered."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

from mra_export.errors import BackendError, MissingPackageError
from mra_export.serve.settings import Settings

logger = logging.getLogger("mra_export.serve")

_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "orjson")
_MAX_CONNECTIONS = 1000
_KEEP_ALIVE = 75
"""Seconds that an idle connection stays open."""


def check_packages() -> None:
    """Raises MissingPackageError naming what is missing."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise MissingPackageError(f"serving needs {', '.join(missing)}, not installed here: pip install 'mra-export[serve]'")


def serve(bundle: Path, settings: Settings, host: str = "127.0.0.1", port: int = 8000, verbose: bool = False) -> None:
    """Serve the bundle until the process is told to stop. port: 0 for a free one, which the log's line "listening" names.

    Raises MissingPackageError without the extra `serve`, BundleError where there is no bundle, BackendError where the port is
    taken, and what loading raises: a server that can never be ready ends.
    """
    check_packages()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would compete with the model's
    import uvicorn

    from mra_export.serve.app import make_app

    log_as_json(logging.DEBUG if verbose else logging.INFO)
    app = make_app(bundle, settings, on_failure=lambda: setattr(server, "should_exit", True))
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=max(1, round(settings.drain)),
        server_header=False,
        ws="none",
    )
    server = uvicorn.Server(config)
    listener = listen(host, port)
    url = f"http://{_bracketed(host)}:{listener.getsockname()[1]}"
    logger.info("listening", extra={"fields": {"url": url, "model": app.state.model.name, "pid": os.getpid()}})
    if settings.token is None and host not in ("127.0.0.1", "::1", "localhost"):
        logger.warning("open to all", extra={"fields": {"host": host, "fix": "set a token: --token-file or MRA_EXPORT_TOKEN"}})
    # uvicorn stops gracefully on SIGTERM and then raises it again: the process ends as it was told to, which is no failure
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        server.run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)
        listener.close()
    if app.state.model.failure is not None:
        raise app.state.model.failure
    logger.info("stopped", extra={"fields": {"pid": os.getpid()}})


def listen(host: str, port: int) -> socket.socket:
    """A socket bound there. Raises BackendError where that cannot be."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise BackendError(
            f"cannot listen on {host} port {port} ({error.strerror or error}): pass another --host or --port"
        ) from error


def log_as_json(level: int) -> None:
    """Every log record of this process goes to stderr as a line of JSON."""
    from mra_export.serve.metrics import JsonFormatter

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logger.setLevel(level)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
