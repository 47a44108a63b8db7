"""An engine for councils that answers by a script: what `Chamber` sees of the engine, without one.

`answer(request)` gives the words of a text, an error to raise, or a `Failure` after some words. Each word is a token.
It records what was asked, what was ended early, and how many places are held.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ensemble_core.config import Config
from ensemble_core.councils.book import CouncilBook
from ensemble_core.councils.chamber import Chamber
from ensemble_core.councils.door import EngineDoor
from ensemble_core.decoding.requests import (
    Alternative,
    Conversation,
    GenerationRequest,
    Output,
    Prompt,
    TokenLogprob,
    join,
)
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.errors import QueueFullError
from ensemble_core.stats import Stats
from ensemble_core.streaming import OutputStream


@dataclass(frozen=True, slots=True)
class Failure:
    """Some words, and then the engine fails."""

    words: Sequence[str] = ()


Script = str | Exception | Failure


@dataclass
class Held:
    engine: ScriptedEngine
    num: int

    def release(self) -> None:
        self.engine.num_places -= self.num


@dataclass
class ScriptedEngine:
    """See the module."""

    answer: Callable[[GenerationRequest], Script]
    seconds: Callable[[GenerationRequest], float] = lambda _request: 0.0  # before each word
    most_places: int = 10_000
    contexts: int = 100_000
    seen: list[GenerationRequest] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)  # request ids that were aborted
    num_places: int = 0
    most_open: int = 0
    num_open: int = 0
    stats: list[Stats] = field(default_factory=list)

    def door(self) -> EngineDoor:
        return EngineDoor(self._submit, self._room, self._reserve, lambda abort: OutputStream(abort))

    def chamber(self, config: Config) -> Chamber:
        return Chamber(CouncilBook(config), self.door(), self.stats.append)

    async def _room(self, _model: str, prompt: Prompt) -> int:
        return self.contexts - len(text_of(prompt).split())

    async def _reserve(self, _model: str, places: int) -> Held:
        if self.num_places + places > self.most_places:
            raise QueueFullError("the queue is full")
        self.num_places += places
        return Held(self, places)

    async def _submit(self, requests: Sequence[GenerationRequest]) -> OutputStream:
        (request,) = requests
        assert request.reserved
        self.seen.append(request)
        script = self.answer(request)
        if isinstance(script, Exception):
            raise script
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        task = asyncio.create_task(self._say(request, script))

        def abort(_ids: list[int]) -> None:
            self.ended.append(request.request_id)
            self.num_open -= 1
            task.cancel()

        stream = OutputStream(abort)
        stream.follow([0])
        self._of[request.request_id] = stream
        return stream

    _of: dict[str, OutputStream] = field(default_factory=dict)

    async def _say(self, request: GenerationRequest, script: str | Failure) -> None:
        await asyncio.sleep(0)
        stream = self._of[request.request_id]
        for output in outputs_of(request, script):
            if (pause := self.seconds(request)) > 0:
                await asyncio.sleep(pause)
            if output.finish_reason is not None:
                self.num_open -= 1
            stream.put(0, output)


def outputs_of(request: GenerationRequest, script: str | Failure) -> list[Output]:
    """A token a word; cut at the length limit."""
    failing = isinstance(script, Failure)
    words = list(script.words) if isinstance(script, Failure) else words_of(script)
    most = request.params.max_tokens
    reason: Any = "error" if failing else ("length" if len(words) > most else "stop")
    words = words[:most] or [""]
    num_prompt = len(text_of(request.prompt).split())
    made = [
        Output(
            word,
            (rank,),
            num_prompt,
            rank + 1,
            logprobs=() if request.params.logprobs is None else (_logprob(word, rank),),
        )
        for rank, word in enumerate(words)
    ]
    made[-1] = replace(made[-1], finish_reason=reason, error="the member broke" if failing else None)
    return made


def _logprob(word: str, rank: int) -> TokenLogprob:
    own = Alternative(rank, word.encode(), -0.1)
    others = (Alternative(1000, b" A", -3.0), Alternative(1001, b" B", -3.0))
    return TokenLogprob(rank, word.encode(), -0.1, 0, (own, *others))


def words_of(text: str) -> list[str]:
    parts = text.split(" ")
    return [word if rank == 0 else f" {word}" for rank, word in enumerate(parts)]


def text_of(prompt: Prompt) -> str:
    if isinstance(prompt, Conversation):
        return "\n".join(f"<{message['role']}>{message['content']}" for message in prompt.messages)
    return str(prompt)


def asked(model: str, prompt: Prompt = "What is 6 x 7?", count: int = 1, **params: Any) -> list[GenerationRequest]:
    """`n` choices of one prompt, as the edge makes them."""
    own = {"max_tokens": 64, "seed": 5} | params
    return [
        GenerationRequest(
            f"r-{rank}",
            model,
            prompt,
            SamplingParams(**(own | {"seed": None if own["seed"] is None else own["seed"] + rank})),
            group="r",
        )
        for rank in range(count)
    ]


def council(kind: str, **fields: Any) -> dict[str, Any]:
    return {"kind": kind, **fields}


async def whole(chamber: Chamber, requests: Sequence[GenerationRequest]) -> list[Output]:
    """All choices, joined."""
    parts: list[list[Output]] = [[] for _ in requests]
    stream = await chamber.submit(requests)
    async for index, output in stream:
        parts[index].append(output)
    return [join(each) for each in parts]


def as_json(**fields: Any) -> str:
    """An answer of a discussion; without spaces, so that it is one token."""
    return json.dumps(fields, separators=(",", ":"))
