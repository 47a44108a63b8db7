"""The comparison as a picture: what our ensemble takes of the time that vLLM takes for its members one by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.ledger import TableRow


def draw(rows: Sequence[TableRow], ensemble: str, path: Path) -> None:
    """A bar for each row of the tables, below 1 where ours is faster; written as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names, ratios = [str(row["what"]) for row in rows], [float(str(row["ours / sum"])) for row in rows]
    figure, panel = pyplot.subplots(figsize=(8, 0.4 * len(rows) + 1.2), layout="constrained")
    bars = panel.barh(names, ratios, color=["C0" if ratio <= 1.0 else "C3" for ratio in ratios])
    panel.bar_label(bars, [f" {ratio:.2f}" for ratio in ratios])
    panel.axvline(1.0, color="0.3", lw=1)
    panel.invert_yaxis()
    panel.set_xlim(0, max(1.2, 1.1 * max(ratios)))
    panel.set_xlabel(f"time of {ensemble} / sum of vLLM's best for its members")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
