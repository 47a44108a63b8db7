"""Reasoning in an answer: the markers around it, and what of a text that grows belongs to it.

An answer reasons at its beginning or not at all: it begins with the start marker, or the prompt has opened it. Once
the end marker has come, the rest is content, whatever it holds. Invariant: what comes out joins to the same reasoning
and content, whatever the pieces that the text came in. White space inside the markers belongs to their layout. Knows
texts and how many tokens they came in; does not know vocabularies.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from ensemble_core.text.markers import overlap, shown_before

Stage = Literal["before", "inside", "content"]


@dataclass(frozen=True, slots=True)
class Marks:
    """The texts around reasoning."""

    start: str
    end: str


KNOWN: tuple[Marks, ...] = (
    Marks("<think>", "</think>"),
    Marks("[THINK]", "[/THINK]"),
    Marks("<seed:think>", "</seed:think>"),
    Marks("<|START_THINKING|>", "<|END_THINKING|>"),
)


def marks_of(template: str, tokens: Collection[bytes]) -> Marks | None:
    """The known marks that a chat template mentions, or else that are tokens of a vocabulary; None: no such marks."""
    told = (marks for marks in KNOWN if marks.start in template and marks.end in template)
    found = (marks for marks in KNOWN if marks.start.encode() in tokens and marks.end.encode() in tokens)
    return next(told, None) or next(found, None)


def opened_by(prompt: str, marks: Marks) -> bool:
    """Whether a prompt ends with reasoning that has just been opened."""
    return prompt.rstrip().endswith(marks.start)


def stage_within(text: str, marks: Marks) -> Stage:
    """Where the rest of an answer begins whose first part is `text`."""
    if text.rfind(marks.start) > text.rfind(marks.end):
        return "inside"
    return "content" if text.strip() else "before"


class ReasoningReader:
    """Splits the text of an answer into reasoning and content.

    stage: before: it may still begin with the start marker. begun: the answer reasons. num_read: tokens that came
    while the stage was inside. num_tokens: those of them that are reasoning, not the end marker. within_character:
    the last token ended within one.
    """

    def __init__(self, marks: Marks, stage: Stage = "before") -> None:
        self.marks = marks
        self.stage: Stage = stage
        self.begun = stage == "inside"
        self.num_read = self.num_tokens = 0
        self.within_character = False
        self._held = ""  # the end of the text that is not shown
        self._fresh = True  # no reasoning has been shown

    @property
    def marker_begun(self) -> int:
        """How many characters of the next marker the text ends with."""
        if self.stage == "inside":
            return overlap(self._held, self.marks.end)
        return len(self._held.lstrip()) if self.stage == "before" else 0

    def feed(self, more: str, num_tokens: int = 1, *, within_character: bool = False) -> tuple[str, str]:
        """Take in what so many tokens add; the reasoning and the content that can be shown now."""
        self.within_character = within_character
        text, known, self._held = self._held + more, len(self._held), ""
        if self.stage == "before":
            return self._open(text)
        if self.stage == "content":
            return "", text
        self.num_read += num_tokens
        return self._inside(text, known)

    def end(self) -> tuple[str, str]:
        """What was held back, as reasoning and content."""
        held, self._held = self._held, ""
        if self.stage == "before":
            self.stage = "content"
            return "", held
        self.num_tokens = self.num_read if self.stage == "inside" else self.num_tokens
        return self._trimmed(held), ""

    def _open(self, text: str) -> tuple[str, str]:
        start, rest = self.marks.start, text.lstrip()
        if rest.startswith(start):
            self.stage, self.begun = "inside", True
            return self._inside(rest[len(start) :], 0)
        if start.startswith(rest):
            self._held = text
            return "", ""
        self.stage = "content"
        return "", text

    def _inside(self, text: str, known: int) -> tuple[str, str]:
        """known: characters of the text that came with earlier tokens."""
        end = self.marks.end
        at = text.find(end)
        if at >= 0:
            self.stage = "content"
            if at > known:
                self.num_tokens = self.num_read
            return self._trimmed(text[:at].rstrip()), text[at + len(end) :]
        begun = overlap(text, end)
        if not begun or len(text) - known > begun:
            self.num_tokens = self.num_read
        shown = shown_before(text, end)
        self._held = text[shown:]
        return self._trimmed(text[:shown]), ""

    def _trimmed(self, text: str) -> str:
        """The reasoning to show, without the white space behind the start marker."""
        text = text.lstrip() if self._fresh else text
        self._fresh = self._fresh and not text
        return text
