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
from dataclasses import dataclass, field, replace
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
    held,
    hold,
    is_complete,
    located,
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
        length, habits, likely = len(sequence.drafted), sequence.habits, 1.0
        for each in sequence.drafted:
            likely *= habits.survival(note_of(each).certainty)
        fixed = self.options.draft != "auto"
        longest = self.options.draft if isinstance(self.options.draft, int) else LONGEST
        complete, unread = is_complete(sequence), num_judged(sequence)
        due = unread > 0 and (complete or sequence.cramped or length >= longest)
        return Prospect(unread, likely, habits.average, due, fixed and length < longest, complete)

    def plan(self, sequence: Sequence, beat: Beat = Beat()) -> Mapping[str, Ask]:  # noqa: B008, it is frozen
        """Main's next token, every assistant's reading of the draft, or both."""
        if _in_lockstep(sequence):
            return Lockstep().plan(sequence)
        main = {sequence.recipe.main: Ask(sequence.main.num_uncached)}
        readings = _readings(sequence) if beat.read and num_judged(sequence) else {}
        return readings if readings and (is_complete(sequence) or not beat.draft) else main | readings

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
        drafts = {turn.sequence.seq_id: located(turn.sequence) for turn in turns}
        more = _more([turn for turn in turns if turn.recipe.main in turn.feeds], answers, num_candidates)
        sampling = time.perf_counter() - started
        read = [_with_finite(turn, answers) for turn in turns if _is_read(turn)]
        lost = [turn for turn in read if not _can_go_on(turn)]
        read = [turn for turn in read if _can_go_on(turn)]
        places = [place for turn in read for place in _places(turn, drafts[turn.sequence.seq_id], answers)]
        judged = self._judge(places, num_candidates)
        decisions = [_failed(turn) for turn in lost]
        decisions += [_verdict(turn, drafts[turn.sequence.seq_id], more, judged, answers) for turn in read]
        for turn in turns:
            if not _is_read(turn):
                draft = drafts[turn.sequence.seq_id]
                decisions.append(_drafted(turn, draft, more.get(turn.sequence.seq_id)))
        return Outcome(decisions, judged.fusions, sampling)

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


def _readings(sequence: Sequence) -> dict[str, Ask]:
    """What assistants are asked that have yet to read any of the draft."""
    spots = [note_of(each).spots or {} for each in located(sequence)]
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


def _more(turns: abc.Sequence[Turn], answers: Mapping[str, Answers], num_candidates: int) -> dict[int, Drafted]:
    """Sequence -> what main alone would choose behind its draft; -1: the numbers were not finite."""
    groups: dict[tuple[str, int, int, bool], list[Turn]] = {}
    for turn in turns:
        main = turn.recipe.main
        block = answers[main].spans[turn.feeds[main]].block
        groups.setdefault((main, block, width_of(turn, num_candidates), _is_whole(turn)), []).append(turn)
    drafted = {}
    for (main, _, _, whole), group in groups.items():
        rows = answers[main].last([turn.feeds[main] for turn in group])
        rows = rows if whole else narrow_main(group, rows, num_candidates)
        sequences, ahead = [t.sequence for t in group], [len(t.sequence.drafted) for t in group]
        tokens = sample(shape(single(rows), sequences, [None] * len(group)), sequences, ahead)
        certainties = _certainties(rows, sequences, tokens)
        for i, (turn, token, certainty) in enumerate(zip(group, tokens, certainties, strict=True)):
            drafted[turn.sequence.seq_id] = Drafted(token, Note(_row(rows, i), certainty))
    return drafted


def _certainties(rows: Candidates, sequences: abc.Sequence[Sequence], tokens: list[int]) -> list[float]:
    """How sure main was of its tokens: of a greedy one its distance to the next likeliest, else its probability."""
    sampled = _probabilities(rows, torch.tensor(tokens, device=rows.token_ids.device))
    best = rows.logprobs.topk(min(2, rows.logprobs.shape[1]), dim=1).values.exp()
    margins = (2 * best[:, 0] - best.sum(dim=1)).tolist() if best.shape[1] > 1 else sampled
    return [
        margin if sequence.request.params.greedy else probability
        for sequence, margin, probability in zip(sequences, margins, sampled, strict=True)
    ]


def _drafted(turn: Turn, draft: tuple[Drafted, ...], more: Drafted | None) -> Decision:
    """The decision of a turn that was not read: what main drafted follows the draft."""
    sequence = turn.sequence
    assert more is not None, "a turn that is not read is fed to main"
    if more.token_id < 0:
        return _failed(turn)
    longer = (*draft, more)
    return Decision(
        sequence, draft=held(longer, sequence.num_spelt) if hold(sequence, draft, more.token_id) else longer
    )


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


def _places(turn: Turn, draft: tuple[Drafted, ...], answers: Mapping[str, Answers]) -> Iterator[_Place]:
    """The sound places of a draft at which all assistants have answered."""
    assistants = turn.recipe.members[1:]
    for number, drafted in enumerate(draft[: num_judged(turn.sequence)]):
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


def _verdict(
    turn: Turn,
    draft: tuple[Drafted, ...],
    more: Mapping[int, Drafted],
    judged: _Judged,
    answers: Mapping[str, Answers],
) -> Decision:
    """What becomes of a draft that was read: it stays, or what was chosen otherwise ends it."""
    sequence = turn.sequence
    unsound = tuple(member for member, reason in turn.left_out.items() if reason == "non_finite")
    choices: list[Choice] = []
    verdicts: list[Verdict] = []
    for number, drafted in enumerate(draft[: num_judged(sequence)]):
        key = sequence.seq_id, number
        token = judged.tokens.get(key, drafted.token_id)
        if token < 0:
            return _failed(turn)
        choices.append(_choice(turn, drafted, token, judged.reports.get(key)))
        verdicts.append(Verdict(note_of(drafted).certainty, token == drafted.token_id))
        if token != drafted.token_id:
            return Decision(sequence, tuple(choices), unsound=unsound, verdicts=tuple(verdicts))
    rest = tuple(replace(each, held=False) for each in draft[num_judged(sequence) :])
    following = more.get(sequence.seq_id)
    if following is not None and not is_complete(sequence):
        if following.token_id < 0:
            return _failed(turn)
        rest = (*rest, following)
    return Decision(sequence, tuple(choices), rest, _ends(turn, answers), unsound, verdicts=tuple(verdicts))


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
