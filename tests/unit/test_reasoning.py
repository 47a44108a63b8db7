"""Reasoning in texts: what is split from content, how many tokens it has, and what variables templates get."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
from fakes import byte_vocabulary
from pydantic import ValidationError
from tiny_models import byte_level

from ensemble_core.decoding.thinking import MarkTokens
from ensemble_core.errors import ConfigError
from ensemble_core.factory import thinking_of
from ensemble_core.member_config import MemberConfig
from ensemble_core.text.call_forms import HERMES
from ensemble_core.text.reasoning import KNOWN, Marks, ReasoningReader, Stage, marks_of, stage_within
from ensemble_core.text.shown import AnswerText
from ensemble_core.text.tools import folded
from ensemble_core.text.variables import MAX_VARIABLES, TemplateVariables, check_variables, reads_effort
from ensemble_core.text.vocabulary import from_tokenizer

THINK = KNOWN[0]
CALL = HERMES.write([("f", {"a": "</think>"})])


def read(
    text: str, pieces: list[str], stage: Stage = "before", **options: Any
) -> tuple[str, str, list[tuple[str, str]], str | None]:
    """Reasoning, content, calls and stop of a text that comes in pieces."""
    assert "".join(pieces) == text
    shown = AnswerText(reasoning=ReasoningReader(THINK, stage), **options)
    content = thoughts = ""
    calls = []
    for piece in pieces:
        content += shown.feed(piece.encode())
        thoughts += shown.take_reasoning()
        calls += shown.take_calls()
    content += shown.flush()
    thoughts += shown.take_reasoning()
    calls += shown.take_calls()
    assert content == shown.text
    return thoughts, content, [(call.name, call.arguments) for call in folded(calls)], shown.stop


TEXTS: list[tuple[str, Stage, str, str]] = [
    ("<think>\nwhy\n</think>\n\nso", "before", "why", "so"),
    (" \n<think>a < b </thin k></think>c", "before", "a < b </thin k>", "c"),
    ("so it is", "before", "", "so it is"),
    ("\n <thin", "before", "", "\n <thin"),
    ("\n <thin\n", "before", "", "\n <thin\n"),
    ("a <think>b</think>", "before", "", "a <think>b</think>"),
    ("why\n</think>\nso </think> <think>", "inside", "why", "so </think> <think>"),
    ("why </th", "inside", "why </th", ""),
    ("why\n\n", "inside", "why\n\n", ""),
    ("</think>so", "inside", "", "so"),
    ("<think>why", "inside", "<think>why", ""),
    ("<think></think>", "before", "", ""),
    ("<think>é中😀</think>é中😀", "before", "é中😀", "é中😀"),
    ("</think> so", "content", "", "</think> so"),
]


@pytest.mark.parametrize(("text", "stage", "thoughts", "content"), TEXTS)
def test_a_text_is_split_the_same_in_pieces_of_every_size(
    text: str, stage: Stage, thoughts: str, content: str
) -> None:
    rng = random.Random(7)
    for size in range(1, len(text) + 1):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        assert read(text, pieces, stage) == (thoughts, content, [], None), size
    for _ in range(30):
        cuts = sorted({0, len(text), *rng.choices(range(len(text) + 1), k=3)})
        pieces = [text[a:b] for a, b in pairwise(cuts)]
        assert read(text, pieces, stage) == (thoughts, content, [], None), pieces


def test_only_what_may_become_a_marker_is_held_back() -> None:
    reader = ReasoningReader(THINK)
    fed = ["<th", "ink", "> a", " b", "<", "c", "  ", "d\n", "</thi", "nk", ">", "e"]
    shown = [reader.feed(piece) for piece in fed]
    assert shown == [
        ("", ""),
        ("", ""),
        ("a", ""),
        (" b", ""),
        ("", ""),
        ("<c", ""),
        ("", ""),
        ("  d", ""),
        ("", ""),
        ("", ""),
        ("", ""),
        ("", "e"),
    ]


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_calls_come_after_reasoning_and_markers_within_it_open_none(size: int) -> None:
    text = f"<think>call <tool_call>? </think>\n\n{CALL}"
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    assert read(text, pieces, calls=HERMES)[:3] == ("call <tool_call>?", "", [("f", '{"a": "</think>"}')])


@pytest.mark.parametrize("size", [1, 3, 100])
def test_stop_strings_end_content_alone(size: int) -> None:
    text = "<think>a STOP b</think>\n\nc STOP d"
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    assert read(text, pieces, stops=("STOP", "\n\n")) == ("a STOP b", "c ", [], "STOP")


def test_under_a_form_every_character_behind_the_marker_is_content() -> None:
    assert read("<think>a</think> b", ["<think>a</think> b"], exact=True)[1] == " b"


@pytest.mark.parametrize(
    ("tokens", "num_tokens"),
    [
        (["<think>", "a", "b", "</think>", "c"], 2),
        (
            ["<", "think", ">a", "b", "</", "thi", "nk>", "c"],
            1,
        ),  # what began before the marker was complete is none
        (["<think>", "a", " ", "b</", "think>c"], 3),
        (["<think>", "<", "/", "a", "</think>"], 3),
        (["<think>", "a", "</"], 2),
        (["a", "b"], 0),
    ],
)
def test_tokens_of_reasoning_are_counted_without_the_markers(tokens: list[str], num_tokens: int) -> None:
    shown = AnswerText(reasoning=ReasoningReader(THINK))
    for token in tokens:
        shown.feed(token.encode())
    shown.flush()
    assert shown.num_reasoning == num_tokens


def test_an_answer_goes_on_where_its_beginning_ends() -> None:
    assert stage_within("<think>\nI begin", THINK) == "inside"
    assert stage_within("<think>\nI</think> end", THINK) == "content"
    assert stage_within("Well,", THINK) == "content"
    assert stage_within(" \n", THINK) == "before"


def test_marks_are_found_in_the_template_or_else_in_the_vocabulary() -> None:
    assert marks_of("{{ '<think>' }}{{ '</think>' }}", []) == THINK
    assert marks_of("{{ '<think>' }}", []) is None
    assert marks_of("", [b"x", b"[THINK]", b"[/THINK]"]) == Marks("[THINK]", "[/THINK]")
    assert marks_of("<think></think>", [b"[THINK]", b"[/THINK]"]) == THINK


def test_marks_may_be_configured_or_switched_off() -> None:
    vocabulary = byte_vocabulary()
    found = thinking_of("m", MemberConfig(model="x"), vocabulary, "<think></think>")
    assert found is not None
    assert found.marks == THINK
    off = MemberConfig.model_validate({"model": "x", "reasoning": "none"})
    assert thinking_of("m", off, vocabulary, "<think></think>") is None
    own = MemberConfig.model_validate({"model": "x", "reasoning": {"start": "<a>", "end": "</a>"}})
    chosen = thinking_of("m", own, vocabulary, "<think></think>")
    assert chosen is not None
    assert chosen.marks == Marks("<a>", "</a>")


@pytest.mark.parametrize(
    "wrong", [{"start": "a", "end": "a"}, {"start": " a"}, {"end": ""}, {"begin": "a"}, "off"]
)
def test_marks_that_cannot_work_are_refused(wrong: object) -> None:
    with pytest.raises(ValidationError):
        MemberConfig.model_validate({"model": "x", "reasoning": wrong})


def test_marks_that_cannot_work_with_a_vocabulary_are_refused_where_they_are_configured() -> None:
    vocabulary = from_tokenizer(byte_level(400, "<eos>", ("<think>", "</think>")), 400, [0], "m")
    assert MarkTokens(THINK, vocabulary).fault is None
    own = MemberConfig.model_validate({"model": "x", "reasoning": {"start": "<think>", "end": "<eos>"}})
    with pytest.raises(ConfigError, match=r"members\.m\.reasoning: '<eos>' ends"):
        thinking_of("m", own, vocabulary, "")
    lame = byte_vocabulary()
    object.__setattr__(lame, "encode", lambda _text: [97])
    with pytest.raises(ConfigError, match="cannot spell '<think>'"):
        thinking_of("m", MemberConfig.model_validate({"model": "x", "reasoning": {}}), lame, "")
    assert thinking_of("m", MemberConfig(model="x"), lame, "<think></think>") is None


def test_control_tokens_and_pieces_of_text_open_reasoning() -> None:
    tokenizer = byte_level(400, "<eos>", ("<think>", "</think>"))
    vocabulary = from_tokenizer(tokenizer, 400, [0], "m")
    marks = MarkTokens(THINK, vocabulary)
    spelt = {vocabulary.tokens[token_id].decode() for token_id in marks.openers("<think>")}
    assert "<think>" in spelt
    assert all("<think>".startswith(text) for text in spelt)
    assert {vocabulary.tokens[token_id] for token_id in marks.openers("nk>")} >= {b"n"}
    assert marks.next_of("</think>") == vocabulary.special_names["</think>"]
    assert vocabulary.tokens[marks.next_of("ink>")].startswith(b"i")


def test_no_token_holds_the_end_marker_and_something_behind_it() -> None:
    vocabulary = byte_vocabulary(["</think>", "</think>\n", ">{", ">", "x</think>"])
    marks = MarkTokens(THINK, vocabulary)
    free, closing = marks.inside(0), marks.inside(7)
    for text, in_general, at_the_end in [
        ("</think>", True, True),
        ("</think>\n", False, False),
        ("x</think>", True, True),
        (">{", True, False),
        ("a", True, True),
    ]:
        token_id = vocabulary.tokens.index(text.encode())
        assert (bool(free[token_id]), bool(closing[token_id])) == (in_general, at_the_end), text
    assert not free[list(vocabulary.stop_ids)].any()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "must be an object"),
        ({"tokenize": True}, "tokenize steers"),
        ({"add_generation_prompt": False}, "add_generation_prompt steers"),
        ({"chat_template": "x"}, "chat_template steers"),
        ({"messages": []}, "messages steers"),
        ({"tools": []}, "tools steers"),
        ({"self": 1}, "self steers"),
        ({"bos_token": "x"}, "bos_token steers"),
        ({"a b": 1}, "letters, digits"),
        ({"_a": 1}, "letters, digits"),
        ({f"a{i}": 1 for i in range(MAX_VARIABLES + 1)}, "up to 64 variables"),
        ({"a": "x" * 70_000}, "characters of JSON"),
        ({"a": 10**400}, "numbers are finite"),
        ({"a": [float("nan")]}, "numbers are finite"),
        ({"a": "\ud800"}, "surrogates"),
        ({"a": [[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]}, "levels deep"),
    ],
)
def test_variables_that_a_request_cannot_set(values: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_variables(values)


def test_variables_and_the_effort_reach_templates_that_know_them() -> None:
    assert check_variables({"enable_thinking": False, "a": {"b": [1, None, "é"]}})["a"] == {"b": [1, None, "é"]}
    both = "{{ enable_thinking }}{{ reasoning_effort }}"
    assert TemplateVariables(effort="none").of(both) == {"enable_thinking": False, "reasoning_effort": "none"}
    assert TemplateVariables(effort="high").of("{{ enable_thinking }}") == {"enable_thinking": True}
    assert TemplateVariables(effort="low").of("{{ messages }}") == {}
    assert TemplateVariables({"enable_thinking": True, "x": 1}, "minimal").of("{{ enable_thinking }}") == {
        "enable_thinking": True,
        "x": 1,
    }
    assert [reads_effort(text) for text in (both, "{{ enable_thinking }}", "{{ thinking }}")] == [
        True,
        True,
        False,
    ]
