"""Admission: every member's own prompt, and the lengths that are refused before anything runs."""

from __future__ import annotations

import pytest
from fakes import FakeMember, byte_vocabulary, fake_config, fake_loaded, pair_vocabulary

from ensemble_core.admission import Admission
from ensemble_core.decoding.requests import Conversation, GenerationRequest, Overrides
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.decoding.sequence import Phase
from ensemble_core.errors import InvalidRequestError, ModelNotFoundError

MAIN_LEN, ASSISTANT_LEN = 64, 24


def admission() -> Admission:
    members = {
        "alpha": FakeMember("alpha", pair_vocabulary(), max_len=MAIN_LEN),
        "beta": FakeMember("beta", byte_vocabulary(), max_len=ASSISTANT_LEN),
    }
    return fake_loaded(fake_config(), members).admission


def request(prompt: object, max_tokens: int = 4, model: str = "duo", **overrides: object) -> GenerationRequest:
    params = SamplingParams(max_tokens=max_tokens, stop=("x",))
    return GenerationRequest("r", model, prompt, params, Overrides(**overrides))  # type: ignore[arg-type]


def refused(wrong: GenerationRequest) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        admission().admit(wrong)
    return caught.value


def test_every_member_gets_its_own_prompt() -> None:
    made = admission().admit(request("abcde"))
    assert list(made.tracks) == ["alpha", "beta"]
    assert made.tracks["beta"].prompt_ids == list(b"abcde")
    assert made.tracks["alpha"].prompt_ids == pair_vocabulary().encode("abcde")
    assert len(made.main.prompt_ids) < 5
    assert made.phase is Phase.WAITING
    assert all(track.num_cached == 0 and not track.completion_ids for track in made.tracks.values())
    made.shown.feed(b"ax")
    assert made.shown.stop == "x"


def test_sequences_have_ids_of_their_own() -> None:
    shared = admission()
    assert len({shared.admit(request("a")).seq_id for _ in range(10)}) == 10


def test_members_left_out_are_not_asked() -> None:
    made = admission().admit(request("a" * 40, members=("alpha",)))  # too long for beta
    assert list(made.tracks) == ["alpha"]


def test_a_conversation_becomes_lines_without_a_template() -> None:
    made = admission().admit(request(Conversation(({"role": "user", "content": "a"},))))
    assert bytes(made.tracks["beta"].prompt_ids) == b"user: a\nassistant:"


@pytest.mark.parametrize(("max_tokens", "fits"), [(54, True), (55, False)])
def test_prompt_and_completion_fit_the_mains_context(max_tokens: int, fits: bool) -> None:
    wanted = request("." * 10, max_tokens)
    if fits:
        assert admission().admit(wanted).request is wanted
        return
    error = refused(wanted)
    assert error.param == "max_tokens"
    assert all(part in str(error) for part in ("64", "'alpha'", "10", "55"))


@pytest.mark.parametrize(("length", "fits"), [(23, True), (24, False)])
def test_an_assistant_needs_room_for_one_token(length: int, fits: bool) -> None:
    wanted = request("." * length, 1)
    if fits:
        assert len(admission().admit(wanted).tracks["beta"]) == length
        return
    error = refused(wanted)
    assert error.param == "prompt"
    assert "'beta'" in str(error)


@pytest.mark.parametrize("length", [64, 65, 64 * 256 + 1])
def test_a_prompt_over_the_context_is_refused(length: int) -> None:
    error = refused(request("." * length, 1, "alpha"))
    assert error.param == "prompt"
    assert "64" in str(error)


def test_an_empty_prompt_is_refused() -> None:
    assert refused(request("")).param == "prompt"


def test_unknown_models_and_wrong_overrides_come_first() -> None:
    with pytest.raises(ModelNotFoundError, match="duo"):
        admission().admit(request("", model="nobody"))
    assert refused(request("", weights={"beta": -1.0})).param == "ensemble.weights"
