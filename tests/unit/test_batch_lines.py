"""A batch's input: every line is a request, a fault with its number, or answered already."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from server.batches.lines import BatchItem, CustomIds, Intake, LineFault, raw_lines, taken_lines

URLS = frozenset({"/v1/completions", "/v1/chat/completions"})
MAX_BYTES = 400
GOOD: dict[str, Any] = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "duo"}}


def line(**fields: Any) -> bytes:
    return json.dumps({**GOOD, **fields}).encode() + b"\n"


def taken(tmp_path: Path, *lines: bytes, answered: tuple[str, ...] = ()) -> list[BatchItem | LineFault]:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(lines))
    ids = CustomIds()
    for custom_id in answered:
        ids.add(custom_id)

    async def read() -> list[BatchItem | LineFault]:
        return [each async for each in taken_lines(path, MAX_BYTES, Intake(URLS, MAX_BYTES, 50, ids))]

    return asyncio.run(read())


def test_lines_become_requests_in_order(tmp_path: Path) -> None:
    lines = (line(custom_id="a"), b"\n", b"  \r\n", line(custom_id="b", url="/v1/chat/completions").rstrip())
    first, second = taken(tmp_path, *lines)
    assert first == BatchItem(1, "a", "/v1/completions", b'{"model":"duo"}')
    assert (second.line, second.custom_id) == (4, "b")


def test_a_byte_order_mark_and_foreign_keys_do_no_harm(tmp_path: Path) -> None:
    (only,) = taken(tmp_path, b"\xef\xbb\xbf" + line(note=1))
    assert isinstance(only, BatchItem)


@pytest.mark.parametrize("text", ["山里有庙", "\ud800", "\u2028", 'a"b\\c\n'])
def test_a_body_reaches_the_endpoint_as_it_was(tmp_path: Path, text: str) -> None:
    body = {"prompt": text, "temperature": 1e-7, "n": 12345678901234567890}
    (only,) = taken(tmp_path, line(body=body))
    assert isinstance(only, BatchItem)
    assert json.loads(only.body) == body


FAULTS = [
    (b"{bad\n", "invalid_json", None),
    (b'"\xff"\n', "invalid_json", None),
    (b'{"custom_id": ' + b"9" * 300 + b"\n", "invalid_json", None),
    (b"[1]\n", "invalid_line", None),
    (line(custom_id=None), "invalid_custom_id", None),
    (line(custom_id=""), "invalid_custom_id", None),
    (line(custom_id=7), "invalid_custom_id", None),
    (line(body={"prompt": [1] * 60}), "too_many_values", None),
    (line(body={"prompt": "x" * MAX_BYTES}), "line_too_long", None),
    (line(method="GET"), "invalid_method", "a"),
    (line(method=None), "invalid_method", "a"),
    (line(url="/v1/models"), "invalid_url", "a"),
    (line(url=None), "invalid_url", "a"),
    (line(url=["/v1/completions"]), "invalid_url", "a"),
    (line(body=None), "invalid_body", "a"),
    (line(body="text"), "invalid_body", "a"),
    (line(body={"stream": True}), "stream_not_allowed", "a"),
]


@pytest.mark.parametrize(("wrong", "code", "custom_id"), FAULTS)
def test_a_wrong_line_is_a_fault_and_the_next_one_goes_on(
    tmp_path: Path, wrong: bytes, code: str, custom_id: str | None
) -> None:
    fault, after = taken(tmp_path, wrong, line(custom_id="after"))
    assert isinstance(fault, LineFault)
    assert (fault.line, fault.code, fault.custom_id) == (1, code, custom_id)
    assert (after.line, after.custom_id) == (2, "after")
    assert len(fault.message) < 300


def test_deep_nesting_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"body": ' + b"[" * 200_000 + b"\n" + line())
    found = [Intake(URLS, 10**6, 10**6, CustomIds()).take(number, raw) for number, raw in raw_lines(path, 10**6)]
    assert [type(each) for each in found] == [LineFault, BatchItem]


def test_the_second_line_of_an_id_is_a_fault_even_if_the_first_is_answered(tmp_path: Path) -> None:
    for answered in ((), ("a",)):
        *_, fault = taken(tmp_path, line(), line(), answered=answered)
        assert isinstance(fault, LineFault)
        assert (fault.line, fault.code, fault.custom_id) == (2, "duplicate_custom_id", "a")


def test_answered_lines_need_no_request(tmp_path: Path) -> None:
    lines = [line(custom_id=name) for name in "abcd"]
    assert [each.custom_id for each in taken(tmp_path, *lines, answered=("a", "c"))] == ["b", "d"]


@pytest.mark.parametrize("end", [b"\n", b""])
def test_the_longest_line_is_taken_and_one_more_byte_is_not(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "in.jsonl"
    for num_bytes in (10, 11):
        raw = b"x" * num_bytes + end
        path.write_bytes(raw)
        fits = len(raw) <= 10 or (end == b"\n" and num_bytes == 10)
        assert list(raw_lines(path, 10)) == [(1, raw if fits else None)]


def test_a_line_that_is_too_long_is_skipped_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"x" * 200_000 + b"\n" + b"y\n" + b"z" * 100)
    assert list(raw_lines(path, 50)) == [(1, None), (2, b"y\n"), (3, None)]
