"""What an adapter costs: bytes, resident memory, and a decode step beside its base.

    python -m benchmarks.adapters [--config configs/demo.yaml] [--member smollm2] [--rank 16] [--rounds 15] [--quick]

Two adapters with random weights, on all projections of a member, are written by PEFT. In turns, a decode step of B
rows that hold L tokens each: of the base, of an adapter, and of base, one and both adapters together, as an ensemble
of them steps (each in its own forward, side by side on the machine's cores). Resident memory is of two processes that
load the base alone and the base with both, after their first step.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks import prose
from benchmarks.ledger import Findings, Value, arguments
from benchmarks.stopwatch import Spread, ratios, take_turns
from ensemble_core.config import Config
from ensemble_core.config_file import load_config
from ensemble_core.member_config import AUTO, MemberConfig
from ensemble_core.members.base import Feed
from ensemble_core.members.loading.adapters import read_adapter
from ensemble_core.members.loading.checkpoints import load_tokenizer, load_vocabulary, resolve_folder
from ensemble_core.members.loading.memory import plan_caches
from ensemble_core.members.loading.models import Making, load_family
from ensemble_core.members.loading.placement import plan_cores
from ensemble_core.members.local import LocalMember
from ensemble_core.members.parallel import MemberPool

LENGTH, NUM_CANDIDATES = 256, 256
BATCHES = (1, 8, 32)
MOST_ROWS = max(BATCHES)
NAMES = ("first", "second")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_adapters(folder: Path, goal: Path, rank: int) -> dict[str, Path]:
    """Two adapters with random weights, small enough that the model still writes text."""
    found = {}
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config)
        for path, weight in model.named_parameters():
            if "lora_B" in path:
                weight.data.normal_(0, 0.01)
        model.save_pretrained(goal / name)
        found[name] = goal / name
    return found


def family_of(member: MemberConfig, name: str, adapters: Mapping[str, Path]) -> dict[str, MemberConfig]:
    """The member with adapters on it."""
    return {name: member} | {
        own: member.model_copy(update={"base": name, "adapter": str(folder)}) for own, folder in adapters.items()
    }


def load(name: str, family: Mapping[str, MemberConfig]) -> dict[str, LocalMember]:
    """All members of a family."""
    folder = resolve_folder(family[name])
    planned = plan_caches(family, dict.fromkeys(family, folder), MOST_ROWS + 1)
    adapters = [read_adapter(own, member) for own, member in planned.items() if member.adapter is not None]
    return load_family(name, planned, folder, load_vocabulary(name, family[name]), Making(), adapters)


class Step:
    """Decode steps of some members, with B rows of L tokens in each."""

    def __init__(self, members: Mapping[str, LocalMember], token_ids: list[int], batch: int) -> None:
        self._pool, self._batch = MemberPool(members, cores=plan_cores(members)), batch
        self._ids = token_ids

    def fill(self) -> None:
        """Cache the text in every row."""
        for member in self._pool.members.values():
            member.forward([Feed(0, self._ids, 0)])
            for seq_id in range(1, self._batch):
                member.reuse(seq_id, self._ids)
                member.forward([Feed(seq_id, self._ids[-1:], 0, keep=len(self._ids) - 1)])

    def __call__(self, names: tuple[str, ...]) -> None:
        """One token for every row of the members named, in the place of the last step's."""
        feeds = [
            Feed(i, self._ids[-1:], top_k=NUM_CANDIDATES, keep=len(self._ids) - 1) for i in range(self._batch)
        ]
        for attempt in self._pool.forward(dict.fromkeys(names, feeds)).values():
            assert attempt.error is None, attempt.error

    def empty(self) -> None:
        """Give the rows back."""
        for member in self._pool.members.values():
            for seq_id in range(self._batch):
                member.release(seq_id)


def measure(
    members: Mapping[str, LocalMember], base: str, ids: list[int], batch: int, rounds: int
) -> dict[str, Value]:
    """A row of the table."""
    step = Step(members, ids, batch)
    step.fill()
    whom = {"base": (base,), "adapter": NAMES[:1], "two": (base, NAMES[0]), "three": (base, *NAMES)}
    calls: dict[str, Callable[[], None]] = {side: partial(step, names) for side, names in whom.items()}
    seconds = take_turns(calls, rounds, title=f"B={batch}")
    step.empty()
    found = {side: Spread.of(values).scaled(1e3).median for side, values in seconds.items()}
    return {
        "B": batch,
        "base ms": found["base"],
        "adapter ms": found["adapter"],
        "adapter / base": ratios(seconds["adapter"], seconds["base"]).median,
        "base + 1 ms": found["two"],
        "base + 2 ms": found["three"],
        "base + 2 / base": ratios(seconds["three"], seconds["base"]).median,
    }


def memory(
    config: Config, base: str, adapters: Mapping[str, Path], members: Mapping[str, LocalMember]
) -> list[dict[str, Value]]:
    """Bytes of weights by member, and what processes with and without adapters have resident."""
    weights = {
        name: sum(member.memory_bytes().values()) - sum(member._cache.num_bytes().values())
        for name, member in members.items()
    }
    resident = [_resident(config, base, chosen) for chosen in ({}, adapters)]
    return [
        {"": "weights of the base", "MiB": weights[base] / 2**20},
        {"": "weights of an adapter", "MiB": weights[NAMES[0]] / 2**20},
        {"": "resident, base alone", "MiB": resident[0]},
        {"": "resident, with two adapters", "MiB": resident[1]},
    ]


def _resident(config: Config, base: str, adapters: Mapping[str, Path]) -> float:
    given = [config.members[base].model_dump_json(exclude_unset=True), base, *map(str, adapters.values())]
    run = subprocess.run(
        [sys.executable, "-m", __spec__.name, "--load", *given], capture_output=True, check=True, text=True
    )
    return float(run.stdout.split()[-1])


def load_and_tell(given: list[str]) -> None:
    """Print the resident memory of this process, in MiB, with a base and some adapters in it."""
    text, base, *folders = given
    members = load(
        base,
        family_of(
            MemberConfig.model_validate_json(text), base, dict(zip(NAMES, map(Path, folders), strict=False))
        ),
    )
    for member in members.values():
        member.forward([Feed(1, [5, 6, 7], 1, top_k=NUM_CANDIDATES)])
    status = Path("/proc/self/status").read_text(encoding="ascii")
    print(int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 1024)


def main() -> None:
    """Measure."""
    parser = arguments(__doc__)
    parser.add_argument("--member", default="smollm2")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--load", nargs="+", default=[], help="for the processes that this one starts")
    args = parser.parse_args()
    if args.load:
        load_and_tell(args.load)
        return
    config = load_config(args.config)
    own = config.members[args.member].model_copy(update={"kv_memory": AUTO, "max_len": 2 * LENGTH})
    config = config.model_copy(update={"members": {args.member: own}})
    ids = prose.token_ids(load_tokenizer(args.member, own), 0, LENGTH)
    with tempfile.TemporaryDirectory() as scratch:
        adapters = write_adapters(resolve_folder(own), Path(scratch), args.rank)
        members = load(args.member, family_of(own, args.member, adapters))
        rounds = 3 if args.quick else args.rounds
        steps = [
            measure(members, args.member, ids, batch, rounds) for batch in (BATCHES[:2] if args.quick else BATCHES)
        ]
        sizes = memory(config, args.member, adapters, members)
    settings = {"rounds": rounds, "member": args.member, "rank": args.rank, "L": LENGTH, "quick": args.quick}
    Findings("adapters", {"steps": steps, "memory": sizes}, (), settings).print()


if __name__ == "__main__":
    main()
