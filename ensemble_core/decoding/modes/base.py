"""The contract of a mode: how the next step of a sequence is taken. And the registry of modes.

A mode plans what each member is fed and at how many positions it must answer, and decides what the answers mean for
the text. The engine does everything between: it feeds, collects, appends, aligns and reports. A mode keeps no state
of its own: what a sequence has decided and drafted stands in the sequence.

Main's tokens are final or drafted. Drafted ones stand at the end of main's track; no client has seen them, and a
later decision keeps or drops them. Does not know how members, caches or schedules work.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from ensemble_core.decoding.recipe import ModeChoice, Recipe
from ensemble_core.decoding.sequence import Choice
from ensemble_core.decoding.sequence import Sequence as Request
from ensemble_core.registry import Registry
from ensemble_core.stats import FusionStats, Reason

if TYPE_CHECKING:
    from torch import Tensor

    from ensemble_core.members.base import Answers


@dataclass(frozen=True, slots=True)
class Ask:
    """One member's part of a step: it is fed its next `count` tokens and answers at the last `wanted` of them."""

    count: int
    wanted: int = 1


@dataclass(frozen=True, slots=True)
class Turn:
    """A sequence whose members have answered.

    feeds: member -> number of its feed in that member's answers, for the members that were asked and answered.
    mask: main's ids that the sequence's constraint allows next, (V,) bool; None: all. left_out: members that were
    asked and do not count in this step, and why.
    """

    sequence: Request
    feeds: Mapping[str, int]
    mask: Tensor | None = None
    left_out: Mapping[str, Reason] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """How this step is fused."""
        return self.sequence.recipe.without(self.left_out)

    def without(self, members: Collection[str], reason: Reason) -> Turn:
        """The turn without some assistants, and without those that its fusion cannot use alone."""
        recipe = self.recipe.without(members)
        left_out = dict(self.left_out) | dict.fromkeys(members, reason)
        idle = (m for m in self.sequence.recipe.members if m not in recipe.members and m not in left_out)
        left_out |= dict.fromkeys(idle, "idle")
        feeds = {member: feed for member, feed in self.feeds.items() if member not in left_out}
        return replace(self, feeds=feeds, left_out=left_out)


@dataclass(frozen=True, slots=True)
class Decision:
    """What a step makes of a sequence: after it, main's track ends with `tokens`, then `draft`.

    tokens: become final, in order; none, one or several. They may confirm what was drafted: what they have in common
    with the draft stays cached. draft: tokens behind them that are still to be decided; of the old draft what stands
    in neither is taken back. unsound: members whose numbers were not finite. error: the sequence ends with it.
    """

    sequence: Request
    tokens: tuple[Choice, ...] = ()
    draft: tuple[int, ...] = ()
    unsound: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The decisions of a step, and what they cost."""

    decisions: list[Decision]
    fusions: list[FusionStats] = field(default_factory=list)
    sampling_seconds: float = 0.0


def joined(parts: Iterable[Outcome]) -> Outcome:
    """Several outcomes of one step as one."""
    parts = list(parts)
    return Outcome(
        [decision for part in parts for decision in part.decisions],
        [fusion for part in parts for fusion in part.fusions],
        sum(part.sampling_seconds for part in parts),
    )


class Mode(Protocol):
    """A way to take a sequence's next step. Hashable; modes of the same kind and options are equal."""

    @property
    def name(self) -> str:
        """As it is registered."""

    def plan(self, sequence: Request) -> Mapping[str, Ask]:
        """What the next step asks of each member; one that is left out is not fed. Main first, at least one member.

        Called when the prompt is nearly cached, and before every decode step: cheap, and without tensors. While a
        prompt is prefilled the members that are left out are fed all of it but its last token.
        """

    def decide(self, turns: Sequence[Turn], answers: Mapping[str, Answers], num_candidates: int) -> Outcome:
        """What the answers mean for each turn, a decision each.

        Changes nothing: where it raises, the engine asks it again for each turn alone.

        answers: member -> answers, on the member's device. num_candidates: K of a closed support. The engine asks
        main for K and the biased ids, or for its whole vocabulary where a constraint or the fusion needs it.
        """


MODES: Registry[Callable[[Any], Mode]] = Registry("mode")


def choose_mode(name: str, options: dict[str, Any], where: str) -> ModeChoice:
    """A mode with its options checked. Raises UnknownStrategyError, ConfigError; where: the path of the field."""
    return ModeChoice(name, MODES.parse(name, options, where).model_dump_json())


@lru_cache(maxsize=256)
def mode_of(choice: ModeChoice) -> Mode:
    """The mode that `choose_mode` has checked."""
    return MODES.factory(choice.name)(MODES.parse(choice.name, json.loads(choice.options), "mode"))
