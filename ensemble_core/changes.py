"""Members and recipes that come and go while others serve: one change at a time, each whole or not at all.

What takes long (loading, checking, giving memory back) happens in a thread of its own, on one core; the engine's
thread only takes members out and puts them in, between two steps (`doorway`). Invariants: no change leaves a recipe
without what it was checked with; a change that fails leaves everything as it was. Does not know HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from ensemble_core.assembly import Loaded, Part, Voice, assembled, check
from ensemble_core.config import Config
from ensemble_core.crossing import aside
from ensemble_core.doorway import Doorway, Exit, Hold, Leave
from ensemble_core.engine import Engine
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
from ensemble_core.member_reports import MemberReport, ProcessReport, member_reports
from ensemble_core.members.base import Member, Sleeper
from ensemble_core.members.loading.memory import give_back, resident_bytes
from ensemble_core.members.parking import tensors_of
from ensemble_core.reloading import Difference, engine_limits, require_no_restart

logger = logging.getLogger(__name__)

_SWITCH_SECONDS = 0.0005  # that the engine's thread waits for its turn beside a change; 0.005 otherwise
Found = TypeVar("Found")


class Changes:
    """See the module. All methods belong to the event loop's thread."""

    def __init__(self, hold: Hold) -> None:
        self._hold, self._doorway = hold, Doorway(hold)
        self._change: str | None = None  # under way
        self._asleep: dict[str, Member] = {}

    async def report(self) -> ProcessReport:
        """How all members stand."""
        loaded = self._hold.loaded()
        found = await self._hold.on_engine(partial(member_reports, loaded, self._hold.roster, self._asleep))
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

    async def reload(self, read: Callable[[], Config]) -> Difference:
        """Serve what a file says from now on: members, recipes and limits that changed, all or nothing.

        read: the file's configuration. What only the admin's routes have declared is gone afterwards. Raises what
        reading and loading raise, and ConfigError for what cannot be changed without a restart.
        """
        return await self._alone("reload of the configuration", lambda: self._reload(read))

    async def put_recipe(self, name: str, section: Mapping[str, Any]) -> bool:
        """Add a recipe or replace it, checked as the YAML is. False: there was none. Raises as `load`."""
        return await self._alone(f"recipe {name}", lambda: self._put_recipe(name, section))

    async def delete_recipe(self, name: str) -> None:
        """Take a recipe away; its requests go on to their ends. Raises as `load`."""
        await self._alone(f"deletion of recipe {name}", lambda: self._delete_recipe(name))

    async def _alone(self, what: str, work: Callable[[], Awaitable[Found]]) -> Found:
        """Make a change, to its end even where the caller goes away. Raises ChangeConflictError beside another."""
        if self._change is not None:
            raise ChangeConflictError(
                f"the {self._change} is under way, and changes are made one at a time; try again when it is over"
            )
        self._hold.loaded()
        self._change = what

        async def made() -> Found:
            begun, interval = time.perf_counter(), sys.getswitchinterval()
            sys.setswitchinterval(_SWITCH_SECONDS)
            try:
                found = await work()
            except UnisonoError as error:
                logger.error("change: %s: nothing is changed: %s", what, error)
                raise
            finally:
                self._change = None
                sys.setswitchinterval(interval)
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
        part = await self._loading(loaded, config, name, await self._base_of(loaded, config, name))
        voice = loaded.voices.get(name)
        if voice is None or not _same(voice, part.voice):
            try:
                loaded = await self._assembled(config, loaded, {name: part.voice})
            except UnisonoError as error:
                part.member.close()
                self._note_failure(name, is_new, error)
                raise _as_request(error, "member") from error
            voice = part.voice
        await self._hold.on_engine(lambda engine: self._doorway.attach(engine, name, part, voice))
        self._hold.serve(loaded)
        return await self.report_of(name)

    async def _base_of(self, loaded: Loaded, config: Config, name: str) -> Part | None:
        """The member whose weights an adapter shares. Raises ChangeConflictError where it does not serve."""
        if (base := config.owner(name)) == name:
            return None
        if (state := self._hold.roster.of(base).state) != "ready":
            raise ChangeConflictError(
                f"member {name!r} shares the weights of {base!r}, which is {state}; "
                f"{'wake' if state == 'asleep' else 'load'} {base!r} first"
            )
        return Part(await self._hold.on_engine(lambda engine: engine.members[base]), loaded.voices[base])

    def _require_alone(self, name: str) -> None:
        """Raise ChangeConflictError where adapters are there that share a member's weights."""
        config, roster = self._hold.loaded().config, self._hold.roster
        others = [other for other in config.members if other != name and config.owner(other) == name]
        if there := [other for other in others if roster.of(other).state != "unloaded"]:
            raise ChangeConflictError(
                f"member {name!r} shares its weights with the adapters {', '.join(there)}; unload those first"
            )

    async def _loading(self, loaded: Loaded, config: Config, name: str, base: Part | None) -> Part:
        """A member, loaded beside the engine. Raises what loading raises."""
        is_new = name not in loaded.config.members
        if not is_new:
            self._hold.roster.put(name, "loading")
        try:
            known = loaded.voices.get(name)
            part = partial(loaded.maker.part, config, name, known, base, measured=not is_new)
            return await aside(part)
        except UnisonoError as error:
            await aside(give_back)
            self._note_failure(name, is_new, error)
            raise _as_request(error, f"members.{name}") from error

    def _note_failure(self, name: str, is_new: bool, error: UnisonoError) -> None:
        if not is_new:
            self._hold.roster.put(name, "unloaded", str(error))

    async def _unload(self, name: str, leave: Leave) -> MemberReport:
        state, gone = self._hold.roster.of(name).state, Exit()
        if state == "asleep":
            gone.members.append(self._asleep.pop(name))
            self._hold.roster.put(name, "unloaded")
        elif state != "unloaded":
            self._require_alone(name)
            gone = await self._doorway.let_go([name], leave, "unloaded")
        await self._closed(gone)
        return await self.report_of(name)

    async def _sleep(self, name: str, leave: Leave) -> MemberReport:
        standing = self._hold.roster.of(name)
        if standing.state == "unloaded":
            raise ChangeConflictError(f"member {name!r} is unloaded, and has nothing to give back; load it first")
        if standing.state == "ready":
            self._require_alone(name)
            await self._hold.on_engine(lambda engine: _require_sleeper(engine.members[name]))
            gone = await self._doorway.let_go([name], leave, "asleep")
            member = gone.members.pop()
            assert isinstance(member, Sleeper)
            self._asleep[name] = member
            await aside(member.sleep)
            await aside(partial(give_back, circles=False))
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
            await aside(member.wake)
        except Exception as error:  # whatever a device raises where it has no room
            self._hold.roster.put(name, "asleep", f"{type(error).__name__}: {error}")
            raise MemberError(name, f"it cannot wake: {type(error).__name__}: {error}") from error
        part = Part(member, self._hold.loaded().voices[name])
        del self._asleep[name]
        await self._hold.on_engine(lambda engine: self._doorway.attach(engine, name, part, part.voice))
        return await self.report_of(name)

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

    async def _reload(self, read: Callable[[], Config]) -> Difference:
        before, after = self._hold.loaded(), await aside(read)
        require_no_restart(before.config, after)
        check(after)  # before anything is loaded
        found = Difference.of(before.config, after)
        parts: dict[str, Part] = {}
        try:
            for name in sorted((*found.new, *found.changed), key=lambda name: after.owner(name) != name):
                parts[name] = await self._reloaded(before, after, name, parts)
            voices = {name: part.voice for name, part in parts.items()}
            loaded = await self._assembled(after, before, voices)
            gone = await self._exchange(found, parts, loaded)
        except BaseException:
            for part in parts.values():
                part.member.close()
            parts.clear()
            await aside(give_back)
            raise
        self._hold.serve(loaded)
        await self._closed(gone)
        logger.info("change: the configuration is what the file says; changed: %s", found)
        return found

    async def _reloaded(self, before: Loaded, after: Config, name: str, parts: Mapping[str, Part]) -> Part:
        """A member of a file that is read again. parts: those before it. Raises ConfigError that names it."""
        try:
            known = before.voices.get(name)
            base = parts.get(after.owner(name)) or await self._base_of(before, after, name)
            return await aside(partial(before.maker.part, after, name, known, base, measured=False))
        except UnisonoError as error:
            raise ConfigError(f"members.{name}: {error}") from error

    async def _exchange(self, found: Difference, parts: Mapping[str, Part], loaded: Loaded) -> Exit:
        """Take members that are gone or declared anew out of the engine, and put those of `parts` in, in one go."""

        def put_in(engine: Engine) -> None:
            for name, part in parts.items():
                self._doorway.attach(engine, name, part, part.voice)
            for name in found.gone:
                self._hold.roster.forget(name)
            engine.limit(engine_limits(loaded.config), prefix_reuse=loaded.config.scheduler.prefix_reuse)
            engine.forget(found.recipes)

        leaving = [*found.gone, *found.changed]
        there = [name for name in leaving if self._hold.roster.of(name).state == "ready"]
        leave = Leave(loaded.config.server.drain_seconds)
        gone = await self._doorway.let_go(there, leave, "unloaded", put_in)
        gone.members += [self._asleep.pop(name) for name in leaving if name in self._asleep]
        return gone

    async def _closed(self, gone: Exit) -> None:
        """End what has left. What it shares with members that are there is not looked at."""
        there = await self._hold.on_engine(lambda engine: list(engine.members.values()))
        await aside(partial(gone.close, tensors_of(there)))

    async def _assembled(self, config: Config, loaded: Loaded, voices: Mapping[str, Voice]) -> Loaded:
        made = partial(assembled, config, loaded.engine, {**loaded.voices, **voices}, loaded.maker, loaded)
        return await aside(made)


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
    return alike and mine.prompts.template == theirs.prompts.template and one.spoken == other.spoken


def _heard(task: asyncio.Future[Any]) -> None:
    """What a change raised is in the log, also where its caller has gone."""
    if not task.cancelled():
        task.exception()
