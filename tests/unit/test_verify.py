"""The verify mode against a slow, plain reference of its rule, and against lockstep where both must agree."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest
from chi_square import homogeneous
from fakes import (
    FakeMember,
    Records,
    byte_vocabulary,
    fake_engine,
    preempted,
    run,
    sequence,
    space_of,
    tokens,
)
from rule import OPTIONS, PROMPTS, K, Reference, engine_tokens, in_lockstep, losing, recipe_of, trio

from ensemble_core.decoding.modes.base import choose_mode
from ensemble_core.decoding.requests import Output
from ensemble_core.decoding.rhythm import Beat, Prospect, Rhythm
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.fusion.base import FUSIONS, build_fusion
from ensemble_core.stats import DraftStats, StepStats


@pytest.mark.parametrize(
    ("size", "needed", "temperature"),
    [(1, "always", 0.0), (3, "consensus", 0.0), (8, "always", 0.0), (8, "consensus", 0.0), (3, "consensus", 1.0)],
)
@pytest.mark.parametrize("fusion", FUSIONS.names())
def test_equals_the_rule(fusion: str, size: int, needed: str, temperature: float) -> None:
    params = SamplingParams(max_tokens=20, temperature=temperature, seed=5)
    members = trio()[: 3 if fusion in OPTIONS | {"robust": {}} or size == 3 else 2]
    recipe = recipe_of(members, fusion, draft=size, needed=needed)
    found = engine_tokens(members, recipe, PROMPTS, params)
    for prompt, own in zip(PROMPTS, found, strict=True):
        assert own == Reference(members, recipe, prompt, params).run(needed == "consensus"), prompt


class AnyBeat(Rhythm):
    """Drafts, reads and guesses at random."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng = random.Random(seed)

    def beat(self, prospects: Collection[Prospect]) -> Beat:
        draft, read = self.rng.choice([(True, False), (False, True), (True, True)])
        return Beat(draft, read or any(p.due for p in prospects), self.rng.choice([0.0, 0.3, 1.0, 3.0]))


class ReadsFirst(Rhythm):
    """Reads whenever there is anything to read."""

    def beat(self, prospects: Collection[Prospect]) -> Beat:
        return Beat(draft=not any(p.num_unread for p in prospects), price=9.0)


def test_a_text_whose_guesses_wait_goes_on() -> None:
    """What assistants have read is not read again because of guesses, which they never spell."""
    members = trio()
    engine = fake_engine(members, num_candidates=K)
    engine.scheduler.rhythm = ReadsFirst()
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    recipe = recipe_of(members, "projection")
    engine.add([sequence(i, prompt * 4, members, recipe, params) for i, prompt in enumerate(PROMPTS)])
    for _ in range(400):
        engine.step()
    assert not engine.has_work


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(6))
def test_no_beat_changes_a_text(seed: int, temperature: float) -> None:
    """Whatever is drafted, guessed and read when, beside sequences that end and begin."""
    params = SamplingParams(max_tokens=22 + seed, temperature=temperature, seed=seed, ignore_eos=True)
    members = trio()[: 2 + seed % 2]
    recipe = recipe_of(members, "projection")
    prompts = [*PROMPTS, "abcab" * 3, "é中é中é"]
    engine = fake_engine(members, num_candidates=K, max_running=5)
    engine.scheduler.rhythm = AnyBeat(seed)
    engine.add([sequence(i, prompt, members, recipe, params) for i, prompt in enumerate(prompts)])
    outputs = run(engine)
    assert all(member.is_empty for member in members)
    for i, prompt in enumerate(prompts):
        assert outputs[i][-1].error is None
        assert tokens(outputs[i]) == Reference(members, recipe, prompt, params).run(consensus=True), prompt


def twins() -> list[FakeMember]:
    """Members with one vocabulary, in which every text has one spelling."""
    return [
        FakeMember(name, byte_vocabulary(), seed=seed, max_len=512) for seed, name in enumerate(["a", "b", "c"])
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("fusion", ["relative", "projection"])
@pytest.mark.parametrize("draft", ["auto", 1, 5])
def test_members_with_one_tokenizer_give_the_text_of_lockstep(
    fusion: str, draft: str | int, temperature: float
) -> None:
    """Sampled texts too, token for token: a draft is drawn with the numbers of the places that it stands for."""
    params = SamplingParams(max_tokens=40, temperature=temperature, seed=3, top_p=0.9)
    members = twins()
    recipe = recipe_of(members, fusion, draft=draft, acceptance="common")
    prompts = [*PROMPTS, *(chr(97 + i) * 3 for i in range(20))]
    lockstep = in_lockstep(recipe)
    assert engine_tokens(members, recipe, prompts, params) == engine_tokens(members, lockstep, prompts, params)


@pytest.mark.parametrize("draft", ["auto", 3])
def test_a_text_is_the_same_alone_and_in_a_batch(draft: str | int) -> None:
    params = SamplingParams(max_tokens=30, temperature=0.8, seed=9)
    members = trio()
    recipe = recipe_of(members, "projection", draft=draft)
    together = engine_tokens(members, recipe, PROMPTS, params)
    assert together == [engine_tokens(members, recipe, [prompt], params)[0] for prompt in PROMPTS]


def test_a_preempted_text_goes_on_as_it_would_have() -> None:
    """Its draft is taken back, and every place keeps its random number."""
    params = SamplingParams(max_tokens=40, temperature=0.8, seed=4)
    members = trio()
    recipe = recipe_of(members, "projection", draft=3, needed="always")
    expected = engine_tokens(members, recipe, PROMPTS[:3], params)
    small = trio()
    for member in small:
        member.num_pages, member.max_len = 7, 100
    asked = [sequence(i, prompt, small, recipe, params) for i, prompt in enumerate(PROMPTS[:3])]
    assert preempted(small, asked, K) == expected


@pytest.mark.parametrize("steps", range(12))
def test_an_abort_at_any_step_leaves_nothing(steps: int) -> None:
    members = trio()
    engine = fake_engine(members)
    params = SamplingParams(max_tokens=50, temperature=0.0)
    engine.add([sequence(i, "abc", members, recipe_of(members, draft=4), params) for i in range(2)])
    for _ in range(steps):
        engine.step()
    engine.abort([0])
    outputs = run(engine)
    assert outputs[1][-1].num_completion_tokens == 50
    assert all(member.is_empty for member in members)


@pytest.mark.parametrize("fault", ["fails_on", "nan_on"])
def test_an_assistant_that_fails_is_dropped_and_the_text_goes_on(fault: str) -> None:
    members = trio()
    recipe = recipe_of(members, "projection", draft=3, needed="always")
    params = SamplingParams(max_tokens=30, temperature=0.0)
    outputs = losing(members, recipe, params, "beta", fault, 6)
    assert len(tokens(outputs[0])) == len(tokens(outputs[1])) == 30
    assert set(outputs[0][-1].dropped) == {"beta"}


def test_reports_come_for_each_token_once() -> None:
    members = trio()
    engine = fake_engine(members)
    params = SamplingParams(max_tokens=30, temperature=0.0, logprobs=3)
    request = sequence(0, "deed abc", members, recipe_of(members, "projection", draft=4), params)
    request.request = replace(request.request, trace=True)
    engine.add([request])
    outputs = run(engine)[0]
    ids = tokens(outputs)
    assert [entry.token_id for output in outputs for entry in output.logprobs] == ids
    traces = [trace for output in outputs for trace in output.traces]
    assert [trace.token for trace in traces] == [members[0].vocabulary.name_of(token) for token in ids]
    assert {trace.consulted for trace in traces} == {True, False}
    assert traces[0].draft is None  # decided in lockstep
    drafts = [trace.draft for trace in traces[1:] if trace.draft is not None]
    assert len(drafts) == len(traces) - 1
    assert {draft.kept for draft in drafts} == {draft.sound for draft in drafts} == {True, False}
    for trace, draft in zip(traces[1:], drafts, strict=True):
        assert draft.kept is (trace.token == draft.token)
        assert draft.needed is trace.consulted
        assert draft.sound is (set(trace.members) == {"alpha", "beta", "gamma"})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_trace_changes_no_token_and_tells_who_agreed(temperature: float) -> None:
    names = ("alpha", "beta")
    members = [FakeMember(name, byte_vocabulary(), seed=1, max_len=512) for name in names]  # of one mind
    params = SamplingParams(max_tokens=40, temperature=temperature, seed=3)
    recipe = recipe_of(members, "projection")
    plain = engine_tokens(members, recipe, PROMPTS, params)
    engine = fake_engine(members, num_candidates=K)
    for i, prompt in enumerate(PROMPTS):
        request = sequence(i, prompt, members, recipe, params)
        request.request = replace(request.request, trace=True)
        engine.add([request])
    outputs = run(engine)
    assert [tokens(outputs[i]) for i in range(len(PROMPTS))] == plain
    drafts = [trace.draft for told in outputs.values() for each in told for trace in each.traces if trace.draft]
    assert {"main"} <= {draft.drafter for draft in drafts} <= {"main", "lookup"}
    assert all(draft.kept for draft in drafts)
    assert any(draft.sound and not draft.needed for draft in drafts) is (temperature == 0.0)


SHAPED: list[dict[str, Any]] = [
    {"presence_penalty": 1.0},
    {"repetition_penalty": 1.3, "temperature": 1.0},
    {"min_tokens": 12},
    {"frequency_penalty": 0.5},
    {"bad_words": ("ab", "中", "a")},
    {"allowed_token_ids": tuple(range(97, 104)), "bad_words": ("ab", "ca"), "temperature": 1.0},
    {"min_tokens": 9, "temperature": 1.0, "logit_bias": ((10, 5.0),)},
]


@pytest.mark.parametrize("fields", SHAPED)
@pytest.mark.parametrize("mode", ["verify", "lockstep"])
def test_texts_that_are_shaped_by_what_came_before_follow_the_rule(mode: str, fields: dict[str, Any]) -> None:
    params = replace(SamplingParams(max_tokens=20, temperature=0.0, seed=2), **fields)
    members = trio()
    recipe = recipe_of(members, needed="always")
    recipe = in_lockstep(recipe, "shared") if mode == "lockstep" else recipe
    found = engine_tokens(members, recipe, PROMPTS, params)
    for prompt, own in zip(PROMPTS, found, strict=True):
        assert own == Reference(members, recipe, prompt, params).run(consensus=False), prompt


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("fusion", ["relative", "union", "core"])
def test_lockstep_at_shared_places_follows_the_rule(fusion: str, temperature: float) -> None:
    params = SamplingParams(max_tokens=30, temperature=temperature, seed=6)
    members = trio()
    recipe = in_lockstep(recipe_of(members, fusion), "shared")
    found = engine_tokens(members, recipe, PROMPTS, params)
    for prompt, own in zip(PROMPTS, found, strict=True):
        assert own == Reference(members, recipe, prompt, params).run(consensus=False), prompt


class OnlyDue(Rhythm):
    """Reads what must be read and no more."""

    def beat(self, prospects: Collection[Prospect]) -> Beat:
        return Beat(read=any(p.due for p in prospects))


CERTIFYING: dict[str, tuple[str, dict[str, Any]]] = {
    "search": ("relative", {"solver": "search", "eta": 0.05}),
    "linear pool": ("projection", {}),
}


@pytest.mark.parametrize("kind", CERTIFYING)
def test_certificates_save_fusions_and_change_no_text(kind: str) -> None:
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    members, (name, options) = trio(), CERTIFYING[kind]
    method = build_fusion(name, FUSIONS.parse(name, options, "fusion"), space_of(members))
    fused: dict[bool, int] = {}
    for certificates in (True, False):
        recipe = recipe_of(members, needed="always", certificates=certificates)
        recipe = replace(recipe, fusion=method, fusion_name=name, weights=(0.9, 0.05, 0.05))
        records = Records()
        engine = fake_engine(members, records.append, num_candidates=K)
        engine.scheduler.rhythm = OnlyDue()
        engine.add([sequence(i, prompt, members, recipe, params) for i, prompt in enumerate(PROMPTS)])
        outputs = run(engine)
        for i, prompt in enumerate(PROMPTS):
            assert tokens(outputs[i]) == Reference(members, recipe, prompt, params).run(consensus=False), prompt
        fused[certificates] = sum(each.consulted for each in records.of(DraftStats))
    assert fused[True] < 0.8 * fused[False]


def test_an_assistant_that_nobody_asks_is_never_far_behind() -> None:
    """Every token is certain, yet the assistants read on."""
    members = trio()
    recipe = replace(recipe_of(members, "projection"), weights=(1.0, 0.0, 0.0))
    records = Records()
    engine = fake_engine(members, records.append, num_candidates=K)
    engine.scheduler.rhythm = OnlyDue()
    params = SamplingParams(max_tokens=300, temperature=0.0, ignore_eos=True)
    engine.add([sequence(i, "abc", members, recipe, params) for i in range(2)])
    run(engine)
    steps = [each for step in records.of(StepStats) for each in step.members if each.member == "beta"]
    assert 4 <= len(steps) <= 10
    assert max(each.decode_tokens for each in steps) <= 2 * 70


def test_lockstep_at_shared_places_feeds_everybody_once_a_token() -> None:
    """It drafts nothing ahead: a second step for a token only where its place shows with the next one."""
    members = trio()
    params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    recipe = in_lockstep(recipe_of(members, "projection"), "shared")
    records = Records()
    engine = fake_engine(members, records.append, num_candidates=K)
    engine.add([sequence(i, "abc", members, recipe, params) for i in range(4)])
    run(engine)
    assert {step.mode for step in records.of(StepStats)} == {"lockstep"}
    assert len(records.of(StepStats)) <= 45


REQUESTS: dict[str, dict[str, Any]] = {
    "one token": {"max_tokens": 1},
    "two tokens": {"max_tokens": 2},
    "sampled": {"temperature": 1.0},
    "hot": {"temperature": 2.0, "top_p": 0.95},
    "nearly greedy": {"temperature": 1e-4},
    "top-k": {"temperature": 1.0, "top_k": 3},
    "min-p": {"temperature": 1.0, "min_p": 0.1},
    "a negative seed": {"temperature": 1.0, "seed": -(2**63)},
    "stop strings": {"stop": ("a", "ab", "中", "ca\n")},
    "stop strings that stay": {"stop": ("a",), "include_stop_str_in_output": True},
    "stop ids": {"stop_token_ids": tuple(range(97, 101))},
    "past the end": {"ignore_eos": True, "max_tokens": 60},
    "special tokens": {"skip_special_tokens": False},
    "min_tokens": {"min_tokens": 15, "stop": ("a",)},
    "logprobs": {"logprobs": 5},
    "no alternatives": {"logprobs": 0, "temperature": 0.8},
    "a ban": {"logit_bias": ((97, -100.0), (98, -100.0))},
    "a favourite": {"logit_bias": ((97, 100.0),)},
    "many biases": {"logit_bias": tuple((i, 1.5) for i in range(257)), "temperature": 0.9},
    "a few ids": {"allowed_token_ids": tuple(range(97, 101)), "temperature": 1.0},
    "bad words": {"bad_words": ("ab", "ba", "中")},
    "repetition": {"repetition_penalty": 1.4},
    "presence": {"presence_penalty": 1.5, "temperature": 0.7},
    "frequency": {"frequency_penalty": -1.0},
}


@pytest.mark.parametrize("fields", REQUESTS.values(), ids=REQUESTS)
def test_each_request_gets_what_lockstep_gives_it(fields: dict[str, Any]) -> None:
    """Text, ids, ends and reports, of members with one tokenizer, beside requests of other kinds."""
    params = SamplingParams(**({"max_tokens": 30, "temperature": 0.0, "seed": 11} | fields))
    members, others = twins(), SamplingParams(max_tokens=25, temperature=0.9, seed=2)
    verify = recipe_of(members, "projection", acceptance="common")
    told = []
    for recipe in (verify, in_lockstep(verify)):
        engine = fake_engine(members, num_candidates=len(members[0].vocabulary))
        engine.add([sequence(i, prompt, members, recipe, params) for i, prompt in enumerate(PROMPTS)])
        engine.add([sequence(100 + i, prompt, members, verify, others) for i, prompt in enumerate(PROMPTS)])
        outputs = run(engine)
        told.append([whole(outputs[i]) for i in range(len(PROMPTS))])
        assert all(member.is_empty for member in members)
    assert told[0] == told[1]


def whole(outputs: list[Output]) -> tuple[object, ...]:
    """What a client sees of a request, put together; log-probabilities as far as float32 has them."""
    last = outputs[-1]
    reports = [
        (each.token_id, round(each.logprob, 4), [(top.token_id, round(top.logprob, 4)) for top in each.top])
        for output in outputs
        for each in output.logprobs
    ]
    text = "".join(output.text for output in outputs)
    return text, tokens(outputs), reports, last.finish_reason, last.stop_reason, last.num_completion_tokens


def test_a_guess_that_the_ensemble_chooses_against_main_is_no_loss() -> None:
    """Main is fed a guess and chooses another token, but the fusion chooses the guess: it is cached already."""
    members = trio()
    recipe = recipe_of(members, "projection", draft=2, needed="always")
    params = SamplingParams(max_tokens=200, temperature=1.0, seed=1, logit_bias=((97, 5.0), (98, 5.0), (99, 4.5)))
    prompts = [("abc" * n) + "ab" for n in range(3, 11)]
    plain = recipe_of(members, "projection", draft=2, needed="always", lookup=False)
    assert engine_tokens(members, recipe, prompts, params) == engine_tokens(members, plain, prompts, params)


class Jumpy(AnyBeat):
    """Now and then reads alone for long, or drafts whatever it costs."""

    def beat(self, prospects: Collection[Prospect]) -> Beat:
        beat, kind = super().beat(prospects), self.rng.random()
        return beat if kind < 0.5 else Beat(False, True, 9.0) if kind < 0.8 else Beat(True, False, 0.0)


@pytest.mark.parametrize("seed", [0, 3])
def test_main_has_always_something_to_feed(seed: int) -> None:
    """Also where it has been fed all that is final, its own choice was cut off, and new guesses stand behind."""
    members = trio()
    recipe = recipe_of(members, "projection", draft=2, needed="always")
    params = SamplingParams(max_tokens=120, temperature=1.0, seed=1, logit_bias=((97, 5.0), (98, 5.0), (99, 4.5)))
    prompts = [("abc" * n) + "ab" for n in range(3, 11)]
    engine = fake_engine(members, num_candidates=K)
    engine.scheduler.rhythm = Jumpy(seed)
    engine.add([sequence(i, prompt, members, recipe, params) for i, prompt in enumerate(prompts)])
    outputs = run(engine)
    assert [outputs[i][-1].error for i in range(len(prompts))] == [None] * len(prompts)
    plain = recipe_of(members, "projection", draft=1, needed="always", lookup=False)
    found = [tokens(outputs[i]) for i in range(len(prompts))]
    assert found == engine_tokens(members, plain, prompts, params)


@pytest.mark.parametrize("mode", ["verify", "lockstep"])
def test_drafts_and_consultations_are_counted(mode: str) -> None:
    members = trio()
    recipe = replace(recipe_of(members, "projection"), mode=choose_mode(mode, {}, "mode"))
    records = Records()
    engine = fake_engine(members, records.append, num_candidates=K)
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    engine.add([sequence(i, prompt, members, recipe, params) for i, prompt in enumerate(PROMPTS)])
    run(engine)
    told = records.of(DraftStats)
    assert sum(each.consulted + each.alone for each in told) == 60 * len(PROMPTS)
    assert all(each.accepted <= each.drafted and each.confirmed <= each.guessed for each in told)
    assert sum(each.consulted for each in told) > 0
    drafted = sum(each.drafted for each in told)
    assert drafted == (60 - 1) * len(PROMPTS) if mode == "verify" else drafted == 0
    overruled = sum(fusion.overruled for step in records.of(StepStats) for fusion in step.fusions)
    if mode == "verify":
        assert drafted - sum(each.accepted for each in told) <= overruled


@pytest.mark.slow
@pytest.mark.parametrize("fusion", ["relative", "projection"])
def test_long_greedy_texts_of_members_with_one_tokenizer_are_those_of_lockstep(fusion: str) -> None:
    """50 prompts of 128 tokens."""
    params = SamplingParams(max_tokens=128, temperature=0.0, ignore_eos=True)
    members, prompts = twins()[:2], [chr(97 + i % 26) * (1 + i // 26) + "é中"[i % 2] for i in range(50)]
    recipe = recipe_of(members, fusion)
    lockstep = engine_tokens(members, in_lockstep(recipe), prompts, params)
    assert engine_tokens(members, recipe, prompts, params) == lockstep
    assert engine_tokens(members, in_lockstep(recipe, "shared"), prompts, params) == lockstep
    assert len({tuple(ids) for ids in lockstep}) > 40


@pytest.mark.slow
def test_sampled_texts_have_the_distribution_of_lockstep() -> None:
    """20,000 texts of each mode, of members with one tokenizer: each place's tokens, and pairs, by chi-square."""
    members, num = twins()[:2], 20_000
    told = {}
    for first, name in ((0, "verify"), (num, "lockstep")):  # other seeds
        recipe = recipe_of(members, "projection")
        recipe = in_lockstep(recipe) if name == "lockstep" else recipe
        params = [SamplingParams(max_tokens=3, temperature=0.8, seed=first + i) for i in range(num)]
        engine = fake_engine(members, num_candidates=K, max_running=256, max_waiting=num)
        engine.add([sequence(i, "abc", members, recipe, own) for i, own in enumerate(params)])
        outputs = run(engine)
        told[name] = [tokens(outputs[i]) for i in range(num)]
    for place in (slice(1, 2), slice(2, 3), slice(0, 2)):
        ours, theirs = (Counter(tuple(ids[place]) for ids in told[name]) for name in told)
        assert homogeneous(ours, theirs, num_common=21)
