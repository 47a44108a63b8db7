"""Compressed bodies: gzip and deflate, undone piece by piece and never further than the body limit.

A body that would become larger is refused once that shows: at most one byte more than the limit is ever inflated, so
a small body that stands for a huge one costs no more than a large body. Knows no routes and no limits but its own.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

from server.edge.errors import RefusedBodyError

SUPPORTED = "gzip, deflate"
_GZIP, _ZLIB, _RAW = 31, zlib.MAX_WBITS, -zlib.MAX_WBITS
_WINDOW = 8  # compression method of a zlib stream's first byte


class Inflater:
    """Undoes one body's `Content-Encoding`. encoding: in lower case, gzip or deflate."""

    def __init__(self, encoding: str, max_bytes: int, check_size: Callable[[int], None]) -> None:
        """check_size: raises for a size over `max_bytes`."""
        self._encoding, self._max_bytes, self._check_size = encoding, max_bytes, check_size
        self._stream = zlib.decompressobj(_GZIP) if encoding == "gzip" else None
        self._begun = b""  # of a deflate stream: too little to know its kind
        self._num_bytes = 0

    def feed(self, data: bytes, *, last: bool) -> bytes:
        """What some more bytes stand for.

        Raises RefusedBodyError for bytes that are not so encoded, and what `check_size` raises.
        """
        try:
            found = self._inflate(data, last)
        except zlib.error as error:
            raise self._refusal(str(error)) from error
        self._num_bytes += len(found)
        self._check_size(self._num_bytes)
        if last and (self._stream is None or not self._stream.eof):
            raise self._refusal("it ends too early")
        return found

    def _inflate(self, data: bytes, last: bool) -> bytes:
        if self._stream is None:
            self._begun += data
            if len(self._begun) < 2 and not last:
                return b""
            data, self._begun = self._begun, b""
            self._stream = zlib.decompressobj(_ZLIB if _is_zlib(data) else _RAW)
        if self._stream.eof and data:
            raise self._refusal("something follows its end")
        found = self._stream.decompress(data, self._max_bytes - self._num_bytes + 1)
        if self._stream.unused_data:
            raise self._refusal("something follows its end")
        return found

    def _refusal(self, why: str) -> RefusedBodyError:
        return RefusedBodyError(400, f"the body is not the {self._encoding} that Content-Encoding says: {why}")


def _is_zlib(data: bytes) -> bool:
    """Whether a deflate body has the header that HTTP asks for; some clients leave it out."""
    return len(data) > 1 and data[0] & 15 == _WINDOW and int.from_bytes(data[:2], "big") % 31 == 0


def encoding_of(header: str) -> str | None:
    """The encoding of a body by its `Content-Encoding`; None for a plain one. Raises RefusedBodyError for others."""
    name = header.strip().lower().removeprefix("x-")
    if name in ("", "identity"):
        return None
    if name not in ("gzip", "deflate"):
        raise RefusedBodyError(
            415,
            f"Content-Encoding must be one of {SUPPORTED}; send the body so, or plain and without this header",
            headers={"Accept-Encoding": SUPPORTED},
        )
    return name
