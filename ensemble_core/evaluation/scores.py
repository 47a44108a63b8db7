"""What members said of documents, kept so that any fusion can be evaluated without a model.

For every member: the exact log-probability of each next token, and its K likeliest candidates with the tail wherever
another member has a token boundary, too. The true next token is not put among the candidates, which would flatter
the fusion. Files are safetensors, float32 and int32, written whole or not at all. Knows tensors; does not know
tokenizers, models or fusions.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ensemble_core.errors import EvaluationError
from ensemble_core.members.base import Candidates

_ROWS = ("document", "rest", "token", "logprob", "scored", "slot")


@dataclass(frozen=True, slots=True)
class MemberScores:
    """One member's rows, in the order of documents and positions. See `evaluation/spelling.py` for a row.

    slot: where the row's candidates are, -1 where nobody else has a boundary.
    """

    document: Tensor  # (N,) int32
    rest: Tensor  # (N,) int32
    token: Tensor  # (N,) int32, the next one
    logprob: Tensor  # (N,) float32, its own
    scored: Tensor  # (N,) bool
    slot: Tensor  # (N,) int32
    candidates: Candidates  # of C rows

    @property
    def places(self) -> Tensor:
        """(N,) int64: one number for a document and a place in it."""
        return self.document.long() << 32 | self.rest.long()


@dataclass(frozen=True, slots=True)
class Scores:
    """Documents and what each member said of them."""

    num_bytes: Tensor  # (D,) int64, scored bytes; 0 for a document that cannot be compared
    members: Mapping[str, MemberScores]

    def __len__(self) -> int:
        return self.num_bytes.shape[0]

    @property
    def num_candidates(self) -> int:
        """K; the least of all members', where whole vocabularies are no bound."""
        parts = [part.candidates for part in self.members.values() if bool(part.candidates.tail.isfinite().any())]
        return min((part.token_ids.shape[1] for part in parts), default=sys.maxsize)


def save_scores(path: Path, scores: Scores) -> None:
    """Write a file. Raises EvaluationError."""
    tensors = {"num_bytes": scores.num_bytes}
    for name, part in scores.members.items():
        tensors |= {f"{name}/{field}": getattr(part, field).contiguous() for field in _ROWS}
        tensors[f"{name}/candidates"] = part.candidates.token_ids.int()
        tensors[f"{name}/logprobs"] = part.candidates.logprobs.contiguous()
        tensors[f"{name}/tail"] = part.candidates.tail.contiguous()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial)
        partial.replace(path)
    except OSError as error:
        raise EvaluationError(
            f"scores {path} cannot be written ({error.strerror}); set --cache to a folder"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def load_scores(path: Path) -> Scores:
    """Read a file. Raises EvaluationError where it is damaged."""
    try:
        tensors = load_file(path)
        names = sorted({name.rpartition("/")[0] for name in tensors} - {""})
        return Scores(tensors["num_bytes"], {name: _part(tensors, name) for name in names})
    except (OSError, SafetensorError, KeyError) as error:
        raise EvaluationError(f"scores {path} cannot be read ({error}); delete the file") from error


def _part(tensors: Mapping[str, Tensor], name: str) -> MemberScores:
    candidates = Candidates(
        tensors[f"{name}/candidates"].long(), tensors[f"{name}/logprobs"], tensors[f"{name}/tail"]
    )
    rows = {field: tensors[f"{name}/{field}"] for field in _ROWS}
    return MemberScores(**rows, candidates=candidates)


def join_scores(parts: Sequence[Scores]) -> Scores:
    """Several files' documents behind one another."""
    offsets = torch.tensor([0] + [len(part) for part in parts]).cumsum(0).tolist()
    members = {name: _joined([part.members[name] for part in parts], offsets) for name in parts[0].members}
    return Scores(torch.cat([part.num_bytes for part in parts]), members)


def _joined(parts: Sequence[MemberScores], offsets: Sequence[int]) -> MemberScores:
    slots = torch.tensor([0] + [len(part.candidates) for part in parts]).cumsum(0).tolist()
    return MemberScores(
        document=torch.cat([part.document + offset for part, offset in zip(parts, offsets, strict=False)]),
        rest=torch.cat([part.rest for part in parts]),
        token=torch.cat([part.token for part in parts]),
        logprob=torch.cat([part.logprob for part in parts]),
        scored=torch.cat([part.scored for part in parts]),
        slot=torch.cat(
            [torch.where(p.slot < 0, p.slot, p.slot + start) for p, start in zip(parts, slots, strict=False)]
        ),
        candidates=Candidates(
            torch.cat([part.candidates.token_ids for part in parts]),
            torch.cat([part.candidates.logprobs for part in parts]),
            torch.cat([part.candidates.tail for part in parts]),
        ),
    )
