"""What a benchmark or a study reports: rows of tables, figures with their bounds, the machine; as text and as JSON.

A report is printed as tables and then as one line of JSON, the last of the output. The same rows make the Markdown
of docs/performance.md and docs/studies.md. Knows nothing of what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "configs" / "demo.yaml"

Value = str | int | float | None
TableRow = Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class Check:
    """A figure and the bound that it must hold."""

    what: str
    figure: float
    sense: Literal["<=", ">="]
    bound: float

    @property
    def met(self) -> bool:
        """Whether it holds; a figure that is not a number does not."""
        return self.figure <= self.bound if self.sense == "<=" else self.figure >= self.bound


@dataclass(frozen=True, slots=True)
class Findings:
    """One benchmark's outcome. tables: by name; settings: what a reader needs to repeat it."""

    benchmark: str
    tables: Mapping[str, Sequence[TableRow]]
    checks: Sequence[Check] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def print(self) -> None:
        """The table, the bounds, and last the JSON line."""
        tables = [*self.tables.values(), [check_row(check) for check in self.checks]]
        print("\n\n".join(table(rows) for rows in tables if rows))
        print(json.dumps(self.record()))

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "benchmark": self.benchmark,
            "machine": machine(),
            "settings": dict(self.settings),
            "tables": {name: [dict(row) for row in rows] for name, rows in self.tables.items()},
            "checks": [asdict(check) | {"met": check.met} for check in self.checks],
        }


def results_folder(package: str, quick: bool) -> Path:
    """Where results of `benchmarks` or `studies` are kept; those of --quick apart, since they mean nothing."""
    folder = ROOT / package / "results"
    return folder / "quick" if quick else folder


def arguments(doc: str | None, *, config: bool = True) -> argparse.ArgumentParser:
    """The options that all benchmarks share; the caller adds its own."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if config:
        parser.add_argument("--config", type=Path, default=DEMO, help="the configuration to measure")
    parser.add_argument("--quick", action="store_true", help="few rounds: whether it runs, not what it costs")
    return parser


def machine() -> dict[str, Any]:
    """What the figures depend on. No name of the host."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "threads": _num_threads(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "unisono")},
        "commit": _commit(),
    }


def machine_line(facts: Mapping[str, Any]) -> str:
    """One sentence for a document."""
    return (
        f"{facts['date']}; {facts['cpu']}, {facts['cores']} cores, {facts['memory_gb']:.0f} GB; "
        f"{facts['threads']} threads; torch {facts['torch']}, transformers {facts['transformers']}; "
        f"commit {facts['commit']}"
    )


def _cpu_model() -> str:
    """The processor, with the bf16 instructions that it has."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    model = re.search(r"model name\s*: (.*)", text)
    flags = [name for name in ("avx512_bf16", "amx_bf16") if f" {name}" in text]
    return " ".join([model[1] if model else platform.machine(), *flags])


def _num_threads() -> int:
    """torch's, in a process that has loaded it; else what it would take."""
    if torch := sys.modules.get("torch"):
        return int(torch.get_num_threads())
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The working tree's, with a + where files were changed since."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude", "*"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def check_row(check: Check) -> dict[str, Value]:
    """As a row of a table."""
    return {
        "what": check.what,
        "figure": check.figure,
        "bound": f"{check.sense} {cell(check.bound)}",
        "": "met" if check.met else "NOT MET",
    }


def cell(value: Value) -> str:
    """A value as tables show it: the digits that matter."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    size = abs(value)
    return f"{value:.0f}" if size >= 1000 else f"{value:.1f}" if size >= 10 else f"{value:.3f}"


def table(rows: Sequence[TableRow]) -> str:
    """Columns of the first row, aligned: text to the left, numbers to the right."""
    if not rows:
        return "(no rows)"
    grid = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in grid) for i in range(len(grid[0]))]
    left = [isinstance(value, str) for value in rows[0].values()]
    lines = [
        "  ".join(c.ljust(w) if is_text else c.rjust(w) for c, w, is_text in zip(line, widths, left, strict=True))
        for line in grid
    ]
    return "\n".join(line.rstrip() for line in lines)


def markdown(rows: Sequence[TableRow]) -> str:
    """The same table for a document."""
    if not rows:
        return "(no rows)"
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(v) for v in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def has_marks(text: str, name: str) -> bool:
    """Whether a document has a place for what `put_between` puts there."""
    return f"<!-- begin {name} -->" in text


def put_between(text: str, name: str, body: str) -> str:
    """`text` with what stands between the marks of `name` replaced. Raises ValueError where a mark is missing.

    Marks are comments of Markdown: <!-- begin NAME --> and <!-- end NAME -->.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    start, stop = text.find(begin), text.find(end)
    if start < 0 or stop < start:
        raise ValueError(f"the document has no {begin} ... {end}; add both marks where the table belongs")
    return f"{text[: start + len(begin)]}\n{body}\n{text[stop:]}"
