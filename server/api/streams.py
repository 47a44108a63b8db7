"""Server-sent events, and what happens when the client disconnects.

Invariant: however a stream ends (done, failed, client gone, server stopped), its source is closed, which aborts
unfinished requests in the engine. This module does not know what the events mean.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from ensemble_core.errors import UnisonoError
from server.edge.errors import ClientGoneError, to_api_error
from server.edge.exchange import failed

logger = logging.getLogger(__name__)

T = TypeVar("T")

DONE = "data: [DONE]\n\n"
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


class EventStream(StreamingResponse):
    """A running stream as a response. `first` exists already, so errors before it could still set the status."""

    def __init__(self, first: BaseModel, rest: AsyncGenerator[BaseModel]) -> None:
        self._rest = rest
        self._events = encode(first, rest)
        super().__init__(self._events, headers=HEADERS, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events; stop when the client disconnects."""
        try:
            await unless_gone(receive, self.stream_response(send))
        except (ClientGoneError, OSError):
            logger.info("the client disconnected before its stream ended")
        finally:
            await self._events.aclose()
            await self._rest.aclose()


async def encode(first: BaseModel, rest: AsyncGenerator[BaseModel]) -> AsyncGenerator[str]:
    """Events of `first` and the rest. A failure becomes an event too. `[DONE]` ends every stream."""
    async with aclosing(rest):
        try:
            yield event(first.model_dump_json(exclude_unset=True))
            async for item in rest:
                yield event(item.model_dump_json(exclude_unset=True))
        except UnisonoError as error:
            failed(error)
            logger.warning("failed after the headers were sent: %s", error)
            yield event(to_api_error(error).json())
        except Exception as error:
            failed(error)
            logger.exception("failed after the headers were sent")
            yield event(to_api_error(error).json())
    yield DONE


def event(data: str) -> str:
    """One event with one line of data."""
    return f"data: {data.translate(_LINE_BREAKS)}\n\n"
