"""Where each token of one vocabulary goes in another: the direct map, worked out once a pair.

A token goes to the target's token of the same bytes, else to the target's token of its longest prefix: the first
token that the target would write. Every stop id goes to the target's end of text (its stop id of the same name, else
its lowest). A control token goes to the target's control token of the same name, else nowhere. Equal vocabularies
map one to one, ids of equal bytes included.

Invariant: one int64 entry a token, -1 for a token without a place. Does not know candidates, weights or batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from ensemble_core.text.vocabulary import Vocabulary

UNMAPPED = -1


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two vocabularies, known by what they mean."""

    fingerprints: tuple[str, str]
    source: Vocabulary = field(compare=False)
    target: Vocabulary = field(compare=False)


def token_map(source: Vocabulary, target: Vocabulary) -> Tensor:
    """(V_source,) int64: the target's id for each of the source's, -1 for none. Kept for later fusions."""
    return _token_map(_Pair((source.fingerprint, target.fingerprint), source, target))


@lru_cache(maxsize=32)
def _token_map(pair: _Pair) -> Tensor:
    source, target = pair.source, pair.target
    if pair.fingerprints[0] == pair.fingerprints[1]:
        return torch.arange(len(source))
    place = _prefix_rule(target)
    controls = _controls(source, target)
    ids = [controls[i] if i in controls else place(token) for i, token in enumerate(source.tokens)]
    return torch.tensor(ids, dtype=torch.long)


def _prefix_rule(target: Vocabulary) -> Callable[[bytes], int]:
    """Bytes -> the target's token of the longest prefix, the whole included."""
    known = target.ids_by_bytes
    longest = max(map(len, known), default=0)

    def place(token: bytes) -> int:
        for end in range(min(len(token), longest), 0, -1):
            found = known.get(token[:end])
            if found is not None:
                return found
        return UNMAPPED

    return place


def _controls(source: Vocabulary, target: Vocabulary) -> dict[int, int]:
    """Places of the source's stop ids and control tokens."""
    stops = {target.tokens[i]: i for i in sorted(target.stop_ids, reverse=True)}
    named = {target.tokens[i]: i for i in sorted(target.special_ids, reverse=True) if target.tokens[i]}
    end = min(target.stop_ids, default=UNMAPPED)
    found = {i: named.get(source.tokens[i], UNMAPPED) for i in source.special_ids}
    return found | {i: stops.get(source.tokens[i], end) for i in source.stop_ids}
