"""/v1/responses on the demo pair, through the official client: text, schemas, a loop of calls, turns, truncation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel
from sdk_events import read_events, whole_of

MODEL = "duet-smollm2"
QUESTION: Any = {"role": "user", "content": "How warm is it in Oslo, in celsius? Use get_weather."}
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOL: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": PARAMETERS,
    "strict": True,
}
NAMED: Any = {"type": "function", "name": "get_weather"}


class Warmth(BaseModel):
    degrees: int
    unit: Literal["celsius", "fahrenheit"]


@pytest.fixture
def client(server_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_an_answer_and_its_stream_and_chat_say_the_same(client: openai.OpenAI, server_url: str) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "input": "What is the capital of France?",
        "instructions": "Answer in one sentence.",
        "max_output_tokens": 16,
        "temperature": 0,
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
    }
    whole = whole_of(httpx.post(f"{server_url}/v1/responses", json=asked, timeout=120).json())
    assert "Paris" in whole.output_text
    events = read_events(httpx.post(f"{server_url}/v1/responses", json=asked | {"stream": True}, timeout=120).text)
    assert events[-1].response.output_text == whole.output_text
    logprobs = [each for event in events if event.type == "response.output_text.delta" for each in event.logprobs]
    assert len(logprobs) == whole.usage.output_tokens  # type: ignore[union-attr]
    chat = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "system", "content": asked["instructions"]},
            {"role": "user", "content": asked["input"]},
        ],
        max_tokens=16,
        temperature=0,
    )
    assert chat.choices[0].message.content == whole.output_text
    assert chat.usage.prompt_tokens == whole.usage.input_tokens  # type: ignore[union-attr]
    assert (whole.status == "incomplete") == (chat.choices[0].finish_reason == "length")


def test_a_pydantic_model_is_read(client: openai.OpenAI) -> None:
    found = client.responses.parse(
        model=MODEL, input="It is 21 degrees celsius in Oslo.", text_format=Warmth, temperature=0
    )
    assert isinstance(found.output_parsed, Warmth)
    with client.responses.stream(
        model=MODEL, input="It is 21 degrees celsius in Oslo.", text_format=Warmth, temperature=0
    ) as stream:
        assert stream.get_final_response().output_parsed == found.output_parsed


def test_a_loop_of_calls(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "tools": [TOOL], "parallel_tool_calls": False, "temperature": 0}
    first = client.responses.create(**asked, input=[QUESTION], tool_choice=NAMED)
    (call,) = first.output
    assert call.type == "function_call"
    assert json.loads(call.arguments)["unit"] in ("celsius", "fahrenheit")
    with client.responses.stream(**asked, input=[QUESTION], tool_choice=NAMED) as stream:
        grown = [event.snapshot for event in stream if event.type == "response.function_call_arguments.delta"]
        (same,) = stream.get_final_response().output
    assert grown[-1] == call.arguments == same.arguments  # type: ignore[union-attr]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "It is 21 degrees in Oslo."}
    second = client.responses.create(
        **asked, input=[QUESTION, call, result], tool_choice="none", max_output_tokens=40  # type: ignore[list-item]
    )  # fmt: skip
    assert "21" in second.output_text
    assert second.usage.input_tokens > first.usage.input_tokens  # type: ignore[union-attr]


def test_turns_go_on_and_the_oldest_are_left_out(client: openai.OpenAI) -> None:
    turns: list[Any] = [{"role": "user", "content": "My name is Ann. " + "Remember it well. " * 40}]
    fields: dict[str, Any] = {"model": MODEL, "max_output_tokens": 8, "temperature": 0}
    sizes = []
    for _ in range(3):
        answer = client.responses.create(**fields, input=turns)
        sizes.append(answer.usage.input_tokens)  # type: ignore[union-attr]
        turns += [*answer.output, {"role": "user", "content": "Say it again."}]
    assert sizes == sorted(set(sizes))
    long = [turns[0] | {"content": turns[0]["content"] * 40}, *turns[1:]]
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**fields, input=long)
    assert caught.value.param in ("input", "max_output_tokens")
    kept = client.responses.create(**fields, input=long, truncation="auto")
    assert kept.usage.input_tokens < sizes[-1]  # type: ignore[union-attr]
