"""Members and recipes that come and go while others serve: one change at a time, each whole or not at all.

What takes long (loading, checking, giving memory back) happens in a thread of its own, on one core; the engine's
thread only takes members out and puts them in, between two steps. A member that is to leave drains first: it takes no
new requests, and those that use it end, councils that may still ask it included. What has not ended when the time is
over ends with an error that names the member.

Invariants: no change leaves a recipe without what it was checked with; a change that fails leaves everything as it
was. Knows the runtime by what a change needs of it (`Hold`); does not know HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

from ensemble_core.assembly import Loaded, Part, Voice, assembled
from ensemble_core.config import Config
from ensemble_core.engine import Engine, News
from ensemble_core.errors import (
    ArtefactError,
    ChangeConflictError,
    ConfigError,
    InvalidRequestError,
    MemberError,
    ModelNotFoundError,
    TransferMatrixError,
    UnisonoError,
    quoted,
)
from ensemble_core.members.base import Member, Sleeper
from ensemble_core.members.loading.memory import give_back, resident_bytes
from ensemble_core.members.threads import Allotment, threads
from ensemble_core.roster import MemberState, Roster, Standing

logger = logging.getLogger(__name__)

Found = TypeVar("Found")
_POLL_SECONDS = 0.05  # between looks at a member that drains


class Hold(Protocol):
    """What a change needs of the runtime. meetings: councils at work -> the members that they may ask."""

    roster: Roster
    meetings: dict[int, frozenset[str]]

    def loaded(self) -> Loaded:
        """What serves now. Raises NotReadyError."""

    async def on_engine(self, work: Callable[[Engine], Found]) -> Found:
        """Do something in the engine's thread, between two steps."""

    def publish(self, news: list[News]) -> None:
        """Hand outputs on; in the engine's thread."""

    def serve(self, loaded: Loaded) -> None:
        """Serve with these recipes from now on; in the event loop's thread."""


@dataclass(frozen=True, slots=True)
class Leave:
    """How a member leaves. seconds: that its requests have to end; None: as at shutdown. force: those that are left
    are treated as where the member fails: recipes with `on_member_failure: drop` go on without it.
    """

    seconds: float | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class MemberReport:
    """One declared member. memory: device -> bytes; num_requests: that use it now; models: that need it."""

    name: str
    model: str
    standing: Standing
    device: str | None
    memory: Mapping[str, int]
    num_requests: int
    models: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ProcessReport:
    """All members; the process' resident memory in bytes; the change that is under way."""

    members: list[MemberReport]
    resident: int
    change: str | None


@dataclass(slots=True)
class _Exit:
    """What the engine's thread has let go. Nothing else refers to it, so that its memory can be given back."""

    members: list[Member] = field(default_factory=list)

    def close(self) -> None:
        """End them and give their memory back."""
        while self.members:
            self.members.pop().close()
        give_back()


class Changes:
    """See the module. All methods belong to the event loop's thread."""

    def __init__(self, hold: Hold) -> None:
        self._hold = hold
        self._change: str | None = None  # under way
        self._asleep: dict[str, Member] = {}

    async def report(self) -> ProcessReport:
        """How all members stand."""
        loaded = self._hold.loaded()
        found = await self._hold.on_engine(partial(self._report, loaded))
        return ProcessReport(found, resident_bytes(), self._change)

    async def report_of(self, name: str) -> MemberReport:
        """How one member stands. Raises ModelNotFoundError."""
        self._hold.roster.of(name)
        return next(member for member in (await self.report()).members if member.name == name)

    async def load(self, name: str, section: Mapping[str, Any] | None = None) -> MemberReport:
        """Load a declared member again, or declare one; a member that is there stays as it is.

        section: as in the YAML. Raises InvalidRequestError, ModelNotFoundError, ChangeConflictError, and what loading
        raises.
        """
        return await self._alone(f"load of {name}", lambda: self._load(name, section))

    async def unload(self, name: str, seconds: float | None = None, *, force: bool = False) -> MemberReport:
        """Give back a member's weights and cache, once its requests have ended; arguments as of `Leave`.

        Raises as `load`.
        """
        return await self._alone(f"unload of {name}", lambda: self._unload(name, Leave(seconds, force)))

    async def sleep(self, name: str, seconds: float | None = None, *, force: bool = False) -> MemberReport:
        """Give back a member's cache, and its memory on a GPU; arguments as of `Leave`. Raises as `load`."""
        return await self._alone(f"sleep of {name}", lambda: self._sleep(name, Leave(seconds, force)))

    async def wake(self, name: str) -> MemberReport:
        """Bring back a member that sleeps, sooner than a load. Raises as `load`."""
        return await self._alone(f"wake of {name}", lambda: self._wake(name))

    async def put_recipe(self, name: str, section: Mapping[str, Any]) -> bool:
        """Add a recipe or replace it, checked as the YAML is. False: there was none. Raises as `load`."""
        return await self._alone(f"recipe {name}", lambda: self._put_recipe(name, section))

    async def delete_recipe(self, name: str) -> None:
        """Take a recipe away; its requests go on to their ends. Raises as `load`."""
        await self._alone(f"deletion of recipe {name}", lambda: self._delete_recipe(name))

    def _report(self, loaded: Loaded, engine: Engine) -> list[MemberReport]:
        return [
            MemberReport(
                name,
                section.model,
                self._hold.roster.of(name),
                _device(engine.members.get(name)),
                self._memory(name, engine),
                len(engine.scheduler.using(name)),
                tuple(info.name for info in loaded.models if name in info.members),
            )
            for name, section in loaded.config.members.items()
        ]

    def _memory(self, name: str, engine: Engine) -> Mapping[str, int]:
        member = engine.members.get(name) or self._asleep.get(name)
        return {} if member is None else member.memory_bytes()

    async def _alone(self, what: str, work: Callable[[], Awaitable[Found]]) -> Found:
        """Make a change, to its end even where the caller goes away. Raises ChangeConflictError beside another."""
        if self._change is not None:
            raise ChangeConflictError(
                f"the {self._change} is under way, and changes are made one at a time; try again when it is over"
            )
        self._hold.loaded()
        self._change = what

        async def made() -> Found:
            begun = time.perf_counter()
            try:
                found = await work()
            except UnisonoError as error:
                logger.error("change: %s: nothing is changed: %s", what, error)
                raise
            finally:
                self._change = None
            logger.info("change: %s: done in %.2f s", what, time.perf_counter() - begun)
            return found

        task = asyncio.ensure_future(made())
        task.add_done_callback(_heard)
        return await asyncio.shield(task)

    async def _load(self, name: str, section: Mapping[str, Any] | None) -> MemberReport:
        loaded = self._hold.loaded()
        config = loaded.config if section is None else _with_member(loaded.config, name, section)
        is_new = name not in loaded.config.members
        if is_new and section is None:
            self._hold.roster.of(name)
        elif not is_new and self._hold.roster.of(name).state != "unloaded":
            return await self._wake(name)
        part = await self._loading(loaded, config, name)
        voice = loaded.voices.get(name)
        if voice is None or not _same(voice, part.voice):
            try:
                loaded = await self._assembled(config, loaded, {name: part.voice})
            except UnisonoError as error:
                part.member.close()
                self._note_failure(name, is_new, error)
                raise _as_request(error, "member") from error
            voice = part.voice
        await self._hold.on_engine(lambda engine: self._attach(engine, name, part, voice))
        self._hold.serve(loaded)
        return await self.report_of(name)

    async def _loading(self, loaded: Loaded, config: Config, name: str) -> Part:
        """A member, loaded beside the engine. Raises what loading raises."""
        is_new = name not in loaded.config.members
        if not is_new:
            self._hold.roster.put(name, "loading")
        try:
            part = partial(loaded.maker.part, config, name, loaded.voices.get(name), measured=not is_new)
            return await _aside(part)
        except UnisonoError as error:
            await _aside(give_back)
            self._note_failure(name, is_new, error)
            raise _as_request(error, f"members.{name}") from error

    def _note_failure(self, name: str, is_new: bool, error: UnisonoError) -> None:
        if not is_new:
            self._hold.roster.put(name, "unloaded", str(error))

    def _attach(self, engine: Engine, name: str, part: Part, voice: Voice) -> None:
        engine.attach(part.member, part.cost)
        self._hold.roster.put(name, "ready", voice=voice)

    async def _unload(self, name: str, leave: Leave) -> MemberReport:
        state, gone = self._hold.roster.of(name).state, _Exit()
        if state == "asleep":
            gone.members.append(self._asleep.pop(name))
            self._hold.roster.put(name, "unloaded")
        elif state != "unloaded":
            gone = await self._let_go([name], leave, "unloaded")
        await _aside(gone.close)
        return await self.report_of(name)

    async def _sleep(self, name: str, leave: Leave) -> MemberReport:
        standing = self._hold.roster.of(name)
        if standing.state == "unloaded":
            raise ChangeConflictError(f"member {name!r} is unloaded, and has nothing to give back; load it first")
        if standing.state == "ready":
            await self._hold.on_engine(lambda engine: _require_sleeper(engine.members[name]))
            gone = await self._let_go([name], leave, "asleep")
            member = gone.members.pop()
            assert isinstance(member, Sleeper)
            self._asleep[name] = member
            await _aside(member.sleep)
            await _aside(give_back)
        return await self.report_of(name)

    async def _wake(self, name: str) -> MemberReport:
        standing = self._hold.roster.of(name)
        if standing.state == "unloaded":
            raise ChangeConflictError(f"member {name!r} does not sleep, it is unloaded; load it")
        if (member := self._asleep.get(name)) is None:
            return await self.report_of(name)
        assert isinstance(member, Sleeper)
        self._hold.roster.put(name, "waking")
        try:
            await _aside(member.wake)
        except Exception as error:  # whatever a device raises where it has no room
            self._hold.roster.put(name, "asleep", f"{type(error).__name__}: {error}")
            raise MemberError(name, f"it cannot wake: {type(error).__name__}: {error}") from error
        part = Part(member, self._hold.loaded().voices[name])
        del self._asleep[name]
        await self._hold.on_engine(lambda engine: self._attach(engine, name, part, part.voice))
        return await self.report_of(name)

    async def _let_go(
        self,
        names: Sequence[str],
        leave: Leave,
        state: MemberState,
        then: Callable[[Engine], None] = lambda _: None,
    ) -> _Exit:
        """Drain members and take them out of the engine, all or none.

        then: done in the same moment. Raises ChangeConflictError where a call to one of them has not returned.
        """
        standings = {name: self._hold.roster.of(name) for name in names}
        for name, standing in standings.items():
            self._hold.roster.put(name, "draining", voice=standing.voice)
        gone = _Exit()
        try:
            seconds = self._hold.loaded().config.server.drain_seconds if leave.seconds is None else leave.seconds
            await self._drained(names, seconds)
            await self._hold.on_engine(lambda engine: self._take_out(engine, names, leave, state, then, gone))
        except BaseException:
            for name, standing in standings.items():
                self._hold.roster.put(name, standing.state, standing.failure, standing.voice)
            raise
        return gone

    async def _drained(self, names: Sequence[str], seconds: float) -> None:
        """Until nobody uses the members any more, or the time is over."""
        deadline = time.monotonic() + seconds
        while True:
            meeting = any(members.intersection(names) for members in self._hold.meetings.values())
            if not meeting and await self._hold.on_engine(lambda engine: all(map(engine.can_detach, names))):
                return
            if time.monotonic() > deadline:
                logger.warning(
                    "draining %s took longer than %.0f s; ending what is left", ", ".join(names), seconds
                )
                return
            await asyncio.sleep(_POLL_SECONDS)

    def _take_out(
        self,
        engine: Engine,
        names: Iterable[str],
        leave: Leave,
        state: MemberState,
        then: Callable[[Engine], None],
        gone: _Exit,
    ) -> None:
        """In the engine's thread: end what is left, and let the members go."""
        for name in names:
            reason = f"member {name!r} is taken out of service, and the time for its requests is over"
            self._hold.publish(engine.end_users(name, reason, go_on=leave.force))
        if stuck := [name for name in names if not engine.can_detach(name)]:
            raise ChangeConflictError(f"a call to {', '.join(stuck)} has not returned; try again later")
        for name in names:
            gone.members.append(engine.detach(name))
            self._hold.roster.put(name, state)
        then(engine)

    async def _put_recipe(self, name: str, section: Mapping[str, Any]) -> bool:
        loaded = self._hold.loaded()
        recipes = {**loaded.config.ensembles, **loaded.config.councils}
        await self._change_recipes(loaded, recipes | {name: section}, name)
        return name in recipes

    async def _delete_recipe(self, name: str) -> None:
        loaded = self._hold.loaded()
        recipes: dict[str, object] = {**loaded.config.ensembles, **loaded.config.councils}
        if name not in recipes:
            raise ModelNotFoundError(f"recipe {quoted(name)} does not exist; there are {sorted(recipes)}")
        del recipes[name]
        await self._change_recipes(loaded, recipes, name)

    async def _change_recipes(self, loaded: Loaded, recipes: Mapping[str, object], name: str) -> None:
        """Raises InvalidRequestError for what cannot be served."""
        try:
            config = loaded.config.replaced(ensembles=recipes)
            changed = await self._assembled(config, loaded, {})
        except UnisonoError as error:
            raise _as_request(error, f"ensembles.{name}") from error
        await self._hold.on_engine(lambda engine: engine.forget([name]))
        self._hold.serve(changed)

    async def _assembled(self, config: Config, loaded: Loaded, voices: Mapping[str, Voice]) -> Loaded:
        made = partial(assembled, config, loaded.engine, {**loaded.voices, **voices}, loaded.maker, loaded)
        return await _aside(made)


def _with_member(config: Config, name: str, section: Mapping[str, Any]) -> Config:
    """The configuration with one more member. Raises InvalidRequestError."""
    try:
        found = config.replaced(members={**config.members, name: section})
    except ConfigError as error:
        raise InvalidRequestError(str(error), "member") from error
    if name in config.members and found.members[name] != config.members[name]:
        raise InvalidRequestError(
            f"member: {name!r} is declared otherwise already; give another name, or change the file and reload it",
            "member",
        )
    if found.member_timeout != config.member_timeout:
        raise InvalidRequestError(
            "member.host: calls to members elsewhere need a time-out, which this server has not had from its start; "
            "set scheduler.member_timeout and restart",
            "member",
        )
    return found


def _require_sleeper(member: Member) -> None:
    if not isinstance(member, Sleeper):
        raise InvalidRequestError(
            f"member {member.name!r} lives elsewhere and cannot sleep; unload it, or let its own server sleep",
            "name",
        )


def _as_request(error: UnisonoError, param: str) -> UnisonoError:
    """An error of a configuration that came with a request is the request's."""
    if isinstance(error, ConfigError | TransferMatrixError | ArtefactError):
        return InvalidRequestError(str(error), param)
    return error


def _same(one: Voice, other: Voice) -> bool:
    """Whether requests that were read for one can be served by the other."""
    mine, theirs = one.speaker, other.speaker
    alike = (mine.max_len, mine.abilities) == (theirs.max_len, theirs.abilities)
    return alike and one.spoken == other.spoken


def _device(member: Member | None) -> str | None:
    return None if member is None else str(member.device)


def _heard(task: asyncio.Future[Any]) -> None:
    """What a change raised is in the log, also where its caller has gone."""
    if not task.cancelled():
        task.exception()


async def _aside(work: Callable[[], Found]) -> Found:
    """In a thread of its own, whose operations take one core."""

    def on_one_core() -> Found:
        with threads(Allotment(1)):
            return work()

    pool = ThreadPoolExecutor(1, "change")
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, on_one_core)
    finally:
        pool.shutdown(wait=False)
