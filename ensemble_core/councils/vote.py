"""Several answers, and the one that most agree on, or that a judge prefers.

Majority: each sample votes for the answer that its text ends up with (self-consistency, arXiv 2203.11171; over
several models: Avengers, arXiv 2505.19797). Judge: LLM-Blender's pairwise ranking (arXiv 2306.02561), by the
log-probabilities of A and B in both orders. Knows texts; does not know how answers come.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ensemble_core.council_config import VoteConfig
from ensemble_core.councils.base import (
    NOTHING,
    Answer,
    Call,
    CallCost,
    CostOf,
    Notes,
    Plan,
    Round,
    Settled,
    question_of,
    seeded,
)
from ensemble_core.councils.wording import worded
from ensemble_core.decoding.requests import Conversation, GenerationRequest, Output
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.errors import CouncilError

_JUDGING = SamplingParams(max_tokens=1, temperature=0.0, logprobs=20)


def vote_cost(config: VoteConfig, cost_of: CostOf) -> CallCost:
    """All samples at once, then, for a judge, every ordered pair of them at once, a token each."""
    samples = NOTHING
    for model, count in config.models.items():
        samples = samples.beside(cost_of(model).times(count))
    if config.judge is None:
        return samples
    pairs = _num_samples(config) * (_num_samples(config) - 1)
    return samples + CallCost(calls=pairs, writers=0, fixed=pairs, width=pairs)


def _num_samples(config: VoteConfig) -> int:
    return sum(config.models.values())


def vote_plan(config: VoteConfig, request: GenerationRequest) -> Plan:
    """Sample, then decide. Raises CouncilError where no sample has an answer at all."""
    calls = tuple(_samples(config, request))
    if config.judge is not None:
        answers = yield Round(calls)
        return (yield from _judged(config.judge, request, answers))

    def enough(answers: Sequence[Answer]) -> bool:
        return Ballot.of(answers).is_decided(len(calls) - len(answers))

    answers = yield Round(calls, enough if config.stop_early else None, config.answer)
    return _majority(config, answers, Ballot.of(answers))


def _samples(config: VoteConfig, request: GenerationRequest) -> list[Call]:
    params = request.params
    if config.temperature is not None:
        params = replace(params, temperature=config.temperature)
    if config.tie == "likeliest" and params.logprobs is None:
        params = replace(params, logprobs=0)
    return [
        Call(model, model, request.prompt, seeded(params, model, 0, sample), sample=sample, final=True)
        for model, count in config.models.items()
        for sample in range(count)
    ]


@dataclass(slots=True)
class Ballot:
    """Votes: answer -> the ranks of the samples that gave it, in order; the answers in the order of their first."""

    votes: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> Ballot:
        """Samples that failed, or have no answer of the wanted form, do not vote."""
        ballot = cls()
        for rank, answer in enumerate(answers):
            if answer.vote is not None:
                ballot.votes.setdefault(answer.vote, []).append(rank)
        return ballot

    @property
    def num_votes(self) -> int:
        """Samples that voted."""
        return sum(map(len, self.votes.values()))

    def is_decided(self, num_left: int) -> bool:
        """Whether the leader stays alone in front, whatever the samples that are left say."""
        counts = sorted((len(ranks) for ranks in self.votes.values()), reverse=True)
        return bool(counts) and counts[0] > (counts[1] if len(counts) > 1 else 0) + num_left

    def leaders(self) -> list[str]:
        """The answers with most votes, the one that was given first before the others."""
        most = max(map(len, self.votes.values()), default=0)
        return [answer for answer, ranks in self.votes.items() if len(ranks) == most]


def _majority(config: VoteConfig, answers: Sequence[Answer], ballot: Ballot) -> Settled:
    leaders = ballot.leaders()
    if not leaders:  # nobody's text has an answer of that form: the first text is as good as any
        return _said(answers, _first(answers), ballot, None)
    if config.tie == "likeliest":
        winner = max(leaders, key=lambda each: max(_likelihood(answers[rank]) for rank in ballot.votes[each]))
    else:
        winner = leaders[0]
    return _said(answers, answers[ballot.votes[winner][0]], ballot, winner)


def _first(answers: Sequence[Answer]) -> Answer:
    for answer in answers:
        if answer.output is not None:
            return answer
    raise CouncilError("no model answered")


def _likelihood(answer: Answer) -> float:
    """Mean log-probability of a sample's tokens."""
    known = [each.logprob for each in answer.output.logprobs if each.logprob is not None] if answer.output else []
    return sum(known) / len(known) if known else -math.inf


def _said(answers: Sequence[Answer], chosen: Answer, ballot: Ballot, winner: str | None) -> Settled:
    assert chosen.output is not None
    share = len(ballot.votes[winner]) / ballot.num_votes if winner is not None else 0.0
    who = {
        answer: [f"{answers[rank].call.model}#{answers[rank].call.sample}" for rank in ranks]
        for answer, ranks in ballot.votes.items()
    }
    return Settled(chosen.output, chosen.call.model, Notes({"votes": who, "winner": winner}, agreement=share))


def _judged(judge: str, request: GenerationRequest, answers: Sequence[Answer]) -> Plan:
    """The answer with the largest s_i = sum_j (L_ij - L_ji), L_ij: log-odds of i against j where i stands first."""
    there = [answer for answer in answers if answer.output is not None]
    pairs = [(i, j) for i in range(len(there)) for j in range(len(there)) if i != j]
    question = question_of(request.prompt)
    calls = tuple(
        Call(
            "judge",
            judge,
            _comparison(question, there[i].text, there[j].text),
            _JUDGING,
            sample=rank,
        )
        for rank, (i, j) in enumerate(pairs)
    )
    verdicts = (yield Round(calls)) if calls else ()
    scores = [0.0] * len(there)
    for (i, j), verdict in zip(pairs, verdicts, strict=True):
        odds = 0.0 if verdict.output is None else preference(verdict.output)
        scores[i] += odds
        scores[j] -= odds
    best = max(range(len(there)), key=lambda rank: scores[rank])  # of equals the first
    output = there[best].output
    assert output is not None
    named = {f"{each.call.model}#{each.call.sample}": score for each, score in zip(there, scores, strict=True)}
    return Settled(output, there[best].call.model, Notes({"scores": named}))


def _comparison(question: str, first: str, second: str) -> Conversation:
    text = worded("judge", question=question, first=first, second=second)
    opening = {"role": "assistant", "content": worded("judge_opening")}
    return Conversation(({"role": "user", "content": text}, opening), continue_final=True)


def preference(output: Output) -> float:
    """log P(A) - log P(B) of a judge's next token; a letter that it does not tell counts as its least likely one."""
    if not output.logprobs:
        return 0.0
    top = output.logprobs[0].top
    found: dict[Literal["A", "B"], float] = {}
    for letter in ("A", "B"):
        known = [each.logprob for each in top if each.text.strip() == letter]
        if known:
            found[letter] = max(known)
    if not found:
        return 0.0
    least = min(each.logprob for each in top)
    return found.get("A", least) - found.get("B", least)
