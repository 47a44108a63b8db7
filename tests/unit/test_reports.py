"""Numbers of a token: itself among the best with the identical float, and never an infinity."""

from __future__ import annotations

import json

import pytest
import torch

from ensemble_core.decoding.reports import score

IDS = torch.tensor([4, 9, 2, 7, 2])
LOGPROBS = torch.tensor([-1.1, -0.7, -2.3, -9.5, -torch.inf])


@pytest.mark.parametrize(
    ("token_id", "num_top", "best"),
    [(9, 1, [9]), (4, 1, [9, 4]), (7, 2, [9, 4, 7]), (2, 3, [9, 4, 2]), (2, 20, [9, 4, 2, 7])],
)
def test_the_token_is_among_the_best(token_id: int, num_top: int, best: list[int]) -> None:
    found = score(IDS, LOGPROBS, token_id, num_top)
    assert [other for other, _ in found.top] == best
    assert dict(found.top)[token_id] == found.logprob == LOGPROBS[token_id == IDS].max().item()
    assert (found.logprob == max(p for _, p in found.top)) == (token_id == 9)


def test_no_alternatives_are_none() -> None:
    assert score(IDS, LOGPROBS, 4, 0).top == ()


def test_a_token_without_mass_has_a_number_that_json_knows() -> None:
    logprobs = LOGPROBS.clone()
    logprobs[3] = -torch.inf
    found = score(IDS, logprobs, 7, 1)
    assert found.logprob == -9999.0
    assert json.loads(json.dumps(found.top, allow_nan=False))[-1] == [7, -9999.0]


def test_of_equals_the_lowest_ids_are_told() -> None:
    ids = torch.randperm(700, generator=torch.Generator().manual_seed(0))
    logprobs = torch.full((700,), -6.55)
    assert [other for other, _ in score(ids, logprobs, 0, 5).top] == [0, 1, 2, 3, 4]
    logprobs[ids == 9] = -1.0
    assert [other for other, _ in score(ids, logprobs, 9, 3).top] == [9, 0, 1]
