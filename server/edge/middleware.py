"""Middleware for every route: a request id, a log line, a 500 for bugs, a limit on the body.

Pure ASGI, so that streams pass through unchanged and disconnects reach the route.
"""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.edge.errors import to_api_error
from server.edge.logs import REQUEST_ID

logger = logging.getLogger(__name__)

_VISIBLE = re.compile(r"[\x21-\x7e]{1,128}")
_PROBES = frozenset({"/health", "/ready", "/metrics"})


class RequestContext:
    """Gives each request its id, logs one line about it, and turns bugs into a 500."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request_id = choose_request_id(Headers(scope=scope).get("x-request-id"))
        token = REQUEST_ID.set(request_id)
        try:
            await _Exchange(request_id).run(self._app, scope, receive, send)
        finally:
            REQUEST_ID.reset(token)


class _Exchange:
    """One request and its answer."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._status: int | None = None  # None: no headers sent yet

    async def run(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = self._request_id
            await send(message)

        try:
            await app(scope, receive, send_with_id)
        except Exception as error:
            logger.exception("failed: %s %s", scope["method"], scope["path"])
            if self._status is not None:
                raise  # the headers are sent, so only a broken connection can report the failure
            await to_api_error(error).response()(scope, receive, send_with_id)
        finally:
            self._log(scope, time.perf_counter() - started)

    def _log(self, scope: Scope, seconds: float) -> None:
        level = logging.DEBUG if scope["path"] in _PROBES else logging.INFO
        logger.log(level, "%s %s %s %.3fs", scope["method"], scope["path"], self._status, seconds)


class BodyLimit:
    """Refuses bodies over `max_bytes` with a 413, by their declared length or as they arrive in chunks.

    `receive` raises the refusal when the route reads the body, so the usual error handlers answer it. A route that
    does not read the body is not limited.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        limited = self._limited(scope, receive) if scope["type"] == "http" else receive
        await self._app(scope, limited, send)

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        length = Headers(scope=scope).get("content-length", "")
        declared = int(length) if length.isdecimal() and len(length) < 20 else 0
        received = 0

        async def limited() -> Message:
            nonlocal received
            self._check(declared)
            message = await receive()
            received += len(message.get("body", b""))
            self._check(received)
            return message

        return limited

    def _check(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            message = f"the body is over the limit of {self._max_bytes} bytes (server.max_body_bytes)"
            raise HTTPException(413, message)


class RootPath:
    """Sets the path prefix under which a proxy serves the app. Paths work with and without the prefix."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        await self._app({**scope, "root_path": self._root_path}, receive, send)


def choose_request_id(sent: str | None) -> str:
    """The client's own id if it is 1 to 128 visible ASCII characters, otherwise a new one."""
    if sent is not None and _VISIBLE.fullmatch(sent):
        return sent
    return uuid.uuid4().hex
