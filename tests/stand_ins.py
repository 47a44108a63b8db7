"""Stand-ins for inference servers: the dialects of vLLM, llama.cpp and SGLang over a fake member's numbers.

They follow the servers' documents, and what was seen of the real ones; a test that needs the real thing says so.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from processes import free_port

from ensemble_core.members.fake import FakeMember


class StandIn:
    """A server's state, which tests change while it runs."""

    def __init__(self, member: FakeMember, *, max_logprobs: int = 1000, key: str = "", max_len: int = 256) -> None:
        self.member, self.max_logprobs, self.key, self.max_len = member, max_logprobs, key, max_len
        self.processed = False  # tells numbers after the temperature
        self.other_tokens = False  # spells texts otherwise
        self.broken = 0  # status of every answer to a question
        self.hangs = 0.0  # seconds before an answer to a question
        self.garbled = False
        self.requests: list[dict[str, Any]] = []

    def logprobs(self, ids: Sequence[int], temperature: float) -> torch.Tensor:
        logits = self.member.next_logits(list(ids))
        return torch.log_softmax(logits / (temperature or 1.0) if self.processed else logits, dim=0)

    def top(self, ids: Sequence[int], num: int, temperature: float) -> dict[int, float]:
        told = self.logprobs(ids, temperature)
        values, places = told.topk(min(num, len(told)))
        return dict(zip(places.tolist(), values.tolist(), strict=True))

    def tokens(self, text: str) -> list[int]:
        ids = list(self.member.vocabulary.encode(text))
        return ids[1:] if self.other_tokens else ids


def _guard(app: FastAPI, state: StandIn) -> None:
    @app.middleware("http")
    async def check(request: Request, proceed: Any) -> Any:
        if state.key and request.headers.get("authorization") != f"Bearer {state.key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        if request.url.path in ("/v1/completions", "/completion", "/generate"):
            state.requests.append(await request.json())
            if state.hangs:
                await asyncio.sleep(state.hangs)
            if state.broken:
                return JSONResponse({"error": {"message": "told to fail"}}, state.broken)
            if state.garbled:
                return JSONResponse({"choices": [{"index": 0, "logprobs": None}]})
        return await proceed(request)


def _listing(state: StandIn) -> FastAPI:
    """What vLLM and SGLang have in common."""
    app = FastAPI()
    _guard(app, state)

    @app.get("/v1/models")
    def models() -> Any:
        return {"data": [{"id": "tiny", "max_model_len": state.max_len}]}

    @app.post("/tokenize")
    def tokenize(body: dict[str, Any]) -> Any:
        assert not body["add_special_tokens"]
        return {"tokens": state.tokens(body["prompt"])}

    return app


def vllm(state: StandIn) -> FastAPI:
    app = _listing(state)

    @app.post("/v1/completions")
    def complete(body: dict[str, Any]) -> Any:
        if body["logprobs"] > state.max_logprobs:
            message = (
                f"Requested sample logprobs of {body['logprobs']}, greater than max allowed: {state.max_logprobs}"
            )
            return JSONResponse({"error": {"message": message}}, 400)
        assert body["max_tokens"] == 1
        assert body["return_tokens_as_token_ids"]
        choices = []
        for index, ids in enumerate(body["prompt"]):
            top = state.top(ids, body["logprobs"], body["temperature"])
            if named := body.get("logprob_token_ids"):
                assert len(named) <= 128
                told = state.logprobs(ids, body["temperature"])
                best = next(iter(top))
                top = {token_id: float(told[token_id]) for token_id in (best, *named)}
            entries = {f"token_id:{token_id}": logprob for token_id, logprob in top.items()}
            choices.append({"index": index, "logprobs": {"top_logprobs": [entries]}})
        return {"choices": choices[::-1]}

    return app


def llamacpp(state: StandIn) -> FastAPI:
    app = FastAPI()
    _guard(app, state)

    @app.get("/props")
    def props() -> Any:
        return {"model_alias": "tiny", "default_generation_settings": {"n_ctx": state.max_len}}

    @app.post("/tokenize")
    def tokenize(body: dict[str, Any]) -> Any:
        return {"tokens": state.tokens(body["content"])}

    @app.post("/completion")
    def complete(body: dict[str, Any]) -> Any:
        answers = []
        for index, ids in enumerate(body["prompt"]):
            top = state.top(ids, body["n_probs"], body["temperature"])
            entries = [{"id": i, "token": "?", "bytes": [], "logprob": p} for i, p in top.items()]
            answers.append({"index": index, "completion_probabilities": [{"top_logprobs": entries}]})
        return answers if len(answers) > 1 else answers[0]

    return app


def sglang(state: StandIn) -> FastAPI:
    app = _listing(state)

    @app.post("/generate")
    def generate(body: dict[str, Any]) -> Any:
        temperature, num = body["sampling_params"]["temperature"], body["top_logprobs_num"]
        answers = []
        named = body.get("token_ids_logprob") or [[]] * len(body["input_ids"])
        for ids, start, also in zip(body["input_ids"], body["logprob_start_len"], named, strict=True):
            ends = [ids[:end] for end in range(start, len(ids))] if start >= 0 else []
            answers.append({"meta_info": _told(state, ids, ends, num, also, temperature)})
        return answers

    def _told(state: StandIn, ids: Any, ends: Any, num: int, also: Any, temperature: float) -> dict[str, Any]:
        def triples(row: dict[int, float]) -> list[Any]:
            return [[logprob, token_id, None] for token_id, logprob in row.items()]

        def asked(end: Any) -> list[Any]:
            told = state.logprobs(end, temperature)
            return triples({token_id: float(told[token_id]) for token_id in also})

        return {
            "input_top_logprobs": [triples(state.top(end, num, temperature)) if end else None for end in ends],
            "output_top_logprobs": [triples(state.top(ids, num, temperature))],
            "input_token_ids_logprobs": [asked(end) if end else None for end in ends],
            "output_token_ids_logprobs": [asked(ids)],
        }

    return app


APPS = {"vllm": vllm, "llamacpp": llamacpp, "sglang": sglang}


class Running:
    """A stand-in behind a port, which can end and come back."""

    def __init__(self, kind: str, state: StandIn) -> None:
        self._app, self.port = APPS[kind](state), free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        config = uvicorn.Config(self._app, port=self.port, log_config=None, timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10.0)


@contextmanager
def standing_in(kind: str, state: StandIn) -> Iterator[Running]:
    running = Running(kind, state)
    running.start()
    try:
        yield running
    finally:
        running.stop()
