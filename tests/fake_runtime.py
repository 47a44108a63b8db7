"""A scripted runtime: what the HTTP edge sees of the engine, without an engine.

Each request answers with the pieces of `script` (or its own, by prompt), one piece a token: text, or news of a call;
a prompt counts one token a word. Log-probabilities, traces and echoes are filled where they were asked for, as an
engine does. It records what it was asked for, what was aborted, and whether it was drained and stopped.
"""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import time
import zlib
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import uvicorn

from ensemble_core.decoding.requests import (
    Alternative,
    Conversation,
    GenerationRequest,
    Output,
    Prompt,
    TokenLogprob,
    Trace,
)
from ensemble_core.errors import InvalidRequestError, ModelNotFoundError, NotReadyError, quoted
from ensemble_core.server_config import ServerConfig
from ensemble_core.text.tools import CallPiece
from server.edge.app import create_app
from server.edge.metrics import PrometheusMetrics
from server.edge.serving import settings_of

if TYPE_CHECKING:
    from ensemble_core.runtime import Runtime

VOCAB_SIZE = 10_000


@dataclass(frozen=True, slots=True)
class FakeStatus:
    state: str
    reason: str


@dataclass(frozen=True, slots=True)
class FakeModel:
    name: str
    kind: str
    max_model_len: int
    recipe: dict[str, Any] | None
    lacks: dict[str, str] = field(default_factory=dict)
    parent: str | None = None


@dataclass(frozen=True, slots=True)
class FakeTokenized:
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    max_model_len: int


RECIPE = {
    "members": {"a": 0.5, "b": 0.5},
    "main": "a",
    "fusion": {"name": "relative", "options": {}},
    "mode": "lockstep",
}
MODELS = [
    FakeModel("duo", "ensemble", 512, RECIPE),
    FakeModel("a", "member", 512, None),
    FakeModel("b", "member", 1024, None, parent="a"),
]


def words_of(prompt: Prompt) -> list[str]:
    """The prompt's tokens: words with the space before them; ids are words that spell the id."""
    if isinstance(prompt, Conversation):
        turns = [f"<{message['role']}>{message['content']}" for message in prompt.messages]
        return words_of("\n".join(turns if prompt.continue_final else [*turns, "<assistant>"]))
    if isinstance(prompt, tuple):
        return [f" t{token_id}" for token_id in prompt]
    return re.findall(r"\s*\S+|\s+$", prompt)


def id_of(word: str) -> int:
    named = re.fullmatch(r" t(\d+)", word)
    return int(named[1]) if named else zlib.crc32(word.encode()) % VOCAB_SIZE


def outputs_of(pieces: Sequence[str | CallPiece], prompt: Prompt, finish: str = "stop") -> list[Output]:
    """One output a piece; the last has the finish reason."""
    words = len(words_of(prompt))
    last = len(pieces) - 1
    if any(isinstance(piece, CallPiece) for piece in pieces):
        finish = "tool_calls"
    made: list[Output] = []
    for rank, piece in enumerate(pieces):
        text, calls = (piece, ()) if isinstance(piece, str) else ("", (piece,))
        reason: Any = finish if rank == last else None
        made.append(Output(text, (rank,), words, rank + 1, reason, calls=calls))
    return made


def logprob_of(token_id: int, seed: int | None) -> float:
    """Some exact number that depends on the token and the seed."""
    return -((token_id * 7 + (seed or 0) * 3) % 16 + 1) / 8


def entry(token_id: int, text: str, offset: int, num_top: int, seed: int | None) -> TokenLogprob:
    logprob = logprob_of(token_id, seed)
    own = Alternative(token_id, text.encode(), logprob)
    others = [Alternative(token_id + k, f"alt{k}".encode(), logprob - k / 4) for k in range(1, num_top)]
    return TokenLogprob(token_id, text.encode(), logprob, offset, (own, *others))


def trace_of(text: str) -> Trace:
    proposed = {"a": ((text, 0.5), ("x", 0.25)), "b": (("y", 0.75),)}
    return Trace(
        text,
        True,
        proposed,
        ((text, 0.375),),
        {"b": False},
        {"a": 0.5, "b": 0.5},
        prob=0.375,
        entropy=1.0,
        given={"a": 0.5, "b": None},
        unmapped={"a": 0.0, "b": 0.02},
        spelling=text.encode(),
    )


@dataclass
class FakeRuntime:
    script: Sequence[str | CallPiece] = (" Hello", " wörld", " 😀", "!")
    outputs: dict[Any, list[Output]] = field(default_factory=dict)  # prompt -> its own outputs
    refuse: Exception | None = None  # raised by submit
    refuse_once: list[Exception] = field(default_factory=list)  # raised by the first submits
    breaks: Exception | None = None  # raised in place of the last output
    endless: bool = False  # repeats the script until it is closed
    delay: float = 0.0  # seconds before each output
    state: str = "ready"
    reason: str = ""
    load_error: Exception | None = None
    seen: list[GenerationRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    num_places: int = 32
    num_open: int = 0  # submitted and not over
    aborting: bool = False

    def start(self) -> None:
        self.log.append("start")

    def wait_ready(self) -> None:
        if self.load_error is not None:
            raise self.load_error

    def status(self) -> FakeStatus:
        return FakeStatus(self.state, self.reason)

    def models(self) -> list[FakeModel]:
        return MODELS

    def strategies(self) -> dict[str, dict[str, Any]]:
        steps = {"type": "integer", "minimum": 1, "maximum": 10, "default": 3, "description": "Steps."}
        solver = {"enum": ["em", "search"], "type": "string", "default": "em", "description": "The solver."}
        options = {"type": "object", "properties": {"solver": solver, "steps": steps}}
        return {"fusions": {"relative": options, "plain": {"properties": {}}}, "modes": {"lockstep": options}}

    def _model(self, name: str) -> FakeModel:
        if self.state != "ready":
            raise NotReadyError(f"the engine is {self.state}")
        for model in MODELS:
            if model.name == name:
                return model
        raise ModelNotFoundError(f"model {quoted(name)} is unknown; there are duo, a, b")

    async def tokenize(self, model: str, prompt: Any, add_special_tokens: bool = True) -> FakeTokenized:
        words = words_of(prompt)
        if add_special_tokens and isinstance(prompt, str):
            words = ["<s>", *words]
        return FakeTokenized(tuple(map(id_of, words)), tuple(words), self._model(model).max_model_len)

    async def tightest(self, model: str, prompt: Any) -> FakeTokenized:
        return await self.tokenize(model, prompt)

    async def detokenize(self, model: str, token_ids: Sequence[int]) -> str:
        self._model(model)
        self._check_ids(token_ids, "tokens")
        return "".join(words_of(tuple(token_ids)))

    def tokenizer_info(self, model: str) -> dict[str, Any]:
        found = self._model(model)
        return {
            "name": "a" if found.name == "duo" else found.name,
            "vocab_size": VOCAB_SIZE,
            "bos_token": "<s>",
            "bos_token_id": id_of("<s>"),
            "eos_token": "</s>",
            "eos_token_id": id_of("</s>"),
            "pad_token": None,
            "pad_token_id": None,
            "stop_ids": [id_of("</s>")],
            "chat_template": None,
            "max_model_len": found.max_model_len,
            "fingerprint": "0" * 16,
        }

    @staticmethod
    def _check_ids(token_ids: Sequence[int], param: str) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < VOCAB_SIZE:
                raise InvalidRequestError(f"{param}: token id {token_id} is not in 0..{VOCAB_SIZE - 1}", param)

    async def submit(self, requests: Sequence[GenerationRequest]) -> AsyncGenerator[tuple[int, Output], None]:
        if self.refuse_once:
            raise self.refuse_once.pop(0)
        if self.refuse is not None:
            raise self.refuse
        for request in requests:
            self._check(request)
        self.seen.extend(requests)
        return self._run(list(requests))

    def _check(self, request: GenerationRequest) -> None:
        room = self._model(request.model).max_model_len - len(words_of(request.prompt))
        if isinstance(request.prompt, tuple):
            self._check_ids(request.prompt, "prompt")
        self._check_ids(request.params.stop_token_ids, "stop_token_ids")
        self._check_ids([token_id for token_id, _ in request.params.logit_bias], "logit_bias")
        self._check_ids(list(request.params.allowed_token_ids), "allowed_token_ids")
        if room < request.params.max_tokens:
            param = "prompt" if room < 1 else "max_tokens"
            raise InvalidRequestError(f"{param}: the context has room for {room} tokens", param)

    async def _run(self, requests: list[GenerationRequest]) -> AsyncGenerator[tuple[int, Output], None]:
        open_ids = {request.request_id for request in requests}
        self.num_open += 1
        try:
            async for index, output in self._interleaved(requests):
                if self.aborting:
                    yield index, Output("", (), 1, 0, "abort")
                    return
                if output.finish_reason is not None:
                    open_ids.discard(requests[index].request_id)
                yield index, output
        finally:
            self.num_open -= 1
            self.aborted.extend(sorted(open_ids))

    async def _interleaved(self, requests: list[GenerationRequest]) -> AsyncGenerator[tuple[int, Output], None]:
        """Step by step over all requests, as an engine does."""
        scripts = [self._outputs(request) for request in requests]
        step = 0
        while self.endless or step < max(map(len, scripts)):
            for index, script in enumerate(scripts):
                if not self.endless and step >= len(script):
                    continue
                await asyncio.sleep(self.delay)
                if self.breaks is not None and step == len(script) - 1:
                    raise self.breaks
                yield index, self._output(script, step)
            step += 1

    def _output(self, script: list[Output], step: int) -> Output:
        if not self.endless:
            return script[step]
        return Output(script[step % len(script)].text, (step,), 1, step + 1)

    def _outputs(self, request: GenerationRequest) -> list[Output]:
        own = None if isinstance(request.prompt, Conversation) else self.outputs.get(request.prompt)
        if own:
            return own
        outputs = outputs_of(self.script, request.prompt)
        if request.params.max_tokens == 0:
            outputs = [replace(outputs[0], text="", token_ids=(), num_completion_tokens=0, finish_reason="length")]
        return _with_extras(request, outputs)

    async def drain(self, seconds: float) -> None:
        self.state = "draining"
        self.log.append(f"drain {seconds:g}")
        deadline = time.monotonic() + seconds
        while self.num_open and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        self.aborting = True

    def abort_all(self) -> None:
        self.state, self.aborting = "draining", True

    def stop(self, seconds: float = 10.0) -> bool:
        if self.state != "dead":
            self.log.append("stop")
        self.state = "dead"
        return True


def _with_extras(request: GenerationRequest, outputs: list[Output]) -> list[Output]:
    """What was asked for beside text."""
    params, words = request.params, words_of(request.prompt)
    offset = sum(map(len, words)) if params.echo else 0
    filled = []
    for output in outputs:
        fields: dict[str, Any] = {}
        if params.logprobs is not None and output.token_ids:
            told = entry(output.token_ids[0], output.text, offset, params.logprobs, params.seed)
            fields["logprobs"] = (told,)
        if request.trace and output.token_ids:
            fields["traces"] = (trace_of(output.text),)
        offset += len(output.text)
        filled.append(replace(output, **fields))
    filled[0] = replace(filled[0], prompt_token_ids=tuple(map(id_of, words)), **_echo(request, words))
    return filled


def _echo(request: GenerationRequest, words: list[str]) -> dict[str, Any]:
    params = request.params
    text = {"prompt_text": "".join(words)} if params.echo else {}
    if not params.scores_prompt:
        return text
    num_top = max(params.logprobs or 0, params.prompt_logprobs or 0)
    entries, offset = [], 0
    for rank, word in enumerate(words):
        if rank == 0:
            entries.append(TokenLogprob(id_of(word), word.encode(), None, 0))
        else:
            entries.append(replace(entry(id_of(word), word, offset, num_top, None), rank=1))
        offset += len(word)
    return text | {"prompt_logprobs": tuple(entries)}


@contextmanager
def live_server(
    runtime: FakeRuntime | Runtime,
    config: ServerConfig | None = None,
    metrics: PrometheusMetrics | None = None,
    stored: Sequence[Mapping[str, Any]] = (),
) -> Iterator[str]:
    """A real server on a free loopback port, in a thread; yields its address."""
    config = config or ServerConfig()
    listener = socket.create_server(("127.0.0.1", 0))
    app = create_app(runtime, config, metrics or PrometheusMetrics(), stored)  # type: ignore[arg-type]
    server = uvicorn.Server(settings_of(app, config))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        scheme = "http" if config.tls_cert_file is None else "https"
        yield f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()
