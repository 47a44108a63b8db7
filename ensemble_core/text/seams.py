"""Where a text may be cut so that its two sides are spelt as they are in the whole.

A tokenizer splits a text (at added tokens, then by its pre-tokenizer) and spells each piece by its model. A place
in a text is a seam if the splits to its left are those of the left side alone, the splits to its right are those of
the right side alone, and whether the text is split at the seam itself depends on the characters next to it only.

- SPLIT: the tokenizer splits here. Then `encode(text) = encode(left) + encode(right)`, whatever the model.
- JOINED: a seam that may lie within a piece. BPE (Sennrich et al. 2016) always merges the pair of the lowest rank,
  of equals the leftmost. So what happens between two neighbouring tokens depends on those two alone: cut where a
  token ends, each side is spelt as before; and two spellings can be joined where BPE keeps their inner ends apart
  in any other text. Other models have no such rule: Unigram adds up floats from a piece's beginning, so ties may
  fall differently; WordPiece gives up whole pieces; with `ignore_merges` a whole piece can be one token.

Covered: added tokens without strip or single-word flags; no normaliser, Replace of spaces by `▁`, NFC; the
pre-tokenizers ByteLevel (GPT-2's pattern, or none), Metaspace, Split at a character, Digits, Punctuation, and
Split by the patterns in `_PATTERNS` (Llama 3, Qwen, GPT-4o and their kin). `find_seams` answers None for all else:
such texts must be spelt as a whole. Knows no tokens, no caches, and not how texts grow.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import Any

from tokenizers import AddedToken
from tokenizers.models import BPE


class Seam(IntEnum):
    """How well a text can be cut at a place."""

    NONE = 0
    JOINED = 1
    SPLIT = 2


Rule = Callable[[str, int], Seam]  # (text, position), 0 < position < len(text)

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4O_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CAMEL = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_LONGEST_WORD = 64  # letters looked at
_NEWLINE_AHEAD = re.compile(r"\s*?[\r\n]")


@dataclass(frozen=True, slots=True)
class _Words:
    """Patterns that keep letters, digits, marks and spaces apart, as GPT-2's does and those that followed it.

    cased: a capital after a small letter begins a piece. digits: runs of digits look alike from any digit on (not
    so where they are counted off in threes). plain: newlines are spaces like all others, marks are signs.
    """

    cased: bool = False
    digits: bool = True
    plain: bool = False

    def __call__(self, text: str, position: int) -> Seam:
        before, after, beyond = text[position - 1], text[position], text[position + 1 : position + 2]
        left, right = unicodedata.category(before), unicodedata.category(after)
        if left[0] in "LN":
            return self._after_a_word(text, position, left, right)
        if before.isspace() and after.isspace():
            return self._within_spaces(text, position)
        # One more sign must follow: the last one of a run may join a word.
        return Seam.JOINED if all(map(self._is_sign, before + after + beyond)) else Seam.NONE

    def _is_sign(self, char: str) -> bool:
        category = unicodedata.category(char)
        known = (category[0] in "PSC" and category != "Cn") or (category[0] == "M" and self.plain)
        return known and not char.isspace() and not (self.cased and char == "/")

    def _after_a_word(self, text: str, position: int, left: str, right: str) -> Seam:
        if left[0] == right[0] == "N":
            return Seam.JOINED if self.digits else Seam.NONE
        if left[0] == right[0] == "L":
            contracted = "'" in text[max(position - 3, 0) : position]
            return Seam.NONE if contracted or (self.cased and not _caseless(text, position)) else Seam.JOINED
        if right[0] in "LN":
            return Seam.SPLIT
        return Seam.NONE if right[0] == "M" or right == "Cn" or text[position] == "'" else Seam.SPLIT

    def _within_spaces(self, text: str, position: int) -> Seam:
        around = text[position - 1 : position + 2]
        if self.plain:
            return Seam.JOINED if not around.strip(" \t\r\n") else Seam.NONE
        alike = not around.strip(" ") and not _NEWLINE_AHEAD.match(text, position)
        return Seam.JOINED if alike else Seam.NONE


def _caseless(text: str, position: int) -> bool:
    """True between two small letters, and between letters without case if none with case follows in their word."""
    left, right = unicodedata.category(text[position - 1]), unicodedata.category(text[position])
    if left != "Lo" or right != "Lo":
        return left == right == "Ll"
    rest = text[position : position + _LONGEST_WORD]
    after = next((kind for kind in map(unicodedata.category, rest) if kind != "Lo"), None)
    if after is None:
        return position + len(rest) == len(text)
    return after[0] not in "LM" and after != "Cn"


@dataclass(frozen=True, slots=True)
class _Beside:
    """A split after each of some characters and before each of others."""

    after: frozenset[str] = frozenset()
    before: frozenset[str] = frozenset()

    def __call__(self, text: str, position: int) -> Seam:
        split = text[position - 1] in self.after or text[position] in self.before
        return Seam.SPLIT if split else Seam.JOINED


def _composed(text: str, position: int) -> Seam:
    """NFC: nothing composes over this place. A mark composes backwards, and so do Hangul vowels and finals."""
    char = text[position]
    loose = unicodedata.category(char)[0] == "M" or unicodedata.category(char) == "Cn"
    jamo = "\u1160" <= char <= "\u11ff" or "\ud7b0" <= char <= "\ud7ff"
    return Seam.NONE if loose or jamo or "\U00016d40" <= char <= "\U00016d7f" else Seam.JOINED


_GPT2 = _Words(plain=True)
_QWEN, _LLAMA, _GPT4O = _Words(), _Words(digits=False), _Words(cased=True, digits=False)
_PATTERNS = {
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_REST}": _QWEN,
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}{_REST}".replace(
        r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"
    ): _QWEN,
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_REST}": _LLAMA,
    rf"{_CAMEL[0]}{_CONTRACTIONS}?|{_CAMEL[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}{_GPT4O_REST}": _GPT4O,
    rf"{_CAMEL[0]}|{_CAMEL[1]}|\p{{N}}{_GPT4O_REST}": _Words(cased=True),
}


@dataclass(frozen=True, slots=True)
class _AddedNames:
    """The added tokens, which are found in a text before anything else: leftmost first, of several the longest.

    Where no name runs over a place, the names to its left and right are found without the other side. Spaces and
    their marks are taken for the same, since some names are found before and some after the one replaces the other.
    longest: characters. settled: ids of tokens that are always found where their name stands; control tokens are
    passed over in a text, so no token that shares a character with one is here.
    """

    names: frozenset[str]
    beginnings: frozenset[str]
    pairs: frozenset[str]
    longest: int
    settled: frozenset[int]

    @classmethod
    def of(cls, added: Mapping[int, AddedToken]) -> _AddedNames:
        marked = {token_id: token.content.replace(" ", "▁") for token_id, token in added.items()}
        names = frozenset(marked.values())
        control = set("".join(name for token_id, name in marked.items() if added[token_id].special))
        return cls(
            names=names,
            beginnings=frozenset(name[:end] for name in names for end in range(1, len(name))),
            pairs=frozenset(a + b for name in names for a, b in pairwise(name)),
            longest=max(map(len, names), default=0),
            settled=frozenset(token_id for token_id, name in marked.items() if control.isdisjoint(name)),
        )

    def straddle(self, text: str, position: int) -> bool:
        """True if some name in the text runs over this place."""
        first = max(position - self.longest + 1, 0)
        text, position = text[first : position + self.longest - 1].replace(" ", "▁"), position - first
        if text[position - 1 : position + 1] not in self.pairs:
            return False
        starts = [start for start in range(position) if text[start:position] in self.beginnings]
        ends = range(position + 1, len(text) + 1)
        return any(text[start:end] in self.names for start in starts for end in ends)


@dataclass(frozen=True, slots=True)
class Seams:
    """The seams of one tokenizer's texts. local: its model is BPE, so that JOINED is of use."""

    added: _AddedNames
    rules: tuple[Rule, ...]
    local: bool

    def at(self, text: str, position: int) -> Seam:
        """What kind of seam a place in a text is; both ends of the text are SPLIT."""
        if not 0 < position < len(text):
            return Seam.SPLIT
        if self.added.straddle(text, position):
            return Seam.NONE
        kinds = [rule(text, position) for rule in self.rules]
        kind = Seam.NONE if Seam.NONE in kinds else max(kinds, default=Seam.JOINED)
        return kind if self.local or kind is Seam.SPLIT else Seam.NONE

    def settled(self, token_id: int, room: int) -> bool:
        """True where a token is an added one whose end is SPLIT while the next `room` characters stay.

        Names may run over that place (a run of newlines, where runs of newlines are tokens). A longer one cannot
        take this one's place if it had to reach further; twice as far, since names are found in two passes.
        """
        return token_id in self.added.settled and room >= 2 * self.added.longest


def find_seams(
    model: object,
    added: Mapping[int, AddedToken],
    normalizers: Sequence[Mapping[str, Any]],
    pre_tokenizers: Sequence[Mapping[str, Any]],
) -> Seams | None:
    """The seams of a tokenizer, from its model and the sections of its tokenizer.json; None if it is not covered."""
    kinds = [part["type"] for part in (*normalizers, *pre_tokenizers)]
    marked = "Replace" in kinds or "Metaspace" in kinds
    rules = [_normalizer_rule(part) for part in normalizers]
    rules += [_pre_tokenizer_rule(part, marked) for part in pre_tokenizers]
    known = [rule for rule in rules if rule is not None]
    patterns = sum(isinstance(rule, _Words) for rule in known)
    covered = (
        len(known) == len(rules)
        and patterns <= (0 if marked else 1)  # patterns look for spaces, and each needs the text as it is
        and "ByteLevel" not in kinds[:-1]  # the alphabet of bytes hides characters from what comes after
        and not any(token.lstrip or token.rstrip or token.single_word for token in added.values())
        and not ("NFC" in kinds and any(token.normalized for token in added.values()))
    )
    return Seams(_AddedNames.of(added), tuple(known), _is_local(model)) if covered else None


def _normalizer_rule(part: Mapping[str, Any]) -> Rule | None:
    if part["type"] == "NFC":
        return _composed
    marks = part["type"] == "Replace" and part["pattern"] == {"String": " "} and part["content"] == "▁"
    return _Beside() if marks else None


def _pre_tokenizer_rule(part: Mapping[str, Any], marked: bool) -> Rule | None:
    """marked: where it looks for a space it finds the mark."""
    match part["type"]:
        case "Digits" | "Punctuation":
            return _Beside()
        case "ByteLevel":
            return _GPT2 if part["use_regex"] else _Beside()
        case "Metaspace":
            return _Beside(before=frozenset(" ▁")) if part["split"] and part["replacement"] == "▁" else None
        case "Split":
            return _split_rule(part["pattern"], part["behavior"], part["invert"], marked)
        case _:
            return None


def _split_rule(pattern: Mapping[str, str], behavior: str, invert: bool, marked: bool) -> Rule | None:
    if (behavior, invert) in (("Isolated", False), ("Removed", True)) and "Regex" in pattern:
        return _PATTERNS.get(pattern["Regex"])
    char = pattern.get("String", "")
    if len(char) != 1 or invert or behavior not in ("Isolated", "MergedWithNext", "MergedWithPrevious"):
        return None
    chars = frozenset({" ": "", "▁": " ▁"}.get(char, char) if marked else char)
    after = chars if behavior != "MergedWithNext" else frozenset()
    return _Beside(after, chars if behavior != "MergedWithPrevious" else frozenset())


def _is_local(model: object) -> bool:
    if not isinstance(model, BPE) or model.dropout or model.ignore_merges:
        return False
    return not model.continuing_subword_prefix and not model.end_of_word_suffix
