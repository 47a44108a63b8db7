"""Measures of an item: bits of its document, whether its likeliest option is right, whether its completion is right.

Measures: `bits` (every kind: the record as a plain document), `score` (all kinds but text). Results map the index of
a record to plain values, ready for JSON. Does not know files or intervals.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.errors import EvaluationError
from ensemble_core.evaluation.answers import exact_match, same_number
from ensemble_core.evaluation.journal import Values
from ensemble_core.evaluation.offline import DocumentSums
from ensemble_core.evaluation.spelling import Document
from ensemble_core.evaluation.tasks import Item, Split, Task
from ensemble_core.evaluation.variants import Variant
from ensemble_core.evaluation.workbench import Workbench
from ensemble_core.llm import Completion

Measure = Literal["bits", "score"]

_OTHER: dict[Split, Split] = {"even": "odd", "odd": "even", "all": "all"}
BATCH = 32  # prompts generated before their results are saved
_PARAMS = {
    "answer": SamplingParams(max_tokens=32, temperature=0.0, stop=("\n",)),
    "number": SamplingParams(max_tokens=320, temperature=0.0, stop=("\n\n", "Question:")),
}


@dataclass(frozen=True, slots=True)
class Selection:
    """Which items of a task are evaluated, and how many others precede each prompt as examples.

    Examples are the first items of the other half. With `all` they are the first items, which are not evaluated.
    """

    split: Split = "all"
    limit: int | None = None
    shots: int = 0

    def items(self, task: Task) -> tuple[Item, ...]:
        """The items to evaluate."""
        if self.split == "all":
            return task.items[self.shots :][: self.limit]
        return task.chosen(self.split, self.limit)

    def examples(self, task: Task) -> str:
        """The text before every prompt."""
        return "".join(f"{item.document}\n\n" for item in task.chosen(_OTHER[self.split], self.shots))

    def other(self) -> Selection:
        """The same of the other half, to report on; of `all` the same items."""
        return replace(self, split=_OTHER[self.split])


def documents(task: Task, items: Sequence[Item]) -> list[Document]:
    """Records as plain documents."""
    return [Document(item.document, origin=_origin(task, item)) for item in items]


def bits(sums: DocumentSums, items: Sequence[Item]) -> dict[int, Values]:
    """The sums of every comparable document; see `DocumentSums`."""
    return {item.index: _row(sums, i) for i, item in enumerate(items) if sums.num_bytes[i] > 0}


def _row(sums: DocumentSums, document: int) -> dict[str, Any]:
    def plain(value: Tensor | Mapping[str, Tensor]) -> Any:
        if isinstance(value, Tensor):
            return round(float(value[document]), 6)
        return {name: plain(inner) for name, inner in value.items()}

    return {field.name: plain(getattr(sums, field.name)) for field in fields(sums)}


def option_documents(task: Task, items: Sequence[Item], examples: str) -> list[Document]:
    """Each option after its question; only the option's bytes are scored."""
    found = []
    for item in items:
        prompt = examples + item.prompt
        start = len(prompt.encode())
        found += [Document(f"{prompt} {option}", start, _origin(task, item)) for option in item.options]
    return found


def choices(sums: DocumentSums, items: Sequence[Item]) -> dict[int, Values]:
    """Whether the likeliest option is the right one, by likelihood and by likelihood per byte."""
    found: dict[int, Values] = {}
    start = 0
    for item in items:
        own = slice(start, start + len(item.options))
        start = own.stop
        cost, per_byte = sums.bits[own], sums.bits[own] / sums.num_bytes[own]
        right = [int(torch.argmin(values)) == item.right for values in (cost, per_byte)]
        found[item.index] = {"correct": int(right[0]), "correct_per_byte": int(right[1])}
    return found


def completion_params(task: Task) -> SamplingParams:
    """How the questions of a task are answered: greedily, up to where an answer of its kind ends."""
    return _PARAMS[task.kind]


def completions(
    bench: Workbench, variant: Variant, task: Task, items: Sequence[Item], examples: str
) -> Iterator[dict[int, Values]]:
    """Greedy completions and whether they are right, batch by batch."""
    with tqdm(total=len(items), desc=f"{variant.label}: {task.name}", unit="item", disable=None) as bar:
        for start in range(0, len(items), BATCH):
            batch = items[start : start + BATCH]
            done = bench.llm().generate(
                [examples + item.prompt for item in batch],
                completion_params(task),
                variant.model,
                variant.overrides,
            )
            _require_whole(variant, done)
            texts = {item.index: answer.text.strip() for item, answer in zip(batch, done, strict=True)}
            yield {item.index: _judged(task, item, texts[item.index]) for item in batch}
            bar.update(len(batch))


def _require_whole(variant: Variant, done: Sequence[Completion]) -> None:
    """An answer that lost a member is not the ensemble's result. Raises EvaluationError."""
    if lost := {member: reason for answer in done for member, reason in answer.dropped.items()}:
        raise EvaluationError(
            f"{variant.label}: members {lost} were dropped from answers that would count as the whole ensemble's; "
            "see the log, or evaluate it with fewer members (full: or with shorter prompts)"
        )


def _judged(task: Task, item: Item, text: str) -> Values:
    right = same_number(text, item.answers[0]) if task.kind == "number" else exact_match(text, item.answers)
    return {"correct": int(right), "text": text}


def _origin(task: Task, item: Item) -> str:
    return f"{task.path}, line {item.line}"
