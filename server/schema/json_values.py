"""JSON values of fields: strict types, text that UTF-8 can encode, token ids; one line for each mistake.

Invariants: JSON types are strict (a string is not a number, a bool is not an integer). As in JSON Schema an integer
is a valid number, and a number without a fraction (5.0) a valid integer. null means the default. `SamplingParams`
checks its own ranges, so they are not checked here. This module does not know the endpoints.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationInfo
from pydantic_core import PydanticKnownError

from ensemble_core.decoding.parameters import MAX_INT
from ensemble_core.decoding.sampling_params import PARAMETERS
from ensemble_core.text.variables import check_variables

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")


class Strict(BaseModel):
    """A JSON object whose values are not converted."""

    model_config = ConfigDict(strict=True, protected_namespaces=())


def text(value: object) -> str:
    """A string that UTF-8 can encode. JSON can write half a surrogate pair, which no tokenizer can read."""
    if not isinstance(value, str):
        raise ValueError("must be a string")
    if _LONE_SURROGATE.search(value):
        raise ValueError("must be valid Unicode, without lone surrogates")
    return value


def _texts(value: object) -> str | list[str]:
    if isinstance(value, list):
        return [text(item) for item in value]
    if isinstance(value, str):
        return text(value)
    raise ValueError("must be a string or a list of strings")


def whole(value: object) -> object:
    """A number without a fraction as an integer, anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _token_id(value: object) -> int:
    value = whole(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("a token id must be a valid integer")
    if not 0 <= value <= MAX_INT:
        raise ValueError(f"a token id must be an integer from 0 to {MAX_INT}")
    return value


def token_ids(value: object) -> list[int]:
    """A list of ids; whether a vocabulary has them is checked at admission."""
    if not isinstance(value, list):
        raise ValueError("must be a list of token ids")
    return [_token_id(item) for item in value]


def _prompt(value: object) -> str | list[str] | list[int] | list[list[int]]:
    """Text or ids, one prompt or several; a list holds only one kind."""
    empty = not value or (isinstance(value, list) and any(item in ("", []) for item in value))
    if empty or not isinstance(value, str | list):
        raise ValueError(
            "must be a string, a list of strings, token ids or a list of lists of them; none may be empty"
        )
    if isinstance(value, list) and isinstance(value[0], list):
        return [token_ids(item) for item in value]
    if isinstance(value, list) and isinstance(value[0], int | float):
        return token_ids(value)
    return _texts(value)


def _stop(value: object) -> str | list[str]:
    _check_most("stop", value, "strings")
    return _texts(value)


def _stop_token_ids(value: object) -> list[int]:
    _check_most("stop_token_ids", value, "entries")
    return token_ids(value)


def _logprob_token_ids(value: object) -> list[int]:
    _check_most("logprob_token_ids", value, "entries")
    return token_ids(value)


def _allowed_token_ids(value: object) -> list[int]:
    _check_most("allowed_token_ids", value, "entries")
    if value == []:
        raise ValueError("must not be empty: no token could be written")
    return token_ids(value)


def _bad_words(value: object) -> list[str]:
    _check_most("bad_words", value, "strings")
    if not isinstance(value, list):
        raise ValueError("must be a list of strings")
    return [text(item) for item in value]


def _logit_bias(value: object) -> dict[int, float]:
    """Token id -> bias. JSON keys are strings, so ids arrive as decimal digits."""
    if not isinstance(value, dict):
        raise ValueError("must be an object of token id -> bias")
    _check_most("logit_bias", value, "entries")
    return {_key_id(key): _bias(bias) for key, bias in value.items()}


def _key_id(key: object) -> int:
    if not isinstance(key, str) or not _TOKEN_ID.fullmatch(key):
        raise ValueError('its keys must be token ids as decimal digits, for example "50256"')
    return _token_id(int(key))


def _bias(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("each bias must be a valid number")
    bounds = PARAMETERS["logit_bias"]
    if not bounds.low <= value <= bounds.high:
        raise ValueError(f"each bias must be a number from {bounds.low} to {bounds.high}")
    return float(value)


def _check_most(name: str, value: object, what: str) -> None:
    """Check the length before the entries, since a list may be as long as a body."""
    most = PARAMETERS[name].most
    if isinstance(value, list | dict) and len(value) > most:
        raise ValueError(f"takes up to {most} {what}, got {len(value)}")


def optional(check: Callable[[object], Any]) -> Callable[[object], Any]:
    """`check`, with null allowed."""
    return lambda value: None if value is None else check(value)


def of_types(check: Callable[[object], Any], *types: str) -> Callable[[object, ValidationInfo], Any]:
    """`check` for objects whose `type` is one of these, which must have the field; others do not read it."""

    def validate(value: object, info: ValidationInfo) -> Any:
        if info.data.get("type") not in types:
            return None
        if value is None:
            raise PydanticKnownError("missing")
        return check(value)

    return validate


Text: TypeAlias = Annotated[str, BeforeValidator(text)]
Integer: TypeAlias = Annotated[int, BeforeValidator(whole)]
_Id: TypeAlias = Annotated[int, Field(ge=0, le=MAX_INT)]
_Ids: TypeAlias = Annotated[list[_Id], Field(min_length=1)]
_Line: TypeAlias = Annotated[str, Field(min_length=1)]
_Lines: TypeAlias = Annotated[list[_Line], Field(min_length=1)]
TokenIds: TypeAlias = Annotated[list[int], PlainValidator(token_ids, json_schema_input_type=list[_Id])]
Prompts: TypeAlias = Annotated[
    str | list[str] | list[int] | list[list[int]],
    PlainValidator(
        _prompt, json_schema_input_type=_Line | _Lines | _Ids | Annotated[list[_Ids], Field(min_length=1)]
    ),
]
Stop: TypeAlias = Annotated[
    str | list[str] | None, PlainValidator(optional(_stop), json_schema_input_type=str | list[str] | None)
]
StopTokenIds: TypeAlias = Annotated[
    list[int] | None, PlainValidator(optional(_stop_token_ids), json_schema_input_type=list[int] | None)
]
_VariableName: TypeAlias = Annotated[str, Field(pattern="^[A-Za-z][A-Za-z0-9_]{0,63}$")]
Variables: TypeAlias = Annotated[
    dict[str, Any] | None,
    PlainValidator(optional(check_variables), json_schema_input_type=dict[_VariableName, Any] | None),
]
LogprobTokenIds: TypeAlias = Annotated[
    list[int] | None, PlainValidator(optional(_logprob_token_ids), json_schema_input_type=list[int] | None)
]
AllowedTokenIds: TypeAlias = Annotated[
    list[int] | None, PlainValidator(optional(_allowed_token_ids), json_schema_input_type=list[int] | None)
]
BadWords: TypeAlias = Annotated[
    list[str] | None, PlainValidator(optional(_bad_words), json_schema_input_type=list[str] | None)
]
LogitBias: TypeAlias = Annotated[
    dict[int, float] | None,
    PlainValidator(optional(_logit_bias), json_schema_input_type=dict[str, float] | None),
]
