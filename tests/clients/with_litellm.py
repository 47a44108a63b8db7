"""LiteLLM: OpenAI's and vLLM's providers, tools, schemas and responses.

LITELLM_LOCAL_MODEL_COST_MAP keeps it from fetching a list of prices when it is imported.
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any, Literal

import client_report

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm
from pydantic import BaseModel, Field

litellm.suppress_debug_info = True  # no hints on standard output

QUESTION = "What is the capital of France?"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
            "required": ["city"],
        },
    },
}


class Warmth(BaseModel):
    degrees: int = Field(ge=0, le=99)
    unit: Literal["celsius", "fahrenheit"]


def fields(url: str, text: str = QUESTION) -> dict[str, Any]:
    common = {"api_base": url, "api_key": "unused", "temperature": 0, "max_tokens": 60, "num_retries": 0}
    return common | {"messages": [{"role": "user", "content": text}]}


def completion(url: str, model: str) -> object:
    answer = litellm.text_completion(
        model=f"text-completion-openai/{model}",
        prompt="The capital of France is",
        api_base=url,
        api_key="unused",
        max_tokens=8,
        temperature=0,
    )
    assert answer.choices[0].text
    return answer.choices[0].text


def chat(url: str, model: str) -> object:
    answers = [litellm.completion(model=f"{kind}/{model}", **fields(url)) for kind in ("openai", "hosted_vllm")]
    answers.append(asyncio.run(litellm.acompletion(model=f"openai/{model}", **fields(url))))
    (text,) = {answer.choices[0].message.content for answer in answers}
    assert answers[0].usage.completion_tokens > 0
    return text


def stream(url: str, model: str) -> object:
    asked = fields(url) | {"stream": True, "stream_options": {"include_usage": True}}
    pieces = list(litellm.completion(model=f"openai/{model}", **asked))
    assert len(pieces) > 3
    whole = litellm.stream_chunk_builder(pieces)
    assert (
        whole.choices[0].message.content
        == litellm.completion(model=f"openai/{model}", **fields(url)).choices[0].message.content
    )
    return whole.choices[0].message.content


def tool_call(url: str, model: str) -> object:
    asked = fields(url, "How warm is it in Oslo?")
    chosen = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
    message = litellm.completion(model=f"openai/{model}", **asked, **chosen).choices[0].message
    (call,) = message.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
    asked["messages"] += [message, {"role": "tool", "tool_call_id": call.id, "content": "It is 21 degrees."}]
    again = litellm.completion(model=f"openai/{model}", **asked, tools=[WEATHER], tool_choice="none")
    assert again.choices[0].message.content
    return call.function.arguments


def tool_stream(url: str, model: str) -> object:
    chosen = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False, "stream": True}
    pieces = list(litellm.completion(model=f"hosted_vllm/{model}", **fields(url, "Warm in Oslo?"), **chosen))
    (call,) = litellm.stream_chunk_builder(pieces).choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
    return call.function.arguments


def structured(url: str, model: str) -> object:
    asked = fields(url, "How warm is it in Oslo?") | {"response_format": Warmth}
    answer = litellm.completion(model=f"openai/{model}", **asked)
    return Warmth.model_validate_json(answer.choices[0].message.content)


def responses(url: str, model: str) -> object:
    answer = litellm.responses(
        model=f"openai/{model}",
        input=QUESTION,
        api_base=url,
        api_key="unused",
        max_output_tokens=20,
        temperature=0,
    )
    text = answer.output[0].content[0].text
    assert text
    return text


if __name__ == "__main__":
    tried = [completion, chat, stream, tool_call, tool_stream, structured, responses]
    client_report.run("litellm", {task.__name__: task for task in tried}, {})
