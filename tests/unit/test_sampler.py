"""Drawing tokens: ties, seeds, top-p and temperature against slow references, and rows that are not finite."""

from __future__ import annotations

import math
import random
from collections import Counter, abc

import pytest
import torch
from fakes import FakeMember, ensemble, sequence
from torch import Tensor

from ensemble_core.decoding.sampler import greedy, sample
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.decoding.sequence import Choice, Sequence
from ensemble_core.fusion.base import Fused

MEMBER = FakeMember()
RECIPE = ensemble([MEMBER])


def request(temperature: float = 1.0, top_p: float = 1.0, seed: int | None = 0) -> Sequence:
    params = SamplingParams(max_tokens=50, temperature=temperature, top_p=top_p, seed=seed)
    return sequence(0, "a", [MEMBER], RECIPE, params)


def fused(logits: Tensor, token_ids: Tensor | None = None) -> Fused:
    """A closed support with all the mass, (B, S)."""
    ids = torch.arange(logits.shape[1]).expand(logits.shape) if token_ids is None else token_ids
    rows = logits.shape[0]
    return Fused(ids, logits.log_softmax(dim=1), torch.full((rows,), -torch.inf), torch.zeros(rows, 1))


def reference_draw(probs: abc.Sequence[float], temperature: float, top_p: float, uniform: float) -> int:
    """Sort, cut after the token that crosses top_p, walk until the uniform number is passed."""
    powered = [p ** (1 / temperature) for p in probs]
    scaled = [p / math.fsum(powered) for p in powered]
    kept, mass = [], 0.0
    for index in sorted(range(len(scaled)), key=lambda i: -scaled[i]):
        if mass >= top_p:
            break
        kept.append(index)
        mass += scaled[index]
    walked = 0.0
    for index in kept:
        walked += scaled[index]
        if uniform * mass < walked:
            return index
    return kept[-1]


def test_greedy_takes_the_lowest_of_equals() -> None:
    token_ids = torch.tensor([[9, 4, 7, 2], [5, 6, 7, 8]])
    logprobs = torch.tensor([[-1.0, -0.5, -0.5, -3.0], [-2.0, -2.0, -2.0, -2.0]])
    assert greedy(token_ids, logprobs).tolist() == [4, 5]
    both = [request(temperature=0.0), request(temperature=0.0)]
    assert sample(Fused(token_ids, logprobs, torch.zeros(2), torch.zeros(2, 1)), both) == [4, 5]


def test_draws_are_those_of_the_reference() -> None:
    rng = random.Random(0)
    for trial in range(200):
        size = rng.randrange(1, 30)
        logits = torch.randn(1, size, generator=torch.Generator().manual_seed(trial)) * 2
        temperature, top_p = rng.choice([0.3, 1.0, 2.0]), rng.choice([0.05, 0.5, 0.9, 1.0])
        probs = logits.double().softmax(dim=1)[0].tolist()
        uniform = random.Random(trial).random()
        (token,) = sample(fused(logits), [request(temperature, top_p, seed=trial)])
        assert token == reference_draw(probs, temperature, top_p, uniform)


def tied(num: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows with many equals, as bf16 logits have, and ids in an order of their own: both (num, size)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-6, 3, (num, size), generator=generator) / 2
    return logits.log_softmax(dim=1), torch.stack(
        [torch.randperm(5000, generator=generator)[:size] for _ in range(num)]
    )


REACHES: list[dict[str, float]] = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_p": 0.5},
    {"min_p": 1.0},
    {"top_k": 9, "top_p": 0.7, "min_p": 0.2},
    {"temperature": 0.3, "top_p": 0.25},
    {"temperature": 0.0},
]


@pytest.mark.parametrize("reach", REACHES, ids=str)
def test_neither_order_nor_width_of_columns_nor_neighbours_matter(reach: dict[str, float]) -> None:
    num = 40
    logprobs, ids = tied(num, 60, seed=1)

    def draw(ids: Tensor, logprobs: Tensor, seeds: abc.Sequence[int]) -> list[int]:
        rows = [
            sequence(0, "a", [MEMBER], RECIPE, SamplingParams(seed=seed, **reach))  # type: ignore[arg-type]
            for seed in seeds
        ]
        return sample(Fused(ids, logprobs, torch.zeros(len(ids)), torch.zeros(len(ids), 1)), rows)

    expected = draw(ids, logprobs, range(num))
    for seed, width in ((2, 60), (3, 61), (4, 333)):
        generator = torch.Generator().manual_seed(seed)
        padding = ids[:, torch.randint(60, (width - 60,), generator=generator)]  # ids that stand twice
        wide = torch.cat([ids, padding], dim=1)
        padded = torch.cat([logprobs, torch.full(padding.shape, -torch.inf)], dim=1)
        order = torch.stack([torch.randperm(width, generator=generator) for _ in range(num)])
        wide, padded = wide.gather(1, order), padded.gather(1, order)
        assert draw(wide, padded, range(num)) == expected
        assert [draw(wide[i : i + 1], padded[i : i + 1], [i])[0] for i in range(num)] == expected


def test_equals_are_drawn_from_the_lowest_id_on() -> None:
    ids, logprobs = torch.tensor([[9, 4, 7, 2]]), torch.full((1, 4), 0.25).log()
    for top_k, kept in ((1, {2}), (2, {2, 4}), (3, {2, 4, 7})):
        rows = [sequence(0, "a", [MEMBER], RECIPE, SamplingParams(seed=i, top_k=top_k)) for i in range(100)]
        many = Fused(ids.expand(100, 4), logprobs.expand(100, 4), torch.zeros(100), torch.zeros(100, 1))
        assert set(sample(many, rows)) == kept


@pytest.mark.parametrize("size", [2, 3, 5, 6, 10, 49, 100, 1000])
def test_top_p_cuts_equals_at_the_exact_share(size: int) -> None:
    for num in {1, size // 2, size - 1}:
        rows = [
            sequence(0, "a", [MEMBER], RECIPE, SamplingParams(seed=i, top_p=(num - 0.5) / size))
            for i in range(400)
        ]
        assert max(sample(fused(torch.zeros(400, size)), rows)) < num


def test_a_step_takes_one_random_number_and_greedy_none() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    for temperature, num in ((0.0, 0), (1.0, 1)):
        made, other = request(temperature, seed=5), random.Random(5)
        sample(fused(logits), [made])
        for _ in range(num):
            other.random()
        assert made.rng.getstate() == other.getstate()


def test_top_p_keeps_the_token_that_crosses_it() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    for top_p, kept in [(0.4, {0}), (0.6, {0, 1}), (0.76, {0, 1, 2}), (1.0, {0, 1, 2, 3})]:
        each = [request(top_p=top_p, seed=seed) for seed in range(300)]
        assert set(sample(fused(logits.expand(300, 4)), each)) == kept


def test_a_seeded_draw_is_the_same_in_any_batch() -> None:
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    make = [lambda i=i: request([0.0, 0.5, 1.5][i % 3], [1.0, 0.7][i % 2], seed=i) for i in range(8)]
    alone = [sample(fused(logits[i : i + 1]), [make[i]()])[0] for i in range(8)]
    assert sample(fused(logits), [each() for each in make]) == alone
    order = [5, 0, 7, 2]
    assert sample(fused(logits[order]), [make[i]() for i in order]) == [alone[i] for i in order]


def test_each_step_draws_anew_and_reproducibly() -> None:
    logits = torch.zeros(1, 100)
    first, second = request(seed=3), request(seed=3)

    def step(made: Sequence) -> int:
        (token,) = sample(fused(logits), [made])
        assert sample(fused(logits), [made]) == [token], "a step that is taken again draws the same"
        made.decide([Choice(token)])
        return token

    drawn = [step(first) for _ in range(20)]
    assert drawn == [step(second) for _ in range(20)]
    assert len(set(drawn)) > 10


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    num = 4000
    logits = torch.tensor([[1.0, 0.5, 0.0, -0.5, -1.0, -2.0]])
    counts = Counter(sample(fused(logits.expand(num, 6)), [request(temperature, seed=i) for i in range(num)]))
    expected = (logits[0].double() / temperature).softmax(dim=0) * num
    chi_square = sum((counts[i] - float(e)) ** 2 / float(e) for i, e in enumerate(expected))
    assert chi_square < 20.5  # 5 degrees of freedom, p = 0.001


def test_a_row_that_is_not_finite_harms_no_other() -> None:
    logits = torch.randn(4, 20, generator=torch.Generator().manual_seed(1))
    clean = fused(logits)
    dirty = Fused(clean.token_ids, clean.logprobs.clone(), clean.tail, clean.unmapped)
    dirty.logprobs[1] = torch.nan
    dirty.logprobs[2] = -torch.inf
    for temperature in (0.0, 1.0):
        expected = sample(clean, [request(temperature, seed=i) for i in range(4)])
        given = sample(dirty, [request(temperature, seed=i) for i in range(4)])
        assert given == [expected[0], -1, -1, expected[3]]


def test_extreme_temperatures() -> None:
    logits = torch.tensor([[3.0, 9.0, 1.0]]).expand(200, 3)
    assert set(sample(fused(logits), [request(1e-6, seed=i) for i in range(200)])) == {1}
    for lowest in (1e-300, 1e-308, 5e-324):
        assert set(sample(fused(logits), [request(lowest, seed=i) for i in range(200)])) == {1}
    flat = torch.tensor([[0.0, 0.1]]).expand(200, 2)
    assert set(sample(fused(flat), [request(2.0, seed=i) for i in range(200)])) == {0, 1}


def test_a_token_without_mass_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0]]).expand(300, 4)
    assert set(sample(fused(logits), [request(2.0, seed=i) for i in range(300)])) == {1, 3}


def filtered(probs: list[float], top_k: int, top_p: float, min_p: float) -> dict[int, float]:
    """top-k, then top-p of what is left, then min-p, each on the distribution made anew."""
    order = sorted(range(len(probs)), key=lambda i: -probs[i])[: top_k or len(probs)]
    total = math.fsum(probs[i] for i in order)
    left = [(i, probs[i] / total) for i in order]
    kept, mass = [], 0.0
    for index, p in left:
        if mass >= top_p:
            break
        kept.append((index, p))
        mass += p
    return {index: p for index, p in kept if p >= min_p * kept[0][1]}


def test_top_k_top_p_and_min_p_act_in_this_order() -> None:
    rng = random.Random(1)
    for trial in range(150):
        size = rng.randrange(2, 25)
        logits = torch.randn(1, size, generator=torch.Generator().manual_seed(trial)) * 2
        options = {
            "top_k": rng.choice([0, 1, 3, 10]),
            "top_p": rng.choice([0.3, 0.8, 1.0]),
            "min_p": rng.choice([0.0, 0.1, 0.6]),
        }
        params = SamplingParams(seed=trial, **options)  # type: ignore[arg-type]
        kept = filtered(logits.double().softmax(dim=1)[0].tolist(), **options)  # type: ignore[arg-type]
        uniform, walked = random.Random(trial).random() * math.fsum(kept.values()), 0.0
        expected = -1
        for token_id, p in kept.items():
            if walked <= uniform:
                expected = token_id
            walked += p
        assert sample(fused(logits), [sequence(0, "a", [MEMBER], RECIPE, params)]) == [expected], options


def test_one_candidate_is_greedy_at_any_temperature() -> None:
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(3))
    for options in ({"top_k": 1}, {"min_p": 1.0}):
        rows = [
            sequence(0, "a", [MEMBER], RECIPE, SamplingParams(seed=i, **options))  # type: ignore[arg-type]
            for i in range(50)
        ]
        assert sample(fused(logits), rows) == logits.argmax(dim=1).tolist()


def test_each_row_has_its_own_reach() -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(4))
    options: list[dict[str, float]] = [
        {"top_k": 2},
        {},
        {"min_p": 0.3},
        {"top_p": 0.4},
        {"top_k": 1},
        {"top_k": 99},
    ]

    def row(i: int) -> Sequence:
        params = SamplingParams(seed=i, temperature=1.5, **options[i])  # type: ignore[arg-type]
        return sequence(i, "a", [MEMBER], RECIPE, params)

    alone = [sample(fused(logits[i : i + 1]), [row(i)])[0] for i in range(6)]
    assert sample(fused(logits), [row(i) for i in range(6)]) == alone
