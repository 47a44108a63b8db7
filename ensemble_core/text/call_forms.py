"""How models write calls: the known forms, and the grammar that holds a model to one.

A form is a few strings around a name and a JSON value. A member's form is read off its own chat template: what the
template makes of a call is what the model learnt to write. Invariant: text that follows a form's grammar is read
back by `calls.CallReader`. Knows no vocabularies but for the names and ids of control tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ensemble_core.text.tools import ToolUse

# One layout for all, that of the templates: with free white space a model might write nothing else.
_LAYOUT = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}
_ANY = r"(.|\n)*"
_META = re.compile(r"([\\.+*?()|\[\]{}^$#&~/-])")


@dataclass(frozen=True, slots=True)
class CallForm:
    """`opening first [before NAME middle ARGUMENTS after] between [...] last`.

    opening: the marker of calls. between: None where the form has one call alone. at_start: calls are the whole
    answer, or there are none; the opening means nothing further on. alone: this answer is calls, without text.
    """

    name: str
    opening: str
    middle: str
    after: str
    before: str = ""
    first: str = ""
    between: str | None = None
    last: str = ""
    at_start: bool = False
    alone: bool = False

    def begun(self, name: str, arguments: Mapping[str, Any]) -> str:
        """A call up to its arguments' end."""
        return f"{self.opening}{self.first}{self.before}{name}{self.middle}{spelt(arguments)}"

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        """Calls (name, arguments), at least one; only a form with `between` has several."""
        between = self.between or ""
        written = between.join(
            f"{self.before}{name}{self.middle}{spelt(arguments)}{self.after}" for name, arguments in calls
        )
        return f"{self.opening}{self.first}{written}{self.last}"

    def marks(self, specials: Mapping[str, int]) -> dict[str, int]:
        """The control tokens that are part of this form. specials: a vocabulary's, name -> id."""
        whole = self.write([("", {}), ("", {})])
        return {name: token_id for name, token_id in specials.items() if name in whole}

    def grammar(self, use: ToolUse, specials: Mapping[str, int], content: str | None = None) -> str:
        """Lark for llguidance: calls of the tools that may be called, with text before them where it is allowed.

        Text that holds no opening is free; a call's arguments follow its tool's schema. content: Lark of what an
        answer without calls must be; then no text comes before calls.
        """
        specials = self.marks(specials)
        tools = use.callable
        several = use.parallel and self.between is not None
        more = f"({_literal(self.between or '', specials)} call)*" if several else ""
        rules = [
            f"calls: {_literal(self.first, specials)} call {more} {_literal(self.last, specials)}",
            f"call: {_literal(self.before, specials)} body {_literal(self.after, specials)}",
            "body: " + " | ".join(f"tool_{rank}" for rank, _ in tools),
        ]
        for rank, tool in tools:
            schema = json.dumps({"x-guidance": _LAYOUT} | tool.arguments())
            rules.append(f"tool_{rank}: {_literal(tool.name + self.middle, specials)} %json {schema}")
        return "\n".join([*self._beginning(use, specials, content), *rules])

    def _beginning(self, use: ToolUse, specials: Mapping[str, int], content: str | None) -> list[str]:
        opening = _literal(self.opening, specials)
        if use.choice == "required":
            return [f"start: {opening} calls"]
        if content is not None:
            return [f"start: content | {opening} calls", f"content: {content}"]
        mark = _escaped(self.opening)
        if self.at_start:
            return [f"start: TEXT | {opening} calls", f"TEXT: /{_ANY}/ & ~/{mark}{_ANY}/"]
        text = f"TEXT: /{_ANY}/ & ~/{_ANY}{mark}{_ANY}/"
        if self.opening in specials:
            return [f"start: TEXT | TEXT {opening} calls", text]
        return ["start: TEXT | lead calls", f"lead[lazy]: /{_ANY}{mark}/", text]


HERMES = CallForm(
    "hermes",
    opening="<tool_call>",
    before='\n{"name": "',
    middle='", "arguments": ',
    after="}\n</tool_call>",
    between="\n<tool_call>",
)
PLAIN = HERMES
"""The form for members whose template has none: what `plain_tools` explains to them."""

FORMS: tuple[CallForm, ...] = (
    HERMES,
    CallForm(
        "hermes, one line",
        opening="<tool_call>",
        before='{"name": "',
        middle='", "arguments": ',
        after="}</tool_call>",
        between="\n<tool_call>",
    ),
    CallForm("llama", opening='{"name": "', middle='", "parameters": ', after="}", at_start=True),
    CallForm(
        "mistral, list",
        opening="[TOOL_CALLS]",
        first=" [",
        before='{"name": "',
        middle='", "arguments": ',
        after="}",
        between=", ",
        last="]",
    ),
    CallForm(
        "mistral, tight list",
        opening="[TOOL_CALLS]",
        first="[",
        before='{"name": "',
        middle='", "arguments": ',
        after="}",
        between=", ",
        last="]",
    ),
    CallForm("mistral", opening="[TOOL_CALLS]", middle="[ARGS]", after="", between="[TOOL_CALLS]"),
)


def form_in(text: str, name: str, arguments: Mapping[str, Any]) -> CallForm | None:
    """The form in which a text has this call; None: in none that is known."""
    return next((form for form in FORMS if form.begun(name, arguments) in text), None)


def spelt(arguments: Mapping[str, Any]) -> str:
    """Arguments as JSON, in the layout of the forms."""
    return json.dumps(arguments, ensure_ascii=False)


def _literal(text: str, specials: Mapping[str, int]) -> str:
    """A text in Lark; control tokens by their ids."""
    names = [name for name in specials if name in text]
    if not names:
        return json.dumps(text) if text else ""
    names.sort(key=len, reverse=True)
    parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
    return " ".join(f"<[{specials[part]}]>" if part in specials else json.dumps(part) for part in parts if part)


def _escaped(text: str) -> str:
    return _META.sub(r"\\\1", text)
