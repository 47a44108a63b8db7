"""Whose waiting sequence is admitted next, and who makes way: places are shared among clients and their requests.

The sequence that goes next is of the client with the fewest running sequences, then of the request with the fewest,
then the one that has waited longest. A request that has nothing running takes the place of the youngest sequence of
the request with the most, if that has at least two; so every request has at least one place, as far as places reach.
With one owner this is first come, first served. Does not know pages or members.
"""

from __future__ import annotations

from collections import Counter, abc, deque
from collections.abc import Iterable

from ensemble_core.decoding.sequence import Sequence

Owner = tuple[str, str]  # a client, and one of its requests


class FairQueue:
    """The waiting sequences by owner, during one round of admission."""

    def __init__(self, waiting: Iterable[Sequence], running: Iterable[Sequence]) -> None:
        """Linear in both. Neither is changed."""
        self.taken: set[Sequence] = set()
        self._queues: dict[Owner, deque[tuple[int, Sequence]]] = {}
        for place, sequence in enumerate(waiting):
            self._queues.setdefault(sequence.request.owner, deque()).append((place, sequence))
        self._by_owner = Counter(s.request.owner for s in running)
        self._by_client = Counter(s.request.owner[0] for s in running)
        self._next: Owner | None = None

    def first(self, without_place: bool = False) -> Sequence | None:
        """The sequence to admit next; None if none waits. Linear in the owners that wait.

        without_place: only of requests that have nothing running.
        """
        owners = [each for each in self._queues if not (without_place and self._by_owner[each])]
        self._next = min(owners, key=self._rank, default=None)
        return None if self._next is None else self._queues[self._next][0][1]

    def take(self) -> None:
        """Count the first one as running."""
        assert self._next is not None, "ask for the first one before"
        sequence = self._queues[self._next].popleft()[1]
        if not self._queues[self._next]:
            del self._queues[self._next]
        self._count(sequence, 1)
        self.taken.add(sequence)

    def displaced(self, running: abc.Sequence[Sequence], already: abc.Sequence[Sequence]) -> Sequence | None:
        """The next running sequence to make way, not counted any more; None if no request has two or more."""
        rich = [each for each, count in self._by_owner.items() if count > 1]
        owner = max(rich, key=lambda each: (self._by_client[each[0]], self._by_owner[each]), default=None)
        if owner is None:
            return None
        victim = next(s for s in reversed(running) if s.request.owner == owner and s not in already)
        self._count(victim, -1)
        return victim

    def restore(self, victims: abc.Sequence[Sequence]) -> list[Sequence]:
        """Count these as running again; returns none."""
        for victim in victims:
            self._count(victim, 1)
        return []

    def _rank(self, owner: Owner) -> tuple[int, int, int]:
        return self._by_client[owner[0]], self._by_owner[owner], self._queues[owner][0][0]

    def _count(self, sequence: Sequence, by: int) -> None:
        self._by_owner[sequence.request.owner] += by
        self._by_client[sequence.request.owner[0]] += by
