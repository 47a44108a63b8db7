"""Finished items survive; changed circumstances are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from ensemble_core.errors import EvaluationError
from ensemble_core.evaluation.journal import Journal

KEY = ("duo", "task", "bits")
MADE_FROM = {"members.a": {"model": "x"}, "task t": ["text", "abc"]}


def test_a_second_run_finds_what_the_first_put_down(tmp_path: Path) -> None:
    first = Journal(tmp_path / "out", MADE_FROM, resume=False)
    first.add(KEY, {0: {"bits": 1.5}, 2: {"bits": 2.5}})
    first.add(KEY, {4: {"bits": 3.5}})
    second = Journal(tmp_path / "out", MADE_FROM, resume=True)
    assert second.items(KEY) == first.items(KEY) == {0: {"bits": 1.5}, 2: {"bits": 2.5}, 4: {"bits": 3.5}}
    assert second.items(("duo", "task", "score")) == {}


def test_a_line_that_was_cut_off_is_dropped_and_written_anew(tmp_path: Path) -> None:
    Journal(tmp_path, MADE_FROM, resume=True).add(KEY, {0: {"bits": 1.0}, 1: {"bits": 2.0}})
    path = tmp_path / "items.jsonl"
    path.write_text(path.read_text()[:-20])
    again = Journal(tmp_path, MADE_FROM, resume=True)
    assert set(again.items(KEY)) == {0}
    again.add(KEY, {1: {"bits": 2.0}})
    assert set(Journal(tmp_path, MADE_FROM, resume=True).items(KEY)) == {0, 1}


def test_results_are_not_mixed(tmp_path: Path) -> None:
    Journal(tmp_path, MADE_FROM, resume=False)
    with pytest.raises(EvaluationError, match="--resume"):
        Journal(tmp_path, MADE_FROM, resume=False)
    with pytest.raises(EvaluationError, match="other task t"):
        Journal(tmp_path, MADE_FROM | {"task t": ["text", "def"]}, resume=True)
    Journal(tmp_path, MADE_FROM | {"task u": ["text", "new"]}, resume=True)
    with pytest.raises(EvaluationError, match="other task u"):
        Journal(tmp_path, {"task u": ["text", "changed"]}, resume=True)


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Journal(None, MADE_FROM, resume=False).add(KEY, {0: {}})
    assert not list(tmp_path.iterdir())
