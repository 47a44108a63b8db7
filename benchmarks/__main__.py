"""Run the benchmarks, keep their JSON, hold every figure against its bound, fill the tables of the document.

    python -m benchmarks [NAME ...] [--quick] [--document]

Each benchmark is a process of its own, whose last line is kept as benchmarks/results/NAME.json (with --quick in
benchmarks/results/quick/, which git ignores). Then one table shows all figures that have a bound, from all results
that are there. --document puts every table, with its machine and date, between the marks of docs/performance.md, or
of docs/methods.md for what methods are worth and cost; with --no-run from the results that are there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ledger import (
    RESULTS,
    ROOT,
    Check,
    check_row,
    has_marks,
    machine_line,
    markdown,
    put_between,
    table,
)

NAMES = (
    "member_forward",
    "step_overhead",
    "serving",
    "prefix_reuse",
    "growth",
    "against_vllm",
    "build_matrices",
)
# What methods are worth and cost: run only when named, since the first two need ../shared/data.
STUDIES = ("fusion_table", "relative_sweep")
EVIDENCE = (*STUDIES, "trained_pair", "fusion_time")
DOCUMENT = ROOT / "docs" / "performance.md"
METHODS = ROOT / "docs" / "methods.md"

Record = Mapping[str, Any]


def run(name: str, options: Sequence[str], folder: Path) -> bool:
    """One benchmark, its output passed on and its last line kept; False where it failed."""
    print(f"\n== {name}", flush=True)
    started = time.monotonic()
    command = [sys.executable, "-m", f"benchmarks.{name}", *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last = ""
        for last in process.stdout:
            if not last.startswith("{"):
                print(last, end="", flush=True)
    if process.returncode or not last.startswith("{"):
        print(f"{name} failed with {process.returncode}", file=sys.stderr)
        return False
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(json.loads(last), indent=1) + "\n")
    print(f"({time.monotonic() - started:.0f} s)")
    return True


def results(folder: Path) -> dict[str, Record]:
    """Name -> what was kept of it, in the order of NAMES and EVIDENCE."""
    paths = {name: folder / f"{name}.json" for name in NAMES + EVIDENCE}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def checks(records: Mapping[str, Record]) -> list[dict[str, Any]]:
    """Every figure with a bound, as rows."""
    found = [{k: v for k, v in each.items() if k != "met"} for r in records.values() for each in r["checks"]]
    return [check_row(Check(**each)) for each in found]


def section(record: Record) -> str:
    """A result's tables for the document, with the machine and the date."""
    tables = [markdown(rows) for rows in record["tables"].values() if rows]
    settings = ", ".join(f"{name} {value}" for name, value in record["settings"].items() if name != "quick")
    return "\n\n".join(["", *tables, f"_{machine_line(record['machine'])}; {settings}_", ""])


def fill(text: str, records: Mapping[str, Record]) -> str:
    """A document with the tables of these results: between marks of their own where it has them, else together.

    A table without rows leaves what stands between its own marks. Bounds go where the document has a place for them.
    """
    for name, record in records.items():
        apart = {title: f"{name}: {title}" for title in record["tables"] if has_marks(text, f"{name}: {title}")}
        rest = {title: rows for title, rows in record["tables"].items() if title not in apart}
        text = put_between(text, name, section({**record, "tables": rest}))
        for title, mark in apart.items():
            if rows := record["tables"][title]:
                text = put_between(text, mark, f"\n{markdown(rows)}\n")
    return put_between(text, "bounds", f"\n{markdown(checks(records))}\n") if has_marks(text, "bounds") else text


def main() -> None:
    """Run what is named, or everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(NAMES + EVIDENCE)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {known}; {len(NAMES)} if none is named")
    parser.add_argument("--quick", action="store_true", help="few rounds: whether it runs, not what it costs")
    parser.add_argument("--no-run", action="store_true", help="take the results that are there")
    parser.add_argument("--document", action="store_true", help="fill the tables of the documents")
    args = parser.parse_args()
    if unknown := set(args.names) - set(NAMES + EVIDENCE):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {known}")
    if args.quick and args.document:
        parser.error("--quick measures nothing that a document should hold")
    folder = RESULTS / "quick" if args.quick else RESULTS
    wanted = () if args.no_run else args.names or NAMES
    failed = [name for name in wanted if not run(name, ["--quick"] if args.quick else [], folder)]
    records = results(folder)
    print("\n" + table(checks(records)))
    if args.document:
        for page, names in ((DOCUMENT, NAMES), (METHODS, EVIDENCE)):
            own = {name: record for name, record in records.items() if name in names}
            page.write_text(fill(page.read_text(), own))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
