"""What main drafts: its own choices behind the draft, and how guesses of them fared.

Knows main's candidates and the sampler; does not know assistants, fusions or what becomes of a draft.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Mapping
from dataclasses import replace

import torch

from ensemble_core.decoding.habits import Verdict
from ensemble_core.decoding.modes.base import Turn
from ensemble_core.decoding.modes.judging import is_plain, is_whole, probabilities, row_of
from ensemble_core.decoding.modes.lockstep import narrow_main, width_of
from ensemble_core.decoding.modes.places import Note, draft_of, note_of
from ensemble_core.decoding.reports import named
from ensemble_core.decoding.sampler import sample
from ensemble_core.decoding.sequence import Drafted, Sequence
from ensemble_core.decoding.shaping import shape
from ensemble_core.fusion.base import Certifying, lead, single
from ensemble_core.members.base import Answers, Candidates

_GUESSES = 7  # at most


def chosen_by_main(
    turns: abc.Sequence[Turn], answers: Mapping[str, Answers], num_candidates: int, certificates: bool
) -> dict[int, list[Drafted]]:
    """Sequence -> what main alone would choose behind its draft, and behind each guess; -1: not finite numbers.

    certificates: say of which tokens it is certain that no assistant could change them.
    """
    groups: dict[tuple[object, ...], list[tuple[Turn, int, int]]] = {}  # turn, row of the block, ahead
    for turn in turns:
        recipe, ahead = turn.recipe, len(draft_of(turn.sequence))
        span = answers[recipe.main].spans[turn.feeds[recipe.main]]
        fusion = recipe.fusion_key or id(recipe.fusion)
        width = width_of(turn, num_candidates)
        key = recipe.main, span.block, width, len(recipe.members), fusion, id(recipe.gate)
        groups.setdefault(key, []).extend(
            (turn, row, ahead + row - span.start) for row in range(span.start, span.stop)
        )
    chosen: dict[int, list[Drafted]] = {}
    for group in groups.values():
        of_rows = [turn for turn, _, _ in group]
        span = answers[of_rows[0].recipe.main].spans[of_rows[0].feeds[of_rows[0].recipe.main]]
        wide = answers[of_rows[0].recipe.main].blocks[span.block].rows([row for _, row, _ in group])
        rows = wide if is_whole(of_rows[0]) else narrow_main(of_rows, wide, num_candidates)
        sequences = [turn.sequence for turn in of_rows]
        tokens = sample(
            shape(single(rows), sequences, [turn.mask for turn in of_rows]),
            sequences,
            [ahead for _, _, ahead in group],
        )
        sure = _certified(of_rows, rows) if certificates else [False] * len(group)
        sure_of = certainties(rows, sequences, tokens)
        for i, (token, certainty) in enumerate(zip(tokens, sure_of, strict=True)):
            told = named(sequences[i].request.params, wide, i, rows.tail[i])
            note = Note(row_of(rows, i), certainty, certified=sure[i], named=told)
            chosen.setdefault(sequences[i].seq_id, []).append(Drafted(token, note))
    return chosen


def _certified(turns: abc.Sequence[Turn], rows: Candidates) -> list[bool]:
    """Rows at which main's greedy token is the ensemble's. Shaping and reports need the fused numbers."""
    fusion = turns[0].recipe.fusion
    unshaped = [is_plain(turn) for turn in turns]
    if not isinstance(fusion, Certifying) or not any(unshaped):
        return [False] * len(turns)
    weights = torch.tensor([turn.recipe.weights for turn in turns], device=rows.tail.device)
    if turns[0].recipe.gate is not None:  # what assistants say sets the weights: main may have none
        weights[:, 0] = 0.0
    pairs = zip(fusion.certified(rows, weights).tolist(), unshaped, strict=True)
    return [certified and plain for certified, plain in pairs]


def confirmed(sequence: Sequence, chosen: list[Drafted]) -> tuple[list[Drafted], tuple[Verdict, ...]]:
    """What main has chosen as long as the guesses were right, and how they fared."""
    guesses = sequence.drafted[len(draft_of(sequence)) :]
    verdicts: list[Verdict] = []
    for guess, own in zip(guesses, chosen[:-1], strict=False):
        verdicts.append(Verdict(strength(guess), guess.token_id == own.token_id, guess=True))
        if not verdicts[-1].kept:
            break
    right = sum(verdict.kept for verdict in verdicts)
    guessed = [replace(each, note=replace(note_of(each), guessed=True)) for each in chosen[:right]]
    return [*guessed, *chosen[right : right + 1]], tuple(verdicts)


def spelt_guesses(
    sequence: Sequence, num_final: int, draft: abc.Sequence[Drafted], pieces: abc.Sequence[tuple[str, float]]
) -> list[Drafted]:
    """Main's tokens for a text that may follow the draft, in pieces with their certainties.

    num_final: tokens before the draft that become final now.
    """
    left = _room(sequence, num_final + len(draft))
    sure = [certainty for text, certainty in pieces for _ in text.encode()]
    ids = sequence.main.vocabulary.encode("".join(text for text, _ in pieces))
    guesses, begin = list[Drafted](), 0
    for token_id in ids[:left]:
        end = begin + len(sequence.main.vocabulary.text_bytes(token_id))
        guesses.append(Drafted(token_id, min(sure[begin:end], default=0.0), held=True, guess=True))
        begin = end
    return guesses


def with_guesses(sequence: Sequence, final: abc.Sequence[int], draft: tuple[Drafted, ...]) -> tuple[Drafted, ...]:
    """The draft, and guesses behind it. final: the tokens before the draft that become final now."""
    ids = [*final, *(each.token_id for each in draft)]
    left = _room(sequence, len(ids))
    ends = bool(ids) and ((bool(draft) and draft[-1].held) or sequence.stops_at(ids[-1]))
    if sequence.cramped or sequence.is_bound or ends or not left:
        return draft
    length, guesses = sequence.guess(ids, min(_GUESSES, left))
    return (*draft, *(Drafted(token_id, length / 10, held=True, guess=True) for token_id in guesses))


def _room(sequence: Sequence, count: int) -> int:
    """How many guesses may stand behind so many tokens: one place is main's own."""
    return max(sequence.request.params.max_tokens - sequence.num_completion_tokens - count - 1, 0)


def strength(guess: Drafted) -> float:
    """What a guess rests on, as a certainty."""
    assert isinstance(guess.note, float)
    return guess.note


def certainties(rows: Candidates, sequences: abc.Sequence[Sequence], tokens: list[int]) -> list[float]:
    """How sure a drafter was of its tokens: a greedy one's lead over the next likeliest, else its probability."""
    sampled = probabilities(rows, torch.tensor(tokens, device=rows.token_ids.device))
    first, second = lead(rows)
    margins = (first.exp() - second.exp()).tolist()
    return [
        margin if sequence.request.params.greedy else probability
        for sequence, margin, probability in zip(sequences, margins, sampled, strict=True)
    ]
