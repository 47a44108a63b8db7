"""The lines of a batch's output: `{id, custom_id, response, error}`, one for each request, as the answers come.

Invariants: a line is written whole, by one write, and is pure ASCII, so nothing in a text ends it; what a killed
process left behind is at most one last line without its end. An answer is a line with a status of 200 to 299. Nothing
but answers outlives `kept_answers`, so everything else is done again. Knows the format; does not know requests.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ensemble_core.errors import ConfigError
from server.batches.lines import CustomIds, LineFault


@dataclass(frozen=True, slots=True)
class BatchReply:
    """What an endpoint answered. body: its JSON."""

    status: int
    request_id: str
    body: Any

    @property
    def is_answer(self) -> bool:
        """It is no refusal and no failure."""
        return 200 <= self.status < 300


@dataclass(frozen=True, slots=True)
class LineResult:
    """What became of one line."""

    custom_id: str | None
    outcome: BatchReply | LineFault

    @property
    def is_answer(self) -> bool:
        """It is no refusal and no failure."""
        return isinstance(self.outcome, BatchReply) and self.outcome.is_answer

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens of prompts and of completions that the answer's usage reports."""
        body = self.outcome.body if isinstance(self.outcome, BatchReply) else None
        usage = body.get("usage") if isinstance(body, dict) else None
        if not isinstance(usage, dict):
            return 0, 0
        return _count(usage, "prompt_tokens", "input_tokens"), _count(usage, "completion_tokens", "output_tokens")

    def line(self) -> bytes:
        """The line, with its end."""
        response = error = None
        if isinstance(self.outcome, BatchReply):
            reply = self.outcome
            response = {"status_code": reply.status, "request_id": reply.request_id, "body": reply.body}
        else:
            fault = self.outcome
            message = f"line {fault.line}: {fault.message}"
            error = {"code": fault.code, "message": message, "param": fault.param, "line": fault.line}
        name = f"batch_req_{uuid.uuid4().hex}"
        told = {"id": name, "custom_id": self.custom_id, "response": response, "error": error}
        return json.dumps(told, separators=(",", ":")).encode() + b"\n"


def _count(usage: dict[str, Any], *names: str) -> int:
    found = next((usage[name] for name in names if name in usage), 0)
    return found if isinstance(found, int) else 0


class ResultFile:
    """Appends results to a file, and those that failed to another, if there is one."""

    def __init__(self, output: Path, errors: Path | None) -> None:
        """Both files are made if they are missing. Raises ConfigError if they cannot be written."""
        self._output = _appending(output)
        try:
            self._errors = None if errors is None else _appending(errors)
        except ConfigError:
            self._output.close()
            raise

    def write(self, result: LineResult) -> None:
        """Write a result and hand it to the system. Raises OSError."""
        file = self._output if result.is_answer or self._errors is None else self._errors
        file.write(result.line())
        file.flush()

    def close(self) -> None:
        """Close the files once they are on the disk. Raises OSError."""
        for file in (self._output, *filter(None, [self._errors])):
            with file:
                os.fsync(file.fileno())


def _appending(path: Path) -> BinaryIO:
    try:
        return path.open("ab")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error


def kept_answers(path: Path) -> CustomIds:
    """The ids that a file of results answers. The file is written anew with these lines alone.

    The old file stays whole until the new one is. Raises ConfigError for a file that cannot be read or written, and,
    before anything is changed, for one that holds something else than results.
    """
    target = path.resolve()
    new = target.with_name(target.name + ".new")
    answered = CustomIds()
    try:
        with target.open("rb") as lines, new.open("wb") as file:
            for custom_id, line in _answers(path, lines):
                if answered.add(custom_id):
                    file.write(line)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(target, new)
        os.replace(new, target)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read and written ({error.strerror})") from error
    finally:
        new.unlink(missing_ok=True)
    return answered


def result_ids(*paths: Path) -> CustomIds:
    """The ids of all whole lines of some files of results."""
    found = CustomIds()
    for path in paths:
        with path.open("rb") as lines:
            for line in lines:
                result = _parsed_result(line)
                if result is not None and isinstance(result["custom_id"], str):
                    found.add(result["custom_id"])
    return found


def _answers(path: Path, lines: BinaryIO) -> Iterator[tuple[str, bytes]]:
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            return  # cut off
        result = _parsed_result(line)
        if result is None:
            raise ConfigError(f"{path}: line {number} is not a batch's result; give --output another file")
        response, custom_id = result["response"], result["custom_id"]
        if isinstance(response, dict) and isinstance(custom_id, str):
            status = response.get("status_code")
            if isinstance(status, int) and 200 <= status < 300:
                yield custom_id, line


def _parsed_result(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and {"custom_id", "response"} <= value.keys() else None
