"""A member's packed decode forward against transformers' own forward with its cache.

    python -m benchmarks.member_forward [--config configs/demo.yaml] [--quick]

One new token for each of B rows that hold L tokens, in the member's dtype, with the same threads, in turns:

transformers    a model loaded anew, `model(ids, past_key_values=DynamicCache)`, default attention: logits of the
                new token, and nothing made of them
the same + K    and then the 256 likeliest ids with exact log-probabilities, the plain way (float32 log-softmax, topk)
served          `Member.forward` of feeds with top_k = 256: everything that a step asks of a member: the rollback, the
                packed forward, the normaliser over the vocabulary, the 256 likeliest, the tail
top 1           the same with top_k = 1: the normaliser and the likeliest alone

Every step takes back the token of the last one, so L stays; transformers' cache is put back outside the time. The
bound is on served / transformers, that is, with more work on our side. Milliseconds are medians; the ratio is the
median of the rounds' ratios, with quartiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks import prose
from benchmarks.ledger import Check, Findings, Value, arguments
from benchmarks.stopwatch import Spread, Timed, ratios, take_turns
from ensemble_core.config import Config
from ensemble_core.config_file import load_config
from ensemble_core.members.base import Feed, Member
from ensemble_core.members.loading.checkpoints import load_tokenizer, load_vocabulary, resolve_folder
from ensemble_core.members.loading.models import load_member

NUM_CANDIDATES = 256
BOUNDS = {(1, 256): 0.90, (8, 256): 0.60, (32, 256): 0.42, (32, 1024): 0.27}
CHUNK = 512


class OwnForward:
    """The stock model with B rows of L cached tokens, one token at a time."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    @torch.inference_mode()
    def fill(self, token_ids: list[int], batch: int) -> None:
        """Cache a prompt in every row; what comes next is the token that each step feeds."""
        self._cache = DynamicCache(config=self._model.config)
        self._model(torch.tensor([token_ids]), past_key_values=self._cache, logits_to_keep=1)
        self._cache.batch_repeat_interleave(batch)
        self._kept = [dict(vars(layer)) for layer in self._cache.layers]
        self._next = torch.tensor([token_ids[-1:]] * batch)

    def restore(self) -> None:
        """Undo the last step: a step makes new tensors, the old ones are put back."""
        for layer, kept in zip(self._cache.layers, self._kept, strict=True):
            vars(layer).update(kept)

    @torch.inference_mode()
    def logits(self) -> Tensor:
        """(B, V): of the new token."""
        return self._model(self._next, past_key_values=self._cache, logits_to_keep=1).logits[:, -1]  # type: ignore

    @torch.inference_mode()
    def candidates(self) -> Any:
        """The likeliest of the new token, as anybody would write it."""
        return self.logits().float().log_softmax(dim=1).topk(NUM_CANDIDATES, dim=1)


class PackedForward:
    """A member with B sequences of L cached tokens, one token at a time."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._feeds: list[Feed] = []

    def fill(self, token_ids: list[int], batch: int) -> None:
        """Cache a prompt in every sequence."""
        for feed in self._feeds:
            self._member.release(feed.seq_id)
        self._length = len(token_ids)
        for start in range(0, self._length, CHUNK):
            self._member.forward([Feed(0, token_ids[start : start + CHUNK], wanted=0)])
        for seq_id in range(1, batch):
            self._member.reuse(seq_id, token_ids)
        self._feeds = [Feed(seq_id, token_ids[-1:]) for seq_id in range(batch)]

    def step(self, top_k: int) -> None:
        """One token for every sequence, in the place of the last step's."""
        self._member.forward([replace(feed, top_k=top_k, keep=self._length) for feed in self._feeds])


def measure(
    name: str, own: OwnForward, packed: PackedForward, ids: list[int], batch: int, rounds: int
) -> tuple[dict[str, Value], Spread]:
    """One row of the table, and the spread of the ratio that the bound is on."""
    own.fill(ids, batch)
    packed.fill(ids, batch)
    seconds = take_turns(
        {
            "own": Timed(own.logits, own.restore),
            "served": lambda: packed.step(NUM_CANDIDATES),
            "own_k": Timed(own.candidates, own.restore),
            "top1": lambda: packed.step(1),
        },
        rounds,
        title=f"{name} B={batch} L={len(ids)}",
    )
    served = ratios(seconds["served"], seconds["own"])
    medians = {side: Spread.of(values).scaled(1e3).median for side, values in seconds.items()}
    row: dict[str, Value] = {
        "member": name,
        "B": batch,
        "L": len(ids),
        "transformers ms": medians["own"],
        "the same + K ms": medians["own_k"],
        "served ms": medians["served"],
        "top 1 ms": medians["top1"],
        "served / transformers": served.median,
        "quartiles": f"{served.low:.3f} .. {served.high:.3f}",
        "served / same + K": ratios(seconds["served"], seconds["own_k"]).median,
        "top 1 / transformers": ratios(seconds["top1"], seconds["own"]).median,
    }
    return row, served


def measure_member(
    name: str, config: Config, shapes: Sequence[tuple[int, int]], rounds: int
) -> tuple[list[dict[str, Value]], list[Check]]:
    """All shapes of one member, which is loaded twice: packed, and as transformers has it."""
    settings = config.members[name]
    folder = resolve_folder(settings)
    member = load_member(name, settings, folder, load_vocabulary(name, settings))
    own, packed = OwnForward(folder, getattr(torch, settings.dtype)), PackedForward(member)
    rows, checks = [], []
    for batch, length in shapes:
        ids = prose.token_ids(load_tokenizer(name, settings), 0, length)
        row, served = measure(name, own, packed, ids, batch, rounds)
        rows.append(row)
        if bound := BOUNDS.get((batch, length)):
            what = f"{name}: member forward / transformers' own, B = {batch}, L = {length}"
            checks.append(Check(what, served.median, "<=", bound))
    return rows, checks


def main() -> None:
    """Measure every member of the configuration."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    shapes = [(1, 256), (8, 256)] if args.quick else [(b, n) for n in (256, 1024) for b in (1, 8, 32)]
    rounds = 3 if args.quick else args.rounds
    config = load_config(args.config)
    rows, checks = [], []
    for name in config.members:
        more_rows, more_checks = measure_member(name, config, shapes, rounds)
        rows += more_rows
        checks += more_checks
    settings = {"rounds": rounds, "num_candidates": NUM_CANDIDATES, "quick": args.quick}
    Findings("member_forward", {"forwards": rows}, checks, settings).print()


if __name__ == "__main__":
    main()
