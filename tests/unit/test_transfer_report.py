"""What `unisono inspect` says of matrices whose every entry is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import byte_vocabulary, fake_config, pair_vocabulary
from typer.testing import CliRunner

from ensemble_core.errors import TransferMatrixError
from ensemble_core.transfer import report as reports
from ensemble_core.transfer.matrix import TransferMatrix, common_anchors
from ensemble_core.transfer.report import inspect_matrices, shown, shown_as_json
from ensemble_core.transfer.rows import QUANTILES, Quality, RowRecipe
from ensemble_core.transfer.store import Origin, save_matrix
from server.cli import app

VOCABULARIES = {"alpha": byte_vocabulary(), "beta": pair_vocabulary()}
ANCHORS = common_anchors(list(VOCABULARIES.values()))
CONFIG = fake_config()


def matrix() -> TransferMatrix:
    """Token t of alpha: three quarters on itself, a quarter on the next byte; b"z" has no row; stops their own."""
    vocabulary = VOCABULARIES["alpha"]
    ids = ANCHORS.ids(vocabulary)
    column = {int(token_id): place for place, token_id in enumerate(ids.tolist())}
    columns = torch.zeros(len(vocabulary), 2, dtype=torch.int32)
    values = torch.zeros(len(vocabulary), 2)
    for byte in range(256):
        pair = sorted([(column[byte], 0.75), (column[(byte + 1) % 256], 0.25)])
        columns[byte], values[byte] = torch.tensor([c for c, _ in pair]), torch.tensor([v for _, v in pair])
    values[ord("z")] = 0.0
    columns[256, 0], values[256, 0] = len(ANCHORS) - 1, 1.0
    return TransferMatrix(columns, values, ids)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(reports, "load_vocabulary", lambda name, member: VOCABULARIES[name])
    save_matrix(
        tmp_path / "alpha+beta" / "alpha.centred.safetensors",
        matrix(),
        Quality(tuple(rank / 10 for rank in range(len(QUANTILES))), (1.0,) * len(QUANTILES)),
        member="alpha",
        origin=Origin("fake-alpha", ""),
        vocabulary=VOCABULARIES["alpha"],
        anchors=ANCHORS,
        recipe=RowRecipe("centred", 2, 20.0),
    )
    return tmp_path


def test_the_numbers_are_those_of_the_matrix(folder: Path) -> None:
    (report,) = inspect_matrices(CONFIG, [folder], ["a", "z", "nobody has this", "0"])
    assert (report.member, report.model, report.recipe["name"]) == ("alpha", "fake-alpha", "centred")
    assert (report.tokens, report.anchors) == (257, 257)
    assert (report.entries, report.width, report.empty_rows) == (255 * 2 + 1, 2, 1)
    assert report.mean_width == pytest.approx(511 / 256)
    assert report.retained["0.5"] == pytest.approx(0.3)
    assert [report.own_mass[key] for key in ("0", "0.5", "1")] == [0.0, 0.75, 1.0]
    assert (report.peak["0"], report.peak["1"]) == (0.75, 1.0)
    near, empty, missing, digit = report.neighbours
    assert near.anchors == (("a", 0.75), ("b", 0.25))
    assert (empty.token_id, empty.anchors) == (ord("z"), ())
    assert (missing.token_id, missing.anchors) == (-1, ())
    assert digit.anchors == (("0", 0.75), ("1", 0.25))


def test_reports_can_be_read_and_parsed(folder: Path) -> None:
    found = inspect_matrices(CONFIG, [folder / "alpha+beta" / "alpha.centred.safetensors"], ["a"])
    assert "'a' 0.750, 'b' 0.250" in shown(found)
    assert "empty rows        1" in shown(found)
    assert json.loads(shown_as_json(found))[0]["neighbours"][0]["anchors"] == [["a", 0.75], ["b", 0.25]]


def test_what_cannot_be_read_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TransferMatrixError, match="no matrices"):
        inspect_matrices(CONFIG, [tmp_path / "alpha+beta" / "empty"], []) if (
            tmp_path / "alpha+beta" / "empty"
        ).mkdir() is None else None
    other: Any = fake_config(("alpha", "gamma"))
    with pytest.raises(TransferMatrixError, match="'beta'"):
        inspect_matrices(other, [folder], [])
    path = folder / "alpha+beta" / "alpha.centred.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(TransferMatrixError, match="sha256"):
        inspect_matrices(CONFIG, [path], [])


def test_the_command_prints_json(folder: Path) -> None:
    config = folder / "config.yaml"
    config.write_text("members: {alpha: {model: ./a}, beta: {model: ./b}}\n")
    found = CliRunner().invoke(app, ["inspect", str(folder), "--config", str(config), "--json", "--token", "a"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)[0]["member"] == "alpha"
