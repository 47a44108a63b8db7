"""Fitting as the command line asks for it: texts and paths in, tables out. The one door into this package.

Nothing is written where the gain over the best model may be chance, unless that is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ensemble_core.config import Config
from ensemble_core.council_config import GraphConfig, RouteConfig, VoteConfig
from ensemble_core.councils.artefact import About, fingerprints, save_router
from ensemble_core.councils.routers import ClusterRouter
from ensemble_core.errors import EvaluationError
from ensemble_core.evaluation import run as evaluation
from ensemble_core.evaluation.run import Chosen
from ensemble_core.evaluation.tasks import Task
from ensemble_core.evaluation.variants import parse_variant
from ensemble_core.evaluation.workbench import Workbench
from ensemble_core.fitting.fit_gate import fit_gate, told_gate
from ensemble_core.fitting.fit_graph import fit_graph, told_graph
from ensemble_core.fitting.fit_router import Calibration, Fitted, fit_router, router_of, told, without
from ensemble_core.fitting.fit_votes import fit_votes, told_votes
from ensemble_core.fitting.tune_swarm import SwarmSearch, told_together, tune_by_swarm
from ensemble_core.fusion.gate_store import save_gate

__all__ = ["Calibration", "Search", "SwarmSearch", "fit_council", "gate_path", "tune_gate", "tune_options"]


@dataclass(frozen=True, slots=True)
class Search:
    """How many graphs, or counts of votes, are tried where there are too many for all, and the seed of the swarm.

    num_draws: assignments of models to a graph's nodes over which each model's part is reported; 0: it is not.
    """

    budget: int = 100
    seed: int = 0
    num_draws: int = 0


def fit_council(
    config: Config,
    chosen: Chosen,
    name: str,
    calibration: Calibration | None,
    search: Search,
    out: Path | None,
    force: bool,
) -> str:
    """Fit a council and tell what came of it. A router's artefact is written where its gain is sure."""
    tasks = chosen.parsed_tasks()
    found = config.councils.get(name)
    if isinstance(found, GraphConfig):
        with Workbench(config, chosen.cache) as bench:
            graph = fit_graph(bench, name, tasks, chosen.selection, search.budget, search.seed, search.num_draws)
        return told_graph(graph)
    if isinstance(found, VoteConfig) and found.judge is None:
        with Workbench(config, chosen.cache) as bench:
            return told_votes(fit_votes(bench, found, tasks, chosen.selection, search.budget, search.seed))
    council = router_of(config, name)
    with Workbench(without(config, name), chosen.cache) as bench:
        fitted = fit_router(bench, council, tasks, chosen.selection, calibration)
    folder = out or council.artefact
    assert folder is not None
    if not fitted.is_sure and not force and calibration is None:
        return f"{told(fitted)}\n\nnot written: the gain may be chance; pass --force to write it all the same"
    save_router(folder, fitted.router, _about(config, council, tasks, fitted))
    return f"{told(fitted)}\n\nwritten to {folder}"


def _about(config: Config, council: RouteConfig, tasks: Sequence[Task], fitted: Fitted) -> About:
    router = fitted.router
    options = {"near": router.near, "beta": router.beta} if isinstance(router, ClusterRouter) else {}
    report = {each.name: each.value.value for each in fitted.compared}
    return About(
        council.by,
        fingerprints(config, council.models),
        {task.name: task.digest for task in tasks},
        options=options,
        report=report | {"shares": fitted.shares},
    )


def tune_options(config: Config, chosen: Chosen, ensemble: str, search: SwarmSearch, write_to: Path | None) -> str:
    """Tune, write the weights into a configuration file if one is given; what came of it, in words.

    Raises EvaluationError, also where options were varied and something is to be written: the weights belong to them.
    """
    variant = parse_variant(ensemble)
    if write_to is not None and (variant.label != variant.model or search.vary):
        raise EvaluationError(
            f"--write: sets weights alone; put the options of {ensemble!r} into the file by hand"
        )
    with Workbench(config, chosen.cache) as bench:
        found = tune_by_swarm(bench, variant, chosen.parsed_tasks(), chosen.selection, search)
    written = evaluation.write_tuned(found.tuned, variant, write_to)
    return f"{told_together(found)}\n\n{evaluation.told(found.tuned, written)}"


def tune_gate(config: Config, chosen: Chosen, ensemble: str, seed: int, out: Path | None, force: bool) -> str:
    """Learn a gate, write it to `out` if one is given and its gain is sure; what came of it, in words."""
    tasks = chosen.parsed_tasks()
    with Workbench(config, chosen.cache) as bench:
        fitted = fit_gate(bench, ensemble, tasks, chosen.selection, seed)
    if out is None:
        return f"{told_gate(fitted)}\n\nnot written; pass --write"
    if not fitted.is_sure and not force:
        return f"{told_gate(fitted)}\n\nnot written: the gain may be chance; pass --force to write it all the same"
    data = {task.name: task.digest for task in tasks} | {"split": chosen.split}
    save_gate(out, fitted.numbers, fitted.origin, data, fitted.report)
    return f"{told_gate(fitted)}\n\nwritten to {out}"


def gate_path(config: Config, ensemble: str, source: Path) -> Path:
    """Where an ensemble's gate is written by default. source: the configuration's file."""
    found = config.ensembles.get(ensemble)
    own = None if found is None else found.weighting.artefact
    return own or source.parent / "gates" / f"{ensemble}.safetensors"
