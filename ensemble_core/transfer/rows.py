"""Vocabularies and input embeddings -> a transfer matrix, block by block.

Invariants: a row of an ordinary token sums to 1; the row of a stop id has a single entry of 1, at "end of
text"; other special ids and ids without bytes have empty rows. Memory is bounded: besides the embedding table
and two tables of anchors, a build holds one block of similarities. The mass lost by pruning to `top_k`
anchors is measured on the dense row, in the same pass. Formulas: section 1 of docs/methods.md.

Does not know files, configurations or models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ensemble_core.errors import TransferMatrixError
from ensemble_core.text.vocabulary import Vocabulary
from ensemble_core.transfer.matrix import Anchors, TransferMatrix

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_DEEPEN_SCALE = 100.0  # logits of the paper's recipe: 100 * C / ||C||_2
_MARGIN = 16  # extra anchors beyond top_k that are scored exactly, since coarse similarities may swap neighbours
_BLOCK_BYTES = 64 * 2**20  # larger blocks spend a fifth of the CPU time on page faults
_MAX_BLOCK_ROWS = 1024

RecipeName = Literal["centred", "deepen", "spelling"]


@dataclass(frozen=True, slots=True)
class RowRecipe:
    """How a row is made: which similarity, how sharp, and how many anchors are kept.

    temperature: tau of the centred recipe; `deepen` ignores it (its sharpness follows from the row's norm).
    `spelling` ignores both numbers: its rows have one entry (see `transfer/spelling.py`).
    """

    name: RecipeName
    top_k: int
    temperature: float

    @property
    def parameters(self) -> dict[str, str | int | float]:
        """What two matrices of the same recipe must have in common."""
        if self.name == "spelling":
            return {"name": self.name}
        if self.name == "deepen":
            return {"name": self.name, "top_k": self.top_k}
        return {"name": self.name, "top_k": self.top_k, "temperature": self.temperature}


@dataclass(frozen=True, slots=True)
class Quality:
    """Share of the dense rows' mass that the kept entries hold, as quantiles (see QUANTILES).

    retained: over all rows of ordinary tokens. retained_anchors: only over the anchors' own rows. The second
    one judges a recipe: an anchor is a point of the shared space, so a sharp enough row retains its mass,
    while a token far from all anchors has a flat row under any recipe.
    """

    retained: tuple[float, ...]
    retained_anchors: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over all rows of ordinary tokens."""
        return self.retained[QUANTILES.index(0.5)]

    @property
    def median_anchors(self) -> float:
        """Median over the anchors' own rows, which `require_retained` checks."""
        return self.retained_anchors[QUANTILES.index(0.5)]


def build_matrix(
    vocabulary: Vocabulary,
    embeddings: Tensor,
    anchors: Anchors,
    recipe: RowRecipe,
    *,
    device: torch.device | str = "cpu",
    block_dtype: torch.dtype | None = None,
    block_rows: int | None = None,
    value_dtype: torch.dtype = torch.float16,
    progress: bool = True,
    label: str = "",
) -> tuple[TransferMatrix, Quality]:
    """A member's relative representation over `anchors`, on the CPU, and how much of it pruning kept.

    embeddings: (V, d) input embeddings, any float dtype; rows past the vocabulary must be finite but are not
    used. block_dtype: for the search over all anchors and the normaliser, None: what this device multiplies fastest;
    kept entries are scored again in float32. block_rows: rows per block; None: as many as fit in 64 MiB, at most
    1,024. `top_k` >= A - 1 gives the dense matrix. label: names the progress bar, which is shown only if stderr is a
    terminal. Raises TransferMatrixError for embeddings that do not fit.
    """
    _check_embeddings(vocabulary, embeddings, anchors)
    anchor_ids = anchors.ids(vocabulary)
    coarse = block_dtype or _fastest(torch.device(device))
    space = _AnchorSpace(embeddings, anchor_ids[:-1], recipe, torch.device(device), coarse)
    ids = ordinary_ids(vocabulary)
    columns = torch.zeros(len(vocabulary), space.top_k, dtype=torch.int32)
    values = torch.zeros(len(vocabulary), space.top_k, dtype=value_dtype)
    retained = torch.zeros(len(vocabulary))
    for block in _blocks(ids, block_rows or space.block_rows, progress, label):
        columns[block], kept, retained[block] = space.rows(block)
        values[block] = kept.to(value_dtype)
    for stop in vocabulary.stop_ids:
        columns[stop, 0], values[stop, 0] = len(anchors) - 1, 1.0
    quality = Quality(quantiles(retained[ids]), quantiles(retained[anchor_ids[:-1]]))
    return TransferMatrix(*_ordered(columns, values, len(anchors)), anchor_ids), quality


def _fastest(device: torch.device) -> torch.dtype:
    """A processor without instructions for bfloat16 multiplies it a number at a time."""
    if device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return torch.bfloat16


def require_retained(member: str, quality: Quality, recipe: RowRecipe, minimum: float) -> None:
    """Refuse a matrix whose pruned rows retain too little. Raises TransferMatrixError with the numbers."""
    if quality.median_anchors >= minimum:
        return
    sharper = "set matrices.recipe to centred" if recipe.name == "deepen" else "raise matrices.temperature"
    raise TransferMatrixError(
        f"member {member!r}: recipe {recipe.name!r} with top_k {recipe.top_k} keeps too little: the kept "
        f"entries hold a median of {quality.median_anchors:.4f} of the mass of the anchors' own rows, "
        f"matrices.min_retained is {minimum:g} (all rows: median {quality.median:.4f}, least "
        f"{quality.retained[0]:.4f}, most {quality.retained[-1]:.4f}); {sharper}, raise matrices.top_k, or "
        "write it anyway with --force"
    )


class _AnchorSpace:
    """The anchors' embeddings on the device, and the similarities of a block of tokens to them."""

    def __init__(
        self, embeddings: Tensor, anchor_ids: Tensor, recipe: RowRecipe, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._embeddings = embeddings
        self._recipe = recipe
        self._device = device
        self._dtype = dtype
        self._origin = torch.zeros((), device=device)
        if recipe.name == "centred":
            self._origin = embeddings[anchor_ids].to(device).float().mean(dim=0)  # (d)
        self._exact = self._unit(anchor_ids)  # (A - 1, d) float32
        self._coarse = self._exact.to(dtype)  # (A - 1, d)
        self._gram = self._exact.T @ self._exact  # (d, d)
        self.top_k = min(recipe.top_k, len(anchor_ids))
        self._num_scored = min(self.top_k + _MARGIN, len(anchor_ids))

    @property
    def block_rows(self) -> int:
        """How many rows' similarities fit in the memory of one block."""
        num_anchors, width = self._exact.shape
        scored = 4 * (num_anchors if self._scores_all else self._num_scored * width)
        row_bytes = 2 * num_anchors * self._coarse.element_size() + scored
        return max(1, min(_MAX_BLOCK_ROWS, _BLOCK_BYTES // row_bytes))

    def rows(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For R tokens: columns (R, k), values (R, k) float32 in descending order, retained mass (R)."""
        tokens = self._unit(ids)  # (R, d)
        sharpness = self._sharpness(tokens)  # (R, 1)
        coarse = (tokens * sharpness).to(self._dtype) @ self._coarse.T  # (R, A - 1)
        found = coarse.topk(self._num_scored, dim=1, sorted=False).indices  # (R, k + margin)
        exact, order = (self._score(tokens, found) * sharpness).topk(self.top_k, dim=1)
        columns = found.gather(1, order)
        retained = coarse.softmax(dim=1).gather(1, columns).float().sum(dim=1).clamp_max(1.0)
        return columns.int().cpu(), exact.softmax(dim=1).cpu(), retained.cpu()

    def _unit(self, ids: Tensor) -> Tensor:
        rows = self._embeddings[ids].to(self._device).float() - self._origin
        return F.normalize(rows, dim=1)

    def _sharpness(self, tokens: Tensor) -> Tensor:
        """Factor from cosines C (R, A) to logits: tau, or 100 / ||C||_2, with ||C||^2 = e E^T E e^T."""
        if self._recipe.name == "centred":
            return torch.full((len(tokens), 1), self._recipe.temperature, device=self._device)
        squared = ((tokens @ self._gram) * tokens).sum(dim=1, keepdim=True)
        return _DEEPEN_SCALE / squared.clamp_min(1e-12).sqrt()

    @property
    def _scores_all(self) -> bool:
        """Whether one dense float32 product costs less than gathering that many anchors' embeddings."""
        return 4 * self._num_scored >= len(self._exact)

    def _score(self, tokens: Tensor, columns: Tensor) -> Tensor:
        """Float32 cosines (R, k) of the tokens with the anchors in `columns`."""
        if self._scores_all:
            return (tokens @ self._exact.T).gather(1, columns)
        return torch.bmm(self._exact[columns], tokens[:, :, None]).squeeze(2)


def _check_embeddings(vocabulary: Vocabulary, embeddings: Tensor, anchors: Anchors) -> None:
    if not anchors.tokens:
        raise TransferMatrixError("the members share no tokens; relative fusion needs shared tokens")
    if embeddings.ndim != 2 or len(embeddings) < len(vocabulary):
        raise TransferMatrixError(
            f"input embeddings: expected one row for each of {len(vocabulary)} tokens, found shape "
            f"{tuple(embeddings.shape)}; tokenizer and weights belong to different models"
        )
    if not all(bool(part.isfinite().all()) for part in torch.split(embeddings, 65_536)):
        raise TransferMatrixError("input embeddings: some values are NaN or infinite; download the weights again")


def ordinary_ids(vocabulary: Vocabulary) -> Tensor:
    """(T) int64: the tokens that spell text, which have a row of the recipe's."""
    silent = vocabulary.special_ids | vocabulary.stop_ids
    return torch.tensor([i for i, token in enumerate(vocabulary.tokens) if token and i not in silent])


def _blocks(ids: Tensor, size: int, progress: bool, label: str) -> Iterator[Tensor]:
    disable = None if progress else True  # None: off unless stderr is a terminal
    with tqdm(desc=label or None, total=len(ids), unit="row", unit_scale=True, disable=disable) as bar:
        for block in torch.split(ids, size):
            yield block
            bar.update(len(block))


def _ordered(columns: Tensor, values: Tensor, num_anchors: int) -> tuple[Tensor, Tensor]:
    """Sorts each row by column; entries that rounded to zero become padding at its end."""
    padding = values == 0
    columns, order = columns.masked_fill_(padding, num_anchors).sort(dim=1)
    return columns.masked_fill_(columns == num_anchors, 0), values.gather(1, order)


def quantiles(shares: Tensor) -> tuple[float, ...]:
    """Of each row's share, as `Quality` has them."""
    return tuple(torch.quantile(shares, torch.tensor(QUANTILES)).tolist())
