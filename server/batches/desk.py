"""Batches of a running server: taken in, worked on beside the requests of people who wait, kept over a restart.

Invariants: a batch is written down before its client hears of it, and ends in a state that says how; a server that
starts again goes on with every batch that has not ended, and asks nothing twice that is answered; a batch's request
begins only while less than `limits.batch_share` of the engine's places are taken. Does not know HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import aclosing, asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble_core.errors import InvalidRequestError, UnisonoError
from server.batches.flow import Call, FlightWindow, Flow
from server.batches.lines import BatchItem, CustomIds, Intake, LineFault, raw_lines, taken_lines
from server.batches.records import BatchBook, BatchFault, BatchRecord
from server.batches.results import BatchReply, LineResult, ResultFile, kept_answers, result_ids
from server.batches.store import FileStore
from server.edge.live import LiveConfig

if TYPE_CHECKING:
    from ensemble_core.runtime import Runtime

logger = logging.getLogger(__name__)

_AT_ONCE = 4  # batches of several clients; one client's go one after the other
_MOST_FAULTS = 100  # lines that a failed batch names
_LOOK_SECONDS = 0.02  # between two looks at the engine's places

Caller = Callable[[str], Call]  # owner -> how to ask the endpoints as this client


@dataclass(slots=True)
class Precedence:
    """Lets requests of batches begin one by one, while enough of the engine's places are free.

    Own requests are counted here as well, since the engine counts a request only between two steps.
    """

    runtime: Runtime
    most: Callable[[], int]
    _num_asked: int = 0
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def ask(self, call: Call, item: BatchItem) -> BatchReply:
        """The endpoint's answer. Cancelling ends the request."""
        async with self._turn:
            while max(self.runtime.num_open, self._num_asked) >= self.most():
                await asyncio.sleep(_LOOK_SECONDS)
            self._num_asked += 1
        try:
            return await call(item)
        finally:
            self._num_asked -= 1


class BatchDesk:
    """Takes batches, and works on them while it is open."""

    def __init__(self, folder: Path, live: LiveConfig, runtime: Runtime, caller: Caller) -> None:
        """Raises ConfigError for the folder."""
        limits = live.config.limits
        self.files = FileStore(folder, limits.files, limits.file_bytes)
        self.book = BatchBook(folder, limits.files)
        self._folder, self._live, self._runtime, self._caller = folder, live, runtime, caller
        self._precedence = Precedence(runtime, self._most)
        self._at_work: set[str] = set()
        self._flows: dict[str, Flow] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._turns: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[None]:
        """Work on batches, those of an earlier process first. At the end their requests are dropped."""
        for record in self.book.open():
            logger.info("batch %s goes on: status=%s", record.id, record.status)
            self._begin(self._work(record))
        try:
            yield
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def create(
        self, owner: str, endpoint: str, input_file_id: str, metadata: dict[str, str] | None
    ) -> BatchRecord:
        """Take a batch. Raises NotStoredError, InvalidRequestError."""
        purpose = self.files.get(owner, input_file_id).purpose
        if purpose != "batch":
            message = f"input_file_id: the file's purpose is {purpose}; upload it with purpose batch"
            raise InvalidRequestError(message, "input_file_id")
        record = self.book.add(owner, endpoint, input_file_id, metadata)
        self._begin(self._work(record))
        return record

    def cancel(self, owner: str, batch_id: str) -> BatchRecord:
        """Begin no more of its requests; those that run end. Raises NotStoredError, InvalidRequestError."""
        record = self.book.get(owner, batch_id)
        if record.has_ended or record.status == "finalizing":
            raise InvalidRequestError(f"the batch is {record.status} and cannot be cancelled", "batch_id")
        record.stopped_by = "cancelled"
        self.book.change(record, "cancelling")
        self._stop(record)
        if record.id not in self._at_work:
            self._begin(self._through(record))
        return record

    def delete_file(self, owner: str, file_id: str) -> None:
        """Forget a file. Raises NotStoredError, and InvalidRequestError where a batch still reads it."""
        if self.files.get(owner, file_id) and self.book.needs(file_id):
            raise InvalidRequestError("file_id: a batch reads this file; wait for its end or cancel it", "file_id")
        self.files.delete(owner, file_id)

    def _most(self) -> int:
        """Requests that batches may have in the engine."""
        return max(int(self._runtime.num_places * self._live.config.limits.batch_share), 1)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _stop(self, record: BatchRecord) -> None:
        if (flow := self._flows.get(record.id)) is not None:
            flow.stop()

    async def _work(self, record: BatchRecord) -> None:
        """A batch from any state to its end, in its turn. Whatever goes wrong is its end, with its name."""
        async with self._turns[record.owner], self._slots:
            self._at_work.add(record.id)
            clock = asyncio.get_running_loop().call_later(record.expires_at - time.time(), self._expire, record)
            try:
                await self._through(record)
            finally:
                clock.cancel()
                self._at_work.discard(record.id)

    async def _through(self, record: BatchRecord) -> None:
        try:
            if record.status == "validating":
                await self._validate(record)
            if record.status == "in_progress":
                await self._answer(record)
            if record.status in ("finalizing", "cancelling"):
                await self._finish(record)
        except (OSError, UnisonoError) as error:
            logger.error("batch %s failed: %s", record.id, error)
            self._fail(record, [BatchFault("server_error", f"the server failed at this batch: {error}")])
        except Exception:
            logger.exception("batch %s failed", record.id)
            self._fail(record, [BatchFault("server_error", "the server failed at this batch; see its log")])

    def _expire(self, record: BatchRecord) -> None:
        record.stopped_by = record.stopped_by or "expired"
        self._stop(record)

    async def _validate(self, record: BatchRecord) -> None:
        total, faults = await asyncio.to_thread(self._checked, record)
        record.total = total
        if faults:
            self._fail(record, faults)
        elif not record.has_ended and record.status != "cancelling":
            self.book.change(record, "in_progress")

    def _checked(self, record: BatchRecord) -> tuple[int, list[BatchFault]]:
        """The number of requests, and what keeps the batch from its begin."""
        intake, total, faults = self._intake(record, CustomIds()), 0, list[BatchFault]()
        most = self._live.config.limits.batch_lines
        for number, raw in self._raw(record):
            total += 1
            found = intake.take(number, raw)
            if isinstance(found, LineFault):
                faults.append(BatchFault(found.code, found.message, found.line, found.param))
            if total > most:
                message = f"the file has more than {most} requests (server.limits.batch_lines); split it"
                return total, [BatchFault("too_many_requests", message)]
            if len(faults) == _MOST_FAULTS:
                break
        if total == 0:
            faults.append(BatchFault("empty_file", "the file has no requests"))
        return total, faults

    def _intake(self, record: BatchRecord, answered: CustomIds) -> Intake:
        values = self._live.config.limits.body_values
        return Intake({record.endpoint}, self._live.config.max_body_bytes, values, answered)

    def _raw(self, record: BatchRecord) -> Iterator[tuple[int, bytes | None]]:
        path = self.files.path(record.owner, record.input_file_id)
        return raw_lines(path, self._live.config.max_body_bytes)

    async def _answer(self, record: BatchRecord) -> None:
        """All requests that are not answered yet; then the state is `finalizing`, or `in_progress` still if the
        server stops.
        """
        while self._runtime.status().state == "loading":
            await asyncio.sleep(_LOOK_SECONDS)
        output, errors = self._paths(record)
        answered = await asyncio.to_thread(_answers_kept, output, errors)
        record.completed, record.failed = len(answered), 0
        call = self._caller(record.owner)
        window = FlightWindow(self._most())
        with closing(ResultFile(output, errors)) as file:

            def deliver(result: LineResult) -> None:
                file.write(result)
                record.completed += result.is_answer
                record.failed += not result.is_answer

            flow = Flow(lambda item: self._precedence.ask(call, item), self._gone, deliver, window)
            if record.stopped_by is not None:
                flow.stop()
            self._flows[record.id] = flow
            path = self.files.path(record.owner, record.input_file_id)
            lines = taken_lines(path, self._live.config.max_body_bytes, self._intake(record, answered))
            try:
                async with aclosing(lines):
                    await flow.run(lines)
            finally:
                del self._flows[record.id]
        if flow.failure is not None and self._gone() is None:
            raise OSError(flow.failure)
        if flow.failure is None and record.status == "in_progress":
            self.book.change(record, "finalizing")

    def _gone(self) -> str | None:
        status = self._runtime.status()
        return None if status.state == "ready" else f"the engine is {status.state}: {status.reason}"

    async def _finish(self, record: BatchRecord) -> None:
        """Name what was not answered in time, and give the client its files."""
        output, errors = self._paths(record)
        if record.stopped_by == "expired":
            record.failed += await asyncio.to_thread(self._name_expired, record, output, errors)
        owner = record.owner
        record.has_output = self.files.adopt(record.output_file_id, owner, f"{record.id}_output.jsonl", output)
        record.has_errors = self.files.adopt(record.error_file_id, owner, f"{record.id}_error.jsonl", errors)
        self.book.change(record, record.stopped_by or "completed")
        counts = record.completed, record.failed
        logger.info("batch %s is %s: completed=%d failed=%d", record.id, record.status, *counts)

    def _name_expired(self, record: BatchRecord, output: Path, errors: Path) -> int:
        """A line of the error file for each request without a result. Returns how many."""
        if not output.exists():
            return 0
        done, message = result_ids(output, errors), "the batch's completion window ended before this request began"
        intake = self._intake(record, done)
        num = 0
        with closing(ResultFile(output, errors)) as file:
            for number, raw in self._raw(record):
                if isinstance(item := intake.take(number, raw), BatchItem):
                    fault = LineFault(item.line, "batch_expired", message, item.custom_id)
                    file.write(LineResult(item.custom_id, fault))
                    num += 1
        return num

    def _fail(self, record: BatchRecord, faults: list[BatchFault]) -> None:
        record.errors = faults
        try:
            self.book.change(record, "failed")
        except OSError as error:
            logger.error("batch %s: its state cannot be written: %s", record.id, error)

    def _paths(self, record: BatchRecord) -> tuple[Path, Path]:
        return self._folder / f"{record.id}.output", self._folder / f"{record.id}.errors"


def _answers_kept(output: Path, errors: Path) -> CustomIds:
    """What an earlier process has answered; whatever failed there is done again."""
    if errors.exists():
        kept_answers(errors)
    return kept_answers(output) if output.exists() else CustomIds()
