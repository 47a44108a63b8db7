"""The verify mode: main drafts some tokens, then every assistant reads them in one forward and the ensemble decides.

A drafted token is judged where the text before it ends with a character and on a token boundary of every assistant,
in the spelling of the text with the whole draft (the place is *sound*), unless the assistants agree with it anyway (it
is not *needed*). The first judged token that the fusion would have chosen otherwise is replaced, and what follows it
is taken back. At all other places main's token stands. Source: SAFE (arXiv 2510.15346), docs/methods.md.

A drafted token is what main alone would choose at its place with the place's own random number, and the fusion
chooses with the same number. So a sampled text is the very text that the rule gives without drafts, and the more
alike the distributions, the more often a draft stays.

A step feeds a sequence to main, which drafts one more token, or to the assistants, which read the draft. Texts whose
shaping depends on the tokens before (penalties, JSON, min_tokens) step in lockstep, and so does the first token of
every text.

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
from ensemble_core.decoding.sampler import greedy, sample
from ensemble_core.decoding.sequence import Choice, Drafted, Sequence
from ensemble_core.decoding.shaping import shape
from ensemble_core.fusion.base import Fused, single
from ensemble_core.members.base import Answers, Candidates, stacked
from ensemble_core.stats import FusionStats
from ensemble_core.text.alignment import Track

LONGEST = 8  # tokens that `auto` drafts at most: clients get them all at once
_WORTH = 0.6  # `auto` drafts on while the whole draft is likelier to stay than this


class VerifyOptions(BaseModel):
    """How drafts are made and judged."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    draft: Literal["auto"] | Annotated[int, Field(ge=1, le=16)] = Field(
        "auto", description="Tokens of a draft; auto: as many as are likely to stay, by main's certainty."
    )
    needed: Literal["consensus", "always"] = Field(
        "consensus",
        description="consensus: a greedy token with which the assistants agree is not fused; always: it is.",
    )


@dataclass(frozen=True, slots=True)
class _Note:
    """What is kept of a drafted token: what main said at its place, and whether the draft ends with it."""

    main: Candidates  # one row
    certainty: float  # main's probability of the token
    due: bool


@dataclass(frozen=True, slots=True)
class _Place:
    """A drafted token that can be judged. rows, following: assistant -> its candidates, its own next token."""

    turn: Turn
    number: int
    rows: Mapping[str, Candidates]
    following: Mapping[str, int | None]

    @property
    def note(self) -> _Note:
        """What was kept of the token."""
        return _note(self.turn.sequence.drafted[self.number])

    @property
    def token_id(self) -> int:
        """The drafted token."""
        return self.turn.sequence.drafted[self.number].token_id


@dataclass(slots=True)
class _Judged:
    """What the ensemble chose at judged places: (turn, number) -> token; -1: the numbers were not finite."""

    tokens: dict[tuple[int, int], int] = field(default_factory=dict)
    reports: dict[tuple[int, int], tuple[list[Candidates], Fused, int]] = field(default_factory=dict)
    fusions: list[FusionStats] = field(default_factory=list)


@MODES.register("verify", VerifyOptions)
@dataclass(frozen=True)
class Verify:
    """See the module's docstring."""

    options: VerifyOptions = field(default_factory=VerifyOptions)

    def plan(self, sequence: Sequence) -> Mapping[str, Ask]:
        """Main's next token, or every assistant's reading of the draft if it is due."""
        if _in_lockstep(sequence):
            return Lockstep().plan(sequence)
        if not _is_due(sequence):
            return {sequence.recipe.main: Ask(sequence.main.num_uncached)}
        num_bytes = len(b"".join(_spelt(sequence)))
        return {
            member: Ask(track.num_uncached, min(track.num_uncached, _num_reading(track, num_bytes)))
            for member, track in sequence.tracks.items()
            if member != sequence.recipe.main
        }

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
        decisions = self._draft([turn for turn in turns if not _is_due(turn.sequence)], answers, num_candidates)
        sampling = time.perf_counter() - started
        due = [_with_finite(turn, answers) for turn in turns if _is_due(turn.sequence)]
        decisions += [_failed(turn) for turn in due if not _can_go_on(turn)]
        due = [turn for turn in due if _can_go_on(turn)]
        judged = self._judge([place for turn in due for place in _places(turn, answers)], num_candidates)
        decisions += [_decision(turn, judged) for turn in due]
        return Outcome(decisions, judged.fusions, sampling)

    def _draft(
        self, turns: abc.Sequence[Turn], answers: Mapping[str, Answers], num_candidates: int
    ) -> list[Decision]:
        """Put what main alone would choose after each draft."""
        groups: dict[tuple[str, int, int, bool], list[Turn]] = {}
        for turn in turns:
            main = turn.recipe.main
            block = answers[main].spans[turn.feeds[main]].block
            key = (main, block, width_of(turn, num_candidates), _is_whole(turn))
            groups.setdefault(key, []).append(turn)
        decisions = []
        for (main, *_), group in groups.items():
            rows = answers[main].last([turn.feeds[main] for turn in group])
            if not _is_whole(group[0]):
                rows = narrow_main(group, rows, num_candidates)
            sequences, ahead = [t.sequence for t in group], [len(t.sequence.drafted) for t in group]
            tokens = sample(shape(single(rows), sequences, [None] * len(group)), sequences, ahead)
            certainties = _probabilities(rows, torch.tensor(tokens, device=rows.token_ids.device))
            for i, (turn, token, certainty) in enumerate(zip(group, tokens, certainties, strict=True)):
                note = _Note(_row(rows, i), certainty, self._ends_draft(turn.sequence, token, certainty))
                draft = (*turn.sequence.drafted, Drafted(token, note))
                decisions.append(Decision(turn.sequence, draft=draft) if token >= 0 else _failed(turn))
        return decisions

    def _ends_draft(self, sequence: Sequence, token: int, certainty: float) -> bool:
        """Whether the assistants should read the draft once `token` is its last."""
        length = len(sequence.drafted) + 1
        num_left = sequence.request.params.max_tokens - sequence.num_completion_tokens
        if length >= num_left or sequence.stops_at(token):
            return True
        if self.options.draft != "auto":
            return length >= self.options.draft
        likely = sequence.habits.survival(certainty)
        for each in sequence.drafted:
            likely *= sequence.habits.survival(_note(each).certainty)
        return likely < _WORTH or length >= LONGEST

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


def _note(drafted: Drafted) -> _Note:
    assert isinstance(drafted.note, _Note)
    return drafted.note


def _is_due(sequence: Sequence) -> bool:
    """Whether the draft is complete and ends with a whole character."""
    return bool(sequence.drafted) and any(_note(e).due for e in sequence.drafted) and not sequence.mid_character


def _is_whole(turn: Turn) -> bool:
    fusion = turn.sequence.recipe.fusion
    return fusion is not None and fusion.full_vocabulary


def _spelt(sequence: Sequence) -> list[bytes]:
    """The text of each drafted token."""
    spell = sequence.main.vocabulary.text_bytes
    return [spell(each.token_id) for each in sequence.drafted]


def _is_within_character(rest: bytes) -> bool:
    """Whether what follows a place begins within a character of UTF-8."""
    return rest[:1] != b"" and rest[0] & 0xC0 == 0x80


def _num_reading(track: Track, num_bytes: int) -> int:
    """Answers that cover the last `num_bytes` of a track's text, the place before them included."""
    return 1 + max(_ends(track, num_bytes).values())


def _ends(track: Track, num_bytes: int) -> dict[int, int]:
    """Bytes from the end of the text -> tokens from the end, of each token boundary in the last `num_bytes`."""
    spell, found, rest = track.vocabulary.text_bytes, {0: 0}, 0
    for number, token_id in enumerate(reversed(track.completion_ids), 1):
        rest += len(spell(token_id))
        if rest > num_bytes:
            break
        found.setdefault(rest, number)
    return found


def _with_finite(turn: Turn, answers: Mapping[str, Answers]) -> Turn:
    """The turn without assistants whose numbers are not finite."""
    assistants = [member for member in turn.feeds if member != turn.recipe.main]
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
    """The sound places of a draft that is due."""
    sequence, main = turn.sequence, turn.recipe.main
    assistants = [member for member in turn.feeds if member != main]
    if not assistants or not _is_due(sequence):
        return
    spelt = _spelt(sequence)
    parts = {member: answers[member].of(turn.feeds[member]) for member in assistants}
    ends = {member: _ends(sequence.tracks[member], len(b"".join(spelt))) for member in assistants}
    for number in range(len(spelt)):
        rest = b"".join(spelt[number:])
        behind = {member: ends[member].get(len(rest), -1) for member in assistants}
        if not _is_within_character(rest) and all(
            0 <= behind[member] < len(parts[member]) for member in assistants
        ):
            rows = {m: _row(parts[m], len(parts[m]) - 1 - behind[m]) for m in assistants}
            following = {
                m: sequence.tracks[m].completion_ids[-behind[m]] if behind[m] else None for m in assistants
            }
            yield _Place(turn, number, rows, following)


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
    weights = dict(zip(place.turn.recipe.members, place.turn.recipe.weights, strict=True))
    for member, row in place.rows.items():
        own = place.following[member]
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


def _decision(turn: Turn, judged: _Judged) -> Decision:
    """What becomes of a draft that is due: it stays, or what was chosen otherwise ends it."""
    sequence = turn.sequence
    unsound = tuple(member for member, reason in turn.left_out.items() if reason == "non_finite")
    choices: list[Choice] = []
    verdicts: list[Verdict] = []
    for number, drafted in enumerate(sequence.drafted):
        key = sequence.seq_id, number
        token = judged.tokens.get(key, drafted.token_id)
        if token < 0:
            return _failed(turn)
        choices.append(_choice(turn, drafted, token, judged.reports.get(key)))
        verdicts.append(Verdict(_note(drafted).certainty, token == drafted.token_id))
        if token != drafted.token_id:
            break
    return Decision(sequence, tuple(choices), unsound=unsound, verdicts=tuple(verdicts))


def _choice(turn: Turn, drafted: Drafted, token: int, found: tuple[list[Candidates], Fused, int] | None) -> Choice:
    """A final token with the reports that its request asked for; main's own numbers where nothing was fused."""
    request, main = turn.sequence.request, turn.recipe.main
    if request.params.logprobs is None and not request.trace:
        return Choice(token)
    own = _note(drafted).main
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
