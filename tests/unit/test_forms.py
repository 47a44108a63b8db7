"""Forms of every kind over small vocabularies: exactly the texts that were asked for, and nothing else."""

from __future__ import annotations

import json
import random
import re

import pytest
from fakes import byte_vocabulary
from tiny_models import byte_level

from ensemble_core.decoding.forms import MAX_CHOICES, MAX_FORM_LENGTH, TextForm, one_of
from ensemble_core.decoding.guidance import Constraint, Grammars
from ensemble_core.errors import InvalidRequestError
from ensemble_core.text.vocabulary import Vocabulary, from_tokenizer

BYTES = byte_vocabulary()


def chat_vocabulary() -> Vocabulary:
    tokenizer = byte_level(397, "<eos>", ("<|im_end|>", "<tool_call>", "[TOOL]"))
    return from_tokenizer(tokenizer, 400, [0, 1], "m")


def texts(constraint: Constraint, vocabulary: Vocabulary, most: int = 50) -> set[str]:
    """All texts that a constraint lets end, by single bytes; at most so many."""
    found: set[str] = set()

    def walk(at: Constraint, text: bytes) -> None:
        allowed = at.allowed()
        if allowed[min(vocabulary.stop_ids)]:
            found.add(text.decode())
        for token_id in allowed.nonzero().flatten().tolist():
            if token_id not in vocabulary.stop_ids and len(found) < most:
                after = at.copy()
                after.accept(token_id)
                walk(after, text + vocabulary.tokens[token_id])

    walk(constraint, b"")
    return found


def write(vocabulary: Vocabulary, form: TextForm, seed: int) -> list[int]:
    """A random walk that ends at a stop token. Control tokens are taken one time in two where they are allowed."""
    constraint, rng, ids = Grammars(vocabulary).compile(form), random.Random(seed), list[int]()
    for _ in range(300):
        choices = constraint.allowed().nonzero().flatten().tolist()
        marks = [token_id for token_id in choices if token_id in vocabulary.special_ids | vocabulary.stop_ids]
        ids.append(rng.choice(marks if marks and rng.random() < 0.5 else choices))
        if ids[-1] in vocabulary.stop_ids:
            return ids[:-1]
        constraint.accept(ids[-1])
    raise AssertionError("the text does not end")


CHOICES = ["a", "ab", "é😀", 'q"\\/\n\x00\x7f', "%json {}", "C", "a{1}", " "]


def test_a_choice_is_one_of_the_strings_byte_for_byte() -> None:
    assert texts(Grammars(BYTES).compile(one_of(CHOICES)), BYTES) == set(CHOICES)


@pytest.mark.parametrize(
    ("pattern", "fit"),
    [
        ("a|bc?", {"a", "b", "bc"}),
        ("^x{2}$", {"xx"}),
        (r"\$1/2", {"$1/2"}),
        ("(?i)no", {"no", "nO", "No", "NO"}),
        ("ü[0-2]", {"ü0", "ü1", "ü2"}),
    ],
)
def test_a_text_matches_the_whole_pattern(pattern: str, fit: set[str]) -> None:
    assert texts(Grammars(BYTES).compile(TextForm("regex", pattern)), BYTES) == fit


LARK = 'start: sign? DIGITS\nsign: "+" | "-"\nDIGITS: /[0-1]{1,2}/'
GBNF = 'root ::= sign? digit digit?\nsign ::= "+" | "-"\ndigit ::= [0-1]'


@pytest.mark.parametrize("source", [LARK, GBNF])
def test_lark_and_gbnf(source: str) -> None:
    fit = {s + d for s in ("", "+", "-") for d in ("0", "1", "00", "01", "10", "11")}
    assert texts(Grammars(BYTES).compile(TextForm("grammar", source)), BYTES) == fit


def test_a_grammar_may_ask_for_control_tokens_by_name_and_by_id() -> None:
    vocabulary = chat_vocabulary()
    named, numbered = vocabulary.tokens.index(b"<tool_call>"), vocabulary.tokens.index(b"[TOOL]")
    form = TextForm("grammar", f'start: <tool_call> %json {{"enum": [7]}} <[{numbered}]>')
    assert write(vocabulary, form, 0) == [named, *vocabulary.encode("7"), numbered]


def test_free_text_until_a_marker_and_json_behind_it() -> None:
    """What tools need: prose with no calls, or calls between prose, each in the form of its schema."""
    vocabulary = chat_vocabulary()
    end = vocabulary.tokens.index(b"[TOOL]")
    fields = {"n": {"enum": [1, 2]}}
    schema = {"type": "object", "properties": fields, "required": ["n"], "additionalProperties": False}
    rules = (
        f"start: TEXT (<tool_call> call <[{end}]> TEXT)*",
        f"call: %json {json.dumps(schema)}",
        "TEXT: /[^<]{0,20}/",
    )
    form = TextForm("grammar", "\n".join(rules))
    seen = set()
    for seed in range(40):
        text = b"".join(vocabulary.tokens[token_id] for token_id in write(vocabulary, form, seed)).decode()
        calls = re.findall(r"<tool_call>(.*?)\[TOOL\]", text, re.DOTALL)
        assert all(json.loads(each)["n"] in (1, 2) for each in calls)
        assert text.count("<tool_call>") == len(calls)
        seen.add(len(calls) > 0)
    assert seen == {True, False}


def test_a_marker_of_plain_text_begins_a_constraint_too() -> None:
    form = TextForm(
        "grammar", 'start: TEXT | head %json {"enum": [1]}\nhead[lazy]: /(.|\\n)*CALL /\nTEXT: /[a-z]*/'
    )
    constraint = Grammars(BYTES).compile(form)
    for byte in b"ab CALL ":
        assert constraint.allowed()[byte]
        constraint.accept(byte)
    assert constraint.allowed().nonzero().flatten().tolist() == [ord("1")]


def test_layouts_of_json() -> None:
    schema = '{"type": "array", "prefixItems": [{"enum": [1]}, {"enum": [2]}], "minItems": 2, "items": false}'
    assert texts(Grammars(BYTES).compile(TextForm("json", schema, layout="")), BYTES) == {"[1,2]"}
    loose = texts(Grammars(BYTES).compile(TextForm("json", schema, layout="~")), BYTES)
    assert {"[1,2]", "[1,~2]"} <= loose


@pytest.mark.parametrize(
    ("kind", "source", "said"),
    [
        ("regex", "(", "unclosed group"),
        ("regex", "a(?=b)", "look-around"),
        ("regex", r"(a)\1", "backreferences"),
        ("grammar", "start: <|nobody|>", "unknown special token"),
        ("grammar", "start: nowhere", "nowhere"),
        ("grammar", "root ::= (", "GBNF"),
        ("grammar", "what is this", "GBNF"),
        ("grammar", "root ::= " + "(" * 3000, "GBNF"),
        ("grammar", 'start: "a" start', "cannot be used"),
    ],
)
def test_what_cannot_be_read_is_refused_by_the_clients_name(kind: str, source: str, said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said) as caught:
        Grammars(BYTES).compile(TextForm(kind, source, field="structured_outputs.x"))  # type: ignore[arg-type]
    assert caught.value.param == "structured_outputs.x"
    assert str(caught.value).startswith("structured_outputs.x: ")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("regex", ""),
        ("grammar", ""),
        ("choice", "[]"),
        ("choice", '[""]'),
        ("choice", "{"),
        ("choice", '["a", 1]'),
        ("choice", json.dumps(["a"] * (MAX_CHOICES + 1))),
        ("json", "x" * (MAX_FORM_LENGTH + 1)),
        ("tree", "x"),
    ],
)
def test_a_form_that_is_none_is_refused_before_anything_is_built(kind: str, source: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        TextForm(kind, source, field="guided_x")  # type: ignore[arg-type]
    assert caught.value.param == "guided_x"


def test_the_clients_name_does_not_make_another_form() -> None:
    assert TextForm("regex", "a", field="x") == TextForm("regex", "a", field="y")
    assert (
        len({TextForm("regex", "a", field="x"), TextForm("regex", "a", field="y"), TextForm("choice", '["a"]')})
        == 2
    )
