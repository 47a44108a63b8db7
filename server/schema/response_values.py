"""Values of /v1/responses that are checked one by one: metadata, include, reasoning.

Some values mean what happens anyway; where others would change the answer, they are refused by name.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import Field, PlainValidator

from ensemble_core.errors import quoted
from ensemble_core.text.variables import Effort
from server.schema.json_values import Strict, optional, text

LOGPROBS = "message.output_text.logprobs"
_ENCRYPTED = "reasoning.encrypted_content"  # there is none: reasoning is sent as it is
_MAX_INCLUDED = 16
_MAX_METADATA = 16
_MAX_KEY, _MAX_VALUE = 64, 512  # characters


def neutral(*values: Any) -> PlainValidator:
    """A field that takes null and these values alone, since they change nothing."""
    allowed = " or ".join([*map(json.dumps, values), "null"])

    def check(value: object) -> object:
        if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in values):
            raise ValueError(f"is not supported; leave it out or send {allowed}")
        return value

    return PlainValidator(optional(check), json_schema_input_type=type(values[0]) | None)


def _included(value: object) -> list[str]:
    if not isinstance(value, list) or len(value) > _MAX_INCLUDED:
        raise ValueError(f"must be a list of up to {_MAX_INCLUDED} strings")
    for each in value:
        if each not in (LOGPROBS, _ENCRYPTED):
            raise ValueError(f"{quoted(each)} is not served; there are {LOGPROBS} and {_ENCRYPTED}")
    return value


def _metadata(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > _MAX_METADATA:
        raise ValueError(f"must be an object of up to {_MAX_METADATA} texts")
    for key, each in value.items():
        if len(text(key)) > _MAX_KEY or len(text(each)) > _MAX_VALUE:
            raise ValueError(f"its keys may have {_MAX_KEY} characters, its values {_MAX_VALUE}")
    return value


IncludeField = Annotated[
    list[str] | None, PlainValidator(optional(_included), json_schema_input_type=list[str] | None)
]
MetadataField = Annotated[
    dict[str, str] | None, PlainValidator(optional(_metadata), json_schema_input_type=dict[str, str] | None)
]


class ReasoningOptions(Strict):
    """How much is reasoned before the answer."""

    effort: Effort | None = Field(None, description="As chat's reasoning_effort.")
    summary: Annotated[str | None, neutral("auto")] = Field(None, description="Only auto; there is none.")
    generate_summary: Annotated[str | None, neutral("auto")] = Field(None, description="Older name of summary.")
    context: Annotated[str | None, neutral("auto")] = Field(None, description="Only auto.")
    mode: Annotated[str | None, neutral("standard")] = Field(None, description="Only standard.")
