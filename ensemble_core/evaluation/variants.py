"""Which models are evaluated: an ensemble or a member by name, and variants of an ensemble.

`duet?fusion=projection&weights.gemma3=0.7&options.steps=6` asks for the ensemble `duet` with the same overrides that
a request may carry: keys are paths into them (`options` is short for `fusion_options`), values are YAML scalars or
lists. As with a request, options replace those of the configuration. Does not know which fusions there are.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from ensemble_core.decoding.requests import Overrides
from ensemble_core.errors import EvaluationError

_FIELDS = [field.name for field in fields(Overrides)]
_SHORT = {"options": "fusion_options"}
_OVERRIDES = TypeAdapter(Overrides)


@dataclass(frozen=True, slots=True)
class Variant:
    """A model to evaluate. label: as it was asked for."""

    label: str
    model: str
    overrides: Overrides


def parse_variant(spec: str) -> Variant:
    """Read `MODEL` or `MODEL?key=value&...`. Raises EvaluationError."""
    model, _, query = spec.partition("?")
    chosen: dict[str, Any] = {}
    for part in filter(None, query.split("&")):
        key, equals, value = part.partition("=")
        path = key.split(".")
        path[0] = _SHORT.get(path[0], path[0])
        if not equals or path[0] not in _FIELDS:
            raise EvaluationError(
                f"--model {spec!r}: {part!r} is not understood; write key=value, where key begins with one of "
                f"{', '.join(_FIELDS)} or options"
            )
        _put(chosen, path, _value(spec, part, value))
    try:
        return Variant(spec, model, _OVERRIDES.validate_python(chosen))
    except ValidationError as error:
        parts = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_url=False)]
        raise EvaluationError(f"--model {spec!r}: {'; '.join(parts)}") from error


def _value(spec: str, part: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise EvaluationError(f"--model {spec!r}: the value of {part!r} is not understood") from error


def _put(chosen: dict[str, Any], path: list[str], value: Any) -> None:
    *outer, last = path
    for name in outer:
        chosen = chosen.setdefault(name, {})
        if not isinstance(chosen, dict):
            raise EvaluationError(f"--model: {'.'.join(path)} goes through {name!r}, which has a value of its own")
    chosen[last] = value
