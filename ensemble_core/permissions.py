"""What a client may choose of its ensemble (`server.allow_overrides`), so that no request makes others wait.

A choice is judged by the options that it results in, defaults included. What the recipe itself is configured with is
always allowed. Does not know HTTP; the offline API has no such bounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ensemble_core.config import Config, StrategyConfig
from ensemble_core.decoding.modes.base import MODES
from ensemble_core.decoding.requests import Overrides
from ensemble_core.errors import ConfigError, InvalidRequestError, UnknownStrategyError
from ensemble_core.fusion.base import FUSIONS
from ensemble_core.registry import Registry

_SETTING = "server.allow_overrides"


class Permissions:
    """The rules of one configuration."""

    def __init__(self, config: Config) -> None:
        self._ensembles = config.ensembles
        self._rules = config.server.allow_overrides

    def check(self, model: str, overrides: Overrides) -> None:
        """Raise InvalidRequestError for a choice that is not allowed. Unknown names are left to the recipes."""
        ensemble = self._ensembles.get(model)
        if ensemble is None:
            return
        chosen = (overrides.fusion, overrides.fusion_options)
        self._check("fusion", FUSIONS, self._rules.fusions, ensemble.fusion, *chosen)
        self._check("mode", MODES, self._rules.modes, ensemble.mode, overrides.mode, overrides.mode_options)

    def offered(self) -> dict[str, dict[str, dict[str, Any]]]:
        """`fusions` and `modes` that a request may name, each with the JSON schema of its options.

        The schemas leave out what requests may not give. What only a recipe is configured with is not in them.
        """
        of = self._ensembles.values()
        return {
            "fusions": self._schemas(FUSIONS, self._rules.fusions, {each.fusion.name for each in of}),
            "modes": self._schemas(MODES, self._rules.modes, {each.mode.name for each in of}),
        }

    def _schemas(
        self, registry: Registry[Any], allowed: tuple[str, ...] | Literal["all"], configured: set[str]
    ) -> dict[str, dict[str, Any]]:
        names = registry.names() if allowed == "all" else sorted({*allowed, *configured} & {*registry.names()})
        return {name: self._bounded(registry.options(name).model_json_schema()) for name in names}

    def _bounded(self, schema: dict[str, Any]) -> dict[str, Any]:
        """A schema of options without the values that requests may not give."""
        for name, field in schema.get("properties", {}).items():
            most = self._rules.most.get(name)
            for part in (field, *field.get("anyOf", ())):
                if most is not None and part.get("type") in ("integer", "number"):
                    part["maximum"] = min(most, part.get("maximum", most))
                if "enum" in part:
                    part["enum"] = [each for each in part["enum"] if each not in self._rules.refused.get(name, ())]
        return schema

    def _check(
        self,
        kind: Literal["fusion", "mode"],
        registry: Registry[Any],
        allowed: tuple[str, ...] | Literal["all"],
        configured: StrategyConfig,
        name: str | None,
        options: Mapping[str, Any] | None,
    ) -> None:
        if name is None and options is None:
            return
        chosen = {"name": name or configured.name}
        chosen |= _parsed(registry, chosen["name"], options or {})
        own = {"name": configured.name} | _parsed(registry, configured.name, configured.options)
        names = None if allowed == "all" else {*allowed, configured.name}
        self._check_options(f"ensemble.{kind}", chosen, own if own["name"] == chosen["name"] else {}, names)

    def _check_options(
        self, where: str, options: Mapping[str, Any], own: Mapping[str, Any], names: set[str] | None
    ) -> None:
        """Check a strategy's name and options, and those of a strategy inside them. own: the configured ones."""
        for name, value in options.items():
            if name in own and own[name] == value:
                continue
            path = f"{where}.{name}"
            if isinstance(value, Mapping):
                self._check_options(path, value, own.get(name) or {}, names)
                continue
            if name == "name" and names is not None and value not in names:
                raise InvalidRequestError(
                    f"{path}: this server does not let requests choose {value!r} ({_SETTING}); allowed are "
                    f"{sorted(names)}",
                    where,
                )
            most = self._rules.most.get(name)
            if most is not None and isinstance(value, int | float) and value > most:
                raise InvalidRequestError(
                    f"{path}: a request may ask for {most:g} at most ({_SETTING}.most), got {value}", where
                )
            if value in self._rules.refused.get(name, ()):
                raise InvalidRequestError(
                    f"{path}: requests may not ask for {value!r} ({_SETTING}.refused)", where
                )


def _parsed(registry: Registry[Any], name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a strategy, with its defaults; {} for what the recipes will refuse."""
    try:
        return registry.parse(name, dict(options), "ensemble").model_dump()
    except (UnknownStrategyError, ConfigError):
        return {}
