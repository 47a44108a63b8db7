"""The far end: one member, loaded and driven where it lives.

Weights load in a thread of their own, so that a pulse is answered meanwhile: it tells how far loading is and what was
logged. An order is carried out only if it is meant for this incarnation and every sequence is exactly as long here as
the sender believes; so an answer never comes from a cache that is not what it should be.

Does not know how messages arrive (`process`, `ray_actor`).
"""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ensemble_core.errors import MemberError, WireError
from ensemble_core.member_config import MemberConfig
from ensemble_core.members.base import Member
from ensemble_core.members.loading.checkpoints import load_vocabulary, resolve_folder
from ensemble_core.members.loading.memory import plan_caches
from ensemble_core.members.loading.models import load_member
from ensemble_core.members.remote.codec import Order, decode_order, encode_answers
from ensemble_core.members.remote.link import Method, Tag

_LINES = 1000  # of the log, most that wait to be told


@dataclass(frozen=True, slots=True)
class Spec:
    """What a far end is to load.

    max_running: sequences that may decode at once. num_threads: of its forwards on a CPU. incarnation: of this start.
    """

    name: str
    config: dict[str, Any]  # of a `MemberConfig`, without its host
    max_running: int
    deterministic: bool
    num_threads: int
    incarnation: int

    def encode(self) -> bytes:
        """As JSON."""
        return json.dumps(asdict(self)).encode()


@dataclass(frozen=True, slots=True)
class Facts:
    """What the far end says of its member once it is loaded."""

    version: str  # of Unisono there
    fingerprint: str  # of the vocabulary
    max_len: int
    min_prefix: int
    page_size: int
    num_pages: int
    memory: dict[str, int]  # device -> bytes
    machine: str
    pid: int
    on_cpu: bool
    num_threads: int


class Host:
    """Loads what `spec` says, and answers."""

    def __init__(self, spec: bytes, load: Callable[[Spec], Member] | None = None) -> None:
        """load: makes the member; None: from its checkpoint."""
        self._spec = Spec(**json.loads(spec))
        self._load_member = load or load_from_checkpoint
        self._log = _Log()
        self._member: Member | None = None
        self._error: str | None = None
        self._cached: dict[int, int] = {}  # seq_id -> tokens
        torch.set_num_threads(self._spec.num_threads)
        self._thread = threading.Thread(target=self._load, name="loading", daemon=True)
        self._thread.start()

    def answer(self, method: Method, message: bytes) -> bytes:
        """The reply to a request, tagged; never raises."""
        try:
            if method == "pulse":
                return _reply(Tag.DONE, self._pulse())
            order = decode_order(message)
            if problem := self._mismatch(order):
                return _reply(Tag.LOST, problem.encode())
            assert self._member is not None
            for seq_id, keep in order.releases:
                self._cached.pop(seq_id, None)
                self._member.release(seq_id, keep)
            done = self._forward if method == "forward" else self._reuse
            return _reply(Tag.DONE, done(self._member, order))
        except WireError as error:
            return _reply(Tag.GARBLED, str(error).encode())
        except MemberError as error:
            return _reply(Tag.FAILED, str(error).removeprefix(f"member {error.member!r}: ").encode())
        except Exception as error:
            logging.getLogger(__name__).exception("%s failed", method)
            return _reply(Tag.FAILED, f"{type(error).__name__}: {error}".encode())

    def _forward(self, member: Member, order: Order) -> bytes:
        answers = member.forward(order.feeds)
        for feed, have in zip(order.feeds, order.cached, strict=True):
            self._cached[feed.seq_id] = feed.length_after(have)
        return encode_answers(answers)

    def _reuse(self, member: Member, order: Order) -> bytes:
        """The order's only feed holds the prompt."""
        (feed,) = order.feeds
        if found := member.reuse(feed.seq_id, feed.token_ids, feed.salt):
            self._cached[feed.seq_id] = found
        return str(found).encode()

    def _mismatch(self, order: Order) -> str | None:
        """Why this order is not for the cache as it is here."""
        if self._member is None:
            return "the member is not loaded"
        if order.incarnation != self._spec.incarnation:
            return f"an order for incarnation {order.incarnation} reached number {self._spec.incarnation}"
        released = {seq_id for seq_id, _ in order.releases}
        for feed, expected in zip(order.feeds, order.cached, strict=True):
            have = 0 if feed.seq_id in released else self._cached.get(feed.seq_id, 0)
            if have != expected:
                return f"{expected} tokens of sequence {feed.seq_id} are expected in its cache, {have} are there"
        return None

    def _pulse(self) -> bytes:
        state = "failed" if self._error else "loading" if self._member is None else "ready"
        facts = None if self._member is None else asdict(self._facts(self._member))
        return json.dumps({"state": state, "error": self._error, "facts": facts, "log": self._log.take()}).encode()

    def _facts(self, member: Member) -> Facts:
        return Facts(
            version=version("unisono"),
            fingerprint=member.vocabulary.fingerprint,
            max_len=member.max_len,
            min_prefix=member.min_prefix,
            page_size=member.page_size,
            num_pages=member.num_pages,
            memory=dict(member.memory_bytes()),
            machine=machine(),
            pid=os.getpid(),
            on_cpu=member.device.type == "cpu",
            num_threads=self._spec.num_threads,
        )

    def _load(self) -> None:
        torch.set_num_threads(self._spec.num_threads)
        root = logging.getLogger("ensemble_core")
        root.addHandler(self._log)
        root.setLevel(logging.INFO)
        try:
            self._member = self._load_member(self._spec)
        except BaseException as error:  # whatever a library raises is told to the one who waits
            self._error = f"{type(error).__name__}: {error}"


def load_from_checkpoint(spec: Spec) -> Member:
    """A member on this machine, its memory planned here. Raises UnisonoError."""
    config = MemberConfig.model_validate(spec.config)
    folder, vocabulary = resolve_folder(config), load_vocabulary(spec.name, config)
    planned = plan_caches({spec.name: config}, {spec.name: folder}, spec.max_running)[spec.name]
    return load_member(
        spec.name, planned, folder, vocabulary, max_batch=spec.max_running, deterministic=spec.deterministic
    )


def machine() -> str:
    """A name of this machine that no other has: of its last start, where the system tells."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return platform.node()


def _reply(tag: Tag, content: bytes) -> bytes:
    return bytes([tag]) + content


class _Log(logging.Handler):
    """Lines that the next pulse takes along."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._lines: deque[tuple[int, str]] = deque(maxlen=_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self._lines.append((record.levelno, self.format(record)))

    def take(self) -> list[tuple[int, str]]:
        """All lines since the last time."""
        return [self._lines.popleft() for _ in range(len(self._lines))]
