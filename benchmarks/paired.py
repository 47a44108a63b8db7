"""One benchmark in two trees, in turns: this one and an earlier commit's. Did anything get slower?

    python -m benchmarks.paired NAME --base REV [--rounds 3] [--quick] [-- OPTIONS OF THE BENCHMARK]

The earlier commit is checked out into a temporary worktree, and the transfer matrices of this tree are lent to it.
Each round runs the benchmark once in each tree, a process each, the order swapped from round to round. Every figure
of its tables is compared: ratio is this tree's over the base's, the median over rounds. The first table has one line
for each column of figures, the geometric mean of its ratios. The base runs its own version of the benchmark; one that
it does not have yet is lent to it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from tqdm import tqdm

from benchmarks.ledger import ROOT, Findings, TableRow

Place = tuple[str, int, str]  # table, row, column


@contextmanager
def earlier_tree(revision: str, name: str) -> Iterator[Path]:
    """A worktree of the revision, ready to run the benchmark."""
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "base"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", "--quiet", str(tree), revision], check=True)
        try:
            for folder in (each for each in (ROOT / "matrices").iterdir() if each.is_dir()):
                shutil.copytree(folder, tree / "matrices" / folder.name, dirs_exist_ok=True)
            if not (lent := tree / "benchmarks" / f"{name}.py").exists():
                shutil.copy(ROOT / "benchmarks" / f"{name}.py", lent)
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def run(tree: Path, name: str, options: Sequence[str]) -> Mapping[str, Any]:
    """The JSON of one run in a tree. Raises SystemExit with the end of what it said where it fails."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *options]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed in {tree} with {done.returncode}:\n{done.stderr[-3000:]}")
    record: Mapping[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return record


def figures(record: Mapping[str, Any]) -> dict[Place, float]:
    """Every figure of a record's tables that can be divided by."""
    return {
        (title, number, column): value
        for title, rows in record["tables"].items()
        for number, row in enumerate(rows)
        for column, value in row.items()
        if isinstance(value, float) and value > 0
    }


def label(row: TableRow) -> str:
    """What a row is of: all that stands before its first figure."""
    words = itertools.takewhile(lambda each: not isinstance(each[1], float), row.items())
    return ", ".join(value if isinstance(value, str) else f"{column} {value}" for column, value in words)


def compare(base: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> dict[str, list[TableRow]]:
    """Tables of ratios, of whole columns and of single figures: those that all runs have, by their places."""
    before, after = ([figures(record) for record in records] for records in (base, now))
    rows: list[TableRow] = []
    by_column: dict[str, list[float]] = {}
    for place in (each for each in before[0] if all(each in side for side in (*before, *after))):
        title, number, column = place
        ratios = [new[place] / old[place] for old, new in zip(before, after, strict=True)]
        by_column.setdefault(column, []).append(median(ratios))
        rows.append(
            {
                "row": label(base[0]["tables"][title][number]),
                "figure": column,
                "base": median(each[place] for each in before),
                "now": median(each[place] for each in after),
                "ratio": median(ratios),
                "over rounds": f"{min(ratios):.3f} .. {max(ratios):.3f}",
            }
        )
    columns: list[TableRow] = [
        {"figure": name, "rows": len(values), "mean ratio": geometric_mean(values)}
        for name, values in by_column.items()
    ]
    return {"columns": columns, "figures": rows}


def main() -> None:
    """Run both in turns, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", help="of a benchmark")
    parser.add_argument("--base", required=True, metavar="REV", help="the earlier commit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of few: whether it runs")
    parser.add_argument("options", nargs="*", help="for the benchmark, behind --")
    args = parser.parse_args()
    rounds, options = (1, ["--quick", *args.options]) if args.quick else (args.rounds, args.options)
    seen: dict[bool, list[Mapping[str, Any]]] = {True: [], False: []}
    with earlier_tree(args.base, args.name) as tree:
        for turn in tqdm(range(rounds), desc=args.name, unit="round", disable=None):
            for is_base in (True, False) if turn % 2 == 0 else (False, True):
                seen[is_base].append(run(tree if is_base else ROOT, args.name, options))
    tables = compare(seen[True], seen[False])
    settings = {"name": args.name, "base": args.base, "rounds": rounds, "quick": args.quick}
    Findings("paired", tables, settings=settings).print()


if __name__ == "__main__":
    main()
