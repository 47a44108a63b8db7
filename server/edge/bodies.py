"""Bodies: how large, how slow and how many, and their JSON, bounded before anything looks at its values.

Invariants: all bodies that are being received hold at most `body_memory` bytes; the number of JSON values is bounded
by a count of commas and brackets before they are parsed, since a body of 4 MiB may hold 2 million of them; large
bodies are parsed off the event loop; lists are measured before their items are validated. Does not know what fields
mean, but knows which ones are long.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ensemble_core.config import ServerConfig
from server.edge.errors import RefusedBodyError
from server.edge.live import LiveConfig

_SMALL = 64 * 2**10  # bytes that are parsed at once, without a thread
_MAX_FIELDS = 256


class BodyLimit:
    """Bounds every body's size (413), its time (408), and the memory of all that are being received (503).

    `receive` raises the refusal when the route reads the body, so the usual error handlers answer it. A route that
    does not read the body is not limited; the connection throws the body away.
    """

    def __init__(self, app: ASGIApp, live: LiveConfig) -> None:
        self._app = app
        self._live = live
        self._held = 0  # bytes of all bodies that are not whole yet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Arriving(self, _declared(scope), receive)
        try:
            await self._app(scope, body.receive, send)
        finally:
            body.release()

    def check_size(self, num_bytes: int) -> None:
        """Raise a 413 for a body that is too large."""
        most = self._live.config.max_body_bytes
        if num_bytes > most:
            message = f"the body is over the limit of {most} bytes (server.max_body_bytes)"
            raise HTTPException(413, message)

    def hold(self, num_bytes: int) -> None:
        """Count bytes as held; a negative number releases them. Raises a 503 for too many."""
        self._held += num_bytes
        if num_bytes > 0 and self._held > self._live.config.limits.body_memory:
            raise HTTPException(503, "too many bodies arrive at once (server.limits.body_memory); try again later")

    @property
    def seconds(self) -> float:
        """How long a body may take."""
        return self._live.config.limits.body_seconds


class _Arriving:
    """One body while it is received."""

    def __init__(self, limit: BodyLimit, declared: int, receive: Receive) -> None:
        self._limit = limit
        self._declared = declared
        self._receive = receive
        self._deadline: float | None = None
        self._num_bytes = 0
        self._held = 0
        self._whole = False

    async def receive(self) -> Message:
        """The next message. Once the body is whole, there is no bound: the next message is the disconnect."""
        if self._whole:
            return await self._receive()
        self._limit.check_size(self._declared)
        message = await self._in_time()
        chunk = len(message.get("body", b""))
        self._num_bytes += chunk
        self._limit.check_size(self._num_bytes)
        self._whole = not message.get("more_body", False)
        if self._whole:
            self.release()
        else:
            self._held += chunk
            self._limit.hold(chunk)
        return message

    def release(self) -> None:
        """Hold nothing any more."""
        self._limit.hold(-self._held)
        self._held = 0

    async def _in_time(self) -> Message:
        if self._deadline is None:
            self._deadline = asyncio.get_running_loop().time() + self._limit.seconds
        try:
            async with asyncio.timeout_at(self._deadline):
                return await self._receive()
        except TimeoutError:
            seconds = f"{self._limit.seconds:g} s (server.limits.body_seconds)"
            raise HTTPException(408, f"the body took longer than {seconds}") from None


def _declared(scope: Scope) -> int:
    length = Headers(scope=scope).get("content-length", "")
    return int(length) if length.isdecimal() and len(length) < 20 else 0


class BodyRoute(APIRoute):
    """A route whose body is JSON, read within the limits of `server.limits`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The usual handler, with a request that reads its body in our way."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(JsonRequest(request.scope, request.receive))

        return handle


class JsonRequest(Request):
    """A request whose body is JSON, whatever its content type says; without keys, it must say JSON."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        others = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
        self._content_type = Headers(scope=scope).get("content-type", "")
        super().__init__({**scope, "headers": [*others, (b"content-type", b"application/json")]}, receive)

    async def json(self) -> Any:
        """The body's value. Raises json.JSONDecodeError, or RefusedBodyError."""
        services = self.app.state.services
        config: ServerConfig = services.config
        if not services.keyed and not _is_json(self._content_type):
            raise RefusedBodyError(415, "send the body with the header Content-Type: application/json")
        raw = await self.body()
        check_values(raw, config.limits.body_values)
        value = _parsed(raw) if len(raw) <= _SMALL else await asyncio.to_thread(_parsed, raw)
        check_lengths(value, config)
        return value


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _parsed(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of too many digits, nested too deeply
        raise RefusedBodyError(400, f"the body is not valid JSON: {error}") from error


def check_values(raw: bytes, most: int) -> None:
    """Raise RefusedBodyError for a body that may hold more than `most` values. Commas in texts count as well."""
    found = sum(raw.count(sign) for sign in (b",", b"[", b"{"))
    if found > most:
        raise RefusedBodyError(
            400, f"the body holds {found} JSON values (commas and opening brackets); allowed are {most} "
            "(server.limits.body_values)"
        )  # fmt: skip


def check_lengths(body: object, config: ServerConfig) -> None:
    """Raise RefusedBodyError for lists and objects that are too long, before their items are looked at."""
    if not isinstance(body, dict):
        return
    if len(body) > _MAX_FIELDS:
        raise RefusedBodyError(400, f"the body has {len(body)} fields; allowed are {_MAX_FIELDS}")
    messages = body.get("messages")
    if isinstance(messages, list):
        _at_most("messages", messages, config.limits.messages)
        for rank, message in enumerate(messages):
            content = message.get("content") if isinstance(message, dict) else None
            if isinstance(content, list):
                _at_most(f"messages.{rank}.content", content, config.limits.messages)


def _at_most(path: str, items: list[object], most: int) -> None:
    if len(items) > most:
        message = f"{path}: takes up to {most} entries (server.limits.messages), got {len(items)}"
        raise RefusedBodyError(400, message, path)
