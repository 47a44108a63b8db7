"""The sampled mode: the pool's distribution from one member a token."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

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
    preempted,
    run,
    sequence,
    space_of,
    tokens,
)
from torch import Tensor

from ensemble_core import recipes
from ensemble_core.decoding.modes.base import choose_mode
from ensemble_core.decoding.modes.sampled import FURTHEST
from ensemble_core.decoding.recipe import Recipe
from ensemble_core.decoding.requests import Overrides
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.errors import ConfigError, InvalidRequestError
from ensemble_core.fusion.base import FUSIONS, build_fusion
from ensemble_core.fusion.mapping import token_map
from ensemble_core.members.base import Feed, ask
from ensemble_core.recipes import RecipeBook
from ensemble_core.stats import StepStats

PROMPTS = ["abc", "deed 中文 bad", "cab " * 6, "é中é中é"]
WHOLE = 4096  # candidates: all of every vocabulary


def pair(**options: Any) -> list[FakeMember]:
    return [
        FakeMember("alpha", byte_vocabulary(), seed=1, max_len=2048, **options),
        FakeMember("beta", byte_vocabulary(["abc", "ca", "中", "de", "ed "]), seed=3, max_len=2048, **options),
    ]


def recipe_of(members: list[FakeMember], mode: str = "sampled", weights: tuple[float, ...] = (0.7, 0.3)) -> Recipe:
    fusion = build_fusion("projection", FUSIONS.parse("projection", {}, "fusion"), space_of(members))
    recipe = replace(ensemble(members, weights), fusion=fusion, fusion_name="projection")
    return replace(recipe, mode=choose_mode(mode, {}, "mode"))


def texts(
    members: list[FakeMember],
    recipe: Recipe,
    prompts: list[str],
    params: list[SamplingParams],
    num_candidates: int = WHOLE,
) -> list[list[int]]:
    engine = fake_engine(members, num_candidates=num_candidates, max_running=256, max_waiting=len(prompts))
    pairs = enumerate(zip(prompts, params, strict=True))
    engine.add([sequence(i, prompt, members, recipe, own) for i, (prompt, own) in pairs])
    outputs = run(engine)
    assert all(member.is_empty for member in members)
    assert not [output.error for told in outputs.values() for output in told if output.error]
    return [tokens(outputs[i]) for i in range(len(prompts))]


def seeded(num: int, **fields: Any) -> list[SamplingParams]:
    return [
        SamplingParams(**{"temperature": 1.0, "seed": seed, "ignore_eos": True, **fields}) for seed in range(num)
    ]


def pooled(members: list[FakeMember], weights: tuple[float, ...], temperature: float) -> Tensor:
    """(V_main,) the distribution of the token behind "abc": members are tempered, carried, then pooled."""
    main = members[0].vocabulary
    found = torch.zeros(len(main), dtype=torch.float64)
    for member, weight in zip(members, weights, strict=True):
        told = ask(member, [Feed(10**6, member.vocabulary.encode("abc"))], len(member.vocabulary))
        member.release(10**6)
        own = torch.softmax(told.logprobs[0].double() / temperature, dim=0)
        places = token_map(member.vocabulary, main)[told.token_ids[0]]
        found.index_add_(0, places.clamp_min(0), weight * own * (places >= 0))
        if member is members[0]:
            first = own[told.token_ids[0].argsort()]
        found += weight * float((own * (places < 0)).sum()) * first  # what has no place is left to main
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_the_next_token_has_the_distribution_of_the_pool(temperature: float) -> None:
    members, num = pair(), 2000
    drawn = texts(members, recipe_of(members), ["abc"] * num, seeded(num, max_tokens=1, temperature=temperature))
    assert fits(Counter(map(tuple, drawn)), pooled(members, (0.7, 0.3), temperature))


@pytest.mark.slow
def test_texts_have_the_distribution_of_lockstep() -> None:
    """20,000 texts of each mode at temperature 1: every place's tokens, and pairs of them, by chi-square."""
    members, num = pair(), 20_000
    told = {
        mode: texts(members, recipe_of(members, mode), ["abc"] * num, seeded(num, max_tokens=3))
        for mode in ("sampled", "lockstep")
    }
    for look in (lambda ids: ids[1], lambda ids: ids[2], lambda ids: (ids[0], ids[1])):
        ours, theirs = (Counter(map(look, told[mode])) for mode in told)
        assert homogeneous(ours, theirs, num_common=21)


def test_what_a_member_did_not_name_is_drawn_anew() -> None:
    """With few candidates: their masses as they are, not scaled up in each member apart."""
    members, num, few = pair(), 2000, 24
    drawn = texts(members, recipe_of(members), ["abc"] * num, seeded(num, max_tokens=1), few)
    expected = torch.zeros(len(members[0].vocabulary), dtype=torch.float64)
    for member, weight in zip(members, (0.7, 0.3), strict=True):
        told = ask(member, [Feed(10**6, member.vocabulary.encode("abc"))], few)
        member.release(10**6)
        places = token_map(member.vocabulary, members[0].vocabulary)[told.token_ids[0]]
        assert (places >= 0).all()
        expected.index_add_(0, places, weight * told.logprobs[0].double().exp())
    assert fits(Counter(map(tuple, drawn)), expected / expected.sum())


def test_one_member_a_token_is_fed() -> None:
    members, records = pair(), Records()
    engine = fake_engine(members, records.append)
    params = SamplingParams(max_tokens=300, temperature=1.0, seed=3, ignore_eos=True)
    engine.add([sequence(0, "abc", members, recipe_of(members), params)])
    run(engine)
    fed = [each.member for step in records.of(StepStats) for each in step.members if not each.prefill_tokens]
    assert len(fed) < 330
    assert 50 < fed.count("beta") < 130
    assert {step.mode for step in records.of(StepStats)} == {"sampled"}


@pytest.mark.parametrize("num_candidates", [16, WHOLE])
def test_a_text_depends_on_its_seed_alone(num_candidates: int) -> None:
    """Not on neighbours, nor on preemption."""
    members = pair()
    prompts, params = PROMPTS * 3, seeded(12, max_tokens=40)
    together = texts(members, recipe_of(members), prompts, params, num_candidates)
    for i in (0, 3, 6, 9):
        assert texts(members, recipe_of(members), [prompts[i]], [params[i]], num_candidates) == [together[i]]
    assert len({tuple(ids) for ids in together}) == 12


def test_a_preempted_text_goes_on_as_it_would_have() -> None:
    params = seeded(3, max_tokens=60)
    members = pair()
    expected = texts(members, recipe_of(members), PROMPTS[:3], params, 16)
    small = pair()
    for member in small:
        member.num_pages, member.max_len = 7, 100
    pairs = enumerate(zip(PROMPTS, params, strict=False))
    asked = [sequence(i, prompt, small, recipe_of(small), own) for i, (prompt, own) in pairs]
    assert preempted(small, asked, 16) == expected


def test_a_member_that_is_never_drawn_is_not_far_behind() -> None:
    members, records = pair(), Records()
    engine = fake_engine(members, records.append)
    params = SamplingParams(max_tokens=600, temperature=1.0, seed=3, ignore_eos=True)
    engine.add([sequence(0, "abc", members, recipe_of(members, weights=(0.999, 0.001)), params)])
    run(engine)
    counts = [
        each.decode_tokens for step in records.of(StepStats) for each in step.members if each.member == "beta"
    ]
    assert max(counts) <= FURTHEST + 16
    assert sum(counts) > 300


OTHERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "log-probabilities": {"logprobs": 2},
    "top-p": {"top_p": 0.9},
    "top-k": {"top_k": 5},
    "min-p": {"min_p": 0.1},
    "penalty": {"frequency_penalty": 0.5},
    "bias": {"logit_bias": ((10, 3.0),)},
    "allowed ids": {"allowed_token_ids": (97, 98, 99)},
    "bad words": {"bad_words": ("ab",)},
    "min_tokens": {"min_tokens": 5},
}


@pytest.mark.parametrize("fields", OTHERS.values(), ids=OTHERS)
def test_requests_that_need_the_fused_numbers_are_verified(fields: dict[str, Any]) -> None:
    members = pair()
    params = seeded(len(PROMPTS), **{"max_tokens": 20, **fields})
    found = texts(members, recipe_of(members), PROMPTS, params, 64)
    assert found == texts(members, recipe_of(members, "verify"), PROMPTS, params, 64)


@pytest.mark.parametrize("fault", ["fails_on", "nan_on"])
@pytest.mark.parametrize("policy", ["drop", "fail"])
def test_a_member_that_fails_is_dropped_or_fails_the_request(policy: Any, fault: str) -> None:
    members = pair()
    recipe = replace(recipe_of(members), on_failure=policy, refit=lambda names: None)
    engine = fake_engine(members)
    engine.add([sequence(i, "abc", members, recipe, own) for i, own in enumerate(seeded(2, max_tokens=40))])
    outputs: dict[int, list[Any]] = {0: [], 1: []}
    for step in range(500):
        if step == 4:
            getattr(members[1], fault).add(0)
        for seq_id, output in engine.step():
            outputs[seq_id].append(output)
        if not engine.has_work:
            break
    assert len(tokens(outputs[1])) == 40
    assert (len(tokens(outputs[0])) == 40) is (policy == "drop")
    assert set(outputs[0][-1].dropped) == ({"beta"} if policy == "drop" else set())
    assert bool(outputs[0][-1].error) is (policy == "fail")
    assert all(member.is_empty for member in members)


@pytest.mark.parametrize("steps", range(8))
def test_an_abort_at_any_step_leaves_nothing(steps: int) -> None:
    members = pair()
    engine = fake_engine(members)
    engine.add([sequence(i, "abc" * 9, members, recipe_of(members), own) for i, own in enumerate(seeded(2))])
    for _ in range(steps):
        engine.step()
    engine.abort([0])
    outputs = run(engine)
    assert outputs[1][-1].finish_reason == "length"
    assert all(member.is_empty for member in members)


NO_POOLS: list[dict[str, Any]] = [
    {"name": "relative"},
    {"name": "projection", "options": {"pool": "log-linear"}},
    {"name": "core", "options": {"base": {"name": "projection"}}},
]


@pytest.mark.parametrize("fusion", NO_POOLS)
def test_another_fusion_is_refused_by_name(fusion: dict[str, Any]) -> None:
    recipe: dict[str, Any] = {"members": {"alpha": 1, "beta": 1}, "main": "alpha"}
    config = fake_config(ensembles={"duet": {**recipe, "fusion": fusion, "mode": "sampled"}})
    with pytest.raises(
        ConfigError, match=r"ensembles\.duet\.mode\.name: sampled draws .* linear pool .*, got fusion "
    ):
        recipes.check_strategies(config)
    members = pair()
    served = fake_config(ensembles={"duet": {**recipe, "fusion": {"name": "projection"}}})
    book = RecipeBook(served, lambda names, _: space_of([m for m in members if m.name in names]))
    assert book.resolve("duet", Overrides(mode="sampled")).mode.name == "sampled"
    with pytest.raises(InvalidRequestError, match=r"ensemble\.mode\.name: sampled draws"):
        book.resolve(
            "duet", Overrides(mode="sampled", fusion=fusion["name"], fusion_options=fusion.get("options", {}))
        )
    assert book.resolve("duet", Overrides(mode="sampled", members=("alpha",))).fusion is None
