"""The engine's thread: takes commands from a queue and sends outputs to asyncio.

One thread owns the engine, its members and its sequences; other threads send it commands. A second one watches it: an
engine that takes no step for `scheduler.stall_seconds` is declared dead. Invariant: a submitted request gets exactly
one last output, whatever happens to the request, the engine or the client. Does not know HTTP, Prometheus or models.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections import abc
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

from ensemble_core import factory
from ensemble_core.assembly import Loaded
from ensemble_core.changes import Changes
from ensemble_core.config import Config
from ensemble_core.councils.chamber import Chamber
from ensemble_core.councils.door import EngineDoor
from ensemble_core.crossing import call, fail, settle
from ensemble_core.decoding.requests import GenerationRequest, Output, Prompt, prioritised
from ensemble_core.decoding.sequence import Sequence
from ensemble_core.decoding.workshop import Workshop
from ensemble_core.engine import Engine, News
from ensemble_core.errors import NotReadyError, UnisonoError
from ensemble_core.member_reports import MemberReport
from ensemble_core.members.loading.standstill import DEFAULT_DTYPE
from ensemble_core.reading import read
from ensemble_core.recipes import ModelInfo, list_models
from ensemble_core.roster import Roster
from ensemble_core.stats import Record, discard
from ensemble_core.streaming import OutputStream
from ensemble_core.tokens import Tokenized, detokenized, tightest_of, tokenized, tokenizer_facts

__all__ = ["Changes", "MemberReport", "ModelInfo", "OutputStream", "Runtime", "State", "Status", "Tokenized"]

logger = logging.getLogger(__name__)

State = Literal["loading", "ready", "draining", "dead"]
Command = Callable[[Engine], list[News]]
Listener = Callable[[Output], None]
Found = TypeVar("Found")

_IDLE_SECONDS = 1.0  # between cache reports while nothing runs
_STOP_SECONDS = 10.0  # that `stop` waits for a step to end


@dataclass(frozen=True, slots=True)
class Status:
    """Whether requests are accepted, and if not, why."""

    state: State
    reason: str


@dataclass(slots=True)
class Reservation:
    """Places in the engine's queue."""

    _give_back: Callable[[], None]
    _held: bool = True

    def release(self) -> None:
        """Give them back; once is enough."""
        if self._held:
            self._held = False
            self._give_back()


class Runtime:
    """Loads a configuration and serves requests from one thread."""

    def __init__(self, config: Config, record: Record = discard) -> None:
        factory.check(config)
        self._config = config
        self._record = record
        self._status = Status("loading", "members and matrices are being loaded")
        self._loaded: Loaded | None = None
        self._failure: BaseException | None = None
        self._settled = threading.Event()  # set once loading has succeeded or failed
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._listeners: dict[int, Listener] = {}
        self._workshop = Workshop()  # where forms are compiled
        self._chamber: Chamber | None = None  # where councils are run
        self._num_reserved = 0  # places that councils hold
        self._over = False  # councils may make no more calls
        self.roster = Roster(config.members)
        self.meetings: dict[int, frozenset[str]] = {}  # councils at work -> the members that they may ask
        self._meeting_ids = itertools.count()
        self.changes = Changes(self)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._beat = time.monotonic()  # when the engine's loop last went round
        self._ended = threading.Event()

    def start(self) -> None:
        """Start the thread, which loads and then serves. Returns at once."""
        self._thread.start()

    def wait_ready(self) -> None:
        """Block until everything is loaded. Raises whatever loading raised."""
        self._settled.wait()
        if self._failure is not None:
            raise self._failure

    def status(self) -> Status:
        """Safe from any thread."""
        return self._status

    @property
    def num_places(self) -> int:
        """Sequences that run at the same time, at most."""
        return self._config.scheduler.max_running

    @property
    def num_open(self) -> int:
        """Sequences that run or wait. Safe from any thread."""
        return len(self._listeners)

    def models(self) -> list[ModelInfo]:
        """All ensembles and members. Until everything is loaded, lengths are the configured ones."""
        if self._loaded is not None:
            return [replace(model, lacks=self.roster.away(model.members)) for model in self._loaded.models]
        return list_models(self._config, {name: member.max_len for name, member in self._config.members.items()})

    def strategies(self) -> dict[str, dict[str, dict[str, Any]]]:
        """The fusions and modes that requests may choose, with schemas of their options. Raises NotReadyError."""
        return self._require_ready().permissions.offered()

    async def submit(self, requests: abc.Sequence[GenerationRequest]) -> OutputStream:
        """Queue requests, all or none; returns a stream of (position in `requests`, output) until all have ended.

        Raises NotReadyError, ModelNotFoundError, InvalidRequestError or QueueFullError before any output. Closing
        the stream aborts the unfinished requests.
        """
        loaded = self._require_ready()
        requests = prioritised(requests, allowed=self._config.scheduler.priority)
        if self._chamber is not None and requests and requests[0].model in self._chamber:
            loaded.admission.check_council(requests[0], sorted(loaded.councils.speakers(requests[0].model)))
            return await self._chamber.submit(requests)
        return await self._submit(loaded, requests)

    async def _submit(self, loaded: Loaded, requests: abc.Sequence[GenerationRequest]) -> OutputStream:
        """Requests to members and token-level ensembles."""
        self._require_ready(within=all(request.reserved for request in requests))
        sequences = await read(requests, loaded, self.roster, self._workshop)
        stream = self._stream(self._abort)
        await self._enqueue(loaded, sequences, stream)
        return stream

    def _stream(self, abort: Callable[[list[int]], None]) -> OutputStream:
        limits = self._config.server.limits
        return OutputStream(abort, limits.request_seconds, limits.stream_buffer)

    async def tightest(self, model: str, prompt: Prompt) -> Tokenized:
        """A prompt in the tokens of a model's main member; of a council's models, the one with least room for it.

        Raises as `submit`.
        """
        loaded = self._require_ready()
        return await tightest_of(loaded.admission, loaded.councils.speakers(model), prompt)

    async def _room(self, loaded: Loaded, model: str, prompt: Prompt) -> int:
        """Tokens that a context has left behind a prompt, for a call of a council to a member or an ensemble."""
        self._require_ready(within=True)
        return (await tokenized(loaded.admission, model, prompt)).room

    async def _reserve(self, loaded: Loaded, model: str, places: int) -> Reservation:
        """Places in the queue for a council. Raises QueueFullError, MemberAwayError."""
        members = loaded.members_of(model)
        self.roster.require(model, members)
        meeting = next(self._meeting_ids)
        self.meetings[meeting] = frozenset(members)
        try:
            await self.on_engine(lambda engine: engine.scheduler.reserve(places))
        except BaseException:
            del self.meetings[meeting]
            raise
        self._num_reserved += places
        return Reservation(partial(self._release, places, meeting))

    def _release(self, places: int, meeting: int) -> None:
        self._num_reserved -= places
        del self.meetings[meeting]

        def command(engine: Engine) -> list[News]:
            engine.scheduler.release(places)
            return []

        self._commands.put(command)

    async def tokenize(self, model: str, prompt: Prompt, add_special_tokens: bool = True) -> Tokenized:
        """A prompt in the tokens of a model's main member. Raises as `submit`."""
        return await tokenized(self._require_ready().admission, model, prompt, add_special_tokens)

    async def detokenize(self, model: str, token_ids: abc.Sequence[int]) -> str:
        """The text of the main member's ids, with control tokens by name. Raises as `submit`."""
        return await detokenized(self._require_ready().admission, model, token_ids)

    def tokenizer_info(self, model: str) -> dict[str, Any]:
        """Facts about the tokenizer of a model's main member. Raises NotReadyError, ModelNotFoundError."""
        return tokenizer_facts(self._require_ready().admission, model)

    async def drain(self, seconds: float) -> None:
        """Refuse new requests, give open ones up to `seconds` to end, then abort the rest."""
        if self._status.state != "ready":
            return
        self._status = Status("draining", "the server is shutting down")
        deadline = asyncio.get_running_loop().time() + seconds
        while (self._listeners or self._num_reserved) and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        self._over = True
        left = list(self._listeners)
        if left:
            logger.warning("draining took longer than %.0f s; aborting %d requests", seconds, len(left))
            self._abort(left)

    def abort_all(self) -> None:
        """Refuse new requests and end open ones now."""
        if self._status.state == "ready":
            self._status = Status("draining", "the server is shutting down")
        self._over = True
        self._abort(list(self._listeners))

    def stop(self, seconds: float = _STOP_SECONDS) -> bool:
        """Stop the thread after its current step and abort unfinished requests. False: it did not end in time."""
        self._commands.put(None)
        if self._thread.is_alive():
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def loaded(self) -> Loaded:
        """What serves now. Raises NotReadyError."""
        return self._require_ready()

    def _require_ready(self, within: bool = False) -> Loaded:
        """within: of a council that is at work; it may go on while the server drains."""
        goes_on = within and self._status.state == "draining" and not self._over
        if (self._status.state != "ready" and not goes_on) or self._loaded is None:
            raise NotReadyError(f"the server is {self._status.state}: {self._status.reason}; try again later")
        return self._loaded

    async def _enqueue(self, loaded: Loaded, sequences: list[Sequence], stream: OutputStream) -> None:
        """Hand sequences to the engine's thread and wait until it has queued or refused them."""
        loop = asyncio.get_running_loop()

        def listener(index: int) -> Listener:
            return lambda output: call(loop, stream.put, index, output)

        def add(engine: Engine) -> None:
            for each in sequences:
                self.roster.require(each.request.model, each.tracks, within=each.request.reserved)
                self.roster.require_voices(each.request.model, {name: loaded.voices[name] for name in each.tracks})
            engine.add(sequences)
            self._listeners.update((s.seq_id, listener(i)) for i, s in enumerate(sequences))

        stream.follow([sequence.seq_id for sequence in sequences])
        try:
            await self.on_engine(add)
        except asyncio.CancelledError:
            self._abort([s.seq_id for s in sequences])
            raise

    async def on_engine(self, work: Callable[[Engine], Found]) -> Found:
        """Do something in the engine's thread, between steps, and wait until it is done: what it returns.

        Raises what it raises, if that is a UnisonoError; anything else ends the engine.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Found] = loop.create_future()

        def command(engine: Engine) -> list[News]:
            try:
                found = work(engine)
            except UnisonoError as error:
                call(loop, fail, done, error)
                return []
            call(loop, settle, done, found)
            return []

        self._commands.put(command)
        while not done.done():
            await asyncio.wait([done], timeout=1.0)
            if self._status.state == "dead" and not done.done():  # died before it saw the command
                raise NotReadyError(self._status.reason)
        return done.result()

    def serve(self, loaded: Loaded) -> None:
        """Serve what comes from now on with these recipes. What is under way goes on with those before."""
        door = EngineDoor(
            partial(self._submit, loaded),
            partial(self._room, loaded),
            partial(self._reserve, loaded),
            self._stream,
        )
        self._loaded, self._config = loaded, loaded.config
        self._chamber = Chamber(loaded.councils, door, self._record) if loaded.councils else None
        self._workshop.keep(voice.speaker.grammars for voice in loaded.voices.values())

    def _abort(self, seq_ids: list[int]) -> None:
        self._commands.put(lambda engine: engine.abort(seq_ids))

    def _run(self) -> None:
        """The thread's function: load, then loop until stopped. An error ends the engine, not the process."""
        try:
            loaded = factory.load(self._config, self._record)
        except BaseException as error:
            self._die(error, "loading failed")
            return
        self._beat = time.monotonic()
        for name, voice in loaded.voices.items():
            self.roster.put(name, "ready", voice=voice)
        self.serve(loaded)
        self._status = Status("ready", "")
        self._settled.set()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        try:
            self._loop(loaded.engine)
            if self._status.state != "dead":
                self._status = Status("dead", "the server was stopped")
        except BaseException as error:
            logger.exception("the engine died")
            self._die(error, "the engine died")
        finally:
            self._ended.set()
            loaded.engine.close()
            self._workshop.close()
            self._end_all()

    def _watch(self) -> None:
        """The watchdog's function: declare the engine dead if its loop stands still."""
        while not self._ended.wait(min(self._config.scheduler.stall_seconds / 4, 1.0)):
            bound = self._config.scheduler.stall_seconds
            stalled = time.monotonic() - self._beat
            if stalled > bound:
                logger.error("the engine has taken no step for %.0f s and counts as dead", stalled)
                self._status = Status("dead", f"the engine has taken no step for {stalled:.0f} s")
                self._end_all()
                return

    def _loop(self, engine: Engine) -> None:
        engine.report_caches()
        while self._status.state != "dead":
            self._beat = time.monotonic()
            for command in self._pending(engine.has_work):
                if command is None:
                    self.publish(engine.abort(list(self._listeners)))
                    return
                with DEFAULT_DTYPE.computing():
                    self.publish(command(engine))
            if engine.has_work:
                with DEFAULT_DTYPE.computing():
                    self.publish(engine.step())
            engine.report_caches()

    def _pending(self, busy: bool) -> list[Command | None]:
        """Commands that have arrived. If the engine is idle, waits for one."""
        commands: list[Command | None] = []
        try:
            idle = min(_IDLE_SECONDS, self._config.scheduler.stall_seconds / 4)
            commands.append(self._commands.get(block=not busy, timeout=None if busy else idle))
            while True:
                commands.append(self._commands.get_nowait())
        except queue.Empty:
            return commands

    def publish(self, news: list[News]) -> None:
        """Hand outputs to whoever listens; in the engine's thread."""
        for seq_id, output in news:
            ended = output.finish_reason is not None
            listener = self._listeners.pop(seq_id, None) if ended else self._listeners.get(seq_id)
            if listener is not None:
                listener(output)

    def _die(self, error: BaseException, what: str) -> None:
        self._failure = error
        self._status = Status("dead", f"{what}: {error}")
        self._settled.set()

    def _end_all(self) -> None:
        """Send each open request its last output, since the engine is gone."""
        lost = Output("", (), 0, 0, "error", error=f"the engine is gone: {self._status.reason}")
        self.publish([(seq_id, lost) for seq_id in list(self._listeners)])
