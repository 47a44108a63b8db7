"""A prompt becomes ids, once per member: by the member's own tokenizer and its own chat template.

Templates run in transformers' sandbox. Knows tokenizers; does not know models, requests or engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from ensemble_core.errors import ConfigError, InvalidRequestError

Message = dict[str, str]  # role, content: the form that templates take


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

    def encode_chat(self, messages: Sequence[Message], continue_final: bool = False) -> list[int]:
        """Ids of a conversation through the template.

        continue_final: the last message is left open, to be gone on with; otherwise the assistant's turn is opened.
        Without a template, roles become plain lines (`user: ...`). Raises InvalidRequestError for what the
        template refuses.
        """
        if self._template is None and self._tokenizer.chat_template is None:
            return self.encode(plain_chat(messages, continue_final))
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages),
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=not continue_final,
                continue_final_message=continue_final,
            )
        except (jinja2.TemplateError, ValueError) as error:
            raise InvalidRequestError(
                f"messages: the chat template of member {self._member!r} refuses them: {error}", "messages"
            ) from error
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return self._required(ids, "messages")

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


def plain_chat(messages: Sequence[Message], continue_final: bool = False) -> str:
    """The fallback for models without a chat template: a line a message, and the assistant's turn left open.

    Raises InvalidRequestError for a message without a role or content.
    """
    for index, message in enumerate(messages):
        if missing := {"role", "content"} - message.keys():
            raise InvalidRequestError(
                f"messages: message {index} has no {' and no '.join(sorted(missing))}; give every message both",
                "messages",
            )
    lines = [f"{message['role']}: {message['content']}" for message in messages]
    return "\n".join(lines if continue_final else [*lines, "assistant:"])


def read_template(member: str, template: str | None) -> str | None:
    """A configured chat template: Jinja text as it is, or the text of a `.jinja` file. Raises ConfigError."""
    if template is None or not template.endswith(".jinja"):
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"members.{member}.chat_template: {template}: {error.strerror}") from error
