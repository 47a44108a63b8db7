"""Fits a router on one half of the tasks and reports on the other.

It is compared with its best model, with a random and with the best choice for each item. Does not know files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ensemble_core.config import Config
from ensemble_core.council_config import RouteConfig
from ensemble_core.councils.route import gate
from ensemble_core.councils.routers import Balance, ClusterRouter, LinearRouter, balance_of
from ensemble_core.decoding.requests import Overrides
from ensemble_core.errors import EvaluationError
from ensemble_core.evaluation.bootstrap import Interval, Ratio
from ensemble_core.evaluation.evaluate import Scope, evaluated_items
from ensemble_core.evaluation.measures import Measure, Selection
from ensemble_core.evaluation.tasks import Item, Task
from ensemble_core.evaluation.variants import Variant
from ensemble_core.evaluation.workbench import Workbench
from ensemble_core.fitting.compared import Compared, compare, gain_of, table_of
from ensemble_core.fitting.routers import Learnt, fit_clusters, fit_linear, prefer


@dataclass(frozen=True, slots=True)
class Calibration:
    """Send this share of the questions to one model."""

    model: str
    share: float


@dataclass(frozen=True, slots=True)
class Labels:
    """How well each model did on each item: gains over weights; the larger the better.

    gains, weights: (N, M) float64; for a text minus its bits and its bytes, for the others right answers and 1.
    """

    questions: list[str]
    gains: Tensor
    weights: Tensor

    @property
    def quality(self) -> Tensor:
        """(N, M) gain per weight."""
        return self.gains / self.weights

    def of(self, choice: Tensor) -> Ratio:
        """The metric where item i is answered by model choice[i]."""
        index = choice.unsqueeze(1)
        return Ratio(self.gains.gather(1, index).squeeze(1), self.weights.gather(1, index).squeeze(1))


@dataclass(frozen=True, slots=True)
class Fitted:
    """What came of a fit."""

    router: LinearRouter | ClusterRouter
    compared: list[Compared]
    shares: dict[str, float]  # model -> share of the reported items that it was chosen for
    agreement: float  # share of the reported items for which one of the best models was chosen
    gain: Interval

    @property
    def is_sure(self) -> bool:
        """Whether the whole interval of the gain over the best model is above 0."""
        return self.gain.low > 0


def without(config: Config, name: str) -> Config:
    """The configuration without a council that has no artefact yet, and without those that call it."""
    gone = {name}
    while more := {other for other, each in config.councils.items() if gone & set(each.called)} - gone:
        gone |= more
    return config.model_copy(update={"councils": {n: c for n, c in config.councils.items() if n not in gone}})


def router_of(config: Config, name: str) -> RouteConfig:
    """The council of that name. Raises EvaluationError where it has nothing to fit."""
    council = config.councils.get(name)
    if not isinstance(council, RouteConfig) or council.by not in ("linear", "clusters"):
        raise EvaluationError(
            f"--council {name!r}: councils of kind graph, vote by majority, and route by linear or clusters, are "
            f"fitted; known are {sorted(config.councils)}"
        )
    return council


def fit_router(
    bench: Workbench,
    council: RouteConfig,
    tasks: Sequence[Task],
    selection: Selection,
    calibration: Calibration | None,
) -> Fitted:
    """Fit the router of a council. bench: of a configuration that need not have it. Raises EvaluationError."""
    told = labels(bench, council.models, tasks, selection)
    balance = None if council.cost is None else balance_of(council.models, council.cost.alpha, council.cost.prices)
    router = _fitted(council, told, calibration, balance)
    return judged(council, router, balance, labels(bench, council.models, tasks, selection.other()))


def _fitted(
    council: RouteConfig, told: Labels, calibration: Calibration | None, balance: Balance | None
) -> LinearRouter | ClusterRouter:
    fit: Any = fit_linear if council.by == "linear" else fit_clusters
    learnt: Learnt[Any] = fit(told.questions, told.quality)
    if calibration is None:
        plain: LinearRouter | ClusterRouter = learnt.router
        return plain
    if calibration.model not in council.models:
        raise EvaluationError(f"--strong {calibration.model!r}: models are {list(council.models)}")
    strong = council.models.index(calibration.model)
    calibrated: LinearRouter | ClusterRouter = prefer(learnt, strong, calibration.share, balance)
    return calibrated


def judged(
    council: RouteConfig, router: LinearRouter | ClusterRouter, balance: Balance | None, told: Labels
) -> Fitted:
    """The router on items that it was not fitted on, beside the best model, a random and the best choice."""
    one = replace_select(council)
    names = [next(iter(gate(router.scores(question, balance), one))) for question in told.questions]
    choice = torch.tensor([council.models.index(name) for name in names])
    singles = {name: told.of(torch.full_like(choice, model)) for model, name in enumerate(council.models)}
    ways = {
        "routed": told.of(choice),
        "best choice": told.of(told.quality.argmax(1)),
        "random": Ratio(told.gains.mean(1), told.weights.mean(1)),
    }
    compared = compare(singles, ways)
    shares = {model: names.count(model) / len(names) for model in council.models}
    agreed = told.quality.gather(1, choice.unsqueeze(1)).squeeze(1) == told.quality.amax(1)
    return Fitted(
        router,
        compared,
        shares,
        float(agreed.to(torch.float64).mean()),
        gain_of(compared, "routed"),
    )


def replace_select(council: RouteConfig) -> RouteConfig:
    """The council where one model alone is selected."""
    return council.model_copy(update={"select": council.select.model_copy(update={"max": 1, "threshold": 0.0})})


def labels(bench: Workbench, models: Sequence[str], tasks: Sequence[Task], selection: Selection) -> Labels:
    """What each model makes of each item, measured or read from stored scores. Raises EvaluationError."""
    variants = [Variant(name, name, Overrides()) for name in models]
    questions: list[str] = []
    rows: list[tuple[list[float], list[float]]] = []
    for task in tasks:
        measure: Measure = "bits" if task.kind == "text" else "score"
        found = evaluated_items(bench, Scope([task], variants, selection, (measure,)))
        for item in selection.items(task):
            values = [found[name][task.name].get(item.index) for name in models]
            if all(values):
                questions.append(_question(item))
                rows.append(_row(values, measure))
    if len(rows) < 2:
        raise EvaluationError("the tasks have too few items to fit on; give at least two to each half")
    gains, weights = zip(*rows, strict=True)
    return Labels(questions, torch.tensor(gains, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64))


def _question(item: Item) -> str:
    """What a client would ask: of a text its first half."""
    return item.question or item.text[: max(len(item.text) // 2, 1)]


def _row(values: Sequence[Any], measure: Measure) -> tuple[list[float], list[float]]:
    if measure == "bits":
        return [-each["bits"] for each in values], [each["num_bytes"] for each in values]
    return [float(each["correct"]) for each in values], [1.0] * len(values)


def told(fitted: Fitted) -> str:
    """The comparison as a table."""
    shares = ", ".join(f"{model} {share:.0%}" for model, share in fitted.shares.items())
    return (
        "on items that were not fitted on (right answers; of texts minus bits per byte):\n"
        f"{table_of(fitted.compared)}\n\n"
        f"chosen: {shares}; one of the best for {fitted.agreement:.1%} of the items"
    )
