"""Weights by each prompt's perplexity: the formula, what is counted, and the engine against a slow reference."""

from __future__ import annotations

import math
from collections import abc
from typing import Any

import pytest
import torch
from fakes import FakeMember, byte_vocabulary, fake_config, fake_loaded, pair_vocabulary

from ensemble_core.decoding.perplexity import PromptLikelihood, weigh
from ensemble_core.decoding.requests import GenerationRequest, Output, Overrides, Weighting
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.decoding.sequence import Sequence
from ensemble_core.errors import InvalidRequestError
from ensemble_core.factory import Loaded
from ensemble_core.text.alignment import Track
from ensemble_core.text.vocabulary import Vocabulary

GREEDY = SamplingParams(max_tokens=4, temperature=0.0)
PROMPTS = ["abc de", "deed 中文 bad", "cab cab cab cab cab cab cab", "be 😀 e"]
PRIOR, TAU = (0.75, 0.25), 0.5


class Bench:
    """Two fake members under one ensemble whose weights follow the prompt."""

    def __init__(self, num_pages: int = 1024, page_size: int = 16, **scheduler: Any) -> None:
        cache = {"num_pages": num_pages, "page_size": page_size, "max_len": 64}
        self.members = {
            "alpha": FakeMember("alpha", byte_vocabulary(), seed=1, **cache),
            "beta": FakeMember("beta", pair_vocabulary(), seed=2, **cache),
        }
        duo = {
            "members": dict(zip(self.members, PRIOR, strict=True)),
            "main": "alpha",
            "weighting": {"by": "perplexity", "tau": TAU},
        }
        config = fake_config(ensembles={"duo": duo}, scheduler={"num_candidates": 64} | scheduler)
        self.loaded: Loaded = fake_loaded(config, self.members)
        self.outputs: dict[int, list[Output]] = {}

    def request(self, prompt: str, params: SamplingParams = GREEDY, **fields: Any) -> Sequence:
        return self.loaded.admission.admit(GenerationRequest("r", "duo", prompt, params, **fields))

    def run(self, sequences: list[Sequence]) -> list[tuple[float, ...]]:
        """Run them to their end; each one's weights."""
        self.loaded.engine.add(sequences)
        while self.loaded.engine.has_work:
            for seq_id, output in self.loaded.engine.step():
                self.outputs.setdefault(seq_id, []).append(output)
            self.loaded.engine.scheduler.check()
        assert all(sequence.finish_reason in ("length", "stop") for sequence in sequences)
        return [sequence.recipe.weights for sequence in sequences]

    def expected(self, prompt: str, prior: abc.Sequence[float] = PRIOR, tau: float = TAU) -> list[float]:
        """The formula, token by token: softmax of log v - NLL / tau, NLL in nats per byte behind the first token."""
        logs = []
        for weight, member in zip(prior, self.members.values(), strict=True):
            ids = member.vocabulary.encode(prompt)
            nats = [-member.next_logits(ids[:i]).log_softmax(0)[ids[i]].item() for i in range(1, len(ids))]
            num_bytes = len(prompt.encode()) - len(member.vocabulary.tokens[ids[0]])
            logs.append(math.log(weight) - sum(nats) / num_bytes / tau)
        return torch.tensor(logs).softmax(0).tolist()  # type: ignore[no-any-return]


def test_equal_members_weigh_as_a_softmax() -> None:
    rates = [1.2, 0.7, 2.0]
    expected = (-torch.tensor(rates) / 0.3).softmax(0).tolist()
    assert weigh((1 / 3,) * 3, rates, 0.3) == pytest.approx(expected, rel=1e-5)
    assert weigh((1 / 3,) * 3, [rate + 1e4 for rate in rates], 0.3) == pytest.approx(expected, rel=1e-5)


def test_the_configured_weights_are_factors() -> None:
    assert weigh((0.8, 0.2), [1.0, 1.0], 0.1) == pytest.approx((0.8, 0.2))
    assert weigh((0.8, 0.2), [3.0, 1.0], 1e9) == pytest.approx((0.8, 0.2))
    assert weigh((1.0, 0.0), [3.0, 1.0], 0.1) == (1.0, 0.0)
    assert weigh((0.5, 0.5), [3.0, 1.0], 1e-6) == (0.0, 1.0)


def test_what_is_not_finite_weighs_nothing() -> None:
    assert weigh((0.5, 0.5), [math.nan, 1.0], 0.1) == (0.0, 1.0)
    assert weigh((0.5, 0.5), [1.0, math.inf], 0.1) == (1.0, 0.0)
    assert weigh((0.7, 0.3), [math.inf, math.nan], 0.1) == (0.7, 0.3)


def special_first() -> Track:
    """<s> a b <s> c."""
    vocabulary = Vocabulary([b"a", b"b", b"c", b"<s>"], frozenset({3}), frozenset({3}), lambda text: [])
    return Track(vocabulary, [3, 0, 1, 3, 2])


def test_counted_is_text_behind_the_first_token_that_spells_some() -> None:
    likelihood, track = PromptLikelihood(), special_first()
    assert likelihood.following(track, 5) == (-1, 1, -1, 2, -1)
    track.num_cached = 3
    assert likelihood.following(track, 1) == (2,)
    assert likelihood.following(track, 2) == (2, -1)
    track.num_cached = 4
    assert likelihood.following(track, 1) == ()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_weights_are_those_of_the_formula(prompt: str) -> None:
    bench = Bench()
    (weights,) = bench.run([bench.request(prompt)])
    assert weights == pytest.approx(bench.expected(prompt), rel=1e-4)
    assert weights != pytest.approx(PRIOR, abs=1e-3)


@pytest.mark.parametrize("budget", [1, 3, 7])
def test_chunks_and_company_change_no_weights(budget: int) -> None:
    alone, crowd = Bench(), Bench(token_budget=budget)
    found = crowd.run([crowd.request(prompt) for prompt in PROMPTS])
    for prompt, weights in zip(PROMPTS, found, strict=True):
        assert weights == pytest.approx(alone.run([alone.request(prompt)])[0], rel=1e-5)


def test_a_cached_prefix_is_not_taken_for_a_prompt_that_is_weighed() -> None:
    bench = Bench(prefix_reuse=True)
    first, second = (bench.run([bench.request(PROMPTS[2])])[0] for _ in range(2))
    assert first == second == pytest.approx(bench.expected(PROMPTS[2]), rel=1e-4)
    assert not bench.members["alpha"].reuses
    bench.run([bench.request(PROMPTS[2], overrides=Overrides(weighting=Weighting("fixed")))])
    assert bench.members["alpha"].reuses  # but it is kept for others


def test_choices_of_one_prompt_share_its_prefill_and_its_weights() -> None:
    bench = Bench()
    found = bench.run([bench.request(PROMPTS[2], group="one") for _ in range(3)])
    assert len(set(found)) == 1
    assert found[0] == pytest.approx(bench.expected(PROMPTS[2]), rel=1e-4)
    assert len(bench.members["beta"].reuses) == 2


def test_whoever_is_preempted_ends_with_the_same_weights_and_text() -> None:
    plenty, scarce = Bench(), Bench(num_pages=20, page_size=4, token_budget=5)
    params = SamplingParams(max_tokens=20, temperature=0.0)
    expected, found = ([b.request(prompt, params) for prompt in PROMPTS] for b in (plenty, scarce))
    preempted = []
    admit = scarce.loaded.engine.scheduler.admit
    scarce.loaded.engine.scheduler.admit = lambda: (gone := admit(), preempted.extend(gone))[0]  # type: ignore[method-assign]
    for wanted, weights in zip(plenty.run(expected), scarce.run(found), strict=True):
        assert weights == pytest.approx(wanted, rel=1e-5)
    assert [s.shown.text for s in found] == [s.shown.text for s in expected]
    assert preempted


def test_a_prompt_of_one_token_has_the_configured_weights() -> None:
    bench = Bench()
    assert bench.run([bench.request("a")]) == [PRIOR]


def test_the_weights_decide_and_stand_in_the_trace() -> None:
    bench = Bench()
    traced = bench.request(PROMPTS[0], trace=True)
    (weights,) = bench.run([traced])
    fixed = bench.request(
        PROMPTS[0], trace=True, overrides=Overrides(weights=dict(zip(bench.members, weights, strict=True)))
    )
    assert fixed.recipe.tau == TAU  # the weights of a request are what its prompt's likelihood is multiplied with
    chosen = Overrides(weights=dict(zip(bench.members, weights, strict=True)), weighting=Weighting("fixed"))
    same = bench.request(PROMPTS[0], trace=True, overrides=chosen)
    assert bench.run([same])[0] == pytest.approx(weights)
    steps, others = ([t for out in bench.outputs[s.seq_id] for t in out.traces] for s in (traced, same))
    assert steps == others
    assert dict(steps[0].weights) == pytest.approx(dict(zip(bench.members, weights, strict=True)), abs=1e-6)


def test_a_request_asks_for_its_own_tau_and_factors() -> None:
    bench = Bench()
    overrides = Overrides(weights={"alpha": 1.0, "beta": 1.0}, weighting=Weighting("perplexity", 2.0))
    (weights,) = bench.run([bench.request(PROMPTS[1], overrides=overrides)])
    assert weights == pytest.approx(bench.expected(PROMPTS[1], (0.5, 0.5), 2.0), rel=1e-4)


def test_one_member_has_no_weights_to_find() -> None:
    bench = Bench()
    request = bench.request(PROMPTS[0], overrides=Overrides(members=("alpha",)))
    assert bench.run([request]) == [(1.0,)]
    assert all(not feed.following for call in bench.members["alpha"].calls for feed in call)


@pytest.mark.parametrize(
    "weighting",
    [Weighting("perplexity", 0.0), Weighting("perplexity", math.inf), Weighting("perplexity", math.nan)],
)
def test_a_bad_tau_is_refused(weighting: Weighting) -> None:
    with pytest.raises(InvalidRequestError, match="greater than 0") as caught:
        Bench().request("abc", overrides=Overrides(weighting=weighting))
    assert caught.value.param == "ensemble.weighting"


def test_a_scored_prompt_is_refused_unless_weights_are_fixed() -> None:
    bench, params = Bench(), SamplingParams(max_tokens=1, echo=True, logprobs=1)
    with pytest.raises(InvalidRequestError, match="weighting: fixed") as caught:
        bench.request("abc", params)
    assert caught.value.param == "echo"
    bench.run([bench.request("abc", params, overrides=Overrides(weighting=Weighting("fixed")))])
