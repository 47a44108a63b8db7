"""Failures of members: what happens to the requests in the failed call, and what is reported.

| cause | what is lost | for how long |
|---|---|---|
| exception | the member, for every request in the call | the rest of the request |
| timeout | the same | the same; the member is busy until the call returns |
| non_finite | the member, for requests whose rows are not finite | the rest of the request |
| lost | the member, for requests that need it meanwhile, or that it had cached | the rest of the request |
| busy | the member, for other requests that decode | the steps until it is back |
| busy | the member, for requests in prefill, or more than `max_behind` tokens behind | the rest of the request |
| full | the member, for a request whose text it cannot hold, if the recipe says so | the rest of the request |

After a failure it is unknown what the member's cache holds of the request, so the member is not asked again. A
request that cannot lose the member, because it is main or the recipe says so, fails instead. Such a request waits for
a busy member, and fails once that member is stuck. Every loss is logged once and listed in the request's outputs.

Knows sequences, shares and the pool; does not know fusion or the engine's loop.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from ensemble_core.decoding.requests import Output
from ensemble_core.decoding.sequence import Sequence
from ensemble_core.decoding.shares import Share
from ensemble_core.errors import MemberError, MemberLostError, UnisonoError
from ensemble_core.members.parallel import MemberPool, cause_of
from ensemble_core.stats import Cause, DropStats, HealthStats, Reason, Record

logger = logging.getLogger(__name__)


class Failures:
    """See the module's docstring. max_behind: most tokens that a member may have to catch up after it was busy."""

    def __init__(self, pool: MemberPool, record: Record, max_behind: int) -> None:
        self._pool, self._record, self.max_behind = pool, record, max_behind
        self._failed: dict[str, Cause] = {}  # in this step
        self._down: set[str] = set()
        self._away: set[str] = set()  # of these, those that are lost
        self._incarnations = {name: member.incarnation for name, member in pool.members.items()}

    def lose(self, sequence: Sequence, member: str, cause: Cause, detail: str) -> None:
        """Take in that a member failed for a sequence: drop the member, or fail the sequence if it cannot lose it."""
        self._failed[member] = cause
        if sequence.recipe.can_lose(member):
            self._drop(sequence, member, cause, detail)
        else:
            fail(sequence, detail)

    def lose_unsound(self, sequence: Sequence, member: str) -> None:
        """Like `lose`, for numbers that are not finite."""
        self.lose(sequence, member, "non_finite", f"member {member!r}: its numbers are not finite")

    def lose_to(self, sequence: Sequence, member: str, error: MemberError) -> None:
        """Like `lose`, for an error that a member raised."""
        self.lose(sequence, member, cause_of(error), str(error))

    def attach(self, member: str) -> None:
        """One more member, which works as far as is known."""
        self._incarnations[member] = self._pool.members[member].incarnation
        if member in self._down:
            self._record(HealthStats(member, None))
        self._down.discard(member)
        self._away.discard(member)

    def take_away(self, sequence: Sequence, member: str, detail: str) -> None:
        """A member that is unloaded by force: as `lose`, but it has not failed."""
        if sequence.recipe.can_lose(member):
            self._drop(sequence, member, "unloaded", detail)
        else:
            fail(sequence, detail)

    def lose_full(self, sequence: Sequence, member: str) -> None:
        """Go on without a member whose context is full, which is no failure of it."""
        self._drop(sequence, member, "full", "its context is full")

    def note(self, sequence: Sequence) -> None:
        """Report what a sequence has lost before it came."""
        for member, reason in sequence.dropped.items():
            self._report(sequence, member, reason, "its context cannot hold the prompt")

    def see(self, sequences: Iterable[Sequence]) -> None:
        """Take in which members have lost their caches: no sequence goes on with what is gone."""
        for name, member in self._pool.members.items():
            if member.incarnation != self._incarnations[name]:
                self._incarnations[name] = member.incarnation
                for sequence in sequences:
                    track = sequence.tracks.get(name)
                    if track is not None and track.num_cached:
                        self.lose_to(sequence, name, MemberLostError(name, "it has lost what it had cached"))

    def watch(self) -> None:
        """Record which members cannot be reached, and which can again, while no step would tell."""
        for name, member in self._pool.members.items():
            if member.lost is not None:
                if name not in self._down:
                    self._record(HealthStats(name, "lost"))
                self._down.add(name)
                self._away.add(name)
            elif name in self._away:
                self._record(HealthStats(name, None))
                self._down.discard(name)
                self._away.discard(name)

    def feasible(self, shares: Iterable[Share]) -> list[Share]:
        """The part of a schedule that can run while some members are busy."""
        busy = self._pool.busy
        if not busy:
            return list(shares)
        return [left for share in shares if (left := self._without(share, busy)) is not None]

    def report(self, answered: Iterable[str]) -> None:
        """Record which members failed in a step, and which work again."""
        for member, cause in self._failed.items():
            self._record(HealthStats(member, cause))
        for member in self._down.intersection(answered) - self._failed.keys():
            self._record(HealthStats(member, None))
            self._down.discard(member)
        self._down |= self._failed.keys()
        self._failed = {}

    def _without(self, share: Share, busy: frozenset[str]) -> Share | None:
        """The share without its busy members; None if it must wait or nothing is left."""
        sequence = share.sequence
        for member in busy.intersection(share.counts):
            if not sequence.recipe.can_lose(member):
                if self._pool.is_stuck(member):
                    fail(sequence, f"member {member!r}: an earlier call has not returned")
                return None
            if share.prefill or share.counts[member] > self.max_behind:
                self._drop(sequence, member, "busy", "an earlier call has not returned")
        counts = _kept(share.counts, busy, sequence)
        decodes = share.decides and not share.prefill  # main has drafted what is decided without the busy members
        return replace(share, counts=counts) if counts or share.scores or decodes else None

    def _drop(self, sequence: Sequence, member: str, reason: Reason, detail: str) -> None:
        if sequence.is_finished or member not in sequence.tracks:
            return
        for gone in sequence.drop(member, reason):
            self._pool.release(gone, sequence.seq_id)
            self._report(sequence, gone, sequence.dropped[gone], detail)

    def _report(self, sequence: Sequence, member: str, reason: Reason, detail: str) -> None:
        self._record(DropStats(sequence.recipe.model, member, reason))
        logger.log(
            logging.INFO if reason == "full" else logging.WARNING,
            "request %s goes on without member %s (%s): %s", sequence.request.request_id, member, reason, detail,
        )  # fmt: skip


def _kept(counts: Mapping[str, int], busy: frozenset[str], sequence: Sequence) -> dict[str, int]:
    return {m: count for m, count in counts.items() if m in sequence.tracks and m not in busy}


def fail(sequence: Sequence, message: str) -> None:
    """End a sequence with an error, unless it has already ended."""
    if not sequence.is_finished:
        logger.error("request %s failed: %s", sequence.request.request_id, message)
        sequence.finish("error", error=message)


@contextmanager
def own_fault(sequence: Sequence) -> Iterator[None]:
    """Any exception in the block fails this sequence and no other."""
    try:
        yield
    except Exception as error:
        fail(sequence, fault(sequence, error))


def fault(sequence: Sequence, error: Exception) -> str:
    """The message for a client whose request raised an error. An unexpected error is logged with its traceback."""
    if isinstance(error, UnisonoError):
        return str(error)
    logger.error("request %s raised", sequence.request.request_id, exc_info=error)
    return f"the engine failed at this request: {type(error).__name__}: {error}"


def last_output(sequence: Sequence) -> Output:
    """The last output of a sequence that has ended. Never raises."""
    try:
        return sequence.take()
    except Exception as error:
        message = fault(sequence, error)
        return Output(
            "", (), len(sequence.main.prompt_ids), sequence.num_completion_tokens, "error", error=message
        )
