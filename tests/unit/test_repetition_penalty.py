"""The served penalty beside transformers' on raw logits: the same where the normaliser is the assumed one."""

from __future__ import annotations

import pytest
import torch

from ensemble_core.decoding.shaping import TYPICAL_NORMALISER
from studies import repetition_penalty as study

PENALTIES = (0.9, 1.2, 1.5)


def seen(offset: float) -> study.Seen:
    """Positions of random logits whose normaliser is `offset` more than the assumed one."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(30, 500, generator=generator)
    logits += TYPICAL_NORMALISER + offset - logits.logsumexp(dim=1, keepdim=True)
    return study._seen(logits, torch.randint(500, (80,), generator=generator), 50, True, PENALTIES)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_raw_logits_of_the_assumed_height_are_penalised_alike(penalty: float) -> None:
    assert seen(0.0).distance(study.served, penalty, 0.0) < 1e-5
    higher = seen(3.0)
    assert higher.distance(study.served, penalty, 0.0) > 1e-4
    assert higher.distance(study.normalised, penalty, TYPICAL_NORMALISER + 3.0) < 1e-5


def test_halves_are_by_document() -> None:
    positions = seen(0.0)
    assert len(positions.half("even").logprobs) == 30
    assert len(positions.half("odd").logprobs) == 0
