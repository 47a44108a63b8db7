"""A prompt becomes ids, once per member: by the member's own tokenizer and its own chat template.

Templates run in transformers' sandbox. A member reads tools through its template where that knows them and writes
calls in a known form, which a trial shows; else they become plain messages. Knows tokenizers; does not know models,
requests or engines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2

from ensemble_core.errors import ConfigError, InvalidRequestError
from ensemble_core.text.call_forms import PLAIN, CallForm, form_in
from ensemble_core.text.plain_tools import plain_messages
from ensemble_core.text.tools import Message, Tool, ToolUse
from ensemble_core.text.variables import TemplateVariables

# A conversation that shows what a template makes of tools: each text must come through.
_TRIED = Tool(
    "tried_tool", "tried description", '{"type": "object", "properties": {"tried": {"type": "integer"}}}'
)
_TRIED_ARGUMENTS = {"tried": 1}
_TRIED_RESULT = "tried result"
_TRIAL: tuple[Message, ...] = (
    {"role": "user", "content": "tried question"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "tried",
                "type": "function",
                "function": {"name": _TRIED.name, "arguments": _TRIED_ARGUMENTS},
            }
        ],
    },
    {"role": "tool", "content": _TRIED_RESULT, "tool_call_id": "tried", "name": _TRIED.name},
)
_NOTHING = TemplateVariables()
_SYSTEM: tuple[Message, ...] = ({"role": "system", "content": "a"}, {"role": "user", "content": "b"})


class PromptEncoder:
    """One member's way from a prompt to ids.

    template: Jinja text in place of the tokenizer's own chat template; None keeps that.
    """

    def __init__(self, member: str, tokenizer: Any, template: str | None = None) -> None:
        self._member = member
        self._tokenizer = tokenizer
        self._template = template

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a plain prompt, with what the tokenizer puts in front (BOS) unless that is switched off."""
        return self._required(self.tokenize(text, add_special_tokens), "prompt")

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """`encode`, which may be empty here."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return ids

    def start(self) -> list[int]:
        """Ids of a text of which nothing is written yet: BOS, without one end of text, without both none."""
        start = self._tokenizer.bos_token_id
        if start is None:
            start = self._tokenizer.eos_token_id
        return [] if start is None else [int(start)]

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """Tokens as the tokenizer's own vocabulary writes them; "" for ids that it does not know."""
        return [piece or "" for piece in self._tokenizer.convert_ids_to_tokens(list(token_ids))]

    def encode_chat(
        self,
        messages: Sequence[Message],
        continue_final: bool = False,
        tools: ToolUse | None = None,
        variables: TemplateVariables = _NOTHING,
    ) -> list[int]:
        """Ids of a conversation through the template.

        continue_final: the last message is left open, to be gone on with; otherwise the assistant's turn is opened.
        variables: for the template. Without one, roles become plain lines (`user: ...`). Raises InvalidRequestError
        for what the template refuses.
        """
        has_tools = tools is not None or any(m.get("tool_calls") or m.get("role") == "tool" for m in messages)
        if has_tools:
            _check_messages(messages)
        if has_tools and self._own_form is None:
            messages, tools = plain_messages(messages, tools, system=self._takes_system), None
        elif has_tools:
            messages = [_with_short_ids(message) for message in messages]
        if not self._has_template:
            return self.encode(plain_chat(messages, continue_final))
        try:
            text = self._rendered(messages, continue_final, tools, variables)
        except (jinja2.TemplateError, ValueError) as error:
            raise self._refused("messages", error) from error
        except Exception as error:  # variables of any type may make a template fail in any way
            if not variables.values:
                raise
            raise self._refused("chat_template_kwargs", error) from error
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return self._required(ids, "messages")

    @property
    def template(self) -> str:
        """The text of the chat template; empty: there is none."""
        found = self._template or self._tokenizer.chat_template or ""
        return found if isinstance(found, str) else "\n".join(map(str, found.values()))

    @property
    def call_form(self) -> CallForm:
        """How this member writes calls of tools: as its template does, else the plain form that it is told."""
        return self._own_form or PLAIN

    @property
    def _has_template(self) -> bool:
        return self._template is not None or self._tokenizer.chat_template is not None

    @cached_property
    def _own_form(self) -> CallForm | None:
        """The form of calls in this member's template; None if it knows no tools, or no form that we know."""
        if not self._has_template:
            return None
        try:
            trial = [_with_short_ids(message) for message in _TRIAL]
            text = self._rendered(trial, False, ToolUse((_TRIED,)))
        except Exception:  # the template was not made for this, and may fail in any way
            return None
        shows_all = _TRIED.description in text and _TRIED_RESULT in text
        return form_in(text, _TRIED.name, _TRIED_ARGUMENTS) if shows_all else None

    @cached_property
    def _takes_system(self) -> bool:
        if not self._has_template:
            return True
        try:
            self._rendered(_SYSTEM, False, None)
        except (jinja2.TemplateError, ValueError):
            return False
        return True

    def _rendered(
        self,
        messages: Sequence[Message],
        continue_final: bool,
        tools: ToolUse | None,
        variables: TemplateVariables = _NOTHING,
    ) -> str:
        text: str = self._tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=None if tools is None else [tool.described() for tool in tools.tools],
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=not continue_final,
            continue_final_message=continue_final,
            **variables.of(self.template),
        )
        return text

    def _refused(self, param: str, error: Exception) -> InvalidRequestError:
        return InvalidRequestError(
            f"{param}: the chat template of member {self._member!r} refuses them: {error}", param
        )

    def _required(self, ids: list[int], param: str) -> list[int]:
        if not ids:
            raise InvalidRequestError(
                f"{param} is empty for member {self._member!r}, which adds nothing of its own; send some text",
                param,
            )
        return ids

    def describe(self) -> dict[str, object]:
        """The tokenizer as clients ask for it: name, special tokens, chat template."""
        tokenizer = self._tokenizer
        return {
            "tokenizer_class": type(tokenizer).__name__,
            "bos_token": tokenizer.bos_token,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token": tokenizer.eos_token,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token": tokenizer.pad_token,
            "pad_token_id": tokenizer.pad_token_id,
            "chat_template": self._template or tokenizer.chat_template,
        }


def _with_short_ids(message: Message) -> Message:
    """The message with ids of calls as the strictest template wants them: nine letters or digits."""
    if calls := message.get("tool_calls"):
        return {**message, "tool_calls": [call | {"id": _short(call["id"])} for call in calls]}
    if "tool_call_id" in message:
        return {**message, "tool_call_id": _short(message["tool_call_id"])}
    return message


def _short(call_id: str) -> str:
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]


def plain_chat(messages: Sequence[Message], continue_final: bool = False) -> str:
    """The fallback for models without a chat template: a line a message, and the assistant's turn left open.

    Raises InvalidRequestError for a message without a role or content.
    """
    _check_messages(messages)
    lines = [f"{message['role']}: {message['content']}" for message in messages]
    return "\n".join(lines if continue_final else [*lines, "assistant:"])


def _check_messages(messages: Sequence[Message]) -> None:
    for index, message in enumerate(messages):
        if missing := {"role", "content"} - message.keys():
            raise InvalidRequestError(
                f"messages: message {index} has no {' and no '.join(sorted(missing))}; give every message both",
                "messages",
            )


def read_template(member: str, template: str | None) -> str | None:
    """A configured chat template: Jinja text as it is, or the text of a `.jinja` file. Raises ConfigError."""
    if template is None or not template.endswith(".jinja"):
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"members.{member}.chat_template: {template}: {error.strerror}") from error
