"""Run the benchmarks, keep their JSON, hold every figure against its bound, fill the tables of the document.

    python -m benchmarks [NAME ...] [--quick] [--document]

Each benchmark is a process of its own, whose last line is kept as benchmarks/results/NAME.json (with --quick in
benchmarks/results/quick/, which git ignores). Then one table shows all figures that have a bound, from all results
that are there. --document puts every table, with its machine and date, between the marks of docs/performance.md
(trained_pair's of docs/methods.md); with --no-run from the results that are there.
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

from benchmarks.ledger import RESULTS, ROOT, Check, check_row, machine_line, markdown, put_between, table

NAMES = (
    "member_forward",
    "step_overhead",
    "serving",
    "prefix_reuse",
    "growth",
    "against_vllm",
    "build_matrices",
)
# What fusions are worth: they need ../shared/data and run only when named; their tables stand in docs/methods.md.
STUDIES = ("fusion_table", "relative_sweep")
DOCUMENT = ROOT / "docs" / "performance.md"
METHODS = ROOT / "docs" / "methods.md"
ELSEWHERE = {"trained_pair": METHODS, "fusion_time": METHODS}  # evidence, run where it is named: its page

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
    """Name -> what was kept of it, in the order of NAMES and STUDIES."""
    paths = {name: folder / f"{name}.json" for name in NAMES + STUDIES}
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
    """The document with the tables of these results."""
    for name, record in records.items():
        text = put_between(text, name, section(record))
    return put_between(text, "bounds", f"\n{markdown(checks(records))}\n")


def fill_studies(text: str, records: Mapping[str, Record]) -> str:
    """The document of methods with each table of these results between marks of its own."""
    for name, record in records.items():
        text = put_between(text, name, section({**record, "tables": {}}))
        for title, rows in record["tables"].items():
            if rows:
                text = put_between(text, f"{name}: {title}", f"\n{markdown(rows)}\n")
    return text


def fill_elsewhere(folder: Path) -> None:
    """Put the results of ELSEWHERE that are there into their pages."""
    for name, page in ELSEWHERE.items():
        if (path := folder / f"{name}.json").exists():
            page.write_text(put_between(page.read_text(), name, section(json.loads(path.read_text()))))


def main() -> None:
    """Run what is named, or everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join([*NAMES, *STUDIES, *ELSEWHERE])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {known}; {len(NAMES)} if none is named")
    parser.add_argument("--quick", action="store_true", help="few rounds: whether it runs, not what it costs")
    parser.add_argument("--no-run", action="store_true", help="take the results that are there")
    parser.add_argument("--document", action="store_true", help="fill the tables of docs/performance.md")
    args = parser.parse_args()
    if unknown := set(args.names) - {*NAMES, *STUDIES, *ELSEWHERE}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {known}")
    if args.quick and args.document:
        parser.error("--quick measures nothing that a document should hold")
    folder = RESULTS / "quick" if args.quick else RESULTS
    wanted = () if args.no_run else args.names or NAMES
    failed = [name for name in wanted if not run(name, ["--quick"] if args.quick else [], folder)]
    records = results(folder)
    print("\n" + table(checks(records)))
    if args.document:
        studies = {name: record for name, record in records.items() if name in STUDIES}
        own = {name: record for name, record in records.items() if name not in studies}
        DOCUMENT.write_text(fill(DOCUMENT.read_text(), own))
        METHODS.write_text(fill_studies(METHODS.read_text(), studies))
        fill_elsewhere(folder)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
