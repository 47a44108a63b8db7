"""Middleware for every route: a request id, a log line, a 500 for bugs.

Pure ASGI, so that streams pass through unchanged and disconnects reach the route.
"""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
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
