"""Finds how often each model of a vote is asked, on one half of the tasks, and reports on the other.

Every model answers each question as often as the council would ask it; a smaller vote is the first so many of these
answers. So models run once, and any counts are tried on their votes. Does not know the command line.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from anyio import CapacityLimiter
from torch import Tensor
from tqdm import tqdm

from ensemble_core.council_config import VoteConfig
from ensemble_core.councils.answers import AnswerForm
from ensemble_core.councils.base import seeded
from ensemble_core.councils.reading import NUM_PROCESSES, Reader
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.errors import EvaluationError
from ensemble_core.evaluation.bootstrap import Interval, Ratio
from ensemble_core.evaluation.measures import BATCH, Selection, completion_params
from ensemble_core.evaluation.tasks import Item, Task
from ensemble_core.evaluation.workbench import Workbench
from ensemble_core.fitting.compared import Compared, compare, gain_of, table_of
from ensemble_core.fitting.swarm import swarm_search

Counts = tuple[int, ...]  # samples of each model, in the council's order
MAX_ENUMERATED = 4096  # ways of counting; with more, a swarm looks for the best

_READING_SECONDS = 3600.0  # for the votes of one item


@dataclass(frozen=True, slots=True)
class Polled:
    """What one item was answered. votes: for each model its samples' answers, None where there is none.

    right: the answers that count. num_tokens: of each model's samples together.
    """

    votes: tuple[tuple[str | None, ...], ...]
    right: frozenset[str]
    num_tokens: tuple[int, ...]

    def is_right(self, counts: Counts) -> bool:
        """Whether the majority of so many samples is right; of equals the answer that was given first."""
        asked = zip(self.votes, counts, strict=True)
        ballot = Counter(vote for votes, count in asked for vote in votes[:count] if vote is not None)
        return bool(ballot) and max(ballot, key=ballot.__getitem__) in self.right


@dataclass(frozen=True, slots=True)
class FittedVotes:
    """counts: found. compared: right answers on items that they were not found on. tokens: of each way, an item."""

    models: tuple[str, ...]
    counts: Counts
    fitted: tuple[float, float]  # right answers on the items that were fitted on: as configured, as found
    how: str
    compared: list[Compared]
    tokens: Mapping[str, float]
    gain: Interval


def fit_votes(
    bench: Workbench, council: VoteConfig, tasks: Sequence[Task], selection: Selection, budget: int, seed: int
) -> FittedVotes:
    """Find the counts with most right answers, of equals with the fewest samples.

    budget: counts that are tried where there are more than MAX_ENUMERATED. Raises EvaluationError for tasks that
    are not answered in words, and for a council whose samples would all be the same.
    """
    if wrong := [task.name for task in tasks if task.kind not in ("number", "answer")]:
        raise EvaluationError(
            f"--task {wrong[0]}: a vote is judged by what it writes; give tasks of numbers or answers"
        )
    if not council.temperature:
        raise EvaluationError("the council's samples would all be the same; set its temperature over 0")
    if council.tie != "first":
        raise EvaluationError("counts are fitted with tie: first alone; set that")
    most = tuple(council.models.values())
    polled = _polled(bench, council, tasks, selection)
    counts, how = _best(most, lambda each: _share(polled, each), budget, seed)
    fitted = (_share(polled, most), _share(polled, counts))
    return _judged(council, counts, fitted, how, _polled(bench, council, tasks, selection.other()))


def _best(most: Counts, value: Callable[[Counts], float], budget: int, seed: int) -> tuple[Counts, str]:
    """The best counts, and how they were found."""
    num_ways = math.prod(count + 1 for count in most) - 1
    known: dict[Counts, float] = {}

    def rank(counts: Counts) -> tuple[float, int]:
        if counts not in known:
            known[counts] = value(counts)
        return known[counts], -sum(counts)

    if num_ways <= MAX_ENUMERATED:
        ways = itertools.product(*(range(count + 1) for count in most))
        return max(filter(any, ways), key=rank), f"all {num_ways} ways of counting"

    def decoded(point: Tensor) -> Counts:
        found = tuple(min(int(x * (n + 1)), n) for x, n in zip(point.tolist(), most, strict=True))
        return found if any(found) else (1, *found[1:])

    def values(points: Tensor) -> Tensor:
        return torch.tensor([rank(decoded(point))[0] for point in points], dtype=torch.float64)

    swarm_search(values, len(most), budget, seed, decoded)
    rank(most)
    return max(known, key=rank), f"a swarm over {len(known)} of {num_ways} ways of counting"


def _share(polled: Sequence[Polled], counts: Counts) -> float:
    return sum(each.is_right(counts) for each in polled) / len(polled)


def _judged(
    council: VoteConfig, counts: Counts, fitted: tuple[float, float], how: str, polled: Sequence[Polled]
) -> FittedVotes:
    models, most = tuple(council.models), tuple(council.models.values())
    one = {name: tuple(int(name == other) for other in models) for name in models}
    singles = {name: _right(polled, each) for name, each in one.items()}
    ways = {"found": counts, "as configured": most}
    any_right = [any(vote in each.right for votes in each.votes for vote in votes) for each in polled]
    compared = compare(
        singles,
        {name: _right(polled, each) for name, each in ways.items()}
        | {
            "any sample (best choice)": _ratio(torch.tensor(any_right)),
            "random": _ratio(torch.stack([each.numerators for each in singles.values()]).mean(0)),
        },
    )
    tokens = {name: _tokens(polled, each, most) for name, each in ways.items()}
    return FittedVotes(models, counts, fitted, how, compared, tokens, gain_of(compared, "found"))


def _tokens(polled: Sequence[Polled], counts: Counts, most: Counts) -> float:
    """Mean tokens of an item; samples of a model count alike."""
    shares = [count / all_of for count, all_of in zip(counts, most, strict=True)]
    spent = (sum(n * s for n, s in zip(each.num_tokens, shares, strict=True)) for each in polled)
    return sum(spent) / len(polled)


def _right(polled: Sequence[Polled], counts: Counts) -> Ratio:
    return _ratio(torch.tensor([each.is_right(counts) for each in polled]))


def _ratio(right: Tensor) -> Ratio:
    return Ratio(right.double(), torch.ones(len(right), dtype=torch.float64))


def _polled(bench: Workbench, council: VoteConfig, tasks: Sequence[Task], selection: Selection) -> list[Polled]:
    found = []
    for task in tasks:
        items, examples = selection.items(task), selection.examples(task)
        texts: dict[str, list[tuple[str, int]]] = {
            model: _samples(bench, council, model, task, items, examples) for model in council.models
        }
        for rank, item in enumerate(items):
            own = [texts[model][rank * num : (rank + 1) * num] for model, num in council.models.items()]
            found.append(asyncio.run(_read(council.answer, item, own)))
    if len(found) < 2:
        raise EvaluationError("the tasks have too few items to fit on; give at least two to each half")
    return found


def _samples(
    bench: Workbench, council: VoteConfig, model: str, task: Task, items: Sequence[Item], examples: str
) -> list[tuple[str, int]]:
    """Each sample of each item, item by item, with its number of tokens. Seeds are those of the council's own."""
    num = council.models[model]
    plain = replace(completion_params(task), temperature=council.temperature or 0.0)
    asked: list[tuple[str, SamplingParams]] = []
    for item in items:
        own = replace(plain, seed=item.index)
        asked += [(examples + item.prompt, seeded(own, model, 0, sample)) for sample in range(num)]
    found: list[tuple[str, int]] = []
    with tqdm(total=len(asked), desc=f"{model}: {task.name}", unit="sample", disable=None) as bar:
        for start in range(0, len(asked), BATCH):
            prompts, params = zip(*asked[start : start + BATCH], strict=True)
            done = bench.llm().generate(list(prompts), list(params), model)
            found += [(each.text.strip(), each.num_generated) for each in done]
            bar.update(len(done))
    return found


async def _read(form: AnswerForm, item: Item, samples: Sequence[Sequence[tuple[str, int]]]) -> Polled:
    reader = Reader(form, CapacityLimiter(NUM_PROCESSES), time.perf_counter() + _READING_SECONDS)
    votes = [[await reader.vote(text) for text, _ in own] for own in samples]
    right = [await reader.vote(answer) for answer in item.answers]
    return Polled(
        tuple(tuple(own) for own in votes),
        frozenset(answer for answer in right if answer is not None),
        tuple(sum(size for _, size in own) for own in samples),
    )


def told_votes(fitted: FittedVotes) -> str:
    """The counts as YAML, and what they are worth."""
    counts = ", ".join(f"{m}: {n}" for m, n in zip(fitted.models, fitted.counts, strict=True) if n)
    before, after = fitted.fitted
    tokens = ", ".join(f"{name} {value:.0f}" for name, value in fitted.tokens.items())
    lines = [
        f"models: {{{counts}}}",
        "",
        f"{fitted.how}: {after:.4f} right of those it was fitted on, {before:.4f} as configured",
        "",
        f"right answers on items that were not fitted on:\n{table_of(fitted.compared)}",
        "",
        f"tokens of an answer: {tokens}",
    ]
    if fitted.gain.low <= 0:
        lines += ["", "the gain over the best single model may be chance"]
    return "\n".join(lines)
