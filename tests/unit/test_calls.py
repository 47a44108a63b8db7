"""Calls in a growing text: read back as they were written, in whatever pieces; and grammars that hold to a form."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import replace
from typing import Any

import pytest
from fakes import byte_vocabulary
from tool_cases import WEATHER, check_call, random_tools

from ensemble_core.decoding.calling import calls_form, constraint_of
from ensemble_core.decoding.forms import TextForm
from ensemble_core.decoding.guidance import Grammars
from ensemble_core.decoding.workshop import Workshop
from ensemble_core.errors import InvalidRequestError
from ensemble_core.text.call_forms import FORMS, HERMES, CallForm
from ensemble_core.text.detokenizer import Detokenizer
from ensemble_core.text.shown import AnswerText
from ensemble_core.text.tools import CallPiece, Tool, ToolCall, ToolUse, folded
from ensemble_core.text.vocabulary import Vocabulary

Called = list[tuple[str, dict[str, Any]]]
MARKS = ("[TOOL_CALLS]", "[ARGS]", "<tool_call>")
TOOL = Tool("get_weather", "The weather.", json.dumps(WEATHER))


def read(text: Detokenizer, data: bytes, sizes: random.Random | None = None) -> tuple[str, list[ToolCall]]:
    """Content and calls of some bytes; sizes: of the pieces that they come in, None: all at once."""
    content, pieces = "", list[CallPiece]()
    while data:
        size = len(data) if sizes is None else sizes.choice([1, 2, 3, 9])
        content += text.feed(data[:size])
        pieces += text.take_calls()
        data = data[size:]
    content += text.flush()
    return content, folded([*pieces, *text.take_calls()])


def some_calls(rng: random.Random, form: CallForm) -> Called:
    values: list[Any] = [
        1,
        -2.5,
        None,
        True,
        'a"b',
        "}{][",
        "\\",
        "é中😀\n",
        "</tool_call>",
        "[ARGS]",
        [{"a": []}],
        {},
    ]
    names = ["a", '"', "}", "\\", "é"]
    count = rng.randint(1, 3) if form.between is not None else 1
    return [
        (
            rng.choice(["get", "a-b_C9"]),
            {name: rng.choice(values) for name in rng.sample(names, rng.randint(0, 3))},
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_calls_are_read_as_they_were_written(form: CallForm) -> None:
    rng = random.Random(form.name)
    contents = [""] if form.at_start else ["", "Let me see.", "a <tool_c [TOOL", "x\n\n", " <", "é😀 "]
    for _ in range(150):
        calls, content = some_calls(rng, form), rng.choice(contents)
        data = (content + form.write(calls)).encode()
        whole, pieces = read(AnswerText(calls=form), data), read(AnswerText(calls=form), data, rng)
        for shown, found in (whole, pieces):
            assert shown == content.rstrip()
            assert [(call.name, json.loads(call.arguments)) for call in found] == calls
            assert len({call.call_id for call in found}) == len(calls)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize(
    "text", ["", "Hello", "a <tool_cal", "1 < 2", '{"name": ', " \n", "[TOOL_CALLS", '{"a": 1}']
)
def test_text_without_a_call_is_shown_as_it_is(form: CallForm, text: str) -> None:
    rng = random.Random(text)
    assert (
        read(AnswerText(calls=form), text.encode())
        == read(AnswerText(calls=form), text.encode(), rng)
        == (text, [])
    )


def test_a_call_that_is_cut_has_the_beginning_of_its_arguments() -> None:
    whole = 'Hm. <tool_call>\n{"name": "f", "arguments": {"a": "b c"}}\n</tool_call>'
    for end in range(len(whole)):
        content, calls = read(AnswerText(calls=HERMES), whole[:end].encode())
        assert "Hm. <tool_call".startswith(content)
        assert all(call.name == "f" and '{"a": "b c"}'.startswith(call.arguments) for call in calls)


@pytest.mark.parametrize("form", FORMS)
def test_where_a_call_must_come_its_marker_is_never_content(form: CallForm) -> None:
    for end in range(len(form.opening)):
        text = form.opening[:end].encode()
        assert read(AnswerText(calls=form), text)[0] == form.opening[:end]
        assert read(AnswerText(calls=replace(form, alone=True)), text) == ("", [])


def test_stop_strings_end_content_and_never_a_call() -> None:
    call = HERMES.write([("f", {"a": "STOP"})])
    text = AnswerText(("STOP", "done<to"), calls=HERMES)
    assert read(text, f"not yet STO{call}".encode())[0] == "not yet STO"
    assert text.stop is None
    assert text.called
    text = AnswerText(("STOP",), calls=HERMES)
    assert read(text, f"stopSTOP {call}".encode()) == ("stop", [])
    assert (text.stop, text.called) == ("STOP", False)


def test_pieces_of_a_stream_begin_with_name_and_id() -> None:
    text = AnswerText(calls=HERMES)
    pieces = [piece for byte in HERMES.write([("f", {"a": 1}), ("g", {})]).encode() if not text.feed(bytes([byte]))
              for piece in text.take_calls()]  # fmt: skip
    assert [(piece.index, piece.name) for piece in pieces if piece.name] == [(0, "f"), (1, "g")]
    assert all((piece.name is None) == (piece.call_id is None) for piece in pieces)
    assert [piece.arguments for piece in pieces if piece.name] == ["", ""]


def vocabulary(marks: tuple[str, ...] = ()) -> Vocabulary:
    """Bytes, `<eos>`, and control tokens of those names."""
    found = byte_vocabulary()
    own = range(len(found), len(found) + len(marks))
    return replace(
        found,
        tokens=[*found.tokens, *(mark.encode() for mark in marks)],
        special_ids=found.special_ids | frozenset(own),
    )


def written(grammar: Grammars, use: ToolUse, form: CallForm, words: Vocabulary, rng: random.Random) -> list[int]:
    """A random walk through the grammar. Bytes that begin what ends the walk sooner are preferred."""
    constraint = constraint_of(grammar, calls_form(use, form, words, None))
    ids: list[int] = []
    while len(ids) < 4000:
        allowed = constraint.allowed().nonzero().flatten().tolist()
        if words.stop_ids & set(allowed) and rng.random() < 0.2:
            return ids
        ids.append(rng.choice([token_id for token_id in allowed if token_id not in words.stop_ids] or [-1]))
        if ids[-1] == -1:
            return ids[:-1]
        constraint.accept(ids[-1])
    raise AssertionError("the walk does not end")


@pytest.mark.parametrize("marks", [(), MARKS], ids=["bytes", "control tokens"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_whatever_is_sampled_calls_are_valid(form: CallForm, marks: tuple[str, ...]) -> None:
    rng = random.Random(f"{form.name} {marks}")
    words = vocabulary(marks)
    grammar = Grammars(words)
    shown = words.with_text(form.marks(words.special_names).values())
    num_calls = 0
    for rank in range(12):
        tools = random_tools(rng)
        allowed = None if rank % 3 else (tools[0].name,)
        use = ToolUse(tools, "required" if rank % 4 else "auto", allowed, parallel=rank % 2 == 0)
        ids = written(grammar, use, form, words, rng)
        content, calls = read(AnswerText(calls=form), b"".join(map(shown.text_bytes, ids)), rng)
        assert use.choice == "auto" or (calls and not content)
        assert use.parallel or len(calls) <= 1
        for call in calls:
            check_call(call, use)
        num_calls += len(calls)
    assert num_calls


def spell(constraint: Any, text: str) -> bool:
    """Whether a text of bytes is allowed all along."""
    for byte in text.encode():
        if not constraint.allowed()[byte]:
            return False
        constraint.accept(byte)
    return True


AUTO = ToolUse((TOOL,))
WORDS = byte_vocabulary()
GRAMMARS = Grammars(WORDS)
GOOD = HERMES.write([("get_weather", {"city": "Oslo", "unit": "celsius"})])


@pytest.mark.parametrize(
    ("use", "text", "fits", "ends"),
    [
        (AUTO, "Hello <there> 1 < 2", True, True),
        (AUTO, f"Well: {GOOD}", True, True),
        (AUTO, f"{GOOD}\n{GOOD}", True, True),
        (AUTO, f"{GOOD} and text", False, False),
        (AUTO, "a <tool_call> is", False, False),
        (AUTO, GOOD[:30], True, False),
        (AUTO, GOOD.replace("Oslo", "Oslo over 8"), False, False),
        (AUTO, GOOD.replace("celsius", "kelvin"), False, False),
        (AUTO, GOOD.replace("get_weather", "get_news"), False, False),
        (AUTO, GOOD.replace('"unit"', '"more": 1, "unit"'), False, False),
        (replace(AUTO, parallel=False), GOOD, True, True),
        (replace(AUTO, parallel=False), f"{GOOD}\n{GOOD}", False, False),
        (replace(AUTO, choice="required"), "Hello", False, False),
        (replace(AUTO, choice="required"), f"{GOOD}\n{GOOD}", True, True),
    ],
)
def test_what_the_grammar_lets_pass(use: ToolUse, text: str, fits: bool, ends: bool) -> None:
    constraint = constraint_of(GRAMMARS, calls_form(use, HERMES, WORDS, None))
    assert spell(constraint, text) == fits
    assert bool(constraint.allowed()[256]) == ends or not fits


def test_text_of_a_form_stands_beside_calls() -> None:
    schema = TextForm("json", '{"enum": ["yes", "no"]}', field="response_format")
    for text, fits in (('"yes"', True), ("yes", False), (GOOD, True), (f"hm {GOOD}", False)):
        form = calls_form(AUTO, HERMES, WORDS, schema)
        assert spell(constraint_of(GRAMMARS, form), text) == fits
    llama = next(form for form in FORMS if form.at_start)
    with pytest.raises(InvalidRequestError, match="response_format: beside tools"):
        calls_form(AUTO, llama, WORDS, schema)
    with pytest.raises(InvalidRequestError, match="guided_regex: beside tools"):
        calls_form(AUTO, HERMES, WORDS, TextForm("regex", "a+", field="guided_regex"))
    assert calls_form(replace(AUTO, choice="required"), llama, WORDS, schema)
    for source in ("{", "true", "[" * 10_000):
        with pytest.raises(InvalidRequestError, match="response_format: the JSON schema must be an object"):
            calls_form(AUTO, HERMES, WORDS, TextForm("json", source, field="response_format"))


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "object", "properties": {"a": {"type": "frob"}}}, "frob"),
        ({"type": "object", "properties": {"a": {"not": {"type": "string"}}}}, "not"),
        (
            {"properties": {"a": {"type": "integer", "minimum": 5, "maximum": 1}}, "required": ["a"]},
            "nsatisfiable",
        ),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "no finite value"),
    ],
)
def test_a_schema_that_cannot_be_compiled_is_named(schema: dict[str, Any], words: str) -> None:
    use = ToolUse((TOOL, Tool("bad", "", json.dumps(schema))), "required")
    with pytest.raises(InvalidRequestError, match=words) as caught:
        constraint_of(GRAMMARS, calls_form(use, HERMES, WORDS, None))
    assert caught.value.param == "tools.1.function.parameters"
    assert str(caught.value).startswith("tools.1.function.parameters: the JSON schema cannot be used: ")


@pytest.mark.parametrize(
    "tool", [("a b", "{}"), ("", "{}"), ("x" * 65, "{}"), ("a", "[]"), ("a", "{"), ("é", "{}")]
)
def test_a_tool_is_checked_when_it_is_made(tool: tuple[str, str]) -> None:
    with pytest.raises(InvalidRequestError, match="tools: a tool has a name"):
        Tool(tool[0], "", tool[1])


def test_a_hundred_and_twenty_eight_large_tools_compile() -> None:
    properties = {f"field_{i}": {"type": "string", "description": "words " * 40} for i in range(6)}
    tools = tuple(Tool(f"t{i}", "", json.dumps({"properties": properties})) for i in range(128))
    form = calls_form(ToolUse(tools), HERMES, WORDS, None)
    assert 200_000 < len(form.source) < form.most
    assert constraint_of(GRAMMARS, form).allowed()[256]


def test_tools_are_tried_out_beside_the_engine() -> None:
    """As the server does it: 128 tools of the largest size, and one at fault among others."""
    wide = {f"field_{i}": {"type": "string", "description": "words " * 50} for i in range(6)}
    tools = tuple(Tool(f"t{i}", "", json.dumps({"properties": wide})) for i in range(128))
    loop = {"properties": {"a": {"$ref": "#"}}, "required": ["a"]}
    form = calls_form(ToolUse(tools), HERMES, WORDS, None)
    endless = calls_form(ToolUse((TOOL, Tool("bad", "", json.dumps(loop)), *tools[:3])), HERMES, WORDS, None)
    grammars, workshop = Grammars(WORDS), Workshop()
    try:
        for each in (form, endless):
            asyncio.run(workshop.prepare(grammars, each))
            assert grammars.knows(each)
        assert constraint_of(grammars, form).allowed()[256]
        with pytest.raises(InvalidRequestError, match=r"tools\.1\.function\.parameters: .*no finite value"):
            constraint_of(grammars, endless)
    finally:
        workshop.close()
