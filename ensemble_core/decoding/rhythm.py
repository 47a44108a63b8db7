"""When a batch drafts on and when its drafts are read. Pure numbers: no torch, no clock.

A forward costs much for the first row and little for the next, so sequences that draft should share steps, and so
should those that are read. Each step therefore has one *beat* for all: main drafts one more token for everybody, or
the assistants read what everybody has drafted, or both. No sequence stands still: in a step that drafts, all draft.

Drafting on gains a token with the probability that the whole draft before it stays. It pays while that gain over its
cost is above the best rate that a whole cycle of n drafts and one reading can reach. Costs are learnt from finished
steps, by the number of tokens.

What a beat decides changes when a token is judged, never how. Does not know sequences, members or texts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

LONGEST = 8  # tokens of a draft at most, if its request does not say more: clients get them all at once
_MEMORY = 8  # observations kept of each cost


@dataclass(frozen=True, slots=True)
class Prospect:
    """What a sequence's draft promises.

    num_drafted: tokens that can be read. likely: probability that all of them stay. survival: of one more token. due:
    it must be read now. eager: it must not be read yet, unless others are. complete: nothing can follow it.
    num_guessed: guesses behind it. guess: probability that main chooses one of them, if it has chosen those before.
    """

    num_drafted: int
    likely: float = 1.0
    survival: float = 1.0
    due: bool = False
    eager: bool = False
    complete: bool = False
    num_guessed: int = 0
    guess: float = 0.0


@dataclass(frozen=True, slots=True)
class Beat:
    """What a step does: main drafts, assistants read, or both.

    price: how likely one more of main's positions must be of use to be worth its cost.
    """

    draft: bool = True
    read: bool = True
    price: float = 1.0

    def guesses(self, prospect: Prospect) -> int:
        """How many of a sequence's guesses main should be fed."""
        likely, count = prospect.likely * prospect.guess, 0
        while count < prospect.num_guessed and likely > self.price:
            likely *= prospect.guess
            count += 1
        return count


class Rhythm:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._drafting, self._reading = _Cost(), _Cost()

    def beat(self, prospects: Collection[Prospect]) -> Beat:
        """The next step of these sequences."""
        if not prospects:
            return Beat()
        unread = sum(p.num_drafted for p in prospects)
        open_ones = [p for p in prospects if not p.complete]
        price = self._price(prospects)
        if not unread:
            return Beat(draft=True, read=False, price=price)
        worth = bool(open_ones) and self._is_worth(prospects, open_ones, unread)
        if any(p.due for p in prospects):
            return Beat(worth, True, price)
        draft = worth or any(p.eager for p in prospects)
        return Beat(draft, not draft, price)

    def record(self, num_fed: int, num_read: int, seconds: float) -> None:
        """Learn from a step in which main was fed so many tokens and assistants read so many."""
        if not num_read:
            self._drafting.add(num_fed, seconds)
        elif not num_fed:
            self._reading.add(num_read, seconds)
        elif self._drafting.known:
            self._reading.add(num_read, max(seconds - self._drafting(num_fed), 0.0))

    def _is_worth(self, prospects: Collection[Prospect], open_ones: Sequence[Prospect], unread: int) -> bool:
        """Whether main's next step for `open_ones` gains more than it costs."""
        count = len(open_ones)
        cost = self._drafting(count) + self._read(unread + count) - self._read(unread)
        return sum(p.likely for p in open_ones) >= cost * self._best_rate(prospects)

    def _price(self, prospects: Collection[Prospect]) -> float:
        """What one more of main's positions costs, in tokens that the time is worth."""
        count = len(prospects)
        return (self._drafting(count + 1) - self._drafting(count)) * self._best_rate(prospects)

    def _best_rate(self, prospects: Collection[Prospect]) -> float:
        """Tokens per second of the best cycle: n times main drafts for each sequence, then all is read."""
        batch = len(prospects)
        survival = sum(p.survival for p in prospects) / batch
        best, gain, seconds, likely = 0.0, 0.0, 0.0, 1.0
        for length in range(1, LONGEST + 1):
            gain += batch * likely
            likely *= survival
            seconds += self._drafting(batch)
            best = max(best, gain / (seconds + self._read(batch * length)))
        return best

    def _read(self, count: int) -> float:
        """Seconds to read so many tokens; before any were read, as long as it takes to draft them."""
        return self._reading(count) if self._reading.known else self._drafting(count)


@dataclass(slots=True)
class _Class:
    """Observations with about as many tokens."""

    counts: deque[int] = field(default_factory=lambda: deque(maxlen=_MEMORY))
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_MEMORY))

    @property
    def point(self) -> tuple[float, float]:
        """Mean count, and the lower third of the seconds: rare events make a step slower, never faster."""
        return sum(self.counts) / len(self.counts), sorted(self.seconds)[(len(self.seconds) - 1) // 3]


class _Cost:
    """Seconds by number of tokens: a line between what was observed, never falling."""

    def __init__(self) -> None:
        self._classes: dict[int, _Class] = {}
        self._points: list[tuple[float, float]] = []

    @property
    def known(self) -> bool:
        """Whether anything was observed."""
        return bool(self._points)

    def add(self, count: int, seconds: float) -> None:
        """Take in an observation."""
        one = self._classes.setdefault(count.bit_length(), _Class())
        one.counts.append(count)
        one.seconds.append(seconds)
        self._points, highest = [], 0.0
        for _, each in sorted(self._classes.items()):
            at, cost = each.point
            highest = max(highest, cost)
            self._points.append((at, highest))

    def __call__(self, count: float) -> float:
        """Seconds for `count` tokens; 1 if nothing was observed.

        Outside of what was observed half of the nearest cost counts as fixed: a guess, until it is tried.
        """
        if not self._points:
            return 1.0
        for (left, low), (right, high) in pairwise(self._points):
            if left <= count <= right:
                return low + (high - low) * (count - left) / (right - left)
        at, cost = self._points[0] if count < self._points[0][0] else self._points[-1]
        return cost * (0.5 + 0.5 * count / at)
