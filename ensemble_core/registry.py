"""Strategies by name. Each registers itself with a pydantic model of its options.

Errors list the registered names. Does not know the kinds of strategies (fusions, modes).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ensemble_core.errors import ConfigError, UnknownStrategyError, quoted, shortened

Factory = TypeVar("Factory", bound=Callable[..., Any])

_MAX_LINES = 5


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
            found = error.errors(include_url=False)[:_MAX_LINES]
            raise ConfigError("; ".join(_line(f"{where}.options", item) for item in found)) from error


def _line(where: str, item: ErrorDetails) -> str:
    path = shortened(".".join(map(str, item["loc"])))
    return f"{where}.{path}: {item['msg']} (given: {quoted(item['input'])})"
