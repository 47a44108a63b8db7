"""What is known of one request and its answer. Its access line and its span are made from this.

Filled as the request is served: by the middleware, and by the route once the engine has accepted the request. Holds
no prompt, no text, and no name that the client chose. Does not know logs and traces.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

from starlette.types import Message, Scope

from ensemble_core.decoding.sampling_params import SamplingParams

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"})
CURRENT: ContextVar[Exchange | None] = ContextVar("exchange", default=None)


class Counts(Protocol):
    """Tokens so far, by prompt and by choice; reasons: why each choice ended."""

    prompts: dict[int, int]
    cached: dict[int, int]
    completions: dict[int, int]
    reasons: dict[int, str]
    first: float | None  # time.perf_counter() of the first output


@dataclass(frozen=True, slots=True)
class Generation:
    """A request that the engine has accepted. id: of the completion."""

    id: str
    model: str
    num_choices: int
    stream: bool
    params: SamplingParams
    counts: Counts


@dataclass(slots=True)
class Exchange:
    """One request and its answer. Times are of time.perf_counter().

    disconnected: the client left before the end of its answer. error: the kind of failure, if there was one; a
    stream's may come after its status.
    """

    scope: Scope
    started: float = field(default_factory=time.perf_counter)
    started_ns: int = field(default_factory=time.time_ns)
    ended: float | None = None
    first_byte: float | None = None
    num_bytes: int = 0
    status: int | None = None
    complete: bool = False
    disconnected: bool = False
    error: str | None = None
    generation: Generation | None = None

    def sent(self, message: Message) -> None:
        """Note a message of the answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            body = message.get("body", b"")
            if body and self.first_byte is None:
                self.first_byte = time.perf_counter()
            self.num_bytes += len(body)
            self.complete = not message.get("more_body", False)

    def received(self, message: Message) -> None:
        """Note a message of the request."""
        if message["type"] == "http.disconnect" and not self.complete:
            self.disconnected = True

    def end(self) -> None:
        """The answer is over."""
        self.ended = time.perf_counter()

    @property
    def method(self) -> str:
        """The method, or _OTHER for one that HTTP does not define."""
        method = str(self.scope["method"])
        return method if method in _METHODS else "_OTHER"

    @property
    def route(self) -> str | None:
        """The template of the route's path; None if no route was reached."""
        return getattr(self.scope.get("route"), "path", None)

    @property
    def headers(self) -> Mapping[str, str]:
        """The request's headers, names in lower case; of several with one name the last."""
        return {name.decode("latin-1"): value.decode("latin-1") for name, value in self.scope["headers"]}

    def seconds(self, until: float | None) -> float | None:
        """Seconds from the request's arrival."""
        return None if until is None else until - self.started


def accepted(generation: Generation) -> None:
    """Note that the engine has accepted the request that is being served."""
    if exchange := CURRENT.get():
        exchange.generation = generation


def failed(error: BaseException) -> None:
    """Note that the answer to the request that is being served has failed."""
    if exchange := CURRENT.get():
        exchange.error = type(error).__name__
