"""Configuration -> transfer matrices on disk: what `unisono build` does.

Each set of members that relative fusion combines gets its own matrices, since it has its own anchors. Knows
configurations and where models are stored; does not know how a matrix is made or checked.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ensemble_core.config import Config, MatricesConfig
from ensemble_core.errors import TransferMatrixError
from ensemble_core.member_config import MemberConfig
from ensemble_core.members.loading.checkpoints import load_vocabulary, resolve_folder
from ensemble_core.text.vocabulary import Vocabulary
from ensemble_core.transfer.embeddings import load_embeddings
from ensemble_core.transfer.matrix import Anchors, TransferMatrix, common_anchors
from ensemble_core.transfer.rows import Quality, RowRecipe, build_matrix, require_retained
from ensemble_core.transfer.spelling import spelling_matrix
from ensemble_core.transfer.store import Origin, load_matrix, matrix_path, read_metadata, save_matrix

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BuildReport:
    """The outcome for one member's matrix."""

    member: str
    path: Path
    seconds: float
    quality: Quality  # retained mass
    num_bytes: int  # on disk
    skipped: bool  # the existing matrix still fits


@dataclass(frozen=True, slots=True)
class _MatrixTask:
    """One matrix to build."""

    member: str
    origin: Origin
    path: Path
    vocabulary: Vocabulary
    anchors: Anchors
    recipe: RowRecipe


def build_matrices(config: Config, *, force: bool, only_missing: bool) -> list[BuildReport]:
    """Build every matrix that the ensembles of `config` need, and write it under `matrices.folder`.

    force: also write matrices that retain too little. only_missing: skip matrices that exist and fit.
    Raises CheckpointError if a model's files are missing, TransferMatrixError if a matrix retains too little
    or cannot be written.
    """
    reports = []
    for task in _tasks(config):
        report = _standing(task, config.build_command) if only_missing else None
        reports.append(report or _build(task, config, force))
    return reports


def member_sets(config: Config) -> list[tuple[str, ...]]:
    """The distinct sets of members (sorted) that some ensemble combines by relative fusion.

    In place of an adapter its base stands, whose embeddings are the adapter's.
    """
    relative = [e for e in config.ensembles.values() if e.fusion.name == "relative" and len(e.members) > 1]
    return sorted({tuple(sorted(config.owners(ensemble.members))) for ensemble in relative})


def recipe_of(matrices: MatricesConfig) -> RowRecipe:
    """The recipe that a configuration specifies."""
    return RowRecipe(matrices.recipe, matrices.top_k, matrices.temperature)


def origin_of(member: MemberConfig) -> Origin:
    """Which weights a member is configured to use."""
    return Origin(member.model, member.revision or "")


def _tasks(config: Config) -> list[_MatrixTask]:
    sets = member_sets(config)
    names = sorted({name for members in sets for name in members})
    vocabularies = {name: load_vocabulary(name, config.members[name]) for name in names}
    return [task for members in sets for task in _tasks_of(members, vocabularies, config)]


def _tasks_of(
    members: tuple[str, ...], vocabularies: Mapping[str, Vocabulary], config: Config
) -> list[_MatrixTask]:
    anchors = common_anchors([vocabularies[name] for name in members])
    logger.info("members %s share %d tokens", ", ".join(members), len(anchors.tokens))
    recipe = recipe_of(config.matrices)
    return [
        _MatrixTask(
            member=name,
            origin=origin_of(config.members[name]),
            path=matrix_path(config.matrices.folder, members, name, recipe.name),
            vocabulary=vocabularies[name],
            anchors=anchors,
            recipe=recipe,
        )
        for name in members
    ]


def _standing(task: _MatrixTask, rebuild: str) -> BuildReport | None:
    """A report on the existing matrix, or None if it is missing or does not fit."""
    if not task.path.exists():
        return None
    start = time.perf_counter()
    try:
        load_matrix(
            task.path,
            member=task.member,
            vocabulary=task.vocabulary,
            anchors=task.anchors,
            recipe=task.recipe,
            rebuild=rebuild,
            origin=task.origin,
        )
        quality = read_metadata(task.path).quality
    except TransferMatrixError as error:
        logger.info("rebuilding: %s", error)
        return None
    seconds = time.perf_counter() - start
    return BuildReport(task.member, task.path, seconds, quality, task.path.stat().st_size, skipped=True)


def _build(task: _MatrixTask, config: Config, force: bool) -> BuildReport:
    start = time.perf_counter()
    matrix, quality = _made(task, config)
    if not force:
        require_retained(task.member, quality, task.recipe, config.matrices.min_retained)
    num_bytes = save_matrix(
        task.path,
        matrix,
        quality,
        member=task.member,
        origin=task.origin,
        vocabulary=task.vocabulary,
        anchors=task.anchors,
        recipe=task.recipe,
    )
    seconds = time.perf_counter() - start
    return BuildReport(task.member, task.path, seconds, quality, num_bytes, skipped=False)


def _made(task: _MatrixTask, config: Config) -> tuple[TransferMatrix, Quality]:
    """The matrix itself; rows by spelling need no weights."""
    if task.recipe.name == "spelling":
        return spelling_matrix(task.vocabulary, task.anchors)
    embeddings = load_embeddings(resolve_folder(config.members[task.member]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logger.info("member %s: building %s on %s", task.member, task.path.name, device)
    return build_matrix(task.vocabulary, embeddings, task.anchors, task.recipe, device=device, label=task.member)
