"""SGLang's server: `/generate`, all texts of a step in one request, a whole draft as one of them.

Written from its documents and source; it was tried against a stand-in alone, never against the server itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from ensemble_core.members.base import Abilities
from ensemble_core.members.remote.servers.base import Question, Row
from ensemble_core.members.remote.servers.openai_models import ListedModel


class SglangDialect(ListedModel):
    """See `base.Dialect`."""

    title: ClassVar[str] = "SGLang"
    other_temperature: ClassVar[float] = 1.0  # it divides by higher ones before it tells
    be_plain: ClassVar[str] = "update it"
    raise_limit: ClassVar[str] = "update it"

    def abilities(self, num_candidates: int) -> Abilities:
        """See `Dialect.abilities`."""
        return Abilities(max_k=num_candidates, every_position=False)

    def ask(self, questions: Sequence[Question], num: int, temperature: float = 0.0) -> list[Row]:
        """See `Dialect.ask`."""
        also = [sorted({token_id for ids in question.also for token_id in ids}) for question in questions]
        body: dict[str, Any] = {
            "input_ids": [list(question.token_ids) for question in questions],
            "sampling_params": {"max_new_tokens": 1, "temperature": temperature},
            "return_logprob": True,
            "top_logprobs_num": num,
            "logprob_start_len": [
                len(question.token_ids) - question.wanted if question.wanted > 1 else -1 for question in questions
            ],
        }
        if any(also):
            body["token_ids_logprob"] = also
        if any(question.salt for question in questions):
            body["extra_key"] = [question.salt for question in questions]
        answers = self._connection.post("/generate", body)
        rows: list[Row] = []
        for question, answer in zip(questions, answers, strict=True):
            rows += _rows(question, answer["meta_info"])
        return rows


def _rows(question: Question, told: dict[str, Any]) -> list[Row]:
    """What stands before each token of the text, then what follows it."""
    before = question.wanted - 1
    rows = [_row(each) for each in _last(told.get("input_top_logprobs"), before)] if before else []
    rows.append(_row(told["output_top_logprobs"][0]))
    if question.also:
        extra = _last(told.get("input_token_ids_logprobs"), before) if before else []
        for row, each in zip(rows, [*extra, told["output_token_ids_logprobs"][0]], strict=True):
            row |= _row(each)
    return rows


def _last(told: list[Any] | None, num: int) -> list[Any]:
    return list(told or [])[-num:]


def _row(told: Sequence[tuple[float, int, str | None]]) -> Row:
    return {int(token_id): float(logprob) for logprob, token_id, *_ in told}
