"""Transfer matrices on disk: CSR in safetensors, and the checks made before a matrix is used.

A file holds `crow_indices` (V + 1) int64, `col_indices` (nnz) int32, `values` (nnz) float16; columns ascend
within a row, and padding is not stored. The metadata records what the matrix was made for and from (see
`Metadata`). Invariants: files are written atomically; a matrix that `load_matrix` returns fits the requested
vocabulary, anchors and recipe. Does not know how matrices are made.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ensemble_core.errors import TransferMatrixError
from ensemble_core.text.vocabulary import Vocabulary
from ensemble_core.transfer.matrix import Anchors, TransferMatrix
from ensemble_core.transfer.rows import Quality, RowRecipe

FORMAT_VERSION = "1"
_DTYPES = {"crow_indices": torch.int64, "col_indices": torch.int32, "values": torch.float16}


@dataclass(frozen=True, slots=True)
class Origin:
    """Which weights a matrix was made from: hub id or folder, and revision ("" if there is none)."""

    model: str
    revision: str


@dataclass(frozen=True, slots=True)
class Metadata:
    """The metadata that a file stores beside the tensors; all strings, as safetensors requires.

    recipe: JSON of `RowRecipe.parameters`. retained, retained_anchors: JSON lists, quantiles as in `Quality`.
    sha256: of the bytes of the three tensors. created: UTC, ISO 8601.
    """

    format_version: str
    member: str
    model: str
    revision: str
    vocabulary: str
    anchors: str
    num_anchors: str
    recipe: str
    retained: str
    retained_anchors: str
    sha256: str
    unisono_version: str
    created: str

    @property
    def quality(self) -> Quality:
        """The retained mass as numbers."""
        return Quality(tuple(json.loads(self.retained)), tuple(json.loads(self.retained_anchors)))


def matrix_path(folder: Path, members: Sequence[str], member: str, recipe_name: str) -> Path:
    """The path of a member's matrix; its columns depend on which members share the anchors."""
    return folder / "+".join(sorted(members)) / f"{member}.{recipe_name}.safetensors"


def save_matrix(
    path: Path,
    matrix: TransferMatrix,
    quality: Quality,
    *,
    member: str,
    origin: Origin,
    vocabulary: Vocabulary,
    anchors: Anchors,
    recipe: RowRecipe,
) -> int:
    """Write a matrix with its metadata atomically; values are stored as float16.

    Returns the size of the file in bytes. Raises TransferMatrixError if it cannot be written.
    """
    tensors = _compressed(matrix)
    metadata = Metadata(
        format_version=FORMAT_VERSION,
        member=member,
        model=origin.model,
        revision=origin.revision,
        vocabulary=vocabulary.fingerprint,
        anchors=anchors.fingerprint,
        num_anchors=str(len(anchors)),
        recipe=_recipe_text(recipe),
        retained=json.dumps(quality.retained),
        retained_anchors=json.dumps(quality.retained_anchors),
        sha256=data_sha256(tensors),
        unisono_version=version("unisono"),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    try:
        _write(path, save(tensors, metadata=asdict(metadata)))
    except OSError as error:
        raise TransferMatrixError(
            f"member {member!r}: transfer matrix {path} cannot be written ({error.strerror}); free space or "
            "set matrices.folder to another folder"
        ) from error
    return path.stat().st_size


def load_matrix(
    path: Path,
    *,
    member: str,
    vocabulary: Vocabulary,
    anchors: Anchors,
    recipe: RowRecipe,
    rebuild: str,
    origin: Origin | None = None,
) -> TransferMatrix:
    """Read a matrix, and check that it is intact and made for exactly this use.

    rebuild: the command that rebuilds it, for messages. origin: the weights that it must come from; None
    accepts any. Raises TransferMatrixError, which names the member, what differs and the command.
    """
    check = _Check(path, member, rebuild)
    metadata, tensors = _read(check)
    check.equal("format version", FORMAT_VERSION, metadata.format_version)
    check.equal("member", member, metadata.member)
    if origin is not None:
        check.equal("model", origin.model, metadata.model)
        check.equal("revision", origin.revision, metadata.revision)
    check.equal("vocabulary fingerprint", vocabulary.fingerprint, metadata.vocabulary)
    check.equal("anchor fingerprint", anchors.fingerprint, metadata.anchors)
    check.equal("number of anchors", str(len(anchors)), metadata.num_anchors)
    check.equal("recipe", _recipe_text(recipe), metadata.recipe)
    check.equal("sha256 of the data", data_sha256(tensors), metadata.sha256)
    _check_structure(check, tensors, len(vocabulary), len(anchors))
    return TransferMatrix(*_padded(**tensors), anchors.ids(vocabulary))


def read_metadata(path: Path) -> Metadata:
    """Only the metadata, for inspection; not compared with anything. Raises TransferMatrixError if unreadable."""
    check = _Check(path, path.name.removesuffix(".safetensors").rpartition(".")[0], "unisono build --config FILE")
    with check.open() as reader:
        return _metadata(check, reader)


def data_sha256(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of the bytes of `crow_indices`, `col_indices`, `values`, in this order."""
    digest = hashlib.sha256()
    for name in _DTYPES:
        digest.update(tensors[name].contiguous().numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _Check:
    """Checks on one file; all refusals have the same form."""

    path: Path
    member: str
    rebuild: str

    def refuse(self, what: str) -> NoReturn:
        raise TransferMatrixError(
            f"member {self.member!r}: transfer matrix {self.path}: {what}; rebuild it with: {self.rebuild}"
        )

    def require(self, holds: bool, what: str) -> None:
        if not holds:
            self.refuse(what)

    def equal(self, what: str, expected: object, found: object) -> None:
        self.require(expected == found, f"{what}: expected {expected}, found {found}")

    def open(self) -> safe_open:
        self.require(self.path.is_file(), "expected a file, found none")
        try:
            return safe_open(self.path, framework="pt")
        except (OSError, SafetensorError) as error:
            self.refuse(f"expected a whole safetensors file, found a damaged one ({error})")


def _read(check: _Check) -> tuple[Metadata, dict[str, Tensor]]:
    with check.open() as reader:
        metadata = _metadata(check, reader)
        check.equal("tensors", sorted(_DTYPES), sorted(reader.keys()))
        tensors = {name: reader.get_tensor(name) for name in _DTYPES}
    for name, dtype in _DTYPES.items():
        check.equal(f"dtype of {name}", dtype, tensors[name].dtype)
        check.equal(f"number of dimensions of {name}", 1, tensors[name].ndim)
    return metadata, tensors


def _metadata(check: _Check, reader: Any) -> Metadata:
    found: dict[str, str] = reader.metadata() or {}
    names = {field.name for field in fields(Metadata)}
    if found.get("format_version") != FORMAT_VERSION:
        check.equal("format version", FORMAT_VERSION, found.get("format_version", "none"))
    check.equal("metadata", sorted(names), sorted(found))
    return Metadata(**found)


def _check_structure(check: _Check, tensors: dict[str, Tensor], num_rows: int, num_anchors: int) -> None:
    crow, columns, values = tensors["crow_indices"], tensors["col_indices"], tensors["values"]
    num_entries = len(values)
    check.equal("rows (entries of crow_indices)", num_rows + 1, len(crow))
    check.equal("entries of col_indices (as many as values)", num_entries, len(columns))
    check.equal("first and last of crow_indices", [0, num_entries], [int(crow[0]), int(crow[-1])])
    counts = crow.diff()
    check.require(bool((counts >= 0).all()), "crow_indices: expected ascending, found a descending pair")
    if num_entries:
        low, high = (int(bound) for bound in columns.aminmax())
        in_bounds = low >= 0 and high < num_anchors
        check.require(in_bounds, f"col_indices: expected 0 to {num_anchors - 1}, found {low} to {high}")
    _check_order(check, crow, columns)
    _check_values(check, counts, values.float())


def _check_order(check: _Check, crow: Tensor, columns: Tensor) -> None:
    ascending = columns.diff() > 0  # (nnz - 1)
    starts = crow[1:-1]  # columns may descend from one row to the next
    ascending[starts[(starts > 0) & (starts < len(columns))] - 1] = True
    check.require(bool(ascending.all()), "col_indices: expected ascending within a row, found a row out of order")


def _check_values(check: _Check, counts: Tensor, values: Tensor) -> None:
    """Finite, not negative; rows sum to 1 within twice float16's rounding (2^-11 of each value, or 2^-25)."""
    if len(values):
        low, high = values.aminmax()  # either is NaN if any value is
        finite = bool(torch.stack([low, high]).isfinite().all())
        check.require(finite, "values: expected finite numbers, found NaN or infinity")
        check.require(bool(low >= 0), "values: expected none below 0, found a negative one")
    sums = torch.segment_reduce(values, "sum", lengths=counts, initial=0.0)  # (V)
    off = ((sums - 1).abs() > 2.0**-10 + counts * 2.0**-24) & (counts > 0)
    worst = int(off.nonzero()[0]) if bool(off.any()) else 0
    check.require(not off.any(), f"row sums: expected 1 (or an empty row), found {sums[worst]} in row {worst}")


def _compressed(matrix: TransferMatrix) -> dict[str, Tensor]:
    values = matrix.values.half()  # (V, k)
    used = values > 0  # (V, k)
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), used.sum(dim=1).cumsum(dim=0)])  # (V + 1)
    return {"crow_indices": crow, "col_indices": matrix.columns[used].int(), "values": values[used]}


def _padded(crow_indices: Tensor, col_indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The stored entries as columns and values (V, k), where k is the width of the widest row."""
    counts = crow_indices.diff()  # (V)
    width = max(1, int(counts.max()))
    used = torch.arange(width) < counts[:, None]  # (V, k)
    columns = torch.zeros(used.shape, dtype=torch.int32).masked_scatter_(used, col_indices)
    return columns, torch.zeros(used.shape, dtype=torch.float16).masked_scatter_(used, values)


def _recipe_text(recipe: RowRecipe) -> str:
    return json.dumps(recipe.parameters, sort_keys=True)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
