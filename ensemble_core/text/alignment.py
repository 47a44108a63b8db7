"""From the text so far to each member's tokens.

A sequence owns its text. The main member's tokens are the ones that were sampled. An assistant's are derived: the
text is spelt anew, the spelling is compared with what is cached, the cache is rolled back to the common prefix and
the rest is fed. So an assistant always sees the tokens that it would have written itself.

Invariant: after `respell(text)` the completion ids equal `encode(text)`, whatever the text was before: longer,
shorter, or another. The cost follows what changed, not the text: only the end of the text is spelt, from the last
seam (`seams`) at which the tokens before it are proved to stay. Where none is found the whole text is spelt.

Knows no member, no cache and no tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate

from ensemble_core.text.seams import Seam, Seams
from ensemble_core.text.vocabulary import Vocabulary

_FIRST_TRY = 4  # characters with whole tokens to step back before the text is spelt within a piece
_LAST_TRY = 256  # and before the text is spelt as a whole


@dataclass(slots=True)
class Track:
    """The tokens that one member should hold of one sequence, and how many of them it has cached.

    prompt_ids: as the member's own template made them, never touched again. num_cached: of these tokens. num_held:
    tokens that the member keeps pages for; more than num_cached until its next feed rolls back what was dropped.
    max_len: of these tokens that the member can hold.
    """

    vocabulary: Vocabulary
    prompt_ids: list[int]
    completion_ids: list[int] = field(default_factory=list)
    num_cached: int = 0
    num_held: int = 0
    max_len: int = sys.maxsize
    _text: str | None = None  # what the completion ids spell, if they were respelt
    _foreseen: tuple[str, int, list[int]] | None = None  # a text, and what `_spell` says of it

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

    def cache(self, num_cached: int) -> None:
        """The member has this many tokens cached now, and no others."""
        self.num_cached = self.num_held = num_cached

    def spells(self, text: str) -> bool:
        """Whether the completion is known to spell this text."""
        return text == self._text or (not text and not self.completion_ids)

    def holds(self, text: str) -> bool:
        """Whether the member can hold this text as the completion."""
        return len(self.prompt_ids) + len(self.spelling(text)[1]) <= self.max_len

    def append(self, token_id: int) -> None:
        """Main's way: the sampled token is the truth."""
        self.completion_ids.append(token_id)
        self._text = self._foreseen = None

    def take_back(self, count: int) -> int:
        """Main's way back: its last `count` completion tokens go; returns the cached tokens to drop.

        At least one token is left to feed.
        """
        kept = len(self.completion_ids) - count
        assert 0 <= kept <= len(self.completion_ids), "more tokens taken back than there are"
        return self._replace_from(kept, kept, [], None)

    def respell(self, text: str) -> int:
        """An assistant's way: spell `text` (whole characters) anew; returns the cached tokens to drop.

        At least one token is left to feed, so that the member has an answer for the new position.
        """
        place, tail = self._spelling(text)
        kept = place + _common_prefix(self.completion_ids[place:], tail)
        return self._replace_from(place, kept, tail, text)

    def spelling(self, text: str) -> tuple[int, list[int]]:
        """What `respell(text)` would make of the completion: its ids, and how many of the first stay for certain."""
        if self.spells(text):
            return len(self.completion_ids), self.completion_ids
        place, tail = self._spelling(text)
        self._foreseen = text, place, tail
        return place, self.completion_ids[:place] + tail

    def _spelling(self, text: str) -> tuple[int, list[int]]:
        if self._foreseen is not None and self._foreseen[0] == text:
            return self._foreseen[1:]
        return _spell(self.vocabulary, self.completion_ids, self._text, text)

    def _replace_from(self, place: int, kept: int, tail: list[int], text: str | None) -> int:
        """Put `tail` after the first `place` completion tokens; the first `kept` of all are what they were."""
        self.completion_ids[place:] = tail
        self._text, self._foreseen = text, None
        valid = min(self.num_cached, len(self.prompt_ids) + kept, len(self) - 1)
        dropped, self.num_cached = self.num_cached - valid, valid
        return dropped


def rests(track: Track) -> list[int]:
    """The place of each prompt token: how many bytes of text follow it, without control tokens."""
    ends = list(accumulate(len(track.vocabulary.text_bytes(token_id)) for token_id in track.prompt_ids))
    return [ends[-1] - end for end in ends]


def plain_text(track: Track) -> bytes:
    """The bytes that a prompt's tokens spell, without control tokens."""
    return b"".join(track.vocabulary.text_bytes(token_id) for token_id in track.prompt_ids)


def _spell(vocabulary: Vocabulary, ids: list[int], old: str | None, new: str) -> tuple[int, list[int]]:
    """How many of `ids`, which spell `old`, stay in the spelling of `new`, and the ids that follow them.

    At a SPLIT seam the right side is spelt alone. At a JOINED one the text is spelt from a place further left: if
    the tokens between that place and the seam come out as they were, the last of them stands beside the first new
    one and BPE does not merge them, so all that is left of the seam stays.
    """
    seams = vocabulary.seams
    if seams is None or old is None:
        return 0, vocabulary.encode(new)
    common = _common_length(old, new)
    steps, patience, joint = 0, _FIRST_TRY, 0
    for tokens, chars in _boundaries(vocabulary, ids, old):
        if chars > common:
            continue
        seam = _seam(seams, old, new, chars)
        if seam is Seam.SPLIT or (tokens and seams.settled(ids[tokens - 1], common - chars)):
            return tokens, vocabulary.encode(new[chars:])
        steps += 1
        if steps > _LAST_TRY:
            break
        if joint and steps > patience:
            tail = vocabulary.encode(new[chars:])
            if tail[: joint - tokens] == ids[tokens:joint]:
                return tokens, tail
            patience *= 2
        joint = tokens if seam is Seam.JOINED else 0
    return 0, vocabulary.encode(new)


def _seam(seams: Seams, old: str, new: str, position: int) -> Seam:
    """What kind of seam a place is in the new text, if it was one in the old."""
    return seams.at(new, position) if seams.at(old, position) is not Seam.NONE else Seam.NONE


def _boundaries(vocabulary: Vocabulary, ids: list[int], text: str) -> Iterator[tuple[int, int]]:
    """Where a token and a character end, from the right: how many tokens and how many characters lie before.

    Ends early at a token that does not spell the text: an unknown one, or where a normaliser changed the text.
    """
    tokens, chars, pending = len(ids), len(text), b""
    yield tokens, chars
    while tokens and ids[tokens - 1] not in vocabulary.special_ids:
        tokens -= 1
        pending = vocabulary.tokens[ids[tokens]] + pending
        if pending[0] & 0xC0 == 0x80:
            continue  # it begins within a character
        piece = pending.decode(errors="surrogateescape")
        if not text.endswith(piece, 0, chars):
            return
        chars, pending = chars - len(piece), b""
        yield tokens, chars


def _common_length(left: str, right: str) -> int:
    """Length of the longest common beginning."""
    low, high = 0, min(len(left), len(right))
    if left[:high] == right[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if left[low:middle] == right[low:middle] else (low, middle)
    return low


def _common_prefix(left: list[int], right: list[int]) -> int:
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))
