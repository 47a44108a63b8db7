"""Places are shared among clients and requests: who is admitted next, and who makes way."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from fakes import byte_vocabulary

from ensemble_core.decoding.capacity import Capacity, Limits
from ensemble_core.decoding.fairness import PATIENCE
from ensemble_core.decoding.recipe import Recipe
from ensemble_core.decoding.requests import GenerationRequest, prioritised
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.decoding.scheduler import Scheduler
from ensemble_core.decoding.sequence import Choice, Phase, Sequence
from ensemble_core.errors import InvalidRequestError, QueueFullError
from ensemble_core.text.alignment import Track

VOCABULARY = byte_vocabulary()
RECIPE = Recipe("m", ("alpha",), (1.0,), None, "none")


def make(seq_id: int, owner: tuple[str, str], length: int = 4, max_tokens: int = 50) -> Sequence:
    request = GenerationRequest(f"r{seq_id}", "m", "", SamplingParams(max_tokens=max_tokens), owner=owner)
    return Sequence(seq_id, request, RECIPE, {"alpha": Track(VOCABULARY, [97] * length)})


def many(count: int, owner: tuple[str, str], first: int = 0, length: int = 4) -> list[Sequence]:
    return [make(first + rank, owner, length) for rank in range(count)]


def scheduler(places: int, num_pages: int = 1000, **limits: float) -> Scheduler:
    return Scheduler({"alpha": Capacity(16, num_pages, 128)}, Limits(places, 200, 512, **limits))


def owners(made: Scheduler) -> Counter[tuple[str, str]]:
    return Counter(s.request.owner for s in made.running)


def test_one_request_with_many_choices_does_not_make_another_wait() -> None:
    made = scheduler(8)
    made.add(many(16, ("", "big")))
    assert made.admit() == []
    assert len(made.running) == 8
    made.add([make(100, ("", "small"))])
    (displaced,) = made.admit()
    assert displaced.seq_id == 7, "the youngest makes way"
    assert owners(made) == {("", "big"): 7, ("", "small"): 1}
    assert made.waiting[0] is displaced
    assert displaced.phase is Phase.WAITING
    made.check()


def test_nobody_makes_way_for_a_request_that_has_a_place() -> None:
    made = scheduler(4)
    made.add(many(8, ("", "a")))
    made.admit()
    made.add(many(8, ("", "b"), 100))
    assert len(made.admit()) == 1
    for _ in range(5):
        assert made.admit() == []
    assert owners(made) == {("", "a"): 3, ("", "b"): 1}


def test_free_places_go_to_whoever_has_the_fewest() -> None:
    made = scheduler(4)
    made.add(many(8, ("", "a")))
    made.admit()
    made.add(many(8, ("", "b"), 100))
    made.admit()
    for _ in range(2):
        next(s for s in made.running if s.request.owner == ("", "a")).finish("stop")
        made.retire()
        assert made.admit() == []
    assert owners(made) == {("", "a"): 2, ("", "b"): 2}


def test_clients_come_before_their_requests() -> None:
    """A client with many requests has no more places than one with few."""
    made = scheduler(4)
    made.add([make(rank, ("one", f"r{rank}")) for rank in range(8)])
    made.admit()
    made.add([make(100, ("two", "x")), make(101, ("two", "y"))])
    for sequence in made.running[:2]:
        sequence.finish("stop")
    made.retire()
    made.admit()
    assert Counter(s.request.owner[0] for s in made.running) == {"one": 2, "two": 2}


def test_with_one_owner_it_is_first_come_first_served() -> None:
    made = scheduler(3)
    made.add(many(9, ("", "")))
    order: list[int] = []
    while made.has_work:
        assert made.admit() == []
        order.append(made.running[0].seq_id)
        made.running[0].finish("stop")
        made.retire()
    assert order == list(range(9))


def test_a_full_cache_makes_room_for_a_request_that_has_nothing() -> None:
    made = scheduler(8, num_pages=9)
    made.add(many(8, ("", "big"), length=20))
    made.admit()
    made.add([make(100, ("", "small"), length=20)])
    assert made.admit(), "pages of the big one are given up"
    assert ("", "small") in owners(made)
    made.check()


@pytest.mark.parametrize("seed", range(20))
def test_every_request_ends_and_has_a_place_while_places_reach(seed: int) -> None:
    rng = random.Random(seed)
    plenty = seed % 2 == 0  # of pages, so that only places are short
    made = scheduler(rng.randint(1, 6), num_pages=1000 if plenty else rng.randint(9, 60))
    sequences = []
    for ticket in range(8):
        owner = (rng.choice(["", "k"]), f"t{ticket}")
        sequences += [make(len(sequences) + i, owner, rng.randint(1, 40), rng.randint(1, 12)) for i in range(5)]
    rng.shuffle(sequences)
    for _ in range(3000):
        if sequences and rng.random() < 0.3:
            made.add([sequences.pop()])
        made.admit()
        made.check()
        waiting = {s.request.owner for s in made.waiting} - owners(made).keys()
        assert not (plenty and waiting) or max(owners(made).values()) < 2
        for share in made.schedule():
            track = share.sequence.tracks["alpha"]
            track.cache(track.num_cached + share.counts["alpha"])
            if share.decides:
                share.sequence.decide([Choice(97)])
        for preempted in made.running:
            assert len(preempted.main) <= 128
        made.retire()
        if not sequences and not made.has_work:
            return
    raise AssertionError("some sequence never ended")


def test_what_can_never_fit_the_queue_is_no_reason_to_try_again() -> None:
    with pytest.raises(InvalidRequestError, match="at most 200"):
        scheduler(4).add(many(201, ("", "")))


def test_waiting_prompts_are_bounded_in_tokens() -> None:
    made = scheduler(1, max_queued_tokens=100)
    made.add([make(0, ("", "a"), 120)])  # alone it may be larger
    with pytest.raises(QueueFullError, match="max_queued_tokens"):
        made.add([make(1, ("", "b"), 1)])
    made.admit()
    made.add([make(2, ("", "c"), 60), make(3, ("", "c"), 40)])
    with pytest.raises(QueueFullError, match="100 prompt tokens wait"):
        made.add([make(4, ("", "d"), 1)])


def urgent(seq_id: int, priority: int, arrived: float, owner: tuple[str, str] | None = None) -> Sequence:
    found = make(seq_id, owner or ("", f"r{seq_id}"), max_tokens=2)
    found.request = replace(found.request, priority=priority)
    found.arrived = arrived
    return found


def admitted(made: Scheduler, waiting: list[Sequence]) -> list[int]:
    """The order in which those that wait get the only place."""
    made.add(waiting)
    order = []
    while made.has_work:
        made.admit()
        made.check()
        (running,) = made.running
        order.append(running.seq_id)
        running.finish("stop")
        made.retire()
    return order


def test_a_lower_number_goes_first_and_of_equals_the_one_that_waits_longest() -> None:
    waiting = [urgent(0, 5, 0.0), urgent(1, 0, 0.1), urgent(2, -100, 0.2), urgent(3, 0, 0.3), urgent(4, -1, 0.4)]
    assert admitted(scheduler(1), waiting) == [2, 4, 1, 3, 0]


def test_nobody_waits_for_ever() -> None:
    """The least urgent goes before a stream of the most urgent ones after 200 steps' worth of waiting, not before."""
    made, bound = scheduler(1), 200 * PATIENCE
    made.add([urgent(0, 100, 0.0)])
    for rank in range(1, 1000):
        now = rank * bound / 100
        made.add([urgent(rank, -100, now)])
        made.admit()
        (running,) = made.running
        running.finish("stop")
        made.retire()
        if running.seq_id == 0:
            assert bound < now <= bound * 1.02
            return
    raise AssertionError("it waits for ever")


def test_clients_share_places_within_a_priority() -> None:
    made = scheduler(4)
    waiting = [urgent(i, 0, i / 100, ("a", f"a{i}")) for i in range(6)]
    waiting += [urgent(10 + i, 0, 0.5, ("b", f"b{i}")) for i in range(2)]
    waiting += [urgent(20, 3, 0.0, ("c", "c"))]
    made.add(waiting)
    made.admit()
    assert Counter(s.request.owner[0] for s in made.running) == {"a": 2, "b": 2}
    assert all(s.request.priority == 0 for s in made.running)


@pytest.mark.parametrize(("mine", "makes_way"), [(5, False), (0, True), (-5, True)])
def test_only_the_less_urgent_make_way(mine: int, makes_way: bool) -> None:
    made = scheduler(2)
    made.add([urgent(0, 0, 0.0, ("", "big")), urgent(1, 0, 0.0, ("", "big"))])
    made.admit()
    made.add([urgent(2, mine, 0.1)])
    assert [s.seq_id for s in made.admit()] == ([1] if makes_way else [])
    assert {s.seq_id for s in made.running} == ({0, 2} if makes_way else {0, 1})


@pytest.mark.parametrize("seed", range(10))
def test_whatever_the_priorities_everything_ends(seed: int) -> None:
    rng = random.Random(seed)
    made = scheduler(rng.randint(1, 4))
    waiting = [
        urgent(i, rng.randint(-100, 100), rng.random(), (rng.choice("ab"), rng.choice("xyz"))) for i in range(40)
    ]
    made.add(waiting)
    ended = 0
    for _ in range(500):
        made.admit()
        made.check()
        for sequence in made.running:
            if rng.random() < 0.5:
                sequence.finish("stop")
        ended += len(made.retire())
        if not made.has_work:
            break
    assert ended == 40


def test_priorities_are_bounded_and_only_where_they_are_allowed() -> None:
    asked = [replace(make(0, ("", "")).request, priority=each) for each in (-100, 100, 0)]
    assert prioritised(asked, allowed=True) == asked
    assert [each.priority for each in prioritised(asked, allowed=False)] == [0, 0, 0]
    for wrong in (101, -101, 2**70):
        one = [replace(asked[0], priority=wrong)]
        assert prioritised(one, allowed=False)[0].priority == 0
        with pytest.raises(InvalidRequestError, match="priority must be an integer from -100 to 100") as caught:
            prioritised(one, allowed=True)
        assert caught.value.param == "priority"


def test_a_batch_is_behind_all_that_others_may_ask_for() -> None:
    """Whether priorities are allowed or not, and with its own among its own."""
    asked = [replace(make(0, ("", "")).request, priority=each, batch=each != 100) for each in (100, -100, -99)]
    for allowed in (True, False):
        first, second, third = prioritised(asked, allowed=allowed)
        assert first.priority < second.priority
        assert (second.priority < third.priority) is allowed


def test_prompts_are_read_one_priority_at_a_time() -> None:
    made = scheduler(4)
    long, short = make(0, ("", "later"), 100), make(1, ("", "now"), 60)
    long.request = replace(long.request, priority=200)
    long.arrived, short.arrived = 0.0, 1.0
    made.add([long])
    made.admit()
    assert [begun.seq_id for begun, _ in made.beginners()] == [0]
    made.add([short])
    made.admit()
    assert [begun.seq_id for begun, _ in made.beginners()] == [1]
    assert [share.sequence.seq_id for share in made.schedule()] == [1]
    short.finish("stop")
    made.retire()
    assert [share.sequence.seq_id for share in made.schedule()] == [0]


def test_a_prompt_that_has_waited_long_enough_is_read_first() -> None:
    made = scheduler(4)
    long, short = make(0, ("", "later"), 100), make(1, ("", "now"), 60)
    long.request = replace(long.request, priority=200)
    long.arrived, short.arrived = 0.0, 200 * PATIENCE + 1.0
    made.add([long, short])
    made.admit()
    list(made.beginners())
    assert [share.sequence.seq_id for share in made.schedule()] == [0]
