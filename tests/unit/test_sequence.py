"""One sequence fed token by token: stops, control tokens, and its properties."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import FakeMember, ensemble, pair_vocabulary, sequence

from ensemble_core.decoding.logprobs import Scored
from ensemble_core.decoding.requests import Output
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.decoding.sequence import Choice, Phase, Sequence
from ensemble_core.text.vocabulary import Vocabulary

PLAIN = pair_vocabulary()
(END,) = PLAIN.stop_ids
CONTROL = len(PLAIN)  # a control token that ends nothing
VOCABULARY = Vocabulary([*PLAIN.tokens, b"<tool>"], frozenset({END, CONTROL}), frozenset({END}), PLAIN.encode)
MEMBER = FakeMember("alpha", VOCABULARY)


def made(prompt: str = "ab", **params: Any) -> Sequence:
    return sequence(0, prompt, [MEMBER], ensemble([MEMBER]), SamplingParams(**{"max_tokens": 50} | params))


def feed(request: Sequence, *ids: int) -> list[Output]:
    outputs = []
    for token_id in ids:
        assert request.phase is not Phase.FINISHED
        request.decide([Choice(token_id, Scored(-1.0))])
        outputs.append(request.take())
    return outputs


def text(outputs: list[Output]) -> str:
    return "".join(output.text for output in outputs)


@pytest.mark.parametrize("token_id", [ord("x"), CONTROL])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_of_the_request(token_id: int, include: bool) -> None:
    request = made(stop_token_ids=(5, token_id), include_stop_str_in_output=include)
    outputs = feed(request, ord("a"), token_id)
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", token_id)
    assert text(outputs) == "a" + (VOCABULARY.tokens[token_id].decode() if include else "")
    assert outputs[-1].token_ids == (token_id,)
    assert outputs[-1].num_completion_tokens == 2


@pytest.mark.parametrize("include", [False, True])
def test_the_models_own_end(include: bool) -> None:
    outputs = feed(made(include_stop_str_in_output=include), ord("a"), END)
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", None)
    assert text(outputs) == ("a<eos>" if include else "a")


def test_the_end_can_be_ignored() -> None:
    request = made(ignore_eos=True, max_tokens=3)
    outputs = feed(request, ord("a"), END, ord("b"))
    assert (text(outputs), outputs[-1].finish_reason) == ("ab", "length")
    stopped = feed(made(ignore_eos=True, stop_token_ids=(END,)), END)
    assert (stopped[-1].finish_reason, stopped[-1].stop_reason) == ("stop", END)


def test_names_of_control_tokens_are_shown_but_never_spelt() -> None:
    request = made(skip_special_tokens=False, ignore_eos=True)
    outputs = feed(request, ord("a"), CONTROL, ord("b"), END, ord("c"))
    assert text(outputs) == request.shown.text == "a<tool>b<eos>c"
    assert request.spelt.text == "abc"
    hidden = made(ignore_eos=True)
    assert text(feed(hidden, ord("a"), CONTROL, ord("b"))) == "ab"
    assert hidden.spelt is hidden.shown


def test_a_control_token_within_a_character_leaves_main_alone_as_long() -> None:
    request = made(skip_special_tokens=False)
    feed(request, 0xC3, CONTROL)
    assert request.spelt.mid_character
    feed(request, 0xA9)
    assert request.spelt.text == "é"


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_offsets_are_the_characters_before(echo: bool, skip: bool) -> None:
    request = made("ab", echo=echo, skip_special_tokens=skip)
    request.prompt_text = "é中"
    ids = [*"aé😀".encode(), CONTROL, ord("b")]
    outputs = feed(request, *ids)
    name = 0 if skip else len("<tool>")
    expected = [0, 1, 1, 2, 2, 2, 2, 3, 3 + name]
    offsets = [entry.text_offset for output in outputs for entry in output.logprobs]
    assert offsets == [offset + (2 if echo else 0) for offset in expected]
    assert (outputs[0].prompt_text, outputs[1].prompt_text) == ("é中" if echo else "", "")


def test_early_stop_strings_do_not_count() -> None:
    request = made(stop=("ab",), min_tokens=3)
    outputs = feed(request, *b"abcab")
    assert [output.text for output in outputs] == ["a", "b", "c", "", ""]
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", "ab")


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_over_tokens(include: bool) -> None:
    request = made(stop=("é中b", "zz"), include_stop_str_in_output=include)
    outputs = feed(request, *"aé中b".encode())
    assert text(outputs) == ("aé中b" if include else "a")
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", "é中b")


def test_what_was_held_back_comes_with_the_length() -> None:
    outputs = feed(made(stop=("abc",), max_tokens=3), *b"xab")
    assert [output.text for output in outputs] == ["x", "", "ab"]
    assert outputs[-1].finish_reason == "length"
    cut = feed(made(stop=("\ufffd",), max_tokens=2), ord("a"), 0xC3)
    assert (text(cut), cut[-1].finish_reason, cut[-1].stop_reason) == ("a", "stop", "\ufffd")


def test_the_first_output_speaks_of_the_prompt_once() -> None:
    request = made("abc", echo=True)
    request.prompt_text = "abc"
    first, second = feed(request, ord("a"), ord("b"))
    assert first.prompt_token_ids == tuple(VOCABULARY.encode("abc"))
    assert (second.prompt_token_ids, second.prompt_text, second.prompt_logprobs) == ((), "", ())


def test_choices_whose_seeds_differ_in_sign_differ() -> None:
    drawn = {seed: made(seed=seed).rng.random() for seed in (-1, 0, 1)}
    assert len(set(drawn.values())) == 3
