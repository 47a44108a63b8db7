"""Bodies: how large, how slow and how many, and their JSON, bounded before anything looks at its values.

Compressed bodies are undone as they arrive; what is said here of bytes is true of both forms.

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

from ensemble_core.server_config import ServerConfig
from server.edge.auth import route_path
from server.edge.encodings import Inflater, encoding_of
from server.edge.errors import RefusedBodyError
from server.edge.live import LiveConfig

_SMALL = 64 * 2**10  # bytes that are parsed at once, without a thread
_MAX_FIELDS = 256
_ENVELOPE = 2**16  # bytes that an upload may have around its file
_LONG = {"messages": ("content",), "input": ("content", "output")}  # lists of messages -> lists in each


class BodyLimit:
    """Bounds every body's size (413), its time (408), and the memory of all that are being received (503).

    `receive` raises the refusal when the route reads the body, so the usual error handlers answer it. A route that
    does not read the body is not limited; the connection throws the body away.
    """

    def __init__(self, app: ASGIApp, live: LiveConfig, uploads: frozenset[str] = frozenset()) -> None:
        """uploads: paths whose bodies hold a file; the route writes it to the disk as it comes."""
        self._app = app
        self._live = live
        self._uploads = uploads
        self._held = 0  # bytes of all bodies that are not whole yet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_upload = route_path(scope) in self._uploads
        body = _Arriving(self, Headers(scope=scope), receive, is_upload)
        try:
            await self._app(scope, body.receive, send)
        finally:
            body.release()

    def check_size(self, num_bytes: int, is_upload: bool) -> None:
        """Raise a 413 for a body that is too large."""
        most = self._most(is_upload)
        if num_bytes > most:
            where = "server.limits.file_bytes" if is_upload else "server.max_body_bytes"
            raise HTTPException(413, f"the body is over the limit of {most} bytes ({where})")

    def hold(self, num_bytes: int) -> None:
        """Count bytes as held; a negative number releases them. Raises a 503 for too many."""
        self._held += num_bytes
        if num_bytes > 0 and self._held > self._live.config.limits.body_memory:
            raise HTTPException(503, "too many bodies arrive at once (server.limits.body_memory); try again later")

    def inflater(self, encoding: str, is_upload: bool) -> Inflater:
        """What undoes a body's compression within the limit."""
        return Inflater(encoding, self._most(is_upload), lambda size: self.check_size(size, is_upload))

    def bound(self, is_upload: bool) -> tuple[float, str]:
        """How long a body may take, and the field that says so."""
        limits = self._live.config.limits
        return (limits.file_seconds, "file_seconds") if is_upload else (limits.body_seconds, "body_seconds")

    def _most(self, is_upload: bool) -> int:
        config = self._live.config
        return config.limits.file_bytes + _ENVELOPE if is_upload else config.max_body_bytes


class _Arriving:
    """One body while it is received."""

    def __init__(self, limit: BodyLimit, headers: Headers, receive: Receive, is_upload: bool) -> None:
        self._limit = limit
        self._declared = _declared(headers)
        self._encoding = ", ".join(headers.getlist("content-encoding"))
        self._inflater: Inflater | None = None
        self._receive = receive
        self._is_upload = is_upload
        self._deadline: float | None = None
        self._num_bytes = 0
        self._held = 0
        self._whole = False

    async def receive(self) -> Message:
        """The next message. Once the body is whole, there is no bound: the next message is the disconnect."""
        if self._whole:
            return await self._receive()
        if self._deadline is None:
            self._begin()
        message = await self._in_time()
        if self._inflater is not None and message["type"] == "http.request":
            body = self._inflater.feed(message.get("body", b""), last=not message.get("more_body", False))
            message = {**message, "body": body}
        chunk = len(message.get("body", b""))
        self._num_bytes += chunk
        self._limit.check_size(self._num_bytes, self._is_upload)
        self._whole = not message.get("more_body", False)
        if self._whole:
            self.release()
        elif not self._is_upload:
            self._held += chunk
            self._limit.hold(chunk)
        return message

    def release(self) -> None:
        """Hold nothing any more."""
        self._limit.hold(-self._held)
        self._held = 0

    def _begin(self) -> None:
        """Refuse what the headers show to be too large or unreadable, and start the clock."""
        self._limit.check_size(self._declared, self._is_upload)
        if encoding := encoding_of(self._encoding):
            self._inflater = self._limit.inflater(encoding, self._is_upload)
        self._deadline = asyncio.get_running_loop().time() + self._limit.bound(self._is_upload)[0]

    async def _in_time(self) -> Message:
        seconds, field = self._limit.bound(self._is_upload)
        try:
            async with asyncio.timeout_at(self._deadline):
                return await self._receive()
        except TimeoutError:
            message = f"the body took longer than {seconds:g} s (server.limits.{field})"
            raise HTTPException(408, message) from None


def _declared(headers: Headers) -> int:
    length = headers.get("content-length", "")
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
    for name, inner in _LONG.items():
        messages = body.get(name)
        if not isinstance(messages, list):
            continue
        _at_most(name, messages, config.limits.messages)
        for rank, message in enumerate(messages):
            for part in inner:
                content = message.get(part) if isinstance(message, dict) else None
                if isinstance(content, list):
                    _at_most(f"{name}.{rank}.{part}", content, config.limits.messages)


def _at_most(path: str, items: list[object], most: int) -> None:
    if len(items) > most:
        message = f"{path}: takes up to {most} entries (server.limits.messages), got {len(items)}"
        raise RefusedBodyError(400, message, path)
