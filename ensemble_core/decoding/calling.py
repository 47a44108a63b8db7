"""Calls of tools as a form of text, and who is told what is wrong with a tool.

Invariant: an answer that may have calls is bound by a grammar from its first token on: content is free, or follows
the request's own form, and a call follows its tool's schema. Knows forms of calls and grammars; does not know
sequences or members.
"""

from __future__ import annotations

import json

from ensemble_core.decoding.forms import TextForm
from ensemble_core.decoding.guidance import Constraint, Grammars, spaces_of
from ensemble_core.decoding.schemas import endless
from ensemble_core.errors import InvalidRequestError
from ensemble_core.text.call_forms import CallForm
from ensemble_core.text.tools import ToolUse
from ensemble_core.text.vocabulary import Vocabulary

MAX_CALLS_LENGTH = 524_288  # characters of a grammar of calls


def calls_form(use: ToolUse, form: CallForm, vocabulary: Vocabulary, content: TextForm | None) -> TextForm:
    """What an answer must be whose calls have this form. content: what it must be where it calls nothing.

    Raises InvalidRequestError for a tool that no arguments can follow, and for content that cannot stand beside
    calls.
    """
    for rank, tool in use.callable:
        if (ref := endless(json.dumps(tool.arguments()))) is not None:
            raise _of_tool(rank, f"no finite value can satisfy it, since $ref {ref!r} always needs itself again")
    text = None if content is None or use.choice == "required" else _lark(content, form)
    grammar = form.grammar(use, vocabulary.special_names, text)
    return TextForm("grammar", grammar, field="tools", most=MAX_CALLS_LENGTH)


def calls_constraint(grammars: Grammars, use: ToolUse, form: TextForm, group: str | None) -> Constraint:
    """A constraint for a form made by `calls_form`. Raises InvalidRequestError that names the tool at fault."""
    try:
        return grammars.compile(form, group)
    except InvalidRequestError as error:
        for rank, tool in use.callable:
            field = f"tools.{rank}.function.parameters"
            grammars.compile(TextForm("json", json.dumps(tool.arguments()), field=field, most=MAX_CALLS_LENGTH))
        raise error


def _of_tool(rank: int, reason: str) -> InvalidRequestError:
    where = f"tools.{rank}.function.parameters"
    return InvalidRequestError(f"{where}: the JSON schema cannot be used: {reason}; correct it", where)


def _lark(content: TextForm, form: CallForm) -> str:
    """Content of a form, in Lark."""
    if content.kind != "json" or form.at_start:
        raise InvalidRequestError(
            f"{content.field}: beside tools that may be called, the text of this model can have no such form; send "
            "tool_choice: none or required, or leave one of them out",
            content.field,
        )
    schema = json.loads(content.source) if content.source else {"type": "object"}
    return f"%json {json.dumps({'x-guidance': spaces_of(content)} | schema)}"
