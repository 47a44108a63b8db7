"""One step's forwards: members on different devices at the same time, members of one device in turn.

Invariant: one member's failure is that member's answer and stops no other. Knows feeds and members; does not know
sequences, fusion or schedules.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ensemble_core.errors import MemberError
from ensemble_core.members.base import Candidates, Feed, Member


@dataclass(frozen=True, slots=True)
class Answer:
    """What one member made of its feeds: candidates, or why there are none."""

    candidates: Candidates | None
    error: MemberError | None
    started: float  # time.perf_counter
    returned: float

    @property
    def ended(self) -> float:
        """When the forward was over, which may be after it returned; waits for it."""
        clock = None if self.candidates is None else self.candidates.clock
        return self.returned if clock is None else self.started + clock()


class MemberPool:
    """The resident members and a thread for each device but one."""

    def __init__(self, members: Mapping[str, Member]) -> None:
        self.members = dict(members)
        devices = {str(member.device) for member in members.values()}
        self._threads = ThreadPoolExecutor(len(devices), "forward") if len(devices) > 1 else None

    def forward(self, feeds: Mapping[str, Sequence[Feed]], top_k: Mapping[str, int]) -> dict[str, Answer]:
        """Run every member that has feeds; member -> answer."""
        queues: dict[str, list[str]] = {}
        for name in feeds:
            queues.setdefault(str(self.members[name].device), []).append(name)

        def run(names: list[str]) -> dict[str, Answer]:
            return {name: self._forward(name, feeds[name], top_k[name]) for name in names}

        if self._threads is None or len(queues) == 1:
            parts = [run(names) for names in queues.values()]
        else:
            parts = list(self._threads.map(run, queues.values()))
        return {name: answer for part in parts for name, answer in part.items()}

    def close(self) -> None:
        """End the threads."""
        if self._threads is not None:
            self._threads.shutdown()

    def _forward(self, name: str, feeds: Sequence[Feed], top_k: int) -> Answer:
        started = time.perf_counter()
        try:
            candidates, error = self.members[name].forward(feeds, top_k), None
        except MemberError as failure:
            candidates, error = None, failure
        return Answer(candidates, error, started, time.perf_counter())
