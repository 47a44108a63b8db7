"""The words that councils add to a client's: Jinja files of `prompts/`.

Clients' and models' texts are values of a template and never templates. Knows no council.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import jinja2


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "prompts"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # the texts are prompts, not HTML
    )


def worded(name: str, **values: object) -> str:
    """A file of `prompts/` with its values filled in."""
    return _environment().get_template(f"{name}.jinja").render(**values).strip("\n")
