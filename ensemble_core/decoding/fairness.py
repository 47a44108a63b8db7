"""Whose waiting sequence is admitted next, and who makes way: places are shared among clients and their requests.

Among the waiting of one priority, the sequence that goes next is of the client with the fewest running sequences,
then of the request with the fewest, then the one that has waited longest. A request that has nothing running takes
the place of the youngest sequence of the request with the most, if that has at least two and is not of a more urgent
priority; so every request has at least one place, as far as places reach. With one owner and one priority this is
first come, first served.

Of two priorities the lower number goes first, but waiting counts: a step of priority makes up for `PATIENCE` seconds.
So a priority goes before one that is n steps more urgent once its oldest has waited n `PATIENCE` seconds longer;
nobody waits for ever. Prompts of admitted sequences are read by the same rule, one priority at a time. Does not know
pages or members.
"""

from __future__ import annotations

from collections import Counter, abc, deque
from collections.abc import Iterable
from typing import NamedTuple

from ensemble_core.decoding.sequence import Sequence

Owner = tuple[str, str]  # a client, and one of its requests

PATIENCE = 0.5  # seconds of waiting that make up for one step of priority


def most_urgent(sequences: abc.Sequence[Sequence]) -> abc.Sequence[Sequence]:
    """Those of the priority whose turn it is: as if each step of it had come `PATIENCE` later. Linear."""
    if len({sequence.request.priority for sequence in sequences}) < 2:
        return sequences
    first = min(sequences, key=_due).request.priority
    return [sequence for sequence in sequences if sequence.request.priority == first]


def _due(sequence: Sequence) -> tuple[float, int]:
    return sequence.arrived + sequence.request.priority * PATIENCE, sequence.request.priority


class _WaitingLine(NamedTuple):
    """Whose sequences wait behind each other."""

    priority: int
    owner: Owner


class FairQueue:
    """The waiting sequences by priority and owner, during one round of admission."""

    def __init__(self, waiting: Iterable[Sequence], running: Iterable[Sequence]) -> None:
        """Linear in both. Neither is changed."""
        self.taken: set[Sequence] = set()
        self._queues: dict[_WaitingLine, deque[tuple[int, Sequence]]] = {}
        for place, sequence in enumerate(waiting):
            line = _WaitingLine(sequence.request.priority, sequence.request.owner)
            self._queues.setdefault(line, deque()).append((place, sequence))
        self._by_owner = Counter(s.request.owner for s in running)
        self._by_client = Counter(s.request.owner[0] for s in running)
        self._next: _WaitingLine | None = None

    def first(self, without_place: bool = False) -> Sequence | None:
        """The sequence to admit next; None if none waits.

        without_place: only of requests that have nothing running. Linear in the owners that wait, and where several
        priorities wait in their sequences.
        """
        lines = [each for each in self._queues if not (without_place and self._by_owner[each.owner])]
        if len({line.priority for line in lines}) > 1:
            urgent = min((_due(s) for line in lines for _, s in self._queues[line]))[1]
            lines = [line for line in lines if line.priority == urgent]
        self._next = min(lines, key=self._rank, default=None)
        return None if self._next is None else self._queues[self._next][0][1]

    def take(self) -> None:
        """Count the first one as running."""
        assert self._next is not None, "ask for the first one before"
        sequence = self._queues[self._next].popleft()[1]
        if not self._queues[self._next]:
            del self._queues[self._next]
        self._count(sequence, 1)
        self.taken.add(sequence)

    def displaced(
        self, running: abc.Sequence[Sequence], already: abc.Sequence[Sequence], priority: int = 0
    ) -> Sequence | None:
        """The next running sequence to make way, not counted any more; None if no request has two or more.

        priority: of the one that it makes way for; those of a lower number stay.
        """
        left = [s for s in reversed(running) if s.request.priority >= priority and s not in already]
        rich = [each for each in dict.fromkeys(s.request.owner for s in left) if self._by_owner[each] > 1]
        owner = max(rich, key=lambda each: (self._by_client[each[0]], self._by_owner[each]), default=None)
        if owner is None:
            return None
        victim = next(s for s in left if s.request.owner == owner)
        self._count(victim, -1)
        return victim

    def restore(self, victims: abc.Sequence[Sequence]) -> list[Sequence]:
        """Count these as running again; returns none."""
        for victim in victims:
            self._count(victim, 1)
        return []

    def _rank(self, line: _WaitingLine) -> tuple[int, int, int]:
        owner = line.owner
        return self._by_client[owner[0]], self._by_owner[owner], self._queues[line][0][0]

    def _count(self, sequence: Sequence, by: int) -> None:
        self._by_owner[sequence.request.owner] += by
        self._by_client[sequence.request.owner[0]] += by
