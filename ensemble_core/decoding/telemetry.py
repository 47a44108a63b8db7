"""Metrics of the engine: fills the records of `ensemble_core.stats`, and feeds step costs to the scheduler's pace.

Reads steps; on sequences it only notes the times of tokens. Does not know Prometheus.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping

from ensemble_core.decoding.modes.base import Decision
from ensemble_core.decoding.pace import SCORING, Work, WorkKind
from ensemble_core.decoding.scheduler import Scheduler
from ensemble_core.decoding.sequence import Sequence
from ensemble_core.decoding.step import Step
from ensemble_core.members.base import Member
from ensemble_core.members.parallel import Attempt
from ensemble_core.stats import (
    CacheStats,
    DraftStats,
    DrawStats,
    MemberStats,
    PreemptionStats,
    PrefixStats,
    QueueStats,
    Record,
    RequestStats,
    StepStats,
    TokenStats,
)

logger = logging.getLogger(__name__)


class Telemetry:
    """See the module's docstring."""

    def __init__(self, record: Record, scheduler: Scheduler) -> None:
        self._record, self._scheduler = record, scheduler

    def step(self, step: Step) -> None:
        """Record a finished step."""
        self._teach(step)
        last = max((attempt.ended for attempt in step.attempts.values()), default=0.0)
        self._record(
            StepStats(
                mode=step.mode,
                batch_size=sum(bool(decision.tokens) for decision in step.outcome.decisions),
                seconds=time.perf_counter() - step.started,
                alignment_seconds=step.alignment_seconds,
                sampling_seconds=step.outcome.sampling_seconds,
                members=[_member_stats(name, attempt, step, last) for name, attempt in step.attempts.items()],
                fusions=step.outcome.fusions,
            )
        )
        for model, decisions in _by_model(step).items():
            self._record(_draft_stats(model, decisions))
            if drawn := Counter(decision.drawn for decision in decisions if decision.drawn is not None):
                self._record(DrawStats(model, dict(drawn)))
        self.queue()

    def tokens(self, sequence: Sequence) -> None:
        """Record that a sequence got tokens. Those of one step count as one event."""
        now = time.perf_counter()
        if sequence.last_token is None:
            sequence.first_token = now
        else:
            self._record(TokenStats(sequence.recipe.model, now - sequence.last_token))
        sequence.last_token = now

    def preemption(self, sequence: Sequence) -> None:
        """Record that a sequence went back to the queue."""
        logger.info(
            "request %s is preempted: a cache is full, or another request gets its place",
            sequence.request.request_id,
        )
        self._record(PreemptionStats(sequence.recipe.model))

    def prefix(self, member: str, num_tokens: int) -> None:
        """Record how many tokens of a prompt a member had cached."""
        self._record(PrefixStats(member, num_tokens))

    def queue(self) -> None:
        """Record the present numbers of running and waiting sequences."""
        self._record(QueueStats(len(self._scheduler.running), len(self._scheduler.waiting)))

    def cache(self, name: str, member: Member) -> None:
        """Record the state of a member's cache."""
        used = member.num_pages - member.free_pages
        self._record(CacheStats(name, used, member.num_pages, member.memory_bytes()))

    def gone(self, name: str, member: Member) -> None:
        """Record that a member has left, with its memory."""
        self._record(CacheStats(name, 0, member.num_pages, dict.fromkeys(member.memory_bytes(), 0)))

    def request(self, sequence: Sequence) -> None:
        """Record that a sequence has ended."""
        now, arrived = time.perf_counter(), sequence.arrived
        self._record(
            RequestStats(
                model=sequence.recipe.model,
                finish_reason=sequence.finish_reason or "error",
                prompt_tokens=len(sequence.main.prompt_ids),
                generation_tokens=sequence.num_completion_tokens,
                queue_seconds=(sequence.admitted or now) - arrived,
                ttft_seconds=sequence.first_token - arrived if sequence.first_token else None,
                e2e_seconds=now - arrived,
            )
        )

    def _teach(self, step: Step) -> None:
        """Tell the scheduler's pace what the step cost, unless a member failed in it."""
        if any(attempt.error for attempt in step.attempts.values()):
            return
        parts: dict[WorkKind, Work] = {}
        if step.num_scored:
            parts[SCORING] = Work(step.scoring_seconds, step.num_scored, False)
        for name, attempt in step.attempts.items():
            counts = [(share.prefill, share.counts[name]) for share in step.shares if name in share.counts]
            num_tokens = sum(count for prefill, count in counts if prefill)
            decoded = not all(prefill for prefill, _ in counts)
            parts[name, step.scoring] = Work(attempt.ended - attempt.started, num_tokens, decoded)
        num_decoding = sum(not share.prefill for share in step.shares)
        seconds = time.perf_counter() - step.started
        self._scheduler.pace.record(num_decoding, seconds, parts)
        if num_decoding == len(step.shares):
            drafted = sum(share.counts.get(share.drafter, 0) for share in step.shares)
            final = sum(len(decision.tokens) for decision in step.outcome.decisions)
            read = sum(sum(share.counts.values()) for share in step.shares) - drafted
            self._scheduler.rhythm.record(drafted, read, seconds, final)


def _member_stats(name: str, attempt: Attempt, step: Step, last: float) -> MemberStats:
    prefill, decode = _num_fed(name, step)
    return MemberStats(
        member=name,
        phase="prefill" if prefill else "decode",
        forward_seconds=attempt.ended - attempt.started,
        wait_seconds=last - attempt.ended,
        prefill_tokens=prefill,
        decode_tokens=decode,
        rollback_tokens=step.rollbacks.get(name, 0),
    )


def _num_fed(name: str, step: Step) -> tuple[int, int]:
    """Tokens of prompts and of completions that a member was fed."""
    counts: Mapping[bool, int] = {
        prefill: sum(share.counts.get(name, 0) for share in step.shares if share.prefill is prefill)
        for prefill in (True, False)
    }
    return counts[True], counts[False]


def _by_model(step: Step) -> dict[str, list[Decision]]:
    """The decisions of a step, by the model that was asked."""
    found: dict[str, list[Decision]] = {}
    for decision in step.outcome.decisions:
        found.setdefault(decision.sequence.recipe.model, []).append(decision)
    return found


def _draft_stats(model: str, decisions: list[Decision]) -> DraftStats:
    verdicts = [verdict for decision in decisions for verdict in decision.verdicts]
    drafts = [verdict.kept for verdict in verdicts if not verdict.guess]
    guesses = [verdict.kept for verdict in verdicts if verdict.guess]
    consulted = sum(decision.consulted for decision in decisions)
    agreed = sum(decision.agreed for decision in decisions)
    certified = sum(decision.certified for decision in decisions)
    return DraftStats(
        model=model,
        drafted=len(drafts),
        accepted=sum(drafts),
        guessed=len(guesses),
        confirmed=sum(guesses),
        consulted=consulted,
        agreed=agreed,
        certified=certified,
        alone=sum(len(decision.tokens) for decision in decisions) - consulted - agreed - certified,
    )
