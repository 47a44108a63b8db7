"""What bodies say that a text must be: every name, on both endpoints, said once."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from ensemble_core.decoding.forms import MAX_CHOICES, MAX_FORM_LENGTH, TextForm, one_of
from ensemble_core.errors import InvalidRequestError
from server.schema.chat import ChatRequest
from server.schema.completions import CompletionRequest
from server.schema.sampling import SamplingFields

SCHEMA = {"type": "object"}
TEXT = '{"type":"object"}'
BODIES: dict[str, tuple[type[SamplingFields], dict[str, Any]]] = {
    "completions": (CompletionRequest, {"model": "duo", "prompt": "a"}),
    "chat": (ChatRequest, {"model": "duo", "messages": [{"role": "user", "content": "a"}]}),
}


def form_of(endpoint: str, **fields: object) -> TextForm | None:
    kind, body = BODIES[endpoint]
    return kind.model_validate(body | fields).form


FORMS: list[tuple[dict[str, Any], TextForm | None, str]] = [
    ({}, None, ""),
    ({"response_format": None, "structured_outputs": None, "guided_json": None}, None, ""),
    ({"response_format": {"type": "text"}}, None, ""),
    ({"response_format": {"type": "json_object"}}, TextForm("json"), "response_format"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
        TextForm("json", TEXT),
        "response_format",
    ),
    ({"structured_outputs": {"json": SCHEMA}}, TextForm("json", TEXT), "structured_outputs.json"),
    ({"structured_outputs": {"json": TEXT}}, TextForm("json", TEXT), "structured_outputs.json"),
    ({"structured_outputs": {"regex": "a+"}}, TextForm("regex", "a+"), "structured_outputs.regex"),
    ({"structured_outputs": {"choice": ["a", "é"]}}, one_of(["a", "é"]), "structured_outputs.choice"),
    (
        {"structured_outputs": {"grammar": "start: A"}},
        TextForm("grammar", "start: A"),
        "structured_outputs.grammar",
    ),
    ({"structured_outputs": {"json_object": True}}, TextForm("json"), "structured_outputs.json_object"),
    (
        {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
        TextForm("json", TEXT, layout=""),
        "structured_outputs.json",
    ),
    (
        {"structured_outputs": {"json_object": True, "whitespace_pattern": " ?", "structural_tag": None}},
        TextForm("json", layout=" ?"),
        "structured_outputs.json_object",
    ),
    ({"guided_json": SCHEMA}, TextForm("json", TEXT), "guided_json"),
    ({"guided_json": TEXT}, TextForm("json", TEXT), "guided_json"),
    ({"guided_regex": "a|b"}, TextForm("regex", "a|b"), "guided_regex"),
    ({"guided_choice": ["a", "b"]}, one_of(["a", "b"]), "guided_choice"),
    ({"guided_grammar": 'root ::= "x"'}, TextForm("grammar", 'root ::= "x"'), "guided_grammar"),
    ({"guided_regex": "a", "response_format": {"type": "text"}}, TextForm("regex", "a"), "guided_regex"),
]


@pytest.mark.parametrize("endpoint", BODIES)
@pytest.mark.parametrize(("fields", "form", "name"), FORMS)
def test_every_name_is_one_form(endpoint: str, fields: dict[str, Any], form: TextForm | None, name: str) -> None:
    found = form_of(endpoint, **fields)
    assert found == form
    assert found is None or found.field == name


JSON = {"type": "json_object"}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    (
        {"response_format": JSON, "structured_outputs": {"regex": "a"}},
        "structured_outputs.regex",
        "response_format",
    ),
    ({"response_format": JSON, "guided_regex": "a"}, "guided_regex", "response_format"),
    ({"guided_regex": "a", "guided_json": SCHEMA}, "guided_regex", "guided_json"),
    (
        {"structured_outputs": {"choice": ["a"]}, "guided_choice": ["a"]},
        "guided_choice",
        r"structured_outputs\.choice",
    ),
    (
        {"structured_outputs": {"choice": ["a"], "regex": "a"}},
        "structured_outputs.choice",
        r"structured_outputs\.regex",
    ),
    ({"structured_outputs": {"json": SCHEMA, "json_object": True}}, "structured_outputs.json_object", "json and"),
    ({"structured_outputs": {}}, "structured_outputs", "json, regex, choice, grammar, json_object"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs", "one of"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "grammar"),
    (
        {"structured_outputs": {"json": SCHEMA, "disable_additional_properties": True}},
        "structured_outputs.disable_additional_properties",
        "additionalProperties",
    ),
    ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp", "known are"),
    ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "structured_outputs", "white space"),
    (
        {"structured_outputs": {"json_object": True, "whitespace_pattern": " ", "disable_any_whitespace": True}},
        "structured_outputs.disable_any_whitespace",
        "contradicts",
    ),
    ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "whitespace_pattern"),
    ({"guided_regex": ""}, "guided_regex", "empty"),
    ({"guided_json": " "}, "guided_json", "schema"),
    ({"guided_json": {"minimum": float("nan")}}, "guided_json", "cannot be read"),
    ({"guided_choice": []}, "guided_choice", "1 to"),
    ({"guided_choice": ["a"] * (MAX_CHOICES + 1)}, "guided_choice", "1 to"),
    ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice", "not empty"),
    ({"guided_grammar": "x" * (MAX_FORM_LENGTH + 1)}, "guided_grammar", str(MAX_FORM_LENGTH)),
]


@pytest.mark.parametrize("endpoint", BODIES)
@pytest.mark.parametrize(("fields", "param", "said"), REFUSED)
def test_what_contradicts_itself_is_refused_by_name(
    endpoint: str, fields: dict[str, Any], param: str, said: str
) -> None:
    with pytest.raises(InvalidRequestError, match=said) as caught:
        _ = form_of(endpoint, **fields)
    assert caught.value.param == param


@pytest.mark.parametrize("endpoint", BODIES)
@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "structural_tag"}},
        {"response_format": {"type": "json_schema"}},
        {"structured_outputs": "a+"},
        {"structured_outputs": {"regex": 1}},
        {"structured_outputs": {"json": 1}},
        {"structured_outputs": {"json": "\ud800"}},
        {"guided_choice": "ab"},
        {"guided_choice": ["a", 1]},
        {"guided_json": []},
        {"guided_regex": "\ud800"},
        {"allowed_token_ids": []},
        {"allowed_token_ids": [-1]},
        {"allowed_token_ids": "1"},
        {"allowed_token_ids": [True]},
        {"allowed_token_ids": [1] * 1025},
        {"bad_words": "no"},
        {"bad_words": [1]},
        {"bad_words": ["a"] * 129},
    ],
)
def test_wrong_types_are_refused(endpoint: str, fields: dict[str, Any]) -> None:
    with pytest.raises((ValidationError, InvalidRequestError)):
        _ = form_of(endpoint, **fields)
