"""What is known of a member where requests are read: words, templates, limits. No cache and no weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ensemble_core.decoding.guidance import Grammars
from ensemble_core.decoding.thinking import MarkTokens
from ensemble_core.members.base import ALL_ABILITIES, Abilities
from ensemble_core.text.prompt import PromptEncoder
from ensemble_core.text.vocabulary import Vocabulary


@dataclass(frozen=True)
class Speaker:
    """A member as requests meet it. thinking: how it spells the marks of its reasoning, if it has any."""

    vocabulary: Vocabulary
    prompts: PromptEncoder
    max_len: int
    grammars: Grammars
    abilities: Abilities = ALL_ABILITIES
    thinking: MarkTokens | None = None

    @cached_property
    def answering(self) -> Vocabulary:
        """The vocabulary of answers to conversations: control tokens that mark reasoning are part of the text."""
        marks = {} if self.thinking is None else self.thinking.control
        return self.vocabulary.with_text(marks.values()) if marks else self.vocabulary

    @cached_property
    def calling(self) -> Vocabulary:
        """The same where answers may call tools: those that mark calls are part of the text, too."""
        marks = self.prompts.call_form.marks(self.vocabulary.special_names)
        return self.answering.with_text(marks.values()) if marks else self.answering
