"""Counts of votes and edges of graphs, fitted to models whose answers are known."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fakes import fake_config
from hypothesis import given
from hypothesis import strategies as st
from scripted_engine import council

from ensemble_core.config import Config
from ensemble_core.council_config import GraphConfig, VoteConfig
from ensemble_core.councils.base import Answer, Call
from ensemble_core.councils.vote import Ballot
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.errors import EvaluationError
from ensemble_core.evaluation.measures import Selection
from ensemble_core.evaluation.tasks import Task, load_task
from ensemble_core.fitting.fit_graph import fit_graph, told_graph
from ensemble_core.fitting.fit_votes import Polled, _best, fit_votes, told_votes
from ensemble_core.llm import Completion

EVEN = Selection("even")


class Models:
    """Stands for a workbench and its LLM. answers: what a model says to a question with a seed."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.num_asked = 0

    def llm(self) -> Models:
        return self

    def use_councils(self, config: Config) -> None:
        self.config = config

    def generate(
        self, prompts: Sequence[str], params: SamplingParams | list[SamplingParams], model: str, _o: Any = None
    ) -> list[Completion]:
        each = params if isinstance(params, list) else [params] * len(prompts)
        self.num_asked += len(prompts)
        return [self.say(model, prompt, own) for prompt, own in zip(prompts, each, strict=True)]

    def say(self, model: str, prompt: str, params: SamplingParams) -> Completion:
        right = int(prompt.split()[-3])
        text = f"The answer is {right if self.knows(model, right, params.seed) else right + 1}."
        return Completion(text, (1, 2, 3), "stop", None, 5)

    def knows(self, model: str, question: int, seed: int | None) -> bool:
        chance = {"alpha": 0.8, "beta": 0.1, "gamma": 0.5}.get(model)
        if chance is None:
            return self.graph_knows(model)
        return random.Random(f"{model} {question} {seed}").random() < chance

    def graph_knows(self, name: str) -> bool:
        """A graph in which alpha reads beta and gamma answers rightly, every other wrongly."""
        graph = self.config.councils[name]
        assert isinstance(graph, GraphConfig)
        if graph.nodes["n1"].model != "alpha":
            return False
        return set(graph.edges) == {("n2", "n1"), ("n3", "n1")}


def task(folder: Path, num: int = 200) -> Task:
    path = folder / "sums.jsonl"
    lines = [{"question": f"Which is number {i} ?", "answer": f"the answer is {i}"} for i in range(num)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return load_task("sums", path)


def bench(name: str, section: dict[str, Any]) -> Models:
    return Models(fake_config(("alpha", "beta", "gamma"), ensembles={name: section}))


def vote(**fields: Any) -> VoteConfig:
    made = bench("poll", council("vote", temperature=0.7, answer="number", **fields)).config.councils["poll"]
    assert isinstance(made, VoteConfig)
    return made


def test_a_model_that_knows_less_loses_its_votes(tmp_path: Path) -> None:
    poll = vote(models={"alpha": 3, "beta": 4})
    models: Any = Models(fake_config(("alpha", "beta", "gamma"), ensembles={}))
    found = fit_votes(models, poll, [task(tmp_path)], EVEN, 100, 0)
    assert models.num_asked == 200 * 7, "each sample is drawn once, whatever the counts"
    assert found.counts == (3, 0)
    assert found.how == "all 19 ways of counting"
    assert found.gain.low > 0, "three votes of a model that is right in .8 are right in .896"
    named = {each.name: each.value.value for each in found.compared}
    assert named["any sample (best choice)"] > named["found"] > named["alpha (the best model)"] > named["random"]
    assert named["found"] > named["as configured"]
    said = told_votes(found)
    assert said.startswith("models: {alpha: 3}\n")
    assert "tokens of an answer: found 9, as configured 21" in said


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"tie": "likeliest"}, "tie: first alone"), ({"temperature": 0.0}, "temperature over 0")],
)
def test_votes_that_cannot_be_fitted(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    section = council("vote", models={"alpha": 3}, **({"temperature": 0.7} | fields))
    models: Any = bench("poll", section)
    with pytest.raises(EvaluationError, match=words):
        fit_votes(models, models.config.councils["poll"], [task(tmp_path)], EVEN, 100, 0)


def test_votes_are_judged_by_what_they_write(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "words"}')
    models: Any = bench("poll", council("vote", models={"alpha": 3}))
    with pytest.raises(EvaluationError, match="--task words: a vote is judged by what it writes"):
        fit_votes(models, vote(models={"alpha": 3}), [load_task("words", path)], EVEN, 100, 0)


VOTES = st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=5).map(tuple)


@given(st.lists(VOTES, min_size=1, max_size=3).flatmap(lambda votes: st.tuples(st.just(tuple(votes)), st.data())))
def test_a_smaller_vote_is_the_councils_own_rule(drawn: tuple[tuple[tuple[str | None, ...], ...], Any]) -> None:
    votes, data = drawn
    counts = tuple(data.draw(st.integers(0, len(own))) for own in votes)
    call = Call("alpha", "alpha", "", SamplingParams())
    asked = [Answer(call, None, vote=vote) for own, num in zip(votes, counts, strict=True) for vote in own[:num]]
    leaders = Ballot.of(asked).leaders()
    for right in ("a", "b", "c"):
        polled = Polled(votes, frozenset({right}), (0,) * len(votes))
        assert polled.is_right(counts) == (leaders[:1] == [right])


def test_many_ways_of_counting_are_searched_by_a_swarm_and_are_no_worse_than_configured() -> None:
    most = (16, 16, 16, 16)

    def value(counts: tuple[int, ...]) -> float:
        return 1.0 - abs(counts[0] - 9) / 20 - counts[1] / 50

    counts, how = _best(most, value, 300, 0)
    assert how.startswith("a swarm over 3")
    assert value(counts) >= max(value(most), 0.95)


def test_a_graph_is_found_and_each_models_part_is_told(tmp_path: Path) -> None:
    nodes = {"n1": "alpha", "n2": "beta", "n3": "gamma"}
    chain = [["n1", "n2"], ["n2", "n3"]]
    models: Any = bench("moa", council("graph", nodes=nodes, edges=chain, limits={"max_calls": 16}))
    found = fit_graph(models, "moa", [task(tmp_path, 40)], EVEN, 100, 0, num_draws=60)
    assert set(found.edges) == {("n2", "n1"), ("n3", "n1")}
    assert found.found.method == "exact"
    assert found.found.value == 1.0
    named = {each.name: each.value.value for each in found.compared}
    assert named["found"] == 1.0
    assert named["as configured"] == 0.0
    assert named["best choice of a model"] >= named["alpha (the best model)"] > named["random"]
    assert found.parts["alpha"] > max(found.parts["beta"], found.parts["gamma"])
    said = told_graph(found)
    assert said.startswith("edges: [[n2, n1], [n3, n1]]")
    assert "part of each model (JFK-score over random assignments): alpha" in said
