"""What a text must be, as clients write it: `response_format`, `structured_outputs`, and the older `guided_*` names.

A body may say it once. Knows no endpoint; whether a form can be followed is found out when the engine compiles it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from ensemble_core.decoding.forms import TextForm, one_of
from ensemble_core.errors import InvalidRequestError, quoted, shortened
from server.schema.json_values import Strict, Text

_NOT_SERVED = {  # keys of vLLM's structured_outputs -> what to do instead
    "structural_tag": "write a `grammar` in Lark's form",
    "disable_additional_properties": "write `additionalProperties: false` into the schema",
}


class JsonSchema(Strict):
    """The schema that the answer's JSON follows."""

    model_config = ConfigDict(populate_by_name=True)

    name: Text | None = Field(None, description="Accepted; changes nothing.")
    description: str | None = Field(None, description="Accepted; changes nothing.")
    schema_: dict[str, Any] = Field(alias="schema", description="A JSON schema.")
    strict: bool | None = Field(None, description="Accepted; the schema always binds.")


class ResponseFormat(Strict):
    """What the text must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = Field(None, description="With type json_schema.")

    @model_validator(mode="after")
    def _schema_where_needed(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must be sent with type json_schema, and only with it")
        return self


class StructuredOutputs(Strict):
    """What the text must be, as vLLM's clients say it: one of json, regex, choice, grammar, json_object."""

    model_config = ConfigDict(populate_by_name=True)

    json_: dict[str, Any] | Text | None = Field(
        None, alias="json", description="A JSON schema, as an object or text."
    )
    regex: Text | None = Field(None, description="A regular expression that the whole text matches.")
    choice: list[Text] | None = Field(None, description="Strings, of which the text is one.")
    grammar: Text | None = Field(None, description="A grammar in Lark's form or in GBNF.")
    json_object: bool | None = Field(None, description="Any JSON object.")
    whitespace_pattern: Text | None = Field(
        None, description="With json: a regular expression of the white space between the parts of a value."
    )
    disable_any_whitespace: bool | None = Field(None, description="With json: no white space between the parts.")

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: object) -> object:
        known = sorted(field.alias or name for name, field in cls.model_fields.items())
        for key, sent in value.items() if isinstance(value, dict) else ():
            if key in known or (key in _NOT_SERVED and (sent is None or sent is False)):
                continue
            instead = _NOT_SERVED.get(key)
            why = (
                f"is unknown; known are {', '.join(known)}" if instead is None else f"is not supported; {instead}"
            )
            raise InvalidRequestError(f"structured_outputs.{shortened(key)} {why}", f"structured_outputs.{key}")
        return value


class FormFields(Strict):
    """The fields that say what a text must be."""

    response_format: ResponseFormat | None = Field(
        None,
        description="`text`, `json_object`, `json_schema`; a mask over the fused distribution, so the schema always "
        "binds; a text that can no longer follow it ends with an error",
        examples=[{"type": "json_object"}],
    )
    structured_outputs: StructuredOutputs | None = Field(
        None,
        description="one of `json` (a schema), `regex`, `choice`, `grammar` (Lark or GBNF), `json_object`; with the "
        "first and the last also `whitespace_pattern`, `disable_any_whitespace`; binds as `response_format`",
        examples=[{"regex": "a+"}],
    )
    guided_json: dict[str, Any] | Text | None = Field(
        None, description="older name of `structured_outputs.json`", examples=[{"type": "object"}]
    )
    guided_regex: Text | None = Field(
        None, description="older name of `structured_outputs.regex`", examples=["a+"]
    )
    guided_choice: list[Text] | None = Field(
        None, description="older name of `structured_outputs.choice`", examples=[["a", "b"]]
    )
    guided_grammar: Text | None = Field(
        None, description="older name of `structured_outputs.grammar`", examples=['root ::= "x"']
    )

    @property
    def form(self) -> TextForm | None:
        """What the text must be; None for free text. Raises InvalidRequestError, also where it is said twice."""
        return only([*_of_format(self.response_format), *of_outputs(self.structured_outputs), *self._guided()])

    def _guided(self) -> Iterator[TextForm]:
        if self.guided_json is not None:
            yield of_schema(self.guided_json, "guided_json")
        if self.guided_regex is not None:
            yield TextForm("regex", self.guided_regex, field="guided_regex")
        if self.guided_choice is not None:
            yield one_of(self.guided_choice, "guided_choice")
        if self.guided_grammar is not None:
            yield TextForm("grammar", self.guided_grammar, field="guided_grammar")


def only(found: Sequence[TextForm]) -> TextForm | None:
    """The form that a body asks for; None for free text. Raises InvalidRequestError for several."""
    if len(found) > 1:
        raise InvalidRequestError(
            f"{found[0].field} and {found[1].field} both say what the text must be; send one of them",
            found[1].field,
        )
    return found[0] if found else None


def _of_format(sent: ResponseFormat | None) -> Iterator[TextForm]:
    if sent is None or sent.type == "text":
        return
    if sent.json_schema is None:
        yield TextForm("json", field="response_format")
    else:
        yield of_schema(sent.json_schema.schema_, "response_format")


def of_outputs(sent: StructuredOutputs | None) -> Iterator[TextForm]:
    """The one form of `structured_outputs`. Raises InvalidRequestError for none and for several."""
    if sent is None:
        return
    name = "structured_outputs"
    found, layout = [], _layout(sent)
    if sent.json_ is not None:
        found.append(of_schema(sent.json_, f"{name}.json", layout))
    if sent.regex is not None:
        found.append(TextForm("regex", sent.regex, field=f"{name}.regex"))
    if sent.choice is not None:
        found.append(one_of(sent.choice, f"{name}.choice"))
    if sent.grammar is not None:
        found.append(TextForm("grammar", sent.grammar, field=f"{name}.grammar"))
    if sent.json_object:
        found.append(TextForm("json", "", layout, f"{name}.json_object"))
    if not found:
        raise InvalidRequestError(f"{name} must have one of json, regex, choice, grammar, json_object", name)
    if layout is not None and found[0].kind != "json":
        raise InvalidRequestError(f"{name}: white space can be set with json and json_object alone", name)
    yield from found


def _layout(sent: StructuredOutputs) -> str | None:
    if not sent.disable_any_whitespace:
        return sent.whitespace_pattern
    if sent.whitespace_pattern:
        name = "structured_outputs.disable_any_whitespace"
        raise InvalidRequestError(
            f"{name} contradicts structured_outputs.whitespace_pattern; send one of them", name
        )
    return ""


def of_schema(schema: dict[str, Any] | str, field: str, layout: str | None = None) -> TextForm:
    """A schema as text. Raises InvalidRequestError where it is no JSON."""
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False, separators=(",", ":"))
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{field}: the schema cannot be read: {error}", field) from error
    if not text.strip():
        raise InvalidRequestError(f"{field} must be a JSON schema, got {quoted(schema)}", field)
    return TextForm("json", text, layout, field)
