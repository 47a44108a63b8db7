"""The engine: schedule, feed the members, decide, append, align, finish. One thread owns it.

Invariants: a sequence that ends, however it ends, gives back its pages in every member; a member's failure concerns
the sequences that it was fed in that step and no other (see `decoding/failures.py`). Does not know threads, asyncio
or HTTP.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ensemble_core.decoding.failures import Failures, fail
from ensemble_core.decoding.modes.lockstep import Outcome, Row, decide
from ensemble_core.decoding.pace import SCORING, Kind, Work
from ensemble_core.decoding.requests import Output
from ensemble_core.decoding.scheduler import Capacity, Limits, Scheduler, Share
from ensemble_core.decoding.sequence import Phase, Sequence
from ensemble_core.members.base import Candidates, Feed, Member
from ensemble_core.members.candidates import narrow
from ensemble_core.members.parallel import Answer, MemberPool
from ensemble_core.stats import (
    CacheStats,
    MemberStats,
    PreemptionStats,
    PrefixStats,
    QueueStats,
    RequestStats,
    StatsSink,
    StepStats,
    TokenStats,
)

logger = logging.getLogger(__name__)

News = tuple[int, Output]  # seq_id, what happened
_BUSY_SECONDS = 0.01  # to wait at once for members while nothing can go on without them
_NOT_FINITE = "its numbers are not finite"


@dataclass(slots=True)
class _Step:
    """What one step has done so far."""

    shares: list[Share]
    started: float = field(default_factory=time.perf_counter)
    feeds: dict[str, list[Feed]] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)
    outcome: Outcome | None = None
    alignment_seconds: float = 0.0
    rollbacks: dict[str, int] = field(default_factory=dict)
    scoring: bool = False  # a part of a scored prompt is fed
    scoring_seconds: float = 0.0
    num_scored: int = 0  # positions of prompts that were fused


class Engine:
    """Members, sequences and the loop's body."""

    def __init__(
        self,
        members: Mapping[str, Member],
        limits: Limits,
        num_candidates: int,
        sink: StatsSink,
        *,
        prefix_reuse: bool = True,
        member_timeout: float | None = None,
    ) -> None:
        """prefix_reuse: prompts begin with what is cached of others; choices of one prompt always share it.

        member_timeout: seconds that a forward may take; None: any.
        """
        self.members = dict(members)
        self._pool = MemberPool(members, member_timeout)
        self._failures = Failures(self._pool, sink, limits.token_budget)
        self._num_candidates = num_candidates
        self._prefix_reuse = prefix_reuse
        self._sink = sink
        capacities = {n: Capacity(m.page_size, m.num_pages, m.max_len, m.min_prefix) for n, m in members.items()}
        self.scheduler = Scheduler(capacities, limits)

    @property
    def has_work(self) -> bool:
        """True while some sequence runs or waits."""
        return self.scheduler.has_work

    def add(self, sequences: list[Sequence]) -> None:
        """Queue sequences, all or none. Raises QueueFullError."""
        self.scheduler.add(sequences)
        self._report_queue()

    def step(self) -> list[News]:
        """One step of everything that runs; the news of every sequence that moved."""
        self._pool.settle()
        for sequence in self.scheduler.admit():
            self._report_preemption(sequence)
            self._release(sequence)
        self._reuse()
        step = _Step(self._failures.feasible(self.scheduler.schedule()))
        if step.shares:
            self._forward(step)
            deciding = self._collect(step)
            step.outcome = decide(deciding, _candidates(step.answers), self._num_candidates)
            news = self._append(step.outcome)
            self._align(step, deciding)
            self._report_step(step)
            return news + self._retire()
        if self._pool.busy:
            self._pool.wait(_BUSY_SECONDS)
        return self._retire()

    def abort(self, seq_ids: Iterable[int]) -> list[News]:
        """End sequences now; unknown ones are fine."""
        wanted = set(seq_ids)
        for sequence in (*self.scheduler.running, *self.scheduler.waiting):
            if sequence.seq_id in wanted and sequence.phase is not Phase.FINISHED:
                sequence.finish("abort")
        return self._retire()

    def report_caches(self) -> None:
        """Tell the sink what every member's cache holds, but for those that are busy."""
        self._pool.settle()
        for name, member in self.members.items():
            if name in self._pool.busy:
                continue
            used = member.num_pages - member.free_pages
            self._sink.cache(CacheStats(name, used, member.num_pages, member.memory_bytes()))

    def close(self) -> None:
        """End the threads of the members."""
        self._pool.close()

    def _reuse(self) -> None:
        """Let sequences begin with what each member has cached of their prompts, all but the last token.

        A prompt that is scored or weighed needs an answer at every position, so it is computed in full.
        """
        for sequence, leader in self.scheduler.beginners():
            if leader is not None and sequence.scores is not None and leader.scores is not None:
                sequence.scores.described = leader.scores.described
            if leader is not None:
                sequence.follow(leader)
            shares = self._prefix_reuse or (leader is not None and leader.phase is Phase.DECODE)
            if sequence.scoring or sequence.weighing or not shares:
                continue
            for member, track in sequence.tracks.items():
                if len(track) <= self.members[member].min_prefix or member in self._pool.busy:
                    continue
                ids = track.uncached(len(track) - 1)
                if length := self.members[member].reuse(sequence.seq_id, ids):
                    track.num_cached = length
                    self._sink.prefix(PrefixStats(member, length))
            if sequence.first_token is None:  # later it is computed anew, of which its client knows nothing
                sequence.num_reused = sequence.main.num_cached

    def _forward(self, step: _Step) -> None:
        """Feed every member its part of the step; a failure is lost on the sequences that it was fed."""
        feeds: dict[str, list[Feed]] = {}
        top_k: dict[str, int] = {}
        for share in step.shares:
            for member, count in share.counts.items():
                feeds.setdefault(member, []).append(self._feed(share, member, count))
                top_k[member] = max(top_k.get(member, 0), self._top_k(share.sequence, member))
        step.scoring = any(s.sequence.scoring or s.sequence.weighing for s in step.shares if s.prefill)
        step.feeds, step.answers = feeds, self._pool.forward(feeds, top_k)
        for share in step.shares:
            for member, count in share.counts.items():
                answer = step.answers[member]
                if answer.failure is not None:
                    self._failures.lose(share.sequence, member, answer.failure, str(answer.error))
                elif track := share.sequence.tracks.get(member):
                    track.num_cached += count

    def _feed(self, share: Share, member: str, count: int) -> Feed:
        """A scored prompt wants an answer at every position, its own next token always in it."""
        sequence = share.sequence
        track = sequence.tracks[member]
        is_main = member == sequence.recipe.main
        last = sequence.biased if is_main and share.decides else ()
        if not sequence.scoring:
            also = (last,) if last else ()
            weighed = sequence.likelihood if sequence.weighing else None
            counted = weighed.following(track, count) if weighed is not None else ()
            return Feed(sequence.seq_id, track.uncached(count), int(share.decides), also, counted)
        following = track.prompt_ids[track.num_cached + 1 : track.num_cached + 1 + count]
        each = [(token_id,) for token_id in following] + [last] * (count - len(following))
        return Feed(sequence.seq_id, track.uncached(count), count, tuple(each))

    def _top_k(self, sequence: Sequence, member: str) -> int:
        recipe = sequence.recipe
        whole = recipe.fusion is not None and recipe.fusion.full_vocabulary
        if member == recipe.main:
            whole = whole or sequence.constraint is not None
        if whole:
            return len(self.members[member].vocabulary)
        return self._num_candidates + (len(sequence.biased) if member == recipe.main else 0)

    def _collect(self, step: _Step) -> list[Row]:
        """Deciding sequences, with the places of their members' answers; the rest is scored."""
        rows = []
        seen: dict[str, int] = {}
        turns: dict[str, int] = {}
        for share in step.shares:
            places = {}
            for member in share.counts:
                turn = turns.get(member, 0)
                feed = step.feeds[member][turn]
                start = seen.get(member, 0)
                turns[member], seen[member] = turn + 1, start + feed.wanted
                places[member] = seen[member] - 1
                self._score(share.sequence, member, feed, step.answers[member], start)
                _weigh(share.sequence, member, feed, step.answers[member], turn)
            if share.sequence.scoring and share.sequence.phase is not Phase.FINISHED:
                _advance_scores(step, share)
            if share.decides and share.sequence.phase is not Phase.FINISHED:
                rows.append(self._row(share.sequence, places))
        return [row for row in rows if row.sequence.phase is not Phase.FINISHED]

    def _score(self, sequence: Sequence, member: str, feed: Feed, answer: Answer, start: int) -> None:
        if sequence.scores is None or not sequence.scoring or answer.candidates is None or not feed.wanted:
            return
        part = answer.candidates.rows(range(start, start + feed.wanted))
        if not part.logprobs.amax(dim=1).isfinite().all():
            self._failures.lose(sequence, member, "non_finite", f"member {member!r}: {_NOT_FINITE}")
        elif member in sequence.tracks:
            sequence.scores.add(member, narrow(part, self._num_candidates, feed.also))

    def _row(self, sequence: Sequence, places: dict[str, int]) -> Row:
        """A deciding sequence. Its prompt is cached now: end it if the prompt is all that is asked.

        places: of all that were fed, be they lost since.
        """
        sequence.settle()
        if sequence.request.params.max_tokens == 0:
            sequence.finish("length")
        mask = sequence.constraint.allowed() if sequence.constraint is not None else None
        own = {member: place for member, place in places.items() if member in sequence.tracks}
        busy = [member for member in sequence.consulted if member not in own]
        return Row(sequence, own, sequence.biased, mask).without(busy, "busy")

    def _append(self, outcome: Outcome) -> list[News]:
        """Put each decided token to its sequence, and say what became of it."""
        news = []
        for decision in outcome.decisions:
            sequence = decision.sequence
            for member in decision.unsound:
                self._failures.lose(sequence, member, "non_finite", f"member {member!r}: {_NOT_FINITE}")
            if decision.token_id < 0:
                fail(sequence, f"the fusion of {sequence.recipe.members} gave numbers that are not finite")
                continue
            sequence.append(decision.token_id, decision.scored, decision.trace)
            self._time_token(sequence)
            if sequence.phase is not Phase.FINISHED:
                news.append((sequence.seq_id, sequence.take()))
        return news

    def _align(self, step: _Step, rows: list[Row]) -> None:
        """Respell the new text in every assistant and roll back what it had cached otherwise."""
        started = time.perf_counter()
        for row in rows:
            sequence = row.sequence
            if sequence.phase is Phase.FINISHED or sequence.spelt.mid_character:
                continue
            for member in sequence.recipe.members[1:]:
                track = sequence.tracks[member]
                if dropped := track.respell(sequence.spelt.text):
                    self._pool.rollback(member, sequence.seq_id, track.num_cached)
                    step.rollbacks[member] = step.rollbacks.get(member, 0) + dropped
                if len(track) > self.members[member].max_len:
                    sequence.finish("length")
        step.alignment_seconds = time.perf_counter() - started

    def _retire(self) -> list[News]:
        """Release every finished sequence everywhere; their last news."""
        news = []
        for sequence in self.scheduler.retire():
            self._release(sequence)
            news.append((sequence.seq_id, sequence.take()))
            self._report_request(sequence)
        if news:
            self._report_queue()
        return news

    def _release(self, sequence: Sequence) -> None:
        """Give back its pages everywhere; what is sound of them may serve others."""
        keep = self._prefix_reuse and sequence.finish_reason != "error"
        for member in sequence.tracks:
            self._pool.release(member, sequence.seq_id, keep)

    def _time_token(self, sequence: Sequence) -> None:
        now = time.perf_counter()
        if sequence.last_token is None:
            sequence.first_token = now
        else:
            self._sink.token(TokenStats(sequence.recipe.model, now - sequence.last_token))
        sequence.last_token = now

    def _report_preemption(self, sequence: Sequence) -> None:
        logger.info("request %s is preempted: a member's cache is full", sequence.request.request_id)
        self._sink.preemption(PreemptionStats(sequence.recipe.model))

    def _report_queue(self) -> None:
        self._sink.queue(QueueStats(len(self.scheduler.running), len(self.scheduler.waiting)))

    def _report_request(self, sequence: Sequence) -> None:
        now, arrived = time.perf_counter(), sequence.arrived
        self._sink.request(
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

    def _pace(self, step: _Step) -> None:
        """Let the scheduler learn what the step cost; one with a failure teaches nothing."""
        if any(answer.error for answer in step.answers.values()):
            return
        parts: dict[Kind, Work] = {}
        if step.num_scored:
            parts[SCORING] = Work(step.scoring_seconds, step.num_scored, False)
        for name, answer in step.answers.items():
            counts = [(share.prefill, share.counts[name]) for share in step.shares if name in share.counts]
            num_tokens = sum(count for prefill, count in counts if prefill)
            decoded = not all(prefill for prefill, _ in counts)
            parts[name, step.scoring] = Work(answer.ended - answer.started, num_tokens, decoded)
        num_decoding = sum(not share.prefill for share in step.shares)
        self.scheduler.pace.record(num_decoding, time.perf_counter() - step.started, parts)

    def _report_step(self, step: _Step) -> None:
        assert step.outcome is not None
        self._pace(step)
        self._failures.report(step.answers)
        last = max((answer.ended for answer in step.answers.values()), default=0.0)
        self._sink.step(
            StepStats(
                mode="lockstep",
                batch_size=sum(d.token_id >= 0 for d in step.outcome.decisions),
                seconds=time.perf_counter() - step.started,
                alignment_seconds=step.alignment_seconds,
                sampling_seconds=step.outcome.sampling_seconds,
                members=[_member_stats(name, answer, step, last) for name, answer in step.answers.items()],
                fusions=step.outcome.fusions,
            )
        )
        self._report_queue()


def _weigh(sequence: Sequence, member: str, feed: Feed, answer: Answer, turn: int) -> None:
    """Take in what a member made of a piece of a prompt; the answer's feed number `turn`."""
    if member not in sequence.tracks:
        return  # it was lost in this step
    if feed.following and sequence.likelihood is not None and answer.candidates is not None:
        logprob = answer.candidates.likelihoods[turn]
        sequence.likelihood.add(member, sequence.tracks[member], feed.following, logprob)


def _advance_scores(step: _Step, share: Share) -> None:
    """Go on with a prompt's scores, as far as its share allows; to the end where it decides a token."""
    sequence, started = share.sequence, time.perf_counter()
    assert sequence.scores is not None
    recipe, tracks = sequence.recipe, sequence.tracks
    if share.decides:
        step.num_scored += sequence.scores.finish(recipe, tracks, sequence.prompt_text)
    else:
        step.num_scored += sequence.scores.advance(recipe, tracks, share.scores)
    step.scoring_seconds += time.perf_counter() - started


def _candidates(answers: Mapping[str, Answer]) -> dict[str, Candidates]:
    return {name: a.candidates for name, a in answers.items() if a.candidates is not None}


def _member_stats(name: str, answer: Answer, step: _Step, last: float) -> MemberStats:
    prefill = decode = 0
    for share in step.shares:
        count = share.counts.get(name, 0)
        if share.prefill:
            prefill += count
        else:
            decode += count
    return MemberStats(
        member=name,
        phase="prefill" if prefill else "decode",
        forward_seconds=answer.ended - answer.started,
        wait_seconds=last - answer.ended,
        prefill_tokens=prefill,
        decode_tokens=decode,
        rollback_tokens=step.rollbacks.get(name, 0),
    )
