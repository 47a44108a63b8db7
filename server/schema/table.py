"""Generates the tables of docs/api.md from the schemas: a row for every parameter that an endpoint knows.

`python -m server.schema.table` rewrites them between their marks. A test checks that they are up to date.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from server.schema.chat import ChatRequest
from server.schema.completions import CompletionRequest
from server.schema.messages import MessagesRequest
from server.schema.responses import ResponseRequest
from server.schema.sampling import GenerationFields, SamplingFields

DOCUMENT = Path(__file__).parents[2] / "docs" / "api.md"
TABLES: dict[str, type[GenerationFields]] = {
    "completions": CompletionRequest,
    "chat": ChatRequest,
    "responses": ResponseRequest,
    "messages": MessagesRequest,
}
_IDLE = "user"  # a field only so that its type is checked


def table(kind: type[GenerationFields]) -> str:
    """Supported parameters (the endpoint's own first), then refused ones, then those without effect."""
    return "\n".join(("| parameter | status | example | notes |", "|---|---|---|---|", *_rows(kind)))


def _rows(kind: type[GenerationFields]) -> Iterator[str]:
    shared = SamplingFields.model_fields.keys() - {"model"}
    for name in sorted(kind.model_fields, key=lambda name: (name != "model", name in shared)):
        found = kind.model_fields[name]
        assert found.examples, name
        assert found.description, name
        yield _row(name, "no effect" if name == _IDLE else "supported", found.examples[0], found.description)
    for name, refused in kind.refused.items():
        neutral = ", ".join(f"`{json.dumps(value)}`" for value in refused.neutral)
        yield _row(name, "400", refused.example, refused.why, neutral and f"neutral: {neutral}")
    for name, ignored in kind.ignored.items():
        yield _row(name, "no effect", ignored.example, ignored.why)


def _row(name: str, status: str, example: Any, *notes: str) -> str:
    note = "; ".join(filter(None, notes))
    return f"| `{name}` | {status} | `{json.dumps(example)}` | {note} |".replace("|  |", "| |")


def with_tables(document: str) -> str:
    """The document with its tables regenerated."""
    for name, kind in TABLES.items():
        begin, end = f"<!-- {name}: begin -->\n", f"\n<!-- {name}: end -->"
        head, _, rest = document.partition(begin)
        document = head + begin + table(kind) + end + rest.partition(end)[2]
    return document


if __name__ == "__main__":
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
