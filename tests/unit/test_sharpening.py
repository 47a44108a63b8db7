"""Sharpening of doubtful distributions."""

from __future__ import annotations

import torch

from ensemble_core.fusion.base import Fused
from ensemble_core.fusion.sharpening import sharpened

TEXTS = {0: b"hel", 1: b"hello", 2: b"help", 3: b"he", 4: b"cat", 5: b""}


def fused(*probabilities: float) -> Fused:
    rows = torch.tensor([probabilities])
    ids = torch.arange(rows.shape[1]).expand(1, -1)
    return Fused(ids, rows.log(), torch.tensor([-torch.inf]), torch.zeros(1, 1))


def found(*probabilities: float) -> list[float]:
    return [round(p, 4) for p in sharpened(fused(*probabilities), TEXTS.__getitem__).logprobs.exp()[0].tolist()]


def test_the_likeliest_takes_the_mass_of_its_likely_extensions() -> None:
    assert found(0.4, 0.2, 0.05, 0.15, 0.2) == [0.6, 0.0, 0.05, 0.15, 0.2]


def test_a_token_that_begins_the_likeliest_stays() -> None:
    assert found(0.15, 0.45, 0.1, 0.2, 0.1) == [0.15, 0.45, 0.1, 0.2, 0.1]


def test_nothing_changes_without_doubt() -> None:
    whole = fused(0.55, 0.25, 0.1, 0.05, 0.05)
    assert sharpened(whole, TEXTS.__getitem__) is whole


def test_a_token_without_text_takes_nothing() -> None:
    assert found(0.2, 0.15, 0.1, 0.05, 0.1, 0.4) == [0.2, 0.15, 0.1, 0.05, 0.1, 0.4]


def test_of_equals_the_lowest_id_takes() -> None:
    assert found(0.4, 0.4, 0.05, 0.05, 0.1) == [0.8, 0.0, 0.05, 0.05, 0.1]


def test_rows_do_not_touch_each_other() -> None:
    logprobs = torch.tensor([[0.4, 0.3, 0.1, 0.1, 0.1], [0.9, 0.05, 0.02, 0.02, 0.01]]).log()
    both = Fused(torch.arange(5).expand(2, -1), logprobs, torch.full((2,), -torch.inf), torch.zeros(2, 1))
    after = sharpened(both, TEXTS.__getitem__)
    assert torch.equal(after.logprobs[1], both.logprobs[1])
    assert after.logprobs[0, 0].exp().item() > 0.69
