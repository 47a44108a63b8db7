"""Outputs on their way from the engine to one reader in asyncio, with bounds on time and memory.

Invariants: closing a stream always aborts its unfinished requests; a reader that has stopped reading does not fill
the memory. Everything here runs in one event loop. Does not know engines, threads or HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable

from ensemble_core.decoding.requests import Output
from ensemble_core.errors import RequestTimeoutError, SlowReaderError

_STALLED_SECONDS = 1.0  # a reader that took nothing for so long, while much waits, is slow


class OutputStream(AsyncIterator[tuple[int, Output]]):
    """Outputs of one submission: (position in the requests, output), until every request has ended.

    Not a generator, since one that was never started would not run its `finally`.
    """

    def __init__(
        self, abort: Callable[[list[int]], None], seconds: float = float("inf"), max_bytes: float = float("inf")
    ) -> None:
        """abort: ends requests by their seq_id. seconds: until the last output. max_bytes: that may wait, roughly."""
        self._abort = abort
        self._seconds, self._max_bytes = seconds, max_bytes
        self._deadline = time.perf_counter() + seconds
        self._left: dict[int, int] = {}  # position -> seq_id
        self._waiting: deque[tuple[int, Output, int]] = deque()  # position, output, bytes
        self._num_bytes = 0
        self._taken = 0.0  # when the reader last took an output, or found none
        self._overflown = False
        self._error: Exception | None = None
        self._news = asyncio.Event()

    def follow(self, seq_ids: list[int]) -> None:
        """The requests whose outputs will come, by position."""
        self._left = dict(enumerate(seq_ids))

    def put(self, index: int, output: Output) -> None:
        """Add an output of request `index`."""
        if self._overflown:
            return
        if not self._waiting:
            self._taken = time.perf_counter()
        elif self._num_bytes > self._max_bytes and time.perf_counter() - self._taken > _STALLED_SECONDS:
            self._overflow()
            return
        size = rough_size(output)
        self._num_bytes += size
        self._waiting.append((index, output, size))
        self._news.set()

    def fail(self, error: Exception) -> None:
        """End the stream: what waits is still read, then the reader gets `error`."""
        if self._error is None:
            self._error = error
            self._end()
            self._news.set()

    async def __anext__(self) -> tuple[int, Output]:
        """The next output. Raises RequestTimeoutError, SlowReaderError or what `fail` was told; the stream is closed
        then.
        """
        if not self._left and not self._overflown and self._error is None:
            raise StopAsyncIteration
        if not self._waiting and not self._overflown and self._error is None:
            await self._wait()
        if self._overflown:
            raise SlowReaderError(
                f"the client left more than {self._max_bytes:.0f} bytes of this answer unread (server.limits."
                "stream_buffer), so it was ended"
            )
        if self._error is not None and not self._waiting:
            raise self._error
        index, output, size = self._waiting.popleft()
        self._num_bytes -= size
        self._taken = time.perf_counter()
        if output.finish_reason is not None:
            self._left.pop(index, None)
        return index, output

    async def aclose(self) -> None:
        """Abort the unfinished requests. Calling it again does nothing."""
        self._end()

    def _end(self) -> None:
        if self._left:
            self._abort(list(self._left.values()))
            self._left.clear()

    async def _wait(self) -> None:
        self._news.clear()
        left = self._deadline - time.perf_counter()
        try:
            async with asyncio.timeout(max(left, 0.0) if self._seconds != float("inf") else None):
                await self._news.wait()
        except TimeoutError:
            self._end()
            raise RequestTimeoutError(
                f"this request took longer than {self._seconds:g} s (server.limits.request_seconds); ask for fewer "
                "tokens or choices, or try again later"
            ) from None

    def _overflow(self) -> None:
        self._overflown = True
        self._waiting.clear()
        self._end()
        self._news.set()


def rough_size(output: Output) -> int:
    """About how many bytes an output takes in memory."""
    entries = sum(1 + len(entry.top) for entry in (*output.logprobs, *output.prompt_logprobs) if entry is not None)
    return 500 + len(output.text) + len(output.reasoning) + 200 * entries + 4000 * len(output.traces)
