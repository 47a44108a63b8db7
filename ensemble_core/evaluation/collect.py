"""Every member once over every document: what `scores.py` keeps.

Documents are collected in groups of a fixed number, one file a group, named by the sha256 of what it was made from
(texts, members with their weights' files, K). So a second run finds what the first has made, a run that was cut off
goes on, and nothing stale is ever read. Feeds members directly, packed to the scheduler's token budget; the engine
behind them must be idle. Does not know tasks or fusions.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from ensemble_core.config import Config
from ensemble_core.decoding.capacity import MOST_ANSWERS
from ensemble_core.errors import EvaluationError
from ensemble_core.evaluation.scores import MemberScores, Scores, join_scores, load_scores, save_scores
from ensemble_core.evaluation.spelling import Document, Spelling, SpeltDocument, spell
from ensemble_core.llm import LLM
from ensemble_core.member_config import MemberConfig
from ensemble_core.members.base import Candidates, Feed, Member, ask, stacked
from ensemble_core.members.loading.checkpoints import resolve_adapter, resolve_folder
from ensemble_core.text.alignment import Track

logger = logging.getLogger(__name__)

GROUP = 32  # documents a file
_VERSION = 1
_FIRST_ID = -1000  # sequences of ours; the engine's own count up from 0


@dataclass(frozen=True, slots=True)
class Collector:
    """Scores of documents by some members of a configuration, from files where they are there.

    llm: gives the loaded models; called only where something is missing. num_candidates: K.
    """

    config: Config
    members: tuple[str, ...]
    folder: Path
    num_candidates: int
    llm: Callable[[], LLM]

    def collect(self, documents: Sequence[Document], label: str = "collecting") -> Scores:
        """Everything that the members say of the documents, in their order. Raises EvaluationError."""
        groups = [documents[start : start + GROUP] for start in range(0, len(documents), GROUP)]
        paths = [self.folder / f"{self._digest(group)}.safetensors" for group in groups]
        with tqdm(total=len(documents), desc=label, unit="document", disable=None) as bar:
            for group, path in zip(groups, paths, strict=True):
                if not path.exists():
                    save_scores(path, self._score(group))
                bar.update(len(group))
        return join_scores([load_scores(path) for path in paths])

    def _digest(self, documents: Sequence[Document]) -> str:
        texts = [[document.text, document.start] for document in documents]
        members = {name: _identity(self.config.members[name]) for name in self.members}
        made_from = [_VERSION, self.num_candidates, members, texts]
        return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:40]

    def _score(self, documents: Sequence[Document]) -> Scores:
        llm = self.llm()
        if limited := [name for name in self.members if not llm.members[name].abilities.every_position]:
            raise EvaluationError(
                f"{', '.join(limited)}: scores need an answer at every position, which a member on another server "
                "cannot give; evaluate a configuration that loads the model itself"
            )
        spelt = [self._spell(document, llm) for document in documents]
        budget = min(self.config.scheduler.token_budget, MOST_ANSWERS)
        parts = {
            name: _member_scores(
                llm.members[name], [d.spellings[name] for d in spelt], self.num_candidates, budget
            )
            for name in self.members
        }
        return Scores(torch.tensor([document.num_bytes for document in spelt]), parts)

    def _spell(self, document: Document, llm: LLM) -> SpeltDocument:
        tracks = {
            name: Track(llm.members[name].vocabulary, llm.encode(name, document.text)) for name in self.members
        }
        for name, track in tracks.items():
            if len(track) > llm.members[name].max_len:
                raise EvaluationError(
                    f"{document.origin}: {len(track)} tokens of member {name!r}, whose longest is "
                    f"{llm.members[name].max_len}; split the text or raise members.{name}.max_len"
                )
        return spell(document, tracks)


def _identity(member: MemberConfig) -> list[object]:
    """What a member's answers depend on, its files included; where it lives changes nothing of them."""
    identity: list[object] = [member.model, member.revision, member.dtype, _stamps(resolve_folder(member))]
    if member.adapter is None:
        return identity
    return [*identity, member.adapter, member.adapter_revision, _stamps(resolve_adapter(member))]


def _stamps(folder: Path) -> list[list[object]]:
    files = sorted(folder.glob("*"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]


def _member_scores(member: Member, spellings: Sequence[Spelling], top_k: int, budget: int) -> MemberScores:
    """One member over a group of documents."""
    answers, logprobs = [], []
    for candidates, next_ids in _answers(member, spellings, top_k + 1, budget):
        hits = candidates.token_ids == torch.tensor(next_ids, device=member.device).unsqueeze(1)  # (N, K + 1)
        logprobs.append(candidates.logprobs.masked_fill(~hits, -torch.inf).amax(dim=1).cpu())
        answers.append(candidates.best(top_k).to(torch.device("cpu")))
    rows = [(index, row) for index, spelling in enumerate(spellings) for row in spelling.rows]
    if not rows:
        raise EvaluationError(f"no text has two tokens of member {member.name!r}; nothing can be scored")
    met = torch.tensor([row.met for _, row in rows])
    kept = met.nonzero().squeeze(1).tolist()
    return MemberScores(
        document=torch.tensor([index for index, _ in rows], dtype=torch.int32),
        rest=torch.tensor([row.rest for _, row in rows], dtype=torch.int32),
        token=torch.tensor([row.next_id for _, row in rows], dtype=torch.int32),
        logprob=torch.cat(logprobs),
        scored=torch.tensor([row.scored for _, row in rows]),
        slot=torch.where(met, met.cumsum(0) - 1, -1).int(),
        candidates=stacked(answers).rows(kept),
    )


def _answers(
    member: Member, spellings: Sequence[Spelling], top_k: int, budget: int
) -> Iterator[tuple[Candidates, list[int]]]:
    """The member's candidates for all rows, in their order, the next ids among them; and these."""
    for piece in _passes(spellings, member, budget):
        feeds = [_feed(index, spellings[index], start, end) for index, start, end in piece]
        if any(feed.wanted for feed in feeds):
            yield ask(member, feeds, top_k), [ids[0] for feed in feeds for ids in feed.also]
        else:
            member.forward(feeds)
        for index, _, end in piece:
            if end == len(spellings[index].token_ids) - 1:
                member.release(_FIRST_ID - index)


def _passes(spellings: Sequence[Spelling], member: Member, budget: int) -> Iterator[list[tuple[int, int, int]]]:
    """Pieces (document, start, end) of all documents but their last tokens, packed to budget and free pages.

    A document that is longer than the budget goes in pieces, alone.
    """
    pieces: list[tuple[int, int, int]] = []
    room, pages = budget, member.free_pages
    for index, spelling in enumerate(spellings):
        length = len(spelling.token_ids) - 1
        need = -(-length // member.page_size)
        if pieces and (length > room or need > pages):
            yield pieces
            pieces, room, pages = [], budget, member.free_pages
        room, pages = room - length, pages - need
        if length:
            pieces.append((index, 0, min(length, budget)))
        for start in range(budget, length, budget):
            yield pieces
            pieces = [(index, start, min(length, start + budget))]
    if pieces:
        yield pieces


def _feed(index: int, spelling: Spelling, start: int, end: int) -> Feed:
    first = max(start, spelling.first)
    also = tuple((spelling.token_ids[row + 1],) for row in range(first, end))
    return Feed(_FIRST_ID - index, spelling.token_ids[start:end], len(also), also)
