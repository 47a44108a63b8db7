"""Calls of tools as a form of text, and who is told what is wrong with a tool.

Invariant: an answer that may have calls is bound by a grammar from its first token on: content is free, or follows
the request's own form, and a call follows its tool's schema. Knows forms of calls and grammars; does not know
sequences or members.
"""

from __future__ import annotations

import json
import re

from ensemble_core.decoding.forms import TextForm
from ensemble_core.decoding.grammars import spaces_of
from ensemble_core.decoding.guidance import Constraint, Grammars
from ensemble_core.errors import InvalidRequestError
from ensemble_core.text.call_forms import CallForm
from ensemble_core.text.tools import ToolUse
from ensemble_core.text.vocabulary import Vocabulary

MAX_CALLS_LENGTH = 524_288  # characters of a grammar of calls
_FIELD = "tools"
_AT_LINE = re.compile(r"at (\d+)\(\d+\): (?:failed to compile JSON schema: )?(.*?)(?: \d+ \| .*)?; correct it")
_RULE = re.compile(r"tool_(\d+):")


def calls_form(use: ToolUse, form: CallForm, vocabulary: Vocabulary, content: TextForm | None) -> TextForm:
    """What an answer must be whose calls have this form. content: what it must be where it calls nothing.

    Raises InvalidRequestError for content that cannot stand beside calls, and for tools that are too large.
    """
    text = None if content is None or use.choice == "required" else _lark(content, form)
    grammar = form.grammar(use, vocabulary.special_names, text)
    return TextForm("grammar", grammar, field=_FIELD, most=MAX_CALLS_LENGTH)


def constraint_of(grammars: Grammars, form: TextForm) -> Constraint:
    """A constraint for a form. Raises InvalidRequestError; where a tool is at fault, with its path."""
    try:
        return grammars.compile(form)
    except InvalidRequestError as error:
        if form.field == _FIELD:
            raise _blaming(form, error) from error
        raise


def _blaming(form: TextForm, error: InvalidRequestError) -> InvalidRequestError:
    """The error, with the path of the tool whose rule is named in it by its line."""
    found = _AT_LINE.search(str(error))
    lines = form.source.split("\n")
    rule = _RULE.match(lines[int(found[1]) - 1]) if found is not None and int(found[1]) <= len(lines) else None
    if found is None or rule is None:
        return error
    where = f"tools.{rule[1]}.function.parameters"
    return InvalidRequestError(f"{where}: the JSON schema cannot be used: {found[2]}; correct it", where)


def _lark(content: TextForm, form: CallForm) -> str:
    """Content of a form, in Lark."""
    if content.kind != "json" or form.at_start:
        raise InvalidRequestError(
            f"{content.field}: beside tools that may be called, the text of this model can have no such form; send "
            "tool_choice: none or required, or leave one of them out",
            content.field,
        )
    try:
        schema = json.loads(content.source) if content.source else {"type": "object"}
    except (ValueError, RecursionError):
        schema = None
    if not isinstance(schema, dict):
        raise InvalidRequestError(f"{content.field}: the JSON schema must be an object; correct it", content.field)
    return f"%json {json.dumps({'x-guidance': spaces_of(content)} | schema)}"
