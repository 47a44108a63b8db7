"""An assistant whose context is full drops out, at the prompt or later, and the text goes on as without it."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
from fakes import (
    Bench,
    FakeMember,
    Records,
    byte_vocabulary,
    fake_config,
    fake_engine,
    fake_loaded,
    pair_vocabulary,
    run,
    space_of,
    tokens,
)
from rule import K, Reference, recipe_of, sequence

from ensemble_core.config import EnsembleConfig
from ensemble_core.decoding.recipe import Recipe
from ensemble_core.decoding.requests import GenerationRequest, Output, Overrides, Prompt, Weighting, join
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.decoding.sequence import Sequence
from ensemble_core.errors import InvalidRequestError
from ensemble_core.fusion.base import FUSIONS, build_fusion, single
from ensemble_core.recipes import list_models
from ensemble_core.stats import DropStats, HealthStats, PreemptionStats
from ensemble_core.text.prompt import PromptEncoder

MODES: dict[str, tuple[str, dict[str, Any]]] = {
    "lockstep": ("lockstep", {}),
    "shared": ("lockstep", {"positions": "shared"}),
    "verify": ("verify", {}),
    "long drafts": ("verify", {"draft": 6}),
    "lookup": ("verify", {"drafter": "lookup"}),
    "relay": ("verify", {"drafter": "beta", "draft": 4}),
    "sampled": ("sampled", {}),
}
GREEDY = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=60, temperature=1.0, seed=5, ignore_eos=True)


class Narrow(Bench):
    """Three members; beta's context is short. `ends` ends where it is full."""

    def __init__(self, max_len: int = 30, roomy: int = 200, pages: tuple[int, int, int] = (1024,) * 3) -> None:
        kinds = {
            "alpha": pair_vocabulary(),
            "beta": byte_vocabulary(),
            "gamma": byte_vocabulary(("ab", "cd", " e")),
        }
        members = {
            name: FakeMember(name, kinds[name], seed=seed, max_len=length, num_pages=num)
            for seed, (name, length, num) in enumerate(zip(kinds, (roomy, max_len, roomy), pages, strict=True), 1)
        }
        base = {"members": {"alpha": 0.5, "beta": 0.25, "gamma": 0.25}, "main": "alpha"}
        base |= {"fusion": {"name": "projection"}}
        contrastive = {"name": "contrastive", "options": {"expert": "beta", "base": "gamma", "alpha": 0.5}}
        ensembles = {
            "trio": base,
            "ends": base | {"on_full_context": "end"},
            "tied": base | {"fusion": contrastive},
        }
        self.records = Records()
        config = fake_config(tuple(members), ensembles=ensembles, scheduler={"num_candidates": K})
        super().__init__(fake_loaded(config, members, self.records.append), members)

    def add(
        self,
        prompt: Prompt,
        params: SamplingParams = GREEDY,
        model: str = "trio",
        mode: str = "lockstep",
        **overrides: Any,
    ) -> Sequence:
        name, options = MODES[mode]
        chosen = Overrides(mode=name, mode_options=options, **overrides)
        made = self.loaded.admission.admit(GenerationRequest("r", model, prompt, params, chosen))
        self.engine.add([made])
        return made

    def answer(self, made: Sequence) -> Output:
        return join(self.outputs[made.seq_id])


def answer(
    prompt: Prompt, params: SamplingParams = GREEDY, max_len: int = 30, roomy: int = 200, **more: Any
) -> Output:
    bench = Narrow(max_len, roomy)
    made = bench.add(prompt, params, **more)
    bench.run()
    return bench.answer(made)


LONG = "abc de " * 6


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, replace(GREEDY, echo=True, logprobs=2)])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "relay"])
def test_a_prompt_that_is_too_long_for_an_assistant_is_read_by_the_others(
    mode: str, params: SamplingParams
) -> None:
    told = answer(LONG, params, mode=mode)
    assert told.dropped == {"beta": "full"}
    smaller = answer(LONG, params, mode=mode, members=("alpha", "gamma"))
    assert replace(told, dropped={}) == smaller
    assert told.num_completion_tokens == 60


@pytest.mark.parametrize(("length", "dropped"), [(29, {}), (30, {"beta": "full"}), (31, {"beta": "full"})])
def test_an_assistant_stays_while_it_has_room_for_a_token(length: int, dropped: dict[str, str]) -> None:
    assert answer("." * length, replace(GREEDY, max_tokens=1)).dropped == dropped
    scored = SamplingParams(max_tokens=0, echo=True, logprobs=1)
    assert answer("." * length, scored).dropped == ({} if length <= 30 else {"beta": "full"})


def test_a_prompt_beyond_all_spelling_is_not_spelt_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    spell = PromptEncoder.tokenize

    def noted(self: PromptEncoder, text: str, add_special_tokens: bool = True) -> list[int]:
        read.append(len(text))
        return spell(self, text, add_special_tokens)

    monkeypatch.setattr(PromptEncoder, "tokenize", noted)
    assert answer("ab" * 1050, replace(GREEDY, max_tokens=1), max_len=8, roomy=2200).dropped == {"beta": "full"}
    assert len(read) == 2  # alpha and gamma


def test_the_whole_answer_of_main_alone_where_the_fusion_needs_the_lost_member() -> None:
    told = answer(LONG, model="tied")
    assert told.dropped == {"beta": "full", "gamma": "idle"}
    bench = Narrow()
    alone = bench.loaded.admission.admit(GenerationRequest("r", "alpha", LONG, GREEDY))
    bench.engine.add([alone])
    bench.run()
    assert bench.answer(alone).token_ids == told.token_ids


def test_weights_by_perplexity_are_of_those_that_read_the_prompt() -> None:
    bench = Narrow()
    made, smaller = (
        bench.add(LONG, weighting=Weighting("perplexity", 0.5), members=members)
        for members in (None, ("alpha", "gamma"))
    )
    bench.run()
    assert made.recipe.members == ("alpha", "gamma")
    assert made.recipe.weights == smaller.recipe.weights != (2 / 3, 1 / 3)


def test_all_choices_of_a_prompt_lose_it_and_each_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    bench = Narrow()
    params = replace(SAMPLED, max_tokens=3)
    requests = [GenerationRequest(f"r-{i}", "trio", LONG, replace(params, seed=i), group="g") for i in range(3)]
    made = bench.loaded.admission.admit_all(requests)
    with caplog.at_level(logging.INFO):
        bench.engine.add(made)
        bench.run()
    assert all(bench.answer(each).dropped == {"beta": "full"} for each in made)
    assert bench.records.of(DropStats) == [DropStats("trio", "beta", "full")] * 3
    assert not bench.records.of(HealthStats)
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    assert made[0].recipe.fusion is made[1].recipe.fusion


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_left_of_it_and_the_answer_is_whole(mode: str, params: SamplingParams) -> None:
    bench = Narrow()
    made, other = bench.add("abc", params, mode=mode), bench.add("cab", replace(params, max_tokens=5), mode=mode)
    bench.run()
    assert bench.answer(made).dropped == {"beta": "full"}
    assert (bench.answer(made).finish_reason, bench.answer(made).num_completion_tokens) == ("length", 60)
    assert bench.answer(other).dropped == {}
    assert bench.records.of(DropStats) == [DropStats("trio", "beta", "full")]
    assert all(
        (feed.keep or 0) + len(feed.token_ids) <= 30 for call in bench.members["beta"].calls for feed in call
    )


@pytest.mark.parametrize("prompt", ["abc", "cab ", "deed 中文 bad"])
def test_after_the_drop_the_text_is_that_of_the_smaller_ensemble(prompt: str) -> None:
    """Before it as with all members; after it as the smaller ensemble goes on from the same text."""
    bench = Narrow()
    made = bench.add(prompt, replace(GREEDY, logprobs=2))
    while not made.dropped or made.spelt.mid_character:
        bench.step()
    before, so_far = made.num_completion_tokens, made.main.prompt_ids + made.main.completion_ids
    bench.run()
    told = bench.answer(made).token_ids
    roomy = answer(prompt, replace(GREEDY, logprobs=2), max_len=200)
    assert roomy.dropped == {}
    assert told[:before] == roomy.token_ids[:before]
    rest = answer(tuple(so_far), replace(GREEDY, max_tokens=60 - before), members=("alpha", "gamma"))
    assert told[before:] == rest.token_ids
    assert 0 < before < 60


class Shrinking(Reference):
    """The slow rule, with members that leave once the text with the next token is too long for them."""

    def run(self, consensus: bool) -> list[int]:
        """One token at a time; without others main decides alone."""
        self.final.append(self.choose(self.fuse([self.answer(m, []) for m in (self.main, *self.others)]), 0))
        while len(self.final) < self.params.max_tokens:
            while full := self.full(self.draft()):
                self.lose(full)
            if self.others:
                self.judge(self.draft(), consensus)
            else:
                self.final.append(self.choose(single(self.answer(self.main, self.final)), len(self.final)))
        return self.final

    def full(self, draft: list[int]) -> list[FakeMember]:
        """The first member that cannot hold the text, or the text with the draft."""
        before, (after, within) = self.text(self.final)[0], self.text(self.final + draft)
        for text in (before, before if within else after):
            for member in self.others:
                spell = member.vocabulary.encode
                if len(spell(self.prompt)) + len(spell(text)) > member.max_len:
                    return [member]
        return []

    def lose(self, full: list[FakeMember]) -> None:
        gone = {member.name for member in full}
        self.others = [member for member in self.others if member.name not in gone]
        if self.others:
            self.recipe = self.recipe.without(gone)


def narrow(lengths: tuple[int, int]) -> list[FakeMember]:
    return [
        FakeMember("alpha", byte_vocabulary(), seed=1, max_len=512),
        FakeMember("beta", pair_vocabulary(), seed=2, max_len=lengths[0]),
        FakeMember("gamma", byte_vocabulary(["abc", "ca", "中", "de", "ed "]), seed=3, max_len=lengths[1]),
    ]


def dropping(members: list[FakeMember], recipe: Recipe) -> Recipe:
    def refit(names: tuple[str, ...]) -> Any:
        left = [member for member in members if member.name in names]
        return build_fusion("projection", FUSIONS.parse("projection", {}, "fusion"), space_of(left))

    return replace(recipe, on_full="drop", refit=refit)


@pytest.mark.parametrize("lengths", [(400, 20), (18, 34), (12, 12)])
@pytest.mark.parametrize("params", [GREEDY, replace(SAMPLED, temperature=0.8)], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "options",
    [{}, {"draft": 5, "lookup": False}, {"needed": "always", "acceptance": "common"}],
)
def test_drafts_end_in_the_text_of_the_slow_rule(
    options: dict[str, Any], params: SamplingParams, lengths: tuple[int, int]
) -> None:
    members = narrow(lengths)
    recipe = dropping(members, recipe_of(members, "projection", certificates=False, **options))
    engine = fake_engine(members, num_candidates=K)
    made = sequence(0, "abc de", members, recipe, replace(params, max_tokens=44))
    engine.add([made])
    outputs = run(engine)
    slow = narrow(lengths)
    rule = dropping(slow, recipe_of(slow, "projection", certificates=False, **options))
    params = replace(params, max_tokens=44)
    reference = Shrinking(slow, rule, "abc de", params)
    assert tokens(outputs[0]) == reference.run(consensus=options.get("needed") != "always")
    assert made.dropped == {member.name: "full" for member in members[1:] if member.max_len < 100}
    assert all(member.is_empty for member in members)


def test_where_it_ends_it_ends_as_before() -> None:
    told = answer("abc", model="ends")
    assert (told.finish_reason, told.dropped) == ("length", {})
    assert told.num_completion_tokens < 60
    with pytest.raises(InvalidRequestError, match="'beta'") as caught:
        answer(LONG, model="ends")
    assert caught.value.param == "prompt"


def test_what_is_advertised_can_be_served() -> None:
    bench = Narrow()
    config = fake_config(
        ("alpha", "beta"),
        ensembles={
            name: {"members": {"alpha": 1, "beta": 1}, "main": "alpha", "on_full_context": policy}
            for name, policy in (("drops", "drop"), ("ends", "end"))
        },
    )
    found = {each.name: each for each in list_models(config, {"alpha": 200, "beta": 30})}
    assert {name: found[name].max_model_len for name in ("drops", "ends")} == {"drops": 200, "ends": 30}
    assert found["drops"].recipe["on_full_context"] == "drop"  # type: ignore[index]
    ids = tuple(bench.members["alpha"].vocabulary.encode("a"))
    window = SamplingParams(max_tokens=1, temperature=0.0, echo=True, logprobs=1)
    assert len(answer(ids * 199, window).prompt_logprobs) == 199
    assert EnsembleConfig(members={"a": 1.0}, main="a").on_full_context == "drop"


def test_preempted_sequences_lose_it_at_the_same_place() -> None:
    prompts = ("abc", "cab ", "bad", "de", "a\n")
    expected = [answer(prompt) for prompt in prompts]
    tight = Narrow(pages=(13, 10, 13))
    made = [tight.add(prompt) for prompt in prompts]
    tight.run()
    assert tight.records.of(PreemptionStats)
    assert [tight.answer(each).token_ids for each in made] == [each.token_ids for each in expected]
    assert [tight.answer(each).dropped for each in made] == [{"beta": "full"}] * len(prompts)
