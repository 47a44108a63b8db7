"""What a council is made of: calls to models, their answers, and plans that turn answers into further calls.

A plan is a generator: it yields rounds of calls, receives their answers in the order of the calls, and returns how
the council answers. Invariant: a plan is pure. It does no IO, knows no clock and no randomness of its own, so the
same answers lead to the same calls. It does not know whether a model is a member, an ensemble or another council, nor
who makes the calls.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ensemble_core.councils.answers import AnswerForm
from ensemble_core.decoding.requests import Conversation, Output, Overrides, Prompt
from ensemble_core.decoding.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Call:
    """One request to one model.

    node, round, sample: which call of its council this is. final: its text may be the answer, as it is. clipped: the
    prompt is not the client's own, so a length limit over the room that the prompt leaves is lowered, not refused.
    """

    node: str
    model: str
    prompt: Prompt
    params: SamplingParams
    round: int = 0
    sample: int = 0
    overrides: Overrides = field(default_factory=Overrides)
    final: bool = False
    clipped: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a call. output: joined, None where the call failed. error: why it failed.

    vote: the answer that its text ends up with, where the round asked for that; None: it has none.
    """

    call: Call
    output: Output | None
    error: Exception | None = None
    vote: str | None = None

    @property
    def text(self) -> str:
        """The text, without the space around it; empty where the call failed."""
        return "" if self.output is None else self.output.text.strip()


Enough = Callable[[Sequence[Answer]], bool]


@dataclass(frozen=True, slots=True)
class Round:
    """Calls that are made at the same time.

    enough: whether the answers to the first so many calls make the others needless. It is asked of the longest run of
    finished calls from the first on, so what it decides does not depend on which call ends sooner. form: of the votes
    that are read in the answers; None: none are.
    """

    calls: tuple[Call, ...]
    enough: Enough | None = None
    form: AnswerForm | None = None


@dataclass(frozen=True, slots=True)
class Notes:
    """How a council came to its answer. agreement: share of the votes that the answer has; None: nobody voted."""

    trace: Mapping[str, Any] = field(default_factory=dict)
    rounds: int = 1
    agreement: float | None = None


@dataclass(frozen=True, slots=True)
class Speak:
    """The answer is still to be written: by the first of these calls that does not fail before its first text."""

    calls: tuple[Call, ...]
    notes: Notes = field(default_factory=Notes)


@dataclass(frozen=True, slots=True)
class Settled:
    """The answer exists: an output, and the model that wrote it."""

    output: Output
    served_by: str
    notes: Notes = field(default_factory=Notes)


Verdict = Speak | Settled
Plan = Generator[Round, Sequence[Answer], Verdict]


@dataclass(frozen=True, slots=True)
class CallCost:
    """What one answer of a model needs at most.

    calls: to members and token-level ensembles. writers: those of them whose length the request sets; they share
    the tokens that a council may generate. fixed: tokens of the others. width: calls at the same time.
    """

    calls: int = 1
    writers: int = 1
    fixed: int = 0
    width: int = 1

    def __add__(self, other: CallCost) -> CallCost:
        """One after the other."""
        return CallCost(
            self.calls + other.calls,
            self.writers + other.writers,
            self.fixed + other.fixed,
            max(self.width, other.width),
        )

    def beside(self, other: CallCost) -> CallCost:
        """At the same time."""
        return replace(self + other, width=self.width + other.width)

    def times(self, count: int) -> CallCost:
        """So many at the same time."""
        return CallCost(self.calls * count, self.writers * count, self.fixed * count, self.width * count)


NOTHING = CallCost(0, 0, 0, 0)
CostOf = Callable[[str], CallCost]


def question_of(prompt: Prompt) -> str:
    """What is asked: the last message of a user, or the text itself."""
    if isinstance(prompt, Conversation):
        asked = [str(message["content"]) for message in prompt.messages if message["role"] == "user"]
        return asked[-1] if asked else str(prompt.messages[-1]["content"])
    assert isinstance(prompt, str), "a council takes no ids"
    return prompt


def asking(prompt: Prompt, question: str, role: str = "") -> Prompt:
    """The same prompt with another question; role: said before everything else."""
    if isinstance(prompt, str):
        return f"{role}\n\n{question}" if role else question
    assert isinstance(prompt, Conversation)
    messages = [dict(message) for message in prompt.messages]
    asked = [rank for rank, message in enumerate(messages) if message["role"] == "user"]
    messages[asked[-1] if asked else -1]["content"] = question
    if role and messages[0]["role"] == "system":
        messages[0]["content"] = f"{role}\n\n{messages[0]['content']}"
    elif role:
        messages.insert(0, {"role": "system", "content": role})
    return replace(prompt, messages=tuple(messages))


def as_conversation(prompt: Prompt) -> Conversation:
    """The prompt as a conversation; a text is what the user says."""
    if isinstance(prompt, Conversation):
        return prompt
    assert isinstance(prompt, str), "a council takes no ids"
    return Conversation(({"role": "user", "content": prompt},))


def drafting(params: SamplingParams) -> SamplingParams:
    """Parameters for a text that the client does not see: how it is sampled stays, what is said of it does not."""
    plain = SamplingParams()
    kept = {name: getattr(params, name) for name in _SAMPLING}
    return replace(plain, max_tokens=max(params.max_tokens, 1), seed=params.seed, **kept)


_SAMPLING = (
    "repetition_penalty",
    "thinking_token_budget",
    "presence_penalty",
    "frequency_penalty",
    "bad_words",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
)


def derived_seed(seed: int | None, *key: object) -> int | None:
    """A seed of one call, by SHA-256 of the request's seed and the call's key; None stays None."""
    if seed is None:
        return None
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def seeded(params: SamplingParams, *key: object) -> SamplingParams:
    """Parameters of a call with a seed of its own."""
    return replace(params, seed=derived_seed(params.seed, *key))
