"""A runtime that replays stored answers, so that the playground can be seen without models.

It stands where the engine's runtime stands, behind the same app: bodies are checked and answers are told as ever.
Whatever is asked, it answers with what was stored for the model: for that very prompt, else for the first of its
form. Nothing that a request changes has an effect. Does not know HTTP or the page.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ensemble_core.decoding.requests import (
    CallReport,
    Conversation,
    CouncilReport,
    DraftTrace,
    GenerationRequest,
    Output,
    Prompt,
    Trace,
)
from ensemble_core.errors import InvalidRequestError, ModelNotFoundError, NotReadyError, quoted
from ensemble_core.stats import QueueStats, Record, RequestStats, TokenStats

FILE = Path(__file__).parent / "stored.json"
TOKEN_SECONDS = 0.04  # the pace of a replay


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model as `/v1/models` told of it."""

    name: str
    kind: Literal["ensemble", "council", "member"]
    max_model_len: int
    recipe: dict[str, Any] | None
    parent: str | None = None
    lacks: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StoredStatus:
    """Always ready, until it is stopped."""

    state: Literal["ready", "draining", "dead"]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class StoredPrompt:
    """A prompt whose tokens nobody knows here: there is no tokenizer."""

    token_ids: tuple[int, ...]
    max_model_len: int


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """One answer with its request, as the playground exports it."""

    model: str
    request: Mapping[str, Any]
    outputs: tuple[Output, ...]

    def fits(self, prompt: Prompt) -> int:
        """How well it answers a prompt: 2 for the same one, 1 for the same form, else 0."""
        is_chat = isinstance(prompt, Conversation)
        if is_chat != ("messages" in self.request):
            return 0
        said = self.request["messages"] if is_chat else self.request["prompt"]
        asked = [dict(turn) for turn in prompt.messages] if isinstance(prompt, Conversation) else prompt
        return 2 if said == asked else 1


class StoredRuntime:
    """Replays the answers of a file. record: takes the metrics of the replay."""

    num_places = 8

    def __init__(self, record: Record, path: Path = FILE, seconds: float = TOKEN_SECONDS) -> None:
        stored = json.loads(path.read_text(encoding="utf-8"))
        self._models = [_model(card) for card in stored["models"]]
        self._strategies = stored["strategies"]
        self._answers = [_answer(each) for each in stored["answers"]]
        self._record = record
        self._seconds = seconds
        self._state: Literal["ready", "draining", "dead"] = "ready"
        self.num_open = 0

    @property
    def requests(self) -> list[Mapping[str, Any]]:
        """What was asked, of each stored answer."""
        return [each.request for each in self._answers]

    def start(self) -> None:
        """There is nothing to load."""

    def wait_ready(self) -> None:
        """There is nothing to wait for."""

    def status(self) -> StoredStatus:
        """See `StoredStatus`."""
        return StoredStatus(self._state)

    def models(self) -> list[StoredModel]:
        """The models whose answers are stored, and those that they name."""
        return self._models

    def strategies(self) -> dict[str, Any]:
        """As the server said when the answers were stored."""
        return dict(self._strategies)

    def _model(self, name: str) -> StoredModel:
        found = next((model for model in self._models if model.name == name), None)
        if found is None:
            known = ", ".join(model.name for model in self._models)
            raise ModelNotFoundError(f"model {quoted(name)} does not exist; stored are answers of {known}")
        return found

    async def tightest(self, model: str, prompt: Prompt) -> StoredPrompt:
        """No tokens, and the model's context."""
        return StoredPrompt((), self._model(model).max_model_len)

    async def tokenize(self, model: str, prompt: Prompt, add_special_tokens: bool = True) -> StoredPrompt:
        """Raises InvalidRequestError: there is no tokenizer."""
        raise InvalidRequestError("stored answers have no tokenizer; serve models for that", "model")

    async def detokenize(self, model: str, token_ids: Sequence[int]) -> str:
        """Raises InvalidRequestError: there is no tokenizer."""
        raise InvalidRequestError("stored answers have no tokenizer; serve models for that", "model")

    def tokenizer_info(self, model: str) -> dict[str, Any]:
        """Raises InvalidRequestError: there is no tokenizer."""
        raise InvalidRequestError("stored answers have no tokenizer; serve models for that", "model")

    async def submit(self, requests: Sequence[GenerationRequest]) -> AsyncGenerator[tuple[int, Output]]:
        """Replays of the stored answers. Raises ModelNotFoundError, InvalidRequestError, NotReadyError."""
        if self._state != "ready":
            raise NotReadyError(f"the server is {self._state}; try again later")
        return self._replayed(requests, [self._answer_to(request) for request in requests])

    def _answer_to(self, request: GenerationRequest) -> StoredAnswer:
        self._model(request.model)
        own = [each for each in self._answers if each.model == request.model]
        if not own:
            raise InvalidRequestError(f"no answer of {quoted(request.model)} is stored; choose another", "model")
        return max(own, key=lambda each: each.fits(request.prompt))

    async def _replayed(
        self, requests: Sequence[GenerationRequest], answers: Sequence[StoredAnswer]
    ) -> AsyncGenerator[tuple[int, Output]]:
        """Token by token, all requests at the same pace."""
        started = last = time.perf_counter()
        self._count(len(requests))
        try:
            for step in range(max(len(each.outputs) for each in answers)):
                await asyncio.sleep(self._seconds)
                for index, (request, answer) in enumerate(zip(requests, answers, strict=True)):
                    if step < len(answer.outputs):
                        output = answer.outputs[step]
                        yield index, output if request.trace else replace(output, traces=())
                now = time.perf_counter()
                self._record(TokenStats(requests[0].model, now - last))
                last = now
        finally:
            self._count(-len(requests))
            self._record(_ended(requests[0].model, answers[0], last - started))

    def _count(self, number: int) -> None:
        self.num_open += number
        self._record(QueueStats(self.num_open, 0))

    async def drain(self, seconds: float) -> None:
        """A replay is cut off; nobody loses anything."""
        self._state = "draining"

    def abort_all(self) -> None:
        """As `drain`."""
        self._state = "draining"

    def stop(self, seconds: float = 0.0) -> bool:
        """Nothing runs."""
        self._state = "dead"
        return True


def _ended(model: str, answer: StoredAnswer, seconds: float) -> RequestStats:
    last = answer.outputs[-1]
    counts = last.num_prompt_tokens, last.num_completion_tokens
    return RequestStats(model, str(last.finish_reason), *counts, 0.0, None, seconds)


def _model(card: Mapping[str, Any]) -> StoredModel:
    return StoredModel(card["id"], card["kind"], card["max_model_len"], card["recipe"], card["parent"])


def _answer(stored: Mapping[str, Any]) -> StoredAnswer:
    traces = [_trace(step) for step in stored["trace"]]
    pieces = _texts(traces) if traces else _words(stored["text"])
    usage = stored["usage"]
    outputs = [
        Output(
            text,
            (rank,),
            usage["prompt_tokens"],
            rank + 1,
            traces=tuple(traces[rank : rank + 1]),
            served_by=stored.get("served_by") or "",
        )
        for rank, text in enumerate(pieces)
    ]
    calls = tuple(CallReport(**_without(call, "choice")) for call in usage.get("calls") or ())
    report = CouncilReport(calls, stored["council"]) if stored.get("council") else None
    outputs[-1] = replace(outputs[-1], finish_reason=stored["finish_reason"], report=report)
    return StoredAnswer(stored["model"], stored["request"], tuple(outputs))


def _without(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key != name}


def _texts(traces: Sequence[Trace]) -> list[str]:
    """What each token adds to the text: a character that lies over several stands in the last."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    last = len(traces) - 1
    return [decoder.decode(trace.spelling or b"", final=rank == last) for rank, trace in enumerate(traces)]


def _words(text: str) -> list[str]:
    parts = text.split(" ")
    return [part if rank == 0 else f" {part}" for rank, part in enumerate(parts)]


def _trace(step: Mapping[str, Any]) -> Trace:
    def candidates(found: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, float], ...]:
        return tuple((each["token"], each["prob"]) for each in found)

    return Trace(
        step["token"],
        step["consulted"],
        {member: candidates(found) for member, found in step["members"].items()},
        candidates(step["fused"]),
        step["agreed"],
        step["weights"],
        step["left_out"],
        None if step["draft"] is None else DraftTrace(**step["draft"]),
        step["prob"],
        step["entropy"],
        step["given"],
        step["unmapped"],
        None if step["bytes"] is None else bytes(step["bytes"]),
    )
