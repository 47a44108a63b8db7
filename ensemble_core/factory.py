"""Builds a working engine from a configuration. The one place that knows concrete classes.

What can be checked without loading is checked first: names, options, chat templates. Then it loads the vocabularies
and the matrices that the configured fusions need, and last the models, which take longest. Meanwhile a thread makes
the tables of constrained decoding, so that no request pays for them. Does not know HTTP.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from tqdm import tqdm

from ensemble_core.admission import Admission, Speaker
from ensemble_core.config import Config, MemberConfig
from ensemble_core.council_config import RouteConfig
from ensemble_core.councils.book import CouncilBook, check_councils
from ensemble_core.councils.route import SCORING
from ensemble_core.decoding.guidance import Grammars
from ensemble_core.decoding.scheduler import Limits
from ensemble_core.decoding.thinking import MarkTokens
from ensemble_core.engine import Engine
from ensemble_core.errors import ConfigError
from ensemble_core.fusion.base import FusionSpace
from ensemble_core.members.base import Member
from ensemble_core.members.loading.checkpoints import load_tokenizer, load_vocabulary, resolve_folder
from ensemble_core.members.loading.memory import plan_caches
from ensemble_core.members.loading.models import load_member
from ensemble_core.members.loading.placement import log_plan, plan_cores
from ensemble_core.members.remote.elsewhere import Elsewhere
from ensemble_core.recipes import ModelInfo, RecipeBook, check_strategies, list_models
from ensemble_core.stats import Record
from ensemble_core.text.prompt import PromptEncoder, read_template
from ensemble_core.text.reasoning import Marks, marks_of
from ensemble_core.text.vocabulary import Vocabulary
from ensemble_core.transfer.build import origin_of, recipe_of
from ensemble_core.transfer.matrix import TransferMatrix, common_anchors
from ensemble_core.transfer.store import load_matrix, matrix_path

logger = logging.getLogger(__name__)

_FUSIONS = ("relative", "projection", "union", "gac", "eva", "contrastive", "robust", "consistency")
_MODES = ("shared", "verify", "sampled")  # lockstep is registered with its positions
for _strategy in (*(f"fusion.{name}" for name in _FUSIONS), *(f"decoding.modes.{name}" for name in _MODES)):
    importlib.import_module(f"ensemble_core.{_strategy}")  # importing a strategy's file registers it


@dataclass(frozen=True, slots=True)
class Loaded:
    """Everything needed to serve requests."""

    engine: Engine
    admission: Admission
    models: list[ModelInfo]
    councils: CouncilBook


def check(config: Config) -> None:
    """Check what can be checked without loading anything. Raises ConfigError."""
    check_strategies(config)
    check_councils(config)
    for name, member in config.members.items():
        read_template(name, member.chat_template)


def load(config: Config, record: Record) -> Loaded:
    """Load all members and matrices. Raises a UnisonoError that says what is missing and what to do."""
    check(config)
    log_plan(config.members)
    vocabularies = {name: load_vocabulary(name, member) for name, member in config.members.items()}
    grammars = {name: Grammars(vocabulary) for name, vocabulary in vocabularies.items()}
    spaces = Spaces(config, _spoken(vocabularies))
    RecipeBook(config, spaces.space).warm()  # before the models: a missing matrix is found in seconds
    councils = CouncilBook(config)
    with ThreadPoolExecutor(1, "grammars") as pool:
        warmed = [pool.submit(each.warm) for each in grammars.values()]
        members = _load_members(config, vocabularies)
    try:
        for future in warmed:
            future.result()
        return _assembled(config, members, spaces.placed(members), grammars, councils, record)
    except BaseException:
        for member in members.values():
            member.close()
        raise


def _assembled(
    config: Config,
    members: Mapping[str, Member],
    spaces: Spaces,
    grammars: Mapping[str, Grammars],
    councils: CouncilBook,
    record: Record,
) -> Loaded:
    book = RecipeBook(config, spaces.space)
    book.warm()
    speakers = {name: _speaker(name, config, members[name], grammars[name]) for name in members}
    max_len = {name: member.max_len for name, member in members.items()}
    admission = Admission(book, speakers)
    admission.check_ensembles(config.ensembles)
    _check_likelihoods(config, admission)
    return Loaded(_engine(config, members, record), admission, list_models(config, max_len), councils)


def _check_likelihoods(config: Config, admission: Admission) -> None:
    """Raise ConfigError where a router asks for the likelihood of prompts and a member cannot tell it."""
    for name, council in config.councils.items():
        if isinstance(council, RouteConfig) and council.by == "perplexity":
            for model in council.models:
                admission.check_calls(model, SCORING, f"ensembles.{name}.models")


def load_recipes(config: Config) -> tuple[RecipeBook, dict[str, Vocabulary]]:
    """The recipes, with fusions on the CPU, and every member's vocabulary, without loading any model.

    Raises as `load`. A matrix is read when a recipe first needs it.
    """
    check(config)
    vocabularies = {name: load_vocabulary(name, member) for name, member in config.members.items()}
    return RecipeBook(config, Spaces(config, _spoken(vocabularies)).space), vocabularies


def _spoken(vocabularies: Mapping[str, Vocabulary]) -> dict[str, _Spoken]:
    return {name: _Spoken(vocabulary, torch.device("cpu")) for name, vocabulary in vocabularies.items()}


def _load_members(config: Config, vocabularies: Mapping[str, Vocabulary]) -> dict[str, Member]:
    """All members in the order of the configuration; those elsewhere load meanwhile."""
    elsewhere = Elsewhere(config, vocabularies)
    try:
        here = _load_here(config, vocabularies)
        members = here | elsewhere.ready()
        return {name: members[name] for name in config.members}
    except BaseException:
        elsewhere.close()
        raise


def _load_here(config: Config, vocabularies: Mapping[str, Vocabulary]) -> dict[str, Member]:
    members: dict[str, Member] = {}
    here = {name: member for name, member in config.members.items() if member.host is None}
    folders = {name: resolve_folder(member) for name, member in here.items()}
    planned = plan_caches(here, folders, config.scheduler.max_running)
    load = partial(load_member, max_batch=config.scheduler.max_running, deterministic=config.deterministic)
    for name, member in tqdm(planned.items(), desc="loading members", unit="member", disable=None):
        loaded = load(name, member, folders[name], vocabularies[name])
        logger.info("%s: ready, cache of %d pages of %d tokens", name, loaded.num_pages, loaded.page_size)
        members[name] = loaded
    return members


def _engine(config: Config, members: Mapping[str, Member], record: Record) -> Engine:
    scheduler = config.scheduler
    limits = Limits(
        scheduler.max_running,
        scheduler.max_waiting,
        scheduler.token_budget,
        scheduler.max_stretch,
        scheduler.max_queued_tokens,
        scheduler.spare,
    )
    return Engine(
        members,
        limits,
        scheduler.num_candidates,
        record,
        prefix_reuse=scheduler.prefix_reuse,
        member_timeout=config.member_timeout,
        cores=plan_cores(members),
    )


def _speaker(name: str, config: Config, member: Member, grammars: Grammars) -> Speaker:
    template = read_template(name, config.members[name].chat_template)
    prompts = PromptEncoder(name, load_tokenizer(name, config.members[name]), template)
    thinking = thinking_of(name, config.members[name], member.vocabulary, prompts.template)
    return Speaker(member.vocabulary, prompts, member.max_len, grammars, member.abilities, thinking)


def thinking_of(name: str, config: MemberConfig, vocabulary: Vocabulary, template: str) -> MarkTokens | None:
    """How a member marks its reasoning: as configured, or as its checkpoint shows; None: it has no marks.

    Raises ConfigError for configured marks that cannot work.
    """
    match config.reasoning:
        case "none":
            return None
        case "auto":
            marks = marks_of(template, vocabulary.tokens)
        case chosen:
            marks = Marks(chosen.start, chosen.end)
    if marks is None:
        return None
    tokens = MarkTokens(marks, vocabulary)
    if tokens.fault is None:
        return tokens
    if config.reasoning != "auto":
        raise ConfigError(f"members.{name}.reasoning: {tokens.fault}; use other markers, or none")
    logger.warning("%s: its reasoning is not split off: %s", name, tokens.fault)
    return None


class _Placed(Protocol):
    """What a fusion space needs of a member."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def device(self) -> torch.device: ...


@dataclass(frozen=True, slots=True)
class _Spoken:
    """A member whose model is not loaded."""

    vocabulary: Vocabulary
    device: torch.device


class Spaces:
    """Fusion spaces of the members. Ensembles over the same set of members share its matrices."""

    def __init__(self, config: Config, members: Mapping[str, _Placed]) -> None:
        self._config = config
        self._members = members
        self._matrices: dict[tuple[frozenset[str], str], TransferMatrix] = {}

    def placed(self, members: Mapping[str, _Placed]) -> Spaces:
        """The spaces of the same members on other devices, with the matrices that are loaded already."""
        spaces = Spaces(self._config, members)
        spaces._matrices = self._matrices
        return spaces

    def space(self, members: tuple[str, ...], whole: tuple[str, ...]) -> FusionSpace:
        """The space of `members` (main first), with matrices made for `whole`, the ensemble's full set."""
        return FusionSpace(
            vocabularies=[self._members[name].vocabulary for name in members],
            matrices=lambda: [self._matrix(name, whole) for name in members],
            device=self._members[members[0]].device,
            members=members,
        )

    def _matrix(self, name: str, whole: tuple[str, ...]) -> TransferMatrix:
        key = (frozenset(whole), name)
        if key not in self._matrices:
            self._matrices[key] = self._load(name, whole)
        return self._matrices[key]

    def _load(self, name: str, whole: tuple[str, ...]) -> TransferMatrix:
        config = self._config
        recipe = recipe_of(config.matrices)
        return load_matrix(
            matrix_path(config.matrices.folder, whole, name, recipe.name),
            member=name,
            vocabulary=self._members[name].vocabulary,
            anchors=common_anchors([self._members[member].vocabulary for member in whole]),
            recipe=recipe,
            rebuild=config.build_command,
            origin=origin_of(config.members[name]),
        )
