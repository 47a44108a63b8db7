"""How members go out of a running engine and come in: drained first, all or none, between two steps.

A member that is to leave takes no new requests, and those that use it end, councils that may still ask it included.
What has not ended when the time is over ends with an error that names the member. Knows the runtime by what is needed
of it (`Hold`); does not know why a member leaves, or how it was loaded.
"""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from torch import Tensor

from ensemble_core.assembly import Loaded, Part, Voice
from ensemble_core.engine import Engine, News
from ensemble_core.errors import ChangeConflictError
from ensemble_core.members.base import Member
from ensemble_core.members.loading.memory import give_back
from ensemble_core.members.parking import tensors_of
from ensemble_core.roster import MemberState, Roster

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


@dataclass(slots=True)
class Exit:
    """What the engine's thread has let go. Nothing else refers to it, so that its memory can be given back."""

    members: list[Member] = field(default_factory=list)

    def close(self, shared: Sequence[Tensor] = ()) -> None:
        """End them and give their memory back. shared: what is held elsewhere and stays."""
        stays = {id(tensor) for tensor in shared}
        held = [weakref.ref(tensor) for tensor in tensors_of(self.members) if id(tensor) not in stays]
        while self.members:
            self.members.pop().close()
        give_back(circles=any(tensor() is not None for tensor in held))


class Doorway:
    """Where members come into the engine and go out of it."""

    def __init__(self, hold: Hold) -> None:
        self._hold = hold

    def attach(self, engine: Engine, name: str, part: Part, voice: Voice) -> None:
        """In the engine's thread: a member serves from now on, whose requests are read with `voice`."""
        engine.attach(part.member, part.cost)
        self._hold.roster.put(name, "ready", voice=voice)

    async def let_go(
        self,
        names: Sequence[str],
        leave: Leave,
        state: MemberState,
        then: Callable[[Engine], None] = lambda _: None,
    ) -> Exit:
        """Drain members and take them out of the engine, all or none.

        then: done in the same moment. Raises ChangeConflictError where a call to one of them has not returned.
        """
        standings = {name: self._hold.roster.of(name) for name in names}
        for name, standing in standings.items():
            self._hold.roster.put(name, "draining", voice=standing.voice)
        gone = Exit()
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
        gone: Exit,
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
