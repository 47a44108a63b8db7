from __future__ import annotations

import logging
import re
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from ensemble_core.errors import InvalidRequestError
from server.schema.chat import ChatRequest
from server.schema.completions import CompletionRequest
from server.schema.messages import MessagesRequest
from server.schema.responses import ResponseRequest
from server.schema.sampling import GenerationFields
from server.schema.tokenizers import TokenizeRequest

BASE: dict[str, Any] = {"model": "duo", "prompt": "x"}


def parse(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate(BASE | fields)


CHAT: dict[str, Any] = {"model": "duo", "messages": [{"role": "user", "content": "x"}]}
SAID: dict[str, Any] = {"model": "duo", "max_tokens": 5, "messages": [{"role": "user", "content": "x"}]}
BODIES: dict[type[GenerationFields], dict[str, Any]] = {
    CompletionRequest: BASE,
    ChatRequest: CHAT,
    ResponseRequest: {"model": "duo", "input": "x"},
    MessagesRequest: SAID,
}
KINDS = list(BODIES)
REFUSED = [(kind, name) for kind in KINDS for name in sorted(kind.refused)]


def base_of(kind: type[GenerationFields]) -> dict[str, Any]:
    return BODIES[kind]


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate(CHAT | fields)


@pytest.mark.parametrize(("kind", "name"), REFUSED)
def test_unsupported_parameters_pass_only_with_neutral_values(kind: type[GenerationFields], name: str) -> None:
    kind.model_validate(base_of(kind) | {name: None})
    for value in kind.refused[name].neutral:
        kind.model_validate(base_of(kind) | {name: value})
    with pytest.raises(InvalidRequestError, match=rf"^{name} is not supported") as caught:
        kind.model_validate(base_of(kind) | {name: "something else"})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("suffix", "x"),
        ("use_beam_search", 0),  # JSON's 0 is no false
        ("length_penalty", True),
        ("guided_whitespace_pattern", " "),
    ],
)
def test_values_that_would_change_the_answer_are_refused(name: str, value: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse(**{name: value})
    assert caught.value.param == name


def test_a_float_is_as_neutral_as_an_integer() -> None:
    parse(length_penalty=1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_supported_refused_and_ignored_does_not_overlap(kind: type[GenerationFields]) -> None:
    assert not kind.refused.keys() & kind.model_fields.keys()
    assert not kind.ignored.keys() & (kind.model_fields.keys() | kind.refused.keys())


def test_unknown_fields_are_ignored_with_a_debug_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="server.schema.sampling"):
        parse(colour=3, priority=1, suffix=None, secret="not to be logged")
    assert [record.levelname for record in caplog.records] == ["DEBUG"]
    assert "['colour', 'secret']" in caplog.text
    assert "not to be logged" not in caplog.text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", True),
        ("max_tokens", 5.5),
        ("max_tokens", "5"),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", [1]),
        ("n", False),
        ("seed", 1.5),
        ("stream", "true"),
        ("stream", 1),
        ("stop", 5),
        ("stop", ["a", 5]),
        ("stop", {"a": "b"}),
        ("model", 5),
        ("user", 5),
        ("prompt", 5),
        ("prompt", True),
        ("prompt", {"text": "x"}),
        ("prompt", ["x", None]),
        ("prompt", [1, "x"]),
        ("prompt", [1, True]),
        ("prompt", [1.5]),
        ("prompt", [[1e300]]),
        ("prompt", [[1], "x"]),
        ("prompt", [[1], ["x"]]),
        ("prompt", [["x"]]),
        ("prompt", [-1]),
        ("prompt", [2**31]),
        ("best_of", 1.5),
        ("seed", float("inf")),
        ("echo", "yes"),
        ("echo", 1),
        ("logprobs", True),
        ("logprobs", 1.5),
        ("presence_penalty", "1"),
        ("frequency_penalty", False),
        ("top_k", 1.5),
        ("min_p", "0"),
        ("min_tokens", True),
        ("ignore_eos", 1),
        ("stop_token_ids", 5),
        ("stop_token_ids", ["5"]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [1] * 65),
        ("include_stop_str_in_output", "no"),
        ("skip_special_tokens", 0),
        ("add_special_tokens", 0),
        ("return_token_ids", "true"),
        ("logit_bias", []),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"05": 1}),
        ("logit_bias", {"5": "1"}),
        ("logit_bias", {"5": True}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"5": float("nan")}),
        ("logit_bias", {"9" * 5000: 1}),
        ("logit_bias", {str(token_id): 0 for token_id in range(1025)}),
    ],
)
def test_types_are_strict(name: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        parse(**{name: value})
    assert caught.value.errors()[0]["loc"][0] == name


def test_an_integer_is_a_fine_float() -> None:
    assert parse(temperature=1, top_p=1).temperature == 1.0


def test_a_number_without_a_fraction_is_a_fine_integer() -> None:
    """As in JSON Schema, and so in our OpenAPI document."""
    body = parse(
        prompt=[[1.0], [2]], seed=-51.0, max_tokens=5.0, n=2.0, logprobs=1.0, top_k=-1.0, stop_token_ids=[3.0]
    )
    assert (body.seed, body.max_tokens, body.n, body.logprobs, body.top_k) == (-51, 5, 2, 1, -1)
    assert (body.prompts, body.stop_token_ids) == ([(1,), (2,)], [3])
    assert all(isinstance(each, int) for each in (body.seed, *body.prompts[0], *(body.stop_token_ids or ())))


def test_the_document_says_that_no_prompt_may_be_empty() -> None:
    kinds = CompletionRequest.model_json_schema()["properties"]["prompt"]["anyOf"]
    assert all(kind.get("minLength", kind.get("minItems")) == 1 for kind in kinds)
    nested = [kind["items"] for kind in kinds if "items" in kind]
    assert next(kind for kind in nested if kind["type"] == "array")["minItems"] == 1
    assert next(kind for kind in nested if kind["type"] == "string")["minLength"] == 1


def test_null_means_the_default() -> None:
    fields = CompletionRequest.model_fields.keys() - BASE.keys()
    assert parse(**dict.fromkeys(fields)) == parse()


def test_one_and_many_prompts_and_stops() -> None:
    assert parse(prompt="a").prompts == ["a"]
    assert parse(prompt=[0]).prompts == [(0,)]
    assert parse(prompt=[[0], [1, 2]]).prompts == [(0,), (1, 2)]
    assert parse(prompt=["a", "b"]).prompts == ["a", "b"]
    assert parse(stop="a").stops == ("a",)
    assert parse(stop=["a", "b"]).stops == ("a", "b")
    assert parse(stop=[]).stops == parse(stop=None).stops == ()


def test_fusion_by_name_is_short_for_an_object() -> None:
    short = parse(ensemble={"fusion": "relative"})
    assert short == parse(ensemble={"fusion": {"name": "relative"}})


@pytest.mark.parametrize("value", [None, False])
def test_no_trace_is_the_default(value: object) -> None:
    ensemble = parse(ensemble={"trace": value}).ensemble
    assert ensemble is not None
    assert not ensemble.trace


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest, TokenizeRequest])
def test_the_openapi_schema_describes_every_parameter_and_ours(kind: type[BaseModel]) -> None:
    schema = kind.model_json_schema()
    assert set(schema["properties"]) == set(kind.model_fields)
    undescribed = [name for name, each in schema["properties"].items() if not each.get("description")]
    assert undescribed == []
    if kind is not TokenizeRequest:
        ours = schema["$defs"]["EnsembleOptions"]["properties"]
        assert set(ours) == {"members", "weights", "weighting", "fusion", "mode", "limits", "trace"}
        assert schema["properties"]["temperature"]["maximum"] == 2


def content(message: dict[str, Any]) -> str:
    return chat(messages=[{"role": "user"} | message]).messages[0].content


def test_content_is_text_or_text_parts() -> None:
    assert content({"content": "a"}) == "a"
    assert content({"content": ""}) == ""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert content({"content": parts}) == "a\nb"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"content": None}, "string or a list of text parts"),
        ({"content": []}, "string or a list of text parts"),
        ({"content": 5}, "string or a list of text parts"),
        ({"content": "\ud800"}, "surrogates"),
        ({"content": [5]}, "object with a type"),
        ({"content": [{"text": "a"}]}, "object with a type"),
        ({"content": [{"type": "text"}]}, "must be a string"),
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "'image_url' are not supported"),
        ({"content": [{"type": "input_audio"}]}, "'input_audio' are not supported"),
        ({"content": "a", "role": "function"}, "'system', 'developer', 'user', 'assistant' or 'tool'"),
        ({"content": "a", "role": "tool"}, "Field required"),
        ({"content": "a", "tool_call_id": "x"}, "of messages of role tool alone"),
        ({"content": "a", "role": "assistant", "tool_calls": [{"id": "x"}]}, "Field required"),
        ({"content": None, "role": "assistant", "tool_calls": []}, "string or a list of text parts"),
        ({"content": "a", "role": "assistant", "function_call": {"name": "x"}}, "function_call is not supported"),
        ({"content": "a", "role": "assistant", "audio": {"id": "x"}}, "audio is not supported"),
        ({"content": "a", "name": 5}, "valid string"),
    ],
)
def test_messages_that_are_none(message: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(words)) as caught:
        content(message)
    assert caught.value.errors()[0]["loc"][:2] == ("messages", 0)


def test_neutral_fields_of_messages_pass() -> None:
    content({"content": "a", "tool_calls": [], "audio": None, "refusal": None, "name": "Ada"})


def test_the_developer_speaks_as_the_system() -> None:
    parsed = chat(messages=[{"role": "developer", "content": "x"}])
    assert parsed.messages[0].flat() == {"role": "system", "content": "x"}


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ("json", ("response_format",)),
        ({"type": "grammar"}, ("response_format", "type")),
        ({}, ("response_format", "type")),
        ({"type": "json_schema"}, ("response_format",)),
        ({"type": "text", "json_schema": {"schema": {}}}, ("response_format",)),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, ("response_format", "json_schema", "schema")),
        ({"type": "json_schema", "json_schema": {"schema": 5}}, ("response_format", "json_schema", "schema")),
    ],
)
def test_response_formats_that_are_none(value: object, path: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError) as caught:
        chat(response_format=value)
    assert caught.value.errors()[0]["loc"] == path


@pytest.mark.parametrize("fields", [{}, {"prompt": "a", "messages": CHAT["messages"]}, {"prompt": None}])
def test_tokenize_takes_either_a_text_or_messages(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="either prompt or messages"):
        TokenizeRequest.model_validate(fields)
