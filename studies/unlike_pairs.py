"""One pair of unlike members: every fusion with the weight that suits it, on documents that no weight has seen.

Fusions of one family that differ by a number (a temperature, a strength) are one: the even half picks it. Beside them
stand two maps learnt from text, see `linear_map`. Knows members by name; does not know how they were trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ensemble_core.decoding.recipe import Recipe
from ensemble_core.evaluation.bootstrap import Interval, Ratio, draws, interval
from ensemble_core.evaluation.journal import Journal
from ensemble_core.evaluation.scores import Scores
from ensemble_core.evaluation.workbench import Workbench
from ensemble_core.fusion.base import FUSIONS, Fusion, FusionSpace, build_fusion
from ensemble_core.text.vocabulary import Vocabulary
from ensemble_core.transfer.embeddings import load_embeddings
from ensemble_core.transfer.matrix import TransferMatrix, common_anchors
from ensemble_core.transfer.rows import RowRecipe, build_matrix
from ensemble_core.transfer.spelling import spelling_matrix
from studies import linear_map, row_sources
from studies.halves import Positions, over_simplex, positions

TEMPERATURES = (5.0, 20.0, 80.0)
ALPHAS = (0.1, 0.3, 0.5, 0.7)
DIRECT, RELATIVE, LEARNT = "direct", "relative", "learnt"
_MAIN, _ASSISTANT = "main", "assistant"  # in options that name a member
_WIDTH = 8  # anchors a row
_EM_STEPS = 30  # of the learnt maps
_SMOOTHING = 4.0  # of the one that is used elsewhere
_TINY = 1e-12


@dataclass(frozen=True, slots=True)
class Way:
    """A fusion to be measured. family: the even half picks one way of each; rows: of those in relative space."""

    family: str
    kind: str
    name: str
    options: Mapping[str, Any]
    rows: str = ""
    number: float | None = None  # what ways of a family differ in

    @property
    def label(self) -> str:
        """Unique."""
        return self.family if self.number is None else f"{self.family} {self.number:g}"


def ways(every: bool) -> Iterator[Way]:
    """The fusions; not `every`: those that are of interest for any pair."""
    yield Way("projection, linear", DIRECT, "projection", {})
    yield Way("projection, log-linear", DIRECT, "projection", {"pool": "log-linear"})
    yield Way("union", DIRECT, "union", {})
    yield Way("gac", DIRECT, "gac", {})
    yield Way("core, projection", DIRECT, "core", {"base": {"name": "projection", "options": {}}})
    for alpha in ALPHAS if every else ALPHAS[1:3]:
        roles = {"expert": _ASSISTANT, "base": _MAIN, "alpha": alpha}
        yield Way("contrastive, alpha", DIRECT, "contrastive", roles, number=alpha)
    for rows in ("input embeddings", "output embeddings", "contexts") if every else ("input embeddings",):
        for tau in TEMPERATURES if every else TEMPERATURES[1:]:
            yield Way(f"{rows}, tau", RELATIVE, "relative", {}, rows, tau)
    for steps in (1, 3, 6) if every else (1,):
        yield Way(f"spelling, EM {steps}", RELATIVE, "relative", {"steps": steps}, "spelling")
    for eta in (0.15, 2.0) if every else ():
        options = {"solver": "search", "eta": eta}
        yield Way(f"spelling, search, eta {eta:g}", RELATIVE, "relative", options, "spelling")
    yield Way("core, spelling", RELATIVE, "core", {"base": {"name": "relative", "options": {}}}, "spelling")


@dataclass(frozen=True, slots=True)
class Outcome:
    """A model on the odd documents. nats: by position, of shared ones alone; empty for a member by itself."""

    label: str
    kind: str
    weight: float | None  # of main
    bits: Tensor  # (D,)
    num_bytes: Tensor  # (D,)
    nats: Tensor  # (P,)

    @property
    def bits_per_byte(self) -> Interval:
        """Over all documents."""
        return interval(Ratio(self.bits, self.num_bytes), draws(len(self.bits)))

    def over(self, other: Outcome) -> Interval:
        """Its bits over another's, paired."""
        return interval(Ratio(self.bits, other.bits), draws(len(self.bits)))


class UnlikePair:
    """Measures, each fusion once. texts: of each member, for rows from contexts; folder: with the checkpoints."""

    def __init__(
        self,
        bench: Workbench,
        recipe: Recipe,
        halves: tuple[Scores, Scores],
        num_tuned_on: int,
        folder: Path,
        texts: Sequence[str],
        journal: Journal,
    ) -> None:
        self.bench, self.plain, self._folder, self._texts, self._journal = bench, recipe, folder, texts, journal
        self.even = positions(halves[0], recipe.members, bench.num_candidates)
        self.odd = positions(halves[1], recipe.members, bench.num_candidates)
        self._tuned_on = replace(self.even, shared=self.even.shared.spread(num_tuned_on))
        self._matrices = lru_cache(maxsize=1)(self._made)
        self._table = lru_cache(maxsize=8)(self._source)

    @property
    def vocabularies(self) -> list[Vocabulary]:
        """Main's first."""
        return [self.bench.vocabularies[name] for name in self.plain.members]

    @cached_property
    def is_common(self) -> Tensor:
        """Whether main's true token is one of the assistant's, by position (P,)."""
        anchors = set(common_anchors(self.vocabularies).tokens)
        tokens = self.vocabularies[0].tokens
        return torch.tensor([tokens[token_id] in anchors for token_id in _true(self.odd).tolist()])

    def alone(self, member: str) -> Outcome:
        """A member by itself, over the same bytes."""
        sums = self.bench.sums(self.odd.scores, Recipe(member, (member,), (1.0,), None, "single"))
        kept = self._kept
        own = self.odd.main_nats if member == self.plain.main else torch.zeros(0)
        return Outcome(f"{member} alone", "member", None, sums.bits[kept], sums.num_bytes[kept], own)

    def fused(self, every: bool) -> list[Outcome]:
        """The best of each family on the even half, as it does on the odd one."""
        best: dict[str, tuple[Way, Mapping[str, float]]] = {}
        for way in ways(every):
            tuned = self._tuned(way)
            if way.family not in best or tuned["nats"] < best[way.family][1]["nats"]:
                best[way.family] = way, tuned
        return [self._reported(way, tuned["weight"]) for way, tuned in best.values()]

    def served(self, labels: Sequence[str], num: int) -> list[Outcome]:
        """Some ways with candidates alone, weights as with whole distributions."""
        chosen = [way for way in ways(every=False) if way.label in labels]
        return [self._reported(way, self._tuned(way)["weight"], num) for way in chosen]

    def learnt(self) -> list[Outcome]:
        """Maps learnt on the even half, and on the odd one itself; first a map of an assistant that says nothing.

        The first shows what mixing main with the text's own frequencies is worth, without an assistant.
        """
        even, odd = (self._probabilities(half) for half in (self.even, self.odd))
        size = len(self.vocabularies[0])
        found = []
        for label, source, shown, smoothing in (
            ("frequencies of even documents", _silent(even), _silent(odd), _SMOOTHING),
            ("map learnt on even documents", even, odd, _SMOOTHING),
            ("map learnt on these documents", odd, odd, 0.0),
        ):
            own_map = linear_map.learn(*source, size, _EM_STEPS, smoothing)
            found.append(self._outcome(label, LEARNT, own_map.main_weight, -own_map.logprobs(*shown).double()))
        return found

    def log_linear(self) -> Outcome:
        """Rows by spelling under a log-linear pool of anchors: a trial that no fusion of the product makes.

        r ~ q^w s^(1 - w), with q and s what main and the assistant say of anchors, and main's tokens of an anchor
        share it as under EM.
        """
        even, odd = self._at_anchors(self._tuned_on), self._at_anchors(self.odd)
        weight = over_simplex(self.plain.weights)(lambda weights: float(_geometric(even, weights[0]).mean()))[0]
        return self._outcome("spelling, log-linear (trial)", RELATIVE, weight, _geometric(odd, weight))

    def _at_anchors(self, half: Positions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log q and log s (P, A), the anchor of the true token (P,), and main's nats (P,)."""
        matrices = self._matrices("spelling", 0.0)
        said = []
        for member, matrix, slots in zip(self.plain.members, matrices, half.shared.slots, strict=True):
            stored = half.scores.members[member].candidates
            columns, values = matrix.rows(stored.token_ids[slots])
            shares = values[..., 0] * stored.logprobs[slots].exp()
            r = torch.zeros(len(slots), matrix.num_anchors).scatter_add_(1, columns[..., 0], shares)
            said.append(r.double().clamp_min(_TINY).log())
        return said[0], said[1], matrices[0].columns[_true(half), 0].long(), half.main_nats

    def _probabilities(self, half: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """What main gives the true tokens (P,), the assistant's distributions (P, V), the true tokens (P,)."""
        stored, slots = half.scores.members[self.plain.members[1]].candidates, half.shared.slots[1]
        whole = torch.zeros(len(slots), len(self.vocabularies[1]))
        whole.scatter_(1, stored.token_ids[slots], stored.logprobs[slots].exp())
        return (-half.main_nats).exp().float(), whole, _true(half)

    def _tuned(self, way: Way) -> Mapping[str, float]:
        key = (self.plain.model, way.label, "even")
        if not self._journal.items(key):
            recipe = self._recipe(way)
            if way.name != "contrastive":
                recipe = self._tuned_on.tuned(recipe, over_simplex(recipe.weights))
            nats = float(self._tuned_on.nats(recipe).mean())
            self._journal.add(key, {0: {"weight": recipe.weights[0], "nats": nats}})
        return self._journal.items(key)[0]

    def _reported(self, way: Way, weight: float, num: int | None = None) -> Outcome:
        key = (self.plain.model, way.label, f"odd, K {num or 'all'}")
        if not self._journal.items(key):
            recipe = replace(self._recipe(way), weights=(weight, 1.0 - weight))
            seen = self.odd if num is None else replace(self.odd, num_candidates=num)
            self._journal.add(key, {0: {"nats": [round(x, 6) for x in seen.nats(recipe).tolist()]}})
        nats = torch.tensor(self._journal.items(key)[0]["nats"]).double()
        return self._outcome(way.label, way.kind, None if way.name == "contrastive" else weight, nats)

    def _outcome(self, label: str, kind: str, weight: float | None, nats: Tensor) -> Outcome:
        """From nats at shared positions; elsewhere main's own."""
        part = self.odd.scores.members[self.plain.main]
        every = (-part.logprob.double()).index_put((self.odd.shared.rows,), nats) * part.scored
        bits = torch.zeros(len(self.odd.scores), dtype=torch.float64).index_add_(0, part.document.long(), every)
        kept = self._kept
        return Outcome(
            label, kind, weight, bits[kept] / math.log(2), self.odd.scores.num_bytes[kept].double(), nats
        )

    @property
    def _kept(self) -> Tensor:
        return self.odd.scores.num_bytes > 0

    def _recipe(self, way: Way) -> Recipe:
        return replace(self.plain, fusion=self._fusion(way))

    def _fusion(self, way: Way) -> Fusion:
        names = dict(zip((_MAIN, _ASSISTANT), self.plain.members, strict=True))
        options = {
            key: names.get(value, value) if key in ("expert", "base") and way.name == "contrastive" else value
            for key, value in way.options.items()
        }
        space = FusionSpace(
            self.vocabularies,
            lambda: self._matrices(way.rows, way.number or 0.0),
            torch.device("cpu"),
            self.plain.members,
        )
        return build_fusion(way.name, FUSIONS.parse(way.name, options, "fusion"), space)

    def _made(self, rows: str, tau: float) -> list[TransferMatrix]:
        """Both members' matrices."""
        anchors = common_anchors(self.vocabularies)
        if rows == "spelling":
            return [spelling_matrix(vocabulary, anchors)[0] for vocabulary in self.vocabularies]
        recipe, tables = (
            RowRecipe("centred", _WIDTH, tau),
            [self._table(rows, name) for name in self.plain.members],
        )
        return [
            build_matrix(vocabulary, table, anchors, recipe, progress=False)[0]
            for vocabulary, table in zip(self.vocabularies, tables, strict=True)
        ]

    def _source(self, rows: str, name: str) -> Tensor:
        """What rows are made of, (V, d)."""
        folder = self._folder / name
        sources: dict[str, Callable[[], Tensor]] = {
            "input embeddings": lambda: load_embeddings(folder),
            "output embeddings": lambda: row_sources.output_embeddings(folder),
            "contexts": lambda: row_sources.contexts(folder, self.bench.vocabularies[name], self._texts),
        }
        return sources[rows]()


def _silent(said: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The same with an assistant of one token."""
    return said[0], torch.ones(len(said[0]), 1), said[2]


def _true(half: Positions) -> Tensor:
    """Main's next token at each shared position, (P,)."""
    return half.scores.members[half.members[0]].token[half.shared.rows].long()


def _geometric(at: tuple[Tensor, Tensor, Tensor, Tensor], weight: float) -> Tensor:
    """Nats of a log-linear pool of anchors, (P,); see `UnlikePair.log_linear`."""
    own, other, anchor, nats = at
    pooled = weight * own + (1.0 - weight) * other
    moved = ((1.0 - weight) * (other - own)).gather(1, anchor.unsqueeze(1)).squeeze(1)
    return nats - moved + pooled.logsumexp(dim=1)
