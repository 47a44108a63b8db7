"""Mixtures symbol by symbol: weights carried or fixed, in bytes or common tokens, with and without known boundaries.

A share is what one member gives one step (a stretch, a byte, a common token) after the text before it; a mixture
gives a step the weighted sum of shares. So the best fixed weights follow from shares alone. Where boundaries are
known the last symbol of a stretch counts together with the boundary behind it, as in the members' own likelihoods;
where they are not, a member's covers run over them. Knows what was heard; does not know candidates or fusions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from benchmarks.ledger import TableRow
from ensemble_core.evaluation import measures
from ensemble_core.evaluation.bootstrap import Ratio, draws, interval, paired_interval
from ensemble_core.evaluation.mixture import fit_mixture
from ensemble_core.evaluation.spelling import Document
from ensemble_core.evaluation.weights import Weights
from ensemble_core.members.base import Feed, Member, ask
from studies.along_paths import BYTES, Reading, common_path
from studies.covers import Covered, Floats, Said, Spot, above, along, covered, said
from studies.fusion_table import shown
from studies.halves import Half
from studies.reduced_pair import ReducedPair

LEAST = 1e-4  # mass of covers that are followed
_SEQ_ID = -700_000


@dataclass(frozen=True, slots=True)
class Shares:
    """Steps of documents: logs of what each member gives them. Steps that nobody gives anything are left out."""

    logs: Tensor  # (P, M) float64
    document: Tensor  # (P,) int64

    def tuned(self) -> Weights:
        """The fixed weights with the fewest nats."""
        return fit_mixture((self.logs - self.logs.amax(dim=1, keepdim=True)).exp())

    def bits(self, weights: Weights, num_documents: int) -> Tensor:
        """(D,) bits of every document."""
        mixed = torch.logsumexp(self.logs + torch.tensor(weights, dtype=torch.float64).log(), dim=1)
        return torch.zeros(num_documents, dtype=torch.float64).index_add_(0, self.document, -mixed / math.log(2))


Kind = tuple[str, str, bool, bool]  # label, path, whether weights are carried, whether boundaries are known


def kinds(members: Sequence[str]) -> list[Kind]:
    """All mixtures."""
    return [
        ("bytes or common tokens, weights carried", BYTES, True, True),
        ("bytes, one weight at every byte", BYTES, False, True),
        *((f"common tokens as {m} spells, one weight at each", common_path(m), False, True) for m in members),
        ("bytes, weights carried, boundaries unknown", BYTES, True, False),
        ("bytes, one weight at every byte, boundaries unknown", BYTES, False, False),
    ]


def shares(readings: Sequence[Reading], members: Sequence[str], kind: Kind) -> Shares:
    """What members give the steps of one kind of mixture."""
    _, path, carried, bounded = kind
    found, documents = [], []
    for index, reading in enumerate(readings):
        for rows in _steps(reading, members, path, carried, bounded):
            found.append(rows)
            documents += [index] * len(rows)
    logs = torch.from_numpy(np.concatenate(found))
    heard = ~logs.isneginf().all(dim=1)
    return Shares(logs[heard], torch.tensor(documents)[heard])


def _steps(reading: Reading, members: Sequence[str], path: str, carried: bool, bounded: bool) -> Iterator[Floats]:
    """(P, M) logs of steps, stretch by stretch."""
    places = reading.places.get(path, [])
    if not bounded and places:
        whole = [said(reading.spots[m, path], places[0], places[-1]) for m in members]
        steps = np.stack([each.steps for each in whole], axis=1)
        ends = np.cumsum([0, *np.diff(places)])
        yield np.stack([steps[a:b].sum(axis=0) for a, b in pairwise(ends)]) if carried else steps
    elif bounded:
        for parts in _stretches(reading, members, path):
            ended = np.array([[part.ended for part in parts]])
            yield ended if carried else np.stack([part.steps for part in parts], axis=1)


def _stretches(reading: Reading, members: Sequence[str], path: str) -> Iterator[list[Said]]:
    cuts = {m: _cut(reading.spots[m, path], reading.places[path]) for m in members if reading.num_bytes}
    for index, (start, end) in enumerate(pairwise(reading.places.get(path, []))):
        yield [said(cuts[m][index], start, end) for m in members]


def _cut(spots: Sequence[Spot], places: Sequence[int]) -> list[list[Spot]]:
    """Spots by the stretch that they lie in."""
    found: list[list[Spot]] = [[] for _ in places[1:]]
    starts = np.searchsorted(places, [spot.start for spot in spots], side="right") - 1
    for spot, index in zip(spots, starts, strict=True):
        found[index].append(spot)
    return found


def heard(pair: ReducedPair, halves: Mapping[str, Half]) -> dict[str, list[Reading]]:
    """Half -> what was heard of its documents."""
    return {split: pair.hear(_documents(half), f"{split} half") for split, half in halves.items()}


def _documents(half: Half) -> list[Document]:
    return [each for task in half.tasks for each in measures.documents(task, half.items(task))]


def steps(pair: ReducedPair, halves: Mapping[str, Half]) -> tuple[list[TableRow], list[TableRow]]:
    """Mixtures on the odd half with weights of the even one, and what they are worth where main is alone."""
    readings = heard(pair, halves)
    sizes = torch.tensor([float(each.num_bytes) for each in readings["odd"]], dtype=torch.float64)
    rows: list[TableRow] = []
    reference: Ratio | None = None
    counts = draws(len(sizes))
    for kind in kinds(pair.members):
        weights = shares(readings["even"], pair.members, kind).tuned()
        ratio = Ratio(shares(readings["odd"], pair.members, kind).bits(weights, len(sizes)), sizes)
        reference = reference or ratio
        value = interval(ratio, counts)
        rows.append(
            {
                "mixture": kind[0],
                f"weight of {pair.members[0]}": round(weights[0], 3),
                "bits per byte": f"{value.value:.4f} ({value.low:.4f} .. {value.high:.4f})",
                "against the first": shown(paired_interval(ratio, reference, counts)),
            }
        )
    tuned = shares(readings["even"], pair.members, kinds(pair.members)[0]).tuned()
    return rows, alone(readings["odd"], pair.members, tuned)


def alone(readings: Sequence[Reading], members: Sequence[str], weights: Weights) -> list[TableRow]:
    """What is at stake where main stands within a stretch, which is not fused today: bits per byte of all text.

    Carried: main by its own tokens, the assistant by its covers, weights as after what each said of the stretch so
    far. Better: of both at each position.
    """
    rows: list[TableRow] = []
    num_bytes = sum(each.num_bytes for each in readings)
    for own, main in enumerate(members):
        sums = sum((_within(reading, members, own, weights) for reading in readings), np.zeros(3))
        starts = [_starts(reading, main) for reading in readings]
        inside, every = sum(num for num, _ in starts), sum(num for _, num in starts)
        main_alone, carried, better = sums / math.log(2) / num_bytes
        rows.append(
            {
                "main": main,
                "positions within a stretch, %": round(100 * inside / every, 2),
                "main alone": f"{main_alone:.4f}",
                "bytes, carried": f"{carried:.4f}",
                "better of both": f"{better:.4f}",
                "all free of charge": "0.0000",
            }
        )
    return rows


def _starts(reading: Reading, main: str) -> tuple[int, int]:
    """Main's positions within a stretch, and all of them."""
    places = set(reading.places.get(BYTES, []))
    spots = reading.spots.get((main, BYTES), [])
    return sum(spot.start not in places for spot in spots), len(spots)


def _within(reading: Reading, members: Sequence[str], own: int, weights: Weights) -> Floats:
    """(3,) nats of main's tokens that begin within a stretch: its own, carried, and of the better member."""
    sums = np.zeros(3)
    places = reading.places.get(BYTES, [])
    if not places:
        return sums
    logs = np.log(np.array(weights))
    mains = _cut(reading.spots[members[own], BYTES], places)
    for index, parts in enumerate(_stretches(reading, members, BYTES)):
        masses = np.stack([np.append(part.begun[:-1], part.ended) for part in parts], axis=1)  # (n + 1, M)
        known = 0.0
        for spot in mains[index]:
            before = spot.start - places[index]
            pair = masses[[before, before + spot.size]]
            pair[:, own] = known, known + spot.logprob
            known += spot.logprob
            if before:
                mixed = np.logaddexp.reduce(pair + logs, axis=1)
                sums -= np.array([spot.logprob, mixed[1] - mixed[0], np.nanmax(pair[1] - pair[0])])
    return sums


class Branches:
    """A member's distributions behind any ids; what was asked last is cached, and rolled back to what is common."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._cached: list[int] = []

    def __call__(self, ids: Sequence[int]) -> Tensor:
        """(V,) log-probabilities."""
        same = 0
        while same < min(len(ids) - 1, len(self._cached)) and ids[same] == self._cached[same]:
            same += 1
        feed = Feed(_SEQ_ID, list(ids[same:]), 1, keep=same)
        self._cached = list(ids)
        with torch.inference_mode():
            return ask(self._member, [feed], len(self._member.vocabulary)).logprobs[0]

    def close(self) -> None:
        """Give the pages back."""
        self._member.release(_SEQ_ID)
        self._cached = []


def covers(pair: ReducedPair, half: Half, num: int) -> list[TableRow]:
    """Exact covers of some stretches, against those along each member's own spelling."""
    rows: list[TableRow] = []
    documents = _documents(half)
    per_document = max(num // len(documents), 1)
    chosen = documents[:: max(len(documents) * per_document // num, 1)]
    readings = pair.hear(documents, "odd half")
    for name in pair.members:
        found = []
        for document in chosen:
            found += _covered_stretches(pair, name, document, readings[documents.index(document)], per_document)
        rows.append(cover_row(name, found))
    return rows


def cover_row(member: str, found: Sequence[tuple[int, Covered, Covered]]) -> TableRow:
    """Sums over stretches: (bytes, along its own spelling, followed down to LEAST)."""
    num_bytes = sum(size for size, _, _ in found)

    def bits(values: Sequence[float]) -> float:
        return -sum(map(math.log2, values)) / num_bytes

    own = bits([part.ended for _, part, _ in found])
    exact = bits([part.ended for _, _, part in found])
    most = bits([min(part.ended + part.missed, 1.0) for _, _, part in found])
    return {
        "member": member,
        "stretches": len(found),
        "bits per byte, own spelling": f"{own:.4f}",
        "other covers followed": f"{exact:.4f}",
        "less at most": f"{most:.4f}",
        "begun, own spelling": f"{bits([part.begun for _, part, _ in found]):.4f}",
        "begun, followed": f"{bits([part.begun for _, _, part in found]):.4f}",
        "forwards, own spelling": round(sum(part.forwards for _, part, _ in found) / len(found), 2),
        "forwards, followed": round(sum(part.forwards for _, _, part in found) / len(found), 2),
    }


def _covered_stretches(
    pair: ReducedPair, name: str, document: Document, reading: Reading, num: int
) -> list[tuple[int, Covered, Covered]]:
    """Of `num` stretches of one document, evenly spread."""
    member, reduction = pair.member(name), pair.bytes[name]
    ids, text = pair.bench.llm().encode(name, document.text), document.text.encode()
    branches, found = Branches(member), []
    bounds = list(pairwise(reading.shared))
    sizes = [len(member.vocabulary.text_bytes(token_id)) for token_id in ids]
    rests = (sum(sizes) - np.cumsum(sizes)).tolist()
    for start, end in bounds[len(bounds) // (num + 1) :: max(len(bounds) // num, 1)][:num]:
        first, last = (_after(rests, reading.num_bytes - place) for place in (start, end))
        path = tuple(text[len(text) - reading.num_bytes + start : len(text) - reading.num_bytes + end])
        before = ids[:first]
        # Each distribution once: rounding differs with the shape of a forward, by more than covers are worth.
        behind, own = cache(partial(_behind, branches, before)), ids[first:last]
        parts = [covered(behind, reduction, path, follows) for follows in (along(own), above(LEAST, own))]
        found.append((len(path), parts[0], parts[1]))
    branches.close()
    return found


def _behind(branches: Branches, before: Sequence[int], ids: Sequence[int]) -> Tensor:
    return branches([*before, *ids])


def _after(rests: Sequence[int], rest: int) -> int:
    """How many tokens lie before a place, control tokens at it included."""
    return len(rests) - 1 - rests[::-1].index(rest) + 1
