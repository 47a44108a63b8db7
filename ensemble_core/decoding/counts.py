"""Numbers by token id, looked up for a whole support at once: a request's biases, and how often a token was seen.

Ids stand sorted in arrays. So memory follows the distinct tokens of a text and not the vocabulary, and looking up S
ids among n takes S log n, whatever their order. Knows ids alone, no distributions. No torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from ensemble_core.text.alignment import Track

Ids = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]
_BEYOND = np.iinfo(np.int32).max  # closes a table, so that a search never ends outside it; no token has this id


class TokenValues:
    """A number for some ids, 0 for all others."""

    def __init__(self, values: Mapping[int, float]) -> None:
        self._ids, order = _closed(values)
        self._values = np.append(np.fromiter(values.values(), np.float32, len(values))[order], np.float32(0.0))

    def of(self, token_ids: Ids) -> npt.NDArray[np.float32]:
        """(S,) ids in any order -> (S,) numbers."""
        places = self._ids.searchsorted(token_ids)
        return np.where(self._ids[places] == token_ids, self._values[places], np.float32(0.0))


class TokenCounts:
    """How often each id stands in the completion of a track, and whether it stands in the prompt or the completion.

    Nothing is counted before the first look-up, so a sequence that never asks pays nothing. From then on whoever
    changes the completion says so: `add` for a token that has come, `remove` for one that was taken back. A new id
    moves all larger ones up, 8 bytes each.
    """

    def __init__(self, track: Track) -> None:
        self._track = track
        self._size = -1  # distinct ids; -1: nothing is counted yet
        self._ids: Ids = np.empty(0, np.int32)
        self._numbers = np.empty(
            0, np.int32
        )  # 2 * times in the completion + 1 if in the prompt; 0: was taken back

    def of(self, token_ids: Ids) -> tuple[Flags, npt.NDArray[np.int32]]:
        """(S,) ids in any order -> whether each stands in the text, and how often in the completion; both (S,)."""
        if self._size < 0:
            self._count()
        places = self._ids[: self._size + 1].searchsorted(token_ids)
        numbers = np.where(self._ids[places] == token_ids, self._numbers[places], np.int32(0))
        return numbers > 0, numbers >> 1

    def add(self, token_id: int) -> None:
        """The completion has got a token."""
        self._change(token_id, 2)

    def remove(self, token_id: int) -> None:
        """The completion has lost a token that it had."""
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
        """Make room for a new id."""
        end = self._size + 1  # past the id that closes the table
        if end == len(self._ids):
            self._ids = np.append(self._ids, np.full(end, _BEYOND, np.int32))
            self._numbers = np.append(self._numbers, np.zeros(end, np.int32))
        self._ids[place + 1 : end + 1] = self._ids[place:end]
        self._numbers[place + 1 : end + 1] = self._numbers[place:end]
        self._ids[place], self._numbers[place] = token_id, 0
        self._size = end

    def _count(self) -> None:
        """The whole text at once."""
        numbers = Counter(dict.fromkeys(self._track.prompt_ids, 1))
        for token_id, times in Counter(self._track.completion_ids).items():
            numbers[token_id] += 2 * times
        self._ids, order = _closed(numbers)
        self._numbers = np.append(np.fromiter(numbers.values(), np.int32, len(numbers))[order], np.int32(0))
        self._size = len(numbers)


def _closed(ids: Iterable[int]) -> tuple[Ids, npt.NDArray[np.int64]]:
    """Distinct ids in order with `_BEYOND` behind them, and the places that they come from."""
    found = np.array(list(ids), np.int32)
    order = found.argsort()
    return np.append(found[order], np.int32(_BEYOND)), order
