"""Checks whether a finite JSON value can follow a schema, as far as `$ref`s decide that.

`{"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}` asks for endlessly nested objects. The
grammar engine would write one until the tokens are used up. It finds all other contradictions itself, so this file
looks only at `$ref`s: everything else counts as satisfiable. Does not know vocabularies or grammars.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

_MOST_ROUNDS = 64  # longer chains of references count as satisfiable; each round walks the schema once


def endless(schema: str) -> str | None:
    """A `$ref` that makes every value of a schema infinite; None if a finite value can satisfy the schema.

    schema: JSON text of an object. Computes a least fixed point: a reference is proven once its target can be
    satisfied using only references proven before.
    """
    root = json.loads(schema)
    open_refs = {ref: target for ref in _refs(root) if (target := _target(root, ref)) is not None}
    for _ in range(_MOST_ROUNDS):
        proven = [ref for ref, target in open_refs.items() if _ends(target, open_refs)]
        if not proven:
            break
        for ref in proven:
            del open_refs[ref]
    else:
        return None
    return None if _ends(root, open_refs) else min(open_refs)


def _refs(node: object) -> Iterator[str]:
    if isinstance(node, dict) and isinstance(ref := node.get("$ref"), str):
        yield ref
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _refs(child)


def _target(root: Any, ref: str) -> Any:
    """The target of a JSON pointer within the schema; None for any other reference."""
    node = root
    for part in unquote(ref).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        node = node.get(key) if isinstance(node, dict) else None
    return node if ref.startswith("#") and (ref == "#" or ref[1] == "/") else None


def _ends(node: Any, open_refs: dict[str, Any]) -> bool:
    """False if every value of a schema needs one of `open_refs`."""
    if not isinstance(node, dict):
        return True
    if isinstance(ref := node.get("$ref"), str) and ref in open_refs:
        return False
    if not all(_ends(each, open_refs) for each in _needed(node)):
        return False
    choices = [node[name] for name in ("anyOf", "oneOf") if isinstance(node.get(name), list) and node[name]]
    return all(any(_ends(each, open_refs) for each in choice) for choice in choices)


def _needed(node: dict[str, Any]) -> Iterator[Any]:
    """The subschemas that every value must follow in some part."""
    yield from _listed(node.get("allOf"))
    if node.get("type") == "object" and "patternProperties" not in node:
        properties: Any = node.get("properties")
        for name in _listed(node.get("required")):
            known = isinstance(properties, dict) and name in properties
            yield properties[name] if known else node.get("additionalProperties")
    if node.get("type") == "array":
        prefix, least = _listed(node.get("prefixItems")), node.get("minItems", 0)
        yield from prefix[:least]
        if least > len(prefix):
            yield node.get("items")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
