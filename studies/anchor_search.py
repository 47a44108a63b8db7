"""One search for each token's nearest anchors, kept on disk, and every matrix that follows from it.

`build_matrix` is asked once for the widest rows at temperature 1, in float32, so that the logarithm of a share is the
cosine up to a constant of its row. Narrower rows and other temperatures are then a softmax over the best of those:
what `build_matrix` makes when it is asked for them (a test compares), without minutes of search.

Similarities: `centred` as in the recipe; `deepen`, whose sharpness the recipe fixes; `uncentred`: the neighbours that
`deepen` finds (plain cosines order them alike), with their cosines. Knows vocabularies and embeddings; does not know
fusions.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from ensemble_core.errors import TransferMatrixError
from ensemble_core.text.vocabulary import Vocabulary
from ensemble_core.transfer.matrix import Anchors, TransferMatrix
from ensemble_core.transfer.rows import Quality, RowRecipe, build_matrix, require_retained

logger = logging.getLogger(__name__)

WIDEST = 128
_ROWS = 4096  # scored again at once, by the uncentred similarity

Similarity = Literal["centred", "deepen", "uncentred"]


@dataclass(frozen=True, slots=True)
class Search:
    """A member's nearest anchors. logits: a row's similarities up to a constant, -inf for padding."""

    columns: Tensor  # (V, k) int32
    logits: Tensor  # (V, k) float32
    anchor_ids: Tensor  # (A,) int64
    quality: Quality  # of the widest rows, at the temperature of the search

    def matrix(self, top_k: int, temperature: float = 1.0) -> TransferMatrix:
        """Rows of the `top_k` nearest, softmax(temperature * logits), in float16 as files hold them."""
        logits, places = self.logits.topk(min(top_k, self.logits.shape[1]), dim=1)
        values = (logits * temperature).softmax(dim=1).nan_to_num(0.0).half()  # a row of padding alone is NaN
        columns = self.columns.gather(1, places).masked_fill_(values == 0, 0)
        return TransferMatrix(columns, values, self.anchor_ids)


@dataclass(frozen=True, slots=True)
class Searcher:
    """Searches of one member, from files where they are there.

    embeddings: read only where something is missing. wanted: tokens whose rows are looked for, besides the anchors';
    other rows stay empty. None: all.
    """

    member: str
    vocabulary: Vocabulary
    embeddings: Callable[[], Tensor]
    folder: Path
    wanted: Tensor | None = None  # (W,)

    def search(self, similarity: Similarity, anchors: Anchors) -> Search:
        """The nearest anchors of every token; minutes the first time."""
        vocabulary = self._searched(anchors)
        made_from = [similarity, WIDEST, vocabulary.fingerprint, anchors.fingerprint]
        digest = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:12]
        path = self.folder / f"{self.member}.{similarity}.{len(anchors.tokens)}.{digest}.safetensors"
        if not path.exists():
            logger.info("%s: searching %s", self.member, path.name)
            _save(path, self._made(similarity, vocabulary, anchors))
        return _load(path)

    def _searched(self, anchors: Anchors) -> Vocabulary:
        """The vocabulary, without the bytes of tokens whose rows are not looked for."""
        if self.wanted is None:
            return self.vocabulary
        kept = {*self.wanted.tolist(), *anchors.ids(self.vocabulary).tolist()}
        silent = self.vocabulary.special_ids | self.vocabulary.stop_ids
        tokens = [t if i in kept or i in silent else b"" for i, t in enumerate(self.vocabulary.tokens)]
        return replace(self.vocabulary, tokens=tokens)

    def _made(self, similarity: Similarity, vocabulary: Vocabulary, anchors: Anchors) -> Search:
        if similarity == "uncentred":
            return uncentred(self.search("deepen", anchors), self.embeddings())
        recipe = RowRecipe(similarity, WIDEST, 1.0)
        matrix, quality = build_matrix(
            vocabulary, self.embeddings(), anchors, recipe, value_dtype=torch.float32, label=self.member
        )
        return Search(matrix.columns, matrix.values.log(), matrix.anchor_ids, quality)


def uncentred(search: Search, embeddings: Tensor) -> Search:
    """The same neighbours with their plain cosines as logits; a row that was certain stays so."""
    ordinary = search.logits.isfinite().sum(dim=1) > 1
    logits = search.logits.clone()
    anchors = F.normalize(embeddings[search.anchor_ids.clamp_min(0)].float(), dim=1)  # (A, d)
    for rows in torch.split(ordinary.nonzero().squeeze(1), _ROWS):
        tokens = F.normalize(embeddings[rows].float(), dim=1)  # (R, d)
        cosines = torch.bmm(anchors[search.columns[rows].long()], tokens.unsqueeze(2)).squeeze(2)
        logits[rows] = cosines.masked_fill(search.logits[rows].isneginf(), -torch.inf)
    return Search(search.columns, logits, search.anchor_ids, search.quality)


def fewer(anchors: Anchors, num: int, seed: int = 0) -> Anchors:
    """`num` of the anchors, drawn at random, still sorted; all of them where there are no more."""
    order = torch.randperm(len(anchors.tokens), generator=torch.Generator().manual_seed(seed))
    return Anchors(tuple(anchors.tokens[i] for i in sorted(order[:num].tolist())))


def refusal(member: str, search: Search, recipe: RowRecipe, minimum: float) -> str:
    """What the builder says of the widest rows of a recipe; empty where it would write them."""
    try:
        require_retained(member, search.quality, recipe, minimum)
    except TransferMatrixError as error:
        return str(error)
    return ""


def _save(path: Path, search: Search) -> None:
    tensors = {"columns": search.columns, "logits": search.logits, "anchor_ids": search.anchor_ids}
    quality = {"retained": search.quality.retained, "retained_anchors": search.quality.retained_anchors}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors | {name: torch.tensor(values) for name, values in quality.items()}, partial)
    partial.replace(path)


def _load(path: Path) -> Search:
    tensors = load_file(path)
    shares = [tuple(tensors[name].tolist()) for name in ("retained", "retained_anchors")]
    return Search(tensors["columns"], tensors["logits"], tensors["anchor_ids"], Quality(*shares))
