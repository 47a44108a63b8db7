"""What an engine is asked to do in the comparison with vLLM, and how it is timed; the same code on both sides.

An engine is stepped by hand. Every run adds its prompts at once and steps until all answers are whole; greedy,
without stop tokens, so each answer has exactly as many tokens as were asked for. Runs in the environment of either
side: knows the standard library alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any, Protocol

Prompt = Sequence[int]


class Stepped(Protocol):
    """An engine that is driven by hand."""

    def add(self, prompt: Prompt, num_tokens: int) -> None:
        """Queue a prompt that is answered with exactly `num_tokens` tokens."""

    def step(self) -> tuple[int, int]:
        """Take a step: how many sequences got tokens, and how many have ended."""


@dataclass(frozen=True, slots=True)
class Run:
    """`num` prompts of `length` tokens at once, `tokens` of answer each."""

    num: int
    length: int
    tokens: int

    @property
    def name(self) -> str:
        """As the tables have it."""
        return f"{self.num} x ({self.length} + {self.tokens})"


@dataclass(frozen=True, slots=True)
class Plan:
    """All runs. batches: of the decode steps, at a mean context of `context` tokens, `steps` of each."""

    batches: tuple[int, ...] = (1, 8, 32)
    context: int = 256
    steps: int = 32
    first: Run = Run(1, 1000, 1)
    prefill: Run = Run(8, 512, 1)
    whole: tuple[Run, ...] = (Run(32, 224, 64), Run(8, 1000, 32), Run(64, 64, 64))
    repeats: int = 1

    def quick(self) -> Plan:
        """To see that it works."""
        tiny = tuple(Run(2, 32, 8) for _ in self.whole)
        return replace(self, batches=(1, 2), steps=4, context=64, prefill=Run(2, 64, 1), whole=tiny, repeats=1)

    @property
    def num_prompts(self) -> int:
        """Different prompts that are needed."""
        return max(*self.batches, *(run.num for run in (self.first, self.prefill, *self.whole)))

    @property
    def longest(self) -> int:
        """Tokens that a prompt may need."""
        return max(self.context, *(run.length for run in (self.first, self.prefill, *self.whole)))

    def as_json(self) -> dict[str, Any]:
        """For another process."""
        return asdict(self)

    @staticmethod
    def of(told: dict[str, Any]) -> Plan:
        """The plan that `as_json` told."""
        runs = {name: Run(**told[name]) for name in ("first", "prefill")}
        whole = tuple(Run(**run) for run in told["whole"])
        return Plan(**{**told, **runs, "batches": tuple(told["batches"]), "whole": whole})


def seconds(engine: Stepped, prompts: Sequence[Prompt], num_tokens: int) -> float:
    """Of one whole run."""
    started = time.perf_counter()
    for prompt in prompts:
        engine.add(prompt, num_tokens)
    left = len(prompts)
    while left:
        left -= engine.step()[1]
    return time.perf_counter() - started


def step_seconds(engine: Stepped, prompts: Sequence[Prompt], num_tokens: int) -> list[float]:
    """From step to step, while every prompt has begun and none has ended."""
    for prompt in prompts:
        engine.add(prompt, num_tokens)
    left, moments = len(prompts), []
    while left:
        told, ended = engine.step()
        left -= ended
        moments.append((time.perf_counter(), told, left))
    full = [at for at, told, _ in moments if told == len(prompts)]
    return [after - before for before, after in pairwise(full)]


def measure(engine: Stepped, plan: Plan, texts: Sequence[dict[int, Prompt]]) -> dict[str, list[float]]:
    """What -> seconds, one for each repeat. texts: of each prompt, length -> its ids when cut to that length."""
    found: dict[str, list[float]] = {}
    start = plan.context - plan.steps // 2
    seconds(engine, [text[plan.first.length] for text in texts[:2]], 4)  # first use
    for _ in range(plan.repeats):
        for batch in plan.batches:
            steps = step_seconds(engine, [text[start] for text in texts[:batch]], plan.steps + 4)
            found.setdefault(f"step {batch}", []).append(median(steps[2:]))
        for name, run in (("first", plan.first), ("prefill", plan.prefill), *((r.name, r) for r in plan.whole)):
            prompts = [text[run.length] for text in texts[: run.num]]
            found.setdefault(name, []).append(seconds(engine, prompts, run.tokens))
    return found


def lengths(plan: Plan) -> list[int]:
    """Every length to which prompts are cut."""
    runs = (plan.first, plan.prefill, *plan.whole)
    return sorted({plan.context - plan.steps // 2, *(run.length for run in runs)})
