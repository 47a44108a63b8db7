"""vLLM's server: `/v1/completions`, all texts of a step in one request.

Each position is a text of its own; its prefix cache makes that cheap, by whole blocks. Ids that must be in an answer
whatever their rank cost a second request, since they take the place of the likeliest there. A request has one salt,
so texts of several salts are as many requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from ensemble_core.members.base import Abilities
from ensemble_core.members.remote.servers.base import Question, Row
from ensemble_core.members.remote.servers.openai_models import ListedModel

_MOST_ALSO = 128  # ids of `logprob_token_ids`
_PREFIX = "token_id:"


class _End(NamedTuple):
    """The text before one position."""

    token_ids: tuple[int, ...]
    salt: str


class VllmDialect(ListedModel):
    """See `base.Dialect`."""

    title: ClassVar[str] = "vLLM"
    other_temperature: ClassVar[float] = 2.0
    be_plain: ClassVar[str] = "start it with --logprobs-mode raw_logprobs"
    raise_limit: ClassVar[str] = "start it with --max-logprobs {num} or more"

    def abilities(self, num_candidates: int) -> Abilities:
        """See `Dialect.abilities`."""
        return Abilities(max_k=num_candidates, max_also=_MOST_ALSO, every_position=False)

    def ask(self, questions: Sequence[Question], num: int, temperature: float = 0.0) -> list[Row]:
        """See `Dialect.ask`."""
        ends = [_End(end, question.salt) for question in questions for end in question.ends()]
        asked = [ids for question in questions for ids in question.asked]
        rows = self._rows(ends, temperature, logprobs=num)
        for ids in dict.fromkeys(ids for ids in asked if ids):
            places = [i for i, own in enumerate(asked) if own == ids]
            extra = self._rows([ends[i] for i in places], temperature, logprobs=1, logprob_token_ids=list(ids))
            for i, row in zip(places, extra, strict=True):
                rows[i] |= row
        return rows

    def _rows(self, ends: Sequence[_End], temperature: float, **asked: Any) -> list[Row]:
        """A row for each end, salt by salt."""
        rows: dict[int, Row] = {}
        for salt in dict.fromkeys(end.salt for end in ends):
            places = [i for i, end in enumerate(ends) if end.salt == salt]
            own = asked | ({"cache_salt": salt} if salt else {})
            found = self._complete([ends[i].token_ids for i in places], temperature, **own)
            rows |= dict(zip(places, found, strict=True))
        return [rows[i] for i in range(len(ends))]

    def _complete(self, ends: Sequence[tuple[int, ...]], temperature: float, **asked: Any) -> list[Row]:
        body = {
            "model": self._name,
            "prompt": [list(end) for end in ends],
            "max_tokens": 1,
            "temperature": temperature,
            "return_tokens_as_token_ids": True,
            **asked,
        }
        choices = sorted(self._connection.post("/v1/completions", body)["choices"], key=lambda each: each["index"])
        return [_row(choice["logprobs"]["top_logprobs"][0]) for choice in choices]


def _row(told: dict[str, float]) -> Row:
    return {int(token.removeprefix(_PREFIX)): logprob for token, logprob in told.items()}
