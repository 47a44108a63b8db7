"""Choices of one prompt: together they take about as many steps as one, whatever happens to their leader."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
from fakes import Bench, FakeMember, byte_vocabulary, fake_config, fake_loaded, pair_vocabulary
from test_scheduler import feed, make

from ensemble_core.decoding.capacity import Capacity, Limits
from ensemble_core.decoding.requests import GenerationRequest
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.decoding.scheduler import Scheduler
from ensemble_core.decoding.sequence import Phase, Sequence

SHORTEST = 16  # tokens that are worth being taken over


class Choosers(Bench):
    """Two fake members that take over no short prefix, and what their sequences said."""

    def __init__(self, perplexity: bool = False, num_pages: int = 1024, **scheduler: Any) -> None:
        options: dict[str, Any] = {"min_prefix": SHORTEST, "num_pages": num_pages}
        members = {
            "alpha": FakeMember("alpha", byte_vocabulary(), seed=1, **options),
            "beta": FakeMember("beta", pair_vocabulary(), seed=2, **options),
        }
        self.searches: list[tuple[str, int]] = []  # member, sequence
        for member in members.values():
            self._watch(member)
        duo: dict[str, Any] = {"members": {"alpha": 0.5, "beta": 0.5}, "main": "alpha"}
        if perplexity:
            duo["weighting"] = {"by": "perplexity", "tau": 0.5}
        config = fake_config(ensembles={"duo": duo}, scheduler={"num_candidates": 32} | scheduler)
        super().__init__(fake_loaded(config, members), members)

    def _watch(self, member: FakeMember) -> None:
        reuse = member.reuse

        def watched(seq_id: int, token_ids: Any, salt: str = "") -> int:
            self.searches.append((member.name, seq_id))
            return reuse(seq_id, token_ids, salt)

        member.reuse = watched  # type: ignore[method-assign]

    def add(self, prompt: str, num: int, group: str | None = "g", **params: Any) -> list[Sequence]:
        sampling: dict[str, Any] = {"max_tokens": 6, "ignore_eos": True} | params
        requests = [
            GenerationRequest(f"r{i}", "duo", prompt, SamplingParams(seed=i, **sampling), group=group)
            for i in range(num)
        ]
        made = self.loaded.admission.admit_all(requests)
        self.engine.add(made)
        return made

    def text(self, sequence: Sequence) -> str:
        return "".join(output.text for output in self.outputs[sequence.seq_id])

    def fed(self, member: str, seq_id: int) -> int:
        calls = self.members[member].calls
        return sum(len(feed.token_ids) for call in calls for feed in call if feed.seq_id == seq_id)


def steps_of(prompt: str, num: int, group: str | None = "g", bench: Choosers | None = None, **params: Any) -> int:
    bench = bench or Choosers(token_budget=2048)
    bench.add(prompt, num, group, **params)
    return bench.run()


# Bytes in alpha, mostly pairs in beta: around the limit in one of them, then in the other.
@pytest.mark.parametrize("length", [1, 2, 9, 15, 16, 17, 18, 29, 30, 31, 32, 33, 34, 90])
@pytest.mark.parametrize("max_tokens", [1, 6])
@pytest.mark.parametrize("prefix_reuse", [True, False])
def test_sixteen_choices_take_the_steps_of_one(length: int, max_tokens: int, prefix_reuse: bool) -> None:
    prompt = ("ab" * length)[:length]
    one, many = (
        steps_of(prompt, num, bench=Choosers(token_budget=2048, prefix_reuse=prefix_reuse), max_tokens=max_tokens)
        for num in (1, 16)
    )
    assert many <= one + (length > SHORTEST), "a long prompt's leader goes one step ahead"


@pytest.mark.parametrize("what", ["scored", "weighed"])
@pytest.mark.parametrize("length", [9, 40])
@pytest.mark.parametrize("max_tokens", [1, 6])
def test_scores_and_weights_are_found_once(what: str, length: int, max_tokens: int) -> None:
    """Of a short prompt, too, and from a leader that has ended."""
    params: dict[str, Any] = {"max_tokens": max_tokens}
    if what == "scored":
        params |= {"echo": True, "logprobs": 1}
    one, bench = Choosers(what == "weighed"), Choosers(what == "weighed")
    (alone,) = one.add("ab" * length, 1, **params)
    made = bench.add("ab" * length, 16, **params)
    assert bench.run() <= one.run() + 2
    asked = {
        feed.seq_id for call in bench.members["alpha"].calls for feed in call if feed.following or feed.wanted > 1
    }
    assert asked == {made[0].seq_id}
    assert {s.recipe.weights for s in made} == {alone.recipe.weights}
    told = [[e for out in bench.outputs[s.seq_id] for e in out.prompt_logprobs] for s in made]
    assert told == [told[0]] * 16
    assert len(told[0]) == (2 * length if what == "scored" else 0)


@pytest.mark.parametrize("seed", range(12))
def test_a_group_costs_no_more_steps_than_requests_without_one(seed: int) -> None:
    """And says the same, however few run at once and however small the budget."""
    rng = random.Random(seed)
    prompt = ("abc de中" * 20)[: rng.choice([3, 12, 16, 17, 30, 70])]
    num, max_tokens = rng.randint(2, 16), rng.choice([1, 2, 7])
    scheduler = {
        "token_budget": rng.choice([10, 64, 2048]),
        "max_running": rng.choice([1, 2, 5, 32]),
        "prefix_reuse": rng.random() < 0.5,
    }
    alone, shared, apart = (Choosers(**scheduler) for _ in range(3))
    once = steps_of(prompt, 1, bench=alone, max_tokens=max_tokens)
    made, expected = (b.add(prompt, num, g, max_tokens=max_tokens) for b, g in ((shared, "g"), (apart, None)))
    assert shared.run() <= apart.run() + once
    assert [shared.text(s) for s in made] == [apart.text(s) for s in expected]


@pytest.mark.parametrize("length", [9, 40])
@pytest.mark.parametrize("end", ["abort", "fail", "all fail"])
def test_nobody_waits_for_a_leader_that_is_gone(length: int, end: str) -> None:
    bench, prompt = Choosers(token_budget=24), ("ab" * length)[:length]
    made = bench.add(prompt, 8)
    bench.step()
    if end == "abort":
        bench.engine.abort([made[0].seq_id])
    else:
        bench.members["alpha"].fails_on |= {s.seq_id for s in (made if end == "all fail" else made[:1])}
    apart = Choosers(token_budget=24)
    expected = apart.add(prompt, 8, None)
    assert bench.run() <= apart.run() + 3
    failed = 8 if end == "all fail" else 0
    assert sum(s.finish_reason == "error" for s in made[1:]) >= failed - 1
    for one, other in zip(made[1:], expected[1:], strict=True):
        assert one.finish_reason == "error" or bench.text(one) == apart.text(other)


@pytest.mark.parametrize("length", [9, 40])
@pytest.mark.parametrize("perplexity", [False, True])
def test_choices_that_are_preempted_say_what_they_say_alone(length: int, perplexity: bool) -> None:
    few, plenty = Choosers(perplexity, num_pages=20, token_budget=30), Choosers(perplexity, token_budget=30)
    preempted: list[Sequence] = []
    admit = few.engine.scheduler.admit
    few.engine.scheduler.admit = lambda: (gone := admit(), preempted.extend(gone))[0]  # type: ignore[method-assign]
    made, expected = (bench.add("ab" * length, 10, max_tokens=40) for bench in (few, plenty))
    few.run()
    plenty.run()
    assert preempted
    assert [few.text(s) for s in made] == [plenty.text(s) for s in expected]
    for one, other in zip(made, expected, strict=True):
        assert one.recipe.weights == pytest.approx(other.recipe.weights)


def test_a_choice_that_comes_late_takes_over_from_one_that_runs() -> None:
    bench = Choosers(prefix_reuse=False)
    first = bench.add("ab" * 20, 2, max_tokens=30)
    for _ in range(5):
        bench.step()
    (late,) = bench.add("ab" * 20, 1)
    bench.step()
    assert late.phase is Phase.DECODE
    assert bench.fed("alpha", late.seq_id) == 1
    assert all(s.phase is Phase.DECODE for s in first)


# The search for what is cached


@pytest.mark.parametrize("budget", [5, 30, 2048])
def test_each_sequence_is_looked_up_once_a_member(budget: int) -> None:
    bench = Choosers(token_budget=budget, max_running=8)
    made = [s for i in range(12) for s in bench.add(f"{'abcdef'[i % 6]}" * 30, 1, group=None)]
    made += bench.add("ab" * 9, 4)  # too short in beta
    bench.run()
    assert sorted(bench.searches) == sorted(
        (name, s.seq_id) for s in made for name in bench.members if len(s.tracks[name].prompt_ids) > SHORTEST
    )


def test_prompts_that_come_together_take_over_all_that_was_cached_before_their_turn() -> None:
    bench = Choosers(token_budget=40)
    made = [s for i in range(6) for s in bench.add("ab" * 50 + "cde"[i % 3] * 3, 1, group=None)]
    bench.run()
    for sequence in made[2:]:  # the second begins in the step that ends the first one's prompt
        assert bench.fed("alpha", sequence.seq_id) <= 3 + 5


def test_prefixes_of_other_requests_stay_theirs_where_reuse_is_off() -> None:
    bench = Choosers(prefix_reuse=False, token_budget=200)
    bench.add("ab" * 20, 1, group=None, max_tokens=30)
    made = bench.add("ab" * 20, 3, max_tokens=1)  # the leader is gone when the others begin
    bench.run()
    assert all(bench.fed("alpha", s.seq_id) == 40 for s in made)


# Cost


def calls(work: Callable[[], object]) -> int:
    """Python functions that were called."""
    num = 0

    def count(_frame: object, event: str, _arg: object) -> None:
        nonlocal num
        num += event == "call"

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return num


def crowd(num: int, group: str | None, num_pages: int = 10**6) -> Scheduler:
    scheduler = Scheduler(
        {name: Capacity(16, num_pages, 256, SHORTEST) for name in ("alpha", "beta")}, Limits(num, 2 * num, 512)
    )
    bench = Choosers(max_waiting=2 * num)
    scheduler.add(bench.add("ab" * 20, 2 * num, group))
    return scheduler


@pytest.mark.parametrize("group", [None, "g"])
def test_a_step_costs_a_share_of_each_sequence(group: str | None) -> None:
    def step(scheduler: Scheduler) -> None:
        scheduler.admit()
        list(scheduler.beginners())
        scheduler.schedule()
        scheduler.retire()

    for num_pages in (10**6, 100):  # all of them fit, or the head of the queue does not
        small, large = crowd(64, group, num_pages), crowd(256, group, num_pages)
        for _ in range(3):
            cost = [calls(lambda s=each: step(s)) for each in (small, large)]  # type: ignore[misc]
            assert cost[1] <= 5 * cost[0], "four times as many"
            large.check()


def test_making_room_costs_a_share_of_each_sequence() -> None:
    cost = []
    for num in (64, 256):
        scheduler = crowd(num, None, num_pages=6 * num)
        scheduler.admit()
        assert len(scheduler.running) == num
        for sequence in scheduler.running:
            sequence.tracks["beta"].completion_ids += [97] * 100
        cost.append(calls(scheduler.admit))
        assert len(scheduler.waiting) > num
        scheduler.check()
    assert cost[1] <= 5 * cost[0]


@pytest.mark.parametrize("seed", range(20))
def test_a_random_walk_of_groups(seed: int) -> None:
    """Few pages, aborts, late followers: each begins once an admission, somebody always moves, all come to an end."""
    rng = random.Random(seed)
    scheduler = Scheduler(
        {"alpha": Capacity(4, 30, 96, 6), "beta": Capacity(8, 14, 96, 9)}, Limits(5, 200, rng.choice([3, 20, 200]))
    )
    made: list[Sequence] = []
    begun: set[Sequence] = set()
    for turn in range(4000):
        if turn < 60 and rng.random() < 0.4:
            group = rng.choice("ghi")
            lengths = {"alpha": 7 * (1 + ord(group) - ord("g")), "beta": 11}
            new = [make(len(made) + i, lengths, rng.choice([1, 9]), group) for i in range(rng.randint(1, 5))]
            scheduler.add(new)
            made += new
        begun -= set(scheduler.admit())
        for sequence, leader in scheduler.beginners():
            assert sequence not in begun, "it began before"
            assert not any(track.num_cached for track in sequence.tracks.values())
            assert leader is None or leader.request.group == sequence.request.group
            begun.add(sequence)
            if leader is not None and leader.phase is Phase.DECODE and rng.random() < 0.8:
                for track in sequence.tracks.values():
                    track.cache(len(track.prompt_ids) - 1)
        shares = scheduler.schedule()
        assert bool(shares) == bool(scheduler.running)
        for share in shares:
            assert share.sequence in begun, "fed before it began"
            feed(share, rng)
        if scheduler.running and rng.random() < 0.1:
            rng.choice([*scheduler.running, *scheduler.waiting]).finish("abort")
        scheduler.retire()
        scheduler.check()
        if turn >= 60 and not scheduler.has_work:
            break
    assert made
    assert all(s.finish_reason in ("length", "abort", "stop") for s in made), "somebody starved"
