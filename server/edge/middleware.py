"""Middleware for every route: a request id, an access line, a 500 for bugs, HEAD, slashes at the end of paths.

Pure ASGI, so that streams pass through unchanged and disconnects reach the route.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.edge.auth import route_path
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
            await to_api_error(error).response(str(exchange.scope["path"]))(
                exchange.scope, noted_receive, noted_send
            )


class Lenient:
    """Serves HEAD like GET without the body, and a path with a slash at its end like the one without.

    No redirect, which would lose a body. Around the routes and the keys, so that `/health/` is as open as `/health`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        inner = {**scope, "path": _without_slash(scope)}
        if scope["method"] == "HEAD":
            inner["method"] = "GET"
            send = _headers_alone(send)
        try:
            await self._app(inner, receive, send)
        finally:
            if "route" in inner:
                scope["route"] = inner["route"]  # for the access line


def _without_slash(scope: Scope) -> str:
    """The path that routes know; of the root path alone, that of the page at its root."""
    path = str(scope["path"])
    if route_path(scope) == "":
        return f"{path}/"
    return path[:-1] if path.endswith("/") and route_path(scope) != "/" else path


def _headers_alone(send: Send) -> Send:
    async def send_without_body(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return send_without_body


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
