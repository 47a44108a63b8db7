"""One TCP connection, with bounds on time: for headers, for a reader that stalls, for what is left of a body.

Adds to uvicorn's protocol what it leaves to a proxy. A connection that says nothing is closed after `header_seconds`,
also between two requests once the first byte of the next has come. Above `connections`, the oldest silent one makes
way. A client that takes nothing for `write_seconds` is cut off. After an answer, what is left of an unread body is
thrown away for a moment, so that the client can read the answer, and the connection is closed. A client that ends its
sending side still gets its answer, if that begins soon; later it counts as gone. Does not know routes.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from ensemble_core.limits import LimitsConfig
from server.edge.live import LiveConfig

_LINGER_SECONDS = 1.0
_HALF_CLOSED_SECONDS = 0.5


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with time-outs."""

    def __init__(self, live: LiveConfig, **settings: Any) -> None:
        super().__init__(**settings)
        self._live = live
        self._opened = self.loop.time()
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._discards = False

    @property
    def _limits(self) -> LimitsConfig:
        return self._live.config.limits

    @property
    def is_silent(self) -> bool:
        """No request is being received or answered."""
        return self.cycle is None or self.conn.their_state is h11.IDLE

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock for the headers. Above the limit the oldest silent connection is closed, or this one."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections:
            others = [c for c in self.connections if isinstance(c, Connection) and c is not self and c.is_silent]
            if not others:
                self._answer(503, f"more than {self._limits.connections} connections are open; try again later")
                return
            min(others, key=lambda each: each._opened).transport.abort()
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        """Bytes of a request."""
        if self._discards:
            return
        if self.conn.their_state is h11.IDLE:
            self._expect_headers()
        super().data_received(data)

    def handle_events(self) -> None:
        """What uvicorn does with a request; once its headers are whole, their clock stops."""
        super().handle_events()
        if self.conn.their_state is not h11.IDLE:
            self._stop_header_timer()

    def eof_received(self) -> bool:  # type: ignore[override]
        """After a whole request, keep the other direction open for the answer, for a moment."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if self.scheme == "https" or not answering or self.conn.their_state is h11.SEND_BODY:
            return False
        self.loop.call_later(_HALF_CLOSED_SECONDS, self._give_up)
        return True

    def pause_writing(self) -> None:
        """The client reads slower than we write."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self._limits.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        self._stop_write_timer()

    def on_response_complete(self) -> None:
        """Go on with the next request, unless this one's body is not read to its end."""
        if self.transport.is_closing():
            self.loop.call_later(self._limits.write_seconds, self.transport.abort)  # the last bytes may be stuck
        elif self.conn.their_state is h11.SEND_BODY:
            self._linger()
        else:
            super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._stop_header_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Bytes that are not HTTP."""
        self._answer(400, msg)

    def _expect_headers(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(self._limits.header_seconds, self._too_slow)

    def _too_slow(self) -> None:
        if not self.transport.is_closing():
            seconds = self._limits.header_seconds
            self._answer(408, f"the headers took longer than {seconds:g} s (server.limits.header_seconds)")

    def _answer(self, status: int, message: str) -> None:
        """Refuse what is no request yet, in OpenAI's shape, and close."""
        kind = "invalid_request_error" if status < 500 else "service_unavailable"
        body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": None}}).encode()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        if status == 503:
            headers.append(("retry-after", "1"))
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            for event in (
                h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status]),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event))
        self.transport.close()

    def _linger(self) -> None:
        """Send the end of our side, and throw away what still comes."""
        self._discards = True
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.transport.resume_reading()
        self.loop.call_later(_LINGER_SECONDS, self.transport.close)

    def _give_up(self) -> None:
        if not self.cycle.response_started:
            self.transport.close()

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
