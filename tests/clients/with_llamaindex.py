"""LlamaIndex: OpenAILike as completion and chat model, tools, and structured programs.

It is told the context window and that the model calls functions, since it does not know the name of the model.
"""

from __future__ import annotations

from typing import Any, Literal

import client_report
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field

QUESTION = [ChatMessage(role="user", content="What is the capital of France?")]


class Warmth(BaseModel):
    """How warm it is."""

    degrees: int = Field(ge=0, le=99)
    unit: Literal["celsius", "fahrenheit"]


class Place(BaseModel):
    city: Literal["Oslo", "Rome"]


def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"It is 21 degrees in {city}."


WEATHER = FunctionTool.from_defaults(get_weather, fn_schema=Place)


def model_of(url: str, model: str, **fields: Any) -> OpenAILike:
    common: dict[str, Any] = {"is_chat_model": True, "is_function_calling_model": True, "context_window": 2048}
    common |= {"temperature": 0, "max_tokens": 60, "max_retries": 0, "timeout": 200}
    return OpenAILike(model=model, api_base=url, api_key="unused", **common | fields)


def completion(url: str, model: str) -> object:
    llm = model_of(url, model, is_chat_model=False, is_function_calling_model=False, max_tokens=8)
    text = llm.complete("The capital of France is").text
    assert text
    assert "".join(str(piece.delta) for piece in llm.stream_complete("The capital of France is")) == text
    return text


def chat(url: str, model: str) -> object:
    text = model_of(url, model).chat(QUESTION).message.content
    assert text
    return text


def stream(url: str, model: str) -> object:
    pieces = list(model_of(url, model).stream_chat(QUESTION))
    assert len(pieces) > 3
    assert pieces[-1].message.content == model_of(url, model).chat(QUESTION).message.content
    return pieces[-1].message.content


def tool_call(url: str, model: str) -> object:
    llm = model_of(url, model)
    asked = ChatMessage(role="user", content="How warm is it in Oslo?")
    answer = llm.chat_with_tools([WEATHER], chat_history=[asked], tool_required=True)
    (call,) = llm.get_tool_calls_from_response(answer)
    assert call.tool_kwargs["city"] in ("Oslo", "Rome")
    result = WEATHER(**call.tool_kwargs).content
    ids = {"tool_call_id": call.tool_id}
    told = [asked, answer.message, ChatMessage(role="tool", content=result, additional_kwargs=ids)]
    assert llm.chat(told).message.content
    return call.tool_kwargs


def tool_stream(url: str, model: str) -> object:
    llm = model_of(url, model)
    pieces = list(llm.stream_chat_with_tools([WEATHER], user_msg="Warm in Oslo?", tool_required=True))
    (call,) = llm.get_tool_calls_from_response(pieces[-1])
    assert call.tool_kwargs["city"] in ("Oslo", "Rome")
    return call.tool_kwargs


def structured(url: str, model: str) -> object:
    asked = PromptTemplate("How warm is it in {city}?")
    found = model_of(url, model).structured_predict(Warmth, asked, city="Oslo")
    assert isinstance(found, Warmth)
    by_schema = model_of(url, model, should_use_structured_outputs=True)
    again = by_schema.as_structured_llm(Warmth).complete("How warm is it in Oslo?").raw
    assert isinstance(again, Warmth)
    return found, again


if __name__ == "__main__":
    tried = [completion, chat, stream, tool_call, tool_stream, structured]
    client_report.run("llama-index-llms-openai-like", {task.__name__: task for task in tried}, {})
