"""/v1/messages on the demo pair: an answer, its stream and chat's, a call of a tool, and the tokens of a prompt."""

from __future__ import annotations

import json
from typing import Any

import httpx

MODEL = "duet-smollm2"
TOOL: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["celsius", "fahrenheit"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
}


def post(url: str, path: str, **body: Any) -> httpx.Response:
    answer = httpx.post(f"{url}{path}", json={"model": MODEL, "temperature": 0} | body, timeout=180)
    assert answer.status_code == 200, answer.text
    return answer


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(block.split("\ndata: ")[1]) for block in text.split("\n\n") if block.startswith("event:")]


def test_an_answer_its_stream_and_chat_say_the_same(server_url: str) -> None:
    system, question = "Answer in one sentence.", {"role": "user", "content": "What is the capital of France?"}
    asked: dict[str, Any] = {"system": system, "messages": [question], "max_tokens": 16}
    whole = post(server_url, "/v1/messages", **asked).json()
    (block,) = whole["content"]
    assert "Paris" in block["text"]
    told = events(post(server_url, "/v1/messages", **asked, stream=True).text)
    assert (
        "".join(each["delta"].get("text", "") for each in told if each["type"] == "content_block_delta")
        == block["text"]
    )
    assert told[-1] == {"type": "message_stop"}
    messages = [{"role": "system", "content": system}, question]
    chat = post(server_url, "/v1/chat/completions", messages=messages, max_tokens=16).json()
    assert chat["choices"][0]["message"]["content"] == block["text"]
    counted = post(server_url, "/v1/messages/count_tokens", system=system, messages=[question]).json()
    assert counted == {"input_tokens": chat["usage"]["prompt_tokens"]}


def test_a_call_of_a_tool_streamed_and_not(server_url: str) -> None:
    question = {"role": "user", "content": "How warm is it in Oslo, in celsius? Use get_weather."}
    asked: dict[str, Any] = {
        "messages": [question],
        "max_tokens": 60,
        "tools": [TOOL],
        "tool_choice": {"type": "tool", "name": "get_weather"},
    }
    whole = post(server_url, "/v1/messages", **asked).json()
    (call,) = whole["content"]
    assert (whole["stop_reason"], call["type"], call["name"]) == ("tool_use", "tool_use", "get_weather")
    assert call["input"]["unit"] in ("celsius", "fahrenheit")
    told = events(post(server_url, "/v1/messages", **asked, stream=True).text)
    grown = "".join(each["delta"]["partial_json"] for each in told if each["type"] == "content_block_delta")
    assert json.loads(grown) == call["input"]
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": "It is 21 degrees in Oslo."}
    turns = [question, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    second = post(
        server_url, "/v1/messages", messages=turns, tools=[TOOL], tool_choice={"type": "none"}, max_tokens=30
    )
    assert "21" in second.json()["content"][0]["text"]
