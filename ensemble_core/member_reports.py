"""What is told of the declared members: how they stand, their memory, who uses and who needs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ensemble_core.assembly import Loaded
from ensemble_core.engine import Engine
from ensemble_core.members.base import Member
from ensemble_core.roster import Roster, Standing


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


def member_reports(
    loaded: Loaded, roster: Roster, asleep: Mapping[str, Member], engine: Engine
) -> list[MemberReport]:
    """All declared members, in their order; in the engine's thread. asleep: those that the engine does not hold."""
    found = []
    for name, section in loaded.config.members.items():
        member = engine.members.get(name) or asleep.get(name)
        found.append(
            MemberReport(
                name,
                section.model,
                roster.of(name),
                None if member is None else str(member.device),
                {} if member is None else member.memory_bytes(),
                len(engine.scheduler.using(name)),
                tuple(info.name for info in loaded.models if name in info.members),
            )
        )
    return found
