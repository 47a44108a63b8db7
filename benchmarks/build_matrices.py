"""Build and load the transfer matrices of a configuration, and say what that costs.

    python -m benchmarks.build_matrices [--config configs/demo.yaml] [--deepen] [--quick]

Builds once into a temporary folder unless --keep is given (then into the configuration's own). Seconds are
wall-clock; the peak is of the whole process, vocabularies and libraries included, and may pass the embedding tables
by 2 GB. Loading is with all checks, the median of several. --deepen also measures what the paper's recipe would
retain. --quick builds nothing and loads what is there.
"""

from __future__ import annotations

import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.ledger import Check, Findings, Value, arguments
from benchmarks.stopwatch import Spread
from ensemble_core.config import Config
from ensemble_core.config_file import load_config
from ensemble_core.errors import TransferMatrixError
from ensemble_core.members.loading.checkpoints import load_vocabulary, resolve_folder
from ensemble_core.transfer.build import BuildReport, build_matrices, member_sets, origin_of, recipe_of
from ensemble_core.transfer.embeddings import load_embeddings
from ensemble_core.transfer.matrix import common_anchors
from ensemble_core.transfer.rows import Quality, RowRecipe, build_matrix, require_retained
from ensemble_core.transfer.store import load_matrix, matrix_path

ALLOWED_BYTES = 2e9  # beyond the embedding tables
LOADS = 5


@dataclass(frozen=True, slots=True)
class Built:
    """One measured matrix."""

    member: str
    recipe: str
    build_seconds: float
    num_bytes: int
    retained: Quality
    refused: str | None = None

    def row(self) -> dict[str, Value]:
        """Of the table."""
        return {
            "member": self.member,
            "recipe": self.recipe,
            "build s": self.build_seconds,
            "MB": self.num_bytes / 1e6 if self.num_bytes else "refused" if self.refused else None,
            "retained": self.retained.median,
            "of anchors": self.retained.median_anchors,
        }


def main() -> None:
    """Run the benchmark."""
    parser = arguments(__doc__)
    parser.add_argument("--keep", action="store_true", help="write into the configuration's matrices folder")
    parser.add_argument("--deepen", action="store_true", help="measure the paper's recipe as well")
    args = parser.parse_args()
    config = load_config(args.config)
    with tempfile.TemporaryDirectory() as scratch:
        if not args.keep and not args.quick:
            config = _into(config, Path(scratch))
        built = [] if args.quick else _build(config)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        loads = Spread.of([_load_all(config, str(args.config)) for _ in range(LOADS)])
    if args.deepen:
        built += _deepen(config)
    tables = _embedding_bytes(config)
    whole: dict[str, Value] = {
        "peak memory GB": peak / 1e9,
        "embedding tables GB": tables / 1e9,
        "load of all s": loads.median,
        "quartiles": f"{loads.low:.2f} .. {loads.high:.2f}",
    }
    bound = Check(
        "build: peak memory beyond the embedding tables, GB", (peak - tables) / 1e9, "<=", ALLOWED_BYTES / 1e9
    )
    rows = {"matrices": [each.row() for each in built], "process": [whole]}
    Findings("build_matrices", rows, [] if args.quick else [bound], {"quick": args.quick}).print()


def _build(config: Config) -> list[Built]:
    reports = build_matrices(config, force=False, only_missing=False)
    return [_built(report, config.matrices.recipe) for report in reports]


def _built(report: BuildReport, recipe: str) -> Built:
    return Built(report.member, recipe, report.seconds, report.num_bytes, report.quality)


def _into(config: Config, folder: Path) -> Config:
    matrices = config.matrices.model_copy(update={"folder": folder})
    return config.model_copy(update={"matrices": matrices})


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


def _deepen(config: Config) -> list[Built]:
    """The paper's recipe at the same top_k: what it retains, and the refusal."""
    recipe = RowRecipe("deepen", config.matrices.top_k, config.matrices.temperature)
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
            rows.append(Built(name, recipe.name, seconds, 0, quality, refused))
    return rows


def _refusal(member: str, quality: Quality, recipe: RowRecipe, minimum: float) -> str | None:
    try:
        require_retained(member, quality, recipe, minimum)
    except TransferMatrixError as error:
        return str(error)
    return None


def _embedding_bytes(config: Config) -> int:
    names = {name for members in member_sets(config) for name in members}
    return sum(load_embeddings(resolve_folder(config.members[name])).nbytes for name in names)


if __name__ == "__main__":
    main()
