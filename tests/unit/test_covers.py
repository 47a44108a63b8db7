"""Masses of covers against the enumeration of all token sequences, and what carried weights come to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from studies.covers import Next, Said, Spot, above, along, covered, everything, said
from studies.reductions import Reduction, Symbols

# Symbols 0 and 1; two tokens with the same symbols, one without any.
TOKENS: list[Symbols] = [(0,), (1,), (0, 1), (1, 0), (0, 1, 0), (1, 1), (1,), ()]
REDUCTION = Reduction(TOKENS)
STRINGS = [string for length in range(1, 6) for string in product((0, 1), repeat=length)]


def model(seed: int, silent: bool = True) -> Next:
    """A random distribution for each history; `silent`: the token without symbols has no mass."""

    @cache
    def logprobs(ids: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(hash((seed, ids)) % 2**31)
        logits = 2.0 * torch.randn(len(TOKENS), generator=generator)
        if silent:
            logits[-1] = -torch.inf
        return logits.log_softmax(0)

    return logprobs


def sequences(string: Symbols) -> Iterator[tuple[tuple[int, ...], Symbols]]:
    """All covers of a string, by brute force: ids, and what they spell."""
    for length in range(1, len(string) + 1):
        for ids in product(range(len(TOKENS) - 1), repeat=length):
            spelt = tuple(symbol for i in ids for symbol in TOKENS[i])
            inside = sum(len(TOKENS[i]) for i in ids[:-1])
            if inside < len(string) <= len(spelt) and spelt[: len(string)] == string:
                yield ids, spelt


def mass(logprobs: Next, ids: tuple[int, ...]) -> float:
    return math.exp(sum(float(logprobs(ids[:end])[ids[end]]) for end in range(len(ids))))


@pytest.mark.parametrize("string", STRINGS)
def test_all_covers_are_summed(string: Symbols) -> None:
    logprobs = model(1)
    found = covered(logprobs, REDUCTION, string, everything)
    listed = [(mass(logprobs, ids), spelt) for ids, spelt in sequences(string)]
    assert found.begun == pytest.approx(sum(p for p, _ in listed), rel=1e-5)
    assert found.ended == pytest.approx(sum(p for p, spelt in listed if spelt == string), rel=1e-5)
    assert found.missed == 0.0


@pytest.mark.parametrize("string", [string for string in STRINGS if len(string) < 5])
def test_strings_share_the_mass_of_their_beginning(string: Symbols) -> None:
    """P(b | x) = P(xb) / P(x) is a distribution."""
    logprobs = model(2)
    whole = covered(logprobs, REDUCTION, string, everything).begun
    longer = [covered(logprobs, REDUCTION, (*string, symbol), everything).begun for symbol in (0, 1)]
    assert sum(longer) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("own", [(2, 3, 5), (0, 1, 1, 0, 1, 1), (4, 1, 3)])
def test_one_spelling_holds_what_it_says_and_bounds_the_rest(own: tuple[int, ...]) -> None:
    logprobs = model(3)
    string = tuple(symbol for i in own for symbol in TOKENS[i])
    exact = covered(logprobs, REDUCTION, string, everything)
    part = covered(logprobs, REDUCTION, string, along(own))
    most = 1 + 1e-9  # of rounding
    assert (
        mass(logprobs, own) <= part.begun * most <= exact.begun * most**2 <= (part.begun + part.missed) * most**3
    )
    assert part.ended <= exact.ended * most <= (part.ended + part.missed) * most**2
    assert part.forwards == len(own)
    pruned = covered(logprobs, REDUCTION, string, above(1e-3))
    assert pruned.begun <= exact.begun <= pruned.begun + pruned.missed
    assert pruned.forwards < exact.forwards
    joined = covered(logprobs, REDUCTION, string, above(0.5, own))
    assert joined.ended >= part.ended / most
    assert joined.forwards >= part.forwards


def spots(logprobs: Next, own: tuple[int, ...], string: Symbols) -> list[Spot]:
    found, at = [], 0
    for end, token_id in enumerate(own):
        row, size = logprobs(own[:end]), len(TOKENS[token_id])
        begun, just = REDUCTION.along(row, string[at:])
        with np.errstate(divide="ignore"):
            found.append(Spot(at, size, float(row[token_id]), np.log(begun), np.log(just)))
        at += size
    return found


def spoken(seed: int, own: tuple[int, ...]) -> Said:
    string = tuple(symbol for i in own for symbol in TOKENS[i])
    return said(spots(model(seed), own, string), 0, len(string))


@pytest.mark.parametrize("own", [(2, 3, 5), (0, 1, 1, 0, 1, 1), (4, 1, 3)])
def test_kept_masses_say_the_same(own: tuple[int, ...]) -> None:
    """The study sums covers from what it kept of each position."""
    logprobs = model(4)
    string = tuple(symbol for i in own for symbol in TOKENS[i])
    found = spoken(4, own)
    for end in range(1, len(string) + 1):
        part = covered(logprobs, REDUCTION, string[:end], along(own))
        assert math.exp(found.begun[end]) == pytest.approx(part.begun, rel=1e-5)
    assert math.exp(found.ended) == pytest.approx(mass(logprobs, own), rel=1e-5)
    whole = covered(logprobs, REDUCTION, string, along(own))
    assert math.exp(found.missed) == pytest.approx(whole.missed, rel=1e-5)


def test_a_spelling_that_leaves_the_path_says_no_more() -> None:
    """Symbols 0 1 0 of a path that another member spells; this one writes (0, 1, 1) there."""
    logprobs = model(5)
    first = spots(logprobs, (0, 5), (0, 1, 0))
    left = [first[0], Spot(1, 0, first[1].logprob, first[1].begun, first[1].just)]
    found = said(left, 0, 3)
    assert found.ended == -math.inf
    assert found.begun[2] > -math.inf


def carried(parts: list[Said], weights: list[float]) -> float:
    """Nats of a string symbol by symbol, with weights that follow what each member said so far."""
    posterior, nats = np.array(weights), 0.0
    for steps in zip(*(np.exp(part.steps) for part in parts), strict=True):
        p = float(posterior @ np.array(steps))
        posterior, nats = posterior * np.array(steps) / p, nats - math.log(p)
    return nats


@pytest.mark.parametrize("own", [(2, 3, 5), (4, 1, 3)])
def test_carried_weights_come_to_the_mixture_of_whole_stretches(own: tuple[int, ...]) -> None:
    """One token or several, symbol by symbol: the product telescopes. With one token it is the linear pool."""
    weights = [0.7, 0.3]
    parts = [spoken(seed, own) for seed in (6, 7)]
    pooled = sum(w * math.exp(part.ended) for w, part in zip(weights, parts, strict=True))
    assert carried(parts, weights) == pytest.approx(-math.log(pooled))
    single = [spoken(seed, (4,)) for seed in (6, 7)]
    linear = sum(w * float(model(seed)(())[4].exp()) for w, seed in zip(weights, (6, 7), strict=True))
    assert carried(single, weights) == pytest.approx(-math.log(linear), rel=1e-5)


def test_members_with_other_spellings_meet_in_symbols() -> None:
    """0 1 1 0 as (2, 3) and as (0, 5, 0): the mixture is of what each says in its own tokens."""
    parts = [spoken(8, (2, 3)), spoken(9, (0, 5, 0))]
    pooled = sum(0.5 * math.exp(part.ended) for part in parts)
    assert carried(parts, [0.5, 0.5]) == pytest.approx(-math.log(pooled))


def test_two_equal_members_are_one_and_the_whole_weight_is_the_member() -> None:
    part, other = spoken(10, (2, 3, 5)), spoken(11, (2, 3, 5))
    assert carried([part, part], [0.2, 0.8]) == pytest.approx(-part.ended)
    assert carried([part, other], [1.0, 0.0]) == pytest.approx(-part.ended)
