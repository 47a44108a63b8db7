"""What serves requests, made of loaded parts and a configuration; made anew where recipes or members change.

`Loaded` is never changed: a change makes another one over the same engine, checked in full before anybody sees it.
Requests that began with the old one end with it. Does not know how members are loaded (`Maker`), or threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from ensemble_core.admission import Admission
from ensemble_core.config import Config
from ensemble_core.council_config import RouteConfig
from ensemble_core.councils.book import CouncilBook, check_councils
from ensemble_core.councils.route import SCORING
from ensemble_core.engine import Engine
from ensemble_core.members.base import Member
from ensemble_core.members.cores import ForwardCost
from ensemble_core.permissions import Permissions
from ensemble_core.recipes import ModelInfo, RecipeBook, SpaceOf, check_strategies, list_models
from ensemble_core.speakers import Speaker
from ensemble_core.text.prompt import read_template
from ensemble_core.text.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Spoken:
    """What a fusion space needs of a member; it does not hold the member itself."""

    vocabulary: Vocabulary
    device: torch.device


@dataclass(frozen=True, slots=True)
class Voice:
    """What is kept of a declared member whether or not it is in memory."""

    speaker: Speaker
    spoken: Spoken


@dataclass(frozen=True, slots=True)
class Part:
    """A member that can be attached. cost: of its forwards, where it shares this machine's cores; None: not asked."""

    member: Member
    voice: Voice
    cost: ForwardCost | None = None


class Maker(Protocol):
    """Loads members, and knows where matrices lie."""

    def part(self, config: Config, name: str, known: Voice | None, base: Part | None, *, measured: bool) -> Part:
        """Load a declared member, which takes long; for a thread of its own.

        known: what was kept of it. base: of an adapter, the member whose weights it shares. measured: the cost of its
        forwards is known. Raises a UnisonoError.
        """

    def space_of(self, config: Config, voices: Mapping[str, Voice]) -> SpaceOf:
        """The fusion spaces of members. What they need of matrices is loaded on first use, and kept."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Everything needed to serve requests."""

    config: Config
    engine: Engine
    admission: Admission
    book: RecipeBook
    models: list[ModelInfo]
    councils: CouncilBook
    voices: Mapping[str, Voice]
    maker: Maker
    permissions: Permissions

    def members_of(self, model: str) -> tuple[str, ...]:
        """All members that a model may need; none for an unknown model."""
        return next((info.members for info in self.models if info.name == model), ())


def check(config: Config) -> None:
    """Check what can be checked without loading anything. Raises ConfigError."""
    check_strategies(config)
    check_councils(config)
    for name, member in config.members.items():
        read_template(name, member.chat_template)


def assembled(
    config: Config, engine: Engine, voices: Mapping[str, Voice], maker: Maker, like: Loaded | None = None
) -> Loaded:
    """What serves a configuration whose members are all known, with every recipe built.

    like: what served before, whose fusions over the same members are taken over. Raises a UnisonoError that names
    the field.
    """
    check(config)
    kept = {name: voices[name] for name in config.members}
    book = RecipeBook(config, maker.space_of(config, kept), None if like is None else _like(like, kept))
    book.warm()
    admission = Admission(book, {name: voice.speaker for name, voice in kept.items()})
    admission.check_ensembles(config.ensembles)
    _check_likelihoods(config, admission)
    max_len = {name: voice.speaker.max_len for name, voice in kept.items()}
    models, councils = list_models(config, max_len), CouncilBook(config)
    return Loaded(config, engine, admission, book, models, councils, kept, maker, Permissions(config))


def _like(like: Loaded, voices: Mapping[str, Voice]) -> RecipeBook | None:
    """The book before, unless a member's tokens or its device are others now."""
    same = all(like.voices.get(name, voice).spoken == voice.spoken for name, voice in voices.items())
    return like.book if same else None


def _check_likelihoods(config: Config, admission: Admission) -> None:
    """Raise ConfigError where a router asks for the likelihood of prompts and a member cannot tell it."""
    for name, council in config.councils.items():
        if isinstance(council, RouteConfig) and council.by == "perplexity":
            for model in council.models:
                admission.check_calls(model, SCORING, f"ensembles.{name}.models")
