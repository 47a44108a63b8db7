"""A member behind a link: an actor, or a process of its own.

Whatever is asked is one order and one reply. Releases travel with the next order, and lengths and pages are mirrored
here, so nothing but a forward and the look-up of a prefix waits for the far end. A thread looks after it while it is
idle. If it does not answer within the time-out it counts as lost until it does; if it is gone, it is started again
as a new incarnation, with an empty cache.

Does not know how bytes travel, or where the far end is.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, NoReturn

import torch

from ensemble_core.errors import HostError, MemberError, MemberLostError, WireError
from ensemble_core.members.base import ALL_ABILITIES, Answers, Feed
from ensemble_core.members.remote.codec import decode_answers, encode_order
from ensemble_core.members.remote.host import Facts
from ensemble_core.members.remote.link import Link, LinkError, Method, Tag
from ensemble_core.members.remote.mirror import Mirror
from ensemble_core.members.remote.presence import Presence
from ensemble_core.text.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0  # between looks at an idle far end
_LOADING_SECONDS = 0.2  # between looks at one that loads
_LONGEST_PAUSE = 30.0  # seconds between attempts to start one again


class FarMember:
    """See `ensemble_core.members.base.Member`."""

    def __init__(
        self,
        name: str,
        vocabulary: Vocabulary,
        connect: Callable[[int], Link],
        *,
        kind: str,
        timeout: float,
        start_seconds: float,
    ) -> None:
        """Begin to load; `wait_ready` ends it.

        connect: starts the far end with the number of its incarnation. kind: what it is, for messages. timeout:
        seconds that a pulse may take.
        """
        self.name, self.vocabulary, self.kind = name, vocabulary, kind
        self.device, self.lane, self.abilities = torch.device("cpu"), f"{kind}:{name}", ALL_ABILITIES
        self.incarnation = 0
        self._connect, self._timeout, self._start_seconds = connect, timeout, start_seconds
        self._presence = Presence(name, self._look, min(_LOOK_SECONDS, timeout / 2))
        self._lock = threading.Lock()  # of the link: one request at a time
        self._dead, self._pause, self._heard = False, 0.0, time.monotonic()
        self._link = connect(self.incarnation)
        self._facts: Facts | None = None
        self._mirror = Mirror(1)

    def wait_ready(self) -> None:
        """Until the member is loaded. Raises HostError with what went wrong there."""
        try:
            self._facts = self._loaded(self._link)
        except LinkError as error:
            raise HostError(
                f"member {self.name!r}: its {self.kind} is gone before it was loaded: {error}"
            ) from error
        self._mirror = Mirror(self._facts.page_size)
        self._presence.start()

    @property
    def facts(self) -> Facts:
        """What the far end said when it was loaded."""
        assert self._facts is not None, "not ready"
        return self._facts

    @property
    def lost(self) -> str | None:
        """See `Member.lost`."""
        return self._presence.lost

    @property
    def max_len(self) -> int:
        """Tokens a sequence."""
        return self.facts.max_len

    @property
    def min_prefix(self) -> int:
        """See `Member`."""
        return self.facts.min_prefix

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return self.facts.page_size

    @property
    def num_pages(self) -> int:
        """All pages over there."""
        return self.facts.num_pages

    @property
    def free_pages(self) -> int:
        """Pages that no running sequence holds; shared ones count for each, so there may be more."""
        return max(0, self.num_pages - self._mirror.num_pages)

    def forward(self, feeds: Sequence[Feed]) -> Answers:
        """See `Member.forward`."""
        reply = self._ask("forward", feeds)
        try:
            answers = decode_answers(reply)
        except WireError as error:
            self._lose(str(error))
        if len(answers.spans) != len(feeds):
            self._lose(f"{len(feeds)} feeds got {len(answers.spans)} answers")
        self._mirror.advance(feeds)
        return replace(answers, clock=None)  # what counts here includes the way there and back

    def reuse(self, seq_id: int, token_ids: Sequence[int], salt: str = "") -> int:
        """See `Member.reuse`."""
        found = int(self._ask("reuse", [Feed(seq_id, token_ids, wanted=0, salt=salt)]))
        if found:
            self._mirror.cached[seq_id] = found
        return found

    def release(self, seq_id: int, keep: bool = False) -> None:
        """See `Member.release`; told with the next order."""
        self._mirror.release(seq_id, keep)

    def memory_bytes(self) -> dict[str, int]:
        """See `Member.memory_bytes`; devices are those over there."""
        return {f"{self.kind}:{device}": size for device, size in self.facts.memory.items()}

    def close(self) -> None:
        """End the far end."""
        self._presence.close()
        self._link.close()

    def _ask(self, method: Method, feeds: Sequence[Feed]) -> bytes:
        """Send an order; the content of its reply. Raises MemberError."""
        self._presence.require()
        with self._lock:
            self._presence.require()  # it may have been lost while this waited
            self._check_kept(feeds)
            order = self._mirror.order(self.incarnation, feeds)
            try:
                self._link.send(method, encode_order(order))
                reply = self._link.receive()
            except LinkError as error:
                self._lose(str(error))
            assert reply is not None, "a reply without a time-out came to nothing"
            self._heard = time.monotonic()
        tag, content = reply[0], reply[1:]
        if tag == Tag.LOST:
            self._lose(content.decode())
        if tag != Tag.DONE:
            raise MemberError(self.name, content.decode())
        return content

    def _check_kept(self, feeds: Sequence[Feed]) -> None:
        """Raise MemberLostError where a sequence counts on what an earlier incarnation had cached."""
        for feed in feeds:
            if (feed.keep or 0) > (have := self._mirror.cached.get(feed.seq_id, 0)):
                raise MemberLostError(
                    self.name,
                    f"{feed.keep} tokens of sequence {feed.seq_id} are to be kept in its cache, {have} are there",
                )

    def _lose(self, reason: str) -> NoReturn:
        """The far end, or its cache, is gone. Raises MemberLostError."""
        self._bury(reason)
        raise MemberLostError(self.name, reason)

    def _bury(self, reason: str) -> None:
        self.incarnation += 1
        self._mirror = Mirror(self.facts.page_size)
        self._dead, self._pause = True, 0.0
        self._presence.lose(reason)

    def _look(self) -> None:
        """Is the far end there? Start it again if it is gone; a call in flight says enough of one that is busy."""
        if self._dead:
            self._revive()
        elif time.monotonic() - self._heard >= _LOOK_SECONDS and self._lock.acquire(blocking=False):
            try:
                self._listen()
            except LinkError as error:
                self._bury(str(error))
            finally:
                self._lock.release()

    def _listen(self) -> None:
        """A pulse; while there is no answer to it the member is lost. Raises LinkError."""
        self._link.send("pulse", b"")
        reply = self._link.receive(self._timeout)
        if reply is None:
            self._presence.lose(f"its {self.kind} has not answered for {self._timeout:g} s")
        while reply is None:
            if self._presence.closing.is_set():
                return
            reply = self._link.receive(_LOOK_SECONDS)
        self._tell(json.loads(reply[1:]))
        self._heard = time.monotonic()
        self._presence.find("it answers again")

    def _revive(self) -> None:
        """Start the far end again; where that fails, later once more."""
        self._link.close()
        if self._presence.closing.wait(self._pause):
            return
        try:
            self._link = self._connect(self.incarnation)
            facts = self._loaded(self._link)
            if facts.max_len != self.max_len or facts.num_pages < self.num_pages:
                raise HostError(f"it has room for {facts.num_pages} pages now, {self.num_pages} are planned with")
        except (LinkError, HostError) as error:
            self._pause = min(max(1.0, 2 * self._pause), _LONGEST_PAUSE)
            self._link.close()
            logger.error("member %s: cannot be started (next try in %.0f s): %s", self.name, self._pause, error)
            return
        self._facts = replace(facts, num_pages=self.num_pages)
        self._dead, self._heard = False, time.monotonic()
        self._presence.find(f"started again with an empty cache ({self.kind}, process {facts.pid})")

    def _loaded(self, link: Link) -> Facts:
        """Wait until a far end is loaded, telling what it logs. Raises LinkError, HostError."""
        deadline = time.monotonic() + self._start_seconds
        while time.monotonic() < deadline and not self._presence.closing.is_set():
            link.send("pulse", b"")
            while (reply := link.receive(_LOOK_SECONDS)) is None:
                if time.monotonic() > deadline or self._presence.closing.is_set():
                    break
            if reply is None:
                break
            told = json.loads(reply[1:])
            self._tell(told)
            if told["error"] is not None:
                raise HostError(f"member {self.name!r}: cannot be loaded in its {self.kind}: {told['error']}")
            if told["facts"] is not None:
                return self._checked(Facts(**told["facts"]))
            self._presence.closing.wait(_LOADING_SECONDS)
        raise HostError(
            f"member {self.name!r}: its {self.kind} is not ready after {self._start_seconds:g} s; see the log for "
            "what it waits for, or raise start_seconds of its host"
        )

    def _checked(self, facts: Facts) -> Facts:
        """Raise HostError where the far end is not what is expected here."""
        if facts.version != version("unisono"):
            raise HostError(
                f"member {self.name!r}: Unisono {facts.version} is installed at its {self.kind}, and "
                f"{version('unisono')} here; install the same"
            )
        if facts.fingerprint != self.vocabulary.fingerprint:
            raise HostError(
                f"member {self.name!r}: the tokenizer at its {self.kind} is not the one here; give both the same "
                "files"
            )
        return facts

    def _tell(self, told: dict[str, Any]) -> None:
        """Log here what was logged there."""
        for level, line in told["log"]:
            logger.log(level, "%s, at its %s: %s", self.name, self.kind, line)
