"""A batch's output: whole lines, and what of them outlives a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ensemble_core.errors import ConfigError
from server.batches.lines import LineFault
from server.batches.results import BatchReply, LineResult, ResultFile, kept_answers


def answer(custom_id: str, status: int = 200, body: Any = None) -> LineResult:
    return LineResult(custom_id, BatchReply(status, "req-1", {"text": custom_id} if body is None else body))


def fault(custom_id: str | None = None) -> LineResult:
    return LineResult(custom_id, LineFault(7, "invalid_json", "the line is not valid JSON", custom_id))


def test_an_answer_has_openais_form() -> None:
    told = json.loads(answer("a").line())
    assert told.pop("id").startswith("batch_req_")
    response = {"status_code": 200, "request_id": "req-1", "body": {"text": "a"}}
    assert told == {"custom_id": "a", "response": response, "error": None}


def test_a_fault_names_its_line() -> None:
    told = json.loads(fault().line())
    assert (told["custom_id"], told["response"]) == (None, None)
    assert told["error"]["line"] == 7
    assert told["error"]["message"] == "line 7: the line is not valid JSON"


def test_nothing_in_a_text_ends_a_line() -> None:
    text = "a\nb\r\u2028\u2029\x85\x0b\x0c\ud800 山"
    raw = answer("a", body={"text": text}).line()
    assert len(raw.decode("ascii").splitlines()) == 1
    assert json.loads(raw)["response"]["body"]["text"] == text


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 4}, (3, 4)),
        ({"input_tokens": 3, "output_tokens": 4}, (3, 4)),
        ({"prompt_tokens": None}, (0, 0)),
        (None, (0, 0)),
    ],
)
def test_tokens_are_those_of_the_usage(usage: Any, tokens: tuple[int, int]) -> None:
    assert answer("a", body={"usage": usage}).tokens == tokens
    assert answer("a", body=["no object"]).tokens == (0, 0)
    assert fault().tokens == (0, 0)


def written(path: Path, *results: LineResult, errors: Path | None = None) -> None:
    file = ResultFile(path, errors)
    for result in results:
        file.write(result)
    file.close()


def ids(path: Path) -> list[str | None]:
    return [json.loads(line)["custom_id"] for line in path.read_text().splitlines()]


def test_failures_go_to_a_file_of_their_own_if_there_is_one(tmp_path: Path) -> None:
    out, errors = tmp_path / "out", tmp_path / "errors"
    written(out, answer("a"), answer("b", 500), fault("c"), errors=errors)
    assert (ids(out), ids(errors)) == (["a"], ["b", "c"])
    written(out, answer("d", 404))
    assert ids(out) == ["a", "d"]


def test_only_answers_outlive_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "out"
    results = [answer("a"), answer("b", 500), answer("c", 429), fault(), fault("a"), answer("d", 400), answer("e")]
    written(path, *results)
    kept = kept_answers(path)
    assert ids(path) == ["a", "e"]
    assert [name in kept for name in "abcde"] == [True, False, False, False, True]
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("cut", [1, 2, 40, 100])
def test_a_last_line_that_was_cut_off_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "out"
    written(path, answer("a"), answer("b"))
    path.write_bytes(path.read_bytes()[:-cut])
    kept = kept_answers(path)
    assert ids(path) == ["a"]
    assert ("a" in kept, "b" in kept, len(kept)) == (True, False, 1)
    written(path, answer("b"))
    assert ids(path) == ["a", "b"]


@pytest.mark.parametrize("foreign", ["my notes\n", '{"prompt": "x"}\n', "[1]\n"])
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path, foreign: str) -> None:
    path = tmp_path / "out"
    path.write_bytes(answer("a").line() + foreign.encode())
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="line 2"):
        kept_answers(path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    written(target, answer("a"), answer("b", 500))
    link.symlink_to(target)
    assert len(kept_answers(link)) == 1
    assert link.is_symlink()
    assert ids(target) == ["a"]


def test_a_folder_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        ResultFile(tmp_path, None)
    with pytest.raises(ConfigError, match="cannot be written"):
        ResultFile(tmp_path / "out", tmp_path)
