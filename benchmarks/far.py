"""What it costs that a member lives elsewhere: a step with one far member against the same step in one process.

    python -m benchmarks.far [--config configs/demo.yaml] [--ensemble duet] [--member smollm2] [--rounds 5] [--quick]

In turns, all engines loaded at once: decode steps of B rows with both members in this process, and with one of
them in a process of its own, or a Ray actor (a cluster that is started here). Every member works on one core in
all of them, and keeps it: what differs is the way there and back. (In one process a member that is done gives its
core to the other, which is worth more than that way; on another machine there is nothing to give.) Milliseconds
from step to step; the added ones are of a round, and the median of all rounds counts. Then two actors that sleep
for 20 ms and answer 32 rows of 256 candidates, asked in one step.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.ledger import Check, Findings, Value, arguments
from benchmarks.recorder import DecodeBench, step_to_step
from ensemble_core.config import Config
from ensemble_core.config_file import load_config
from ensemble_core.hosts import HostConfig, ProcessHost, RayHost
from ensemble_core.members.base import Answers, Candidates, Feed, Member, Span
from ensemble_core.members.fake import FakeMember, byte_vocabulary
from ensemble_core.members.parallel import MemberPool
from ensemble_core.members.remote.codec import Order, encode_answers, encode_order
from ensemble_core.members.remote.far import FarMember
from ensemble_core.members.remote.host import Host, Spec
from ensemble_core.members.remote.link import Link
from ensemble_core.members.remote.ray_actor import RayLink
from ensemble_core.members.threads import Allotment

BATCHES = (1, 8, 32)
LENGTH, STEPS = 256, 48
ADDED_MS, TWO_MS = 3.0, 30.0
ROWS, WIDTH, SLEEP = 32, 256, 0.02
HOSTS = {
    "process": HostConfig(process=ProcessHost(num_threads=1)),
    "Ray actor": HostConfig(ray=RayHost(address="local", num_cpus=1)),
}


class Sleeper(FakeMember):
    """Answers after a while, always the same."""

    def __init__(self, name: str) -> None:
        super().__init__(name, byte_vocabulary(), num_pages=4096)
        logprobs = torch.log_softmax(torch.randn(ROWS, 2 * WIDTH), dim=1)[:, :WIDTH].sort(descending=True).values
        self._block = Candidates(torch.randint(0, 2**17, (ROWS, WIDTH)), logprobs, torch.zeros(ROWS))

    def forward(self, feeds: Sequence[Feed]) -> Answers:
        """See `Member.forward`."""
        time.sleep(SLEEP)
        return Answers((self._block,), tuple(Span(0, row, row + 1) for row in range(len(feeds))))


class SleepingHost(Host):
    """A far end with such a member."""

    def __init__(self, spec: bytes) -> None:
        super().__init__(spec, lambda told: Sleeper(told.name))


class SleepingLink(RayLink):
    """To such a far end."""

    far = SleepingHost


def with_host(config: Config, member: str, host: HostConfig) -> Config:
    """The same members, one of them elsewhere."""
    moved = config.members[member].model_copy(update={"host": host})
    return config.model_copy(update={"members": config.members | {member: moved}})


def compare(args: Any, rounds: int, num: int, batches: Sequence[int]) -> list[dict[str, Value]]:
    """A row for each host and batch."""
    torch.set_num_threads(2)  # one core a member, to its end
    Allotment.add = lambda self, cores: None  # type: ignore[method-assign]
    config = load_config(args.config)
    here = DecodeBench(
        config.model_copy(update={"scheduler": config.scheduler.model_copy(update={"member_timeout": 30.0})})
    )
    benches = {"here": here}
    try:
        for name, host in HOSTS.items():
            torch.set_num_threads(2)
            benches[name] = DecodeBench(with_host(config, args.member, host))
        rows: list[dict[str, Value]] = []
        for batch in tqdm(batches, desc="batches", disable=None):
            taken: dict[str, list[float]] = {name: [] for name in benches}
            for _ in range(rounds):
                for name, bench in benches.items():
                    taken[name].append(median(step_to_step(bench.decode(args.ensemble, batch, LENGTH, num))))
            for name in HOSTS:
                added = [1e3 * (a - b) for a, b in zip(taken[name], taken["here"], strict=True)]
                rows.append(
                    {
                        "where": name,
                        "B": batch,
                        "here ms": 1e3 * median(taken["here"]),
                        "far ms": 1e3 * median(taken[name]),
                        "added ms": median(added),
                        "over rounds": f"{min(added):.2f} .. {max(added):.2f}",
                    }
                )
        return rows
    finally:
        for bench in benches.values():
            bench.close()


def two_actors(num: int) -> list[dict[str, Value]]:
    """Steps of two sleeping actors, asked together."""
    ray = importlib.import_module("ray")
    if not ray.is_initialized():
        ray.init(address="local", include_dashboard=False, log_to_driver=False)

    def connect(name: str) -> Any:
        def link(incarnation: int) -> Link:
            return SleepingLink(ray, Spec(name, {}, ROWS, False, 1, incarnation), RayHost(num_cpus=0))

        return link

    members: dict[str, Member] = {}
    for name in ("first", "second"):
        far = FarMember(name, byte_vocabulary(), connect(name), kind="Ray actor", timeout=30.0, start_seconds=60.0)
        far.wait_ready()
        members[name] = far
    pool, taken = MemberPool(members, 30.0), []
    try:
        for step in tqdm(range(num + 3), desc="two actors", disable=None):
            feeds = {name: [Feed(row, [97], top_k=WIDTH, keep=step) for row in range(ROWS)] for name in members}
            started = time.perf_counter()
            found = pool.forward(feeds)
            taken.append(time.perf_counter() - started)
            assert all(attempt.error is None for attempt in found.values()), found
    finally:
        pool.close()
    return [{"each sleeps ms": 1e3 * SLEEP, "step ms": 1e3 * median(taken[3:]), "steps": num}]


def sizes() -> list[dict[str, Value]]:
    """Bytes of the messages of a step of 32 rows."""
    order = encode_order(Order(0, [Feed(row, [5], keep=256) for row in range(ROWS)], [256] * ROWS, []))
    answers = encode_answers(Sleeper("size").forward([Feed(row, [5]) for row in range(ROWS)]))
    return [{"rows": ROWS, "K": WIDTH, "order KB": len(order) / 1e3, "answer KB": len(answers) / 1e3}]


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__)
    parser.add_argument("--ensemble", default="duet")
    parser.add_argument("--member", default="smollm2", help="the one that lives elsewhere")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rounds, num, batches = (1, 8, (1, 2)) if args.quick else (args.rounds, STEPS, BATCHES)
    steps = compare(args, rounds, num, batches)
    two = two_actors(8 if args.quick else 100)
    checks = [
        Check(f"{row['where']}: added to a step, B = {row['B']}, ms", float(str(row["added ms"])), "<=", ADDED_MS)
        for row in steps
        if row["B"] == max(batches)
    ]
    checks.append(Check("two actors of 20 ms each: a step, ms", float(str(two[0]["step ms"])), "<=", TWO_MS))
    settings = {"model": args.ensemble, "far": args.member, "rounds": rounds, "steps": num, "quick": args.quick}
    Findings("far", {"steps": steps, "two actors": two, "messages": sizes()}, checks, settings).print()


if __name__ == "__main__":
    main()
