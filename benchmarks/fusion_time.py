"""Fusion time per step on the demo pair's own vocabularies, matrices and answers.

    python benchmarks/fusion_time.py --config configs/demo.yaml --ensemble duet

Each of B rows is another prefix of a text, answered by both members (one prefill each). Prints a table
(milliseconds a step, medians) and then one JSON line. A fusion that needs three members gets the assistant twice.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from ensemble_core.config import load_config
from ensemble_core.factory import Spaces
from ensemble_core.fusion.base import Fusion, FusionSpace, build_fusion, parse_options
from ensemble_core.members.base import Candidates, Feed, Member
from ensemble_core.members.checkpoints import load_vocabulary, resolve_folder
from ensemble_core.members.local import load_member

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


def answers(member: Member, num_rows: int, top_k: int) -> Candidates:
    """A member's candidates after each of `num_rows` prefixes of the text."""
    words = TEXT.split(" ")
    prefixes = [" ".join(words[: i + 4]) for i in range(num_rows)]
    feeds = [Feed(i, member.vocabulary.encode(prefix)) for i, prefix in enumerate(prefixes)]
    found = member.forward(feeds, top_k)
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


def built(name: str, options: dict[str, Any], space: FusionSpace) -> Fusion:
    """A fusion over the pair, or over three where it needs them."""
    return build_fusion(name, parse_options(name, options, "fusion"), space)


def main() -> None:
    """Measure every method at each K and B."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--ensemble", default="duet")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--candidates", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    config = load_config(args.config)
    ensemble = config.ensembles[args.ensemble]
    names = (ensemble.main, *(name for name in ensemble.members if name != ensemble.main))
    vocabularies = {name: load_vocabulary(name, config.members[name]) for name in names}
    members = {
        name: load_member(name, config.members[name], resolve_folder(config.members[name]), vocabularies[name])
        for name in names
    }
    widest = max(args.candidates)
    given = [answers(members[name], max(args.batch), widest) for name in names]
    pair = Spaces(config, members).space(names, tuple(ensemble.members))
    rows = []
    for name, options in METHODS:
        order = (0, 1, 1) if name == "robust" else (0, 1)
        space = FusionSpace(
            [pair.vocabularies[i] for i in order],
            pair.matrices,
            pair.device,
            ("main", "assistant", "twin")[: len(order)],
        )
        fusion = built(name, options, space)
        row: dict[str, str | float] = {"fusion": name, "options": json.dumps(options)}
        for top_k in args.candidates:
            for batch in args.batch:
                parts = [given[i].best(top_k).rows(range(batch)) for i in order]
                row[f"K{top_k}_B{batch}_ms"] = milliseconds(fusion, parts, args.repeats)
        rows.append(row)
        print_row(row, header=len(rows) == 1)
    print(json.dumps({"benchmark": "fusion_time", "ensemble": args.ensemble, "rows": rows}))


def print_row(row: dict[str, str | float], *, header: bool) -> None:
    """One line of the table."""
    widths = [12, 44, *[13] * (len(row) - 2)]
    if header:
        print(" ".join(f"{name:>{width}}" for name, width in zip(row, widths, strict=True)))
    cells = [f"{value:.2f}" if isinstance(value, float) else value for value in row.values()]
    print(" ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))


if __name__ == "__main__":
    main()
