"""New modes fit in one file: here a toy mode lets main draft two tokens and takes one back."""

from __future__ import annotations

from collections import abc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import pytest
from fakes import (
    FakeMember,
    Records,
    byte_vocabulary,
    ensemble,
    fake_engine,
    pair_vocabulary,
    run,
    sequence,
    tokens,
)
from pydantic import BaseModel, ConfigDict

from ensemble_core.decoding.modes.base import MODES, Ask, Decision, Outcome, Turn, choose_mode, mode_of
from ensemble_core.decoding.modes.lockstep import Lockstep
from ensemble_core.decoding.recipe import ModeChoice
from ensemble_core.decoding.rhythm import Beat
from ensemble_core.decoding.sampler import greedy
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.decoding.sequence import Choice, Drafted, Phase, Sequence
from ensemble_core.errors import ConfigError, UnknownStrategyError
from ensemble_core.members.base import Answers
from ensemble_core.stats import MIXED, StepStats

GREEDY = SamplingParams(max_tokens=23, temperature=0.0)


@dataclass(frozen=True)
class DraftTwo:
    """Main drafts two tokens, then every member reads both; the first is kept, the second taken back."""

    def prospect(self, sequence: Sequence) -> None:
        """Its steps do not depend on the beat."""

    def drafter(self, sequence: Sequence) -> str:
        return sequence.recipe.main

    def plan(self, sequence: Sequence, beat: Beat | None = None) -> Mapping[str, Ask]:
        members = sequence.recipe.members
        asked = members[:1] if len(sequence.drafted) < 2 or sequence.mid_character else members
        return {member: Ask(sequence.tracks[member].num_uncached) for member in asked}

    def decide(self, turns: abc.Sequence[Turn], answers: Mapping[str, Answers], num_candidates: int) -> Outcome:
        return Outcome([self._decision(turn, answers) for turn in turns])

    def _decision(self, turn: Turn, answers: Mapping[str, Answers]) -> Decision:
        draft = turn.sequence.drafted
        if len(draft) == 2:
            return Decision(turn.sequence, (Choice(draft[0].token_id),))
        main = turn.sequence.recipe.main
        found = answers[main].last([turn.feeds[main]])
        best = greedy(found.token_ids, found.logprobs).tolist()
        return Decision(turn.sequence, draft=(*draft, *map(Drafted, best)))


class DraftTwoOptions(BaseModel):
    """No options."""

    model_config = ConfigDict(extra="forbid", frozen=True)


DRAFT_TWO = ModeChoice("draft-two")


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Register the toy mode for these tests only."""
    monkeypatch.setattr(MODES, "_entries", dict(MODES._entries))
    MODES.register("draft-two", DraftTwoOptions)(lambda options: DraftTwo())
    yield
    mode_of.cache_clear()


def pair() -> list[FakeMember]:
    return [
        FakeMember("alpha", byte_vocabulary(), seed=1),
        FakeMember("beta", pair_vocabulary(), seed=2),
    ]


@pytest.mark.parametrize("prompts", [["abc"], ["abc", "deed 中文 bad", "cab " * 12, "a"]])
def test_a_mode_of_one_file_drafts_and_takes_back(prompts: list[str]) -> None:
    """Clients get each final token once, and no other: main's greedy tokens, whatever was taken back."""
    members, records = pair(), Records()
    engine = fake_engine(members, records.append)
    recipe = replace(ensemble(members), mode=DRAFT_TWO)
    requests = [sequence(i, prompt, members, recipe, GREEDY) for i, prompt in enumerate(prompts)]
    engine.add(requests)
    outputs = run(engine)
    assert all(member.is_empty for member in members)
    for i, prompt in enumerate(prompts):
        alone = [pair()[0]]
        other = fake_engine(alone)
        other.add([sequence(0, prompt, alone, ensemble(alone), GREEDY)])
        assert tokens(outputs[i]) == tokens(run(other)[0])
        assert outputs[i][-1].num_completion_tokens == len(tokens(outputs[i])) == 23
        assert requests[i].drafted == ()
    assert members[0].rollbacks, "main never took a token back"
    assert members[1].rollbacks, "the assistant never read a draft that was taken back"
    assert {step.mode for step in records.of(StepStats)} == {"draft-two"}


def test_an_assistant_reads_the_draft() -> None:
    members = pair()
    engine = fake_engine(members)
    request = sequence(0, "abc", members, replace(ensemble(members), mode=DRAFT_TWO), GREEDY)
    engine.add([request])
    read = 0
    while engine.has_work:
        engine.step()
        if request.phase is Phase.DECODE and len(request.drafted) == 2 and not request.mid_character:
            text, _ = request.spelling
            spell = request.main.vocabulary.tokens
            assert text.encode() == b"".join(spell[i] for i in request.main.completion_ids)
            assert request.tracks["beta"].completion_ids == members[1].vocabulary.encode(text)
            read += 1
    assert read > 10


def test_modes_share_a_step() -> None:
    """Each mode decides its own sequences, which get what they would get alone."""
    members, records = pair(), Records()
    engine = fake_engine(members, records.append)
    recipe = ensemble(members)
    engine.add(
        [
            sequence(0, "abc", members, recipe, GREEDY),
            sequence(1, "abc", members, replace(recipe, mode=DRAFT_TWO), GREEDY),
        ]
    )
    together = run(engine)
    assert MIXED in {step.mode for step in records.of(StepStats)}
    for seq_id, mode in enumerate((ModeChoice(), DRAFT_TWO)):
        again = pair()
        other = fake_engine(again)
        other.add([sequence(seq_id, "abc", again, replace(ensemble(again), mode=mode), GREEDY)])
        assert tokens(together[seq_id]) == tokens(run(other)[seq_id])


def test_a_sequence_that_ends_within_a_draft_tells_final_tokens_alone() -> None:
    members = pair()
    request = sequence(
        0, "abc", members, ensemble(members), SamplingParams(max_tokens=9, temperature=0.0, stop="b" and ("b",))
    )
    request.decide([], draft=[Drafted(100), Drafted(98), Drafted(99)])
    assert (request.num_completion_tokens, len(request.drafted), request.take().token_ids) == (0, 3, ())
    request.decide([Choice(100), Choice(98)], draft=[Drafted(99)])
    last = request.take()
    assert (last.text, last.token_ids, last.finish_reason, last.num_completion_tokens) == (
        "d",
        (100, 98),
        "stop",
        2,
    )
    assert request.main.completion_ids == [100, 98]


def test_unknown_modes_and_options_are_refused_by_name() -> None:
    known = r"here.name: unknown mode 'warp'; known are \['draft-two', 'lockstep', 'sampled', 'verify'\]"
    with pytest.raises(UnknownStrategyError, match=known):
        choose_mode("warp", {}, "here")
    for name in ("lockstep", "draft-two"):
        with pytest.raises(ConfigError, match=r"here\.options\.speed"):
            choose_mode(name, {"speed": 9}, "here")
    says = r"^here\.options\.draft: Input should be 'auto', or .* less than or equal to 16 \(given: 17\)$"
    with pytest.raises(ConfigError, match=says):
        choose_mode("verify", {"draft": 17}, "here")
    assert mode_of(choose_mode("lockstep", {}, "here")) == Lockstep()
    assert mode_of(choose_mode("draft-two", {}, "here")) == DraftTwo()
