"""Prompts of control tokens alone, in every mode: assistants begin a text of their own, and then as always."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fakes import Bench, FakeMember, byte_vocabulary, fake_config, fake_loaded, pair_vocabulary

from ensemble_core.decoding.requests import GenerationRequest, Output, Overrides, TokenLogprob, Weighting, join
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.decoding.sequence import Sequence
from ensemble_core.text.alignment import Track

MODES: dict[str, tuple[str, dict[str, object]]] = {
    "lockstep": ("lockstep", {}),
    "shared": ("lockstep", {"positions": "shared"}),
    "verify": ("verify", {}),
    "relay": ("verify", {"drafter": "beta"}),
    "sampled": ("sampled", {}),
}
PARAMS = [
    SamplingParams(max_tokens=12, temperature=0.0),
    SamplingParams(max_tokens=12, temperature=1.0, seed=3),
    SamplingParams(max_tokens=6, temperature=0.0, echo=True, logprobs=2),
]


def bench() -> Bench:
    members = {
        "alpha": FakeMember("alpha", pair_vocabulary(), seed=1),
        "beta": FakeMember("beta", byte_vocabulary(), seed=2),
    }
    duo = {"members": dict.fromkeys(members, 0.5), "main": "alpha", "fusion": {"name": "projection"}}
    config = fake_config(tuple(members), ensembles={"duo": duo}, scheduler={"num_candidates": 64})
    return Bench(fake_loaded(config, members), members)


def answer(
    mode: str, prompt: tuple[int, ...], params: SamplingParams, by: str | None = None
) -> tuple[Sequence, Output]:
    own = bench()
    name, options = MODES[mode]
    weighting = None if by is None else Weighting("perplexity")
    overrides = Overrides(mode=name, mode_options=options, weighting=weighting)
    made = own.loaded.admission.admit(GenerationRequest("r", "duo", prompt, params, overrides))
    own.engine.add([made])
    own.run()
    return made, join(own.outputs[made.seq_id])


@pytest.mark.parametrize("params", PARAMS, ids=["greedy", "sampled", "scored"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 2])
def test_an_answer_is_that_of_members_that_began_so(mode: str, params: SamplingParams, count: int) -> None:
    ends = [next(iter(vocabulary.stop_ids)) for vocabulary in (pair_vocabulary(), byte_vocabulary())]
    _, told = answer(mode, (ends[0],) * count, params)
    assert (told.finish_reason, told.dropped) == ("length", {})
    own = bench()
    name, options = MODES[mode]
    request = GenerationRequest("r", "duo", "a", params, Overrides(mode=name, mode_options=options))
    made = own.loaded.admission.admit(request)
    prompts = {"alpha": [ends[0]] * count, "beta": [ends[1]]}
    tracks = {member: Track(track.vocabulary, prompts[member]) for member, track in made.tracks.items()}
    plain = replace(made, tracks=tracks, prompt_text="")
    own.engine.add([plain])
    own.run()
    assert join(own.outputs[made.seq_id]) == told


@pytest.mark.parametrize("mode", ["lockstep", "verify", "sampled"])
def test_weights_by_perplexity_stay_what_they_are(mode: str) -> None:
    (end,) = pair_vocabulary().stop_ids
    made, told = answer(mode, (end,), PARAMS[1], by="perplexity")
    assert told.finish_reason == "length"
    assert made.recipe.weights == (0.5, 0.5)


def test_the_first_token_of_a_scored_prompt_has_no_number() -> None:
    (end,) = pair_vocabulary().stop_ids
    _, told = answer("lockstep", (end, end), PARAMS[2])
    first, second = told.prompt_logprobs
    assert isinstance(first, TokenLogprob)
    assert first.logprob is None
    assert second.logprob is not None
