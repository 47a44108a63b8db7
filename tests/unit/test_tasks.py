"""Tasks: what kind a file is, how records become texts, and how wrong ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ensemble_core.errors import EvaluationError
from ensemble_core.evaluation.measures import Selection
from ensemble_core.evaluation.tasks import Task, load_task, parse_task

CHOICE = {"question": "Which?", "A": "this", "B": "that ", "C": "neither", "answer": "B", "id": 7}
NUMBER = {"question": "How many?", "answer": "2 + 2 = 4\nTherefore, the answer is 4"}
ANSWER = {"question": "Who?", "answer": ["Ann", "Anne"]}
TEXT = {"text": "Once upon a time."}


def written(folder: Path, *records: Any) -> Path:
    path = folder / "task.jsonl"
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def numbered(folder: Path, count: int) -> Task:
    return load_task("t", written(folder, *({"text": f"text {i}"} for i in range(count))))


@pytest.mark.parametrize(
    ("record", "kind", "prompt", "document"),
    [
        (CHOICE, "choice", "Question: Which?\nAnswer:", "Question: Which?\nAnswer: that"),
        (
            NUMBER,
            "number",
            "Question: How many?\nAnswer:",
            "Question: How many?\nAnswer: 2 + 2 = 4\nTherefore, the answer is 4",
        ),
        (ANSWER, "answer", "Question: Who?\nAnswer:", "Question: Who?\nAnswer: Ann"),
        (TEXT, "text", "", "Once upon a time."),
    ],
)
def test_the_fields_say_the_kind(
    tmp_path: Path, record: dict[str, Any], kind: str, prompt: str, document: str
) -> None:
    task = load_task("t", written(tmp_path, record, "", record))
    assert task.kind == kind
    assert [(item.index, item.line) for item in task.items] == [(0, 1), (1, 3)]
    assert (task.items[0].prompt, task.items[0].document) == (prompt, document)


def test_options_keep_the_order_of_their_labels_and_know_the_right_one(tmp_path: Path) -> None:
    digits = {"question": "q", "1": "one", "2": "two", "answer": "1"}
    fewer = CHOICE | {"A": ""}
    first, second, third = load_task("t", written(tmp_path, CHOICE, digits, fewer)).items
    assert (third.options, third.right) == (("that", "neither"), 0)
    assert (first.options, first.right) == (("this", "that", "neither"), 1)
    assert (second.options, second.right) == (("one", "two"), 0)


@pytest.mark.parametrize(
    ("records", "line", "field"),
    [
        ([CHOICE, CHOICE | {"answer": "E"}], 2, "answer"),
        ([CHOICE, {"question": "q", "A": "x", "answer": "A"}], 2, "A, B"),
        ([CHOICE, CHOICE | {"C": 3}], 2, "C"),
        ([NUMBER, NUMBER, {"question": "q", "answer": "four"}], 3, "answer"),
        ([ANSWER, {"question": " ", "answer": "x"}], 2, "question"),
        ([ANSWER, {"question": "q", "answer": []}], 2, "answer"),
        ([ANSWER, {"question": "q", "answer": ["x", 3]}], 2, "answer"),
        ([TEXT, {"question": "q"}], 2, "text"),
        ([TEXT, "{"], 2, "JSON"),
        ([TEXT, "[]"], 2, "object"),
    ],
)
def test_a_wrong_record_is_named_by_file_line_and_field(
    tmp_path: Path, records: list[Any], line: int, field: str
) -> None:
    path = written(tmp_path, *records)
    with pytest.raises(EvaluationError) as refused:
        load_task("t", path)
    assert f"{path}, line {line}: " in str(refused.value)
    assert field in str(refused.value)


def test_bad_records_are_left_out_on_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path, CHOICE, CHOICE | {"B": ""}, CHOICE)
    task = load_task("t", path, skip_bad=True)
    assert [item.index for item in task.items] == [0, 2]
    assert f"left out: {path}, line 2: answer:" in caplog.text


def test_a_kind_that_is_given_wins(tmp_path: Path) -> None:
    path = written(tmp_path, NUMBER)
    assert parse_task(f"sums:answer={path}").kind == "answer"
    assert parse_task(f"sums={path}").kind == "number"
    for wrong in (f"sums:poem={path}", str(path), f"={path}"):
        with pytest.raises(EvaluationError, match="NAME"):
            parse_task(wrong)


def test_files_that_are_not_there_or_empty_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no records"):
        load_task("t", written(tmp_path))
    with pytest.raises(EvaluationError, match="cannot be read"):
        load_task("t", tmp_path / "none.jsonl")


def test_halves_are_disjoint_and_complete(tmp_path: Path) -> None:
    task = numbered(tmp_path, 9)
    even, odd = ([item.index for item in Selection(half).items(task)] for half in ("even", "odd"))
    assert (even, odd) == ([0, 2, 4, 6, 8], [1, 3, 5, 7])
    assert [item.index for item in Selection("odd", 2).items(task)] == [1, 3]


@pytest.mark.parametrize("split", ["even", "odd", "all"])
def test_no_example_is_evaluated(tmp_path: Path, split: Any) -> None:
    task = numbered(tmp_path, 9)
    selection = Selection(split, shots=2)
    shown = selection.examples(task).split("\n\n")[:-1]
    assert len(shown) == 2
    assert not {item.document for item in selection.items(task)} & set(shown)
