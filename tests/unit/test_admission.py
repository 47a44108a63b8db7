"""Admission: every member's own prompt, and the lengths that are refused before anything runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from fakes import FakeMember, FakeTokenizer, byte_vocabulary, fake_config, fake_loaded, pair_vocabulary

from ensemble_core.admission import Admission
from ensemble_core.decoding.forms import TextForm
from ensemble_core.decoding.requests import Conversation, GenerationRequest, Overrides, Weighting
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.decoding.sequence import Choice, Phase
from ensemble_core.errors import InvalidRequestError, ModelNotFoundError
from ensemble_core.members.base import Abilities
from ensemble_core.text.prompt import PromptEncoder

MAIN_LEN, ASSISTANT_LEN = 64, 24


def admission(**duo: Any) -> Admission:
    members = {
        "alpha": FakeMember("alpha", pair_vocabulary(), max_len=MAIN_LEN),
        "beta": FakeMember("beta", byte_vocabulary(), max_len=ASSISTANT_LEN),
    }
    recipe = {"members": {"alpha": 0.5, "beta": 0.5}, "main": "alpha"} | duo
    return fake_loaded(fake_config(ensembles={"duo": recipe}), members).admission


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
    """Without it the request goes on without that assistant, or is refused; see `on_full_context`."""
    wanted = request("." * length, 1)
    made = admission().admit(wanted)
    assert {name: len(track) for name, track in made.tracks.items()} == {"alpha": length} | (
        {"beta": length} if fits else {}
    )
    assert made.dropped == ({} if fits else {"beta": "full"})
    ending = admission(on_full_context="end")
    if fits:
        assert len(ending.admit(wanted).tracks["beta"]) == length
        return
    with pytest.raises(InvalidRequestError, match="'beta'") as caught:
        ending.admit(wanted)
    assert caught.value.param == "prompt"


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


def with_params(prompt: object = "ab", model: str = "duo", **params: object) -> GenerationRequest:
    return GenerationRequest("r", model, prompt, SamplingParams(**{"max_tokens": 4} | params))  # type: ignore[arg-type]


SIZE = len(pair_vocabulary())


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        (with_params((97, SIZE)), "prompt"),
        (with_params((-1,)), "prompt"),
        (with_params(()), "prompt"),
        (with_params(logit_bias=((SIZE, 1.0),)), "logit_bias"),
        (with_params(allowed_token_ids=(0, SIZE)), "allowed_token_ids"),
        (with_params(stop_token_ids=(SIZE,)), "stop_token_ids"),
        (with_params(form=TextForm("json", "{", field="response_format")), "response_format"),
    ],
)
def test_ids_and_schemas_are_checked_against_main(wrong: GenerationRequest, param: str) -> None:
    assert refused(wrong).param == param


def test_the_last_id_of_main_is_fine() -> None:
    made = admission().admit(
        with_params((97, SIZE - 1), logit_bias=((SIZE - 1, 1.0),), stop_token_ids=(SIZE - 1,))
    )
    assert made.main.prompt_ids == [97, SIZE - 1]
    assert made.pinned == (SIZE - 1,)


def test_assistants_read_the_text_of_ids_without_control_tokens() -> None:
    (end,) = pair_vocabulary().stop_ids
    ids = (end, *pair_vocabulary().encode("abc é"), end)
    made = admission().admit(with_params(ids))
    assert made.main.prompt_ids == list(ids)
    assert bytes(made.tracks["beta"].prompt_ids) == "abc é".encode()
    assert made.prompt_text == "abc é"


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("special", [True, False])
def test_for_control_tokens_alone_assistants_begin_a_text(count: int, special: bool) -> None:
    """There is no text to read. The fake has no BOS, so it begins behind an end of text."""
    (end,) = pair_vocabulary().stop_ids
    made = admission().admit(replace(with_params((end,) * count), add_special_tokens=special))
    assert made.main.prompt_ids == [end] * count
    assert made.tracks["beta"].prompt_ids == [*byte_vocabulary().stop_ids]
    assert made.prompt_text == ""


def test_a_member_that_cannot_begin_a_text_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PromptEncoder, "start", lambda _self: [])
    (end,) = pair_vocabulary().stop_ids
    assert "'beta'" in str(refused(with_params((end,))))


def test_a_conversation_can_go_on_from_its_last_message() -> None:
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    made = admission().admit(with_params(Conversation(turns, continue_final=True)))
    assert bytes(made.tracks["beta"].prompt_ids) == b"user: a\nassistant: b"
    wrong = refused(with_params(Conversation(({"role": "user"},))))
    assert wrong.param == "messages"


def test_scores_are_kept_only_where_they_are_asked_for() -> None:
    shared = admission()
    assert shared.admit(with_params(echo=True, logprobs=0)).scores is not None
    assert shared.admit(with_params(echo=True)).scores is None
    assert shared.admit(with_params(logprobs=3)).scores is None
    full = GenerationRequest(
        "r",
        "duo",
        "ab",
        SamplingParams(echo=True, logprobs=1, max_tokens=1),
        Overrides(fusion="relative", fusion_options={"support": "full"}),
    )
    assert refused(full).param == "echo"


@pytest.mark.parametrize(
    ("abilities", "params", "overrides", "param", "says"),
    [
        (
            Abilities(max_k=20),
            {},
            {"fusion_options": {"support": "full"}},
            "ensemble.fusion",
            "20 candidates at most",
        ),
        (Abilities(every_position=False), {"echo": True, "logprobs": 1}, {}, "echo", "at its last one alone"),
        (
            Abilities(every_position=False),
            {},
            {"weighting": Weighting("perplexity")},
            "ensemble.weighting",
            "beta",
        ),
    ],
)
def test_what_a_member_cannot_do_is_refused_by_name(
    abilities: Abilities, params: dict[str, Any], overrides: dict[str, Any], param: str, says: str
) -> None:
    members = {
        "alpha": FakeMember("alpha", byte_vocabulary()),
        "beta": FakeMember("beta", pair_vocabulary(), abilities=abilities),
    }
    limited = fake_loaded(fake_config(), members).admission
    wrong = GenerationRequest("r", "duo", "ab", SamplingParams(max_tokens=2, **params), Overrides(**overrides))
    with pytest.raises(InvalidRequestError, match="beta") as caught:
        limited.admit(wrong)
    assert (caught.value.param, says in str(caught.value)) == (param, True)
    assert limited.admit(GenerationRequest("r", "duo", "ab", SamplingParams(max_tokens=2)))


# Requests of one group


CHAT = Conversation(({"role": "user", "content": "ab"},))


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each text was tokenised."""
    texts: Counter[str] = Counter()
    tokenize = FakeTokenizer.__call__

    def counted(self: FakeTokenizer, text: str, **options: object) -> dict[str, list[int]]:
        texts[text] += 1
        return tokenize(self, text, **options)

    monkeypatch.setattr(FakeTokenizer, "__call__", counted)
    return texts


def choices(prompt: object, num: int, group: str | None = "g") -> list[GenerationRequest]:
    return [replace(with_params(prompt, seed=i), group=group) for i in range(num)]


@pytest.mark.parametrize("prompt", ["abc de 中", (97, 98, 0xC3, 0xA9), CHAT])
def test_choices_are_read_once_and_equal_those_that_come_alone(prompt: object, readings: Counter[str]) -> None:
    shared = admission()
    alone = [shared.admit(request) for request in choices(prompt, 3)]
    once = Counter({text: count // 3 for text, count in readings.items()})
    readings.clear()
    together = shared.admit_all(choices(prompt, 3))
    assert readings == once
    for one, other in zip(together, alone, strict=True):
        assert {m: t.prompt_ids for m, t in one.tracks.items()} == {
            m: t.prompt_ids for m, t in other.tracks.items()
        }
        assert (one.prompt_text, one.request, one.recipe) == (other.prompt_text, other.request, other.recipe)
    assert len({s.seq_id for s in together + alone}) == 6


def test_choices_go_on_apart() -> None:
    first, second = admission().admit_all(choices("abc", 2))
    before = [list(track.prompt_ids) for track in second.tracks.values()]
    first.decide([Choice(97)])
    first.tracks["beta"].respell("a")
    assert [track.prompt_ids for track in second.tracks.values()] == before
    assert not any(track.completion_ids for track in second.tracks.values())


def test_only_a_group_with_one_prompt_is_read_once(readings: Counter[str]) -> None:
    shared = admission()
    mixed = [each for pair in zip(choices("ab", 2), choices("de", 2, "h"), strict=True) for each in pair]
    assert [s.prompt_text for s in shared.admit_all(mixed)] == ["ab", "de", "ab", "de"]
    assert readings == {"ab": 2, "de": 2}, "once a member"
    wrong = [*choices("abc", 1), *choices("abd", 1), *choices("abc", 1)]
    assert [bytes(s.tracks["beta"].prompt_ids) for s in shared.admit_all(wrong)] == [b"abc", b"abd", b"abc"]
    readings.clear()
    shared.admit_all(choices("ab", 3, None))
    assert readings == {"ab": 6}
    other = [*choices("ab", 1), replace(choices("ab", 1)[0], model="alpha")]
    assert [list(s.tracks) for s in shared.admit_all(other)] == [["alpha", "beta"], ["alpha"]]


def test_each_choice_is_checked() -> None:
    shared = admission()
    for wrong, param in [
        (with_params(max_tokens=MAIN_LEN), "max_tokens"),
        (with_params(logit_bias=((SIZE, 1.0),)), "logit_bias"),
        (with_params(allowed_token_ids=(0, SIZE)), "allowed_token_ids"),
        (with_params(form=TextForm("json", "{", field="response_format")), "response_format"),
    ]:
        with pytest.raises(InvalidRequestError) as caught:
            shared.admit_all([*choices("ab", 2), replace(wrong, group="g")])
        assert caught.value.param == param
    assert shared.admit_all([]) == []


@pytest.mark.parametrize("given", ["text", "ids"])
def test_a_cut_prompt_is_its_end_in_every_member(given: str) -> None:
    vocabulary, text = pair_vocabulary(), "abc de abc é!"
    ids = vocabulary.encode(text)
    cut = replace(with_params(text if given == "text" else tuple(ids)), truncate=5)
    made = admission().admit(cut)
    kept = b"".join(vocabulary.tokens[token_id] for token_id in ids[-5:])
    assert made.main.prompt_ids == ids[-5:]
    assert bytes(made.tracks["beta"].prompt_ids) == kept
    assert made.prompt_text == kept.decode()
    whole = admission().admit(replace(cut, truncate=len(ids)))
    assert whole.main.prompt_ids == ids
    assert whole.prompt_text == text


def test_a_prompt_may_be_cut_to_what_fits() -> None:
    long = replace(with_params(tuple([46] * 100), model="alpha"), truncate=-1)
    made = admission().admit(long)
    assert len(made.main.prompt_ids) == MAIN_LEN - 4
    assert refused(replace(long, truncate=None)).param == "prompt"


def test_choices_that_are_cut_differently_share_no_prompt() -> None:
    requests = [replace(with_params("abcdefgh"), group="g", truncate=most) for most in (2, 3, 3)]
    made = admission().admit_all(requests)
    assert [len(each.main.prompt_ids) for each in made] == [2, 3, 3]
    assert made[1].main.prompt_ids is made[2].main.prompt_ids
