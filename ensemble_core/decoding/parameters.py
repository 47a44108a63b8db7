"""A request parameter: its kind, range, default and description. No torch.

A parameter is declared once, as a field of `SamplingParams`. The checks there, the fields of the HTTP schemas and the
tables of docs/api.md follow from that declaration. Knows no parameter by name.
"""

from __future__ import annotations

import math
from collections.abc import Sized
from dataclasses import dataclass, field
from typing import Any, Literal

from ensemble_core.decoding.forms import TextForm
from ensemble_core.errors import InvalidRequestError, quoted

ValueKind = Literal["integer", "number", "boolean", "form", "texts", "ids", "biases"]
MAX_INT = 2**31 - 1  # stands for no bound: descriptions leave it out


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter.

    default: the value if a request does not send it; None is allowed only where it is the default. low, high:
    inclusive bounds of a number, of each bias, or of the length of each text. above: `low` itself is not allowed.
    most: largest number of entries. note: what it does. example: a value that changes the answer. Both are for the
    documentation.
    """

    kind: ValueKind
    default: Any
    note: str
    example: Any
    low: float = 0
    high: float = MAX_INT
    above: bool = False
    most: int = MAX_INT

    def check(self, name: str, value: Any, low: float | None = None, high: float | None = None) -> None:
        """Raise InvalidRequestError for a value of the wrong kind or out of range. low, high: override the bounds."""
        low, high = self.low if low is None else low, self.high if high is None else high
        if value is None and self.default is None:
            return
        match self.kind:
            case "integer":
                _check_integer(name, value, low, high)
            case "number":
                _check_number(name, value, low, high, self.above)
            case "boolean" if not isinstance(value, bool):
                raise InvalidRequestError(f"{name} must be true or false, got {quoted(value)}", name)
            case "form" if not isinstance(value, TextForm):
                raise InvalidRequestError(f"{name} must be a TextForm, got {quoted(value)}", name)
            case "texts":
                self._check_texts(name, value)
            case "ids":
                self._check_most(name, value, "entries")
                for token_id in value:
                    _check_integer(name, token_id, 0, MAX_INT)
            case "biases":
                self._check_most(name, value, "entries")
                for token_id, bias in value:
                    _check_integer(name, token_id, 0, MAX_INT)
                    _check_number(name, bias, low, high)

    def describe(self, note: str = "") -> str:
        """Range, default and note in words. note: overrides its own."""
        return "; ".join(part for part in (self._range(), self._unsent(), note or self.note) if part)

    def json_schema(self) -> dict[str, Any]:
        """Range and default as JSON Schema keywords."""
        default = {} if self.default in (None, ()) else {"default": self.default}
        if self.kind not in ("integer", "number"):
            return default
        least = "exclusiveMinimum" if self.above else "minimum"
        return {least: self.low, "maximum": self.high} | default

    def _check_texts(self, name: str, value: Any) -> None:
        if isinstance(value, str):
            raise InvalidRequestError(f"{name} must be a tuple of strings, got the string {quoted(value)}", name)
        self._check_most(name, value, "strings")
        for text in value:
            if not self.low <= len(text) <= self.high:
                bounds = f"{self.low} to {self.high} characters"
                raise InvalidRequestError(f"each {name} string must have {bounds}, got {len(text)}", name)

    def _check_most(self, name: str, value: Sized, what: str) -> None:
        if len(value) > self.most:
            raise InvalidRequestError(f"{name} takes up to {self.most} {what}, got {len(value)}", name)

    def _range(self) -> str:
        most = f"up to {self.most}" if self.most < MAX_INT else ""
        if self.kind == "boolean" or self.high >= MAX_INT:
            return most
        if self.kind == "texts":
            return ", ".join(part for part in (most, f"of up to {self.high} characters") if part)
        bounds = f"over {self.low:g}, up to {self.high:g}" if self.above else f"{self.low:g}..{self.high:g}"
        return ", ".join(part for part in (bounds, most) if part)

    def _unsent(self) -> str:
        if self.default is None or self.default is False or self.default == ():
            return ""
        return f"{'true' if self.default is True else f'{self.default:g}'} if not sent"


def declared(kind: ValueKind, default: Any, note: str, example: Any, **bounds: Any) -> Any:
    """A dataclass field that declares a parameter. Its metadata holds the Parameter. bounds: fields of Parameter."""
    parameter = Parameter(kind, default, note, example, **bounds)
    return field(default=default, metadata={"parameter": parameter})


def _check_integer(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequestError(f"{name} must be an integer from {low} to {high}, got {quoted(value)}", name)


def _check_number(name: str, value: Any, low: float, high: float, above: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or math.isnan(value) or not low <= value <= high or (above and value == low):
        beyond = f" and greater than {low:g}" if above else ""
        raise InvalidRequestError(
            f"{name} must be a number from {low:g} to {high:g}{beyond}, got {quoted(value)}", name
        )
