"""Run the commands of a folder of measurements, keep their JSON, hold figures against their bounds, fill a document.

    python -m benchmarks [NAME ...] [--quick] [--document]
    python -m studies [NAME ...] [--quick] [--document]

Each NAME is a process of its own. The last line of its output is JSON and is kept as results/NAME.json in the same
folder (with --quick in results/quick/, which git ignores). Then one table shows every figure that has a bound, from
all results that are kept. --document puts the tables, with machine and date, between the marks of the folder's
document; with --no-run it uses the results that are there. Knows nothing of what is measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ledger import (
    ROOT,
    Check,
    check_row,
    has_marks,
    machine_line,
    markdown,
    put_between,
    results_folder,
    table,
)

Kept = Mapping[str, Any]  # what `Findings.record` made, read from its JSON


@dataclass(frozen=True, slots=True)
class Suite:
    """A folder of commands. names: all of them, in the order of a run; page: the document with their tables."""

    package: str
    names: tuple[str, ...]
    page: Path

    def records(self, quick: bool = False) -> dict[str, Kept]:
        """Name -> its kept result, for those that have one."""
        paths = {name: results_folder(self.package, quick) / f"{name}.json" for name in self.names}
        return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}

    def run(self, name: str, quick: bool) -> bool:
        """Run one command, pass its output on and keep its last line; False where it failed."""
        print(f"\n== {name}", flush=True)
        started = time.monotonic()
        last = _last_line([sys.executable, "-m", f"{self.package}.{name}", *(["--quick"] if quick else [])])
        if last is None:
            print(f"{name} failed", file=sys.stderr)
            return False
        folder = results_folder(self.package, quick)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(json.loads(last), indent=1) + "\n")
        print(f"({time.monotonic() - started:.0f} s)")
        return True


def _last_line(command: Sequence[str]) -> str | None:
    """The JSON that a command ends with; None where it failed. All other lines are passed on."""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last = ""
        for last in process.stdout:
            if not last.startswith("{"):
                print(last, end="", flush=True)
    return None if process.returncode or not last.startswith("{") else last


def checks(records: Mapping[str, Kept]) -> list[dict[str, Any]]:
    """Every figure with a bound, as rows of a table."""
    found = [{k: v for k, v in each.items() if k != "met"} for r in records.values() for each in r["checks"]]
    return [check_row(Check(**each)) for each in found]


def section(record: Kept) -> str:
    """A result's tables for the document, with the machine and the date."""
    tables = [markdown(rows) for rows in record["tables"].values() if rows]
    settings = ", ".join(f"{name} {value}" for name, value in record["settings"].items() if name != "quick")
    return "\n\n".join(["", *tables, f"_{machine_line(record['machine'])}; {settings}_", ""])


def fill(text: str, records: Mapping[str, Kept]) -> str:
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


def main(suite: Suite) -> None:
    """Run what is named, or everything."""
    args = _arguments(suite)
    wanted = () if args.no_run else args.names or suite.names
    failed = [name for name in wanted if not suite.run(name, args.quick)]
    records = suite.records(args.quick)
    print("\n" + table(checks(records)))
    if args.document:
        suite.page.write_text(fill(suite.page.read_text(), records))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _arguments(suite: Suite) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {suite.package}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = ", ".join(suite.names)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {known}; all if none is named")
    parser.add_argument("--quick", action="store_true", help="few rounds: whether it runs, not what it costs")
    parser.add_argument("--no-run", action="store_true", help="use the results that are there")
    parser.add_argument("--document", action="store_true", help=f"fill the tables of {suite.page.name}")
    args = parser.parse_args()
    if unknown := set(args.names) - set(suite.names):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {known}")
    if args.quick and args.document:
        parser.error("--quick measures nothing that a document should hold")
    return args
