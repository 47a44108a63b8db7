"""Log-probabilities of ids that a request names: of the fused distribution, in every mode; the answer stays."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fakes import Bench, FakeMember, byte_vocabulary, fake_config, fake_loaded, pair_vocabulary

from ensemble_core.decoding.reports import Named, named, scored
from ensemble_core.decoding.requests import GenerationRequest, Overrides, TokenLogprob
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.errors import InvalidRequestError
from ensemble_core.fusion.base import Fused
from ensemble_core.members.base import Abilities, Candidates

K = 8
NAMED = (97, 0, 255, 256, 120)  # likely, hopeless, the end of text
MODES: dict[str, tuple[str | None, dict[str, Any] | None]] = {
    "lockstep": (None, None),
    "shared": ("lockstep", {"positions": "shared"}),
    "verify": ("verify", None),
    "long": ("verify", {"draft": 7, "needed": "always", "acceptance": "common"}),
    "relay": ("verify", {"drafter": "beta", "draft": 4}),
    "sampled": ("sampled", None),
}


def bench(fusion: str = "projection", num: int = 2, **options: Any) -> Bench:
    members = {
        "alpha": FakeMember("alpha", byte_vocabulary(), seed=1, **options),
        "beta": FakeMember("beta", pair_vocabulary(), seed=2),
    }
    duo = {"members": {"alpha": 0.6, "beta": 0.4}, "main": "alpha", "fusion": {"name": fusion}}
    names = list(members)[:num]
    config = fake_config(names, ensembles={"duo": duo} if num > 1 else {}, scheduler={"num_candidates": K})
    chosen = {name: members[name] for name in names}
    return Bench(fake_loaded(config, chosen), chosen)


def ask(made: Bench, model: str = "duo", mode: str = "lockstep", **params: Any) -> list[TokenLogprob]:
    """What is told of each token of an answer."""
    name, options = MODES[mode]
    own = SamplingParams(**{"max_tokens": 12, "temperature": 0.0, "seed": 3, "ignore_eos": True} | params)
    overrides = Overrides(mode=name, mode_options=options)
    sequence = made.loaded.admission.admit(GenerationRequest("r", model, "abc de", own, overrides))
    made.engine.add([sequence])
    made.run()
    told = [token for output in made.outputs[sequence.seq_id] for token in output.logprobs]
    assert [token.token_id for token in told] == sequence.main.completion_ids or not told
    return told


def values(token: TokenLogprob) -> dict[int, float]:
    return {each.token_id: each.logprob for each in token.top}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_exactly_those_ids_and_the_answer_of_a_request_without(mode: str, temperature: float) -> None:
    made = bench()
    plain = ask(made, mode=mode, temperature=temperature, logprobs=3)
    told = ask(made, mode=mode, temperature=temperature, logprobs=3, logprob_token_ids=NAMED)
    assert len(plain) == 12
    assert [(t.token_id, t.logprob) for t in told] == [(t.token_id, t.logprob) for t in plain]
    for token, other in zip(told, plain, strict=True):
        assert values(token).keys() == {*NAMED, token.token_id}
        assert [each.logprob for each in token.top] == sorted(values(token).values(), reverse=True)
        assert all(-9999.0 <= logprob <= 1e-6 for logprob in values(token).values())
        both = values(token).keys() & values(other).keys()
        assert {i: values(token)[i] for i in both} == {i: values(other)[i] for i in both}


@pytest.mark.parametrize("fusion", ["projection", "relative", "union", "eva"])
def test_the_parts_sum_to_no_more_than_one(fusion: str) -> None:
    """All ids of main in three requests: what is outside the support shares the tail."""
    made, masses = bench(fusion), [0.0] * 4
    for start in (0, 90, 180):
        ids = tuple(range(start, min(start + 90, 257)))
        for place, token in enumerate(ask(made, max_tokens=4, logprobs=0, logprob_token_ids=ids)):
            masses[place] += sum(math.exp(p) for i, p in values(token).items() if i in ids)
    assert all(0.9 < mass <= 1.0 + 1e-4 for mass in masses), masses


def test_a_single_model_tells_its_own_numbers() -> None:
    made = bench(num=1)
    (token,) = ask(made, "alpha", max_tokens=1, logprobs=0, logprob_token_ids=tuple(range(128)))
    logits = made.members["alpha"].next_logits(list(b"abc de"))
    exact = torch.log_softmax(logits, dim=0)
    for token_id, logprob in values(token).items():
        assert logprob == pytest.approx(exact[token_id].item(), abs=1e-3)


def test_beside_other_requests_nothing_changes() -> None:
    """Of several widths in one batch, one with a constraint of its own ids."""
    made = bench()
    wanted: list[dict[str, Any]] = [
        {"logprobs": 2},
        {"logprobs": 0, "logprob_token_ids": NAMED},
        {"logprobs": 0, "logprob_token_ids": (5,), "allowed_token_ids": (97, 98)},
        {"logprob_token_ids": tuple(range(128)), "logit_bias": ((7, 50.0),)},
    ]
    alone = [ask(bench(), max_tokens=6, **each) for each in wanted]
    params = [
        SamplingParams(**{"max_tokens": 6, "temperature": 0.0, "ignore_eos": True} | each) for each in wanted
    ]
    made_of = [made.loaded.admission.admit(GenerationRequest("r", "duo", "abc de", each)) for each in params]
    made.engine.add(made_of)
    made.run()
    for sequence, expected in zip(made_of, alone, strict=True):
        assert [t for out in made.outputs[sequence.seq_id] for t in out.logprobs] == expected


def test_ids_that_main_does_not_have_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="id 257 is outside the main member's vocabulary") as caught:
        ask(bench(), logprob_token_ids=(3, 257))
    assert caught.value.param == "logprob_token_ids"


def test_a_main_member_that_tells_of_fewer_ids() -> None:
    made = bench(abilities=Abilities(max_also=4))
    assert ask(made, logprobs=0, logprob_token_ids=(1, 2, 3, 3, 4))
    with pytest.raises(InvalidRequestError, match="5 ids must be among the candidates") as caught:
        ask(made, logprobs=0, logprob_token_ids=(1, 2, 3, 4, 5))
    assert caught.value.param == "logprob_token_ids"


def test_a_share_of_the_tail() -> None:
    """By hand: main gives .1 outside its two candidates, of which the fusion leaves half."""
    wide = Candidates(
        torch.tensor([[4, 9, 2]]), torch.tensor([[0.6, 0.3, 0.02]]).log(), torch.tensor([0.08]).log()
    )
    tail = torch.tensor(0.1).log()
    fused = Fused(
        torch.tensor([[4, 9, 7]]),
        torch.tensor([[0.65, 0.3, 0.0]]).log(),
        torch.tensor([0.05]).log(),
        torch.zeros(1, 1),
    )
    params = SamplingParams(logprob_token_ids=(2, 2, 9))
    found = named(params, wide, 0, tail)
    assert found == Named(
        {2: pytest.approx(math.log(0.02)), 9: pytest.approx(math.log(0.3))}, pytest.approx(tail.item())
    )
    told = scored(params, fused, 0, 4, found)
    assert told is not None
    assert {i: round(math.exp(p), 6) for i, p in told.top} == {4: 0.65, 9: 0.3, 2: 0.01}
    nothing = scored(params, fused, 0, 7, found)
    assert nothing is not None
    assert nothing.logprob == -9999.0
    assert scored(SamplingParams(), fused, 0, 4, None) is None


@pytest.mark.parametrize(
    ("own", "tail"), [(-40.0, -math.inf), (-200.0, -math.inf), (-800.0, -3.0), (-math.inf, -3.0)]
)
@pytest.mark.parametrize("fused_tail", [-1.0, -90.0, -math.inf])
def test_a_tail_that_is_rounded_to_nothing(own: float, tail: float, fused_tail: float) -> None:
    fused = Fused(torch.tensor([[4]]), torch.tensor([[-0.1]]), torch.tensor([fused_tail]), torch.zeros(1, 1))
    told = scored(SamplingParams(logprob_token_ids=(2, 3)), fused, 0, 4, Named({2: own, 3: own}, tail))
    assert told is not None
    found = dict(told.top)
    assert found[2] == found[3] >= -9999.0
    assert found[2] <= max(fused_tail - math.log(2), -9999.0) + 1e-9, "together no more than the tail"
