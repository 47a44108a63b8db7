"""What every section of the configuration shares: unknown keys are refused, sizes may have units. No torch.

Invariant: no message about a wrong field quotes a key.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(B|KB|MB|GB|TB|KIB|MIB|GIB|TIB)\s*$", re.IGNORECASE)
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SECRETS = {"api_keys", "admin_keys"}  # no message quotes the value of these fields


class Section(BaseModel):
    """A part of the configuration file."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def parse_size(text: str | int) -> int:
    """The number of bytes in a size such as `2GiB`, `500 MB` or a plain number of bytes. Raises ValueError."""
    if isinstance(text, int):
        return text
    match = _SIZE.match(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write a number and a unit, for example 2GiB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


Size = Annotated[int, BeforeValidator(parse_size, json_schema_input_type=str | int)]


def lines_of(error: ValidationError, *parents: str) -> list[str]:
    """Each wrong field in a line: its path, what is wrong, what was given. parents: where the section stands."""
    return [
        _line((*parents, *item["loc"]), item["msg"], item["input"]) for item in error.errors(include_url=False)
    ]


def _line(location: tuple[int | str, ...], message: str, given: object) -> str:
    if location[:1] == ("councils",) and len(location) > 2:
        location = ("ensembles", location[1], *location[3:])  # without the kind, as it stands in the file
    where = ".".join(str(part) for part in location) or "(top level)"
    message = message.removeprefix("Value error, ")
    if isinstance(given, BaseModel | dict | list) or _SECRETS.intersection(location):
        return f"{where}: {message}"
    return f"{where}: {message} (given: {given!r})"
