"""Reasoning under guidance: a budget forces the end marker, and a form binds what follows the marker.

Invariants: under a form the end marker ends with a token, so that content begins with one, and no text ends within
reasoning; whether the answer reasons or not, its content follows the form from its first token on. The budget is
exact in tokens, but for a character that is begun. Knows main's vocabulary; does not know members or sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from ensemble_core.decoding.guidance import Constraint
from ensemble_core.text.reasoning import Marks, ReasoningReader
from ensemble_core.text.vocabulary import Vocabulary

_MOST_BYTES = 4  # of a character: so many tokens at most may complete one that is begun


class MarkTokens:
    """How one vocabulary spells the markers of reasoning. Costly parts are computed once, on first use."""

    def __init__(self, marks: Marks, vocabulary: Vocabulary) -> None:
        self.marks = marks
        self._vocabulary = vocabulary
        self._by_begun: dict[int, Tensor] = {}

    @cached_property
    def control(self) -> dict[str, int]:
        """The markers that are control tokens: text -> id."""
        names = self._vocabulary.special_names
        return {text: names[text] for text in (self.marks.start, self.marks.end) if text in names}

    @property
    def fault(self) -> str | None:
        """Why these markers cannot work with this vocabulary; None: they can."""
        for text in (self.marks.start, self.marks.end):
            if text in self.control:
                if self.control[text] in self._vocabulary.stop_ids:
                    return f"{text!r} ends this member's texts, so nothing could follow it"
            elif b"".join(map(self._vocabulary.text_bytes, self._vocabulary.encode(text))) != text.encode():
                return f"this member's tokenizer cannot spell {text!r}"
        return None

    def next_of(self, text: str) -> int:
        """The token that a marker, or the rest of one, begins with."""
        return self.control[text] if text in self.control else self._vocabulary.encode(text)[0]

    def openers(self, rest: str) -> Iterator[int]:
        """All tokens that spell the rest of the start marker or a part of it, and nothing behind it."""
        if rest in self.control:
            yield self.control[rest]
        for end in range(1, len(rest) + 1):
            if (token_id := self._vocabulary.ids_by_bytes.get(rest[:end].encode())) is not None:
                yield token_id

    def inside(self, begun: int) -> Tensor:
        """(V,) bool: tokens that may follow reasoning whose text ends with so much of the end marker.

        All but those that end texts, other control tokens, and those that hold the marker with something behind it.
        """
        if begun not in self._by_begun:
            mask = self._text.clone()
            head, end = self.marks.end[:begun].encode(), self.marks.end.encode()
            closing = [i for i in self._suspects if end in (head + self._vocabulary.tokens[i])[:-1]]
            mask[closing] = False
            self._by_begun[begun] = mask
        return self._by_begun[begun]

    @cached_property
    def _text(self) -> Tensor:
        """(V,) bool: tokens of text, and the end marker."""
        mask = torch.tensor([bool(token) for token in self._vocabulary.tokens])
        mask[sorted(self._vocabulary.special_ids | self._vocabulary.stop_ids)] = False
        mask[[self.control[text] for text in (self.marks.end,) if text in self.control]] = True
        return mask

    @cached_property
    def _suspects(self) -> list[int]:
        """Tokens that have the last byte of the end marker before their own last one."""
        last = self.marks.end.encode()[-1:]
        return [i for i, token in enumerate(self._vocabulary.tokens) if last in token[:-1] and self._text[i]]


class ThinkingGuide:
    """The position of one sequence in its reasoning, and in the form of its content. See `guide.Guide`."""

    def __init__(
        self, reader: ReasoningReader, tokens: MarkTokens, budget: int | None, form: Constraint | None, size: int
    ) -> None:
        """reader: the sequence's own, which others feed after `accept`. form: of content. size: of the vocabulary."""
        self._reader, self._tokens, self._budget, self._size = reader, tokens, budget, size
        self._form = form
        self._unless = None if form is None else form.copy()  # the form, should the answer not reason at all

    @property
    def binds(self) -> bool:
        """See `Guide.binds`."""
        return self._form is not None or (self._budget is not None and self._reader.stage != "content")

    @property
    def chooses(self) -> bool:
        """See `Guide.chooses`."""
        return self._form is not None and self.forced is None

    @property
    def forced(self) -> int | None:
        """See `Guide.forced`."""
        reader = self._reader
        if self._budget is None or reader.stage != "inside" or reader.num_read < self._budget:
            return None
        if reader.within_character and reader.num_read < self._budget + _MOST_BYTES:
            return None
        return self._tokens.next_of(reader.marks.end[reader.marker_begun :])

    def allowed(self) -> Tensor | None:
        """See `Guide.allowed`. Raises ConstraintError where the form cannot go on."""
        if (forced := self.forced) is not None:
            return self._only(forced)
        if self._form is None:
            return None
        if self._reader.stage == "inside":
            return self._tokens.inside(self._reader.marker_begun)
        if self._reader.stage == "content":
            return self._content.allowed()
        mask = self._only() if self._unless is None else self._unless.allowed()
        mask[list(self._tokens.openers(self._reader.marks.start[self._reader.marker_begun :]))] = True
        return mask

    def accept(self, token_id: int) -> None:
        """See `Guide.accept`."""
        if self._form is None or self._reader.stage == "inside":
            return
        if self._reader.stage == "content":
            self._content.accept(token_id)
        elif self._unless is not None and self._unless.allowed()[token_id]:
            self._unless.accept(token_id)
        else:
            self._unless = None

    @property
    def _content(self) -> Constraint:
        found = self._form if self._reader.begun else self._unless
        assert found is not None, "content began with a token that its form does not allow"
        return found

    def _only(self, *token_ids: int) -> Tensor:
        mask = torch.zeros(self._size, dtype=torch.bool)
        mask[list(token_ids)] = True
        return mask
