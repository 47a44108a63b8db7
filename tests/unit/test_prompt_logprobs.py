"""Log-probabilities of a prompt without its echo: the same numbers, with ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fakes import Bench, FakeMember, byte_vocabulary, fake_config, fake_loaded, pair_vocabulary

from ensemble_core.decoding.reports import score
from ensemble_core.decoding.requests import GenerationRequest, Output, join
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.errors import InvalidRequestError

PARAMS = SamplingParams(max_tokens=3, temperature=0.0)


def answers(params: SamplingParams, model: str = "duo", count: int = 1) -> list[Output]:
    members = {
        "alpha": FakeMember("alpha", pair_vocabulary(), seed=1),
        "beta": FakeMember("beta", byte_vocabulary(), seed=2),
    }
    duo = {"members": dict.fromkeys(members, 0.5), "main": "alpha", "fusion": {"name": "projection"}}
    full = duo | {"fusion": {"name": "relative", "options": {"support": "full", "steps": 1}}}
    config = fake_config(tuple(members), ensembles={"duo": duo, "full": full}, scheduler={"num_candidates": 64})
    bench = Bench(fake_loaded(config, members), members)
    requests = [GenerationRequest(f"r-{i}", model, "abc de bad", params, group="g") for i in range(count)]
    made = bench.loaded.admission.admit_all(requests)
    bench.engine.add(made)
    bench.run()
    return [join(bench.outputs[each.seq_id]) for each in made]


@pytest.mark.parametrize("model", ["duo", "alpha"])
def test_they_are_those_of_an_echo_with_ranks(model: str) -> None:
    (told,) = answers(replace(PARAMS, prompt_logprobs=4), model)
    (echoed,) = answers(replace(PARAMS, echo=True, logprobs=4), model)
    (plain,) = answers(PARAMS, model)
    assert [replace(each, rank=None) for each in told.prompt_logprobs] == list(echoed.prompt_logprobs)
    assert (told.prompt_text, told.logprobs) == ("", ())
    assert told.token_ids == plain.token_ids == echoed.token_ids
    for each in told.prompt_logprobs[1:]:
        order = [other.token_id for other in each.top]
        if each.rank is not None and each.rank <= 4:
            assert order[each.rank - 1] == each.token_id
        else:
            assert order.index(each.token_id) == 4


def test_the_widest_of_both_is_kept() -> None:
    (told,) = answers(replace(PARAMS, prompt_logprobs=1, echo=True, logprobs=5))
    assert all(len(each.top) >= 5 for each in told.prompt_logprobs[1:])


def test_choices_of_one_prompt_have_the_same() -> None:
    first, *others = answers(replace(PARAMS, prompt_logprobs=2), count=3)
    assert all(other.prompt_logprobs == first.prompt_logprobs for other in others)


def test_a_rank_counts_ids_that_are_likelier_once() -> None:
    ids, logprobs = torch.tensor([5, 7, 5, 9, 3]), torch.tensor([-1.0, -2.0, -1.5, -2.0, -torch.inf])
    ranks = {token: score(ids, logprobs, token, 0, ranks=True).rank for token in (5, 7, 9, 3)}
    assert ranks == {5: 1, 7: 2, 9: 2, 3: 4}
    assert score(ids, logprobs, 5, 0).rank is None


def test_a_fusion_over_whole_vocabularies_scores_no_prompts() -> None:
    with pytest.raises(InvalidRequestError, match="prompt_logprobs works on candidates") as caught:
        answers(replace(PARAMS, prompt_logprobs=1), "full")
    assert caught.value.param == "prompt_logprobs"
