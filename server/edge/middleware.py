"""Middleware for every route: a request id, an access line, a 500 for bugs, a limit on the body.

Pure ASGI, so that streams pass through unchanged and disconnects reach the route.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.edge.errors import to_api_error
from server.edge.exchange import CURRENT, Exchange
from server.edge.logs import REQUEST_ID

logger = logging.getLogger(__name__)

_VISIBLE = re.compile(r"[\x21-\x7e]{1,128}")


class RequestContext:
    """Gives each request its id, turns bugs into a 500, and reports the exchange when its answer has ended.

    observers: called with each exchange, in order; they must not raise.
    """

    def __init__(self, app: ASGIApp, observers: Sequence[Callable[[Exchange], None]] = ()) -> None:
        self._app = app
        self._observers = observers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request_id = choose_request_id(Headers(scope=scope).get("x-request-id"))
        exchange = Exchange(scope)
        tokens = REQUEST_ID.set(request_id), CURRENT.set(exchange)
        try:
            await self._serve(exchange, request_id, receive, send)
        finally:
            exchange.end()
            for observe in self._observers:
                observe(exchange)
            REQUEST_ID.reset(tokens[0])
            CURRENT.reset(tokens[1])

    async def _serve(self, exchange: Exchange, request_id: str, receive: Receive, send: Send) -> None:
        async def noted_receive() -> Message:
            message = await receive()
            exchange.received(message)
            return message

        async def noted_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            exchange.sent(message)
            await send(message)

        try:
            await self._app(exchange.scope, noted_receive, noted_send)
        except Exception as error:
            exchange.error = type(error).__name__
            logger.exception("failed: %s %s", exchange.method, exchange.route or "-")
            if exchange.status is not None:
                raise  # the headers are sent, so only a broken connection can report the failure
            await to_api_error(error).response()(exchange.scope, noted_receive, noted_send)


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
