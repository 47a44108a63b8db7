"""The YAML configuration: members, ensembles, matrices, scheduler, server. Floor 0: no torch.

Invariants: unknown keys are refused; every reference (an ensemble's members, its main) resolves; relative paths are
resolved against the folder of the file. It does not know which fusions and modes exist or what options they take:
`recipes.check_strategies` checks those against the registries and reports errors the same way.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from ensemble_core.adapter_config import check_adapters, with_bases
from ensemble_core.council_config import COUNCIL_KINDS, CouncilConfig, RouteConfig, circle_of
from ensemble_core.errors import ConfigError
from ensemble_core.hosts import HostConfig
from ensemble_core.limits import LimitsConfig, OverridesConfig
from ensemble_core.reasoning_config import ReasoningConfig
from ensemble_core.section import Section, Size, parse_size

_SECRETS = {"api_keys", "admin_keys"}  # no message quotes the value of these fields

AUTO: Literal["auto"] = "auto"
_LEAST_CACHE = 2**20
_OF_WEIGHTS = {"dtype", "device", "device_map", "max_memory", "kv_memory", "kv_cache", "forward"}
FAR_TIMEOUT = 30.0  # seconds; of calls to members where some live elsewhere and `member_timeout` is not set
DEFAULT_TAU = 0.25  # nats per byte: about 1 nat per token of four bytes
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class MemberConfig(Section):
    """One resident model."""

    model: str = Field(min_length=1, description="Hub id, folder, or demo:NAME (see `unisono pull`).")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub; ignored by folders.")
    base: str | None = Field(
        None,
        description="Member whose weights this one shares, with `adapter`; what is not said here is as there.",
    )
    adapter: str | None = Field(
        None, min_length=1, description="LoRA adapter in PEFT's format: hub id or folder; see docs/adapters.md."
    )
    adapter_revision: str | None = Field(None, description="Of an adapter on the hub; ignored by folders.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Of weights and cache. auto: the dtype that the checkpoint was saved in."
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1, ... auto: the first GPU, else the CPU.")
    device_map: str | dict[str, int | str] | None = Field(
        None, description="accelerate's device map (auto, balanced, or module -> device). Excludes `device`."
    )
    max_memory: dict[int | str, str | int] | None = Field(
        None, description="Device -> size for device_map: {0: 20GiB, cpu: 32GiB}."
    )
    kv_memory: int | Literal["auto"] = Field(
        AUTO, description="This member's KV cache, for example 2GiB. auto: a share of what the weights leave."
    )
    kv_cache: Literal["auto", "rows", "paged"] = Field(
        "auto", description="rows: one row per sequence. paged: small pages. auto: paged on CUDA, rows on the CPU."
    )
    max_len: int = Field(
        2048, ge=16, description="Longest sequence (prompt + completion) in this member's tokens."
    )
    forward: Literal["auto", "transformers"] = Field(
        "auto", description="auto: flat layers for known families. transformers: always the library's own forward."
    )
    chat_template: str | None = Field(
        None, description="Jinja text or the path of a .jinja file, used instead of the tokenizer's own template."
    )
    reasoning: Literal["auto", "none"] | ReasoningConfig = Field(
        "auto",
        description="What marks reasoning in this member's answers: {start, end}, or none. auto: as its chat "
        "template shows, or its vocabulary.",
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the checkpoint.")
    host: HostConfig | None = Field(
        None, description="Where the member lives: ray, process or server. None: in the server's process."
    )

    @field_validator("kv_memory", mode="before")
    @classmethod
    def _size(cls, value: str | int) -> str | int:
        if value == AUTO:
            return value
        if (size := parse_size(value)) < _LEAST_CACHE:
            raise ValueError(f"Input should be greater than or equal to {_LEAST_CACHE} bytes, or auto")
        return size

    @property
    def cache_bytes(self) -> int:
        """Size of the cache in bytes, once it has been planned."""
        assert isinstance(self.kv_memory, int), "the cache is not planned"
        return self.kv_memory

    @model_validator(mode="after")
    def _placement(self) -> MemberConfig:
        if self.device_map is not None and self.device != "auto":
            raise ValueError("device and device_map exclude each other; keep one of them")
        if self.max_memory is not None and self.device_map is None:
            raise ValueError("max_memory only acts with device_map; add `device_map: auto` or drop it")
        return self

    @model_validator(mode="after")
    def _adapts(self) -> MemberConfig:
        if (self.adapter is None) != (self.base is None):
            raise ValueError(
                "adapter and base go together: files, and the member that they adapt; set both or neither"
            )
        if self.adapter_revision is not None and self.adapter is None:
            raise ValueError("adapter_revision only acts with `adapter`; set it or drop adapter_revision")
        if self.adapter is not None and self.host is not None:
            raise ValueError("host: an adapter shares its base's memory, in the server's process; drop host")
        return self

    @model_validator(mode="after")
    def _host_acts(self) -> MemberConfig:
        if self.host is not None and self.host.server is not None:
            given = sorted(self.model_fields_set & _OF_WEIGHTS)
            if given:
                raise ValueError(
                    f"{', '.join(given)} only act where Unisono loads the model; with host.server, tell that server"
                )
        return self


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

    by: Literal["fixed", "perplexity"] = Field(
        "fixed", description="fixed: as configured. perplexity: times exp(-NLL / tau) of each request's prompt."
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
    def _tau_acts(self) -> WeightingConfig:
        if self.by == "fixed" and "tau" in self.model_fields_set:
            raise ValueError("tau only acts with `by: perplexity`; set it or drop tau")
        return self


class EnsembleConfig(Section):
    """A recipe: the members, their weights, which one is main, and how they are fused."""

    kind: Literal["fuse"] = Field("fuse", description="fuse; route, vote, discuss, graph: see docs/councils.md.")
    members: dict[Name, Weight] = Field(min_length=1, description="Member -> weight; scaled to sum to 1.")
    main: Name = Field(description="The member whose vocabulary the output is sampled from.")
    fusion: FusionConfig = Field(default_factory=lambda: FusionConfig(), description="How the members are fused.")
    weighting: WeightingConfig = Field(
        default_factory=lambda: WeightingConfig(), description="fixed, or by each prompt's perplexity."
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


class MatricesConfig(Section):
    """Where transfer matrices lie and how `unisono build` makes them."""

    folder: Path = Field(Path("../matrices"), description="Relative to the folder of this file.")
    recipe: Literal["centred", "deepen"] = Field("centred", description="See docs/methods.md.")
    top_k: int = Field(8, ge=1, description="Anchors kept per row.")
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


class ServerConfig(Section):
    """The HTTP server."""

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for all.")
    port: int = Field(8000, ge=0, le=65535, description="0 picks a free one.")
    root_path: str = Field(
        "", pattern=r"^(/[^/?#\s]+)*$", description="Path that a proxy gives this server, for example /llm."
    )
    api_keys: tuple[SecretStr, ...] = Field(
        (), description="A client needs one of these; none set: none is needed."
    )
    api_key_env: str | None = Field(
        None, min_length=1, description="Environment variable with more keys, comma separated."
    )
    api_key_file: Path | None = Field(None, description="File with more keys, one per line; # begins a comment.")
    admin_keys: tuple[SecretStr, ...] = Field(
        (), description="Keys that open /v1/admin, and nothing else; none set: those routes do not exist."
    )
    admin_key_env: str | None = Field(
        None, min_length=1, description="Environment variable with more of them, comma separated."
    )
    protect_metrics: bool = Field(True, description="Whether /metrics needs a key as well, if keys are set.")
    cors_origins: tuple[str, ...] = Field((), description="Web pages that may call: https://a.org, or * for all.")
    tls_cert_file: Path | None = Field(None, description="PEM certificate chain; with tls_key_file: HTTPS.")
    tls_key_file: Path | None = Field(None, description="PEM private key.")
    tls_key_password_env: str | None = Field(
        None, min_length=1, description="Environment variable with the private key's password."
    )
    max_body_bytes: Size = Field(4 * 2**20, ge=1024, description="Larger bodies get a 413.")
    max_choices: int = Field(128, ge=1, description="Most prompts x n of one request.")
    drain_seconds: float = Field(30.0, ge=0.0, description="How long requests may go on at shutdown.")
    allowed_hosts: tuple[str, ...] | None = Field(
        None,
        description="Host names that requests may address, or * for any. None: any, but on loopback without keys "
        "only localhost and IP addresses, so that no web page can reach the server under its own name.",
    )
    files_folder: Path | None = Field(
        None, description="Where /v1/files and /v1/batches keep what they are given; None: both are off."
    )
    limits: LimitsConfig = Field(default_factory=lambda: LimitsConfig())
    allow_overrides: OverridesConfig = Field(default_factory=lambda: OverridesConfig())
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Of our loggers.")
    log_format: Literal["text", "json"] = Field("text", description="Lines of text, or one JSON object a line.")
    access_log: bool = Field(True, description="Log one line for each request, without prompts.")
    traces: bool = Field(
        False, description="Send a span for each request; OTEL_* variables configure it. Needs unisono[otel]."
    )

    @model_validator(mode="after")
    def _tls_pair(self) -> ServerConfig:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_cert_file and tls_key_file go together; set both or neither")
        if self.tls_key_password_env is not None and self.tls_key_file is None:
            raise ValueError("tls_key_password_env only acts with tls_key_file; set it or drop it")
        return self

    def replaced(self, **chosen: object) -> ServerConfig:
        """The section with some fields replaced and checked. Raises ConfigError as `load_config` does."""
        try:
            return ServerConfig.model_validate({**dict(self), **chosen})
        except ValidationError as error:
            raise ConfigError("; ".join(_lines(error, "server"))) from error


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
            raise ConfigError("; ".join(_lines(error))) from error
        if self._source is not None:
            config = _resolve_paths(config, self._source.resolve().parent)
            config._source = self._source
        return config

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


def load_config(path: str | Path) -> Config:
    """Read and check a YAML file. Relative paths in it are resolved against its folder.

    Raises ConfigError that gives, for each wrong field, its path, what is wrong and what was given.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); pass --config FILE") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {_yaml_line(error)}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected sections (members, ensembles, ...), found {type(raw).__name__}")
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: " + "; ".join(_lines(error))) from error
    config = _resolve_paths(config, path.resolve().parent)
    config._source = path
    return config


def _yaml_line(error: yaml.YAMLError) -> str:
    """What is wrong and where. Never quotes the line itself, which may hold a key."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    mark = error.problem_mark
    return f"{error.problem} in line {mark.line + 1}, column {mark.column + 1}"


def _lines(error: ValidationError, *parents: str) -> list[str]:
    return [
        _line((*parents, *item["loc"]), item["msg"], item["input"]) for item in error.errors(include_url=False)
    ]


def _line(location: tuple[int | str, ...], message: str, given: object) -> str:
    if location[:1] == ("councils",) and len(location) > 2:
        location = ("ensembles", location[1], *location[3:])  # without the kind, as it stands in the file
    where = ".".join(str(part) for part in location) or "(top level)"
    message = message.removeprefix("Value error, ")
    if isinstance(given, BaseModel | dict | list) or _SECRETS.intersection(location):
        return f"{where}: {message}"
    return f"{where}: {message} (given: {given!r})"


def _resolve_paths(config: Config, folder: Path) -> Config:
    matrices = config.matrices.model_copy(update={"folder": (folder / config.matrices.folder).resolve()})
    members = {
        name: member.model_copy(
            update={
                "model": _resolve_model(member.model, folder),
                "adapter": None if member.adapter is None else _resolve_model(member.adapter, folder),
                "chat_template": _resolve_template(member.chat_template, folder),
                "host": _resolve_host(member.host, folder),
            }
        )
        for name, member in config.members.items()
    }
    server = config.server.model_copy(update=_resolve_server_files(config.server, folder))
    councils = {name: _resolve_council(council, folder) for name, council in config.councils.items()}
    changes = {"matrices": matrices, "members": members, "server": server, "councils": councils}
    return config.model_copy(update=changes)


def _resolve_server_files(server: ServerConfig, folder: Path) -> dict[str, Path]:
    names = ("api_key_file", "tls_cert_file", "tls_key_file", "files_folder")
    files = {name: getattr(server, name) for name in names}
    return {name: (folder / file.expanduser()).resolve() for name, file in files.items() if file is not None}


def _resolve_model(model: str, folder: Path) -> str:
    """A path that starts with . or ~ is a folder; everything else is left to the hub or the demo store."""
    if model.startswith((".", "~")):
        return str((folder / Path(model).expanduser()).resolve())
    return model


def _resolve_host(host: HostConfig | None, folder: Path) -> HostConfig | None:
    if host is None or host.server is None or host.server.ca_file is None:
        return host
    ca_file = (folder / host.server.ca_file.expanduser()).resolve()
    return HostConfig(server=host.server.model_copy(update={"ca_file": ca_file}))


def _resolve_council(council: CouncilConfig, folder: Path) -> CouncilConfig:
    files = {name: getattr(council, name, None) for name in ("artefact", "examples")}
    found = {name: (folder / file.expanduser()).resolve() for name, file in files.items() if file is not None}
    return council.model_copy(update=found)


def _resolve_template(template: str | None, folder: Path) -> str | None:
    if template is not None and template.endswith(".jinja"):
        return str((folder / Path(template).expanduser()).resolve())
    return template
