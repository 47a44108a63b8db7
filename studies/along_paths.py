"""What members say along paths of symbols through documents, collected once.

A path is the scored part of a document in bytes, or in tokens of the common vocabulary as one member spells it. Every
member reads every document once; of each whole distribution only the masses along the paths are kept, in one file for
32 documents, named by what it was made from. Knows members and documents; does not know fusions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ensemble_core.evaluation.spelling import Document, Row, Spelling, SpeltDocument, spell
from ensemble_core.llm import LLM
from ensemble_core.members.base import Feed, Member, ask
from ensemble_core.text.alignment import Track
from studies.covers import Spot
from studies.reductions import Reduction, Symbols

BYTES = "bytes"
GROUP = 32  # documents a file
_VERSION = 1
_PIECE = 32  # positions whose whole distributions are held at once
_SEQ_ID = -500_000


@dataclass(frozen=True, slots=True)
class Route:
    """A path through the scored part of a document. places: byte -> symbols before it, where a symbol begins."""

    symbols: Symbols
    places: Mapping[int, int]

    @classmethod
    def of(cls, symbols: Symbols, sizes: Sequence[int]) -> Route:
        """sizes: bytes of each symbol."""
        starts = [0, *accumulate(sizes)]
        return cls(symbols, {start: place for place, start in enumerate(starts)})


@dataclass(frozen=True, slots=True)
class Space:
    """How each member's tokens are reduced for one kind of path. sizes: symbol -> its bytes."""

    reductions: Mapping[str, Reduction]
    sizes: Sequence[int]


@dataclass(frozen=True, slots=True)
class Reading:
    """What was heard of one document. shared: bytes from its scored beginning to places where all have a boundary,
    both ends included. spots: (member, path) -> its positions. places: path -> its symbols before each shared place.
    """

    num_bytes: int
    shared: Sequence[int]
    places: Mapping[str, Sequence[int]]
    spots: Mapping[tuple[str, str], Sequence[Spot]]


def common_path(member: str) -> str:
    """The name of the path of common tokens as `member` spells it."""
    return f"common, {member}"


@dataclass(frozen=True, slots=True)
class Listener:
    """Hears documents. spaces: of bytes and of the common vocabulary, by "bytes" and "common"."""

    members: tuple[str, ...]
    spaces: Callable[[], Mapping[str, Space]]
    llm: Callable[[], LLM]
    folder: Path
    identity: str  # of the members and their vocabularies

    def hear(self, documents: Sequence[Document], label: str) -> list[Reading]:
        """All documents, from files where they are there. A document that cannot be compared has no bytes."""
        found: list[Reading] = []
        with tqdm(total=len(documents), desc=label, unit="document", disable=None) as bar:
            for start in range(0, len(documents), GROUP):
                group = documents[start : start + GROUP]
                path = self.folder / f"{self._digest(group)}.npz"
                if not path.exists():
                    save(path, [self._reading(document) for document in group])
                found += load(path)
                bar.update(len(group))
        return found

    def _digest(self, documents: Sequence[Document]) -> str:
        made_from = [_VERSION, self.identity, self.members, [[each.text, each.start] for each in documents]]
        return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:40]

    def _reading(self, document: Document) -> Reading:
        llm = self.llm()
        tracks = {
            name: Track(llm.members[name].vocabulary, llm.encode(name, document.text)) for name in self.members
        }
        spelt = spell(document, tracks)
        if not spelt.num_bytes:
            return Reading(0, [], {}, {})
        routes = self._routes(document, spelt)
        starts = [{spelt.num_bytes - row.rest for row in _scored(spelt.spellings[name])} for name in self.members]
        shared = [*sorted(set.intersection(*starts)), spelt.num_bytes]
        spots: dict[tuple[str, str], list[Spot]] = {}
        for name in self.members:
            spots |= self._spots(name, spelt, routes)
        places = {path: [route.places[byte] for byte in shared] for path, route in routes.items()}
        return Reading(spelt.num_bytes, shared, places, spots)

    def _routes(self, document: Document, spelt: SpeltDocument) -> dict[str, Route]:
        text = tuple(document.text.encode()[-spelt.num_bytes :])
        routes = {BYTES: Route.of(text, [1] * len(text))}
        common = self.spaces()["common"]
        for name in self.members:
            sequences = common.reductions[name].sequences
            symbols = tuple(s for row in _scored(spelt.spellings[name]) for s in sequences[row.next_id])
            routes[common_path(name)] = Route.of(symbols, [common.sizes[symbol] for symbol in symbols])
        return routes

    def _spots(
        self, name: str, spelt: SpeltDocument, routes: Mapping[str, Route]
    ) -> dict[tuple[str, str], list[Spot]]:
        found: dict[tuple[str, str], list[Spot]] = {(name, path): [] for path in routes}
        for row, logprobs in distributions(self.llm().members[name], spelt.spellings[name]):
            for path, route in routes.items():
                reduction = self.spaces()[path.partition(",")[0]].reductions[name]
                place = route.places.get(spelt.num_bytes - row.rest)
                if place is not None and row.scored:
                    found[name, path].append(_spot(row, logprobs, reduction, route.symbols, place))
        return found


def _scored(spelling: Spelling) -> list[Row]:
    return [row for row in spelling.rows if row.scored]


def _spot(row: Row, logprobs: Tensor, reduction: Reduction, symbols: Symbols, place: int) -> Spot:
    own = reduction.sequences[row.next_id]
    size = len(own) if symbols[place : place + len(own)] == own else 0
    begun, just = reduction.along(logprobs, symbols[place : place + 64])
    with np.errstate(divide="ignore"):
        return Spot(place, size, float(logprobs[row.next_id]), np.log(begun), np.log(just))


def distributions(member: Member, spelling: Spelling) -> Iterator[tuple[Row, Tensor]]:
    """Each row of a document with the (V,) log-probabilities there."""
    ids, first = spelling.token_ids, spelling.first
    if first:
        member.forward([Feed(_SEQ_ID, ids[:first], 0)])
    with torch.inference_mode():
        for start in range(first, len(ids) - 1, _PIECE):
            piece = ids[start : min(start + _PIECE, len(ids) - 1)]
            whole = ask(member, [Feed(_SEQ_ID, piece, len(piece))], len(member.vocabulary)).logprobs
            yield from zip(spelling.rows[start - first :], whole, strict=False)
    member.release(_SEQ_ID)


def save(path: Path, readings: Sequence[Reading]) -> None:
    """One file, written whole or not at all."""
    arrays = {
        f"{i}/{name}": array for i, reading in enumerate(readings) for name, array in _arrays(reading).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, allow_pickle=False, **arrays, num=np.array(len(readings)))
    partial.replace(path)


def load(path: Path) -> list[Reading]:
    """The readings of a file."""
    with np.load(path) as arrays:
        stored = dict(arrays)
    parts: list[dict[str, np.ndarray]] = [{} for _ in range(int(stored.pop("num")))]
    for key, array in stored.items():
        index, _, name = key.partition("/")
        parts[int(index)][name] = array
    return [_reading(part) for part in parts]


def _arrays(reading: Reading) -> dict[str, np.ndarray]:
    arrays = {"num_bytes": np.array(reading.num_bytes), "shared": np.array(reading.shared, dtype=np.int64)}
    arrays |= {f"places/{path}": np.array(places) for path, places in reading.places.items()}
    for (member, path), spots in reading.spots.items():
        name = f"spots/{member}/{path}"
        arrays[f"{name}/heads"] = np.array([[s.start, s.size, s.logprob, len(s.begun)] for s in spots]).reshape(
            -1, 4
        )
        arrays[f"{name}/begun"] = np.concatenate([s.begun for s in spots] or [np.zeros(0)])
        arrays[f"{name}/just"] = np.concatenate([s.just for s in spots] or [np.zeros(0)])
    return arrays


def _reading(arrays: Mapping[str, np.ndarray]) -> Reading:
    places = {k.removeprefix("places/"): v.tolist() for k, v in arrays.items() if k.startswith("places/")}
    spots = {}
    for key, heads in arrays.items():
        if key.endswith("/heads"):
            _, member, path, _ = key.split("/")
            name = key.removesuffix("/heads")
            spots[member, path] = _unpacked(heads, arrays[f"{name}/begun"], arrays[f"{name}/just"])
    return Reading(int(arrays["num_bytes"]), arrays["shared"].tolist(), places, spots)


def _unpacked(heads: np.ndarray, begun: np.ndarray, just: np.ndarray) -> list[Spot]:
    ends = np.cumsum(heads[:, 3]).astype(int)
    return [
        Spot(int(start), int(size), float(logprob), begun[end - int(num) : end], just[end - int(num) : end])
        for (start, size, logprob, num), end in zip(heads, ends, strict=True)
    ]
