"""Finds the recipe for a request, from the model's name and the request's overrides.

Invariants: every recipe is valid (known members, weights that sum to 1, a fusion and a mode whose options were
checked); requests for the same fusion share one object; configured fusions stay built. Knows the configuration and
the strategies; does not know prompts, sequences or engines.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from ensemble_core.config import Config, EnsembleConfig, StrategyConfig
from ensemble_core.council_config import CouncilConfig
from ensemble_core.decoding.modes.base import MODES, choose_mode
from ensemble_core.decoding.recipe import ModeChoice, Recipe
from ensemble_core.decoding.requests import Overrides, Weighting
from ensemble_core.errors import (
    ConfigError,
    InvalidRequestError,
    ModelNotFoundError,
    TransferMatrixError,
    UnknownStrategyError,
    quoted,
)
from ensemble_core.fusion.base import FUSIONS, Fusion, FusionSpace, build_fusion, is_mixture
from ensemble_core.fusion.gate import WeightGate
from ensemble_core.fusion.gate_store import load_gate
from ensemble_core.fusion.shelf import FusionShelf

# (some members of an ensemble, main first; all its members) -> space, with the matrices of the full set.
SpaceOf = Callable[[tuple[str, ...], tuple[str, ...]], FusionSpace]

_MAX_FUSIONS = 64  # most fusions chosen by clients that are kept


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that a client can request. recipe: None for a single member.

    members: all that it may need. lacks: those of them that take no requests now, and how they stand. parent: of an
    adapter, the member whose weights it runs.
    """

    name: str
    kind: Literal["ensemble", "council", "member"]
    max_model_len: int
    recipe: dict[str, Any] | None
    members: tuple[str, ...] = ()
    lacks: Mapping[str, str] = field(default_factory=dict)
    parent: str | None = None


def check_strategies(config: Config) -> None:
    """Check every ensemble's fusion and mode, with their options. Raises ConfigError with the field's path."""
    for name, ensemble in config.ensembles.items():
        try:
            FUSIONS.parse(ensemble.fusion.name, ensemble.fusion.options, f"ensembles.{name}.fusion")
            mode = choose_mode(ensemble.mode.name, ensemble.mode.options, f"ensembles.{name}.mode")
            _require_drafter(mode, ensemble, f"ensembles.{name}.mode")
            _require_mixture(
                ensemble.mode.name, ensemble.fusion.name, ensemble.fusion.options, f"ensembles.{name}"
            )
            _require_weights_at_places(ensemble.weighting.by, ensemble.mode.name, ensemble.fusion.name, name)
        except UnknownStrategyError as error:
            raise ConfigError(str(error)) from error


def _require_mixture(mode: str, fusion: str, options: dict[str, Any], where: str) -> None:
    """Raise ConfigError where a mode needs a linear pool and the fusion is another. where: path of both."""
    if not draws_members(mode):
        return
    parsed = FUSIONS.parse(fusion, options, f"{where}.fusion")
    if not is_mixture(parsed):
        raise ConfigError(
            f"{where}.mode.name: {mode} draws from one member at a time, which is exact for a linear pool alone "
            f"(fusion projection with pool: linear), got fusion {fusion} "
            f"{parsed.model_dump(exclude_defaults=True) or ''}; choose that fusion, or mode lockstep or verify"
        )


def _require_weights_at_places(by: str, mode: str, fusion: str, name: str) -> None:
    """Raise ConfigError where a gate's weights would have no effect, or come too late."""
    if by == "gate" and fusion == "contrastive":
        raise ConfigError(
            f"ensembles.{name}.weighting: weights have no effect on fusion contrastive; set it to fixed, or choose "
            "another fusion"
        )
    if by == "gate" and draws_members(mode):
        raise ConfigError(f"ensembles.{name}.weighting: {too_late(mode)}")


def draws_members(mode: str) -> bool:
    """Whether a mode needs the weights before members speak."""
    return bool(getattr(MODES.factory(mode), "needs_mixture", False))


def too_late(mode: str) -> str:
    """Why such a mode has no gate."""
    return (
        f"mode {mode} draws a member before it speaks, and a gate sets weights by what all members say; choose fixed "
        "weights, or mode lockstep or verify"
    )


def _require_drafter(mode: ModeChoice, ensemble: EnsembleConfig, where: str) -> None:
    """Raise ConfigError where nobody of the ensemble has the drafter's name."""
    drafter = json.loads(mode.options).get("drafter", "main")
    names = ["main", "lookup", *ensemble.members]
    if drafter not in names:
        raise ConfigError(f"{where}.drafter: {quoted(drafter)} drafts for nobody here; choose one of {names}")


def list_models(config: Config, max_len: Mapping[str, int]) -> list[ModelInfo]:
    """All ensembles, then councils, then members. max_len: member -> tokens per sequence."""
    ensembles = [
        ModelInfo(name, "ensemble", _context_of(ensemble, max_len), _described(ensemble), tuple(ensemble.members))
        for name, ensemble in config.ensembles.items()
    ]
    lengths = {each.name: each.max_model_len for each in ensembles} | dict(max_len)
    councils = [
        ModelInfo(
            name, "council", _length_of(name, config, lengths), _council_described(council), needed(name, config)
        )
        for name, council in config.councils.items()
    ]
    members = [
        ModelInfo(name, "member", max_len[name], None, (name,), parent=member.base)
        for name, member in config.members.items()
    ]
    return ensembles + councils + members


def needed(model: str, config: Config) -> tuple[str, ...]:
    """All members that a model may need, each once; none for an unknown model. Each council is looked at once."""
    found: dict[str, None] = {}
    seen, ahead = {model}, [model]
    while ahead:
        name = ahead.pop()
        if name in config.members:
            found[name] = None
        elif name in config.ensembles:
            found |= dict.fromkeys(config.ensembles[name].members)
        elif name in config.councils:
            called = [each for each in config.councils[name].called if each not in seen]
            seen.update(called)
            ahead += reversed(called)
    return tuple(found)


def _context_of(ensemble: EnsembleConfig, max_len: Mapping[str, int]) -> int:
    """Main's context; where a text ends with an assistant's, the shortest one."""
    members = [ensemble.main] if ensemble.on_full_context == "drop" else [*ensemble.members]
    return min(max_len[member] for member in members)


def _length_of(model: str, config: Config, lengths: Mapping[str, int]) -> int:
    """The context of a council's shortest model."""
    if model in lengths:
        return lengths[model]
    return min(_length_of(called, config, lengths) for called in config.councils[model].called)


def _council_described(council: CouncilConfig) -> dict[str, Any]:
    shown: dict[str, Any] = council.model_dump(mode="json", exclude={"artefact", "examples"}, exclude_none=True)
    return shown


class RecipeBook:
    """Recipes by name. Each fusion is built once."""

    def __init__(self, config: Config, space_of: SpaceOf, like: RecipeBook | None = None) -> None:
        """like: a book over the same vocabularies; what it has built of the fusions configured here is taken over."""
        self._config = config
        self._space_of = space_of
        self._built = FusionShelf(_MAX_FUSIONS)
        self._gates: dict[str, WeightGate] = {}
        self._shelf_before = None if like is None else like._built  # until `warm` is over

    def resolve(self, model: str, overrides: Overrides) -> Recipe:
        """The recipe of a request. Raises ModelNotFoundError, InvalidRequestError with `ensemble.*` as param."""
        if overrides.bounds is not None and model not in self._config.councils:
            raise InvalidRequestError(
                f"ensemble.limits: model {model!r} is no council, and makes no calls to limit; leave it out",
                "ensemble.limits",
            )
        if model in self._config.members:
            return self._alone(model, overrides)
        ensemble = self._config.ensembles.get(model)
        if ensemble is None:
            if model in self._config.councils:
                raise InvalidRequestError(
                    f"model {model!r} is a council, whose models have different tokens; name one of "
                    f"{list(self._config.councils[model].called)}",
                    "model",
                )
            known = [*self._config.ensembles, *self._config.councils, *self._config.members]
            raise ModelNotFoundError(f"model {quoted(model)} does not exist; this server has {', '.join(known)}")
        weights = _weights(ensemble, overrides)
        members = tuple(weights)
        name, key, fusion = self._fusion(model, ensemble, members, overrides)
        mode, by = _mode(ensemble, overrides, alone=fusion is None), _weighting(ensemble, overrides)
        if by.by == "gate" and fusion is not None and draws_members(mode.name):
            raise InvalidRequestError(f"ensemble.weighting: {too_late(mode.name)}", "ensemble.weighting")
        return Recipe(
            model,
            members,
            tuple(weights.values()),
            fusion,
            name,
            mode,
            tau=by.tau if by.by == "perplexity" and fusion is not None else None,
            gate=self._gate(model, ensemble, members) if by.by == "gate" and fusion is not None else None,
            on_failure=ensemble.on_member_failure,
            on_full=ensemble.on_full_context,
            apart=self._config.deterministic,
            fusion_key=key,
            refit=partial(self._refit, model, ensemble, overrides),
        )

    def warm(self) -> None:
        """Build every configured ensemble's fusion, so that missing matrices are found at start.

        Where members may be dropped, also build the fusions that remain after losing any one of them, so that no
        request waits for that.
        """
        for name in self._config.ensembles:
            recipe = self.resolve(name, Overrides())
            self._built.pin()  # at once: the shelf drops what it holds beyond its size
            may_go = recipe.members[1:] if recipe.on_full == "drop" else filter(recipe.can_lose, recipe.members)
            for member in may_go:
                recipe.without((member,))
                self._built.pin()
        self._shelf_before = None

    def _alone(self, model: str, overrides: Overrides) -> Recipe:
        if overrides != Overrides():
            raise InvalidRequestError(
                f"ensemble: model {model!r} is a single member, which has nothing to override; name one of "
                f"{list(self._config.ensembles)} or leave `ensemble` out",
                "ensemble",
            )
        return Recipe(model, (model,), (1.0,), None, "single", apart=self._config.deterministic)

    def _fusion(
        self, model: str, ensemble: EnsembleConfig, members: tuple[str, ...], overrides: Overrides
    ) -> tuple[str, str, Fusion | None]:
        """The fusion's name, its key (the same for any subset of the members) and the fusion; None for one member."""
        name, options = _chosen(ensemble.fusion, overrides.fusion, overrides.fusion_options)
        try:
            parsed = FUSIONS.parse(name, options, "ensemble.fusion")
            if len(members) == 1:
                return "single", "", None
            whole = tuple(ensemble.members)
            key = json.dumps([sorted(whole), name, parsed.model_dump(mode="json")])
            place, before = json.dumps([key, members]), self._shelf_before
            fusion = self._built.get(
                place,
                lambda: (
                    (before.find(place) if before else None)
                    or build_fusion(name, parsed, self._space_of(members, whole))
                ),
            )
        except (UnknownStrategyError, ConfigError) as error:
            raise InvalidRequestError(str(error), "ensemble.fusion") from error
        except TransferMatrixError as error:
            if overrides.fusion is None:
                raise
            raise InvalidRequestError(
                f"ensemble.fusion: {name!r} is not prepared for model {model!r}: {error}", "ensemble.fusion"
            ) from error
        return name, key, fusion

    def _gate(self, model: str, ensemble: EnsembleConfig, members: tuple[str, ...]) -> WeightGate:
        """The gate of some members, main first. Raises ArtefactError."""
        path, whole = ensemble.weighting.artefact, tuple(ensemble.weights)
        assert path is not None
        if model not in self._gates:
            self._gates[model] = load_gate(path, self._config, model, self._space_of(whole, whole))
        return self._gates[model].among(members)

    def _refit(
        self, model: str, ensemble: EnsembleConfig, overrides: Overrides, members: tuple[str, ...]
    ) -> Fusion | None:
        """See `Recipe.refit`."""
        try:
            return self._fusion(model, ensemble, members, overrides)[2]
        except (InvalidRequestError, TransferMatrixError):
            return None


def _weights(ensemble: EnsembleConfig, overrides: Overrides) -> dict[str, float]:
    """Member -> weight, main first, summing to 1. Weights that the request does not give are the configured ones."""
    chosen = overrides.members if overrides.members is not None else tuple(ensemble.members)
    _require_members(chosen, ensemble, "ensemble.members")
    if ensemble.main not in chosen or len(set(chosen)) != len(chosen):
        raise InvalidRequestError(
            f"ensemble.members must name the main member {ensemble.main!r} and no member twice, got "
            f"{quoted(list(chosen))}",
            "ensemble.members",
        )
    given = dict(overrides.weights or {})
    _require_members(tuple(given), ensemble, "ensemble.weights")
    if wrong := {m: w for m, w in given.items() if not math.isfinite(w) or w < 0 or m not in chosen}:
        raise InvalidRequestError(
            f"ensemble.weights must be finite, 0 or more, and of members in use {list(chosen)}, got {quoted(wrong)}",
            "ensemble.weights",
        )
    ordered = [ensemble.main, *(name for name in ensemble.members if name in chosen and name != ensemble.main)]
    raw = {name: given.get(name, ensemble.members[name]) for name in ordered}
    total = sum(raw.values())
    if not 0.0 < total < math.inf:
        raise InvalidRequestError(
            f"ensemble.weights: their sum must be finite and greater than 0, got {raw}", "ensemble.weights"
        )
    return {name: weight / total for name, weight in raw.items()}


def _weighting(ensemble: EnsembleConfig, overrides: Overrides) -> Weighting:
    """Where weights come from. Raises InvalidRequestError."""
    chosen = overrides.weighting or Weighting(ensemble.weighting.by, ensemble.weighting.tau)
    if chosen.by not in ("fixed", "perplexity", "gate") or not 0.0 < chosen.tau < math.inf:
        raise InvalidRequestError(
            "ensemble.weighting: `by` is fixed, perplexity or gate and `tau` a finite number greater than 0, got "
            f"{quoted(chosen.by)} and {chosen.tau!r}",
            "ensemble.weighting",
        )
    if chosen.by == "gate" and ensemble.weighting.artefact is None:
        raise InvalidRequestError(
            "ensemble.weighting: this model has no gate (its `weighting` is not `by: gate`); send fixed or "
            "perplexity, or leave it out",
            "ensemble.weighting",
        )
    return chosen


def _mode(ensemble: EnsembleConfig, overrides: Overrides, alone: bool) -> ModeChoice:
    """How steps are taken; alone: by one member, which has no fusion. Raises InvalidRequestError."""
    name, options = _chosen(ensemble.mode, overrides.mode, overrides.mode_options)
    fusion, fusion_options = _chosen(ensemble.fusion, overrides.fusion, overrides.fusion_options)
    try:
        mode = choose_mode(name, options, "ensemble.mode")
        if not alone:
            _require_drafter(mode, ensemble, "ensemble.mode")
            _require_mixture(name, fusion, fusion_options, "ensemble")
        return mode
    except (UnknownStrategyError, ConfigError) as error:
        raise InvalidRequestError(str(error), "ensemble.mode") from error


def _chosen(
    configured: StrategyConfig, name: str | None, options: Mapping[str, Any] | None
) -> tuple[str, dict[str, Any]]:
    """A strategy's name and options. One that a request names starts from that strategy's own defaults."""
    if options is None:
        options = configured.options if name is None else {}
    return name or configured.name, dict(options)


def _require_members(names: tuple[str, ...], ensemble: EnsembleConfig, param: str) -> None:
    if unknown := [name for name in names if name not in ensemble.members]:
        raise InvalidRequestError(
            f"{param}: {quoted(unknown)} are not members of this ensemble; allowed are {list(ensemble.members)}",
            param,
        )


def _described(ensemble: EnsembleConfig) -> dict[str, Any]:
    return {
        "members": ensemble.weights,
        "main": ensemble.main,
        "weighting": ensemble.weighting.model_dump(include={"by", "tau"} if _by_prompt(ensemble) else {"by"}),
        "fusion": {"name": ensemble.fusion.name, "options": ensemble.fusion.options},
        "mode": ensemble.mode.name,
        "on_member_failure": ensemble.on_member_failure,
        "on_full_context": ensemble.on_full_context,
    }


def _by_prompt(ensemble: EnsembleConfig) -> bool:
    return ensemble.weighting.by == "perplexity"
