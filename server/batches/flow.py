"""From lines to results: as many requests in flight as keep the engine full, begun in the file's order.

Invariants: at most `places` requests are in flight and one line is held beside them, however long the file is; a
refusal for a full queue is never a result: that request waits until another has ended and goes before new ones; every
request ends as one result, or as none if it was dropped, and then the next run finds it unanswered. Does not know
files, endpoints or signals.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from server.batches.lines import BatchItem, LineFault
from server.batches.results import BatchReply, LineResult

_PATIENCE = 1.0  # seconds that a refused request waits for another one to end

Call = Callable[[BatchItem], Awaitable[BatchReply]]


class FlightWindow:
    """The places of the requests in flight."""

    def __init__(self, places: int, patience: float = _PATIENCE) -> None:
        self._places = places
        self._patience = patience
        self._inside = 0
        self._closed = False
        self._refused: list[tuple[int, asyncio.Future[None]]] = []  # a heap by line
        self._num_back = 0  # refused ones that are about to try again
        self._changed = asyncio.Event()

    async def enter(self) -> bool:
        """Take a place, once there is one and no refused request waits. False: the window is closed.

        One task at a time may wait here.
        """
        while not self._closed and (self._inside >= self._places or self._refused or self._num_back):
            self._changed.clear()
            await self._changed.wait()
        if not self._closed:
            self._inside += 1
        return not self._closed

    def leave(self) -> None:
        """Give a place back; the refused request of the first line may try again."""
        self._inside -= 1
        if self._refused:
            heappop(self._refused)[1].set_result(None)
            self._num_back += 1
        self._changed.set()

    async def again(self, line: int) -> None:
        """Wait, after a refusal, until another request has ended, or for `patience` seconds."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heappush(self._refused, (line, turn))
        try:
            await asyncio.wait([turn], timeout=self._patience)
        finally:
            if turn.done():
                self._num_back -= 1
            else:
                self._refused.remove((line, turn))
                heapify(self._refused)
            self._changed.set()

    @property
    def closed(self) -> bool:
        """Nobody gets in any more."""
        return self._closed

    def close(self) -> None:
        """Let nobody in any more."""
        self._closed = True
        self._changed.set()


@dataclass(slots=True)
class FlowCounts:
    """Results so far; tokens are those of answers."""

    completed: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, result: LineResult) -> None:
        """Count a result."""
        prompt, completion = result.tokens
        self.completed += result.is_answer
        self.failed += not result.is_answer
        self.prompt_tokens += prompt
        self.completion_tokens += completion


@dataclass(slots=True)
class Flow:
    """One run over the lines of a file.

    call: asks an endpoint. gone: why no endpoint can answer any more; None while they can. deliver: takes each
    result; an OSError ends the run. failure: what ended the run before the last line.
    """

    call: Call
    gone: Callable[[], str | None]
    deliver: Callable[[LineResult], None]
    window: FlightWindow
    counts: FlowCounts = field(default_factory=FlowCounts)
    failure: str | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self, lines: AsyncIterator[BatchItem | LineFault]) -> bool:
        """Answer all lines, or those that were begun before `stop`. True: the last line was reached."""
        try:
            async for line in lines:
                if isinstance(line, LineFault):
                    self._deliver(LineResult(line.custom_id, line))
                elif await self.window.enter():
                    self._begin(line)
                if self.window.closed:
                    break
            while self._tasks:
                await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            return not self.window.closed
        finally:
            self.drop()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def num_running(self) -> int:
        """Requests in flight."""
        return len(self._tasks)

    def stop(self) -> None:
        """Begin no more requests; those that run go on."""
        self.window.close()

    def drop(self) -> None:
        """Begin no more requests, and end those that run without a result."""
        self.stop()
        for task in self._tasks:
            task.cancel()

    def _begin(self, item: BatchItem) -> None:
        task = asyncio.create_task(self._answer(item))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self.window.leave()
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(f"{type(error).__name__}: {error}")

    async def _answer(self, item: BatchItem) -> None:
        while (reply := await self.call(item)).status == 429 or reply.status >= 500:
            if (reason := self.gone()) is not None:
                self._fail(reason)
                return
            if reply.status != 429:
                break
            await self.window.again(item.line)
        self._deliver(LineResult(item.custom_id, reply))

    def _deliver(self, result: LineResult) -> None:
        try:
            self.deliver(result)
        except OSError as error:
            self._fail(f"a result cannot be written ({error.strerror})")
            return
        self.counts.add(result)

    def _fail(self, reason: str) -> None:
        self.failure = self.failure or reason
        self.drop()
