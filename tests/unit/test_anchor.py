"""The work that both engines of the comparison are given: what is counted, and which setting of the rival counts."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from benchmarks.against_vllm import LLAMA, OURS, all_settings, best
from benchmarks.anchor.work import Plan, Run, lengths, measure, step_seconds


class Slow:
    """Reads a prompt a step, and decodes those it has read, a token each; `pause` seconds a step."""

    def __init__(self, pause: float) -> None:
        self.pause, self.waiting, self.running = pause, list[int](), list[int]()
        self.asked: list[tuple[int, int]] = []

    def add(self, prompt: Sequence[int], num_tokens: int) -> None:
        self.asked.append((len(prompt), num_tokens))
        self.waiting.append(num_tokens)

    def step(self) -> tuple[int, int]:
        time.sleep(self.pause)
        if self.waiting:
            self.running.append(self.waiting.pop(0))
        self.running = [left - 1 for left in self.running]
        told = len(self.running)
        self.running = [left for left in self.running if left]
        return told, told - len(self.running)


def test_steps_count_while_all_rows_decode() -> None:
    """Four rows that begin one after the other: of seven tokens each, four steps have all of them, three gaps."""
    found = step_seconds(Slow(0.01), [[1]] * 4, 7)
    assert len(found) == 3
    assert all(gap >= 0.01 for gap in found)


def test_every_run_is_asked_as_planned() -> None:
    plan = Plan(
        batches=(1, 3), context=20, steps=4, first=Run(1, 30, 1), prefill=Run(2, 8, 1), whole=(Run(3, 4, 2),)
    )
    texts = [{n: list(range(n)) for n in lengths(plan)} for _ in range(plan.num_prompts)]
    engine = Slow(0.0)
    found = measure(engine, plan, texts)
    assert {what: len(each) for what, each in found.items()} == dict.fromkeys(
        ("step 1", "step 3", "first", "prefill", "3 x (4 + 2)"), 1
    )
    assert engine.asked[2:] == [(18, 8)] * 4 + [(30, 1)] + [(8, 1)] * 2 + [(4, 2)] * 3


def test_a_plan_goes_to_another_process() -> None:
    for plan in (Plan(), Plan().quick()):
        assert Plan.of(json.loads(json.dumps(plan.as_json()))) == plan
        assert plan.num_prompts >= max(plan.batches)
        assert plan.longest == max(*lengths(plan), plan.context)


def test_the_best_setting_of_the_rival_counts() -> None:
    told = {
        ("m", OURS): {"first": [0.1]},
        ("m", "eager"): {"first": [3.0, 1.0, 2.0]},
        ("m", "compiled"): {"first": [2.5, 1.6]},
        ("m", LLAMA): {"first": [0.2]},
        ("other", "eager"): {"first": [0.3]},
    }
    assert best(told, "m", "first") == (2.0, "eager")
    rows = all_settings(told, {("m", OURS): {"run": [1.0]}, ("m", "eager, server"): {"first": [4.0]}})
    assert [row["who"] for row in rows][-2:] == [f"{OURS}, server", "eager, server"]
    assert [row["first"] for row in rows][-2:] == [None, 4000.0]
