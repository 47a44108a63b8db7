"""Tools on the demo pair, whose templates know none: calls are valid, streamed and answered."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from tool_cases import check_call, random_tools

from ensemble_core.text.tools import Tool, ToolCall, ToolUse

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city", "unit"],
}
TOOLS: Any = [
    {
        "type": "function",
        "function": {"name": "get_weather", "description": "The weather of a city.", "parameters": WEATHER},
    },
    {"type": "function", "function": {"name": "get_time", "description": "The time of day."}},
]
USE = ToolUse((Tool("get_weather", "", json.dumps(WEATHER)), Tool("get_time")))
QUESTION: Any = [{"role": "user", "content": "How warm is it in Oslo, in celsius? Use get_weather."}]
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}
MODELS = ("duet", "duet-smollm2", "smollm2")


@pytest.fixture
def client(server_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, model: str, **fields: Any) -> Any:
    sent: dict[str, Any] = {"messages": QUESTION, "tools": TOOLS, "max_tokens": 200, "seed": 1, **fields}
    return client.chat.completions.create(model=model, **sent)


def checked(choice: Any, use: ToolUse = USE) -> list[ToolCall]:
    """The calls of a choice that ended by itself: all valid."""
    calls = [
        ToolCall(call.id, call.function.name, call.function.arguments) for call in choice.message.tool_calls or []
    ]
    assert choice.finish_reason == ("tool_calls" if calls else "stop")
    for call in calls:
        check_call(call, use)
    return calls


@pytest.mark.parametrize("model", MODELS)
def test_a_call_that_must_come_comes(client: openai.OpenAI, model: str) -> None:
    answer = ask(client, model, tool_choice="required", parallel_tool_calls=False, temperature=0)
    (choice,) = answer.choices
    assert len(checked(choice)) == 1
    assert choice.message.content is None
    assert answer.usage.completion_tokens > 10
    named = ask(client, model, tool_choice=NAMED, parallel_tool_calls=False, n=2, logprobs=True)
    for choice in named.choices:
        (call,) = checked(choice)
        assert call.name == "get_weather"
        assert len(choice.logprobs.content) > 10
    assert len(named.choices[0].logprobs.content) + len(named.choices[1].logprobs.content) == (
        named.usage.completion_tokens
    )


def earlier(city: str, degrees: int) -> list[Any]:
    """A question, the call it led to, what came of it, and the answer."""
    function = {"name": "get_weather", "arguments": json.dumps({"city": city, "unit": "celsius"})}
    return [
        {"role": "user", "content": f"How warm is it in {city}?"},
        {"role": "assistant", "tool_calls": [{"id": f"call_{city}", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": f"call_{city}", "content": f"{degrees} C"},
        {"role": "assistant", "content": f"It is {degrees} C in {city}."},
    ]


@pytest.mark.parametrize("model", [*MODELS, "duet-verify", "duet-sampled"])
def test_a_model_calls_of_its_own_accord(client: openai.OpenAI, model: str) -> None:
    """Such small models need examples for that."""
    shown = [*earlier("Paris", 21), *earlier("Rome", 25), *earlier("Bergen", 9)]
    messages = [*shown, {"role": "user", "content": "How warm is it in Oslo?"}]
    answer = ask(client, model, messages=messages, temperature=0.2, parallel_tool_calls=False)
    (call,) = checked(answer.choices[0])
    assert call.name == "get_weather"
    assert answer.choices[0].message.content is None


@pytest.mark.parametrize("model", MODELS)
def test_where_calls_may_come_text_is_free(client: openai.OpenAI, model: str) -> None:
    free = ask(client, model, max_tokens=24, temperature=0)
    assert free.choices[0].message.content or free.choices[0].message.tool_calls
    begun = [*QUESTION, {"role": "assistant", "content": "Let me see.\n"}]
    extra = {"add_generation_prompt": False, "continue_final_message": True}
    for seed in range(3):
        answer = ask(client, model, messages=begun, extra_body=extra, seed=seed, max_tokens=60)
        if answer.choices[0].finish_reason != "length":
            checked(answer.choices[0])
    shown = ask(client, model, tool_choice="none", max_tokens=8)
    assert shown.choices[0].message.tool_calls is None
    assert shown.usage.prompt_tokens == free.usage.prompt_tokens


def test_the_streams_pieces_are_the_whole_answer(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"tool_choice": "required", "parallel_tool_calls": False, "temperature": 0}
    whole = ask(client, "duet", **fields).choices[0]
    with client.chat.completions.stream(
        model="duet", messages=QUESTION, tools=TOOLS, max_tokens=200, seed=1, **fields
    ) as stream:
        deltas = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        final = stream.get_final_completion().choices[0]
    assert checked(final)[0].arguments == checked(whole)[0].arguments
    assert checked(final)[0].name == checked(whole)[0].name
    if final.message.tool_calls and final.message.tool_calls[0].function.name == "get_weather":
        assert len(deltas) > 3


def test_a_result_is_read_and_answered(client: openai.OpenAI) -> None:
    first = ask(client, "duet-smollm2", tool_choice=NAMED, parallel_tool_calls=False, temperature=0)
    message = first.choices[0].message
    result: Any = {
        "role": "tool",
        "tool_call_id": message.tool_calls[0].id,
        "content": "It is 21 degrees in Oslo.",
    }
    messages = [*QUESTION, message, result]
    second = ask(client, "duet-smollm2", messages=messages, tool_choice="none", temperature=0, max_tokens=40)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens
    assert "21" in str(second.choices[0].message.content)


def test_a_cut_call_and_stop_strings(client: openai.OpenAI) -> None:
    cut = ask(client, "duet", tool_choice=NAMED, max_tokens=20, temperature=0).choices[0]
    assert cut.finish_reason == "length"
    assert all(call.function.name == "get_weather" for call in cut.message.tool_calls or [])
    whole = ask(client, "duet", tool_choice=NAMED, parallel_tool_calls=False, stop=['"', "}", "city"])
    checked(whole.choices[0])


def test_errors_name_the_tool(client: openai.OpenAI) -> None:
    bad: Any = {
        "type": "function",
        "function": {"name": "bad", "parameters": {"properties": {"a": {"type": "x"}}}},
    }
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "duet", tools=[*TOOLS, bad])
    assert caught.value.param == "tools.2.function.parameters"


def test_tools_are_in_the_prompt_of_tokenize(server_url: str) -> None:
    body = {"model": "duet", "messages": QUESTION}
    plain = httpx.post(f"{server_url}/tokenize", json=body).json()
    shown = httpx.post(f"{server_url}/tokenize", json=body | {"tools": TOOLS}).json()
    assert shown["count"] > plain["count"] + 50


@pytest.mark.slow
@pytest.mark.parametrize("model", ["duet", "duet-smollm2"])
def test_random_sets_of_tools_are_called_validly(client: openai.OpenAI, model: str) -> None:
    """10 sets, and with UNISONO_THOROUGH=1 (`make test-thorough`) 50."""

    def called(seed: int) -> int:
        """How many of one set's tools are called; a choice that is cut has a last call that may be cut, too."""
        tools = random_tools(random.Random(f"{model} {seed}"))
        sent = [
            {"type": "function", "function": {"name": each.name, "parameters": json.loads(each.parameters)}}
            for each in tools
        ]
        fields = {"tool_choice": "required", "parallel_tool_calls": seed % 2 == 1, "seed": seed}
        choice = ask(client, model, tools=sent, **fields).choices[0]
        if choice.finish_reason == "length":
            choice.message.tool_calls, choice.finish_reason = choice.message.tool_calls[:-1], "tool_calls"
        calls = choice.message.tool_calls or []
        for call in calls:
            check_call(ToolCall(call.id, call.function.name, call.function.arguments), ToolUse(tools))
        return len(calls)

    num_sets = 50 if os.environ.get("UNISONO_THOROUGH") else 10
    with ThreadPoolExecutor(10) as pool:
        assert sum(pool.map(called, range(num_sets))) >= 0.9 * num_sets
