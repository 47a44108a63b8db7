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
from typing import Protocol

import torch
from tqdm import tqdm

from ensemble_core.assembly import Loaded, Part, Spoken, Voice, assembled, check
from ensemble_core.config import Config
from ensemble_core.councils.book import CouncilBook
from ensemble_core.decoding.guidance import Grammars
from ensemble_core.decoding.thinking import MarkTokens
from ensemble_core.engine import Engine
from ensemble_core.errors import ConfigError
from ensemble_core.fusion.base import FusionSpace
from ensemble_core.member_config import MemberConfig
from ensemble_core.members.base import Member
from ensemble_core.members.loading.adapters import read_adapter
from ensemble_core.members.loading.checkpoints import load_tokenizer, load_vocabulary, resolve_folder
from ensemble_core.members.loading.memory import plan_caches
from ensemble_core.members.loading.models import Making, load_adapter, load_family
from ensemble_core.members.loading.placement import log_plan, measure, plan_cores
from ensemble_core.members.local import LocalMember
from ensemble_core.members.remote.elsewhere import Elsewhere
from ensemble_core.recipes import RecipeBook, SpaceOf
from ensemble_core.reloading import engine_limits
from ensemble_core.speakers import Speaker
from ensemble_core.stats import Record
from ensemble_core.text.prompt import PromptEncoder, read_template
from ensemble_core.text.reasoning import Marks, marks_of
from ensemble_core.text.vocabulary import Vocabulary
from ensemble_core.transfer.build import origin_of, recipe_of
from ensemble_core.transfer.matrix import TransferMatrix, common_anchors
from ensemble_core.transfer.store import load_matrix, matrix_path

__all__ = ["Loaded", "MemberMaker", "Spaces", "check", "load", "load_recipes", "thinking_of"]

logger = logging.getLogger(__name__)

_FUSIONS = ("relative", "projection", "union", "gac", "eva", "contrastive", "robust", "consistency")
_MODES = ("shared", "verify", "sampled")  # lockstep is registered with its positions
for _strategy in (*(f"fusion.{name}" for name in _FUSIONS), *(f"decoding.modes.{name}" for name in _MODES)):
    importlib.import_module(f"ensemble_core.{_strategy}")  # importing a strategy's file registers it


def load(config: Config, record: Record) -> Loaded:
    """Load all members and matrices. Raises a UnisonoError that says what is missing and what to do."""
    check(config)
    log_plan(config.members)
    vocabularies = {name: load_vocabulary(name, member) for name, member in config.members.items()}
    grammars, maker = _grammars(config, vocabularies), MemberMaker()
    spaces = maker.spaces(config, _spoken(vocabularies))
    RecipeBook(config, spaces.space).warm()  # before the models: a missing matrix is found in seconds
    CouncilBook(config)  # so is an artefact that does not fit
    with ThreadPoolExecutor(1, "grammars") as pool:
        warmed = [
            pool.submit(each.warm) for each in dict.fromkeys(grammars.values())
        ]  # adapters share their base's
        members = _load_members(config, vocabularies)
    try:
        for future in warmed:
            future.result()
        voices = {name: _voice(name, config, members[name], grammars[name]) for name in members}
        return assembled(config, _engine(config, members, record), voices, maker)
    except BaseException:
        for member in members.values():
            member.close()
        raise


def _grammars(config: Config, vocabularies: Mapping[str, Vocabulary]) -> dict[str, Grammars]:
    """Adapters have those of their base."""
    own = {name: Grammars(vocabularies[name]) for name in config.members if config.owner(name) == name}
    return {name: own[config.owner(name)] for name in config.members}


def load_recipes(config: Config) -> tuple[RecipeBook, dict[str, Vocabulary]]:
    """The recipes, with fusions on the CPU, and every member's vocabulary, without loading any model.

    Raises as `load`. A matrix is read when a recipe first needs it.
    """
    check(config)
    vocabularies = {name: load_vocabulary(name, member) for name, member in config.members.items()}
    return RecipeBook(config, Spaces(config, _spoken(vocabularies)).space), vocabularies


def _spoken(vocabularies: Mapping[str, Vocabulary]) -> dict[str, Spoken]:
    return {name: Spoken(vocabulary, torch.device("cpu")) for name, vocabulary in vocabularies.items()}


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
    adapters = [read_adapter(name, member) for name, member in planned.items() if member.adapter is not None]
    how = Making(config.scheduler.max_running, deterministic=config.deterministic)
    bases = [name for name in planned if config.owner(name) == name]
    for base in tqdm(bases, desc="loading members", unit="model", disable=None):
        family = {name: member for name, member in planned.items() if config.owner(name) == base}
        own = [adapter for adapter in adapters if adapter.member in family]
        for name, loaded in load_family(base, family, folders[base], vocabularies[base], how, own).items():
            logger.info("%s: ready, cache of %d pages of %d tokens", name, loaded.num_pages, loaded.page_size)
            members[name] = loaded
    return members


def _load_adapter(config: Config, name: str, base: Member) -> LocalMember:
    """An adapter, put on a base that serves."""
    assert isinstance(base, LocalMember), "a base lives in this process"
    section = config.members[name]
    folder, adapter = resolve_folder(section), read_adapter(name, section)
    planned = plan_caches({name: section}, {name: folder}, config.scheduler.max_running)[name]
    how = Making(config.scheduler.max_running, deterministic=config.deterministic)
    return load_adapter(adapter, planned, folder, base, how)


def _engine(config: Config, members: Mapping[str, Member], record: Record) -> Engine:
    scheduler = config.scheduler
    return Engine(
        members,
        engine_limits(config),
        scheduler.num_candidates,
        record,
        prefix_reuse=scheduler.prefix_reuse,
        member_timeout=config.member_timeout,
        cores=plan_cores(members),
    )


def _voice(name: str, config: Config, member: Member, grammars: Grammars) -> Voice:
    template = read_template(name, config.members[name].chat_template)
    prompts = PromptEncoder(name, load_tokenizer(name, config.members[name]), template)
    thinking = thinking_of(name, config.members[name], member.vocabulary, prompts.template)
    speaker = Speaker(member.vocabulary, prompts, member.max_len, grammars, member.abilities, thinking)
    return Voice(speaker, Spoken(member.vocabulary, member.device))


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


class MemberMaker:
    """Loads members one by one; see `assembly.Maker`. Matrices that are loaded are kept for all."""

    def __init__(self) -> None:
        self._matrices: dict[tuple[frozenset[str], str], TransferMatrix] = {}
        self._num_cores = torch.get_num_threads()  # of the thread that loads at start

    def part(self, config: Config, name: str, known: Voice | None, base: Part | None, *, measured: bool) -> Part:
        """See `Maker.part`."""
        section = config.members[name]
        log_plan({name: section})
        vocabulary = load_vocabulary(name, section)
        if base is not None:
            grammars = base.voice.speaker.grammars
        elif known is not None and known.speaker.vocabulary is vocabulary:
            grammars = known.speaker.grammars
        else:
            grammars = Grammars(vocabulary)
            self._matrices = {key: matrix for key, matrix in self._matrices.items() if name not in key[0]}
        grammars.warm()
        if base is not None:
            member: Member = _load_adapter(config, name, base.member)
        else:
            alone = config.model_copy(update={"members": {name: section}})
            member = _load_members(alone, {name: vocabulary})[name]
        try:
            cost = None if measured else measure(member, self._num_cores)
            return Part(member, _voice(name, config, member, grammars), cost)
        except BaseException:
            member.close()
            raise

    def space_of(self, config: Config, voices: Mapping[str, Voice]) -> SpaceOf:
        """See `Maker.space_of`."""
        return self.spaces(config, {name: voice.spoken for name, voice in voices.items()}).space

    def spaces(self, config: Config, spoken: Mapping[str, Spoken]) -> Spaces:
        """The spaces of members, with the matrices of those sets that an ensemble has."""
        used = {frozenset(config.owners(ensemble.members)) for ensemble in config.ensembles.values()}
        self._matrices = {key: matrix for key, matrix in self._matrices.items() if key[0] in used}
        return Spaces(config, spoken, self._matrices)


class _Placed(Protocol):
    """What a fusion space needs of a member."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def device(self) -> torch.device: ...


class Spaces:
    """Fusion spaces of the members. Ensembles over the same set of members share its matrices."""

    def __init__(
        self,
        config: Config,
        members: Mapping[str, _Placed],
        matrices: dict[tuple[frozenset[str], str], TransferMatrix] | None = None,
    ) -> None:
        """matrices: those that are loaded; more are added here."""
        self._config = config
        self._members = members
        self._matrices = {} if matrices is None else matrices

    def space(self, members: tuple[str, ...], whole: tuple[str, ...]) -> FusionSpace:
        """The space of `members` (main first), with matrices made for `whole`, the ensemble's full set.

        An adapter has its base's matrix: it leaves the embeddings, of which a matrix is made, as they are.
        """
        return FusionSpace(
            vocabularies=[self._members[name].vocabulary for name in members],
            matrices=lambda: [self._matrix(name, whole) for name in members],
            device=self._members[members[0]].device,
            members=members,
        )

    def _matrix(self, name: str, whole: tuple[str, ...]) -> TransferMatrix:
        owner, owners = self._config.owner(name), self._config.owners(whole)
        key = (frozenset(owners), owner)
        if key not in self._matrices:
            self._matrices[key] = self._load(owner, owners)
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
