"""Random JSON schemas and regular expressions, seeded: what `test_random_forms` decodes by.

Schemas stay within what every text that follows them can be checked for, and what can end.
"""

from __future__ import annotations

import random
from typing import Any

_WORDS = ("name", "age", "tags", "é", "a b", 'q"q', "x/y", "id", "kind", "中", "n")
_FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "ipv6", "email", "hostname", "uri")
_CLASSES = ("[a-c]", "[0-9]", "[1-3]", "[^x]", "[A-Za-z_]", "é", "中", r"\.", "ab", "(?:x|yz)", "-", " ")


def schema(seed: int) -> dict[str, Any]:
    """A schema with definitions that it may refer to, also from within themselves."""
    rng = random.Random(seed)
    names = [f"d{i}" for i in range(rng.randrange(3))]
    found = _schema(rng, 3, names)
    if names:
        found["$defs"] = {name: _definition(rng, name) for name in names}
    return found


def pattern(seed: int) -> str:
    """A regular expression that Rust and Python read alike; of Unicode digits they know different ones."""
    return _pattern(random.Random(seed), 3)


def _pattern(rng: random.Random, depth: int) -> str:
    if depth == 0:
        return rng.choice(_CLASSES)
    parts = [_pattern(rng, depth - 1) for _ in range(rng.randrange(1, 4))]
    match rng.randrange(4):
        case 0:
            return f"(?:{'|'.join(parts)})"
        case 1:
            return f"(?:{''.join(parts)}){rng.choice(['?', '{1,3}', '{2}', '{0,2}'])}"
        case _:
            return "".join(parts)


def _definition(rng: random.Random, name: str) -> dict[str, Any]:
    """A value that may hold more of its own kind, but need not."""
    again = {"anyOf": [{"$ref": f"#/$defs/{name}"}, {"type": "null"}]}
    if rng.random() < 0.5:
        return _object({"next": again, "value": _leaf(rng)}, ["next", "value"])
    return {"type": "array", "items": {"$ref": f"#/$defs/{name}"}, "maxItems": 2}


def _schema(rng: random.Random, depth: int, names: list[str]) -> dict[str, Any]:
    kinds = [
        "leaf",
        "leaf",
        *(["object", "object", "array", "tuple", "anyOf"] if depth else []),
        *["ref"] * len(names),
    ]
    match rng.choice(kinds):
        case "object":
            fields = {name: _schema(rng, depth - 1, names) for name in rng.sample(_WORDS, rng.randrange(1, 5))}
            return _object(fields, [name for name in fields if rng.random() < 0.7])
        case "array":
            least = rng.randrange(3)
            items = _schema(rng, depth - 1, names)
            return {"type": "array", "items": items, "minItems": least, "maxItems": least + rng.randrange(3)}
        case "tuple":
            parts = [_schema(rng, depth - 1, names) for _ in range(rng.randrange(1, 4))]
            return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}
        case "anyOf":
            return {"anyOf": [_schema(rng, depth - 1, names) for _ in range(rng.randrange(2, 4))]}
        case "ref":
            return {"$ref": f"#/$defs/{rng.choice(names)}"}
        case _:
            return _leaf(rng)


def _leaf(rng: random.Random) -> dict[str, Any]:
    low = rng.randrange(-50, 50)
    return rng.choice(
        [
            {"type": "string", "maxLength": rng.randrange(1, 12)},
            {"type": "string", "minLength": 2, "maxLength": 9},
            {"type": "string", "pattern": f"^{_pattern(rng, 2)}$"},
            {"type": "string", "format": rng.choice(_FORMATS)},
            {"type": "integer", "minimum": low, "maximum": low + rng.randrange(2000)},
            {"type": "number", "minimum": low, "maximum": low + 10},
            {"type": "integer", "multipleOf": rng.choice([2, 5, 10]), "minimum": 0, "maximum": 500},
            {"type": "boolean"},
            {"type": "null"},
            {"enum": rng.sample(["a", "é", 7, None, True, "0", 1.5, [1], {"k": "v"}], rng.randrange(1, 5))},
            {"const": rng.choice(["x", 3, False, "a\nb"])},
            {"type": ["string", "null"], "maxLength": 5},
        ]
    )


def _object(fields: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": required, "additionalProperties": False}
