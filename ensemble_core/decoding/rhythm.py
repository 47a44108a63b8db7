"""When a batch drafts on and when its drafts are read. Pure numbers: no torch, no clock.

A forward costs much for the first row and little for the next, so sequences that draft should share steps, and so
should those that are read. Each step therefore has one *beat* for all: main drafts one more token for everybody, or
the assistants read what everybody has drafted, or both. No sequence stands still: in a step that drafts, all draft.

Drafting on gains a token with the probability that the whole draft before it stays. It pays while that gain over its
cost is above the rate at which tokens have become final so far (Dinkelbach's method for the best ratio of gain and
cost). Costs and rates are learnt from finished steps.

Where wrong drafts cost more than forwards that are saved, as in large batches, all members step together, as in
lockstep: each of main's tokens is judged at once. The way that is faster is kept.

What a beat decides changes when a token is judged, never how. Does not know sequences, members or texts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from ensemble_core.decoding.pace import typical

LONGEST = 8  # tokens of a draft at most, if its request does not say more: clients get them all at once
FURTHEST = 64  # tokens that an assistant may lie behind, so that what it has to catch up with stalls nobody
_MEMORY = 8  # observations kept of each cost
_FADING = 0.98  # what a step weighs in a rate once another has followed
_TRIAL, _TERM = 24, 16  # steps before a rate is believed; steps until the next choice
_WEIGHT, _LONG_REST = 40, 64  # choices until the slower way is tried again: more, the slower and oftener it was
_NOTHING = 0.1  # of a draft's cost: less is nothing
_MARGIN = 0.9  # the share of the known rate that a way must promise to be tried for the first time


@dataclass(frozen=True, slots=True)
class Prospect:
    """What a sequence's draft promises.

    num_unread: tokens that assistants have not read. likely: probability that the draft stays. survival: of one more
    token. due: it must be read now. eager: it must not be read yet, unless others are. complete: nothing can follow.
    free: the length of its draft is not given.
    num_guessed: guesses behind it. guess: probability that main chooses one of them, if it has chosen those before.
    """

    num_unread: int
    likely: float = 1.0
    survival: float = 1.0
    due: bool = False
    eager: bool = False
    complete: bool = False
    free: bool = True
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

    def drafts(self, prospect: Prospect) -> bool:
        """Whether the drafter should be fed a sequence's next token."""
        pays = prospect.eager or prospect.likely >= min(self.price, 1.0)
        return self.draft and not prospect.complete and pays

    def guesses(self, prospect: Prospect) -> int:
        """How many of a sequence's guesses main should be fed."""
        likely, count = prospect.likely * prospect.guess, 0
        while count < prospect.num_guessed and likely > self.price:
            likely *= prospect.guess
            count += 1
        return count

    def gain(self, prospect: Prospect) -> float:
        """Tokens that main's next step is expected to add to what becomes final, those of right guesses included."""
        return prospect.likely * sum(prospect.guess**k for k in range(1 + self.guesses(prospect)))


class Rhythm:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._drafting, self._reading = _Cost(), _Cost()
        self._beside = _Cost()  # of reading in a step in which main drafts as well
        self._ways: dict[tuple[int, int], _Ways] = {}
        self._present: _Ways | None = None  # of the step in progress

    def beat(self, prospects: Collection[Prospect]) -> Beat:
        """The next step of these sequences."""
        self._present = None
        if not prospects:
            return Beat()
        ways = self._present = self._ways_of(prospects)
        drafting, together = self._best_rate(prospects), self._rate_together(prospects)
        ways.choose(drafting, together if all(p.free for p in prospects) else 0.0)
        if ways.together:
            return Beat()
        rate, unread = ways.rate(drafting), sum(p.num_unread for p in prospects)
        price = rate * self._drafting.slope(len(prospects))
        if not unread:
            return Beat(draft=True, read=False, price=price)
        on = Beat(draft=True, read=False, price=price + rate * self._reading.slope(unread))
        worth = self._is_worth(on, [p for p in prospects if on.drafts(p)], unread, rate)
        if any(p.due for p in prospects):
            return replace(on, draft=worth, read=True)
        draft = worth or any(p.eager for p in prospects)
        return replace(on, draft=draft, read=not draft or self._costs_nothing(unread, len(prospects)))

    def record(self, num_fed: int, num_read: int, seconds: float, num_final: int) -> None:
        """Learn from the step of the last beat: main was fed and assistants have read so many tokens.

        num_final: tokens that became final.
        """
        if self._present is not None:
            self._present.add(num_final, seconds, num_read > 0)
        if not (num_fed or num_read):
            return  # all that were asked are busy
        if not num_read:
            self._drafting.add(num_fed, seconds)
        elif not num_fed:
            self._reading.add(num_read, seconds)
        elif self._drafting.known:
            more = max(seconds - self._drafting(num_fed), 0.0)
            self._reading.add(num_read, more)
            self._beside.add(num_read, more)

    def _costs_nothing(self, unread: int, batch: int) -> bool:
        """Whether assistants read beside main at hardly any cost, as on a device of their own."""
        return self._beside.known and self._beside(unread) < _NOTHING * self._drafting(batch)

    def _is_worth(self, on: Beat, prospects: Sequence[Prospect], unread: int, rate: float) -> bool:
        """Whether main's next step for these sequences gains more than it costs."""
        count = sum(1 + on.guesses(p) for p in prospects)
        cost = self._drafting(count) + self._read(unread + count) - self._read(unread)
        return bool(prospects) and sum(map(on.gain, prospects)) >= cost * rate

    def _ways_of(self, prospects: Collection[Prospect]) -> _Ways:
        """Batches of about the same size whose drafts stay about as often have the same rates."""
        size = len(prospects)
        survival = sum(p.survival for p in prospects) / size
        return self._ways.setdefault((size.bit_length(), int(10 * survival)), _Ways())

    def _rate_together(self, prospects: Collection[Prospect]) -> float:
        """Tokens per second if all members step together."""
        batch = len(prospects)
        return batch / (self._drafting(batch) + self._read(batch))

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
        """Mean count, and what such a step typically takes."""
        return sum(self.counts) / len(self.counts), typical(self.seconds)


class _Ways:
    """The rates of two ways to step a batch, and which of them is taken.

    A way's steps count from its first reading to its last, so that no draft is half paid.
    """

    def __init__(self) -> None:
        self.together = False
        self._rates: dict[bool, _Rate] = {False: _Rate(), True: _Rate()}
        self._left, self._rest, self._patience = _TRIAL, 0, 1
        self._on_trial, self._begins, self._was_read = False, False, False

    def rate(self, guess: float) -> float:
        """Tokens per second of the present way, or the guess where it is not known."""
        rate = self._rates[self.together]
        return rate.value if rate.is_settled else guess

    def choose(self, drafting: float, together: float) -> None:
        """Choose the way of the next step, seldom another than before. Given are guesses at both rates; 0: never."""
        self._left -= 1
        if not together:
            self._take(False)
        elif self._left <= 0 and self._was_read and self._rates[self.together].is_settled:
            self._left = _TERM
            self._reconsider(drafting if self.together else together)

    def _reconsider(self, promised: float) -> None:
        """Compare what both ways reached; try the other one where it is not known, or not lately. promised: by it."""
        own, other = self._rates[self.together].value, self._rates[not self.together]
        if not other.is_settled:
            if promised > _MARGIN * own:
                self._take(not self.together)
        elif self._on_trial:
            self._on_trial = False
            better = own > other.value
            gap = 1 - min(own, other.value) / max(own, other.value)
            self._patience = 1 if better else 2 * self._patience
            self._rest = min(self._patience * (1 + int(_WEIGHT * gap)), _LONG_REST)
            self._take(self.together is better)
        elif other.value > own:
            self._take(not self.together)
        else:
            self._rest -= 1
            if self._rest <= 0:
                self._on_trial = True
                self._take(not self.together)

    def _take(self, together: bool) -> None:
        if together is not self.together:
            self.together, self._begins = together, True

    def add(self, tokens: int, seconds: float, read: bool) -> None:
        """Take in a step. read: assistants have read in it."""
        self._was_read = read
        if not self._begins:
            self._rates[self.together].add(tokens, seconds)
        elif read:
            self._begins = False


class _Rate:
    """Tokens per second, the last steps weighing most."""

    def __init__(self) -> None:
        self._tokens = self._seconds = self._steps = 0.0

    @property
    def value(self) -> float:
        """Tokens per second."""
        return self._tokens / self._seconds

    @property
    def is_settled(self) -> bool:
        """Whether enough steps were seen."""
        return self._steps >= _TRIAL and self._tokens > 0

    def add(self, tokens: int, seconds: float) -> None:
        """Take in a step."""
        self._tokens = _FADING * self._tokens + tokens
        self._seconds = _FADING * self._seconds + seconds
        self._steps += 1


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
        octave = max(count.bit_length() - 3, 0)
        one = self._classes.setdefault(count >> octave << octave, _Class())
        one.counts.append(count)
        one.seconds.append(seconds)
        self._points, highest = [], 0.0
        for _, each in sorted(self._classes.items()):
            at, cost = each.point
            highest = max(highest, cost)
            self._points.append((at, highest))

    def slope(self, count: int) -> float:
        """Seconds for one more token, from `count` to twice as many."""
        return (self(2 * count) - self(count)) / count

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
