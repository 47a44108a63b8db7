"""From what a server tells to candidates, as a member in this process would give them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ensemble_core.members.base import Candidates, log_rest
from ensemble_core.members.remote.servers.base import Row


def candidates(rows: Sequence[Row], width: int, also: Sequence[tuple[int, ...]], vocabulary: int) -> Candidates:
    """`width` candidates of each row, from likely to unlikely, of equals the lowest id, those of `also` among them.

    also: one entry a row. A width of the vocabulary: all ids in their order. Raises ValueError where a row has too
    few.
    """
    if width >= vocabulary:
        return _whole(rows, vocabulary)
    ids, logprobs = [], []
    for row, asked in zip(rows, also, strict=True):
        chosen = _chosen(row, width, asked)
        ids.append(chosen)
        logprobs.append([row[token_id] for token_id in chosen])
    told = torch.tensor(logprobs, dtype=torch.float32).view(len(rows), width)
    return Candidates(torch.tensor(ids, dtype=torch.long).view(len(rows), width), told, log_rest(told))


def _chosen(row: Row, width: int, asked: tuple[int, ...]) -> list[int]:
    if len(row) < width or any(token_id not in row for token_id in asked):
        raise ValueError(f"{len(row)} candidates where {width} are asked for")
    ranked = sorted(row, key=lambda token_id: (-row[token_id], token_id))
    wanted = set(asked)
    spare = width - len(wanted)
    others = [token_id for token_id in ranked if token_id not in wanted][:spare]
    kept = wanted | set(others)
    return [token_id for token_id in ranked if token_id in kept]


def _whole(rows: Sequence[Row], vocabulary: int) -> Candidates:
    """Ids that were not told have no mass: tables may be larger than a server's vocabulary."""
    logprobs = torch.full((len(rows), vocabulary), -torch.inf)
    for place, row in enumerate(rows):
        logprobs[place, torch.tensor(list(row))] = torch.tensor(list(row.values()), dtype=torch.float32)
    token_ids = torch.arange(vocabulary).expand(len(rows), vocabulary)
    return Candidates(token_ids, logprobs, torch.full((len(rows),), -torch.inf))
