"""What every request passes: size, media type and token are checked before anything is read, and its end is counted and logged."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
import uuid
from collections.abc import Callable
from typing import Any

import orjson
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mra_export.serve.metrics import Metrics
from mra_export.serve.settings import Settings

logger = logging.getLogger("mra_export.serve")

KINDS = {
    400: "bad_request",
    401: "unauthorized",
    404: "not_found",
    405: "method",
    408: "slow_request",
    413: "too_large",
    415: "media_type",
    422: "invalid",
    499: "client_gone",
    503: "unavailable",
    504: "timeout",
}
"""HTTP status -> `kind` in metrics and logs, where the answer names none itself."""
_HEALTH = ("/v2/health/live", "/v2/health/ready")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Refused(HTTPException):
    """An answer other than 200: status, message, and the kind of error that metrics and logs name."""

    def __init__(self, status: int, message: str, kind: str | None = None, headers: dict[str, str] | None = None) -> None:
        super().__init__(status, message, headers)
        self.kind = kind or KINDS.get(status, "internal")


class Gate:
    """ASGI middleware around the whole app. It reads no body itself: it counts what the app reads."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._authorization = None if settings.token is None else f"Bearer {settings.token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex[:16]
        state: dict[str, Any] = scope.setdefault("state", {})
        state.update(request_id=request_id, deadline=started + self._settings.timeout, log={})
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            refused = self._refuse(scope, headers)
            if refused is not None:
                await _send(answer, refused, close=True)
                state["kind"] = refused.kind
            else:
                await self._app(scope, self._limited(receive, state["deadline"]), answer)
        except Exception:
            logger.exception("failed", extra={"fields": {"request_id": request_id, "path": scope["path"]}})
            state["kind"] = "internal"
            if status == 0:
                await _send(answer, Refused(500, f"an error of the server: its log says more of request {request_id}"))
        finally:
            self._count(scope, status, time.monotonic() - started)

    def _refuse(self, scope: Scope, headers: Headers) -> Refused | None:
        path, settings = scope["path"], self._settings
        if self._authorization is not None and path not in _HEALTH:
            shown = headers.get("authorization", "").encode("latin-1")
            if not secrets.compare_digest(shown, self._authorization):
                return Refused(
                    401, "pass the server's token in a header Authorization: Bearer ...", headers={"WWW-Authenticate": "Bearer"}
                )
        if scope["method"] != "POST":
            return None
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > settings.max_body:
            return too_large(settings.max_body)
        if headers.get("content-encoding", "identity") != "identity":
            return Refused(415, f"the body has Content-Encoding {headers['content-encoding']!r}: send it uncompressed")
        media = headers.get("content-type", "").partition(";")[0].strip().lower()
        allowed = ("", "application/json", "application/octet-stream") if path.startswith("/v2/") else ("application/json",)
        if media not in allowed:
            return Refused(415, f"the body has Content-Type {media!r}: send application/json")
        return None

    def _limited(self, receive: Receive, deadline: float) -> Receive:
        """`receive` that reads at most so many bytes, until the deadline."""
        read, done = 0, False

        async def limited() -> Message:
            nonlocal read, done
            if done:
                return await receive()  # waits for the client to go away
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                done = True
                raise Refused(
                    408,
                    f"the body did not arrive within {self._settings.timeout:g} s: send it faster",
                    headers={"Connection": "close"},
                ) from None
            read += len(message.get("body", b""))
            done = not message.get("more_body", False)
            if read > self._settings.max_body:
                done = True
                raise too_large(self._settings.max_body)
            return message

        return limited

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        state = scope["state"]
        route = getattr(scope.get("route"), "path", "other")
        kind = state.get("kind") or (None if 0 < status < 400 else KINDS.get(status, "internal"))
        self._metrics.requests.labels(route, str(status)).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        fields = {
            "request_id": state["request_id"],
            "client": (scope.get("client") or ("",))[0],
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": status,
            "ms": round(seconds * 1e3, 2),
            **state["log"],
        }
        if kind is not None:
            self._metrics.errors.labels(kind).inc()
            fields["kind"] = kind
        level = logging.DEBUG if scope["path"] in (*_HEALTH, "/metrics") else logging.INFO
        logger.log(logging.ERROR if kind == "internal" else level, "request", extra={"fields": fields})


def too_large(limit: int) -> Refused:
    return Refused(413, f"the body has more than {limit} bytes: send less at once", headers={"Connection": "close"})


async def _send(send: Callable[[Message], Any], refused: Refused, close: bool = False) -> None:
    """The answer, without the app. close: the body was not read, so the connection is of no more use."""
    body = orjson.dumps({"error": refused.detail})
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(refused.headers or {})}
    if close:
        headers["Connection"] = "close"
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status_code, "headers": raw})
    await send({"type": "http.response.body", "body": body})
