"""Fusion time per step on the demo pair's own vocabularies, matrices and answers.

    python -m benchmarks.fusion_time [--config configs/demo.yaml] [--ensemble duet] [--quick]

Each of B rows is another prefix of a text, answered by both members (one prefill each) with K candidates.
Milliseconds a step, medians. k is the width of the matrices' rows, for fusions in relative space: narrower rows
keep their largest entries, wider ones hold each entry several times in equal parts. A fusion that needs three
members gets the assistant twice.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.ledger import Findings, Value, arguments
from ensemble_core.config_file import load_config
from ensemble_core.factory import Spaces
from ensemble_core.fusion.base import FUSIONS, Fusion, FusionSpace, build_fusion
from ensemble_core.member_config import MemberConfig
from ensemble_core.members.base import Candidates, Feed, Member, ask
from ensemble_core.members.loading.checkpoints import load_vocabulary, resolve_folder
from ensemble_core.members.loading.models import load_member
from ensemble_core.transfer.matrix import TransferMatrix

TEXT = (
    "Everybody who has lived by the sea knows that the weather there can change within minutes. A fisherman told us "
    "that he once left the harbour under a clear sky, and an hour later could not see the bow of his own boat. He "
    "had learnt from his father to listen: to the gulls, to the bell on the pier, and to the sound of the water."
)
METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("relative", {"solver": "em"}),
    ("relative", {"solver": "search"}),
    ("projection", {"pool": "linear"}),
    ("projection", {"pool": "log-linear"}),
    ("union", {}),
    ("gac", {}),
    ("eva", {}),
    ("contrastive", {"expert": "assistant", "base": "main"}),
    ("robust", {}),
    ("core", {"base": {"name": "projection"}}),
    ("core", {"base": {"name": "relative"}}),
)
WIDTHS = (8, 32, 128)  # k


def answers(member: Member, num_rows: int, top_k: int) -> Candidates:
    """A member's candidates after each of `num_rows` prefixes of the text."""
    words = TEXT.split(" ")
    prefixes = [" ".join(words[: i + 4]) for i in range(num_rows)]
    feeds = [Feed(i, member.vocabulary.encode(prefix)) for i, prefix in enumerate(prefixes)]
    found = ask(member, feeds, top_k)
    for feed in feeds:
        member.release(feed.seq_id)
    return found


def milliseconds(fusion: Fusion, parts: Sequence[Candidates], repeats: int) -> float:
    """The median time of a call."""
    weights = torch.full((len(parts[0]), len(parts)), 1.0 / len(parts))
    times = []
    for _ in range(repeats + 3):
        started = time.perf_counter()
        fusion.fuse(parts, weights)
        times.append(time.perf_counter() - started)
    return 1e3 * median(times[3:])


def resized(matrix: TransferMatrix, width: int) -> TransferMatrix:
    """The same matrix with rows of another width, for its time alone."""
    own = matrix.columns.shape[1]
    if width <= own:
        values, order = matrix.values.float().topk(width, dim=1)
        return TransferMatrix(matrix.columns.gather(1, order), values, matrix.anchor_ids)
    times = -(-width // own)
    return TransferMatrix(
        matrix.columns.repeat(1, times), (matrix.values.float() / times).repeat(1, times), matrix.anchor_ids
    )


class FusionBench:
    """The ensemble's space, and what its members said of the prefixes."""

    def __init__(self, path: Path, ensemble: str, num_rows: int, num_candidates: int) -> None:
        config = load_config(path)
        chosen = config.ensembles[ensemble]
        names = (chosen.main, *(name for name in chosen.members if name != chosen.main))
        members = {name: _loaded(name, config.members[name]) for name in names}
        self._given = [answers(members[name], num_rows, num_candidates) for name in names]
        self._pair = Spaces(config, members).space(names, tuple(chosen.members))
        self._matrices = self._pair.matrices()

    def row(
        self,
        name: str,
        options: dict[str, Any],
        width: int | None,
        shapes: Sequence[tuple[int, int]],
        repeats: int,
    ) -> dict[str, Value]:
        """A row of the table: shapes are (K, B); width: k, None where no matrix takes part."""
        order = (0, 1, 1) if name == "robust" else (0, 1)
        matrices = self._matrices if width is None else [resized(matrix, width) for matrix in self._matrices]
        space = FusionSpace(
            [self._pair.vocabularies[i] for i in order],
            lambda: matrices,
            self._pair.device,
            ("main", "assistant", "twin")[: len(order)],
        )
        fusion = build_fusion(name, FUSIONS.parse(name, options, "fusion"), space)
        row: dict[str, Value] = {"fusion": " ".join([name, *_words(options)]), "k": width or "-"}
        for num, batch in shapes:
            parts = [self._given[i].best(num).rows(range(batch)) for i in order]
            row[f"K {num}, B {batch}"] = milliseconds(fusion, parts, repeats)
        return row


def _loaded(name: str, settings: MemberConfig) -> Member:
    return load_member(name, settings, resolve_folder(settings), load_vocabulary(name, settings))


def _words(options: Any) -> list[str]:
    """The values of options, within one another, too."""
    if isinstance(options, dict):
        return [word for value in options.values() for word in _words(value)]
    return [] if options in ("assistant", "main") else [str(options)]


def main() -> None:
    """Measure every method at each K, B and k."""
    parser = arguments(__doc__)
    parser.add_argument("--ensemble", default="duet")
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    repeats = 3 if args.quick else args.repeats
    shapes = [(num, batch) for num in (64, 256) for batch in (1, 32)]
    bench = FusionBench(args.config, args.ensemble, 32, 256)
    rows = []
    for name, options in METHODS:
        relative = "relative" in (name, options.get("base", {}).get("name") if name == "core" else None)
        for width in WIDTHS if relative else (None,):
            rows.append(bench.row(name, options, width, shapes, repeats))
    settings = {"ensemble": args.ensemble, "repeats": repeats, "quick": args.quick}
    Findings("fusion_time", {"fusions": rows}, settings=settings).print()


if __name__ == "__main__":
    main()
