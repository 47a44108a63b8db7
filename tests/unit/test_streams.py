"""Lanes without a device, and when an answer says that it was over."""

from __future__ import annotations

import torch

from ensemble_core.members.base import Candidates
from ensemble_core.members.parallel import Answer
from ensemble_core.members.streams import Lane, lane_on

FOUND = Candidates(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2), torch.zeros(1))


def test_the_cpu_does_things_at_once() -> None:
    lane = lane_on(torch.device("cpu"))
    assert type(lane) is Lane
    assert lane.forward(lambda: FOUND) is FOUND
    with lane.work():
        assert lane.forward(lambda: FOUND).clock is None


def test_an_answer_ends_when_its_device_says_so() -> None:
    assert Answer(FOUND, None, 10.0, 12.0).ended == 12.0
    assert Answer(None, None, 10.0, 12.0).ended == 12.0
    queued = Candidates(FOUND.token_ids, FOUND.logprobs, FOUND.tail, clock=lambda: 5.5)
    assert Answer(queued, None, 10.0, 12.0).ended == 15.5
