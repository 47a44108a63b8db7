"""How much prefill a step can take before running streams feel it. Pure numbers: no torch, no clock.

Learns from finished steps what a step costs that only decodes, by size of its batch, and what a prompt's token
costs beside it in every member; grants a step as many prompt tokens as keep it under `max_stretch` decode-only
steps. Where more prompts wait than streams run that is up to three times as long, since then more gain than lose.
Costs are middles of the last few observations, so one slow step (first use, other load) moves nothing. The cost of a
token is taken at the number of tokens that is granted: what a forward costs beyond that is spread over them, and the
next grant starts from there; the walk settles where the step is as long as it may be.

Does not know sequences, members or schedules; whoever records says what was done.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

LEAST = 16  # tokens that a step takes at any price, so that prompts go on; fewer teach nothing
_GRAIN = 8  # grants are multiples, since libraries prepare each new number of tokens anew
_PROBES = 2  # decode-only steps that must have been seen of a batch size
_CROWD = 3.0  # how far a crowd of prompts stretches the limit
_FRESH = 256  # steps after which a batch size is looked at again
_MEMORY = 8  # observations kept of each cost

Kind = tuple[str, bool]  # (member, whether every position is answered: a prompt is scored or weighed)
SCORING: Kind = ("", True)  # the fusion of scored positions, on no member


@dataclass(frozen=True, slots=True)
class Work:
    """What one kind of work took in a step. num_tokens: of prompts; decoded: beside running sequences."""

    seconds: float
    num_tokens: int
    decoded: bool


@dataclass(slots=True)
class _Plain:
    """Decode-only steps of one batch size. last: the number of the latest."""

    last: int = 0
    steps: deque[float] = field(default_factory=lambda: deque(maxlen=_MEMORY))
    parts: dict[Kind, deque[float]] = field(default_factory=dict)


class Pace:
    """See the module. max_stretch: a step beside running streams over a decode-only step; inf: no limit."""

    def __init__(self, max_stretch: float = math.inf) -> None:
        assert max_stretch > 1.0, "a step cannot be shorter than its decoding"
        self._max_stretch = max_stretch
        self._plain: dict[int, _Plain] = {}
        self._costs: dict[Kind, deque[float]] = {}
        self._num_steps = 0
        self._latest = 0  # tokens that the last step beside running sequences took

    def grant(self, kinds: Collection[Kind], num_decoding: int, num_prompts: int = 1) -> int | None:
        """Prompt tokens for each of `kinds` in a step with `num_decoding` running sequences; None: no limit.

        num_prompts: sequences that are in prefill. 0 where nobody knows what such a step costs without a prompt: this
        one will tell.
        """
        if not num_decoding or not kinds or math.isinf(self._max_stretch):
            return None
        plain = self._plain.get(num_decoding.bit_length())
        if plain is None or len(plain.steps) < _PROBES or self._num_steps - plain.last > _FRESH:
            return 0
        costs = [self._costs.get(kind) for kind in kinds]
        crowd = min(max(num_prompts / num_decoding, 1.0), _CROWD)
        room = (crowd * self._max_stretch - 1.0) * _typical(plain.steps)
        token = sum(_dear(cost) if cost else math.inf for cost in costs)
        tokens = min(int(room / token), 2 * self._latest)  # the walk goes up in steps that can be judged
        return max(LEAST, tokens // _GRAIN * _GRAIN)

    def record(self, num_decoding: int, seconds: float, parts: Mapping[Kind, Work]) -> None:
        """Take in a finished step of `num_decoding` running sequences, and what was done in it."""
        self._num_steps += 1
        bucket = num_decoding.bit_length()
        if num_decoding and not any(work.num_tokens for work in parts.values()):
            plain = self._plain.setdefault(bucket, _Plain())
            plain.last = self._num_steps
            plain.steps.append(seconds)
            for kind, work in parts.items():
                plain.parts.setdefault(kind, deque(maxlen=_MEMORY)).append(work.seconds)
            return
        if num_decoding:
            self._latest = max(work.num_tokens for work in parts.values())
        for kind, work in parts.items():
            if work.num_tokens >= LEAST:
                self._costs.setdefault(kind, deque(maxlen=_MEMORY)).append(self._cost(kind, work, bucket))

    def _cost(self, kind: Kind, work: Work, bucket: int) -> float:
        """Seconds a token on top of the decoding beside it."""
        member, _ = kind
        plain = self._plain.get(bucket)
        alone = plain.parts.get((member, False)) if plain is not None and work.decoded else None
        spent = work.seconds - _typical(alone) if alone else work.seconds
        return max(spent, 0.05 * work.seconds, 1e-9) / work.num_tokens


def _dear(costs: Sequence[float]) -> float:
    """The median, of all or of the latest three: what grows dearer is believed sooner than what grows cheaper."""
    return max(median(costs), median(list(costs)[-3:]))


def _typical(seconds: Collection[float]) -> float:
    """The lower third: what happens now and then makes a step slower, not faster."""
    return sorted(seconds)[(len(seconds) - 1) // 3]
