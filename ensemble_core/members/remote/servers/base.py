"""What is asked of an inference server, and what each dialect of them has to do for it. Does not know HTTP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from ensemble_core.hosts import ServerHost
from ensemble_core.members.base import Abilities
from ensemble_core.members.remote.servers.connection import ServerConnection

Row = dict[int, float]  # id -> log-probability


@dataclass(frozen=True, slots=True)
class Question:
    """A text as ids, and at how many of its last positions the next token is asked about.

    also: for each of these positions ids that must be among the answers; empty: none anywhere. salt: what the server
    caches of the text is only for texts of the same one.
    """

    token_ids: tuple[int, ...]
    wanted: int = 1
    also: tuple[tuple[int, ...], ...] = ()
    salt: str = ""

    @property
    def asked(self) -> tuple[tuple[int, ...], ...]:
        """`also`, of every position."""
        return self.also or ((),) * self.wanted

    def ends(self) -> list[tuple[int, ...]]:
        """The text up to each of these positions."""
        return [self.token_ids[: len(self.token_ids) - left] for left in reversed(range(self.wanted))]


@dataclass(frozen=True, slots=True)
class Served:
    """What a server says of its model. max_len: tokens; None: it does not say."""

    name: str
    max_len: int | None


class Dialect(Protocol):
    """How one kind of server is asked. `vocabulary`: size of the model's."""

    title: ClassVar[str]
    other_temperature: ClassVar[float]  # at which it must tell the same numbers as at 0
    be_plain: ClassVar[str]  # what to do where its numbers are no plain log-probabilities
    raise_limit: ClassVar[str]  # what to do where it tells too few candidates

    def __init__(self, connection: ServerConnection, host: ServerHost, vocabulary: int) -> None: ...

    def abilities(self, num_candidates: int) -> Abilities:
        """What it can do, if it tells so many candidates."""

    def served(self) -> Served:
        """The model that is meant. Raises MemberError."""

    def tokenize(self, text: str) -> list[int]:
        """Its own tokens of a text, no special ones added. Raises MemberError."""

    def ask(self, questions: Sequence[Question], num: int, temperature: float = 0.0) -> list[Row]:
        """For each position of each question the `num` likeliest ids or more, and what `also` names.

        Raises MemberError.
        """


Make = Callable[[ServerConnection, ServerHost, int], Dialect]
