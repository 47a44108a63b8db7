"""Random walks over the scheduler: its state is exact after each operation, and all sequences end, in order."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace

import pytest
from fakes import byte_vocabulary

from ensemble_core.decoding.capacity import Capacity, Limits, Spare
from ensemble_core.decoding.modes.base import mode_of
from ensemble_core.decoding.pace import Work
from ensemble_core.decoding.recipe import Recipe
from ensemble_core.decoding.requests import GenerationRequest
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.decoding.scheduler import Scheduler
from ensemble_core.decoding.sequence import Choice, Phase, Sequence
from ensemble_core.decoding.shares import Share
from ensemble_core.errors import QueueFullError
from ensemble_core.text.alignment import Track

VOCABULARY = byte_vocabulary()
CAPACITIES = {"alpha": Capacity(16, 24, 128), "beta": Capacity(32, 11, 96)}


def make(seq_id: int, lengths: Mapping[str, int], max_tokens: int, group: str | None = None) -> Sequence:
    """A sequence with prompts of the given lengths, main first."""
    members = tuple(lengths)
    recipe = Recipe("m", members, (1 / len(members),) * len(members), None, "none")
    request = GenerationRequest(f"r{seq_id}", "m", "", SamplingParams(max_tokens=max_tokens), group=group)
    tracks = {member: Track(VOCABULARY, [97] * length) for member, length in lengths.items()}
    return Sequence(seq_id, request, recipe, tracks)


def feed(share: Share, rng: random.Random) -> None:
    """Do what the engine does with a share: cache it, append a token, align."""
    sequence = share.sequence
    for member, count in share.counts.items():
        sequence.tracks[member].cache(sequence.tracks[member].num_cached + count)
        assert sequence.tracks[member].num_uncached >= 0
    if share.decides:
        sequence.decide([Choice(rng.choice([97, 98, 32, 0xC3, 0xA9]))])
        if sequence.phase is not Phase.FINISHED and not sequence.spelt.mid_character:
            for member in sequence.recipe.members[1:]:
                sequence.tracks[member].respell(sequence.spelt.text)
                if len(sequence.tracks[member]) > CAPACITIES[member].max_len:
                    sequence.finish("length")


def planned(scheduler: Scheduler) -> list[Share]:
    """The shares of a step. Here preempted sequences have no pages to give back."""
    scheduler.admit()
    return scheduler.schedule()


class Walk:
    """A scheduler and a plain model of what it should do."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.limits = Limits(self.rng.randint(1, 6), 8, self.rng.choice([1, 5, 20, 200]))
        self.scheduler = Scheduler(CAPACITIES, self.limits)
        self.made: list[Sequence] = []
        self.queued: list[int] = []  # in order of arrival
        self.admitted: list[int] = []
        self.passed_over = False  # the last round of admission left some waiting

    def add(self) -> None:
        batch = [self.new() for _ in range(self.rng.randint(1, 4))]
        before = list(self.scheduler.waiting)
        places = 0 if self.passed_over else self.limits.max_running - len(self.scheduler.running)
        if len(before) + len(batch) > self.limits.max_waiting + places:
            with pytest.raises(QueueFullError, match="max_waiting"):
                self.scheduler.add(batch)
            assert list(self.scheduler.waiting) == before
            return
        self.scheduler.add(batch)
        self.made += batch
        self.queued += [sequence.seq_id for sequence in batch]

    def new(self) -> Sequence:
        members = self.rng.choice([("alpha",), ("beta",), ("alpha", "beta"), ("beta", "alpha")])
        lengths = {member: self.rng.randint(1, 60) for member in members}
        return make(len(self.made) + self.rng.randrange(10**6), lengths, self.rng.randint(1, 30))

    def step(self) -> None:
        shares = planned(self.scheduler)
        self.passed_over = bool(self.scheduler.waiting)
        self.note_admitted()
        self.check_shares(shares)
        assert all(self.scheduler.reserved(member) <= CAPACITIES[member].num_pages for member in CAPACITIES)
        for share in shares:
            feed(share, self.rng)
        self.retire()

    def abort(self) -> None:
        alive = [*self.scheduler.running, *self.scheduler.waiting]
        if alive:
            self.rng.choice(alive).finish("abort")
            self.retire()

    def retire(self) -> None:
        finished = {s for s in self.made if s.phase is Phase.FINISHED}
        gone = self.scheduler.retire()
        assert set(gone) <= finished
        left = {*self.scheduler.running, *self.scheduler.waiting}
        assert not left & finished
        assert self.scheduler.has_work == bool(left)

    def note_admitted(self) -> None:
        new = [s.seq_id for s in self.scheduler.running if s.seq_id not in self.admitted]
        aborted = {s.seq_id for s in self.made if s.finish_reason == "abort"}
        waiting_before = [i for i in self.queued if i not in self.admitted and i not in aborted]
        assert new == waiting_before[: len(new)], "a sequence overtook the head of the queue"
        self.admitted += new
        assert len(self.scheduler.running) <= self.limits.max_running

    def check_shares(self, shares: list[Share]) -> None:
        decoding = [s for s in self.scheduler.running if s.phase is Phase.DECODE]
        assert [share.sequence for share in shares if not share.prefill] == decoding
        assert bool(shares) == bool(self.scheduler.running)
        for member in CAPACITIES:
            decode = sum(share.counts.get(member, 0) for share in shares if not share.prefill)
            prefill = sum(share.counts.get(member, 0) for share in shares if share.prefill)
            # What decoding leaves of the budget, and one token if it leaves nothing: a prompt always makes progress.
            assert prefill <= max(1, self.limits.token_budget - decode)
            assert decode < self.limits.token_budget or not self.prefilling(member) or prefill == 1
        for share in shares:
            self.check_share(share)

    def prefilling(self, member: str) -> bool:
        """Whether the first prompt in prefill has more than its last token to go in this member."""
        first = next((s for s in self.scheduler.running if s.phase is Phase.PREFILL), None)
        return first is not None and member in first.tracks and first.tracks[member].num_uncached > 1

    def check_share(self, share: Share) -> None:
        tracks = share.sequence.tracks
        assert all(count > 0 for count in share.counts.values())
        if share.decides:
            plan = mode_of(share.sequence.recipe.mode).plan(share.sequence)
            assert share.counts == {member: ask.count for member, ask in plan.items()}
            assert share.wanted == dict.fromkeys(plan, 1)
        else:
            assert share.prefill
            assert all(count < tracks[member].num_uncached for member, count in share.counts.items())

    def check(self) -> None:
        self.scheduler.check()
        for member, capacity in CAPACITIES.items():
            used = 0
            for sequence in self.scheduler.running:
                if member in sequence.tracks:
                    used += -(-sequence.tracks[member].num_cached // capacity.page_size)
            assert used <= min(self.scheduler.reserved(member), capacity.num_pages)


@pytest.mark.parametrize("seed", range(25))
def test_a_random_walk_keeps_the_books(seed: int) -> None:
    walk = Walk(seed)
    for _ in range(150):
        walk.rng.choice([walk.add, walk.step, walk.step, walk.step, walk.abort])()
        walk.check()
    for _ in range(3000):
        if not walk.scheduler.has_work:
            break
        walk.step()
        walk.check()
    assert all(s.finish_reason in ("length", "abort", "stop") for s in walk.made), "a sequence starved"
    assert all(walk.scheduler.reserved(member) == 0 for member in CAPACITIES)


def test_the_last_piece_of_a_prompt_is_fed_to_all_members_at_once() -> None:
    scheduler = Scheduler(CAPACITIES, Limits(4, 4, 10))
    sequence = make(0, {"alpha": 35, "beta": 4}, 5)
    scheduler.add([sequence])
    seen = []
    while sequence.phase is not Phase.DECODE:
        (share,) = planned(scheduler)
        seen.append((share.counts, share.decides))
        feed(share, random.Random(0))
    assert seen == [
        ({"alpha": 10, "beta": 3}, False),
        ({"alpha": 10}, False),
        ({"alpha": 10}, False),
        ({"alpha": 5, "beta": 1}, True),
    ]


def test_a_long_prompt_does_not_stall_streams() -> None:
    scheduler = Scheduler(CAPACITIES, Limits(4, 4, 8))
    stream, prompt = make(0, {"alpha": 3}, 60), make(1, {"alpha": 60}, 5)
    scheduler.add([stream])
    feed(planned(scheduler)[0], random.Random(0))
    scheduler.add([prompt])
    while prompt.phase is not Phase.DECODE:
        shares = planned(scheduler)
        assert [share.sequence for share in shares] == [stream, prompt]
        assert shares[1].counts["alpha"] <= 7
        for share in shares:
            feed(share, random.Random(0))


def test_prefill_beside_streams_takes_what_is_granted_and_all_of_the_budget_without() -> None:
    """A decode-only step takes 10, a prompt token 0.5 in each member: 20 more pay for 20 tokens in each."""
    scheduler = Scheduler(CAPACITIES, Limits(4, 4, 50, max_stretch=3.0, spare="all"))
    stream, prompt = make(0, {"alpha": 40, "beta": 40}, 60), make(1, {"alpha": 100, "beta": 60}, 5)
    scheduler.add([stream])
    assert run_timed(scheduler)["alpha"] == 40
    scheduler.add([prompt])
    fed = []
    while prompt.phase is not Phase.DECODE:
        fed.append(run_timed(scheduler))
    assert [each["alpha"] for each in fed[:4]] == [0, 0, 16, 16]  # two steps measure what decoding costs
    assert all(each["alpha"] + each["beta"] <= 40 for each in fed)
    assert len(fed) <= 8


@pytest.mark.parametrize(
    ("spare", "watched", "began", "spared"),
    [
        ("earlier", True, 1.0, True),  # it ran before the prompt came
        ("earlier", True, 3.0, False),  # both are of one burst
        ("earlier", False, 1.0, False),  # nobody looks
        ("all", True, 3.0, True),
        ("all", False, 1.0, False),
        ("none", True, 1.0, False),
    ],
)
def test_whom_prompts_spare(spare: Spare, watched: bool, began: float, spared: bool) -> None:
    """Two decode-only steps first, to learn what a step costs, where a stream is spared; else all of the budget."""
    scheduler = Scheduler(CAPACITIES, Limits(4, 4, 50, max_stretch=3.0, spare=spare))
    stream, prompt = make(0, {"alpha": 40}, 60), make(1, {"alpha": 100}, 5)
    stream.request, stream.first_token, prompt.arrived = replace(stream.request, watched=watched), began, 2.0
    scheduler.add([stream])
    assert run_timed(scheduler)["alpha"] == 40
    scheduler.add([prompt])
    assert [run_timed(scheduler)["alpha"] for _ in range(2)] == ([0, 0] if spared else [49, 49])


def run_timed(scheduler: Scheduler) -> dict[str, int]:
    """One step on a machine where it takes 10 plus 0.5 per prompt token; returns each member's prompt tokens."""
    shares = planned(scheduler)
    counts = {
        member: sum(share.counts.get(member, 0) for share in shares if share.prefill) for member in CAPACITIES
    }
    decoded = any(not share.prefill for share in shares)
    parts = {(member, False): Work(5 + 0.5 * count, count, decoded) for member, count in counts.items()}
    scheduler.pace.record(sum(not s.prefill for s in shares), sum(w.seconds for w in parts.values()), parts)
    for share in shares:
        feed(share, random.Random(0))
    return counts


def test_pages_are_reserved_as_they_are_needed() -> None:
    scheduler = Scheduler(CAPACITIES, Limits(4, 4, 64))
    sequence = make(0, {"alpha": 10, "beta": 20}, 30)
    scheduler.add([sequence])
    seen = []
    for _ in range(8):
        (share,) = planned(scheduler)
        seen.append((scheduler.reserved("alpha"), scheduler.reserved("beta")))
        feed(share, random.Random(0))
    assert seen[0] == (1, 1)
    assert seen[-1] == (2, 1)


SMALL = {"alpha": Capacity(4, 8, 24)}


def test_the_youngest_makes_room_and_comes_back_first() -> None:
    scheduler = Scheduler(SMALL, Limits(4, 9, 64))
    made = [make(i, {"alpha": 4}, 20) for i in range(4)]
    scheduler.add(made)
    preempted: list[int] = []
    for _ in range(200):
        gone = scheduler.admit()
        preempted += [s.seq_id for s in gone]
        assert all(s.phase is Phase.WAITING and s.main.num_cached == 0 for s in gone)
        waiting = [s.seq_id for s in scheduler.waiting]
        assert waiting == sorted(waiting)
        assert scheduler.running[:1] == [s for s in made if s.phase is not Phase.FINISHED][:1], "not the oldest"
        for share in scheduler.schedule():
            feed(share, random.Random(0))
        scheduler.retire()
        if not scheduler.has_work:
            break
    assert preempted
    assert 0 not in preempted
    assert [s.num_completion_tokens for s in made] == [20] * 4


def test_newcomers_leave_a_page_to_grow_into() -> None:
    scheduler = Scheduler(SMALL, Limits(4, 9, 64))
    made = [make(i, {"alpha": 8}, 10) for i in range(3)]
    scheduler.add(made)
    planned(scheduler)
    assert scheduler.running == made[:2], "two pages each, and one each to grow into"
    whole_rows = Scheduler({"alpha": Capacity(24, 3, 24)}, Limits(4, 9, 64))
    made = [make(i, {"alpha": 8}, 10) for i in range(3)]
    whole_rows.add(made)
    planned(whole_rows)
    assert whole_rows.running == made, "a row holds all that a sequence can become"


def fits_plainly(scheduler: Scheduler, capacities: Mapping[str, Capacity], sequence: Sequence) -> bool:
    """The rule spelt out: its pages, those of all that run, and a spare one for each that can grow."""
    for member in sequence.tracks:
        size, num_pages, max_len = (getattr(capacities[member], f) for f in ("page_size", "num_pages", "max_len"))
        needed = 0
        for each in (*scheduler.running, sequence):
            if member in each.tracks:
                track, longest = each.tracks[member], max_len
                if member == each.recipe.main:
                    longest = min(longest, len(track.prompt_ids) + each.request.params.max_tokens)
                pages = math.ceil(len(track) / size)
                needed += pages + (math.ceil(longest / size) > pages)
        if needed > num_pages:
            return False
    return True


@pytest.mark.parametrize("seed", range(20))
def test_who_is_let_in_is_who_fits_by_a_plain_count(seed: int) -> None:
    rng = random.Random(seed)
    capacities = {"alpha": Capacity(4, rng.randint(24, 60), 96), "beta": Capacity(8, rng.randint(12, 40), 96)}
    scheduler = Scheduler(capacities, Limits(rng.randint(2, 12), 64, 64))
    lengths = [
        rng.sample([("alpha", rng.randint(1, 40)), ("beta", rng.randint(1, 40))], rng.randint(1, 2))
        for _ in range(40)
    ]
    scheduler.add([make(i, dict(each), rng.randint(1, 30)) for i, each in enumerate(lengths)])
    for _ in range(40):
        before, queue = list(scheduler.running), list(scheduler.waiting)
        if scheduler.admit():
            continue  # who is preempted goes back to the head of the queue
        admitted = scheduler.running[len(before) :]
        plain = Scheduler(capacities, Limits(10**6, 64, 64))
        plain.running = before
        for sequence in queue:
            if len(plain.running) == scheduler._limits.max_running:
                break
            if plain.running and not fits_plainly(plain, capacities, sequence):
                break
            plain.running.append(sequence)
        assert plain.running == scheduler.running
        assert admitted == queue[: len(admitted)]
        for share in scheduler.schedule():
            feed(share, rng)
        scheduler.retire()
        scheduler.check()


def test_it_needs_no_torch() -> None:
    code = "import sys; from ensemble_core.decoding import scheduler, sequence; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
