"""Main's candidates under constraints are those that a search of the whole row finds, ties and all."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ensemble_core.decoding.modes.lockstep import narrow_main, width_of
from ensemble_core.members.base import Candidates
from ensemble_core.members.candidates import Whole, narrow
from ensemble_core.members.kernels.plain import PLAIN
from ensemble_core.members.ranking import ranked

ROWS, K = 4, 32


def plainly(group: list[Any], wide: Candidates) -> Candidates:
    """Every row searched through, once for what is allowed."""
    keep = []
    for i, turn in enumerate(group):
        kept = list(turn.sequence.pinned)
        if turn.mask is not None:
            reachable = wide.logprobs[i].masked_fill(~turn.mask, -torch.inf)
            kept += ranked(reachable, min(K // 2, int(turn.mask.sum()))).tolist()
        keep.append(tuple(kept))
    return narrow(wide, width_of(group[0], K), keep)


@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize("seed", range(24))
def test_what_is_kept_is_what_a_plain_search_keeps(seed: int, lazily: bool) -> None:
    rng, size = random.Random(seed), random.Random(seed).choice([200, 2000, 9000])
    torch.manual_seed(seed)
    logits = torch.randn(ROWS, size).mul_(3).bfloat16()  # many ties
    whole = Whole(logits, PLAIN.survey(logits), PLAIN)
    wide = whole if lazily else whole.computed()
    num_pinned = rng.choice([0, 3, 40])

    def mask() -> Tensor:
        allowed = torch.rand(size) < rng.choice([0.0005, 0.01, 0.3, 0.999])
        allowed[rng.randrange(size)] = True
        return allowed

    group: list[Any] = [
        SimpleNamespace(
            sequence=SimpleNamespace(pinned=tuple(rng.sample(range(size), num_pinned)), num_extra=num_pinned),
            mask=mask(),
        )
        for _ in range(ROWS)
    ]
    found, expected = narrow_main(group, wide, K), plainly(group, whole.computed())
    assert torch.equal(found.token_ids, expected.token_ids)
    assert torch.equal(found.logprobs, expected.logprobs)
    assert torch.equal(found.tail, expected.tail)
