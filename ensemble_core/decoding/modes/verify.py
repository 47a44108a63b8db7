"""The verify mode: main drafts some tokens, then every assistant reads them in one forward and the ensemble decides.

A drafted token is judged where the place before it is *sound* (`places.py`), unless the assistants agree with it
anyway (it is not *needed*). The first judged token that the fusion would have chosen otherwise is replaced, and what
follows it is taken back. At all other places main's token stands. Source: SAFE (arXiv 2510.15346), docs/methods.md.

A drafted token is what main alone would choose at its place with the place's own random number, and the fusion
chooses with the same number. So a text is the very text that the rule gives one token at a time: it depends neither
on how long drafts are nor on other sequences. The more alike the distributions, the more often a draft stays.

The beat (`decoding/rhythm.py`) says whether main drafts, the assistants read, or both. Texts whose shaping depends on
the tokens before (penalties, JSON, min_tokens) step in lockstep, and so does the first token of every text.

Knows tracks, candidates and fusions; does not know scheduling or caches.
"""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ensemble_core.decoding import reports
from ensemble_core.decoding.habits import Verdict
from ensemble_core.decoding.modes.base import MODES, Ask, Decision, Outcome, Turn, joined
from ensemble_core.decoding.modes.lockstep import Lockstep, failed, narrow_main, width_of
from ensemble_core.decoding.modes.places import (
    Note,
    Spot,
    draft_of,
    extended,
    is_complete,
    note_of,
    num_judged,
    num_reading,
)
from ensemble_core.decoding.rhythm import LONGEST, Beat, Prospect
from ensemble_core.decoding.sampler import greedy, sample
from ensemble_core.decoding.sequence import Choice, Drafted, Sequence
from ensemble_core.decoding.shaping import shape
from ensemble_core.fusion.base import Fused, single
from ensemble_core.members.base import Answers, Candidates, stacked
from ensemble_core.stats import FusionStats


class VerifyOptions(BaseModel):
    """How drafts are made and judged."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    draft: Literal["auto"] | Annotated[int, Field(ge=1, le=16)] = Field(
        "auto",
        description="Tokens of a draft; auto: as many as pay, by main's certainty, by what stayed and by cost.",
    )
    lookup: bool = Field(
        True, description="Main is fed guesses of its next tokens, taken from where the last ones occurred before."
    )
    needed: Literal["consensus", "always"] = Field(
        "consensus",
        description="consensus: a greedy token with which the assistants agree is not fused; always: it is.",
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """A drafted token that can be judged. rows: assistant -> its candidates there."""

    turn: Turn
    number: int
    drafted: Drafted
    rows: Mapping[str, Candidates]

    @property
    def token_id(self) -> int:
        """The drafted token."""
        return self.drafted.token_id

    @property
    def note(self) -> Note:
        """What was kept of it."""
        return note_of(self.drafted)


@dataclass(slots=True)
class _Judged:
    """What the ensemble chose at judged places: (turn, number) -> token; -1: the numbers were not finite."""

    tokens: dict[tuple[int, int], int] = field(default_factory=dict)
    reports: dict[tuple[int, int], tuple[list[Candidates], Fused, int]] = field(default_factory=dict)
    fusions: list[FusionStats] = field(default_factory=list)


_GUESSES = 7  # at most

_Ends = Mapping[str, tuple[int, Candidates]]  # assistant -> tokens of its completion, what it said behind them


@MODES.register("verify", VerifyOptions)
@dataclass(frozen=True)
class Verify:
    """See the module's docstring."""

    options: VerifyOptions = field(default_factory=VerifyOptions)

    def prospect(self, sequence: Sequence) -> Prospect | None:
        """See `Mode.prospect`."""
        if _in_lockstep(sequence):
            return None
        draft, habits, likely = draft_of(sequence), sequence.habits, 1.0
        for each in draft:
            sure = note_of(each).spots == {}  # nobody judges it
            likely *= 1.0 if sure else habits.survival(note_of(each).certainty)
        fixed = self.options.draft != "auto"
        longest = self.options.draft if isinstance(self.options.draft, int) else LONGEST
        complete, unread = is_complete(sequence), num_judged(sequence)
        due = unread > 0 and (complete or sequence.cramped or len(draft) >= longest)
        guesses = sequence.drafted[len(draft) :]
        return Prospect(
            num_drafted=unread,
            likely=likely,
            survival=habits.average,
            due=due,
            eager=fixed and len(draft) < longest,
            complete=complete,
            num_guessed=len(guesses),
            guess=sequence.guess_habits.survival(_strength(guesses[0])) if guesses else 0.0,
        )

    def plan(self, sequence: Sequence, beat: Beat = Beat()) -> Mapping[str, Ask]:  # noqa: B008, it is frozen
        """Main's next tokens, every assistant's reading of the draft, or both."""
        prospect = self.prospect(sequence)
        if prospect is None:
            return Lockstep().plan(sequence)
        readings = _readings(sequence) if beat.read and prospect.num_drafted else {}
        if readings and not beat.drafts(prospect):
            return readings
        num_guesses = beat.guesses(prospect)
        count = sequence.main.num_uncached - sequence.num_guessed + num_guesses
        return {sequence.recipe.main: Ask(count, 1 + num_guesses), **readings}

    @torch.inference_mode()
    def decide(self, turns: abc.Sequence[Turn], answers: Mapping[str, Answers], num_candidates: int) -> Outcome:
        """See `Mode.decide`. A turn gets as many final tokens as its draft was judged."""
        parts = []
        if alone := [turn for turn in turns if _in_lockstep(turn.sequence)]:
            parts.append(Lockstep().decide(alone, answers, num_candidates))
        if drafting := [turn for turn in turns if not _in_lockstep(turn.sequence)]:
            parts.append(self._decide(drafting, answers, num_candidates))
        return joined(parts)

    def _decide(self, turns: abc.Sequence[Turn], answers: Mapping[str, Answers], num_candidates: int) -> Outcome:
        started = time.perf_counter()
        chosen = _chosen([turn for turn in turns if turn.recipe.main in turn.feeds], answers, num_candidates)
        sampling = time.perf_counter() - started
        read = [_with_finite(turn, answers) for turn in turns if _is_read(turn)]
        judged = self._judge(
            [place for turn in read if _can_go_on(turn) for place in _places(turn, answers)], num_candidates
        )
        decisions = [
            self._decision(turn, chosen.get(turn.sequence.seq_id, []), judged, answers)
            for turn in (*read, *(turn for turn in turns if not _is_read(turn)))
        ]
        return Outcome(decisions, judged.fusions, sampling)

    def _decision(
        self, turn: Turn, chosen: list[Drafted], judged: _Judged, answers: Mapping[str, Answers]
    ) -> Decision:
        """What becomes of a turn's draft. chosen: what main alone would choose at the positions that it was fed."""
        sequence, draft = turn.sequence, draft_of(turn.sequence)
        if not _can_go_on(turn) or any(each.token_id < 0 for each in chosen):
            return _failed(turn)
        new, verdicts = _confirmed(sequence, chosen)
        if not _is_read(turn):
            num_spelt = sequence.num_spelt
            longer = extended(sequence, draft[:num_spelt], (*draft[num_spelt:], *new))
            return Decision(sequence, draft=self._with_guesses(sequence, 0, longer), verdicts=verdicts)
        choices, judgements = _verdict(turn, judged)
        verdicts += judgements
        unsound = tuple(member for member, reason in turn.left_out.items() if reason == "non_finite")
        if choices is None:
            return _failed(turn)
        if not judgements or not judgements[-1].kept:
            return Decision(sequence, choices, unsound=unsound, verdicts=verdicts)
        rest = draft[len(choices) :]
        ends = _ends(turn, answers)
        longer = extended(sequence, (), (*rest, *(() if is_complete(sequence) else new)))
        return Decision(
            sequence, choices, self._with_guesses(sequence, len(choices), longer), ends, unsound, verdicts=verdicts
        )

    def _with_guesses(self, sequence: Sequence, num_final: int, draft: tuple[Drafted, ...]) -> tuple[Drafted, ...]:
        """The draft and guesses behind it. num_final: tokens of the present draft that become final before it."""
        params = sequence.request.params
        left = params.max_tokens - sequence.num_completion_tokens - num_final - len(draft) - 1
        ends = bool(draft) and (draft[-1].held or sequence.stops_at(draft[-1].token_id))
        if not self.options.lookup or sequence.cramped or ends or left <= 0:
            return draft
        ids = [each.token_id for each in (*sequence.drafted[:num_final], *draft)]
        length, guesses = sequence.guess(ids, min(_GUESSES, left))
        return (*draft, *(Drafted(token_id, length / 10, held=True, guess=True) for token_id in guesses))

    def _judge(self, places: abc.Sequence[_Place], num_candidates: int) -> _Judged:
        """Fuse at all places that need it, those of a kind at once."""
        judged = _Judged()
        groups: dict[tuple[object, ...], list[_Place]] = {}
        for place in places:
            if self.options.needed == "consensus" and _is_decided(place):
                judged.tokens[place.turn.sequence.seq_id, place.number] = place.token_id
                continue
            groups.setdefault(_kind(place), []).append(place)
        for group in groups.values():
            _fuse(group, num_candidates, judged)
        return judged


def _in_lockstep(sequence: Sequence) -> bool:
    """Whether a sequence's next token is decided as in lockstep."""
    if sequence.drafted:
        return False
    params = sequence.request.params
    begins = sequence.num_completion_tokens == 0 or len(sequence.recipe.members) == 1
    bound = sequence.constraint is not None or sequence.num_completion_tokens < params.min_tokens
    return begins or bound or params.penalises


def _strength(guess: Drafted) -> float:
    """What a guess rests on, as a certainty."""
    assert isinstance(guess.note, float)
    return guess.note


def _readings(sequence: Sequence) -> dict[str, Ask]:
    """What assistants are asked that have yet to read any of the draft."""
    spots = [note_of(each).spots or {} for each in draft_of(sequence)]
    return {
        member: Ask(track.num_uncached, num_reading(track, [own[member] for own in spots if member in own]))
        for member, track in list(sequence.tracks.items())[1:]
        if track.num_uncached
    }


def _is_read(turn: Turn) -> bool:
    """Whether assistants were to read the draft, even if all of them are busy or have read it before."""
    main = turn.sequence.recipe.main
    return any(member != main for member in (*turn.feeds, *turn.left_out)) or is_complete(turn.sequence)


def _is_whole(turn: Turn) -> bool:
    fusion = turn.sequence.recipe.fusion
    return fusion is not None and fusion.full_vocabulary


def _chosen(
    turns: abc.Sequence[Turn], answers: Mapping[str, Answers], num_candidates: int
) -> dict[int, list[Drafted]]:
    """Sequence -> what main alone would choose behind its draft, and behind each guess; -1: not finite numbers."""
    groups: dict[tuple[str, int, int, bool], list[tuple[Turn, int, int]]] = {}  # turn, row of the block, ahead
    for turn in turns:
        main, ahead = turn.recipe.main, len(draft_of(turn.sequence))
        span = answers[main].spans[turn.feeds[main]]
        group = groups.setdefault((main, span.block, width_of(turn, num_candidates), _is_whole(turn)), [])
        group += ((turn, row, ahead + row - span.start) for row in range(span.start, span.stop))
    chosen: dict[int, list[Drafted]] = {}
    for (main, block, _, whole), group in groups.items():
        of_rows = [turn for turn, _, _ in group]
        rows = answers[main].blocks[block].rows([row for _, row, _ in group])
        rows = rows if whole else narrow_main(of_rows, rows, num_candidates)
        sequences = [turn.sequence for turn in of_rows]
        tokens = sample(
            shape(single(rows), sequences, [None] * len(group)), sequences, [ahead for _, _, ahead in group]
        )
        for i, (token, certainty) in enumerate(zip(tokens, _certainties(rows, sequences, tokens), strict=True)):
            chosen.setdefault(sequences[i].seq_id, []).append(Drafted(token, Note(_row(rows, i), certainty)))
    return chosen


def _confirmed(sequence: Sequence, chosen: list[Drafted]) -> tuple[list[Drafted], tuple[Verdict, ...]]:
    """What main has chosen as long as the guesses were right, and how they fared."""
    guesses = sequence.drafted[len(draft_of(sequence)) :]
    verdicts: list[Verdict] = []
    for guess, own in zip(guesses, chosen[:-1], strict=False):
        verdicts.append(Verdict(_strength(guess), guess.token_id == own.token_id, guess=True))
        if not verdicts[-1].kept:
            break
    right = sum(verdict.kept for verdict in verdicts)
    return chosen[: right + 1], tuple(verdicts)


def _certainties(rows: Candidates, sequences: abc.Sequence[Sequence], tokens: list[int]) -> list[float]:
    """How sure main was of its tokens: of a greedy one its distance to the next likeliest, else its probability."""
    sampled = _probabilities(rows, torch.tensor(tokens, device=rows.token_ids.device))
    best = rows.logprobs.topk(min(2, rows.logprobs.shape[1]), dim=1).values.exp()
    margins = (2 * best[:, 0] - best.sum(dim=1)).tolist() if best.shape[1] > 1 else sampled
    return [
        margin if sequence.request.params.greedy else probability
        for sequence, margin, probability in zip(sequences, margins, sampled, strict=True)
    ]


def _with_finite(turn: Turn, answers: Mapping[str, Answers]) -> Turn:
    """The turn without assistants whose numbers are not finite."""
    assistants = [member for member in turn.feeds if member != turn.sequence.recipe.main]
    broken = [
        m for m in assistants if not bool(answers[m].of(turn.feeds[m]).logprobs.amax(dim=1).isfinite().all())
    ]
    return turn.without(broken, "non_finite") if broken else turn


def _can_go_on(turn: Turn) -> bool:
    """Whether a sequence survives the loss of those whose numbers are not finite."""
    return all(
        turn.sequence.recipe.can_lose(member) for member, reason in turn.left_out.items() if reason == "non_finite"
    )


def _places(turn: Turn, answers: Mapping[str, Answers]) -> Iterator[_Place]:
    """The sound places of a draft at which all assistants have answered."""
    assistants = turn.recipe.members[1:]
    for number, drafted in enumerate(draft_of(turn.sequence)[: num_judged(turn.sequence)]):
        spots = note_of(drafted).spots or {}
        if not assistants or not all(member in spots for member in assistants):
            continue
        rows = {member: _answer(turn, member, spots[member], answers) for member in assistants}
        found = {member: row for member, row in rows.items() if row is not None}
        if len(found) == len(assistants):
            yield _Place(turn, number, drafted, found)


def _answer(turn: Turn, member: str, spot: Spot, answers: Mapping[str, Answers]) -> Candidates | None:
    """What an assistant said at a spot, now or at the end of the last reading."""
    if member in turn.feeds:
        part = answers[member].of(turn.feeds[member])
        row = len(part) - 1 - len(turn.sequence.tracks[member].completion_ids) + spot.before
        if row >= 0:
            return _row(part, row)
    ends: _Ends = turn.sequence.ends or {}  # type: ignore[assignment]
    count, said = ends.get(member, (-1, None))
    return said if count == spot.before else None


def _row(part: Candidates, row: int) -> Candidates:
    return Candidates(part.token_ids[row : row + 1], part.logprobs[row : row + 1], part.tail[row : row + 1])


def _is_decided(place: _Place) -> bool:
    """Whether the assistants agree with main's greedy token: each has it on top, or their mean of it is over 1/2.

    Then no weighted sum of distributions has another token on top. Biases and reports need the fused numbers.
    """
    params = place.turn.sequence.request.params
    if not params.greedy or params.logprobs is not None or params.logit_bias or place.turn.recipe.apart:
        return False
    tracks, main = place.turn.sequence.tracks, place.turn.sequence.main.vocabulary
    text = main.text_bytes(place.token_id)
    if not text:
        return False
    on_top, total, mean = True, 0.0, 0.0
    spots = place.note.spots or {}
    weights = dict(zip(place.turn.recipe.members, place.turn.recipe.weights, strict=True))
    for member, row in place.rows.items():
        own = spots[member].following
        top = int(greedy(row.token_ids, row.logprobs))
        on_top &= top == own or tracks[member].vocabulary.text_bytes(top) == text
        total += weights[member]
        mean += weights[member] * (_probabilities(row, torch.tensor([own]))[0] if own is not None else 0.0)
    return on_top or (total > 0 and mean / total > 0.5)


def _probabilities(rows: Candidates, tokens: Tensor) -> list[float]:
    """Each row's probability of one id, 0 where it is not among the candidates."""
    found = rows.logprobs.masked_fill(rows.token_ids != tokens.unsqueeze(1), -torch.inf)
    return found.amax(dim=1).exp().tolist()


def _kind(place: _Place) -> tuple[object, ...]:
    """Places of one kind are fused in one batch."""
    recipe = place.turn.recipe
    alone = (place.turn.sequence.seq_id, place.number) if recipe.apart else None
    fusion = recipe.fusion_key or id(recipe.fusion)
    widths = tuple((member, row.token_ids.shape[1]) for member, row in place.rows.items())
    return (recipe.model, recipe.members, fusion, widths, place.note.main.token_ids.shape[1], alone)


def _fuse(group: abc.Sequence[_Place], num_candidates: int, judged: _Judged) -> None:
    """Fuse and sample at places of one kind."""
    started = time.perf_counter()
    main = stacked([place.note.main for place in group])
    others = {member: stacked([place.rows[member] for place in group]) for member in group[0].rows}
    if not _is_whole(group[0].turn):
        others = {member: part.best(num_candidates) for member, part in others.items()}
    parts = [main, *(part.to(main.token_ids.device) for part in others.values())]
    turns = [place.turn for place in group]
    fusion = turns[0].recipe.fusion
    assert fusion is not None
    fused = fusion.fuse(parts, torch.tensor([turn.recipe.weights for turn in turns], device=main.tail.device))
    seconds = time.perf_counter() - started
    sequences = [turn.sequence for turn in turns]
    shaped = shape(fused, sequences, [None] * len(group))
    tokens = sample(shaped, sequences, [place.number for place in group])
    for i, (place, token) in enumerate(zip(group, tokens, strict=True)):
        key = place.turn.sequence.seq_id, place.number
        judged.tokens[key] = token
        judged.reports[key] = (parts, fused, i)
    judged.fusions.append(_stats(group, parts, fused, tokens, seconds))


def _failed(turn: Turn) -> Decision:
    return failed(turn, tuple(member for member, reason in turn.left_out.items() if reason == "non_finite"))


def _verdict(turn: Turn, judged: _Judged) -> tuple[tuple[Choice, ...] | None, tuple[Verdict, ...]]:
    """The tokens of a draft that was read, up to the first that was chosen otherwise; None: not finite numbers."""
    sequence = turn.sequence
    choices: list[Choice] = []
    verdicts: list[Verdict] = []
    for number, drafted in enumerate(draft_of(sequence)[: num_judged(sequence)]):
        key = sequence.seq_id, number
        token = judged.tokens.get(key, drafted.token_id)
        if token < 0:
            return None, tuple(verdicts)
        choices.append(_choice(turn, drafted, token, judged.reports.get(key)))
        verdicts.append(Verdict(note_of(drafted).certainty, token == drafted.token_id))
        if token != drafted.token_id:
            break
    return tuple(choices), tuple(verdicts)


def _ends(turn: Turn, answers: Mapping[str, Answers]) -> _Ends | None:
    """What every assistant said behind the text that it has read; None if one of them has not answered."""
    ends = {}
    for member, track in list(turn.sequence.tracks.items())[1:]:
        if member not in turn.feeds:
            return None
        last = answers[member].last([turn.feeds[member]])
        ends[member] = len(track.completion_ids), last
    return ends


def _choice(turn: Turn, drafted: Drafted, token: int, found: tuple[list[Candidates], Fused, int] | None) -> Choice:
    """A final token with the reports that its request asked for; main's own numbers where nothing was fused."""
    request, main = turn.sequence.request, turn.recipe.main
    if request.params.logprobs is None and not request.trace:
        return Choice(token)
    own = note_of(drafted).main
    parts, fused, row = found if found is not None else ([own], single(own), 0)
    scored = trace = None
    if request.params.logprobs is not None:
        scored = reports.score(fused.token_ids[row], fused.logprobs[row], token, request.params.logprobs)
    if request.trace:
        members = [main, *(member for member in turn.feeds if member != main)]
        said = dict(zip(members, parts, strict=False))
        left_out = {**turn.sequence.dropped, **turn.left_out}
        trace = reports.trace(turn.sequence.recipe, turn.sequence.tracks, said, fused, row, token, left_out)
    return Choice(token, scored, trace)


def _stats(
    group: abc.Sequence[_Place], parts: list[Candidates], fused: Fused, tokens: list[int], seconds: float
) -> FusionStats:
    """The metrics of a group. Places without a token are not counted."""
    recipe, tracks = group[0].turn.recipe, group[0].turn.sequence.tracks
    members = [recipe.main, *group[0].rows]
    sound = [i for i, token in enumerate(tokens) if token >= 0]
    chosen = {i: tracks[recipe.main].vocabulary.text_bytes(tokens[i]) for i in sound}
    agreed = {}
    for member, part in zip(members[1:], parts[1:], strict=True):
        spell, top = tracks[member].vocabulary.text_bytes, greedy(part.token_ids, part.logprobs).tolist()
        hits = sum(spell(top[i]) == chosen[i] for i in sound)
        agreed[member] = (hits, len(sound) - hits)
    top = greedy(parts[0].token_ids, parts[0].logprobs).tolist()
    unmapped = dict(zip(members, fused.unmapped[sound].t().tolist(), strict=True))
    overruled = sum(top[i] != tokens[i] for i in sound)
    return FusionStats(recipe.model, recipe.fusion_name, seconds, unmapped, agreed, overruled)
