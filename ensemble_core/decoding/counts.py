"""Numbers by token id, looked up for a whole support at once: a request's biases and its token counts.

Ids are kept in sorted arrays. So memory grows with the distinct tokens of a text, not with the vocabulary, and
looking up S ids among n takes S log n in any order. Knows ids; does not know distributions. No torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from ensemble_core.text.alignment import Track

Ids = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]
_BEYOND = np.iinfo(np.int32).max  # ends a table, so that a search stays within it; no token has this id


class TokenValues:
    """A number for each of some ids, 0 for all others."""

    def __init__(self, values: Mapping[int, float]) -> None:
        self._ids, order = _closed(values)
        self._values = np.append(np.fromiter(values.values(), np.float32, len(values))[order], np.float32(0.0))

    def of(self, token_ids: Ids) -> npt.NDArray[np.float32]:
        """(S,) ids in any order -> (S,) numbers."""
        places = self._ids.searchsorted(token_ids)
        return np.where(self._ids[places] == token_ids, self._values[places], np.float32(0.0))


class TokenCounts:
    """How often each id occurs in a track's completion, and whether it occurs in its prompt or completion.

    Nothing is counted before the first look-up, so a sequence that never asks pays nothing. The caller must report
    each change to the completion: `add` for a new token, `remove` for one that was taken back. A new id moves all
    larger ids up, 8 bytes each.
    """

    def __init__(self, track: Track) -> None:
        self._track = track
        self._size = -1  # distinct ids; -1: nothing is counted yet
        self._ids: Ids = np.empty(0, np.int32)
        # 2 * times in the completion, + 1 if in the prompt; 0 once all are taken back.
        self._numbers = np.empty(0, np.int32)

    def of(self, token_ids: Ids) -> tuple[Flags, npt.NDArray[np.int32]]:
        """(S,) ids in any order -> whether each is in the text, and its count in the completion; both (S,)."""
        if self._size < 0:
            self._count()
        places = self._ids[: self._size + 1].searchsorted(token_ids)
        numbers = np.where(self._ids[places] == token_ids, self._numbers[places], np.int32(0))
        return numbers > 0, numbers >> 1

    def add(self, token_id: int) -> None:
        """Report a new token of the completion."""
        self._change(token_id, 2)

    def remove(self, token_id: int) -> None:
        """Report a token that was taken back from the completion."""
        self._change(token_id, -2)

    def _change(self, token_id: int, by: int) -> None:
        if self._size < 0:
            return
        place = int(self._ids[: self._size + 1].searchsorted(np.int32(token_id)))
        if self._ids[place] != token_id:
            self._insert(place, token_id)
        self._numbers[place] += by
        assert self._numbers[place] >= 0, "a token is removed that the completion did not hold"

    def _insert(self, place: int, token_id: int) -> None:
        """Insert a new id with the number 0."""
        end = self._size + 1  # past the last entry
        if end == len(self._ids):
            self._ids = np.append(self._ids, np.full(end, _BEYOND, np.int32))
            self._numbers = np.append(self._numbers, np.zeros(end, np.int32))
        self._ids[place + 1 : end + 1] = self._ids[place:end]
        self._numbers[place + 1 : end + 1] = self._numbers[place:end]
        self._ids[place], self._numbers[place] = token_id, 0
        self._size = end

    def _count(self) -> None:
        """Count the whole text."""
        numbers = Counter(dict.fromkeys(self._track.prompt_ids, 1))
        for token_id, times in Counter(self._track.completion_ids).items():
            numbers[token_id] += 2 * times
        self._ids, order = _closed(numbers)
        self._numbers = np.append(np.fromiter(numbers.values(), np.int32, len(numbers))[order], np.int32(0))
        self._size = len(numbers)


def _closed(ids: Iterable[int]) -> tuple[Ids, npt.NDArray[np.int64]]:
    """Distinct ids in order, followed by `_BEYOND`, and the position in `ids` that each comes from."""
    found = np.array(list(ids), np.int32)
    order = found.argsort()
    return np.append(found[order], np.int32(_BEYOND)), order
