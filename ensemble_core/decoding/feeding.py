"""Builds the feeds of a step from its shares, and distributes the answers.

Deciding sequences become turns for their modes. Answers for prompts that are scored or weighed go to their scores and
likelihoods. Invariant: an error caused by one sequence's data fails only that sequence. Knows shares, tracks and
answers; does not know how a step is decided, or the engine's loop.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from ensemble_core.decoding.failures import Failures, own_fault
from ensemble_core.decoding.modes.base import Turn
from ensemble_core.decoding.sequence import Sequence
from ensemble_core.decoding.shares import Share
from ensemble_core.decoding.step import Step
from ensemble_core.members.base import Answers, Feed, Member
from ensemble_core.members.candidates import narrow


class Feeding:
    """See the module's docstring. num_candidates: K that each member is asked for, unless its limit is lower."""

    def __init__(self, members: Mapping[str, Member], failures: Failures, num_candidates: int) -> None:
        self._failures, self._num_candidates = failures, num_candidates
        self._sizes: dict[str, int] = {}
        self._most: dict[str, int] = {}
        for member in members.values():
            self.attach(member)

    def attach(self, member: Member) -> None:
        """One more member."""
        self._sizes[member.name] = len(member.vocabulary)
        self._most[member.name] = member.abilities.max_k or len(member.vocabulary)

    def prepare(self, step: Step) -> None:
        """Fill in the feeds of a step."""
        for share in step.shares:
            for member, count in share.counts.items():
                step.feeds.setdefault(member, []).append(self._feed(share, member, count))
        step.scoring = any(s.sequence.scoring or s.sequence.weighing for s in step.shares if s.prefill)

    def collect(self, step: Step) -> None:
        """Take in the answers: update tracks, score or weigh prompts, and make a turn for each deciding sequence."""
        numbers = dict.fromkeys(step.feeds, 0)
        for share in step.shares:
            own = {}
            for member in share.counts:
                own[member] = numbers[member]
                numbers[member] += 1
            with own_fault(share.sequence):
                self._take_in(step, share, own)

    def _take_in(self, step: Step, share: Share, own: dict[str, int]) -> None:
        """Take in one share's answers. own: member -> index of the share's feed."""
        sequence = share.sequence
        for member in own:
            attempt = step.attempts[member]
            if attempt.error is not None:
                self._failures.lose_to(sequence, member, attempt.error)
            elif track := sequence.tracks.get(member):
                track.cache(track.num_cached + share.counts[member])
        for member, number in own.items():
            if (answers := step.attempts[member].answers) is not None and member in sequence.tracks:
                feed = step.feeds[member][number]
                self._score(sequence, member, feed, answers, number)
                _weigh(sequence, member, feed, answers, number)
        if sequence.scoring and not sequence.is_finished:
            _advance_scores(step, share)
        if share.decides and not sequence.is_finished:
            _take_turn(step, share, own)

    def _feed(self, share: Share, member: str, count: int) -> Feed:
        """One member's feed. A scored prompt is answered at every position, and each answer holds the next token."""
        sequence = share.sequence
        track, is_main = sequence.tracks[member], member == sequence.recipe.main
        token_ids, top_k, salt = track.uncached(count), self._top_k(share, member), sequence.request.salt
        last = _also(sequence) if is_main and share.decides else ()
        if sequence.scoring:
            following = track.prompt_ids[track.num_cached + 1 : track.num_cached + 1 + count]
            also = tuple([(token_id,) for token_id in following] + [last] * (count - len(following)))
            return Feed(sequence.seq_id, token_ids, count, also, (), top_k, track.num_cached, salt)
        wanted = share.wanted.get(member, 0)
        weighed = sequence.likelihood if sequence.weighing else None
        counted = weighed.following(track, count) if weighed is not None else ()
        also = (last,) * wanted if last else ()
        return Feed(sequence.seq_id, token_ids, wanted, also, counted, top_k, track.num_cached, salt)

    def _top_k(self, share: Share, member: str) -> int:
        """Number of candidates that this sequence needs from a member, whatever other sequences need."""
        sequence = share.sequence
        recipe, is_main = sequence.recipe, member == sequence.recipe.main
        whole = recipe.fusion is not None and recipe.fusion.full_vocabulary
        guide = sequence.constraint if is_main and share.decides else None
        if whole or (guide is not None and guide.chooses):
            return self._sizes[member]
        num_named = len(sequence.request.params.asked_ids) - len(sequence.pinned)
        num_more = sequence.num_extra + num_named + len(_forced(sequence)) if is_main and share.decides else 0
        return min(self._num_candidates + num_more, self._most[member])

    def _score(self, sequence: Sequence, member: str, feed: Feed, answers: Answers, number: int) -> None:
        if sequence.scores is None or not sequence.scoring or not feed.wanted:
            return
        part = answers.of(number)
        if not part.logprobs.amax(dim=1).isfinite().all():
            self._failures.lose_unsound(sequence, member)
            return
        # Pinned ids at the last position serve the token decision; they are not part of a score.
        num_following = len(sequence.tracks[member].prompt_ids) - (feed.keep or 0) - 1
        kept = [ids if i < num_following else () for i, ids in enumerate(feed.also)]
        sequence.scores.add(member, narrow(part, min(self._num_candidates, self._most[member]), kept))


def _also(sequence: Sequence) -> tuple[int, ...]:
    """Main's ids that its answer must hold."""
    return (*sequence.request.params.asked_ids, *_forced(sequence))


def _forced(sequence: Sequence) -> tuple[int, ...]:
    """Main's only id that may come next, where that is known in advance."""
    forced = None if sequence.constraint is None else sequence.constraint.forced
    return () if forced is None else (forced,)


def _take_turn(step: Step, share: Share, own: Mapping[str, int]) -> None:
    """Give a deciding sequence its turn, or end it if only its prompt was asked for. Its prompt is cached by now."""
    sequence = share.sequence
    sequence.settle()
    if sequence.request.params.max_tokens == 0:
        sequence.finish("length")
        return
    mask = sequence.constraint.allowed() if sequence.constraint is not None else None
    feeds = {member: own[member] for member in share.wanted if member in own and member in sequence.tracks}
    busy = [member for member in share.wanted if member not in own and member in sequence.tracks]
    step.turns.append(Turn(sequence, feeds, mask).without(busy, "busy"))


def _weigh(sequence: Sequence, member: str, feed: Feed, answers: Answers, number: int) -> None:
    """Add a member's log-likelihood of a chunk of a prompt."""
    if feed.following and sequence.likelihood is not None:
        track = sequence.tracks[member]
        sequence.likelihood.add(member, track, feed.following, answers.likelihoods[number])


def _advance_scores(step: Step, share: Share) -> None:
    """Fuse more of a prompt's scores: as many as the share allows, or all if the share decides a token."""
    sequence, started = share.sequence, time.perf_counter()
    assert sequence.scores is not None
    recipe, tracks = sequence.recipe, sequence.tracks
    if share.decides:
        step.num_scored += sequence.scores.finish(recipe, tracks, sequence.prompt_text)
    else:
        step.num_scored += sequence.scores.advance(recipe, tracks, share.scores)
    step.scoring_seconds += time.perf_counter() - started
