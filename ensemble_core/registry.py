"""Strategies by name. Each registers itself with a pydantic model of its options.

Errors list the registered names. Does not know the kinds of strategies (fusions, modes).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ensemble_core.errors import ConfigError, UnknownStrategyError, quoted, shortened

Factory = TypeVar("Factory", bound=Callable[..., Any])

_MAX_LINES = 5
_ALTERNATIVE = re.compile(r"(literal\[|constrained-|(int|float|str|bool|none)$)")  # of a field of several types


class Registry(Generic[Factory]):
    """Name -> options and factory. kind: what is registered, for messages."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._entries: dict[str, tuple[type[BaseModel], Factory]] = {}

    def register(self, name: str, options: type[BaseModel]) -> Callable[[Factory], Factory]:
        """Decorator that registers a strategy's class or factory under `name`."""

        def decorate(factory: Factory) -> Factory:
            self._entries[name] = (options, factory)
            return factory

        return decorate

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)

    def options(self, name: str) -> type[BaseModel]:
        """The model of the options of a registered strategy."""
        return self._entries[name][0]

    def factory(self, name: str) -> Factory:
        """The factory of a strategy whose name `parse` has accepted."""
        return self._entries[name][1]

    def parse(self, name: str, options: dict[str, Any], where: str) -> BaseModel:
        """Check a strategy's options. where: path of the field, for messages.

        Raises UnknownStrategyError for an unknown name, ConfigError for wrong options.
        """
        if name not in self._entries:
            raise UnknownStrategyError(
                f"{where}.name: unknown {self._kind} {quoted(name)}; known are {self.names()}"
            )
        try:
            return self._entries[name][0].model_validate(options)
        except ValidationError as error:
            raise ConfigError("; ".join(_lines(f"{where}.options", error.errors(include_url=False)))) from error


def _lines(where: str, errors: list[ErrorDetails]) -> list[str]:
    """A line for each field that is wrong; what the alternatives of one field ask for stands in one."""
    fields: dict[str, list[ErrorDetails]] = {}
    for item in errors:
        parts = [str(part) for part in item["loc"]]
        named = parts[:-1] if len(parts) > 1 and _ALTERNATIVE.match(parts[-1]) else parts
        fields.setdefault(shortened(".".join(named)), []).append(item)
    return [
        f"{where}.{path}: {', or '.join(item['msg'] for item in items)} (given: {quoted(items[0]['input'])})"
        for path, items in list(fields.items())[:_MAX_LINES]
    ]
