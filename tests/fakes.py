"""Members without a model: byte vocabularies, next-token distributions hashed from the cached bytes.

`FakeMember` keeps the books that a real cache keeps, and trips an assertion where a forward overruns them. It can
be told to fail, to answer NaN for a sequence, or to block. `fake_loaded` is what `factory.load` returns, over
such members and with exact transfer matrices.
"""

from __future__ import annotations

import codecs
import hashlib
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ensemble_core.admission import Admission, Speaker
from ensemble_core.config import Config
from ensemble_core.decoding.guidance import Grammars
from ensemble_core.decoding.recipe import Recipe
from ensemble_core.decoding.requests import GenerationRequest
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.decoding.scheduler import Limits
from ensemble_core.decoding.sequence import Sequence as Request
from ensemble_core.engine import Engine
from ensemble_core.errors import MemberError
from ensemble_core.factory import Loaded
from ensemble_core.fusion.base import Fusion, FusionSpace
from ensemble_core.fusion.relative import RelativeFusion, RelativeOptions
from ensemble_core.members.base import Candidates, Feed, Member
from ensemble_core.members.candidates import top_candidates
from ensemble_core.recipes import RecipeBook, list_models
from ensemble_core.stats import (
    CacheStats,
    DropStats,
    HealthStats,
    NullSink,
    PreemptionStats,
    PrefixStats,
    QueueStats,
    RequestStats,
    StatsSink,
    StepStats,
    TokenStats,
)
from ensemble_core.text.alignment import Track
from ensemble_core.text.prompt import PromptEncoder
from ensemble_core.text.vocabulary import Vocabulary
from ensemble_core.transfer.matrix import Anchors, TransferMatrix, common_anchors

# What fake members like to write: a small alphabet, so that long tokens match, and the heads of é, 中 and 😀.
_LIKELY = set(b"abcde \n.\xc3\xe4\xf0")
_LONG = tuple(
    sorted({a + b for a in "abcde" for b in "abcde"} | {" " + a for a in "abcde"} | {"abc", " dea", "cab", "\n\n"})
)


def byte_vocabulary(long_tokens: Sequence[str] = (), eos: bool = True) -> Vocabulary:
    """256 bytes, then longer tokens, then `<eos>`; encodes by the longest match."""
    ordinary = [bytes([byte]) for byte in range(256)] + [token.encode() for token in long_tokens]
    ids = {token: token_id for token_id, token in enumerate(ordinary)}
    longest_first = sorted(ordinary, key=len, reverse=True)
    pattern = re.compile(b"|".join(map(re.escape, longest_first)), re.DOTALL)
    end = frozenset({len(ordinary)} if eos else ())
    return Vocabulary(
        tokens=[*ordinary, *([b"<eos>"] if eos else [])],
        special_ids=end,
        stop_ids=end,
        encode=lambda text: [ids[match] for match in pattern.findall(text.encode())],
    )


def pair_vocabulary() -> Vocabulary:
    """Bytes and pairs of letters: spells the same text in other tokens than `byte_vocabulary`."""
    return byte_vocabulary(_LONG)


class FakeMember:
    """See `ensemble_core.members.base.Member`; the same bytes give the same distribution, however cached."""

    def __init__(
        self,
        name: str = "alpha",
        vocabulary: Vocabulary | None = None,
        *,
        seed: int = 0,
        max_len: int = 256,
        page_size: int = 16,
        num_pages: int = 1024,
        min_prefix: int = 1,
        eos_bias: float = -30.0,
        device: str = "cpu",
    ) -> None:
        self.name = name
        self.min_prefix = min_prefix
        self.vocabulary = vocabulary or byte_vocabulary()
        self.max_len, self.page_size, self.num_pages = max_len, page_size, num_pages
        self.device = torch.device(device)
        self.cached: dict[int, list[int]] = {}  # seq_id -> ids
        self.calls: list[list[Feed]] = []
        self.threads: set[str] = set()  # names of the threads that forwards ran in
        self.rollbacks: list[tuple[int, int]] = []
        self.kept: list[list[int]] = []  # prefixes of sequences that are gone, least recently used first
        self.reuses: list[tuple[int, int]] = []  # seq_id, tokens that it began with
        self.fails_on: set[int] = set()  # sequences that make a forward raise
        self.nan_on: set[int] = set()  # sequences whose rows are NaN
        self.breaks: Exception | None = None  # raised by the next forward: a bug, not a MemberError
        self.gate = threading.Event()  # a forward waits while it is clear
        self.gate.set()
        self.entered = threading.Event()  # a forward has begun
        self._seed = seed
        self._prior = self._make_prior(eos_bias)

    @property
    def free_pages(self) -> int:
        return self.num_pages - sum(-(-len(ids) // self.page_size) for ids in self.cached.values())

    @property
    def is_empty(self) -> bool:
        return self.free_pages == self.num_pages and not self.cached

    def forward(self, feeds: Sequence[Feed], top_k: int) -> Candidates:
        self.calls.append(list(feeds))
        self.threads.add(threading.current_thread().name)
        self.entered.set()
        assert self.gate.wait(10.0), "nobody opened the gate"
        if self.breaks is not None:
            raise self.breaks
        if failing := self.fails_on.intersection(feed.seq_id for feed in feeds):
            raise MemberError(self.name, f"told to fail on {sorted(failing)}")
        rows = [row for feed in feeds for row in self._extend(feed)]
        assert self.free_pages >= 0, "more pages are used than there are"
        self._make_way()
        logits = torch.stack(rows) if rows else torch.empty(0, len(self.vocabulary))
        also = [ids for feed in feeds for ids in feed.also or ((),) * feed.wanted]
        candidates = top_candidates(logits, top_k, also)
        if not any(feed.following for feed in feeds):
            return candidates
        return replace(candidates, likelihoods=tuple(self._likelihood(feed) for feed in feeds))

    def _likelihood(self, feed: Feed) -> float:
        """After each fed token; a feed that asks is always the last of what is cached."""
        cached = self.cached[feed.seq_id]
        start = len(cached) - len(feed.token_ids)
        return sum(
            self.next_logits(cached[: start + at + 1]).log_softmax(0)[token_id].item()
            for at, token_id in enumerate(feed.following)
            if token_id >= 0
        )

    def rollback(self, seq_id: int, length: int) -> None:
        assert 0 <= length <= len(self.cached[seq_id])
        self.rollbacks.append((seq_id, len(self.cached[seq_id]) - length))
        del self.cached[seq_id][length:]

    def reuse(self, seq_id: int, token_ids: Sequence[int]) -> int:
        assert seq_id not in self.cached, "a prefix begins a sequence"
        rows = [*self.cached.values(), *self.kept]
        best = max(rows, key=lambda ids: _num_shared(ids, token_ids), default=[])
        length = _num_shared(best, token_ids)
        length = length if length >= self.min_prefix else 0
        if length:
            self.reuses.append((seq_id, length))
            self.cached[seq_id] = list(token_ids[:length])
            if best in self.kept:
                self.kept.append(self.kept.pop(self.kept.index(best)))
        self._make_way()
        return length

    def release(self, seq_id: int, keep: bool = False) -> None:
        ids = self.cached.pop(seq_id, None)
        if ids and keep:
            assert seq_id not in self.fails_on | self.nan_on, "what failed is to be kept"
            self.kept.append(ids)
            self._make_way()

    def _make_way(self) -> None:
        """Prefixes have what running sequences leave."""
        while self.kept and sum(-(-len(ids) // self.page_size) for ids in self.kept) > self.free_pages:
            self.kept.pop(0)

    def memory_bytes(self) -> dict[str, int]:
        return {str(self.device): 1024}

    def next_logits(self, ids: Sequence[int]) -> Tensor:
        """(V,): a function of the bytes of `ids` alone."""
        text = b"".join(self.vocabulary.tokens[token_id] for token_id in ids)
        digest = hashlib.sha256(self._seed.to_bytes(4, "little") + text).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        noise = torch.randn(len(self.vocabulary), generator=generator) * 2.0
        return noise + self._prior + self._finishing_bias(text)

    def _extend(self, feed: Feed) -> list[Tensor]:
        """Cache a feed; the logits of its wanted positions."""
        assert feed.token_ids, "an empty feed"
        assert 0 <= feed.wanted <= len(feed.token_ids)
        ids = self.cached.setdefault(feed.seq_id, [])
        assert len(ids) + len(feed.token_ids) <= self.max_len, "a feed passes the longest sequence"
        ids.extend(feed.token_ids)
        ends = range(len(ids) - feed.wanted + 1, len(ids) + 1)
        rows = [self.next_logits(ids[:end]) for end in ends]
        return [row * torch.nan if feed.seq_id in self.nan_on else row for row in rows]

    def _make_prior(self, eos_bias: float) -> Tensor:
        prior = torch.full((len(self.vocabulary),), -30.0)
        for token_id, token in enumerate(self.vocabulary.tokens):
            if token_id in self.vocabulary.stop_ids:
                prior[token_id] = eos_bias
            elif set(token) <= _LIKELY:
                prior[token_id] = 0.0
        return prior

    def _finishing_bias(self, text: bytes) -> Tensor:
        """A begun character is gone on with."""
        bias = torch.zeros(len(self.vocabulary))
        if mid_character(text[-4:]):
            bias[0x90:0xC0] = 60.0  # after F0 the lower ones are no UTF-8
        return bias


def _num_shared(left: Sequence[int], right: Sequence[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )


def mid_character(end: bytes) -> bool:
    """Whether bytes end within a character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(end)
    return bool(decoder.getstate()[0])


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


def space_of(members: Sequence[Member]) -> FusionSpace:
    """The fusion space of members, main first, with exact matrices."""
    vocabularies = [member.vocabulary for member in members]
    anchors = common_anchors(vocabularies)
    matrices = [exact_matrix(vocabulary, anchors) for vocabulary in vocabularies]
    return FusionSpace(
        vocabularies, lambda: matrices, torch.device("cpu"), tuple(member.name for member in members)
    )


def relative(members: Sequence[Member], **options: Any) -> Fusion:
    """Relative fusion over exact matrices, on whole vocabularies unless told otherwise."""
    chosen = RelativeOptions.model_validate({"support": "full", "steps": 1, **options})
    return RelativeFusion(space_of(members), chosen)


def ensemble(members: Sequence[Member], weights: Sequence[float] | None = None, **options: Any) -> Recipe:
    """A recipe over members, main first; one alone has no fusion."""
    names = tuple(member.name for member in members)
    shares = tuple(weights or [1 / len(names)] * len(names))
    fusion = relative(members, **options) if len(members) > 1 else None
    return Recipe("+".join(names), names, shares, fusion, "relative" if fusion else "single")


def sequence(
    seq_id: int, prompt: str, members: Sequence[Member], recipe: Recipe, params: SamplingParams
) -> Request:
    """A request in flight, its prompt spelt by each member's own vocabulary."""
    request = GenerationRequest(f"request-{seq_id}", recipe.model, prompt, params)
    tracks = {member.name: Track(member.vocabulary, member.vocabulary.encode(prompt)) for member in members}
    return Request(seq_id, request, recipe, tracks)


@dataclass
class ListSink(NullSink):
    """Keeps what it is told."""

    steps: list[StepStats] = field(default_factory=list)
    tokens: list[TokenStats] = field(default_factory=list)
    requests: list[RequestStats] = field(default_factory=list)
    queues: list[QueueStats] = field(default_factory=list)
    caches: list[CacheStats] = field(default_factory=list)
    prefixes: list[PrefixStats] = field(default_factory=list)
    healths: list[HealthStats] = field(default_factory=list)
    drops: list[DropStats] = field(default_factory=list)
    preemptions: list[PreemptionStats] = field(default_factory=list)

    def step(self, stats: StepStats) -> None:
        self.steps.append(stats)

    def token(self, stats: TokenStats) -> None:
        self.tokens.append(stats)

    def request(self, stats: RequestStats) -> None:
        self.requests.append(stats)

    def queue(self, stats: QueueStats) -> None:
        self.queues.append(stats)

    def cache(self, stats: CacheStats) -> None:
        self.caches.append(stats)

    def prefix(self, stats: PrefixStats) -> None:
        self.prefixes.append(stats)

    def health(self, stats: HealthStats) -> None:
        self.healths.append(stats)

    def drop(self, stats: DropStats) -> None:
        self.drops.append(stats)

    def preemption(self, stats: PreemptionStats) -> None:
        self.preemptions.append(stats)


def fake_engine(
    members: Sequence[Member],
    sink: StatsSink | None = None,
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
        sink or NullSink(),
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


def fake_config(members: Sequence[str] = ("alpha", "beta"), **sections: Any) -> Config:
    """A configuration of fake members; an ensemble `duo` of the first two, and what `sections` say."""
    duo = {"members": dict.fromkeys(members[:2], 0.5), "main": members[0]}
    raw: dict[str, Any] = {
        "members": {name: {"model": f"fake-{name}"} for name in members},
        "ensembles": {"duo": duo} if len(members) > 1 else {},
    }
    return Config.model_validate(raw | sections)


def fake_loaded(config: Config, members: Mapping[str, FakeMember], sink: StatsSink | None = None) -> Loaded:
    """What `factory.load` returns for `config`, over fake members."""
    scheduler = config.scheduler
    engine = fake_engine(
        list(members.values()),
        sink,
        max_running=scheduler.max_running,
        max_waiting=scheduler.max_waiting,
        token_budget=scheduler.token_budget,
        num_candidates=scheduler.num_candidates,
        prefix_reuse=scheduler.prefix_reuse,
        member_timeout=scheduler.member_timeout,
    )
    book = RecipeBook(config, lambda names, _: space_of([members[name] for name in names]))
    speakers = {
        name: Speaker(
            m.vocabulary, PromptEncoder(name, FakeTokenizer(m.vocabulary)), m.max_len, Grammars(m.vocabulary)
        )
        for name, m in members.items()
    }
    max_len = {name: member.max_len for name, member in members.items()}
    return Loaded(engine, Admission(book, speakers), list_models(config, max_len))
