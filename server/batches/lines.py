"""The lines of a batch's input: `{custom_id, method, url, body}`, one request each, read one at a time.

Invariant: every line becomes one request, one fault that names the line, or nothing, because it is blank or answered
already; no line stops the others. Of earlier lines only a digest of each custom_id is kept, about 120 bytes a line.
Knows the format; does not know what the endpoints take.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Collection, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ensemble_core.errors import ConfigError, quoted
from server.edge.bodies import check_values
from server.edge.errors import RefusedBodyError

_MAX_ID = 512  # characters of a custom_id
_SKIPPED = 2**16  # bytes that are read at a time to get past a line that is too long
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class BatchItem:
    """One request. body: JSON."""

    line: int
    custom_id: str
    url: str
    body: bytes


@dataclass(frozen=True, slots=True)
class LineFault:
    """A line that is no request. custom_id: None where it has none that can be used."""

    line: int
    code: str
    message: str
    custom_id: str | None = None
    param: str | None = None


@dataclass(slots=True)
class CustomIds:
    """A set of ids, as digests."""

    _digests: set[bytes] = field(default_factory=set)

    def add(self, custom_id: str) -> bool:
        """Add an id. False: it was there already."""
        digest = _digest(custom_id)
        if digest in self._digests:
            return False
        self._digests.add(digest)
        return True

    def __contains__(self, custom_id: str) -> bool:
        return _digest(custom_id) in self._digests

    def __len__(self) -> int:
        return len(self._digests)


def _digest(custom_id: str) -> bytes:
    return blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def raw_lines(path: Path, max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """(number from 1, line) of each line that is not blank; None in place of one over `max_bytes`.

    Raises ConfigError for a file that cannot be read.
    """
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(max_bytes + 1):
                number += 1
                whole = raw.endswith(b"\n") or len(raw) <= max_bytes
                while not raw.endswith(b"\n") and (more := file.readline(_SKIPPED)):
                    raw = more
                line = raw.removeprefix(_BOM) if number == 1 else raw
                if not whole:
                    yield number, None
                elif line.strip():
                    yield number, line
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error


class Intake:
    """Turns lines into requests, in order."""

    def __init__(self, urls: Collection[str], max_bytes: int, max_values: int, answered: CustomIds) -> None:
        """urls: of the endpoints. max_bytes, max_values: of a line. answered: ids that need no request."""
        self._urls = urls
        self._max_bytes, self._max_values = max_bytes, max_values
        self._answered = answered
        self._seen = CustomIds()
        self.num_answered = 0  # lines that needed no request

    def take(self, number: int, raw: bytes | None) -> BatchItem | LineFault | None:
        """What a line of `raw_lines` asks for; None if it is answered."""
        if raw is None:
            message = f"the line is over {self._max_bytes} bytes (server.max_body_bytes); send less in one request"
            return LineFault(number, "line_too_long", message)
        try:
            check_values(raw, self._max_values)
            value = json.loads(raw)
        except RefusedBodyError as error:
            return LineFault(number, "too_many_values", str(error.detail))
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, a number too long, nested too deeply
            return LineFault(number, "invalid_json", f"the line is not valid JSON: {error}")
        return self._request(number, value)

    def _request(self, number: int, value: Any) -> BatchItem | LineFault | None:
        if not isinstance(value, dict):
            wanted = "an object with custom_id, method, url and body"
            return LineFault(number, "invalid_line", f"a line must be {wanted} (given: {quoted(value)})")
        custom_id = value.get("custom_id")
        if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _MAX_ID:
            message = f"custom_id: must be 1 to {_MAX_ID} characters (given: {quoted(custom_id)})"
            return LineFault(number, "invalid_custom_id", message, param="custom_id")
        if not self._seen.add(custom_id):
            message = f"custom_id: {quoted(custom_id)} is that of an earlier line; each must be its own"
            return LineFault(number, "duplicate_custom_id", message, custom_id, "custom_id")
        if custom_id in self._answered:
            self.num_answered += 1
            return None
        return self._wrong(number, custom_id, value) or _item(number, custom_id, value)

    def _wrong(self, number: int, custom_id: str, value: dict[str, Any]) -> LineFault | None:
        method, url, body = value.get("method"), value.get("url"), value.get("body")
        if method != "POST":
            message = f"method: must be POST (given: {quoted(method)})"
            return LineFault(number, "invalid_method", message, custom_id, "method")
        if not isinstance(url, str) or url not in self._urls:
            message = f"url: must be one of {', '.join(sorted(self._urls))} (given: {quoted(url)})"
            return LineFault(number, "invalid_url", message, custom_id, "url")
        if not isinstance(body, dict):
            message = f"body: must be an object (given: {quoted(body)})"
            return LineFault(number, "invalid_body", message, custom_id, "body")
        if body.get("stream"):
            message = "body.stream: an answer in a file cannot be streamed; leave it out"
            return LineFault(number, "stream_not_allowed", message, custom_id, "body.stream")
        return None


def _item(number: int, custom_id: str, value: dict[str, Any]) -> BatchItem:
    # Not ASCII: escapes would lengthen the body. Half a surrogate pair reaches the endpoint as it was written.
    text = json.dumps(value["body"], ensure_ascii=False, separators=(",", ":"))
    return BatchItem(number, custom_id, value["url"], text.encode("utf-8", "surrogatepass"))


async def taken_lines(path: Path, max_bytes: int, intake: Intake) -> AsyncGenerator[BatchItem | LineFault]:
    """The requests and faults of a file; it is read and parsed in a thread, as far as somebody asks."""
    lines = raw_lines(path, max_bytes)

    def following() -> BatchItem | LineFault | None:
        for number, raw in lines:
            if (found := intake.take(number, raw)) is not None:
                return found
        return None

    while (found := await asyncio.to_thread(following)) is not None:
        yield found
