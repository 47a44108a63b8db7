"""The study of whole answers: its prompts, its rivals, and that what was written is found again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.ledger import DEMO
from ensemble_core.config_file import load_config
from ensemble_core.evaluation.tasks import Task, load_task
from studies import whole_answers
from studies.answer_metrics import Opening, Written
from studies.whole_answers import (
    MANNERS,
    WAYS,
    Notebook,
    Series,
    Way,
    cache_of,
    comparison,
    questions,
    rivals,
)

CHOICE = '{"question": "Which is %d?", "A": "one", "B": "two", "answer": "B"}\n'


def _task(folder: Path) -> Task:
    path = folder / "choice.jsonl"
    path.write_text("".join(CHOICE % number for number in range(12)))
    return load_task("choice", path)


def test_a_question_stands_behind_four_examples_of_the_other_half(tmp_path: Path) -> None:
    first, second = questions(_task(tmp_path), 2)
    assert first.prompt.endswith("\n\nQuestion: Which is 1?\nA. one\nB. two\nAnswer:")
    assert second.index == 3
    examples = first.prompt.split("\n\n")[:-1]
    assert [each.split("\n")[0] for each in examples] == [f"Question: Which is {n}?" for n in (0, 2, 4, 6)]
    assert all(each.endswith("Answer: B") for each in examples)


def test_two_samples_of_an_opening_have_different_seeds_and_two_ways_the_same() -> None:
    opening = Opening("article", 7, "Write")
    seeds = {
        (way.label, sample): Series(way, "prose", "sampled", sample).params(opening, 8).seed
        for way in WAYS[:3]
        for sample in range(2)
    }
    assert seeds["gemma3", 0] != seeds["gemma3", 1]
    assert seeds["gemma3", 0] == seeds["duet, all places", 0]


def test_every_way_names_a_model_of_the_demo() -> None:
    config = load_config(DEMO)
    assert {way.model for way in WAYS} <= {*config.members, *config.ensembles}
    assert len({way.label for way in WAYS}) == len(WAYS)


def test_rivals_choose_for_each_opening() -> None:
    short, long = Written("a", 2, True, nats=4.0), Written("a b c", 10, True, nats=5.0)
    found = rivals("gemma3", [[short, long], [long, long]])
    assert found["2 x gemma3, likelier"] == [short, long]
    assert found["2 x gemma3, likelier by token"] == [long, long]


def _written(monkeypatch: pytest.MonkeyPatch, calls: list[tuple[str, int]]) -> None:
    """Answers tell who wrote them; no model is loaded."""

    class Silent:
        def __init__(self, _: object) -> None: ...

        def close(self) -> None: ...

    def write(_: Notebook, __: object, series: Series, openings: list[Opening]) -> list[Written]:
        calls.append((series.way.label, len(openings)))
        return [Written(f"{series.way.label} {each.index}", 3, True, float(series.sample)) for each in openings]

    monkeypatch.setattr(whole_answers, "LLM", Silent)
    monkeypatch.setattr(Notebook, "_written", write)


def _notebook(folder: Path, num: int, ways: Sequence[Way] = WAYS) -> Notebook:
    openings = [Opening("article", index, f"Write {index}") for index in range(num)]
    return Notebook(load_config(DEMO), ways, 8, folder, {"prose": openings})


def test_what_is_kept_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    _written(monkeypatch, calls)
    _notebook(tmp_path, 2).write(float("inf"))
    number = sum(way.number(temperature) for way in WAYS for temperature in MANNERS.values())
    assert [size for _, size in calls] == [2] * number
    calls.clear()
    notebook = _notebook(tmp_path, 3)
    notebook.write(float("inf"))
    assert [size for _, size in calls] == [1] * number  # a larger run writes what is new alone
    calls.clear()
    found = comparison(notebook, "prose", "sampled", frozenset())
    assert calls == []
    assert "2 x smollm2, likelier" in found.counts
    assert "duet, sampled" in found.counts
    assert "duet, sampled" not in comparison(notebook, "prose", "greedy", frozenset()).counts


def test_a_run_stops_when_its_time_is_over_and_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int]] = []
    _written(monkeypatch, calls)
    with pytest.raises(SystemExit, match="parts are left; run it again"):
        _notebook(tmp_path, 2).write(0.0)
    assert calls == []
    _notebook(tmp_path, 2).write(float("inf"))
    assert calls


def test_another_recipe_under_the_same_label_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int]] = []
    _written(monkeypatch, calls)
    _notebook(tmp_path, 2, [Way("duet", "duet")]).write(float("inf"))
    calls.clear()
    _notebook(tmp_path, 2, [Way("duet", "duet-verify")]).write(float("inf"))
    assert calls == [("duet", 2), ("duet", 2)]


def test_the_cache_is_of_one_state_of_prompts(tmp_path: Path) -> None:
    config, tasks = load_config(DEMO), [_task(tmp_path)]
    folder = cache_of(config, tasks, 256, tmp_path)
    assert folder != cache_of(config, tasks, 12, tmp_path)
    assert folder != cache_of(config, [replace(tasks[0], digest="other")], 256, tmp_path)
