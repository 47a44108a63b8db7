"""All councils of a configuration: their plans, with what these need, and what each costs at most.

Invariants: a council that could pass its own limits is refused when it is loaded, and so is one whose artefact does
not fit. Does not know how plans are run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, assert_never

from ensemble_core.config import Config
from ensemble_core.council_config import (
    CouncilConfig,
    CouncilLimits,
    DiscussConfig,
    GraphConfig,
    RouteConfig,
    VoteConfig,
)
from ensemble_core.councils.artefact import load_router
from ensemble_core.councils.base import CallCost, Plan
from ensemble_core.councils.discuss import Sample, discuss_cost, discuss_plan, spare_calls
from ensemble_core.councils.graph import graph_cost, graph_plan
from ensemble_core.councils.mathematics import is_installed
from ensemble_core.councils.route import route_cost, route_plan
from ensemble_core.councils.vote import vote_cost, vote_plan
from ensemble_core.decoding.requests import GenerationRequest
from ensemble_core.errors import ConfigError, ModelNotFoundError, quoted

Planner = Callable[[GenerationRequest, CouncilLimits], Plan]


@dataclass(frozen=True, slots=True)
class Council:
    """One council: what it costs at most, and its plan for a request within given limits.

    calls_tools: its answer is one model's own, so it may call tools.
    """

    name: str
    config: CouncilConfig
    cost: CallCost
    plan: Planner
    calls_tools: bool

    @property
    def limits(self) -> CouncilLimits:
        """As configured."""
        return self.config.limits


class CouncilBook:
    """The councils by name. Raises ConfigError or ArtefactError for one that cannot work."""

    def __init__(self, config: Config) -> None:
        check_councils(config)
        self._councils = {
            name: Council(
                name,
                council,
                cost_of(config, name),
                _planner(name, council, config),
                calls_tools(config, name),
            )
            for name, council in config.councils.items()
        }

    def __contains__(self, model: object) -> bool:
        return model in self._councils

    def __bool__(self) -> bool:
        return bool(self._councils)

    def __getitem__(self, model: str) -> Council:
        """Raises ModelNotFoundError."""
        if model not in self._councils:
            raise ModelNotFoundError(f"{quoted(model)} is not a council; there are {sorted(self._councils)}")
        return self._councils[model]

    def speakers(self, model: str) -> set[str]:
        """The members and token-level ensembles that may write a model's answers."""
        if model not in self._councils:
            return {model}
        return {name for called in self._councils[model].config.called for name in self.speakers(called)}


def calls_tools(config: Config, model: str) -> bool:
    """Whether a model's answer is one text of one member or token-level ensemble, as far as councils decide that."""
    council = config.councils.get(model)
    if council is None:
        return True
    return isinstance(council, RouteConfig) and all(calls_tools(config, called) for called in council.called)


def cost_of(config: Config, model: str) -> CallCost:
    """What one answer of a model needs at most."""
    council = config.councils.get(model)
    inner = partial(cost_of, config)
    match council:
        case None:
            return CallCost()
        case RouteConfig():
            return route_cost(council, inner)
        case VoteConfig():
            return vote_cost(council, inner)
        case DiscussConfig():
            return discuss_cost(council, inner)
        case GraphConfig():
            return graph_cost(council, inner)
    assert_never(council)


def check_councils(config: Config) -> None:
    """Check what can be checked without loading anything. Raises ConfigError with the field's path."""
    for name, council in config.councils.items():
        cost, limits, where = cost_of(config, name), council.limits, f"ensembles.{name}"
        if cost.calls > limits.max_calls:
            raise ConfigError(
                f"{where}.limits.max_calls: this council needs up to {cost.calls} calls, and {limits.max_calls} are "
                "allowed; raise the limit or ask fewer models"
            )
        if limits.max_tokens - cost.fixed < cost.writers:
            raise ConfigError(
                f"{where}.limits.max_tokens: {cost.writers} calls share {limits.max_tokens} tokens, of which "
                f"{cost.fixed} are set aside for short calls; raise the limit"
            )
        if cost.width > config.scheduler.max_waiting:
            raise ConfigError(
                f"{where}: up to {cost.width} calls are made at the same time, and scheduler.max_waiting is "
                f"{config.scheduler.max_waiting}; raise it or ask fewer models"
            )
        _check_kind(name, council, config)


def _check_kind(name: str, council: CouncilConfig, config: Config) -> None:
    where = f"ensembles.{name}"
    if isinstance(council, RouteConfig) and council.by == "perplexity":
        _require_leaves(f"{where}.models", council.models, config, "say how likely a prompt is")
    if isinstance(council, VoteConfig) and council.judge is not None:
        _require_leaves(f"{where}.judge", (council.judge,), config, "say how likely a letter is")
    if isinstance(council, VoteConfig) and council.answer == "math" and not is_installed():
        raise ConfigError(f"{where}.answer: math needs a package; run pip install 'unisono[math]'")


def _require_leaves(where: str, models: tuple[str, ...], config: Config, what: str) -> None:
    if inner := [model for model in models if model in config.councils]:
        raise ConfigError(f"{where}: {inner} are councils, which cannot {what}; name members or kind fuse")


def _planner(name: str, council: CouncilConfig, config: Config) -> Planner:
    match council:
        case RouteConfig():
            router = None if council.artefact is None else load_router(name, council, config)
            main = None if council.into is None else config.ensembles[council.into].main
            return lambda request, _limits: route_plan(council, router, main, request)
        case VoteConfig():
            return lambda request, _limits: vote_plan(council, request)
        case GraphConfig():
            return lambda request, _limits: graph_plan(council, request)
        case DiscussConfig():
            samples = _samples(name, council.examples)
            needed = cost_of(config, name).writers

            def plan(request: GenerationRequest, limits: CouncilLimits) -> Plan:
                return discuss_plan(council, samples, spare_calls(council, needed, limits.max_calls), request)

            return plan
    assert_never(council)


def _samples(name: str, path: Path | None) -> tuple[Sample, ...]:
    """The convincing samples of a file. Raises ConfigError with the line that is wrong."""
    if path is None:
        return ()
    where = f"ensembles.{name}.examples: {path}"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where} cannot be read: {error}") from error
    return tuple(_sample(line, f"{where}, line {rank}") for rank, line in enumerate(lines, 1) if line.strip())


def _sample(line: str, where: str) -> Sample:
    try:
        found: Any = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON ({error})") from error
    fields = ("question", "answer", "explanation")
    if not isinstance(found, dict) or not all(isinstance(found.get(name), str) for name in fields):
        raise ConfigError(f"{where}: expected an object with the texts {', '.join(fields)}")
    question, answer, explanation = (found[name] for name in fields)
    return Sample(question, answer, explanation, str(found.get("model", "")))
