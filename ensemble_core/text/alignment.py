"""From the text so far to each member's tokens.

A sequence owns its text. The main member's tokens are the ones that were sampled; an assistant's are derived:
its completion is respelt from the last stable boundary, compared with what it has cached, rolled back to the
common prefix and fed the rest. So an assistant always sees the tokens that it would have written itself.

Invariant: after `respell(text)` the completion ids equal `encode(text)` of the whole text. A boundary is stable
where a letter or digit is followed by a space: no pre-tokeniser joins the two, nothing that follows can change
what stands before, and no token of the vocabulary runs over it (`Vocabulary.bridged`). Text without such places
(Chinese, say) is respelt as a whole, which is slower and as right.

Knows no member, no cache and no tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ensemble_core.text.vocabulary import Vocabulary


@dataclass(slots=True)
class Track:
    """The tokens that one member should hold of one sequence, and how many of them it has cached.

    prompt_ids: as the member's own template made them, never touched again.
    """

    vocabulary: Vocabulary
    prompt_ids: list[int]
    completion_ids: list[int] = field(default_factory=list)
    num_cached: int = 0
    _stable_chars: int = 0  # text[:_stable_chars] is spelt by completion_ids[:_stable_tokens] for good
    _stable_tokens: int = 0

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def num_uncached(self) -> int:
        """Tokens that the member has not seen yet."""
        return len(self) - self.num_cached

    def uncached(self, count: int) -> list[int]:
        """The next `count` tokens to feed."""
        start, prompt = self.num_cached, len(self.prompt_ids)
        if start >= prompt:
            return self.completion_ids[start - prompt : start - prompt + count]
        return (self.prompt_ids[start:] + self.completion_ids)[:count]

    def append(self, token_id: int) -> None:
        """Main's way: the sampled token is the truth."""
        self.completion_ids.append(token_id)

    def respell(self, text: str) -> int:
        """An assistant's way: spell `text` (whole characters) anew; returns the cached tokens to drop.

        At least one token is left to feed, so that the member has an answer for the new position.
        """
        before = self.completion_ids[self._stable_tokens :]
        stable, spelt = self._spell(text)
        kept = self._stable_tokens + _common_prefix(before, spelt)
        self.completion_ids[self._stable_tokens :] = spelt
        self._stable_chars, self._stable_tokens = stable
        valid = min(self.num_cached, len(self.prompt_ids) + kept, len(self) - 1)
        dropped, self.num_cached = self.num_cached - valid, valid
        return dropped

    def _spell(self, text: str) -> tuple[tuple[int, int], list[int]]:
        """The new stable boundary (chars, tokens), and the ids from the old one to the end of the text."""
        boundary = last_stable_boundary(text, self._stable_chars, self.vocabulary.bridged)
        head = self.vocabulary.encode(text[self._stable_chars : boundary])
        tail = self.vocabulary.encode(text[boundary:])
        return (boundary, self._stable_tokens + len(head)), head + tail


def last_stable_boundary(text: str, start: int, bridged: frozenset[str]) -> int:
    """Index of the last space after a letter or digit past `start`; `start` where there is none."""
    end = len(text)
    while (space := text.rfind(" ", start + 1, end)) > 0:
        before = text[space - 1]
        if before.isalnum() and before not in bridged:
            return space
        end = space
    return start


def _common_prefix(left: list[int], right: list[int]) -> int:
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))
