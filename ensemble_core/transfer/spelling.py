"""Rows by spelling: a token stands, with all its mass, at the longest anchor that it begins with.

No embeddings: an anchor stands for all of a member's tokens that go on from it. So the relative space is a partition
of each vocabulary, and EM reaches its end in one step: main's tokens of an anchor share what r says of it in main's
own proportions (formulas: docs/methods.md). Serves members whose vocabularies share little, a byte-level one beside
one with words, say: what the small one says of the next letter reaches every word that begins with it.

Does not know files, configurations or models.
"""

from __future__ import annotations

import torch

from ensemble_core.errors import TransferMatrixError
from ensemble_core.text.vocabulary import Vocabulary
from ensemble_core.transfer.matrix import Anchors, TransferMatrix
from ensemble_core.transfer.rows import Quality, ordinary_ids, quantiles


def spelling_matrix(
    vocabulary: Vocabulary, anchors: Anchors, value_dtype: torch.dtype = torch.float16
) -> tuple[TransferMatrix, Quality]:
    """A member's rows (V, 1) over `anchors`, and how many tokens have one: a row is kept whole (1) or is empty (0).

    A token that begins with no anchor has an empty row. Raises TransferMatrixError where there are no anchors.
    """
    if not anchors.tokens:
        raise TransferMatrixError("the members share no tokens; relative fusion needs shared tokens")
    places = {token: column for column, token in enumerate(anchors.tokens)}
    longest = max(map(len, places))
    columns = torch.zeros(len(vocabulary), 1, dtype=torch.int32)
    values = torch.zeros(len(vocabulary), 1, dtype=value_dtype)
    ids, anchor_ids = ordinary_ids(vocabulary), anchors.ids(vocabulary)
    for token_id in ids.tolist():
        column = _longest_beginning(vocabulary.tokens[token_id], places, longest)
        if column is not None:
            columns[token_id, 0], values[token_id, 0] = column, 1.0
    for stop in vocabulary.stop_ids:
        columns[stop, 0], values[stop, 0] = len(anchors) - 1, 1.0
    kept = values[:, 0].float()
    quality = Quality(quantiles(kept[ids]), quantiles(kept[anchor_ids[:-1]]))
    return TransferMatrix(columns, values, anchor_ids), quality


def _longest_beginning(token: bytes, places: dict[bytes, int], longest: int) -> int | None:
    """The column of the longest anchor that a token begins with, itself included."""
    for end in range(min(len(token), longest), 0, -1):
        if token[:end] in places:
            return places[token[:end]]
    return None
