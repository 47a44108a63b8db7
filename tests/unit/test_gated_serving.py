"""Gates in a running engine: what they change of texts and reports, what is refused, and what becomes of losses."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import (
    FakeMember,
    byte_vocabulary,
    fake_config,
    fake_engine,
    fake_loaded,
    pair_vocabulary,
    run,
    sequence,
    space_of,
    tokens,
)
from gates import gate_of, gated_config, numbers_of
from rule import PROMPTS, Reference, engine_tokens, in_lockstep, lenient, losing, recipe_of, trio

from ensemble_core.decoding.modes.base import Turn, choose_mode
from ensemble_core.decoding.modes.drafts import _certified
from ensemble_core.decoding.recipe import Recipe
from ensemble_core.decoding.requests import GenerationRequest, Output, Overrides, Weighting
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.errors import ArtefactError, ConfigError, InvalidRequestError
from ensemble_core.fusion.gate_store import load_gate
from ensemble_core.members.base import Candidates, log_rest
from ensemble_core.recipes import check_strategies, list_models

GREEDY = SamplingParams(max_tokens=24, temperature=0.0)
PAIR = {"members": {"alpha": 0.6, "beta": 0.4}, "main": "alpha", "fusion": "projection"}
FIXED = Overrides(weighting=Weighting("fixed"))


def gated(members: list[FakeMember], fusion: str = "projection", seed: int = 2, **mode: object) -> Recipe:
    return replace(recipe_of(members, fusion, **mode), gate=gate_of(space_of(members), seed, scale=2.0))


class Gated:
    """Two fake members, one ensemble whose gate lies in a file."""

    def __init__(self, folder: Path, **ensemble: Any) -> None:
        self.members = {
            "alpha": FakeMember("alpha", byte_vocabulary(), seed=1),
            "beta": FakeMember("beta", pair_vocabulary(), seed=2),
        }
        path, numbers = folder / "duo.safetensors", numbers_of(2, scale=2.0)
        self.config = gated_config(self.members, path, PAIR | ensemble, numbers, scheduler={"num_candidates": 64})
        self.loaded = fake_loaded(self.config, self.members)

    def run(self, prompt: str, params: SamplingParams = GREEDY, **fields: Any) -> list[Output]:
        made = self.loaded.admission.admit(GenerationRequest("r", "duo", prompt, params, **fields))
        self.loaded.engine.add([made])
        outputs = []
        while self.loaded.engine.has_work:
            outputs += [output for _, output in self.loaded.engine.step()]
        return outputs

    def weights(self, prompt: str, **fields: Any) -> list[dict[str, float]]:
        outputs = self.run(prompt, trace=True, **fields)
        return [dict(trace.weights) for trace in itertools.chain.from_iterable(o.traces for o in outputs)]


def text_of(outputs: list[Output]) -> str:
    return "".join(output.text for output in outputs)


@pytest.mark.parametrize(("size", "needed"), [(1, "always"), (8, "consensus"), (3, "consensus")])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_verify_is_the_rule_with_the_weights_of_each_place(
    count: int, size: int, needed: str, temperature: float
) -> None:
    members, params = trio()[:count], SamplingParams(max_tokens=20, temperature=temperature, seed=5)
    recipe = gated(members, draft=size, needed=needed)
    found = engine_tokens(members, recipe, PROMPTS, params)
    for prompt, own in zip(PROMPTS, found, strict=True):
        assert own == Reference(members, recipe, prompt, params).run(needed == "consensus"), prompt


def test_a_gate_changes_texts_and_batches_do_not() -> None:
    members = trio()
    recipe = in_lockstep(gated(members))
    together = engine_tokens(members, recipe, PROMPTS, GREEDY)
    assert together == [engine_tokens(members, recipe, [prompt], GREEDY)[0] for prompt in PROMPTS]
    assert together != engine_tokens(members, replace(recipe, gate=None), PROMPTS, GREEDY)


def test_traces_tell_the_weights_of_each_token(tmp_path: Path) -> None:
    bench = Gated(tmp_path)
    found = [each for each in bench.weights("abc de") if len(each) > 1]
    assert len(found) > 10
    assert all(sum(each.values()) == pytest.approx(1.0, abs=1e-5) for each in found)
    assert len({each["alpha"] for each in found}) > 5
    fixed = [each for each in bench.weights("abc de", overrides=FIXED) if len(each) > 1]
    assert all(each == {"alpha": 0.6, "beta": 0.4} for each in fixed)


def test_weights_that_a_request_sends_are_what_the_gate_multiplies(tmp_path: Path) -> None:
    bench = Gated(tmp_path)
    alone = text_of(bench.run("abc", overrides=Overrides(members=("alpha",))))
    all_main = Overrides(weights={"alpha": 1.0, "beta": 0.0})
    assert text_of(bench.run("abc", overrides=all_main)) == alone
    assert {each["alpha"] for each in bench.weights("abc", overrides=all_main)} == {1.0}
    before, after = (
        bench.weights("abc", params=replace(GREEDY, max_tokens=1), overrides=Overrides(weights=weights))[0]
        for weights in ({"alpha": 0.6, "beta": 0.4}, {"alpha": 0.5, "beta": 0.5})
    )
    odds = [each["alpha"] / each["beta"] for each in (before, after)]
    assert odds[0] / odds[1] == pytest.approx(1.5, rel=1e-3)


def test_log_probabilities_of_a_prompt_have_the_gate_too(tmp_path: Path) -> None:
    bench = Gated(tmp_path)
    scoring = SamplingParams(max_tokens=0, echo=True, logprobs=0)

    def told(overrides: Overrides) -> list[float | None]:
        (first, *_) = bench.run("abc deab cab", scoring, overrides=overrides)
        return [entry.logprob for entry in first.prompt_logprobs]

    assert told(Overrides()) != told(FIXED)
    assert told(Overrides(weights={"alpha": 1.0, "beta": 0.0})) == pytest.approx(
        told(Overrides(members=("alpha",)))[0:1] + told(Overrides(members=("alpha",)))[1:], abs=1e-4
    )


@pytest.mark.parametrize("fault", ["fails_on", "nan_on"])
def test_a_dropped_member_leaves_a_gate(fault: str) -> None:
    members = trio()
    recipe = in_lockstep(gated(members))
    outputs = losing(members, recipe, GREEDY, "gamma", fault, 3)
    left = lenient(members, recipe).without(("gamma",))
    assert left.gate is not None
    assert len(left.weights) == 2
    assert [len(tokens(outputs[i])) for i in range(2)] == [24, 24]
    if fault == "nan_on":  # a forward that fails is one of all sequences
        members[2].nan_on.clear()
        assert tokens(outputs[1]) == engine_tokens(members, recipe, ["abc"], GREEDY)[0]
    assert lenient(members, recipe).without(("beta", "gamma")).gate is None


def test_a_member_that_is_not_finite_fails_the_request_alone() -> None:
    members = trio()
    recipe = in_lockstep(gated(members))
    members[1].nan_on.add(0)
    engine = fake_engine(members, num_candidates=64)
    engine.add([sequence(i, "abc", members, recipe, GREEDY) for i in range(2)])
    outputs = run(engine)
    assert outputs[0][-1].finish_reason == "error"
    members[1].nan_on.clear()
    assert tokens(outputs[1]) == engine_tokens(members, recipe, ["abc"], GREEDY)[0]


def test_main_alone_certifies_nothing_of_a_gated_pool() -> None:
    """Where the fixed weights would: the gate may take main's weight away."""

    members = trio()[:2]
    recipe = replace(gated(members), weights=(0.9, 0.1))
    logprobs = torch.tensor([[0.98, 0.01]]).log()
    rows = Candidates(torch.tensor([[5, 6]]), logprobs, log_rest(logprobs))
    for gate, expected in ((None, True), (recipe.gate, False)):
        turn = Turn(sequence(0, "abc", members, replace(recipe, gate=gate), GREEDY), {})
        assert _certified([turn], rows) == [expected]


# What is configured, and what is refused


def test_the_api_tells_of_a_gate(tmp_path: Path) -> None:
    bench = Gated(tmp_path)
    (info, *_) = list_models(bench.config, {"alpha": 10, "beta": 10})
    assert info.recipe is not None
    assert info.recipe["weighting"] == {"by": "gate"}


def test_a_gate_that_does_not_fit_is_found_at_start(tmp_path: Path) -> None:
    bench = Gated(tmp_path)
    (tmp_path / "duo.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtefactError, match=r"ensembles\.duo\.weighting\.artefact"):
        fake_loaded(bench.config, bench.members)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mode": "sampled"}, r"ensembles\.duo\.weighting: mode sampled draws a member before it speaks"),
        (
            {"fusion": {"name": "contrastive", "options": {"expert": "beta", "base": "alpha"}}},
            r"ensembles\.duo\.weighting: weights have no effect on fusion contrastive",
        ),
    ],
)
def test_a_gate_that_cannot_act_is_refused(changes: dict[str, object], reason: str) -> None:
    duo = PAIR | changes | {"weighting": {"by": "gate", "artefact": "duo.safetensors"}}
    with pytest.raises(ConfigError, match=reason):
        check_strategies(fake_config(ensembles={"duo": duo}))


def test_a_request_is_refused_what_cannot_be(tmp_path: Path) -> None:
    bench = Gated(tmp_path)
    with pytest.raises(InvalidRequestError, match="draws a member before it speaks") as caught:
        bench.run("abc", overrides=Overrides(mode="sampled"))
    assert caught.value.param == "ensemble.weighting"
    bench.run("abc", overrides=Overrides(mode="sampled", weighting=Weighting("fixed")))
    plain = fake_loaded(fake_config(ensembles={"duo": PAIR}), bench.members)
    with pytest.raises(InvalidRequestError, match="this model has no gate") as caught:
        plain.admission.admit(GenerationRequest("r", "duo", "abc", GREEDY, Overrides(weighting=Weighting("gate"))))
    assert caught.value.param == "ensemble.weighting"


def test_the_gate_of_the_file_is_the_one_that_serves(tmp_path: Path) -> None:
    bench = Gated(tmp_path)
    recipe = bench.loaded.book.resolve("duo", Overrides())
    space = space_of(list(bench.members.values()))
    own = load_gate(tmp_path / "duo.safetensors", bench.config, "duo", space)
    assert recipe.gate is not None
    assert torch.equal(recipe.gate._numbers.outer, own._numbers.outer)
    assert choose_mode("lockstep", {}, "mode") == recipe.mode
