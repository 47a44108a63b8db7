"""Drafted tokens kept or rejected: the fusion's own distribution, kept as often as can be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from fakes import FakeMember, byte_vocabulary, ensemble, pair_vocabulary, sequence
from torch import Tensor

from ensemble_core.decoding.acceptance import accept
from ensemble_core.decoding.sampler import ladder, sample
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.decoding.sequence import Sequence
from ensemble_core.fusion.base import Fused

NUM, ROWS = 12, 20_000
FIELDS = {"temperature": 0.7}, {"temperature": 1.0, "top_p": 0.8}, {"temperature": 1.3, "top_k": 5, "min_p": 0.02}


def rows_of(logits: Tensor, ids: Tensor, num: int) -> Fused:
    """One distribution, in all rows."""
    logprobs = logits.log_softmax(dim=0).float()
    return Fused(
        ids.expand(num, -1), logprobs.expand(num, -1), torch.full((num,), -torch.inf), torch.zeros(num, 1)
    )


def pair(seed: int, num: int = ROWS) -> tuple[Fused, Fused]:
    """Main's distribution, and a fusion's over some of main's ids and others."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(NUM, generator=generator)
    own = 1.5 * torch.randn(NUM, generator=generator)
    fused = own[: NUM - 3] + torch.randn(NUM - 3, generator=generator)
    others = torch.cat([fused, torch.randn(6, generator=generator)])
    return rows_of(own, ids, num), rows_of(others, torch.cat([ids[: NUM - 3], torch.arange(50, 56)]), num)


def requests(params: SamplingParams, num: int = ROWS) -> list[Sequence]:
    """Sequences that differ in their next random number."""
    members = [FakeMember("alpha", byte_vocabulary(), seed=1), FakeMember("beta", pair_vocabulary(), seed=2)]
    first = sequence(0, "abc", members, ensemble(members), params)
    numbers = torch.rand(num, generator=torch.Generator().manual_seed(8), dtype=torch.float64).tolist()
    return [replace(first, _drawn=[number]) for number in numbers]


def shares(fused: Fused, params: SamplingParams) -> dict[int, float]:
    steps = ladder(fused.token_ids[:1], fused.logprobs[:1], [params])
    return dict(zip(steps.token_ids[0].tolist(), steps.shares()[0].tolist(), strict=True))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fields", FIELDS)
def test_the_tokens_have_the_distribution_of_the_fusion(fields: dict[str, Any], seed: int) -> None:
    """By chi-square; and no method keeps more: the share that stays is what both distributions have in common."""
    params = SamplingParams(**fields)
    own, fused = pair(seed)
    drawn = requests(params)
    tokens = torch.tensor(accept(own, fused, drawn, [0] * ROWS))
    expected, mains = shares(fused, params), shares(own, params)
    likely = [token for token, share in expected.items() if share * ROWS >= 5]
    counts = {token: int((tokens == token).sum()) for token in likely}
    statistic = sum((counts[token] - expected[token] * ROWS) ** 2 / (expected[token] * ROWS) for token in likely)
    assert statistic < len(likely) + 4.5 * (2 * len(likely)) ** 0.5
    assert set(tokens.tolist()) <= {token for token, share in expected.items() if share > 0}
    stayed = (tokens == torch.tensor(sample(own, drawn))).double().mean().item()
    common = sum(min(share, mains.get(token, 0.0)) for token, share in expected.items())
    assert stayed == pytest.approx(common, abs=0.015)


def test_one_distribution_keeps_every_token() -> None:
    own, _ = pair(1)
    drawn = requests(SamplingParams(temperature=0.9))
    assert accept(own, own, drawn, [0] * ROWS) == sample(own, drawn)


def test_distributions_with_nothing_in_common_keep_none() -> None:
    own, _ = pair(1)
    other = replace(own, token_ids=own.token_ids + 100)
    assert min(accept(own, other, requests(SamplingParams(temperature=0.9)), [0] * ROWS)) >= 100


def test_a_row_does_not_depend_on_others_or_on_the_order_of_columns() -> None:
    own, fused = pair(2, 64)
    drawn = requests(SamplingParams(temperature=0.8), 64)
    together = accept(own, fused, drawn, [0] * 64)
    turned = [
        replace(each, token_ids=each.token_ids.flip(1), logprobs=each.logprobs.flip(1)) for each in (own, fused)
    ]
    assert accept(turned[0], turned[1], drawn, [0] * 64) == together
    for i in (0, 17, 63):
        assert accept(*pair(2, 1), [drawn[i]], [0]) == [together[i]]


def test_numbers_that_are_not_finite_are_reported() -> None:
    own, fused = pair(2, 2)
    broken = replace(fused, logprobs=fused.logprobs.clone())
    broken.logprobs[1, 3] = torch.nan
    tokens = accept(own, broken, requests(SamplingParams(temperature=0.8), 2), [0, 0])
    assert tokens[0] >= 0
    assert tokens[1] == -1
