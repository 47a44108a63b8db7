"""DSPy: its language model, signatures by schema, native calls of tools, and streams.

It sends a schema only where it is told that the model takes one, so the server is registered as a provider that does.
LITELLM_LOCAL_MODEL_COST_MAP keeps LiteLLM, its other engine, from fetching a list of prices. Its cache is off.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from typing import Any, Literal

import client_report

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
os.environ["DSPY_CACHEDIR"] = tempfile.mkdtemp()

import dspy
from dspy.lm15 import AccessPolicy, ModelSupport, OpenAIChatCompat, ProviderDefinition, register_provider
from pydantic import BaseModel, Field

QUESTION = "What is the capital of France?"


class Warmth(BaseModel):
    degrees: int = Field(ge=0, le=99)
    unit: Literal["celsius", "fahrenheit"]


class HowWarm(dspy.Signature):
    """Say how warm it is."""

    city: str = dspy.InputField()
    warmth: Warmth = dspy.OutputField()


class Short(dspy.Signature):
    """Answer the question."""

    question: str = dspy.InputField()
    answer: Literal["Paris", "Rome"] = dspy.OutputField()


def get_weather(city: Literal["Oslo", "Rome"]) -> str:
    """The weather of a city."""
    return f"It is 21 degrees in {city}."


def schemas(url: str, model: str) -> dspy.LM:
    """The model through a provider of ours, which is known to take schemas."""
    access = AccessPolicy(provider="unisono", base_url=url)
    ours = ProviderDefinition.chat(access, compat=OpenAIChatCompat.preset("vllm"), placeholder_key="unused")
    register_provider(ours, supports=ModelSupport(function_calling=True, response_schema=True))
    return dspy.LM(f"unisono/{model}", temperature=0, max_tokens=60, cache=False, num_retries=0)


def model_of(url: str, model: str, **fields: Any) -> dspy.LM:
    common: dict[str, Any] = {"temperature": 0, "max_tokens": 60, "cache": False, "num_retries": 0}
    return dspy.LM(f"openai/{model}", api_base=url, api_key="unused", **common | fields)


def completion(url: str, model: str) -> object:
    (text,) = model_of(url, model, model_type="text", max_tokens=8)("The capital of France is")
    assert text
    return text


def chat(url: str, model: str) -> object:
    (text,) = model_of(url, model)(QUESTION)
    assert text
    return text


def stream(url: str, model: str) -> object:
    async def pieces() -> list[Any]:
        listened = dspy.streaming.StreamListener(signature_field_name="answer")
        program = dspy.streamify(dspy.Predict(Short), stream_listeners=[listened])
        return [piece async for piece in program(question=QUESTION)]

    with dspy.context(lm=schemas(url, model), adapter=dspy.JSONAdapter()):
        told = asyncio.run(pieces())
    assert len(told) > 1
    assert isinstance(told[-1], dspy.Prediction)
    return told[-1].answer


def tool_call(url: str, model: str) -> object:
    tool = dspy.Tool(get_weather)
    asked = model_of(url, model, tools=[tool.format_as_litellm_function_call()], tool_choice="required")
    (answer,) = asked("How warm is it in Oslo?", parallel_tool_calls=False)
    (call,) = answer["tool_calls"]
    arguments = json.loads(call.function.arguments)
    assert tool(**arguments)
    return arguments


def structured(url: str, model: str) -> object:
    with dspy.context(lm=schemas(url, model), adapter=dspy.JSONAdapter()):
        found = dspy.Predict(HowWarm)(city="Oslo").warmth
    assert isinstance(found, Warmth)
    return found


if __name__ == "__main__":
    tried = [completion, chat, stream, tool_call, structured]
    client_report.run("dspy", {task.__name__: task for task in tried}, {})
