"""How each declared member stands: ready, on its way out or in, asleep, or unloaded; and who may still use it.

The engine's thread takes members out of the engine and puts them back; it writes here in the same moment. Everybody
else reads, from any thread. Invariant: what this says is away has no place in the engine, unless it drains. Does not
know members, requests or recipes beyond their names.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ensemble_core.errors import MemberAwayError, ModelNotFoundError, quoted

MemberState = Literal["ready", "draining", "unloaded", "asleep", "loading", "waking"]


@dataclass(frozen=True, slots=True)
class Standing:
    """How a member stands, and since when, in Unix time.

    failure: why its last load or wake came to nothing. voice: what a request must have been read with to be served by
    it, compared by identity; None: anything.
    """

    state: MemberState
    failure: str | None = None
    voice: object = None
    since: float = field(default_factory=time.time)


class Roster:
    """The declared members by name. Each write replaces the whole, so that readers need no lock."""

    def __init__(self, names: Iterable[str]) -> None:
        self._standings: Mapping[str, Standing] = {name: Standing("ready") for name in names}

    def of(self, name: str) -> Standing:
        """Raises ModelNotFoundError for a member that is not declared."""
        standing = self._standings.get(name)
        if standing is None:
            raise ModelNotFoundError(f"member {quoted(name)} is not declared; there are {sorted(self._standings)}")
        return standing

    def put(self, name: str, state: MemberState, failure: str | None = None, voice: object = None) -> None:
        """A member stands otherwise from now on."""
        self._standings = {**self._standings, name: Standing(state, failure, voice)}

    def forget(self, name: str) -> None:
        """A member is not declared any more."""
        self._standings = {other: standing for other, standing in self._standings.items() if other != name}

    def away(self, members: Iterable[str]) -> dict[str, MemberState]:
        """Those of `members` that take no new requests, and how they stand."""
        standings = self._standings
        found = {name: standings[name].state if name in standings else "unloaded" for name in members}
        return {name: state for name, state in found.items() if state != "ready"}

    def require(self, model: str, members: Iterable[str], *, within: bool = False) -> None:
        """Raise MemberAwayError where a request to a model needs a member that is away.

        within: it belongs to what was admitted before; a member that drains still serves it.
        """
        away = self.away(members)
        if within:
            away = {name: state for name, state in away.items() if state != "draining"}
        if away:
            lacking = ", ".join(f"{name!r} ({state})" for name, state in away.items())
            raise MemberAwayError(
                f"model {quoted(model)} lacks the member {lacking}; try again later, or ask a model that "
                "/v1/models lists as ready"
            )

    def require_voices(self, model: str, voices: Mapping[str, object]) -> None:
        """Raise MemberAwayError where a member was replaced since a request was read. voices: member -> what by."""
        for name, voice in voices.items():
            if (now := self._standings[name].voice) is not None and now is not voice:
                raise MemberAwayError(
                    f"model {quoted(model)}: member {name!r} was replaced while the request was read; send it again"
                )
