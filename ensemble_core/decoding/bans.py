"""Which tokens a request must not write: all but its allowed ids, and those that would complete one of its bad words.

A word is banned as vLLM bans it: in the spelling that main's tokenizer gives it, alone and behind a space. The last
token of a spelling is banned where the completion ends with the tokens before it. So a word that is written in other
tokens passes; what is banned are token sequences. Knows ids; does not know distributions. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ensemble_core.decoding.counts import Flags, Ids, TokenValues
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.text.vocabulary import Vocabulary


class Bans:
    """What one request bans. allowed_ids: empty where all may be written.

    A step costs the spellings that end behind the last token, whatever the length of the text.
    """

    def __init__(
        self, allowed_ids: Sequence[int], words: Iterable[str], encode: Callable[[str], Sequence[int]]
    ) -> None:
        self._allowed = TokenValues(dict.fromkeys(allowed_ids, 1.0)) if allowed_ids else None
        self._always: set[int] = set()
        self._behind: dict[int, list[tuple[tuple[int, ...], int]]] = {}  # last token but one -> (head, last)
        for ids in {tuple(encode(text)) for word in words for text in _spellings(word)} - {()}:
            if len(ids) == 1:
                self._always.add(ids[0])
            else:
                self._behind.setdefault(ids[-2], []).append((ids[:-1], ids[-1]))
        # Ids that words may ban at one place, at most: so many more candidates are needed there.
        self.most = len(self._always) + max(map(len, self._behind.values()), default=0)

    def of(self, token_ids: Ids, completion_ids: Sequence[int]) -> Flags:
        """(S,) ids -> (S,) True for those that may not follow a completion."""
        banned = np.isin(token_ids, list(self._completing(completion_ids)))
        return banned if self._allowed is None else banned | (self._allowed.of(token_ids) == 0)

    def _completing(self, completion_ids: Sequence[int]) -> set[int]:
        """The ids that would complete a word."""
        near = self._behind.get(completion_ids[-1], ()) if completion_ids else ()
        return self._always | {last for head, last in near if tuple(completion_ids[-len(head) :]) == head}


def bans_of(params: SamplingParams, vocabulary: Vocabulary) -> Bans | None:
    """What a request bans, in main's vocabulary; None: nothing."""
    if not (params.allowed_token_ids or params.bad_words):
        return None
    return Bans(params.allowed_token_ids, params.bad_words, vocabulary.encode)


def _spellings(word: str) -> tuple[str, str]:
    """A word where a text begins or goes on, and behind a space."""
    bare = word.lstrip() or word
    return bare, f" {bare}"
