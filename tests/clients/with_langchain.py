"""LangChain: its completion and chat models, tools, and structured output by schema and by tool."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import client_report
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field

QUESTION = "What is the capital of France?"


class Warmth(BaseModel):
    """How warm it is."""

    degrees: int = Field(ge=0, le=99)
    unit: Literal["celsius", "fahrenheit"]


@tool
def get_weather(city: Literal["Oslo", "Rome"]) -> str:
    """The weather of a city."""
    return f"It is 21 degrees in {city}."


def model_of(url: str, model: str, **fields: Any) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=url, api_key="unused", model=model, temperature=0, max_tokens=60, max_retries=0, **fields
    )


def completion(url: str, model: str) -> object:
    llm = OpenAI(base_url=url, api_key="unused", model=model, temperature=0, max_tokens=8, max_retries=0)
    answer = llm.invoke("The capital of France is")
    assert answer
    assert "".join(llm.stream("The capital of France is")) == answer
    return answer


def chat(url: str, model: str) -> object:
    answer = model_of(url, model).invoke([("system", "Be brief."), ("user", QUESTION)])
    assert answer.usage_metadata
    assert answer.content
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    assert asyncio.run(model_of(url, model).ainvoke([("system", "Be brief."), ("user", QUESTION)])).content
    return answer.content


def stream(url: str, model: str) -> object:
    pieces = list(model_of(url, model, stream_usage=True).stream(QUESTION))
    assert len(pieces) > 3
    assert any(piece.usage_metadata for piece in pieces)
    text = "".join(str(piece.content) for piece in pieces)
    assert text == model_of(url, model).invoke(QUESTION).content
    return text


def tool_call(url: str, model: str) -> object:
    bound = model_of(url, model).bind_tools([get_weather], tool_choice="required", parallel_tool_calls=False)
    question = HumanMessage("How warm is it in Oslo?")
    asked = bound.invoke([question])
    (call,) = asked.tool_calls
    assert call["name"] == "get_weather"
    result = ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])
    free = model_of(url, model).bind_tools([get_weather], tool_choice="none")
    assert free.invoke([question, asked, result]).content
    return call["args"]


def tool_stream(url: str, model: str) -> object:
    bound = model_of(url, model).bind_tools([get_weather], tool_choice="get_weather", parallel_tool_calls=False)
    first, *rest = bound.stream("How warm is it in Oslo?")
    whole = first
    for piece in rest:
        whole += piece
    (call,) = whole.tool_calls
    assert call["args"]["city"] in ("Oslo", "Rome")
    return call["args"]


def structured(url: str, model: str) -> object:
    found = [
        model_of(url, model).with_structured_output(Warmth, method=method).invoke("How warm is it in Oslo?")
        for method in ("json_schema", "function_calling")
    ]
    assert all(isinstance(each, Warmth) for each in found)
    return found


def responses(url: str, model: str) -> object:
    asked = model_of(url, model, use_responses_api=True)
    answer = asked.invoke(QUESTION)
    assert answer.text
    assert "".join(str(piece.text) for piece in asked.stream(QUESTION)) == answer.text
    assert isinstance(asked.with_structured_output(Warmth).invoke("How warm is it in Oslo?"), Warmth)
    return answer.text


if __name__ == "__main__":
    tried = [completion, chat, stream, tool_call, tool_stream, structured, responses]
    client_report.run("langchain-openai", {task.__name__: task for task in tried}, {})
