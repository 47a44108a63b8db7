"""Tables by token id against dictionaries and counters: any order of ids, tokens that come and are taken back."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from fakes import byte_vocabulary

from ensemble_core.decoding.counts import TokenCounts, TokenValues
from ensemble_core.text.alignment import Track

VOCABULARY = byte_vocabulary()
LAST = 2**31 - 1


def ids_of(*token_ids: int) -> np.ndarray:
    return np.array(token_ids, np.int32)


@pytest.mark.parametrize("seed", range(10))
def test_values_are_those_of_the_dictionary(seed: int) -> None:
    rng = random.Random(seed)
    values = {rng.randrange(300): rng.uniform(-100, 100) for _ in range(rng.choice([0, 1, 50, 290]))}
    asked = [rng.randrange(-1, 400) for _ in range(200)]
    expected = np.array([values.get(token_id, 0.0) for token_id in asked], np.float32)
    assert TokenValues(values).of(ids_of(*asked)).tolist() == expected.tolist()


def test_ids_at_the_edges() -> None:
    values = TokenValues({0: 1.5, LAST - 1: -2.5})
    assert values.of(ids_of(LAST, LAST - 1, 0, 1, -1)).tolist() == [0.0, -2.5, 1.5, 0.0, 0.0]
    assert TokenValues({}).of(ids_of(0, LAST)).tolist() == [0.0, 0.0]
    assert TokenValues({5: 1.0}).of(ids_of()).tolist() == []


@pytest.mark.parametrize("seed", range(20))
def test_counts_are_those_of_the_text_on_any_walk(seed: int) -> None:
    rng = random.Random(seed)
    size = rng.choice([3, 40, 1000])
    track = Track(VOCABULARY, [rng.randrange(size) for _ in range(rng.choice([0, 5, 200]))])
    counts = TokenCounts(track)
    for _ in range(400):
        if track.completion_ids and rng.random() < 0.4:
            counts.remove(track.completion_ids.pop())
        else:
            track.append(rng.randrange(size))
            counts.add(track.completion_ids[-1])
        if rng.random() < 0.1:
            asked = [rng.randrange(-1, size + 5) for _ in range(50)]
            generated = Counter(track.completion_ids)
            seen, times = counts.of(ids_of(*asked))
            assert times.tolist() == [generated[token_id] for token_id in asked]
            assert seen.tolist() == [token_id in generated or token_id in track.prompt_ids for token_id in asked]


def test_a_token_that_is_not_there_cannot_be_taken_back() -> None:
    counts = TokenCounts(Track(VOCABULARY, [7]))
    counts.of(ids_of(7))
    with pytest.raises(AssertionError, match="did not hold"):
        counts.remove(7)
