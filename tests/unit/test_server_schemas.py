from __future__ import annotations

import logging
from typing import Any

import pytest
from pydantic import ValidationError

from ensemble_core.errors import InvalidRequestError
from server.schemas import NEUTRAL, CompletionRequest

BASE: dict[str, Any] = {"model": "duo", "prompt": "x"}


def parse(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate(BASE | fields)


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_unsupported_parameters_pass_only_with_neutral_values(name: str) -> None:
    parse(**{name: None})
    for value in NEUTRAL[name]:
        parse(**{name: value})
    with pytest.raises(InvalidRequestError, match=rf"^{name} is not supported") as caught:
        parse(**{name: "something else"})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("presence_penalty", 0.5),
        ("presence_penalty", False),  # JSON's false is no 0
        ("presence_penalty", "0"),
        ("echo", 0),
        ("echo", True),
        ("logprobs", 0),
        ("top_k", 40),
        ("best_of", 2),
        ("logit_bias", {"5": 1}),
        ("response_format", {"type": "json_object"}),
    ],
)
def test_values_that_would_change_the_answer_are_refused(name: str, value: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse(**{name: value})
    assert caught.value.param == name


def test_a_float_zero_is_as_neutral_as_an_integer() -> None:
    parse(presence_penalty=0.0, repetition_penalty=1.0, min_p=0.0)


@pytest.mark.parametrize("n", [None, 1, 3])
def test_best_of_is_neutral_where_it_equals_n(n: int | None) -> None:
    parse(n=n, best_of=n or 1)
    with pytest.raises(InvalidRequestError, match="best_of"):
        parse(n=n, best_of=4)


def test_table_and_fields_do_not_overlap() -> None:
    assert not NEUTRAL.keys() & CompletionRequest.model_fields.keys()


def test_unknown_fields_are_ignored_with_a_debug_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="server.schemas"):
        parse(priority=3, suffix=None, secret="not to be logged")
    assert [record.levelname for record in caplog.records] == ["DEBUG"]
    assert "['priority', 'secret']" in caplog.text
    assert "not to be logged" not in caplog.text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", True),
        ("max_tokens", 5.0),
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
    ],
)
def test_types_are_strict(name: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        parse(**{name: value})
    assert caught.value.errors()[0]["loc"][0] == name


def test_an_integer_is_a_fine_float() -> None:
    assert parse(temperature=1, top_p=1).temperature == 1.0


def test_null_means_the_default() -> None:
    fields = CompletionRequest.model_fields.keys() - BASE.keys()
    assert parse(**dict.fromkeys(fields)) == parse()


def test_one_and_many_prompts_and_stops() -> None:
    assert parse(prompt="a").prompts == ["a"]
    assert parse(prompt=["a", "b"]).prompts == ["a", "b"]
    assert parse(stop="a").stops == ("a",)
    assert parse(stop=["a", "b"]).stops == ("a", "b")
    assert parse(stop=[]).stops == parse(stop=None).stops == ()


def test_fusion_by_name_is_short_for_an_object() -> None:
    short = parse(ensemble={"fusion": "relative"})
    assert short == parse(ensemble={"fusion": {"name": "relative"}})


@pytest.mark.parametrize("value", [None, False])
def test_no_trace_is_neutral(value: object) -> None:
    assert parse(ensemble={"trace": value}) == parse(ensemble={})


def test_a_body_of_bytes_is_read_as_json() -> None:
    assert CompletionRequest.model_validate(b'{"model": "duo", "prompt": "x"}') == parse()


def test_the_openapi_schema_names_every_parameter_and_ours() -> None:
    schema = CompletionRequest.model_json_schema()
    assert set(schema["properties"]) == set(CompletionRequest.model_fields)
    undescribed = [name for name, each in schema["properties"].items() if not each.get("description")]
    assert undescribed == []
    assert set(schema["$defs"]["EnsembleOptions"]["properties"]) == {"members", "weights", "fusion", "mode"}
    assert schema["properties"]["temperature"]["maximum"] == 2
