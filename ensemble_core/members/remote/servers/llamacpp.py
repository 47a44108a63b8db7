"""llama.cpp's server: `/completion`, all texts of a step in one request.

It tells any number of candidates, the whole vocabulary included, so nothing is beyond it; what needs a whole
vocabulary is slow, though, since each row is megabytes of JSON. Its cache is exact to the token, but in 16 bits
unless it is told otherwise, and it knows no salts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ensemble_core.hosts import ServerHost
from ensemble_core.members.base import Abilities
from ensemble_core.members.remote.servers.base import Question, Row, Served
from ensemble_core.members.remote.servers.connection import ServerConnection


class LlamaDialect:
    """See `base.Dialect`."""

    title: ClassVar[str] = "llama.cpp's server"
    other_temperature: ClassVar[float] = 2.0
    be_plain: ClassVar[str] = "update it"
    raise_limit: ClassVar[str] = "update it"

    def __init__(self, connection: ServerConnection, host: ServerHost, vocabulary: int) -> None:
        self._connection, self._vocabulary = connection, vocabulary

    def abilities(self, num_candidates: int) -> Abilities:
        """See `Dialect.abilities`."""
        return Abilities(every_position=False, salts=False)

    def served(self) -> Served:
        """See `Dialect.served`; the server has one model, whatever its name."""
        facts = self._connection.get("/props")
        length = facts["default_generation_settings"].get("n_ctx")
        return Served(
            str(facts.get("model_alias") or facts.get("model_path", "")), None if not length else int(length)
        )

    def tokenize(self, text: str) -> list[int]:
        """See `Dialect.tokenize`."""
        body = {"content": text, "add_special": False, "parse_special": False}
        return [int(token_id) for token_id in self._connection.post("/tokenize", body)["tokens"]]

    def ask(self, questions: Sequence[Question], num: int, temperature: float = 0.0) -> list[Row]:
        """See `Dialect.ask`."""
        ends = [end for question in questions for end in question.ends()]
        asked = [ids for question in questions for ids in question.asked]
        plain, whole = ([i for i, ids in enumerate(asked) if bool(ids) == more] for more in (False, True))
        rows: dict[int, Row] = {}
        for places, width in ((plain, num), (whole, self._vocabulary)):
            if places:
                rows |= dict(
                    zip(places, self._complete([ends[i] for i in places], width, temperature), strict=True)
                )
        return [rows[i] for i in range(len(ends))]

    def _complete(self, ends: Sequence[tuple[int, ...]], num: int, temperature: float) -> list[Row]:
        body = {
            "prompt": [list(end) for end in ends],
            "n_predict": 1,
            "n_probs": num,
            "temperature": temperature,
            "cache_prompt": True,
            "return_tokens": True,
        }
        told = self._connection.post("/completion", body)
        answers = sorted(told, key=lambda each: int(each["index"])) if isinstance(told, list) else [told]
        return [
            {
                int(each["id"]): float(each["logprob"])
                for each in answer["completion_probabilities"][0]["top_logprobs"]
            }
            for answer in answers
        ]
