"""Server-sent events, and what happens when the client disconnects.

Invariant: however a stream ends (done, failed, client gone, server stopped), its source is closed, which aborts
unfinished requests in the engine. This module does not know what the events mean.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Message, Receive, Scope, Send

from ensemble_core.errors import UnisonoError
from server.edge.errors import ApiError, ClientGoneError, to_api_error
from server.edge.exchange import failed

logger = logging.getLogger(__name__)

T = TypeVar("T")

DONE = "data: [DONE]\n\n"
FIRST_SECONDS = 5.0  # that a stream's status and headers wait for its first chunk
KEEPALIVE_SECONDS = 10.0
KEEPALIVE = b": keepalive\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
# Legal inside JSON, but the line splitters of many clients treat them as line ends.
_LINE_BREAKS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. If the client disconnects first, cancels `work` and raises ClientGoneError.

    receive: of a request whose body has been read, so that the next message is the disconnect.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Wire:
    """How a stream is written: each chunk as a line of data, `[DONE]` at the end."""

    end = DONE

    def chunk(self, item: BaseModel) -> str:
        """A chunk as an event."""
        return event(item.model_dump_json(exclude_unset=True))

    def failure(self, error: ApiError) -> str:
        """What ends a stream that has failed, before `end`."""
        return event(error.json())


async def begin(
    chunks: AsyncGenerator[BaseModel], receive: Receive, headers: Callable[[], Mapping[str, str]], wire: Wire
) -> EventStream:
    """The stream as a response, once its first chunk is there or has kept us waiting for `FIRST_SECONDS`.

    An error before that is raised, so that it can still set the status; a later one becomes an event. headers: of
    what is known by then.
    """
    first = asyncio.create_task(_next(chunks))
    try:
        await unless_gone(receive, asyncio.wait({first}, timeout=FIRST_SECONDS))
        if first.done():
            first.result()
        return EventStream(first, chunks, headers(), wire)
    except BaseException:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        raise


async def _next(chunks: AsyncGenerator[BaseModel]) -> BaseModel:
    return await anext(chunks)


class EventStream(StreamingResponse):
    """A running stream as a response. While it has nothing to say it sends comments, so that no proxy gives it up."""

    def __init__(
        self,
        first: Awaitable[BaseModel],
        rest: AsyncGenerator[BaseModel],
        headers: Mapping[str, str],
        wire: Wire,
    ) -> None:
        self._rest = rest
        self._events = encode(first, rest, wire)
        super().__init__(self._events, headers={**HEADERS, **headers}, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events; stop when the client disconnects."""
        pulse = _Pulse(send)
        beating = asyncio.create_task(pulse.beat())
        try:
            await unless_gone(receive, self.stream_response(pulse.send))
        except (ClientGoneError, OSError):
            logger.info("the client disconnected before its stream ended")
        finally:
            beating.cancel()
            await self._events.aclose()
            await self._rest.aclose()


class _Pulse:
    """Sends what a stream sends, and a comment where it is silent for `KEEPALIVE_SECONDS`."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._last = time.monotonic()
        self._open = False

    async def send(self, message: Message) -> None:
        """Send a message of the stream."""
        self._last = time.monotonic()
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._open = False
        await self._send(message)
        if message["type"] == "http.response.start":
            self._open = True

    async def beat(self) -> None:
        """Until it is cancelled, or the connection is gone, which the stream itself notices, too."""
        with suppress(OSError):
            while True:
                await asyncio.sleep(max(self._last + KEEPALIVE_SECONDS - time.monotonic(), 0.01))
                if self._open and time.monotonic() - self._last >= KEEPALIVE_SECONDS:
                    self._last = time.monotonic()
                    await self._send({"type": "http.response.body", "body": KEEPALIVE, "more_body": True})


async def encode(first: Awaitable[BaseModel], rest: AsyncGenerator[BaseModel], wire: Wire) -> AsyncGenerator[str]:
    """Events of `first` and the rest, as `wire` writes them. A failure becomes an event too."""
    async with aclosing(rest):
        try:
            yield wire.chunk(await first)
            async for item in rest:
                yield wire.chunk(item)
        except UnisonoError as error:
            failed(error)
            logger.warning("failed after the headers were sent: %s", error)
            yield wire.failure(to_api_error(error))
        except Exception as error:
            failed(error)
            logger.exception("failed after the headers were sent")
            yield wire.failure(to_api_error(error))
    if wire.end:
        yield wire.end


def event(data: str, name: str | None = None) -> str:
    """One event with one line of data. name: of the event, a word."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {data.translate(_LINE_BREAKS)}\n\n"
