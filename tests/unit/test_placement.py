"""Where members go, and that members on different devices run at the same time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ensemble_core.errors import ConfigError, MemberError
from ensemble_core.member_config import MemberConfig
from ensemble_core.members.base import Answers, Candidates, Feed, Span
from ensemble_core.members.loading.placement import log_plan, resolve_device
from ensemble_core.members.parallel import MemberPool

FEEDS = [Feed(1, [5])]
SECONDS = 5.0  # that a member waits for the others


def answer(value: float) -> Answers:
    candidates = Candidates(torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), value), torch.zeros(1))
    return Answers((candidates,), (Span(0, 0, 1),))


def fake(lane: str, forward: Callable[[], Answers]) -> Any:
    def run(feeds: Sequence[Feed]) -> Answers:
        assert feeds == FEEDS
        return forward()

    return SimpleNamespace(lane=lane, forward=run, close=lambda: None)


def failing() -> Answers:
    raise MemberError("sick", "out of luck")


def all_of(pool: MemberPool, *names: str) -> Any:
    return pool.forward(dict.fromkeys(names, FEEDS))


def test_members_of_different_lanes_meet() -> None:
    """Each waits within its forward until all three are in theirs."""
    barrier = threading.Barrier(3)

    def meet() -> Answers:
        return answer(float(barrier.wait(SECONDS) >= 0))

    pool = MemberPool({f"m{i}": fake(f"cuda:{i}", meet) for i in range(3)})
    for _ in range(3):
        answers = all_of(pool, "m0", "m1", "m2")
        assert sorted(answers) == ["m0", "m1", "m2"]
        assert all(each.answers is not None and each.error is None for each in answers.values())
        assert max(each.started for each in answers.values()) <= min(each.ended for each in answers.values())
    pool.close()


def test_members_of_one_lane_take_turns() -> None:
    lock = threading.Lock()

    def alone() -> Answers:
        assert lock.acquire(blocking=False), "two members at once on one device"
        threading.Event().wait(0.01)
        lock.release()
        return answer(0.0)

    other = fake("cuda:1", lambda: answer(1.0))
    pool = MemberPool({"a": fake("cuda:0", alone), "b": fake("cuda:0", alone), "c": other})
    assert sorted(all_of(pool, "a", "b", "c")) == ["a", "b", "c"]
    pool.close()


@pytest.mark.parametrize("lane", ["cpu", "node-7/cpu"])
def test_a_failing_member_stops_no_other(lane: str) -> None:
    pool = MemberPool({"sick": fake("cpu", failing), "well": fake(lane, lambda: answer(2.0))})
    answers = all_of(pool, "sick", "well")
    assert answers["sick"].answers is None
    assert str(answers["sick"].error) == "member 'sick': out of luck"
    assert answers["well"].error is None
    assert answers["well"].answers.of(0).logprobs.tolist() == [[2.0]]
    pool.close()


def test_members_without_feeds_are_left_alone() -> None:
    pool = MemberPool({"idle": fake("cuda:0", failing), "busy": fake("cuda:1", lambda: answer(3.0))})
    answers = all_of(pool, "busy")
    assert list(answers) == ["busy"]
    assert answers["busy"].started <= answers["busy"].ended
    pool.close()


def placed(cuda_devices: int, device: str, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda_devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda_devices)
    return resolve_device("left", MemberConfig(model="some/model", device=device))


@pytest.mark.parametrize(
    ("cuda_devices", "given", "expected"),
    [(0, "auto", "cpu"), (2, "auto", "cuda:0"), (2, "cpu", "cpu"), (2, "cuda", "cuda:0"), (2, "cuda:1", "cuda:1")],
)
def test_a_device_is_resolved(
    cuda_devices: int, given: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert str(placed(cuda_devices, given, monkeypatch)) == expected


@pytest.mark.parametrize(
    ("cuda_devices", "given", "reason"),
    [
        (0, "cuda", "not on this machine, which has 0 CUDA devices"),
        (2, "cuda:2", "not on this machine, which has 2 CUDA devices"),
        (2, "gpu", "not supported; write auto, cpu or cuda:N"),
        (0, "meta", "not supported; write auto, cpu or cuda:N"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    cuda_devices: int, given: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=reason) as refusal:
        placed(cuda_devices, given, monkeypatch)
    assert str(refusal.value).startswith(f"members.left.device: {given!r}")


def test_the_plan_says_what_goes_where(caplog: pytest.LogCaptureFixture) -> None:
    members = {
        "left": MemberConfig(model="some/model", device="cpu", kv_memory=2**29, max_len=300),
        "right": MemberConfig(model="other/model", device_map="auto", dtype="bfloat16"),
    }
    with caplog.at_level(logging.INFO, "ensemble_core.members.loading.placement"):
        log_plan(members)
    first, second = (record.getMessage() for record in caplog.records)
    assert first == "plan: left = some/model on cpu, dtype auto, cache 0.50 GiB, up to 300 tokens a sequence"
    assert "right = other/model on device_map auto, dtype bfloat16" in second
