"""The sampled mode at length: distributions by chi-square, lost and busy members, catching up, what verify serves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import pytest
import torch
from chi_square import fits, homogeneous
from fakes import (
    FakeMember,
    Records,
    byte_vocabulary,
    ensemble,
    fake_config,
    fake_engine,
    fake_loaded,
    pair_vocabulary,
    preempted,
    run,
    sequence,
    space_of,
    tokens,
)
from torch import Tensor

from ensemble_core.decoding.forms import TextForm
from ensemble_core.decoding.modes.base import Ask, Turn, choose_mode, mode_of
from ensemble_core.decoding.modes.sampled import FURTHEST, Draw, needs_pool
from ensemble_core.decoding.recipe import Recipe
from ensemble_core.decoding.requests import GenerationRequest, Output, Overrides, Weighting
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.fusion.base import FUSIONS, Fusion, build_fusion
from ensemble_core.fusion.mapping import token_map
from ensemble_core.members.base import Feed, ask
from ensemble_core.stats import DraftStats, DrawStats, DropStats, StepStats
from ensemble_core.text.vocabulary import Vocabulary

WHOLE = 1000  # candidates; more than any vocabulary here has
PROMPTS = ["abc", "deed 中文 bad", "cab " * 6, "Ωμέγα", "مرحبا", "a😀b"]
WEIGHTS = (0.5, 0.3, 0.2)
SAMPLED = SamplingParams(max_tokens=40, temperature=0.9, seed=3, ignore_eos=True)
MODE = mode_of(choose_mode("sampled", {}, "mode"))


def with_control(vocabulary: Vocabulary) -> Vocabulary:
    """One more control token at the end, which no other vocabulary has."""
    token_id = len(vocabulary)
    specials = vocabulary.special_ids | {token_id}
    return Vocabulary([*vocabulary.tokens, b"<only here>"], specials, vocabulary.stop_ids, vocabulary.encode)


def trio(**options: Any) -> list[FakeMember]:
    """Three vocabularies: bytes, pairs of letters, and longer pieces."""
    made = {"max_len": 512, **options}
    return [
        FakeMember("alpha", byte_vocabulary(), seed=1, **made),
        FakeMember("beta", pair_vocabulary(), seed=2, **made),
        FakeMember("gamma", byte_vocabulary(["abc", "ca", "中", "de", "ed "]), seed=3, **made),
    ]


def projection(members: Sequence[FakeMember]) -> Fusion:
    return build_fusion("projection", FUSIONS.parse("projection", {}, "fusion"), space_of(members))


def recipe_of(
    members: Sequence[FakeMember],
    mode: str = "sampled",
    weights: Sequence[float] = WEIGHTS,
    on_failure: Literal["fail", "drop"] = "fail",
) -> Recipe:
    shares = [weight / sum(weights[: len(members)]) for weight in weights[: len(members)]]

    @cache
    def refit(names: tuple[str, ...]) -> Fusion:
        return projection([member for member in members if member.name in names])

    return replace(
        ensemble(members, shares),
        fusion=projection(members),
        fusion_name="projection",
        mode=choose_mode(mode, {}, "mode"),
        on_failure=on_failure,
        refit=refit,
    )


def engine_tokens(
    members: Sequence[FakeMember], recipe: Recipe, prompts: Sequence[str], params: SamplingParams, **limits: Any
) -> list[list[int]]:
    engine = fake_engine(members, **limits)
    engine.add([sequence(i, prompt, members, recipe, params) for i, prompt in enumerate(prompts)])
    outputs = run(engine)
    assert all(output[-1].error is None for output in outputs.values())
    assert all(member.is_empty for member in members)
    return [tokens(outputs[i]) for i in range(len(prompts))]


class Table(FakeMember):
    """Keeps its logits, so that many samples cost little. Its last token is likely, whatever it is."""

    @cache  # noqa: B019, members live as long as a test
    def _known(self, ids: tuple[int, ...]) -> Tensor:
        logits = super().next_logits(ids)
        logits[-1] = logits.amax() - 1.0
        return logits

    def next_logits(self, ids: Sequence[int]) -> Tensor:
        return self._known(tuple(ids))


def tables() -> list[FakeMember]:
    """Three members; the last token of main and of the third ends a text, main has none for that of the second."""
    options: dict[str, Any] = {"max_len": 32, "num_pages": 1200}
    return [
        Table("alpha", byte_vocabulary(["ab"]), seed=1, **options),
        Table("beta", with_control(pair_vocabulary()), seed=2, **options),
        Table("gamma", byte_vocabulary(["abc", "ca", "de"]), seed=3, **options),
    ]


def texts(
    members: Sequence[FakeMember], recipe: Recipe, num: int, *, first: int = 0, k: int = WHOLE, **params: Any
) -> Counter[tuple[int, ...]]:
    """How often each short text comes, one seed a sample."""
    engine = fake_engine(members, num_candidates=k, max_running=500, max_waiting=num, token_budget=5000)
    made = [SamplingParams(seed=first + i, **params) for i in range(num)]
    engine.add([sequence(first + i, "ab", members, recipe, each) for i, each in enumerate(made)])
    outputs = run(engine)
    assert all(output[-1].error is None for output in outputs.values())
    return Counter(tuple(tokens(own)) for own in outputs.values())


def pool(members: Sequence[FakeMember], weights: Sequence[float], k: int, temperature: float) -> Tensor:
    """(V_main,) float64: the first token's distribution as docs/methods.md has it, by brute force."""
    main = members[0].vocabulary
    total, own = torch.zeros(len(main), dtype=torch.float64), torch.zeros(len(main), dtype=torch.float64)
    for member, weight in zip(members, weights, strict=True):
        said = ask(member, [Feed(10**6, member.vocabulary.encode("ab"))], k)
        member.release(10**6)
        logs = said.logprobs[0].double()
        masses = logs.exp() if temperature == 1.0 else (logs / temperature).softmax(dim=0)
        places = token_map(member.vocabulary, main)[said.token_ids[0]]
        found = torch.zeros(len(main), dtype=torch.float64)
        found.index_add_(0, places[places >= 0], masses[places >= 0])
        if member is members[0]:
            own = found
        total += weight * (found + masses[places < 0].sum() * own)
    return total / total.sum()


@pytest.mark.slow
def test_at_temperature_1_texts_have_the_distribution_of_lockstep() -> None:
    """20,000 texts each, whole vocabularies, members with different tokenizers."""
    members, num = tables()[:2], 20_000
    params = {"temperature": 1.0, "max_tokens": 2}
    found = texts(members, recipe_of(members), num, **params)
    assert homogeneous(found, texts(members, recipe_of(members, "lockstep"), num, first=num, **params))
    other = recipe_of(members, "lockstep", (0.3, 0.3))
    assert not homogeneous(found, texts(members, other, num, first=2 * num, **params)), "it sees no difference"


@pytest.mark.parametrize(
    ("temperature", "k"), [(1.0, WHOLE), (1.0, 4), (0.7, WHOLE), (0.7, 4), (1.4, WHOLE), (1.0, 1)]
)
def test_tokens_have_the_distribution_of_the_pool(temperature: float, k: int) -> None:
    """Members' candidates at temperature 1, without the common tail; else each member tempered before the pool."""
    members, num = tables(), 6000
    found = texts(members, recipe_of(members), num, k=k, temperature=temperature, max_tokens=1)
    expected = pool(members, WEIGHTS, k, temperature)
    assert fits(found, expected)
    assert not fits(found, pool(members, (0.8, 0.1, 0.1), k, temperature)), "it sees no difference"


@pytest.mark.parametrize("fault", ["fails_on", "nan_on"])
def test_without_a_lost_member_the_pool_is_that_of_the_others(fault: str) -> None:
    """Although only those who had drawn it lose it: what is left of their numbers is as good as new ones."""
    members, num = tables(), 5000
    recipe = recipe_of(members, on_failure="drop")
    engine = fake_engine(members, num_candidates=WHOLE, max_running=50, max_waiting=num, token_budget=5000)
    params = [SamplingParams(seed=i, max_tokens=1) for i in range(num)]
    engine.add([sequence(i, "ab", members, recipe, each) for i, each in enumerate(params)])
    getattr(members[1], fault).update(range(num))
    lost, kept = Counter[tuple[int, ...]](), Counter[tuple[int, ...]]()
    while engine.has_work:
        for _, output in engine.step():
            (lost if output.dropped else kept)[output.token_ids] += 1
    assert sum(lost.values()) > num / 5
    assert sum(kept.values()) > num / 2  # their prompts are one token, which nobody reads who is not drawn
    assert fits(lost, pool([members[0], members[2]], (5 / 7, 2 / 7), WHOLE, 1.0))


def test_seeds_make_texts_whatever_runs_beside_them() -> None:
    members, recipe = trio(), recipe_of(trio())
    together = engine_tokens(members, recipe, PROMPTS, SAMPLED)
    assert together == engine_tokens(members, recipe, PROMPTS, SAMPLED, max_running=2, token_budget=9)
    assert together == [engine_tokens(members, recipe, [prompt], SAMPLED)[0] for prompt in PROMPTS]
    other = engine_tokens(members, recipe, PROMPTS, replace(SAMPLED, seed=4))
    assert all(a != b for a, b in zip(together, other, strict=True))


@pytest.mark.parametrize("k", [3, 64])
@pytest.mark.parametrize("temperature", [0.9, 1.0])
def test_a_preempted_text_goes_on_as_it_would_have(temperature: float, k: int) -> None:
    """Also where a second member has to be asked for a token: few candidates leave much to the tails."""
    params = replace(SAMPLED, temperature=temperature)
    members = trio()
    recipe = recipe_of(members)
    expected = engine_tokens(members, recipe, PROMPTS[:3], params, num_candidates=k)
    small = trio(num_pages=7, max_len=100)
    asked = [sequence(i, prompt, small, recipe, params) for i, prompt in enumerate(PROMPTS[:3])]
    assert preempted(small, asked, k) == expected


class Watched:
    """One sequence, step by step: what each member was fed."""

    def __init__(self, members: Sequence[FakeMember], recipe: Recipe, params: SamplingParams, prompt: str) -> None:
        self.members, self.records = members, Records()
        self.engine = fake_engine(members, self.records.append)
        self.sequence = sequence(0, prompt, members, recipe, params)
        self.engine.add([self.sequence])
        self.outputs: list[Output] = []

    def step(self) -> Mapping[str, Feed]:
        before = {member.name: len(member.calls) for member in self.members}
        self.outputs += [output for _, output in self.engine.step()]
        self.engine.scheduler.check()
        return {m.name: m.calls[-1][0] for m in self.members if len(m.calls) > before[m.name]}


def test_members_that_are_not_drawn_get_no_forward() -> None:
    """Not even main. The prompt is read by all in the step that decides the first token."""
    members = trio()
    watched = Watched(members, recipe_of(members), SAMPLED, "deed bad cab")
    first = watched.step()
    assert set(first) == {"alpha", "beta", "gamma"}
    assert sorted(feed.wanted for feed in first.values()) == [0, 0, 1]
    assert watched.sequence.num_completion_tokens == 1
    drawn = Counter[str]()
    while watched.engine.has_work:
        mid_character = watched.sequence.mid_character
        (fed,) = watched.step().items()
        assert fed[1].wanted == 1
        assert fed[0] == "alpha" or not mid_character
        drawn[fed[0]] += 1
    assert drawn.total() == 39
    assert min(drawn[name] for name in ("alpha", "beta", "gamma")) >= 3
    told = Counter[str]()
    for each in watched.records.of(DrawStats):
        told.update(each.drawn)
    assert told.total() == 40
    assert all(told[name] - drawn[name] in (0, 1) for name in told)
    assert {step.mode for step in watched.records.of(StepStats)} == {"sampled"}
    assert all(each.drafted == 0 for each in watched.records.of(DraftStats))


def test_while_a_character_is_incomplete_main_decides_alone() -> None:
    members = trio()
    weights = (0.02, 0.49, 0.49)
    within = 0
    watched = Watched(members, recipe_of(members, weights=weights), replace(SAMPLED, max_tokens=120), "é中😀")
    while watched.engine.has_work:
        mid_character = watched.sequence.mid_character
        fed = watched.step()
        if mid_character and watched.sequence.num_completion_tokens > 1:
            assert [name for name, feed in fed.items() if feed.wanted] == ["alpha"]
            within += 1
    assert within > 5
    alone = sum(each.alone for each in watched.records.of(DraftStats))
    assert alone == within


def test_a_member_that_is_seldom_drawn_does_not_lie_far_behind() -> None:
    """It reads what it missed without an answer; the scheduler's books and its pages hold all along."""
    members = trio()
    recipe = recipe_of(members, weights=(0.99, 0.005, 0.005))
    watched = Watched(members, recipe, replace(SAMPLED, max_tokens=300), "abc")
    caught_up = 0
    while watched.engine.has_work:
        for name, feed in watched.step().items():
            assert len(feed.token_ids) <= FURTHEST + 1
            caught_up += name != "alpha" and feed.wanted == 0
        behind = [track.num_uncached for track in watched.sequence.tracks.values()]
        assert max(behind) <= FURTHEST + 1
    assert caught_up >= 6
    assert len(tokens(watched.outputs)) == 300


@pytest.mark.parametrize("beside", [False, True])
def test_a_member_that_only_caught_up_has_not_answered(beside: bool) -> None:
    """A number in main's tail draws it in that very step: it is asked in the next, and no neighbour's row is read."""
    members = trio()
    recipe = recipe_of(members, weights=(0.99, 0.005, 0.005))
    own = sequence(0, "abc", members, recipe, replace(SAMPLED, temperature=1.0, max_tokens=200))
    engine = fake_engine(members, num_candidates=3)
    engine.add([own])
    if beside:  # asks the member in every step
        other = recipe_of(members, weights=(0.0, 1.0, 0.0))
        engine.add([sequence(1, "deed bad", members, other, replace(SAMPLED, max_tokens=200))])
    while MODE.plan(own).get("beta") != Ask(own.tracks["beta"].num_uncached - 1, 0) or own.mid_character:
        engine.step()
        own._drawn = [0.3]
    begin, tail = main_tail(members[0], own.main.completion_ids)
    own._drawn = [0.99 * (begin + tail * 0.9925)]
    before = own.num_completion_tokens
    engine.step()
    assert isinstance(own.ends, Draw)
    assert (own.error, own.num_completion_tokens, own.ends.member) == (None, before, "beta")
    engine.step()
    assert (own.error, own.num_completion_tokens) == (None, before + 1)


def main_tail(main: FakeMember, completion: Sequence[int]) -> tuple[float, float]:
    """After "abc" and these tokens: the mass of main's three candidates that are likelier than all others together.

    And the mass of those others, the tail.
    """
    said = ask(main, [Feed(10**6, [*main.vocabulary.encode("abc"), *completion])], 3)
    main.release(10**6)
    masses, tail = said.logprobs[0].exp(), said.tail[0].exp()
    return float(masses[masses > tail].sum()), float(tail)


def test_sequences_catch_up_in_different_steps() -> None:
    members = trio()
    engine = fake_engine(members)
    recipe = recipe_of(members, weights=(0.99, 0.01, 0.0))
    params = [replace(SAMPLED, seed=i, max_tokens=200) for i in range(16)]
    engine.add([sequence(i, "abc", members, recipe, each) for i, each in enumerate(params)])
    engine.step()
    fed = []
    while engine.has_work:
        before = len(members[2].calls)
        engine.step()
        fed += [sum(len(feed.token_ids) for feed in call) for call in members[2].calls[before:]]
    assert max(fed) < 16 * FURTHEST / 4


@pytest.mark.parametrize("on_failure", ["fail", "drop"])
@pytest.mark.parametrize("fault", ["fails_on", "nan_on"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_member_that_fails(victim: int, fault: str, on_failure: Literal["fail", "drop"]) -> None:
    """As in lockstep: main ends the request, an assistant too, unless it may be lost. Others go on."""
    members, records = trio(), Records()
    recipe = recipe_of(members, on_failure=on_failure)
    engine = fake_engine(members, records.append, num_candidates=4)
    params = replace(SAMPLED, temperature=1.0)
    engine.add([sequence(i, "abc", members, recipe, replace(params, seed=i)) for i in range(2)])
    for _ in range(5):
        engine.step()
    getattr(members[victim], fault).add(0)
    outputs: dict[int, list[Output]] = {0: [], 1: []}
    while engine.has_work:
        for seq_id, output in engine.step():
            outputs[seq_id].append(output)
        engine.scheduler.check()
    last = outputs[0][-1]
    if victim == 0 or on_failure == "fail":
        assert (last.finish_reason, last.error is not None) == ("error", True)
    else:
        assert (last.finish_reason, last.num_completion_tokens) == ("length", 40)
        assert set(last.dropped) == {"beta"}
        assert records.of(DropStats)
    if fault == "nan_on":
        assert (outputs[1][-1].num_completion_tokens, outputs[1][-1].dropped) == (40, {})
    assert all(member.is_empty for member in members)


def turn_of(members: Sequence[FakeMember], number: float, fed: Sequence[str]) -> tuple[Turn, dict[str, Any]]:
    """A sequence after its prompt whose next number is given, and the answers of some members."""
    made = sequence(0, "abc", members, recipe_of(members, on_failure="drop"), SamplingParams())
    made._drawn = [number]
    answers = {m.name: m.forward([Feed(0, m.vocabulary.encode("abc"), top_k=8)]) for m in members if m.name in fed}
    for member in members:
        member.release(0)
    return Turn(made, dict.fromkeys(fed, 0)), answers


def test_who_is_busy_is_passed_over_at_this_place() -> None:
    """Another member is drawn in its stead and asked in the next step; the next place starts anew."""
    members = trio()
    turn, answers = turn_of(members, 0.6, [])
    assert set(MODE.plan(turn.sequence)) == {"beta"}
    (decision,) = MODE.decide([turn.without(["beta"], "busy")], answers, 8).decisions
    assert (decision.tokens, decision.error, decision.unsound) == ((), None, ())
    assert isinstance(decision.ends, Draw)
    assert decision.ends.member == "alpha"  # (0.6 - 0.5) / 0.3 is below 5/7
    turn.sequence.decide(decision.tokens, decision.draft, decision.ends)
    assert set(MODE.plan(turn.sequence)) == {"alpha"}
    again, answers = turn_of(members, 0.6, ["alpha"])
    (decision,) = MODE.decide([replace(again, sequence=turn.sequence)], answers, 8).decisions
    assert (len(decision.tokens), decision.ends, decision.drawn) == (1, None, "alpha")
    turn.sequence.decide(decision.tokens, decision.draft, decision.ends)
    assert turn.sequence.ends is None


def test_a_drawn_member_that_is_lost_while_it_waits_is_drawn_anew() -> None:
    members = trio()
    turn, _ = turn_of(members, 0.6, [])
    turn.sequence.decide([], ends=Draw("beta", 0.9, {}, frozenset({"gamma"})))
    assert set(MODE.plan(turn.sequence)) == {"beta"}
    turn.sequence.drop("beta", "exception")
    assert set(MODE.plan(turn.sequence)) == {"alpha"}  # gamma has been passed over


def test_a_number_that_stays_in_tails_ends_in_some_token() -> None:
    members = trio()
    turn, answers = turn_of(members, 1.0 - 2**-53, ["alpha", "beta", "gamma"])
    for said in answers.values():
        said.blocks[0].logprobs.fill_(-30.0)
        said.blocks[0].tail.fill_(-1e-12)
    (decision,) = MODE.decide([turn], answers, 8).decisions
    assert len(decision.tokens) == 1


def test_weights_by_perplexity_are_those_that_members_are_drawn_by() -> None:
    """The first token asks all members, since the weights come out of the same forwards."""
    config = fake_config(
        ("alpha", "beta"),
        ensembles={
            "duo": {
                "members": {"alpha": 0.5, "beta": 0.5},
                "main": "alpha",
                "fusion": "projection",
                "mode": "sampled",
                "weighting": {"by": "perplexity", "tau": 1e-3},
            }
        },
    )
    members = {member.name: member for member in trio()[:2]}
    loaded = fake_loaded(config, members)
    engine = loaded.engine
    made = loaded.admission.admit(GenerationRequest("r", "duo", "abc de abc de", SAMPLED))
    engine.add([made])
    while made.num_completion_tokens == 0:
        engine.step()
    counts = {name: len(member.calls) for name, member in members.items()}
    winner = made.recipe.members[made.recipe.weights.index(max(made.recipe.weights))]
    assert max(made.recipe.weights) > 0.999
    outputs = run(engine)
    assert outputs[made.seq_id][-1].num_completion_tokens == 40
    loser = members[{"alpha": "beta", "beta": "alpha"}[winner]]
    if winner == "alpha":
        assert len(loser.calls) - counts[loser.name] <= 2
    plain = loaded.admission.admit(
        GenerationRequest("r", "duo", "abc", SAMPLED, Overrides(weighting=Weighting("fixed")))
    )
    assert not plain.weighing


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.0},
        {"logprobs": 2},
        {"presence_penalty": 0.5},
        {"repetition_penalty": 1.2},
        {"logit_bias": ((97, 1.0),)},
        {"min_tokens": 5},
        {"top_k": 5},
        {"top_p": 0.9},
        {"min_p": 0.1},
    ],
)
def test_requests_that_need_the_pool_are_served_by_verify(fields: dict[str, Any]) -> None:
    params = replace(SAMPLED, **fields)
    members = trio()
    own = sequence(0, "abc", members, recipe_of(members), params)
    assert needs_pool(own)
    assert not needs_pool(sequence(0, "abc", members, recipe_of(members), SAMPLED))
    expected = engine_tokens(members, recipe_of(members, "verify"), PROMPTS[:3], params)
    assert engine_tokens(members, recipe_of(members), PROMPTS[:3], params) == expected


def test_traces_and_json_are_served_by_verify_too() -> None:
    config = fake_config(
        ("alpha", "beta"),
        ensembles={
            "duo": {"members": {"alpha": 1, "beta": 1}, "main": "alpha", "fusion": "projection", "mode": "sampled"}
        },
    )
    loaded = fake_loaded(config, {member.name: member for member in trio()[:2]})
    schema = '{"type": "object", "properties": {"a": {"enum": ["b"]}}, "required": ["a"]}'
    wanted = [
        GenerationRequest("r", "duo", "abc", SAMPLED, trace=True),
        GenerationRequest("r", "duo", "abc", replace(SAMPLED, form=TextForm("json", schema), ignore_eos=False)),
        GenerationRequest("r", "duo", "abc", replace(SAMPLED, stop=("b",), ignore_eos=False)),
    ]
    made = [loaded.admission.admit(each) for each in wanted]
    loaded.engine.add(made)
    outputs = run(loaded.engine)
    assert [needs_pool(each) for each in made] == [True, True, False]
    assert len([trace for output in outputs[made[0].seq_id] for trace in output.traces]) == 40
    assert "".join(output.text for output in outputs[made[1].seq_id]).replace(" ", "").startswith('{"a":')
    last = outputs[made[2].seq_id]
    assert (last[-1].finish_reason, last[-1].stop_reason) == ("stop", "b")
    assert "b" not in "".join(output.text for output in last)


def test_rows_of_all_modes_share_forwards() -> None:
    members = trio()
    recipes = [recipe_of(members, mode) for mode in ("sampled", "lockstep", "verify", "sampled")]
    params = [SAMPLED, SAMPLED, SAMPLED, replace(SAMPLED, temperature=0.0)]
    engine = fake_engine(members)
    engine.add(
        [
            sequence(i, PROMPTS[i], members, recipe, own)
            for i, (recipe, own) in enumerate(zip(recipes, params, strict=True))
        ]
    )
    outputs = run(engine)
    assert max(len(call) for call in members[0].calls) == 4
    for i, (recipe, own) in enumerate(zip(recipes, params, strict=True)):
        assert tokens(outputs[i]) == engine_tokens(members, recipe, [PROMPTS[i]], own)[0]


def test_one_member_alone_is_itself() -> None:
    members = trio()[:1]
    recipe = replace(ensemble(members), mode=choose_mode("sampled", {}, "mode"))
    plain = replace(recipe, mode=choose_mode("lockstep", {}, "mode"))
    found = engine_tokens(members, recipe, PROMPTS, SAMPLED, num_candidates=WHOLE)
    assert found == engine_tokens(members, plain, PROMPTS, SAMPLED, num_candidates=WHOLE)
