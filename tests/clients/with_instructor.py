"""Instructor: pydantic models by a named tool, by a schema, and in pieces."""

from __future__ import annotations

from typing import Any, Literal

import client_report
import instructor
from openai import OpenAI
from pydantic import BaseModel, Field

MESSAGES = [{"role": "user", "content": "How warm is it in Oslo?"}]


class Warmth(BaseModel):
    """How warm it is."""

    degrees: int = Field(ge=0, le=99)
    unit: Literal["celsius", "fahrenheit"]


def asked(url: str, model: str, mode: instructor.Mode, **fields: Any) -> tuple[Any, dict[str, Any]]:
    client = instructor.from_openai(OpenAI(base_url=url, api_key="unused", max_retries=0), mode=mode)
    return client, {"model": model, "messages": MESSAGES, "temperature": 0, "max_retries": 0} | fields


def chat(url: str, model: str) -> object:
    client, fields = asked(url, model, instructor.Mode.TOOLS, max_tokens=12)
    text = client.create(response_model=None, **fields).choices[0].message.content
    assert text
    return text


def stream(url: str, model: str) -> object:
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        client, fields = asked(url, model, mode, max_tokens=100)
        pieces = list(client.create_partial(response_model=Warmth, **fields))
        assert len(pieces) > 1
        assert pieces[-1].degrees is not None
    return pieces[-1]


def tool_call(url: str, model: str) -> object:
    client, fields = asked(url, model, instructor.Mode.TOOLS, max_tokens=100)
    found, answer = client.create_with_completion(response_model=Warmth, **fields)
    assert isinstance(found, Warmth)
    assert answer.choices[0].message.tool_calls[0].function.name == "Warmth"
    return found


def structured(url: str, model: str) -> object:
    found = []
    for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS_STRICT):
        client, fields = asked(url, model, mode, max_tokens=100)
        found.append(client.create(response_model=Warmth, **fields))
    assert all(isinstance(each, Warmth) for each in found)
    return found


def responses(url: str, model: str) -> object:
    client, fields = asked(url, model, instructor.Mode.RESPONSES_TOOLS)
    found = client.create(response_model=Warmth, **fields)
    assert isinstance(found, Warmth)
    return found


if __name__ == "__main__":
    tried = [chat, stream, tool_call, structured, responses]
    cannot = {"completion": "it asks chat models alone"}
    client_report.run("instructor", {task.__name__: task for task in tried}, cannot)
