"""How much prefill a step can take before it slows running streams too much. Pure numbers: no torch, no clock.

Learns from finished steps what a decode-only step costs, by batch size, and what a prompt token costs on top in every
member. Grants a step as many prompt tokens as keep it shorter than `max_stretch` decode-only steps, as long as there
are running streams to spare. While more prompts wait than streams are spared the limit is up to three times that,
since then more requests gain than lose. Members that work side by side make a step shorter than the sum of its parts,
so a token costs that much less. Costs are medians or lower thirds of the last few observations, so one slow step
(first use, other load) changes nothing. The cost per token is measured at the number granted, with a forward's fixed
cost spread over the tokens. The next grant starts from there, so grants settle where a step is as long as it may be.

Does not know sequences, members or schedules; the caller of `record` says what was done.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

LEAST = 16  # tokens always granted, so that prompts make progress; steps with fewer are not learnt from
_GRAIN = 8  # grants are multiples of this, since libraries prepare for each new number of tokens
_PROBES = 2  # decode-only steps that must be observed for a batch size
_CROWD = 3.0  # most that waiting prompts can raise the limit, as a factor
_FRESH = 256  # steps after which a batch size is measured again
_MEMORY = 8  # observations kept of each cost

WorkKind = tuple[str, bool]  # (member, whether it answers at every position, for a scored or weighed prompt)
SCORING: WorkKind = ("", True)  # the fusion of scored positions, which no member does


@dataclass(frozen=True, slots=True)
class Work:
    """One kind of work in a step. num_tokens: prompt tokens. decoded: whether it also decoded running sequences."""

    seconds: float
    num_tokens: int
    decoded: bool


@dataclass(slots=True)
class _Plain:
    """Decode-only steps of one batch size. last: number of the latest step."""

    last: int = 0
    steps: deque[float] = field(default_factory=lambda: deque(maxlen=_MEMORY))
    parts: dict[WorkKind, deque[float]] = field(default_factory=dict)


class Pace:
    """See the module's docstring. max_stretch: longest step with prefill over a decode-only step; inf: no limit."""

    def __init__(self, max_stretch: float = math.inf) -> None:
        assert max_stretch > 1.0, "a step cannot be shorter than its decoding"
        self.max_stretch = max_stretch
        self._plain: dict[int, _Plain] = {}
        self._costs: dict[WorkKind, deque[float]] = {}
        self._shares: deque[float] = deque(maxlen=_MEMORY)  # a step with prompts over the sum of its parts
        self._num_steps = 0
        self._latest = 0  # prompt tokens of the last step that also had running sequences

    def grant(
        self, kinds: Collection[WorkKind], num_decoding: int, num_prompts: int = 1, num_spared: int | None = None
    ) -> int | None:
        """Prompt tokens for each of `kinds` in a step with `num_decoding` running sequences; None: no limit.

        Grants 0 while the cost of such a step without prompts is unknown, so that this step measures it.
        num_prompts: sequences in prefill. num_spared: running streams that the limit is for; None: all that run.
        """
        spared = num_decoding if num_spared is None else num_spared
        if not spared or not kinds or math.isinf(self.max_stretch):
            return None
        plain = self._plain.get(num_decoding.bit_length())
        if plain is None or len(plain.steps) < _PROBES or self._num_steps - plain.last > _FRESH:
            return 0
        costs = [self._costs.get(kind) for kind in kinds]
        crowd = min(max(num_prompts / spared, 1.0), _CROWD)
        room = (crowd * self.max_stretch - 1.0) * typical(plain.steps)
        token = self._share * sum(_dear(cost) if cost else math.inf for cost in costs)
        tokens = min(int(room / token), 2 * self._latest)  # at most double, so that each increase is measured
        return max(LEAST, tokens // _GRAIN * _GRAIN)

    def record(self, num_decoding: int, seconds: float, parts: Mapping[WorkKind, Work]) -> None:
        """Learn from a finished step with `num_decoding` running sequences and the given work."""
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
            self._shares.append(min(seconds / sum(work.seconds for work in parts.values()), 1.0))
        for kind, work in parts.items():
            if work.num_tokens >= LEAST:
                self._costs.setdefault(kind, deque(maxlen=_MEMORY)).append(self._cost(kind, work, bucket))

    @property
    def _share(self) -> float:
        """What a step takes of the seconds of its parts: less than 1 where members work side by side."""
        return median(self._shares) if self._shares else 1.0

    def _cost(self, kind: WorkKind, work: Work, bucket: int) -> float:
        """Seconds per prompt token, beyond the decoding in the same step."""
        member, _ = kind
        plain = self._plain.get(bucket)
        alone = plain.parts.get((member, False)) if plain is not None and work.decoded else None
        spent = work.seconds - typical(alone) if alone else work.seconds
        return max(spent, 0.05 * work.seconds, 1e-9) / work.num_tokens


def _dear(costs: Sequence[float]) -> float:
    """The larger of two medians, of all and of the latest three: a rising cost counts sooner than a falling one."""
    return max(median(costs), median(list(costs)[-3:]))


def typical(seconds: Collection[float]) -> float:
    """The lower third, since rare events make a step slower, never faster."""
    return sorted(seconds)[(len(seconds) - 1) // 3]
