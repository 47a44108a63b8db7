"""The contract of a decoding mode, which takes a sequence's steps, and the registry of modes.

A mode plans what each member is fed and at how many positions it must answer, and decides what the answers mean for
the text. The engine does the rest: it feeds, collects, appends, aligns and reports. A mode keeps no state of its own:
a sequence holds its decided and drafted tokens.

Main's tokens are final or drafted. Drafted tokens are at the end of main's track; no client has seen them, and a
later decision keeps or drops them. A mode does not know how members, caches or schedules work.
"""

from __future__ import annotations

import json
from collections import abc
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from ensemble_core.decoding.habits import Verdict
from ensemble_core.decoding.recipe import ModeChoice, Recipe
from ensemble_core.decoding.rhythm import Beat, Prospect
from ensemble_core.decoding.sequence import Ahead, Choice, Drafted, Sequence
from ensemble_core.registry import Registry
from ensemble_core.stats import FusionStats, Reason

if TYPE_CHECKING:
    from torch import Tensor

    from ensemble_core.members.base import Answers


@dataclass(frozen=True, slots=True)
class Ask:
    """One member's part of a step: feed its next `count` tokens, answer at the last `wanted` of them."""

    count: int
    wanted: int = 1


@dataclass(frozen=True, slots=True)
class Turn:
    """A sequence whose members have answered.

    feeds: member -> index of the sequence's feed in that member's answers, for members that have answered. mask: (V,)
    bool, main's ids that the sequence's constraint allows next; None: all. left_out: members of the plan that do not
    count in this step, and why.
    """

    sequence: Sequence
    feeds: Mapping[str, int]
    mask: Tensor | None = None
    left_out: Mapping[str, Reason] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """The sequence's recipe without the members that are left out."""
        return self.sequence.recipe.without(self.left_out)

    @property
    def non_finite(self) -> tuple[str, ...]:
        """Members that are left out because their numbers are not finite."""
        return tuple(member for member, reason in self.left_out.items() if reason == "non_finite")

    def without(self, members: Collection[str], reason: Reason) -> Turn:
        """The turn without some assistants, and without those that the fusion cannot use without them."""
        recipe = self.recipe.without(members)
        left_out = dict(self.left_out) | dict.fromkeys(members, reason)
        idle = (m for m in self.sequence.recipe.members if m not in recipe.members and m not in left_out)
        left_out |= dict.fromkeys(idle, "idle")
        feeds = {member: feed for member, feed in self.feeds.items() if member not in left_out}
        return replace(self, feeds=feeds, left_out=left_out)


@dataclass(frozen=True, slots=True)
class Decision:
    """The result of a step for one sequence: main's track then ends with `tokens`, followed by `draft`.

    tokens: become final, in order; none, one or several. draft: the tokens after them, still to be decided. What
    `tokens` and `draft` together have in common with the old draft, from its start, stays cached; the rest of the old
    draft is taken back. ends: what the mode wants to remember of the end of `tokens`; None: assistants are to answer
    there again. unsound: members whose numbers were not finite. error: ends the sequence with this message. verdicts:
    how drafted tokens and guesses fared. consulted: how many of `tokens` the members' fusion decided; agreed: the
    assistants' consent; certified: a bound of the fusion. drawn: the member from whose distribution they were drawn,
    in a mode that draws one. ahead: text that an assistant drafts behind `draft`, in what assistants spell of it.
    """

    sequence: Sequence
    tokens: tuple[Choice, ...] = ()
    draft: tuple[Drafted, ...] = ()
    ends: object = None
    unsound: tuple[str, ...] = ()
    error: str | None = None
    verdicts: tuple[Verdict, ...] = ()
    consulted: int = 0
    agreed: int = 0
    certified: int = 0
    drawn: str | None = None
    ahead: Ahead | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The decisions of a step, and their cost."""

    decisions: list[Decision]
    fusions: list[FusionStats] = field(default_factory=list)
    sampling_seconds: float = 0.0


def joined(parts: Iterable[Outcome]) -> Outcome:
    """Join several outcomes of one step."""
    parts = list(parts)
    return Outcome(
        [decision for part in parts for decision in part.decisions],
        [fusion for part in parts for fusion in part.fusions],
        sum(part.sampling_seconds for part in parts),
    )


class Mode(Protocol):
    """A way to take a sequence's next step. Stateless: one object serves all sequences with the same options."""

    def prospect(self, sequence: Sequence) -> Prospect | None:
        """What the draft of a decoding sequence promises; None: its steps do not depend on the beat."""

    def drafter(self, sequence: Sequence) -> str:
        """The member whose forwards a beat calls drafting; those of all others are reading."""

    def plan(self, sequence: Sequence, beat: Beat = Beat()) -> Mapping[str, Ask]:  # noqa: B008, it is frozen
        """What the next deciding step asks of each member, main first, at least one. Members left out are not fed.

        beat: what the step does for all sequences that have prospects.

        Called before each prefill chunk and each decode step, so it must be cheap and must not touch tensors. During
        prefill the members that it leaves out are fed all of the prompt but the last token.
        """

    def decide(self, turns: abc.Sequence[Turn], answers: Mapping[str, Answers], num_candidates: int) -> Outcome:
        """One decision for each turn.

        Must change nothing: if it raises, the engine calls it again for each turn alone.

        answers: member -> answers, on the member's device. num_candidates: K of a closed support. Main is asked for
        K candidates and the pinned ids, or for its whole vocabulary if a constraint or the fusion needs it.
        """


MODES: Registry[Callable[[Any], Mode]] = Registry("mode")


def choose_mode(name: str, options: dict[str, Any], where: str) -> ModeChoice:
    """A mode with checked options. where: path of the field. Raises UnknownStrategyError, ConfigError."""
    return ModeChoice(name, MODES.parse(name, options, where).model_dump_json())


@lru_cache(maxsize=256)
def mode_of(choice: ModeChoice) -> Mode:
    """The mode of a choice that `choose_mode` has checked."""
    return MODES.factory(choice.name)(MODES.parse(choice.name, json.loads(choice.options), "mode"))
