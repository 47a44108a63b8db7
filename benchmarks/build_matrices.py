"""Build and load the transfer matrices of a configuration, and say what that costs.

    python benchmarks/build_matrices.py --config configs/demo.yaml [--deepen]

Builds into a temporary folder unless --keep is given (then into the configuration's own). Prints a table,
then one line of JSON. Seconds are wall-clock, sizes bytes; `peak_rss` is of the whole process, vocabularies
and libraries included. --deepen also measures what the paper's recipe would retain.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from ensemble_core.config import Config, load_config
from ensemble_core.errors import TransferMatrixError
from ensemble_core.members.checkpoints import load_vocabulary, resolve_folder
from ensemble_core.transfer.build import BuildReport, build_matrices, member_sets, origin_of, recipe_of
from ensemble_core.transfer.builder import Quality, Recipe, build_matrix, require_retained
from ensemble_core.transfer.embeddings import load_embeddings
from ensemble_core.transfer.matrix import common_anchors
from ensemble_core.transfer.store import load_matrix, matrix_path


@dataclass(frozen=True, slots=True)
class Row:
    """One measured matrix."""

    member: str
    recipe: str
    build_seconds: float
    num_bytes: int
    retained: Quality
    refused: str | None


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--keep", action="store_true", help="write into the configuration's matrices folder")
    parser.add_argument("--deepen", action="store_true", help="measure the paper's recipe as well")
    args = parser.parse_args()
    config = load_config(args.config)
    with tempfile.TemporaryDirectory() as scratch:
        if not args.keep:
            config = _into(config, Path(scratch))
        rows = [_row(report, config) for report in build_matrices(config, force=False, only_missing=False)]
        peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        load_seconds = _load_all(config, str(args.config))
    if args.deepen:
        rows += _deepen(config)
    _print(rows, peak_rss, _embedding_bytes(config), load_seconds)


def _into(config: Config, folder: Path) -> Config:
    matrices = config.matrices.model_copy(update={"folder": folder})
    return config.model_copy(update={"matrices": matrices})


def _row(report: BuildReport, config: Config) -> Row:
    return Row(
        report.member, config.matrices.recipe, report.seconds, report.num_bytes, report.quality, refused=None
    )


def _load_all(config: Config, source: str) -> float:
    """Seconds to load every matrix with all checks, the vocabularies and anchors being there."""
    recipe = recipe_of(config.matrices)
    seconds = 0.0
    for members in member_sets(config):
        vocabularies = {name: load_vocabulary(name, config.members[name]) for name in members}
        anchors = common_anchors(list(vocabularies.values()))
        start = time.perf_counter()
        for name in members:
            load_matrix(
                matrix_path(config.matrices.folder, members, name, recipe.name),
                member=name,
                vocabulary=vocabularies[name],
                anchors=anchors,
                recipe=recipe,
                rebuild=f"unisono build --config {source}",
                origin=origin_of(config.members[name]),
            )
        seconds += time.perf_counter() - start
    return seconds


def _deepen(config: Config) -> list[Row]:
    """The paper's recipe at the same top_k: what it retains, and the refusal."""
    recipe = Recipe("deepen", config.matrices.top_k, config.matrices.temperature)
    rows = []
    for members in member_sets(config):
        vocabularies = {name: load_vocabulary(name, config.members[name]) for name in members}
        anchors = common_anchors(list(vocabularies.values()))
        for name in members:
            start = time.perf_counter()
            embeddings = load_embeddings(resolve_folder(config.members[name]))
            _, quality = build_matrix(vocabularies[name], embeddings, anchors, recipe)
            seconds = time.perf_counter() - start
            refused = _refusal(name, quality, recipe, config.matrices.min_retained)
            rows.append(Row(name, recipe.name, seconds, 0, quality, refused))
    return rows


def _refusal(member: str, quality: Quality, recipe: Recipe, minimum: float) -> str | None:
    try:
        require_retained(member, quality, recipe, minimum)
    except TransferMatrixError as error:
        return str(error)
    return None


def _embedding_bytes(config: Config) -> int:
    names = {name for members in member_sets(config) for name in members}
    return sum(load_embeddings(resolve_folder(config.members[name])).nbytes for name in names)


def _print(rows: list[Row], peak_rss: int, embedding_bytes: int, load_seconds: float) -> None:
    print(f"{'member':<12} {'recipe':<8} {'build s':>8} {'MB':>7} {'retained':>9} {'of anchors':>11}")
    for row in rows:
        megabytes = f"{row.num_bytes / 1e6:.1f}" if row.num_bytes else "refused" if row.refused else "-"
        print(
            f"{row.member:<12} {row.recipe:<8} {row.build_seconds:>8.1f} {megabytes:>7} "
            f"{row.retained.median:>9.4f} {row.retained.median_anchors:>11.4f}"
        )
    print(f"peak RSS {peak_rss / 1e9:.2f} GB (embedding tables {embedding_bytes / 1e9:.2f} GB)")
    print(f"load of all, with checks: {load_seconds:.2f} s")
    figures = {"peak_rss": peak_rss, "embedding_bytes": embedding_bytes, "load_seconds": load_seconds}
    print(json.dumps({"matrices": [asdict(row) for row in rows], **figures}))


if __name__ == "__main__":
    main()
