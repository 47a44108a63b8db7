"""A member behind an inference server. Nothing of a sequence lives there: each step sends its ids so far.

A rollback is a shorter list. Prompts are not read in chunks: their ids are sent with the first question. Invariant:
ids are taken over only once the server has answered, so a forward advances every sequence or none.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from ensemble_core.errors import HostError, MemberError, MemberLostError
from ensemble_core.hosts import ServerHost
from ensemble_core.members.answering import lay_out
from ensemble_core.members.base import Answers, Candidates, Feed
from ensemble_core.members.remote.presence import Presence
from ensemble_core.members.remote.servers.base import Dialect, Make, Question
from ensemble_core.members.remote.servers.connection import ServerConnection
from ensemble_core.members.remote.servers.llamacpp import LlamaDialect
from ensemble_core.members.remote.servers.proof import (
    ask_again,
    explained,
    is_same,
    prove_numbers,
    prove_tokens,
    proven_length,
)
from ensemble_core.members.remote.servers.rows import candidates
from ensemble_core.members.remote.servers.sglang import SglangDialect
from ensemble_core.members.remote.servers.vllm import VllmDialect
from ensemble_core.text.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

DIALECTS: dict[str, Make] = {"vllm": VllmDialect, "llamacpp": LlamaDialect, "sglang": SglangDialect}
_LOOK_SECONDS = 1.0  # between looks at a server that is lost


class ServerMember:
    """See `ensemble_core.members.base.Member`."""

    incarnation = 0  # nothing is cached, so nothing can be lost

    def __init__(
        self,
        name: str,
        vocabulary: Vocabulary,
        host: ServerHost,
        *,
        max_len: int,
        max_running: int,
        num_candidates: int,
    ) -> None:
        """max_running: sequences at once. num_candidates: K that it must be able to tell. Raises HostError."""
        self.name, self.vocabulary, self.max_len, self.min_prefix = name, vocabulary, max_len, max_len
        self.device, self.lane = torch.device("cpu"), f"{host.kind}:{name}"
        self.page_size, self.num_pages = max_len, max_running
        self._host, self._num = host, min(num_candidates, len(vocabulary))
        self._connection = ServerConnection(name, host)
        self._dialect: Dialect = DIALECTS[host.kind](self._connection, host, len(vocabulary))
        self.abilities = self._dialect.abilities(self._num)
        self._texts: dict[int, tuple[int, ...]] = {}
        self._presence = Presence(name, self._look, _LOOK_SECONDS)
        self._probe: dict[int, float] = {}

    def wait_ready(self) -> None:
        """Prove that the server is the right one. Raises HostError."""
        try:
            self.max_len = proven_length(self.name, self._dialect, self.max_len)
            prove_tokens(self.name, self._dialect, self.vocabulary)
            self._probe = prove_numbers(self.name, self._dialect, self.vocabulary, self._num)
        except MemberError as error:
            raise explained(self.name, error) from error
        except (KeyError, IndexError, TypeError) as error:
            raise HostError(
                f"member {self.name!r}: {self._host.url} does not answer as {self._dialect.title} does "
                f"({type(error).__name__}: {error}); is host.server.kind right?"
            ) from error
        logger.info("%s: %s at %s has the same tokens and numbers", self.name, self._dialect.title, self._host.url)
        self._presence.start()

    @property
    def lost(self) -> str | None:
        """See `Member.lost`."""
        return self._presence.lost

    @property
    def free_pages(self) -> int:
        """Sequences that may still come."""
        return self.num_pages - len(self._texts)

    def forward(self, feeds: Sequence[Feed]) -> Answers:
        """See `Member.forward`."""
        self._presence.require()
        texts = [self._text(feed) for feed in feeds]
        layout = lay_out(feeds)
        blocks = [self._ask([feeds[i] for i in group], [texts[i] for i in group]) for group in layout.groups]
        self._texts |= {feed.seq_id: text for feed, text in zip(feeds, texts, strict=True)}
        return Answers(tuple(blocks), layout.spans(feeds))

    def reuse(self, seq_id: int, token_ids: Sequence[int], salt: str = "") -> int:
        """See `Member.reuse`; what the server has cached is its own affair."""
        return 0

    def release(self, seq_id: int, keep: bool = False) -> None:
        """See `Member.release`."""
        self._texts.pop(seq_id, None)

    def memory_bytes(self) -> dict[str, int]:
        """See `Member.memory_bytes`; none here."""
        return {}

    def close(self) -> None:
        """Close the connection."""
        self._presence.close()
        self._connection.close()

    def _text(self, feed: Feed) -> tuple[int, ...]:
        """A sequence's ids with those of a feed."""
        have = self._texts.get(feed.seq_id, ())
        return (have if feed.keep is None else have[: feed.keep]) + tuple(feed.token_ids)

    def _ask(self, feeds: Sequence[Feed], texts: Sequence[tuple[int, ...]]) -> Candidates:
        """Rows of one width."""
        width = max([feeds[0].top_k, *(len(set(ids)) for feed in feeds for ids in feed.also)])
        questions = [
            Question(text, feed.wanted, feed.also if any(feed.also) else (), feed.salt)
            for feed, text in zip(feeds, texts, strict=True)
        ]
        also = [ids for question in questions for ids in question.asked]
        try:
            rows = self._dialect.ask(questions, min(feeds[0].top_k, len(self.vocabulary)))
            return candidates(rows, width, also, len(self.vocabulary))
        except MemberLostError as error:
            self._presence.lose(str(error).removeprefix(f"member {self.name!r}: "))
            raise
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise MemberError(
                self.name, f"the answer of {self._dialect.title} cannot be read: {type(error).__name__}: {error}"
            ) from error

    def _look(self) -> None:
        """Is a server that was lost back, and still the same?"""
        if self._presence.lost is None:
            return
        try:
            self._dialect.served()
            answer = ask_again(self._dialect, self.vocabulary, self._num)
        except (MemberError, HostError, KeyError, IndexError, TypeError) as error:
            logger.debug("member %s: still lost: %s", self.name, error)
            return
        if is_same(self._probe, answer):
            self._presence.find("its server answers, with the same numbers")
        else:
            reason = f"another model answers at {self._host.url}; restart Unisono if that is meant"
            if self._presence.lost != reason:
                logger.error("member %s: %s", self.name, reason)
            self._presence.lost = reason
