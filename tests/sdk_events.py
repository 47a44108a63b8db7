"""Reads the events of a response as the official client declares them, but strictly."""

from __future__ import annotations

import json
from typing import Any, get_args

from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

# The client's own models: name of the event -> class.
MODELS: dict[str, Any] = {
    get_args(model.model_fields["type"].annotation)[0]: model
    for model in get_args(get_args(ResponseStreamEvent)[0])
}
LIFECYCLE = (
    "response.created",
    "response.in_progress",
    "response.completed",
    "response.incomplete",
    "response.failed",
)


def strict(kind: Any, value: object) -> Any:
    """A value of JSON as the client's model, with no type converted and no field missing."""
    return TypeAdapter(kind).validate_json(json.dumps(value), strict=True)


def read_events(text: str) -> list[Any]:
    """The events of a whole stream: each with its name, numbered from 0, the last a final one."""
    found = []
    for rank, block in enumerate(block for block in text.split("\n\n") if block and not block.startswith(":")):
        name, data = block.split("\n")
        value = json.loads(data.removeprefix("data: "))
        assert name == f"event: {value['type']}"
        assert value["sequence_number"] == rank
        found.append(strict(MODELS[value["type"]], value))
    assert [event.type for event in found[:2]] == list(LIFECYCLE[:2])
    assert found[-1].type in LIFECYCLE[2:]
    check_items(found)
    return found


def check_items(events: list[Any]) -> None:
    """An item is added, grows and is done before the next one; what is done is what its deltas join to."""
    grown, open_id, whole = "", None, []
    for event in events[2:-1]:
        match event.type:
            case "response.output_item.added":
                assert open_id is None
                assert event.output_index == len(whole)
                open_id, grown = event.item.id, ""
            case "response.output_item.done":
                assert event.item.id == open_id
                whole.append(event.item)
                open_id = None
            case kind if kind.endswith(".delta"):
                grown += event.delta
            case "response.output_text.done" | "response.reasoning_text.done":
                assert event.text == grown
            case "response.function_call_arguments.done":
                assert event.arguments == grown
        if event.type != "error" and not event.type.startswith("response.output_item"):
            assert event.item_id == open_id
            assert event.output_index == len(whole)
    if events[-1].type != "response.failed":
        assert open_id is None
        assert events[-1].response.output == whole


def whole_of(value: object) -> Response:
    """A whole answer."""
    found = strict(Response, value)
    assert isinstance(found, Response)
    return found
