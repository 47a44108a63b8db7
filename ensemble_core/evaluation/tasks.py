r"""Tasks: JSONL records, how they become documents and prompts, and which of them are evaluated.

A record's fields say what kind it is:

| kind | fields | scored by |
|---|---|---|
| text | text | bits per byte |
| choice | question, an option for each of A, B, ... (or 1, 2, ...), answer: the right label | likeliest option |
| number | question, answer: ends with "the answer is N" or "#### N" | the last number of a completion |
| answer | question, answer: a text or a list of accepted ones | exact match of a greedy completion |

Invariants: all records of a file are of one kind; other fields and empty options are ignored; a record that does not
fit is refused with file, line and field, or left out with a warning where that is asked for. As a document a record
reads `Question: ...\nAnswer: ...`, with the first accepted answer or the right option. Does not know models.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ensemble_core.errors import EvaluationError

logger = logging.getLogger(__name__)

TaskKind = Literal["text", "choice", "number", "answer"]
Split = Literal["all", "even", "odd"]

FINAL_NUMBER = re.compile(r"(?:the answer is|####)\s*\$?(-?[\d,]*\.?\d+)\s*\.?\s*$", re.IGNORECASE)
_LABEL = re.compile(r"^[A-Z0-9]$")
_SPEC = re.compile(r"^(?P<name>[^=:]+)(?::(?P<kind>[a-z]+))?=(?P<path>.+)$")


@dataclass(frozen=True, slots=True)
class Item:
    """One record. index: its place among the file's records, from 0; line: of the file, from 1."""

    index: int
    line: int
    question: str = ""
    answers: tuple[str, ...] = ()  # accepted ones; of a choice the right option's text; of a number the solution
    options: tuple[str, ...] = ()  # a choice's texts
    right: int = -1  # which of the options
    text: str = ""

    @property
    def prompt(self) -> str:
        """What stands before an answer; empty for a text."""
        return f"Question: {self.question}\nAnswer:" if self.question else ""

    @property
    def document(self) -> str:
        """The record as plain text."""
        return f"{self.prompt} {self.answers[0]}" if self.question else self.text


@dataclass(frozen=True, slots=True)
class Task:
    """A named file of items of one kind. digest: sha256 of the file."""

    name: str
    kind: TaskKind
    path: Path
    digest: str
    items: tuple[Item, ...]

    def chosen(self, split: Split, limit: int | None) -> tuple[Item, ...]:
        """The items of a half (by index), at most the first `limit` of them."""
        rest = {"all": (0, 1), "even": (0,), "odd": (1,)}[split]
        return tuple(item for item in self.items if item.index % 2 in rest)[:limit]


def parse_task(spec: str, skip_bad: bool = False) -> Task:
    """Read the task that `NAME=FILE` or `NAME:KIND=FILE` names. See `load_task`."""
    match = _SPEC.match(spec)
    kinds: tuple[TaskKind, ...] = get_args(TaskKind)
    if match is None or match["kind"] not in (None, *kinds):
        raise EvaluationError(
            f"--task {spec!r}: write NAME=FILE.jsonl or NAME:KIND=FILE.jsonl, where KIND is one of {', '.join(kinds)}"
        )
    kind = next((kind for kind in kinds if kind == match["kind"]), None)
    return load_task(match["name"], Path(match["path"]), kind, skip_bad)


def load_task(name: str, path: Path, kind: TaskKind | None = None, skip_bad: bool = False) -> Task:
    """Read a JSONL file; kind: None takes what the first record's fields say.

    skip_bad: leave out records that do not fit, each with a warning; the others keep their index. Raises
    EvaluationError.
    """
    try:
        data = path.read_bytes()
        lines = data.decode("utf-8").splitlines()
    except OSError as error:
        raise EvaluationError(f"task {name!r}: {path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise EvaluationError(f"task {name!r}: {path} is not UTF-8 text ({error.reason})") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise EvaluationError(f"task {name!r}: {path} has no records")
    records = [_Line(path, number, _parsed(path, number, line)) for number, line in numbered]
    items = tuple(_items(records, kind or records[0].kind(), skip_bad))
    return Task(name, kind or records[0].kind(), path, hashlib.sha256(data).hexdigest(), items)


def _items(records: Sequence[_Line], kind: TaskKind, skip_bad: bool) -> Iterator[Item]:
    for index, record in enumerate(records):
        try:
            yield record.item(index, kind)
        except EvaluationError as error:
            if not skip_bad:
                raise EvaluationError(f"{error}; mend the record, or pass --skip-bad to leave it out") from error
            logger.warning("left out: %s", error)


def _parsed(path: Path, line: int, text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise EvaluationError(f"{path}, line {line}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise EvaluationError(f"{path}, line {line}: expected an object, found {type(found).__name__}")
    return found


@dataclass(frozen=True, slots=True)
class _Line:
    """One line of a file, and how it is refused."""

    path: Path
    line: int
    fields: Mapping[str, Any]

    def kind(self) -> TaskKind:
        if "text" in self.fields:
            return "text"
        if self._labels():
            return "choice"
        answer = self.fields.get("answer")
        return "number" if isinstance(answer, str) and FINAL_NUMBER.search(answer) else "answer"

    def item(self, index: int, kind: TaskKind) -> Item:
        if kind == "text":
            return Item(index, self.line, text=self._text("text"))
        question = self._text("question")
        if kind == "choice":
            options, right = self._options()
            return Item(index, self.line, question, (options[right],), options, right)
        answers = self._answers(kind)
        return Item(index, self.line, question, answers)

    def _labels(self) -> list[str]:
        return [label for label in self.fields if _LABEL.match(label)]

    def _options(self) -> tuple[tuple[str, ...], int]:
        labels = [label for label in self._labels() if self.fields[label] not in ("", None)]
        if len(labels) < 2:
            raise self._wrong("A, B, ...", f"expected two options or more, found {labels}")
        answer = self.fields.get("answer")
        if answer not in labels:
            raise self._wrong("answer", f"expected one of the labels {labels}, found {answer!r}")
        return tuple(self._text(label) for label in labels), labels.index(answer)

    def _answers(self, kind: TaskKind) -> tuple[str, ...]:
        found = self.fields.get("answer")
        if kind == "answer" and isinstance(found, list):
            texts = [text.strip() for text in found if isinstance(text, str) and text.strip()]
            if not texts or len(texts) != len(found):
                raise self._wrong("answer", f"expected texts, found {found!r}")
            return tuple(texts)
        answer = self._text("answer")
        if kind == "number" and not FINAL_NUMBER.search(answer):
            raise self._wrong(
                "answer",
                f'expected an end like "the answer is 12", found {answer[-40:]!r}; or say NAME:answer=FILE',
            )
        return (answer,)

    def _text(self, field: str) -> str:
        found = self.fields.get(field)
        if not isinstance(found, str) or not found.strip():
            raise self._wrong(field, f"expected a text, found {found!r}")
        return found.strip()

    def _wrong(self, field: str, what: str) -> EvaluationError:
        return EvaluationError(f"{self.path}, line {self.line}: {field}: {what}")
