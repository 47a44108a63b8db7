"""Every seed has a stream of its own; short ones that of `random.Random`."""

from __future__ import annotations

import random

from ensemble_core.decoding.randomness import generator

WORD, LEAST, MOST = 2**32, -(2**63), 2**63 - 1


def head(rng: random.Random) -> tuple[float, float]:
    return rng.random(), rng.random()


def test_no_two_seeds_share_a_stream() -> None:
    seeds = {*range(-500, 500), *range(LEAST, LEAST + 50), *range(MOST - 50, MOST + 1)}
    seeds |= {sign * (high * WORD + low) for sign in (1, -1) for high in range(40) for low in range(-3, 42)}
    seeds |= {sign * 2**bits for sign in (1, -1) for bits in range(63)}
    assert len({head(generator(seed)) for seed in seeds}) == len(seeds)


def test_words_that_random_mixes_up_stay_apart() -> None:
    for low in (2, 3, 77, WORD - 1):
        run = low + (low - 1) * WORD  # read as unsigned; random.Random(run) has the stream of `low`
        seed = run if run <= MOST else run - 2**64
        assert head(random.Random(run)) == head(random.Random(low))
        assert head(generator(seed)) != head(generator(low))


def test_short_seeds_keep_their_streams_and_none_is_random() -> None:
    for seed in (0, 1, 7, 2**31, WORD - 1):
        assert head(generator(seed)) == head(random.Random(seed))
    assert head(generator(None)) != head(generator(None))
