"""A member behind a link: orders, lengths, incarnations, and what happens when the far end is gone or silent."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from fakes import Bench, FakeMember, Records, byte_vocabulary, fake_config, fake_loaded, pair_vocabulary

from ensemble_core.decoding.requests import GenerationRequest
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.decoding.sequence import Sequence
from ensemble_core.errors import HostError, MemberError, MemberLostError
from ensemble_core.members.base import Candidates, Feed, Member
from ensemble_core.members.remote.codec import Order, decode_order, encode_order
from ensemble_core.members.remote.far import FarMember
from ensemble_core.members.remote.host import Host, Spec
from ensemble_core.members.remote.link import LinkError, Method, Tag
from ensemble_core.stats import DropStats, HealthStats

TIMEOUT = 0.2
GREEDY = SamplingParams(max_tokens=10, temperature=0.0, logprobs=2)


class ThreadLink:
    """A far end in a thread, which tests end, freeze and garble."""

    def __init__(self, incarnation: int, far: FakeMember, problem: str = "") -> None:
        self.far, self.problem = far, problem
        self.dead, self.garbles = False, False
        self.running = threading.Event()
        self.running.set()
        self.methods: list[Method] = []
        spec = Spec("far", {}, 4, False, torch.get_num_threads(), incarnation)
        self.host = Host(spec.encode(), self._load)
        self._replies: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def _load(self, spec: Spec) -> Member:
        if self.problem:
            raise RuntimeError(self.problem)
        return self.far

    def send(self, method: Method, message: bytes) -> None:
        if self.dead:
            raise LinkError("told to be dead")
        self.methods.append(method)
        threading.Thread(target=self._answer, args=(method, message), daemon=True).start()

    def _answer(self, method: Method, message: bytes) -> None:
        self.running.wait(20.0)
        reply = self.host.answer(method, message)
        self._replies.put(bytes([Tag.DONE]) + b"nonsense" if self.garbles and method == "forward" else reply)

    def receive(self, timeout: float | None = None) -> bytes | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.dead:
            try:
                return self._replies.get(timeout=0.01)
            except queue.Empty:
                if deadline is not None and time.monotonic() > deadline:
                    return None
        raise LinkError("told to be dead")

    def close(self) -> None:
        self.dead = True


class Far:
    """A far member and all its incarnations."""

    def __init__(self, problem: str = "", **changes: Any) -> None:
        self.links: list[ThreadLink] = []
        self.problem = problem
        self.changes = changes
        self.member = FarMember(
            "far", pair_vocabulary(), self._connect, kind="process", timeout=TIMEOUT, start_seconds=5.0
        )

    def _connect(self, incarnation: int) -> ThreadLink:
        self.links.append(ThreadLink(incarnation, fake(**self.changes), self.problem))
        return self.links[-1]

    def wait(self, lost: bool) -> None:
        deadline = time.monotonic() + 10.0
        while (self.member.lost is not None) is not lost:
            assert time.monotonic() < deadline, self.member.lost
            time.sleep(0.01)


def fake(**changes: Any) -> FakeMember:
    return FakeMember("far", **{"vocabulary": pair_vocabulary(), "seed": 3, **changes})


@pytest.fixture
def far() -> Iterator[Far]:
    made = Far()
    made.member.wait_ready()
    yield made
    made.member.close()


def test_orders_come_out_as_they_went_in() -> None:
    order = Order(3, [Feed(1, [5, 6], keep=4), Feed(2, [7], wanted=0)], [9, 0], [(4, True), (5, False)])
    assert decode_order(encode_order(order)) == order


def test_it_answers_as_the_member_itself(far: Far) -> None:
    here = fake()
    steps = [
        [Feed(1, [97, 98, 99], wanted=0), Feed(2, [100], top_k=9)],
        [Feed(1, [100, 101], wanted=2, keep=3, top_k=9), Feed(2, [97], keep=1, top_k=5)],
        [Feed(1, [97], keep=2, top_k=9, also=((3, 200),)), Feed(2, [99, 100], keep=0, following=(100, -1))],
    ]
    for feeds in steps:
        found, expected = far.member.forward(feeds), here.forward(feeds)
        assert (found.spans, found.likelihoods) == (expected.spans, expected.likelihoods)
        for mine, theirs in zip(found.blocks, expected.blocks, strict=True):
            for left, right in zip(parts(mine), parts(theirs), strict=True):
                assert torch.equal(left, right)
    assert far.member.free_pages == here.free_pages


def parts(candidates: Candidates) -> tuple[torch.Tensor, ...]:
    return (candidates.token_ids, candidates.logprobs, candidates.tail)


def test_a_release_travels_with_the_next_order(far: Far) -> None:
    (link,) = far.links
    far.member.forward([Feed(1, [97, 98])])
    far.member.forward([Feed(2, [99])])
    sent = len(link.methods)
    far.member.release(1, keep=True)
    assert len(link.methods) == sent
    assert far.member.free_pages == far.member.num_pages - 1
    assert 1 in link.far.cached
    assert far.member.reuse(3, [97, 98, 99]) == 2
    assert link.far.cached.keys() == {2, 3}
    far.member.forward([Feed(3, [99], keep=2)])
    far.member.release(2)
    far.member.release(3)
    far.member.release(77)
    assert far.member.free_pages == far.member.num_pages


def test_what_a_failed_forward_has_left_over_there_is_released(far: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have taken pages before it failed."""
    released: list[int] = []
    monkeypatch.setattr(far.links[0].far, "release", lambda seq_id, keep=False: released.append(seq_id))
    far.links[0].far.fails_on.add(5)
    with pytest.raises(MemberError):
        far.member.forward([Feed(5, [97])])
    far.member.release(5)
    far.member.forward([Feed(6, [97])])
    assert released == [5]


def test_an_error_over_there_is_one_here(far: Far) -> None:
    far.links[0].far.fails_on.add(5)
    with pytest.raises(MemberError, match="member 'far': told to fail on"):
        far.member.forward([Feed(5, [97])])
    assert far.member.lost is None
    far.member.forward([Feed(6, [97])])


@pytest.mark.parametrize("how", ["dead", "other lengths", "other incarnation", "garbled"])
def test_a_cache_that_is_gone_never_answers(far: Far, how: str) -> None:
    far.member.forward([Feed(1, [97, 98])])
    first = far.links[0]
    if how == "dead":
        first.dead = True
    elif how == "other lengths":
        first.host._cached[1] = 1
    elif how == "other incarnation":
        first.host._spec = replace(first.host._spec, incarnation=7)
    else:
        first.garbles = True
    with pytest.raises(MemberLostError):
        far.member.forward([Feed(1, [99], keep=2)])
    assert far.member.incarnation == 1
    far.wait(lost=False)
    assert len(far.links) == 2
    with pytest.raises(MemberLostError, match="2 tokens of sequence 1 are to be kept"):
        far.member.forward([Feed(1, [99], keep=2)])
    far.wait(lost=False)
    here = fake()
    found, expected = far.member.forward([Feed(9, [97], top_k=4)]), here.forward([Feed(9, [97], top_k=4)])
    assert torch.equal(found.blocks[0].token_ids, expected.blocks[0].token_ids)
    assert far.member.free_pages == far.member.num_pages - 1


def test_one_that_dies_idle_is_noticed_and_started_again(far: Far) -> None:
    far.links[0].dead = True
    far.wait(lost=True)
    assert far.member.incarnation == 1
    far.wait(lost=False)
    far.member.forward([Feed(1, [97])])


def test_one_that_is_silent_is_lost_until_it_answers(far: Far) -> None:
    far.member.forward([Feed(1, [97, 98])])
    far.links[0].running.clear()
    far.wait(lost=True)
    started = time.monotonic()
    with pytest.raises(MemberLostError, match=r"has not answered for 0\.2 s"):
        far.member.forward([Feed(1, [99], keep=2)])
    assert time.monotonic() - started < 0.1
    far.links[0].running.set()
    far.wait(lost=False)
    assert (len(far.links), far.member.incarnation) == (1, 0)
    far.member.forward([Feed(1, [99], keep=2)])


def test_one_that_cannot_be_loaded_says_why() -> None:
    broken = Far(problem="no such weights")
    with pytest.raises(HostError, match="cannot be loaded in its process: RuntimeError: no such weights"):
        broken.member.wait_ready()
    broken.member.close()


def test_another_tokenizer_over_there_is_refused() -> None:
    other = Far(vocabulary=byte_vocabulary())
    with pytest.raises(HostError, match="the tokenizer at its process is not the one here"):
        other.member.wait_ready()
    other.member.close()


def test_another_version_over_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensemble_core.members.remote.host.version", lambda name: "0.0.7")
    old = Far()
    with pytest.raises(HostError, match=r"Unisono 0\.0\.7 is installed at its process"):
        old.member.wait_ready()
    old.member.close()


def test_it_is_tried_again_until_it_can_be_loaded(far: Far, caplog: pytest.LogCaptureFixture) -> None:
    far.problem = "no room"
    far.links[0].dead = True
    far.wait(lost=True)
    deadline = time.monotonic() + 10.0
    while "no room" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    far.problem = ""
    far.wait(lost=False)
    assert "started again with an empty cache" in caplog.text


class Duo(Bench):
    """An engine over a local main and a far assistant."""

    def __init__(self, far: Far, on_failure: str = "drop") -> None:
        members: dict[str, Any] = {"alpha": FakeMember("alpha", byte_vocabulary(), seed=1), "far": far.member}
        base = {"members": {"alpha": 0.5, "far": 0.5}, "main": "alpha", "fusion": {"name": "projection"}}
        ensembles = {"duo": base | {"on_member_failure": on_failure}}
        self.records = Records()
        config = fake_config(tuple(members), ensembles=ensembles, scheduler={"num_candidates": 16})
        super().__init__(fake_loaded(config, members, self.records.append), members)

    def add(self, prompt: str) -> Sequence:
        made = self.loaded.admission.admit(GenerationRequest(f"r-{prompt}", "duo", prompt, GREEDY))
        self.engine.add([made])
        return made


def begun(bench: Duo, prompt: str = "abc de") -> Sequence:
    """A request that has its first token."""
    sequence = bench.add(prompt)
    while not sequence.num_completion_tokens:
        bench.step()
    return sequence


def text(bench: Duo, sequence: Sequence) -> str:
    return "".join(output.text for output in bench.outputs[sequence.seq_id])


def run(bench: Duo) -> None:
    deadline = time.monotonic() + 20.0
    while bench.engine.has_work:
        assert time.monotonic() < deadline
        bench.step()


def test_a_request_goes_on_without_it_and_the_next_has_it_again(far: Far) -> None:
    bench = Duo(far)
    first = begun(bench)
    far.links[0].dead = True
    run(bench)
    assert bench.outputs[first.seq_id][-1].dropped == {"far": "lost"}
    assert bench.outputs[first.seq_id][-1].finish_reason == "length"
    assert [(s.member, s.reason) for s in bench.records.of(DropStats)] == [("far", "lost")]
    far.wait(lost=False)
    bench.engine.report_caches()
    second = bench.add("cab")
    run(bench)
    assert bench.outputs[second.seq_id][-1].dropped == {}
    assert far.member.free_pages == far.member.num_pages
    assert [s.failure for s in bench.records.of(HealthStats)] == ["lost", None]


def test_a_request_that_cannot_lose_it_fails_at_once(far: Far) -> None:
    bench = Duo(far, on_failure="fail")
    request = begun(bench)
    far.links[0].dead = True
    started = time.monotonic()
    run(bench)
    assert time.monotonic() - started < 1.0
    last = bench.outputs[request.seq_id][-1]
    assert (last.finish_reason, "told to be dead" in (last.error or "")) == ("error", True)


def test_a_sequence_that_slept_through_a_restart_does_not_take_others_along(far: Far) -> None:
    """It lost what was cached; a new one beside it, in the same step, did not."""
    bench = Duo(far)
    old = begun(bench)
    far.links[0].dead = True
    far.wait(lost=True)
    far.wait(lost=False)
    new = bench.add("cab")
    run(bench)
    assert bench.outputs[old.seq_id][-1].dropped == {"far": "lost"}
    assert bench.outputs[new.seq_id][-1].dropped == {}
    alone = Far()
    alone.member.wait_ready()
    fresh = Duo(alone)
    again = fresh.add("cab")
    run(fresh)
    assert text(bench, new) == text(fresh, again)
    alone.member.close()


def test_what_is_lost_while_nothing_runs_is_recorded(far: Far) -> None:
    bench = Duo(far)
    far.links[0].running.clear()
    far.wait(lost=True)
    bench.engine.report_caches()
    bench.engine.report_caches()
    far.links[0].running.set()
    far.wait(lost=False)
    bench.engine.report_caches()
    assert [asdict(s) for s in bench.records.of(HealthStats)] == [
        {"member": "far", "failure": "lost"},
        {"member": "far", "failure": None},
    ]
