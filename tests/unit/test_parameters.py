"""A parameter is declared once: what the checks, the OpenAPI document and the descriptions say is the declaration."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ensemble_core.decoding.parameters import MAX_INT, Parameter
from ensemble_core.decoding.sampling_params import PARAMETERS, SamplingParams
from ensemble_core.errors import InvalidRequestError
from server.schema.chat import ChatRequest
from server.schema.completions import CompletionRequest
from server.schema.responses import ResponseRequest
from server.schema.sampling import GenerationFields

RANGED = [name for name, each in PARAMETERS.items() if each.kind in ("integer", "number")]
# Chat and responses have a length limit and log-probabilities of another form; they alone have reasoning.
SENT: list[tuple[type[GenerationFields], str]] = [
    (kind, name)
    for kind in (CompletionRequest, ChatRequest, ResponseRequest)
    for name in RANGED
    if kind is CompletionRequest or name not in ("max_tokens", "logprobs")
    if kind is not CompletionRequest or name != "thinking_token_budget"
    if kind is not ResponseRequest or name != "prompt_logprobs"
]
NUMBER = Parameter("number", 1.0, "what it does", 0.5, low=0, high=2)


@pytest.mark.parametrize("name", RANGED)
def test_the_check_is_the_declared_range(name: str) -> None:
    found = PARAMETERS[name]
    step: float = 1 if found.kind == "integer" else 1e-6
    room: dict[str, Any] = {"max_tokens": MAX_INT} if name == "min_tokens" else {}
    for value in (found.high, found.low + step if found.above else found.low):
        SamplingParams(**room | {name: value})
    for value in (found.high + step, found.low if found.above else found.low - step):
        with pytest.raises(InvalidRequestError) as caught:
            SamplingParams(**room | {name: value})
        assert caught.value.param == name


@pytest.mark.parametrize(("kind", "name"), SENT)
def test_the_document_says_the_declared_range(kind: type[GenerationFields], name: str) -> None:
    told, found = kind.model_json_schema()["properties"][name], PARAMETERS[name]
    least = {"max_tokens": 0, "top_k": -1}.get(name, found.low)  # the wire takes 0 with echo, and -1 for 0
    assert told["exclusiveMinimum" if found.above else "minimum"] == least
    assert told["maximum"] == found.high
    assert told["default"] == found.default
    assert told["examples"] == [found.example]
    if found.default is not None:
        assert f"{found.default:g} if not sent" in told["description"]


def test_every_parameter_can_be_sent() -> None:
    sent = CompletionRequest.model_fields.keys() | ChatRequest.model_fields.keys()
    assert PARAMETERS.keys() - sent == {"form"}  # which has several names there


def test_defaults_pass_and_shape_nothing() -> None:
    assert not SamplingParams(**{name: each.default for name, each in PARAMETERS.items()}).shapes_logits


@pytest.mark.parametrize(
    ("parameter", "words"),
    [
        (NUMBER, "0..2; 1 if not sent; what it does"),
        (Parameter("number", 0.0, "x", 1, low=-2, high=2), "-2..2; 0 if not sent; x"),
        (Parameter("number", 1.0, "x", 1, high=1, above=True), "over 0, up to 1; 1 if not sent; x"),
        (Parameter("integer", None, "x", 1, high=20), "0..20; x"),
        (Parameter("integer", 16, "x", 1, low=1), "16 if not sent; x"),
        (Parameter("boolean", True, "x", False), "true if not sent; x"),
        (Parameter("boolean", False, "x", True), "x"),
        (Parameter("texts", (), "x", ["a"], low=1, high=8, most=2), "up to 2, of up to 8 characters; x"),
        (Parameter("ids", (), "x", [1], most=64), "up to 64; x"),
        (Parameter("biases", (), "x", {}, low=-1, high=1, most=3), "-1..1, up to 3; x"),
    ],
)
def test_descriptions(parameter: Parameter, words: str) -> None:
    assert parameter.describe() == words


@pytest.mark.parametrize("value", [-0.1, 2.1, math.nan, True, "1", None])
def test_a_refusal_says_what_is_allowed_and_what_was_given(value: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        NUMBER.check("heat", value)
    assert str(caught.value) == f"heat must be a number from 0 to 2, got {value!r}"
