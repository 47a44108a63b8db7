"""The YAML configuration: members, ensembles, matrices, scheduler, server. Floor 0: no torch.

Invariants: unknown keys are refused; every reference (an ensemble's members, its main) resolves; relative paths are
resolved against the folder of the file. It does not know which fusions and modes exist or what options they take:
`recipes.check_strategies` checks those against the registries and reports errors the same way.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from ensemble_core.adapter_config import check_adapters, with_bases
from ensemble_core.config_paths import council_at, member_at, server_at
from ensemble_core.council_config import COUNCIL_KINDS, CouncilConfig, RouteConfig, circle_of
from ensemble_core.errors import ConfigError
from ensemble_core.member_config import MemberConfig
from ensemble_core.section import Section, lines_of
from ensemble_core.server_config import ServerConfig

FAR_TIMEOUT = 30.0  # seconds; of calls to members where some live elsewhere and `member_timeout` is not set
DEFAULT_TAU = 0.25  # nats per byte: about 1 nat per token of four bytes
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class StrategyConfig(Section):
    """A strategy and its options. A bare name is short for `{name: NAME}`."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict, description="Checked by the strategy.")

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value


class FusionConfig(StrategyConfig):
    """How members' distributions are fused."""

    name: str = Field("relative", description="A registered fusion: relative, ...")


class ModeConfig(StrategyConfig):
    """How a sequence takes its next step."""

    name: str = Field("lockstep", description="A registered mode. lockstep: every member answers at every step.")


class WeightingConfig(Section):
    """Where an ensemble's weights come from; `weighting: perplexity` is short for `weighting: {by: perplexity}`."""

    by: Literal["fixed", "perplexity", "gate"] = Field(
        "fixed",
        description="fixed: as configured. perplexity: times exp(-NLL / tau) of each request's prompt. gate: at each "
        "place times what `unisono tune --method gate` has learnt.",
    )
    artefact: Path | None = Field(
        None, description="For gate, the file that was learnt. Relative to the folder of this file."
    )
    tau: float = Field(
        DEFAULT_TAU,
        gt=0.0,
        allow_inf_nan=False,
        description="For perplexity, nats per byte; large: as configured.",
    )

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: object) -> object:
        return {"by": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _all_acts(self) -> WeightingConfig:
        if self.by != "perplexity" and "tau" in self.model_fields_set:
            raise ValueError("tau only acts with `by: perplexity`; set it or drop tau")
        if self.by == "gate" and self.artefact is None:
            raise ValueError("`by: gate` needs artefact, the file that `unisono tune --method gate` writes")
        if self.by != "gate" and self.artefact is not None:
            raise ValueError("artefact only acts with `by: gate`; set it or drop artefact")
        return self


class EnsembleConfig(Section):
    """A recipe: the members, their weights, which one is main, and how they are fused."""

    kind: Literal["fuse"] = Field("fuse", description="fuse; route, vote, discuss, graph: see docs/councils.md.")
    members: dict[Name, Weight] = Field(min_length=1, description="Member -> weight; scaled to sum to 1.")
    main: Name = Field(description="The member whose vocabulary the output is sampled from.")
    fusion: FusionConfig = Field(default_factory=lambda: FusionConfig(), description="How the members are fused.")
    weighting: WeightingConfig = Field(
        default_factory=lambda: WeightingConfig(),
        description="fixed; by each prompt's perplexity; by a gate, at each place.",
    )
    mode: ModeConfig = Field(default_factory=lambda: ModeConfig(), description="How steps are taken.")
    on_member_failure: Literal["fail", "drop"] = Field(
        "fail",
        description="When an assistant fails. fail: the request fails too. drop: it goes on without that member.",
    )
    on_full_context: Literal["drop", "end"] = Field(
        "drop",
        description="When a text becomes too long for an assistant, but not for main. drop: it goes on without that "
        "member. end: it ends there, and a prompt that is too long is refused.",
    )

    @model_validator(mode="after")
    def _main_is_member(self) -> EnsembleConfig:
        if self.main not in self.members:
            raise ValueError(f"main {self.main!r} is not one of the members {sorted(self.members)}")
        if sum(self.members.values()) <= 0.0:
            raise ValueError("members: at least one weight must be greater than 0")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Member -> weight, main first, scaled to sum to 1."""
        total = sum(self.members.values())
        ordered = [self.main, *(name for name in self.members if name != self.main)]
        return {name: self.members[name] / total for name in ordered}


def _ensemble_at(ensemble: EnsembleConfig, folder: Path) -> EnsembleConfig:
    """A recipe with whole paths."""
    if ensemble.weighting.artefact is None:
        return ensemble
    path = (folder / ensemble.weighting.artefact.expanduser()).resolve()
    weighting = ensemble.weighting.model_copy(update={"artefact": path})
    return ensemble.model_copy(update={"weighting": weighting})


class MatricesConfig(Section):
    """Where transfer matrices lie and how `unisono build` makes them."""

    folder: Path = Field(Path("../matrices"), description="Relative to the folder of this file.")
    recipe: Literal["centred", "deepen", "spelling"] = Field(
        "centred", description="centred, deepen: from embeddings. spelling: by what a token begins with."
    )
    top_k: int = Field(8, ge=1, description="Anchors kept per row; a row by spelling has one.")
    temperature: float = Field(80.0, gt=0.0, description="tau of the centred recipe.")
    min_retained: float = Field(
        0.2,
        ge=0.0,
        le=1.0,
        description="Median share of mass that pruning must leave in the anchors' own rows. Below it, build refuses.",
    )


class SchedulerConfig(Section):
    """Limits of the engine's loop."""

    max_running: int = Field(32, ge=1, description="Sequences that decode at the same time.")
    max_waiting: int = Field(256, ge=1, description="Sequences that may wait for a place; one more gets a 429.")
    max_queued_tokens: int = Field(
        1_000_000,
        ge=1,
        description="Prompt tokens that may wait; more get a 429. One request alone may have more.",
    )
    token_budget: int = Field(1024, ge=1, description="Most tokens a member is fed in one step.")
    max_stretch: float = Field(
        2.0,
        gt=1.0,
        description="While streams are spared: a step with prefill over one without, at most; up to three times that "
        "while more prompts wait than streams are spared. .inf: no limit.",
    )
    spare: Literal["earlier", "all", "none"] = Field(
        "earlier",
        description="Which streams `max_stretch` is for. earlier: those that ran before the oldest waiting prompt "
        "came. all: all that run. none: prompts are read as fast as can be. Answers that are not streamed are never "
        "spared.",
    )
    prefix_reuse: bool = Field(True, description="Reuse cached prefixes of earlier prompts.")
    num_candidates: int = Field(256, ge=2, description="K: candidates that each member answers with.")
    priority: bool = Field(
        False,
        description="Requests may name a priority from -100 to 100: of those that wait, a lower number goes first. A "
        "step makes up for half a second of waiting. false: it changes nothing.",
    )
    member_timeout: float | None = Field(
        None,
        gt=0.0,
        allow_inf_nan=False,
        description="Seconds that a call to a member may take; a longer one counts as failed. None: no limit, or 30 "
        "where a member has a host.",
    )
    stall_seconds: float = Field(
        60.0, gt=0.0, description="An engine that takes no step for so long is dead: /health fails, requests end."
    )


class Config(Section):
    """One file: everything a server (or the offline API) needs."""

    members: dict[Name, MemberConfig] = Field(min_length=1, description="Resident models by name.")
    ensembles: dict[Name, EnsembleConfig] = Field(default_factory=dict, description="Recipes by name.")
    councils: dict[Name, CouncilConfig] = Field(
        default_factory=dict,
        description="The recipes of other kinds; in the file they stand under ensembles, too.",
    )
    matrices: MatricesConfig = Field(default_factory=lambda: MatricesConfig())
    scheduler: SchedulerConfig = Field(default_factory=lambda: SchedulerConfig())
    deterministic: bool = Field(
        False, description="A request's answer is the same, bit for bit, whatever other requests run. CPU only."
    )
    server: ServerConfig = Field(default_factory=lambda: ServerConfig())
    _source: Path | None = PrivateAttr(None)

    def replaced(self, **sections: object) -> Config:
        """With some sections replaced and everything checked again; `ensembles` holds recipes of all kinds.

        Raises ConfigError as `load_config` does.
        """
        given = {**dict(self), "ensembles": {**self.ensembles, **self.councils}, **sections}
        del given["councils"]
        try:
            config = Config.model_validate(given)
        except ValidationError as error:
            raise ConfigError("; ".join(lines_of(error))) from error
        if self._source is not None:
            config = config.at(self._source.resolve().parent)
            config._source = self._source
        return config

    def at(self, folder: Path) -> Config:
        """With whole paths; relative ones belong to `folder`."""
        place = (folder / self.matrices.folder).resolve()
        changes = {
            "matrices": self.matrices.model_copy(update={"folder": place}),
            "members": {name: member_at(member, folder) for name, member in self.members.items()},
            "server": server_at(self.server, folder),
            "ensembles": {name: _ensemble_at(each, folder) for name, each in self.ensembles.items()},
            "councils": {name: council_at(council, folder) for name, council in self.councils.items()},
        }
        return self.model_copy(update=changes)

    @property
    def build_command(self) -> str:
        """The command that builds this configuration's matrices, for use in messages."""
        return f"unisono build --config {self._source or 'FILE'}"

    @property
    def member_timeout(self) -> float | None:
        """Seconds that a call to a member may take: a member that lives elsewhere may never answer."""
        far = any(member.host is not None for member in self.members.values())
        return self.scheduler.member_timeout or (FAR_TIMEOUT if far else None)

    def owner(self, member: str) -> str:
        """The member whose weights a member runs: an adapter's base, else itself."""
        return self.members[member].base or member

    def owners(self, members: Iterable[str]) -> tuple[str, ...]:
        """The owners of several members, each once, in their order."""
        return tuple(dict.fromkeys(self.owner(member) for member in members))

    @model_validator(mode="before")
    @classmethod
    def _with_bases(cls, raw: object) -> object:
        """What is not said of an adapter is as its base has it."""
        if not isinstance(raw, dict) or not isinstance(members := raw.get("members"), dict):
            return raw
        return {**raw, "members": with_bases(members)}

    @model_validator(mode="after")
    def _adapters(self) -> Config:
        check_adapters(self.members)
        return self

    @model_validator(mode="after")
    def _hosts(self) -> Config:
        rays = {
            name: m.host.ray for name, m in self.members.items() if m.host is not None and m.host.ray is not None
        }
        if len(addresses := sorted({ray.address for ray in rays.values()})) > 1:
            raise ValueError(f"members: one process can join one Ray cluster, found the addresses {addresses}")
        groups: dict[str, set[str]] = {}
        for ray in rays.values():
            if ray.group is not None:
                groups.setdefault(ray.group, set()).add(ray.strategy)
        if mixed := sorted(group for group, strategies in groups.items() if len(strategies) > 1):
            raise ValueError(
                f"members: host.ray.strategy differs within the groups {mixed}; write the same for all"
            )
        far = [name for name, m in self.members.items() if m.host is not None and m.host.server is not None]
        if self.deterministic and far:
            raise ValueError(
                f"deterministic: no promise can be made for members on other servers: {far}; drop one"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _by_kind(cls, raw: object) -> object:
        """Recipes that are councils, apart from those that fuse."""
        if not isinstance(raw, dict) or not isinstance(recipes := raw.get("ensembles"), dict):
            return raw
        if "councils" in raw:
            raise ValueError("councils: write them under ensembles, each with its kind")
        kinds = {name: kind for name, each in recipes.items() if (kind := _kind(each)) is not None}
        for name, kind in kinds.items():
            if kind not in ("fuse", *COUNCIL_KINDS):
                raise ValueError(f"ensembles.{name}.kind: {kind!r}; kinds are fuse, {', '.join(COUNCIL_KINDS)}")
        apart = {name: each for name, each in recipes.items() if kinds.get(name) in COUNCIL_KINDS}
        rest = {name: each for name, each in recipes.items() if name not in apart}
        return {**raw, "ensembles": rest, "councils": apart}

    @model_validator(mode="after")
    def _councils_resolve(self) -> Config:
        known = {*self.members, *self.ensembles, *self.councils}
        for name, council in self.councils.items():
            where = f"ensembles.{name}"
            if name in self.members:
                raise ValueError(f"{where}: a member has this name already; rename one of them")
            if unknown := sorted(set(council.called) - known):
                raise ValueError(
                    f"{where}: {unknown} are neither members nor ensembles (declared: {sorted(known)})"
                )
            if isinstance(council, RouteConfig) and council.into is not None:
                self._check_into(where, council, council.into)
        if circle := circle_of(self.councils):
            raise ValueError(f"ensembles: {' -> '.join(circle)} call each other in a circle; take one out")
        return self

    def _check_into(self, where: str, council: RouteConfig, into: str) -> None:
        """Where several models are selected, they must be members of the ensemble that they answer as."""
        ensemble = self.ensembles.get(into)
        if ensemble is None:
            raise ValueError(f"{where}.into: {into!r} is not a token-level ensemble (kind fuse)")
        if unknown := sorted(set(council.models) - set(ensemble.members)):
            raise ValueError(f"{where}.models: {unknown} are not members of {into!r}, as `into` needs")

    @model_validator(mode="after")
    def _references(self) -> Config:
        for name, ensemble in self.ensembles.items():
            if name in self.members:
                raise ValueError(f"ensembles.{name}: a member has this name already; rename one of them")
            if unknown := sorted(set(ensemble.members) - set(self.members)):
                raise ValueError(
                    f"ensembles.{name}.members: {unknown} are not declared under members "
                    f"(declared: {sorted(self.members)})"
                )
        return self


def _kind(recipe: object) -> str | None:
    """The kind of a recipe as it stands in the file, or of one that was checked; None: it is none."""
    if isinstance(recipe, dict):
        return str(recipe.get("kind", "fuse"))
    return getattr(recipe, "kind", None)
