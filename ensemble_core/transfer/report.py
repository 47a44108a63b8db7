"""Reports on the contents of transfer matrices, for `unisono inspect`.

A file holds only ids and columns. Their text comes from the members' tokenizers, so the folder's name must list
members of the configuration, as `unisono build` writes it. Every file must first pass the checks of
`store.load_matrix`, with the recipe in its own metadata. Does not know how matrices are made or used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ensemble_core.config import Config
from ensemble_core.errors import TransferMatrixError
from ensemble_core.members.loading.checkpoints import load_vocabulary
from ensemble_core.text.vocabulary import Vocabulary
from ensemble_core.transfer.matrix import Anchors, TransferMatrix, common_anchors
from ensemble_core.transfer.rows import QUANTILES, RowRecipe
from ensemble_core.transfer.store import Metadata, load_matrix, read_metadata

DECILES = tuple(rank / 10 for rank in range(11))
_MAX_NEIGHBOURS = 10


@dataclass(frozen=True, slots=True)
class Neighbours:
    """A token's nearest anchors with their shares, largest first. token_id: -1 if the member lacks the token."""

    token: str
    token_id: int
    anchors: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class MatrixReport:
    """The report on one file.

    retained, retained_anchors: quantile -> share of the dense rows' mass that was kept, measured during the build.
    own_mass: deciles of the share that an anchor's own row gives that anchor. peak: deciles of each row's largest
    share. width: entries of the widest row; mean_width: mean over rows that are not empty.
    """

    path: str
    member: str
    model: str
    recipe: Mapping[str, Any]
    created: str
    num_bytes: int
    tokens: int
    anchors: int
    entries: int
    width: int
    mean_width: float
    empty_rows: int
    retained: Mapping[str, float]
    retained_anchors: Mapping[str, float]
    own_mass: Mapping[str, float]
    peak: Mapping[str, float]
    neighbours: tuple[Neighbours, ...]


def inspect_matrices(config: Config, paths: Sequence[Path], tokens: Sequence[str]) -> list[MatrixReport]:
    """A report on every file in `paths`, searching folders recursively. Raises TransferMatrixError."""
    vocabularies: dict[str, Vocabulary] = {}
    return [_inspect(config, path, tokens, vocabularies) for path in _files(paths)]


def _files(paths: Sequence[Path]) -> list[Path]:
    found = [
        file for path in paths for file in ([path] if not path.is_dir() else sorted(path.rglob("*.safetensors")))
    ]
    if not found:
        raise TransferMatrixError(
            f"{', '.join(map(str, paths))}: no matrices found; build them with `unisono build --config FILE`"
        )
    return found


def _inspect(
    config: Config, path: Path, tokens: Sequence[str], vocabularies: dict[str, Vocabulary]
) -> MatrixReport:
    metadata = read_metadata(path)
    members = path.resolve().parent.name.split("+")
    for name in members:
        if name not in config.members:
            raise TransferMatrixError(
                f"transfer matrix {path}: its folder names member {name!r}, which the configuration does not have "
                f"({', '.join(config.members)}); pass the --config that it was built from"
            )
        if name not in vocabularies:
            vocabularies[name] = load_vocabulary(name, config.members[name])
    anchors = common_anchors([vocabularies[name] for name in members])
    vocabulary = vocabularies[metadata.member]
    matrix = load_matrix(
        path,
        member=metadata.member,
        vocabulary=vocabulary,
        anchors=anchors,
        recipe=_recipe(metadata),
        rebuild=config.build_command,
    )
    return _report(path, metadata, matrix, tuple(_neighbours(t, matrix, vocabulary, anchors) for t in tokens))


def _recipe(metadata: Metadata) -> RowRecipe:
    """The recipe in the file's metadata; `deepen` has no temperature, `spelling` no width, either."""
    found = json.loads(metadata.recipe)
    return RowRecipe(found["name"], found.get("top_k", 1), found.get("temperature", 0.0))


def _report(
    path: Path, metadata: Metadata, matrix: TransferMatrix, neighbours: tuple[Neighbours, ...]
) -> MatrixReport:
    used = (matrix.values > 0).sum(dim=1)  # (V)
    filled = used[used > 0]
    own = _own_mass(matrix)
    return MatrixReport(
        path=str(path),
        member=metadata.member,
        model=metadata.model,
        recipe=json.loads(metadata.recipe),
        created=metadata.created,
        num_bytes=path.stat().st_size,
        tokens=matrix.values.shape[0],
        anchors=matrix.num_anchors,
        entries=int(used.sum()),
        width=int(used.max()),
        mean_width=float(filled.float().mean()) if len(filled) else 0.0,
        empty_rows=int((used == 0).sum()),
        retained=_named(QUANTILES, metadata.quality.retained),
        retained_anchors=_named(QUANTILES, metadata.quality.retained_anchors),
        own_mass=_deciles(own),
        peak=_deciles(matrix.values.float().amax(dim=1)[used > 0]),
        neighbours=neighbours,
    )


def _own_mass(matrix: TransferMatrix) -> Tensor:
    """The share that each anchor's own row gives it, for all anchors for which the member has a token."""
    anchors = (matrix.anchor_ids >= 0).nonzero().squeeze(1)
    columns, values = matrix.rows(matrix.anchor_ids[anchors])
    return torch.where(columns == anchors.unsqueeze(1), values, 0.0).sum(dim=1)


def _deciles(values: Tensor) -> dict[str, float]:
    if not len(values):
        return {}
    ordered = values.sort().values
    return _named(DECILES, [float(ordered[round(decile * (len(ordered) - 1))]) for decile in DECILES])


def _named(quantiles: Sequence[float], values: Sequence[float]) -> dict[str, float]:
    return {f"{quantile:g}": value for quantile, value in zip(quantiles, values, strict=True)}


def _neighbours(token: str, matrix: TransferMatrix, vocabulary: Vocabulary, anchors: Anchors) -> Neighbours:
    """The nearest anchors of the token that spells `token`."""
    token_id = vocabulary.ids_by_bytes.get(token.encode(), -1)
    if token_id < 0:
        return Neighbours(token, -1, ())
    columns, values = matrix.rows(torch.tensor(token_id))
    best = values.sort(descending=True)
    found = [
        (_spelt(anchors, int(columns[place])), float(value))
        for value, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        if value > 0
    ]
    return Neighbours(token, token_id, tuple(found[:_MAX_NEIGHBOURS]))


def _spelt(anchors: Anchors, column: int) -> str:
    if column == len(anchors.tokens):
        return "end of text"
    return anchors.tokens[column].decode("utf-8", "backslashreplace")


def shown(reports: Sequence[MatrixReport]) -> str:
    """Reports as text."""
    return "\n\n".join("\n".join(_lines(report)) for report in reports)


def shown_as_json(reports: Sequence[MatrixReport]) -> str:
    """Reports as JSON: a list of objects."""
    return json.dumps([asdict(report) for report in reports], indent=2, ensure_ascii=False)


def _lines(report: MatrixReport) -> list[str]:
    recipe = ", ".join(f"{name} {value}" for name, value in report.recipe.items() if name != "name")
    rows = {
        "member": f"{report.member} ({report.model})",
        "recipe": f"{report.recipe['name']} ({recipe}), built {report.created}",
        "size": f"{report.tokens} tokens x {report.anchors} anchors, {report.num_bytes / 1e6:.1f} MB",
        "entries": f"{report.entries}; widest row {report.width}, mean {report.mean_width:.1f}",
        "empty rows": str(report.empty_rows),
        "retained mass": _spread(report.retained),
        "of anchors' rows": _spread(report.retained_anchors),
        "self mass": _spread(report.own_mass),
        "largest share": _spread(report.peak),
    }
    lines = [report.path, *(f"  {name:<17} {text}" for name, text in rows.items())]
    for each in report.neighbours:
        near = ", ".join(f"{anchor!r} {share:.3f}" for anchor, share in each.anchors) or "none"
        near = near if each.token_id >= 0 else "the member has no such token"
        lines.append(f"  {each.token!r:<17} {near}")
    return lines


def _spread(quantiles: Mapping[str, float]) -> str:
    return "  ".join(f"{float(name):.0%} {value:.4f}" for name, value in quantiles.items())
