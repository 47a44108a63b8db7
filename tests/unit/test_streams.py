"""Lanes without a device, and when an answer says that it was over."""

from __future__ import annotations

from dataclasses import replace

import torch

from ensemble_core.members.base import Answers, Candidates, Span
from ensemble_core.members.parallel import Attempt
from ensemble_core.members.streams import Lane, lane_on

ROWS = Candidates(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2), torch.zeros(1))
FOUND = Answers((ROWS,), (Span(0, 0, 1),))


def test_the_cpu_does_things_at_once() -> None:
    lane = lane_on(torch.device("cpu"))
    assert type(lane) is Lane
    assert lane.forward(lambda: FOUND) is FOUND
    with lane.work():
        assert lane.forward(lambda: FOUND).clock is None


def test_an_answer_ends_when_its_device_says_so() -> None:
    assert Attempt(FOUND, None, 10.0, 12.0).ended == 12.0
    assert Attempt(None, None, 10.0, 12.0).ended == 12.0
    queued = replace(FOUND, clock=lambda: 5.5)
    assert Attempt(queued, None, 10.0, 12.0).ended == 15.5
