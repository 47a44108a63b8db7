"""Votes over mathematical answers: what is equal is one answer, and no expression can hold up a council."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from anyio import CapacityLimiter
from fakes import fake_config
from scripted_engine import ScriptedEngine, asked, council, whole

from ensemble_core.config import Config
from ensemble_core.councils import reading
from ensemble_core.councils.reading import Reader
from ensemble_core.decoding.requests import GenerationRequest, Output


def votes(texts: Sequence[str], seconds: float = 60.0) -> list[str | None]:
    async def read() -> list[str | None]:
        reader = Reader("math", CapacityLimiter(1), time.perf_counter() + seconds)
        return [await reader.vote(text) for text in texts]

    return asyncio.run(read())


def poll(*texts: str, **fields: object) -> tuple[Config, ScriptedEngine]:
    section = council("vote", models={"alpha": len(texts)}, answer="math", **fields)

    def answer(request: GenerationRequest) -> str:
        return texts[int(request.request_id.rsplit("/", 1)[1])]

    return fake_config(("alpha", "beta"), ensembles={"poll": section}), ScriptedEngine(answer)


def answered(settings: Config, engine: ScriptedEngine) -> Output:
    (output,) = asyncio.run(whole(engine.chamber(settings), asked("poll")))
    assert engine.num_places == 0
    return output


def test_equal_expressions_are_one_answer_and_texts_without_one_do_not_vote() -> None:
    texts = [
        r"So it is \boxed{\frac{1}{2}}.",
        "The answer is 0.5",
        "no idea",
        r"$\frac{2}{4}$",
        r"\boxed{\frac{1}{3}}",
    ]
    first, second, none, fourth, fifth = votes(texts)
    assert first is not None
    assert (second, none, fourth) == (first, None, first)
    assert fifth not in (None, first)


def test_a_council_counts_them_and_stops_early() -> None:
    settings, engine = poll(r"\boxed{(x+1)^2}", r"\boxed{x^2}", r"\boxed{x^2+2x+1}")
    output = answered(settings, engine)
    assert output.text == r"\boxed{(x+1)^2}"
    assert output.report is not None
    (found,) = output.report.trace.values()
    assert found["votes"][found["winner"]] == ["alpha#0", "alpha#2"]

    settings, engine = poll(*[r"\boxed{x+x}", r"\boxed{2x}", r"$2 \cdot x$", "7", "8"], stop_early=True)
    assert answered(settings, engine).text == r"\boxed{x+x}"


def test_what_does_not_end_is_ended_and_stands_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "compared", _endless)
    monkeypatch.setattr(reading, "_HARD_LIMIT", 2.0)
    before = set(psutil.Process().children(recursive=True))
    began = time.perf_counter()
    assert votes(["The Answer: 12", "the answer 12."], seconds=3.0) == ["answer 12", "answer 12"]
    assert time.perf_counter() - began < 30.0
    assert not [each for each in set(psutil.Process().children(recursive=True)) - before if each.is_running()]


def test_towers_of_powers_cost_a_council_a_bounded_time(tmp_path: Path) -> None:
    tower = r"\boxed{9^{9^{9^{9}}}}"
    settings, engine = poll(tower, "The answer is 7", tower, "The answer is 7.0", "7", limits={"seconds": 40})
    output = answered(settings, engine)
    assert output.text == "The answer is 7"


def _endless(_text: str, _known: Sequence[str]) -> None:
    while True:
        pass
