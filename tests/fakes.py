"""Engines over fake members: `fake_loaded` is what `factory.load` returns, with exact transfer matrices."""

from __future__ import annotations

import threading
from collections import abc
from collections.abc import Mapping
from typing import Any, TypeVar

import jinja2
import torch

from ensemble_core.assembly import Loaded, Part, Spoken, Voice, assembled
from ensemble_core.config import Config
from ensemble_core.decoding.bans import bans_of
from ensemble_core.decoding.capacity import Limits
from ensemble_core.decoding.guidance import Grammars
from ensemble_core.decoding.recipe import Recipe
from ensemble_core.decoding.requests import GenerationRequest, Output
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.decoding.sequence import Sequence
from ensemble_core.engine import Engine
from ensemble_core.factory import thinking_of
from ensemble_core.fusion.base import Fusion, FusionSpace
from ensemble_core.fusion.relative import RelativeFusion, RelativeOptions
from ensemble_core.member_config import MemberConfig
from ensemble_core.members.base import Member
from ensemble_core.members.fake import FakeMember, byte_vocabulary, mid_character, pair_vocabulary
from ensemble_core.recipes import SpaceOf
from ensemble_core.speakers import Speaker
from ensemble_core.stats import PreemptionStats, Record, Stats, discard
from ensemble_core.text.alignment import Track
from ensemble_core.text.prompt import PromptEncoder
from ensemble_core.text.vocabulary import Vocabulary
from ensemble_core.transfer.matrix import Anchors, TransferMatrix, common_anchors

__all__ = ["FakeMember", "byte_vocabulary", "mid_character", "pair_vocabulary"]

Kind = TypeVar("Kind", bound=Stats)


def exact_matrix(vocabulary: Vocabulary, anchors: Anchors) -> TransferMatrix:
    """A token is its own anchor; one that is none lies wholly on its first byte. No neighbours."""
    column_of = {token: column for column, token in enumerate(anchors.tokens)}
    columns = torch.zeros(len(vocabulary), 1, dtype=torch.int32)
    values = torch.zeros(len(vocabulary), 1)
    for token_id, token in enumerate(vocabulary.tokens):
        if token_id in vocabulary.stop_ids:
            columns[token_id], values[token_id] = len(anchors) - 1, 1.0
        elif token_id not in vocabulary.special_ids:
            columns[token_id], values[token_id] = column_of.get(token, column_of[token[:1]]), 1.0
    return TransferMatrix(columns, values, anchors.ids(vocabulary))


def space_of(members: abc.Sequence[Member]) -> FusionSpace:
    """The fusion space of members, main first, with exact matrices."""
    vocabularies = [member.vocabulary for member in members]
    anchors = common_anchors(vocabularies)
    matrices = [exact_matrix(vocabulary, anchors) for vocabulary in vocabularies]
    return FusionSpace(
        vocabularies, lambda: matrices, torch.device("cpu"), tuple(member.name for member in members)
    )


def relative(members: abc.Sequence[Member], **options: Any) -> Fusion:
    """Relative fusion over exact matrices, on whole vocabularies unless told otherwise."""
    chosen = RelativeOptions.model_validate({"support": "full", "steps": 1, **options})
    return RelativeFusion(space_of(members), chosen)


def ensemble(members: abc.Sequence[Member], weights: abc.Sequence[float] | None = None, **options: Any) -> Recipe:
    """A recipe over members, main first; one alone has no fusion."""
    names = tuple(member.name for member in members)
    shares = tuple(weights or [1 / len(names)] * len(names))
    fusion = relative(members, **options) if len(members) > 1 else None
    return Recipe("+".join(names), names, shares, fusion, "relative" if fusion else "single")


def sequence(
    seq_id: int, prompt: str, members: abc.Sequence[Member], recipe: Recipe, params: SamplingParams
) -> Sequence:
    """A request in flight, its prompt spelt by each member's own vocabulary."""
    request = GenerationRequest(f"request-{seq_id}", recipe.model, prompt, params)
    tracks = {
        member.name: Track(member.vocabulary, member.vocabulary.encode(prompt), max_len=member.max_len)
        for member in members
    }
    return Sequence(seq_id, request, recipe, tracks, bans=bans_of(params, members[0].vocabulary))


class Records(list[Stats]):
    """What an engine has told: `engine = fake_engine(members, records.append)`."""

    def of(self, kind: type[Kind]) -> list[Kind]:
        """The records of one kind, in order."""
        return [each for each in self if isinstance(each, kind)]


def run(engine: Engine) -> dict[int, list[Output]]:
    """Step until all sequences have ended, the scheduler's books checked; the outputs of each."""
    outputs: dict[int, list[Output]] = {}
    while engine.has_work:
        for seq_id, output in engine.step():
            outputs.setdefault(seq_id, []).append(output)
        engine.scheduler.check()
    return outputs


def preempted(
    members: abc.Sequence[FakeMember], sequences: list[Sequence], num_candidates: int
) -> list[list[int]]:
    """The texts of sequences for which their members have too few pages, so that some are preempted."""
    records = Records()
    engine = fake_engine(members, records.append, num_candidates=num_candidates)
    engine.add(sequences)
    outputs = run(engine)
    assert records.of(PreemptionStats)
    assert all(member.is_empty for member in members)
    return [tokens(outputs[sequence.seq_id]) for sequence in sequences]


def tokens(outputs: abc.Sequence[Output]) -> list[int]:
    """Main's final tokens in some outputs."""
    return [token for output in outputs for token in output.token_ids]


class Bench:
    """An engine over fake members, and all outputs of its sequences."""

    def __init__(self, loaded: Loaded, members: Mapping[str, FakeMember]) -> None:
        self.loaded, self.engine, self.members = loaded, loaded.engine, members
        self.outputs: dict[int, list[Output]] = {}

    def step(self) -> None:
        """One step, its outputs kept, and the scheduler's books checked."""
        for seq_id, output in self.engine.step():
            self.outputs.setdefault(seq_id, []).append(output)
        self.engine.scheduler.check()

    def run(self) -> int:
        """Steps until all have ended; then every member is empty."""
        for steps in range(5000):
            if not self.engine.has_work:
                assert all(member.is_empty for member in self.members.values())
                return steps
            self.step()
        raise AssertionError("the engine does not come to an end")


def fake_engine(
    members: abc.Sequence[Member],
    record: Record = discard,
    *,
    max_running: int = 32,
    max_waiting: int = 64,
    token_budget: int = 64,
    num_candidates: int = 64,
    prefix_reuse: bool = False,
    member_timeout: float | None = None,
) -> Engine:
    """An engine over fake members."""
    limits = Limits(max_running, max_waiting, token_budget)
    by_name = {member.name: member for member in members}
    return Engine(
        by_name,
        limits,
        num_candidates,
        record,
        prefix_reuse=prefix_reuse,
        member_timeout=member_timeout,
    )


class FakeTokenizer:
    """What `PromptEncoder` needs of a tokenizer, over a vocabulary. No chat template unless given one."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.chat_template: str | None = None
        self.bos_token = self.bos_token_id = self.pad_token = self.pad_token_id = None
        self.eos_token_id = min(vocabulary.stop_ids, default=None)
        self.eos_token = None if self.eos_token_id is None else vocabulary.name_of(self.eos_token_id)

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": self._vocabulary.encode(text)}

    def convert_ids_to_tokens(self, token_ids: list[int]) -> list[str]:
        return [self._vocabulary.name_of(token_id) for token_id in token_ids]

    def apply_chat_template(
        self, messages: list[dict[str, Any]], *, chat_template: str | None, tokenize: bool, **variables: Any
    ) -> str:
        """The text alone, as `tokenize=False` gives it."""
        assert not tokenize
        return jinja2.Template(chat_template or self.chat_template or "").render(messages=messages, **variables)


def fake_config(members: abc.Sequence[str] = ("alpha", "beta"), **sections: Any) -> Config:
    """A configuration of fake members; an ensemble `duo` of the first two, and what `sections` say."""
    duo = {"members": dict.fromkeys(members[:2], 0.5), "main": members[0]}
    raw: dict[str, Any] = {
        "members": {name: {"model": f"fake-{name}"} for name in members},
        "ensembles": {"duo": duo} if len(members) > 1 else {},
    }
    return Config.model_validate(raw | sections)


def fake_loaded(config: Config, members: Mapping[str, FakeMember], record: Record = discard) -> Loaded:
    """What `factory.load` returns for `config`, over fake members."""
    scheduler = config.scheduler
    engine = fake_engine(
        list(members.values()),
        record,
        max_running=scheduler.max_running,
        max_waiting=scheduler.max_waiting,
        token_budget=scheduler.token_budget,
        num_candidates=scheduler.num_candidates,
        prefix_reuse=scheduler.prefix_reuse,
        member_timeout=scheduler.member_timeout,
    )
    maker = FakeMaker(members)
    voices = {name: fake_voice(config.members[name], member) for name, member in members.items()}
    return assembled(config, engine, voices, maker)


def fake_voice(section: MemberConfig, member: FakeMember) -> Voice:
    """What is kept of a fake member."""
    vocabulary = member.vocabulary
    prompts = PromptEncoder(member.name, FakeTokenizer(vocabulary), section.chat_template)
    thinking = thinking_of(member.name, section, vocabulary, prompts.template)
    speaker = Speaker(vocabulary, prompts, member.max_len, Grammars(vocabulary), member.abilities, thinking)
    return Voice(speaker, Spoken(vocabulary, member.device))


class FakeMaker:
    """Makes fake members: those of `known` again, and new ones by their names.

    fails: raised by the next load. gate: loads wait while it is clear. made: all that were made, in order. bases: of
    adapters among them.
    """

    def __init__(self, known: Mapping[str, FakeMember]) -> None:
        self.vocabularies = {name: member.vocabulary for name, member in known.items()}
        self.max_len = {name: member.max_len for name, member in known.items()}
        self.fails: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.made: list[FakeMember] = []
        self.bases: dict[str, str] = {}

    def part(self, config: Config, name: str, known: Voice | None, base: Part | None, *, measured: bool) -> Part:
        """See `Maker.part`."""
        assert self.gate.wait(10.0), "nobody opened the gate"
        if self.fails is not None:
            error, self.fails = self.fails, None
            raise error
        vocabulary = self.vocabularies.setdefault(name, byte_vocabulary())
        member = FakeMember(name, vocabulary, max_len=self.max_len.get(name, 256))
        self.made.append(member)
        if base is not None:
            self.bases[name] = base.member.name
        return Part(member, fake_voice(config.members[name], member))

    def space_of(self, config: Config, voices: Mapping[str, Voice]) -> SpaceOf:
        """See `Maker.space_of`; matrices are exact."""

        def space(names: tuple[str, ...], _whole: tuple[str, ...]) -> FusionSpace:
            vocabularies = [voices[name].spoken.vocabulary for name in names]
            anchors = common_anchors(vocabularies)
            matrices = [exact_matrix(vocabulary, anchors) for vocabulary in vocabularies]
            return FusionSpace(vocabularies, lambda: matrices, torch.device("cpu"), names)

        return space
