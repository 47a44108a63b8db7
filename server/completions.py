"""From a completion's schema to the engine's requests, and from the engine's outputs to chunks.

Invariant: a non-stream answer is the fold of its stream. Choice i of prompt p is request p * n + i; its seed is
the request's seed + i, so a prompt's choices do not depend on the prompts beside it. Nothing here knows HTTP.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ensemble_core.decoding.requests import GenerationRequest, Output, Overrides
from ensemble_core.decoding.sampling_params import MAX_SEED, SamplingParams
from ensemble_core.errors import InvalidRequestError, NotReadyError
from server.errors import RequestFailedError
from server.schemas import Choice, Completion, CompletionRequest, EnsembleOptions, Usage

if TYPE_CHECKING:
    from ensemble_core.runtime import OutputStream


@dataclass(frozen=True, slots=True)
class Job:
    """One accepted body: the engine's requests, and how its chunks look."""

    id: str
    created: int
    model: str
    num_choices: int  # n, of each prompt
    requests: tuple[GenerationRequest, ...]
    final_usage: bool
    running_usage: bool

    def chunk(self, choices: list[Choice], usage: Usage | None) -> Completion:
        """One chunk; its `usage` is only set where some chunk of this stream carries one."""
        chunk = Completion(
            id=self.id, object="text_completion", created=self.created, model=self.model, choices=choices
        )
        if self.final_usage or self.running_usage:
            chunk.usage = usage
        return chunk


@dataclass(slots=True)
class Tally:
    """Tokens so far: of each prompt once, of each choice."""

    num_choices: int
    prompts: dict[int, int] = field(default_factory=dict)
    completions: dict[int, int] = field(default_factory=dict)

    def add(self, index: int, output: Output) -> None:
        """Take in the counts of one output."""
        self.prompts[index // self.num_choices] = output.num_prompt_tokens
        self.completions[index] = output.num_completion_tokens

    def usage(self) -> Usage:
        """As the API reports it."""
        prompt, completion = sum(self.prompts.values()), sum(self.completions.values())
        return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def plan(body: CompletionRequest, max_choices: int) -> Job:
    """The job that a body asks for. Raises InvalidRequestError; bounds prompts x n before it allocates."""
    num_choices = check_choices(body, max_choices)
    options = stream_options(body)
    completion_id = f"cmpl-{uuid.uuid4().hex}"
    params = [sampling_params(body, index) for index in range(num_choices)]
    overrides = to_overrides(body.ensemble)
    texts = [(prompt, each) for prompt in body.prompts for each in params]
    requests = tuple(
        GenerationRequest(f"{completion_id}-{index}", body.model, prompt, each, overrides)
        for index, (prompt, each) in enumerate(texts)
    )
    return Job(completion_id, int(time.time()), body.model, num_choices, requests, *options)


def check_choices(body: CompletionRequest, max_choices: int) -> int:
    """n, once prompts x n is known to be within bounds."""
    num_choices = 1 if body.n is None else body.n
    num_prompts = len(body.prompts)
    if num_choices < 1:
        raise InvalidRequestError(f"n must be at least 1, got {num_choices}", "n")
    if num_prompts * num_choices > max_choices:
        raise InvalidRequestError(
            f"prompts x n must be at most {max_choices} (server.max_choices), got {num_prompts} x {num_choices}",
            "n" if num_prompts <= max_choices else "prompt",
        )
    return num_choices


def stream_options(body: CompletionRequest) -> tuple[bool, bool]:
    """(usage at the end, usage in each chunk). A non-stream answer is the fold of a stream with the former."""
    options = body.stream_options
    if not body.stream:
        if options is not None:
            raise InvalidRequestError("stream_options is only allowed with stream: true", "stream_options")
        return True, False
    if options is None:
        return False, False
    return bool(options.include_usage), bool(options.continuous_usage_stats)


def sampling_params(body: CompletionRequest, index: int) -> SamplingParams:
    """Parameters of choice `index` of a prompt; null means the default. Raises InvalidRequestError."""
    sent = {name: getattr(body, name) for name in ("max_tokens", "temperature", "top_p", "seed")}
    params = SamplingParams(**{name: value for name, value in sent.items() if value is not None}, stop=body.stops)
    if params.seed is None or index == 0:
        return params
    return SamplingParams(
        params.max_tokens, params.temperature, params.top_p, params.stop, _shifted(params.seed, index)
    )


def _shifted(seed: int, index: int) -> int:
    """seed + index, wrapped into the range of a signed 64-bit integer."""
    return (seed + index + MAX_SEED + 1) % (2 * (MAX_SEED + 1)) - MAX_SEED - 1


def to_overrides(options: EnsembleOptions | None) -> Overrides:
    """The engine's form of our extension."""
    if options is None:
        return Overrides()
    fusion = options.fusion
    return Overrides(
        members=None if options.members is None else tuple(options.members),
        weights=options.weights,
        fusion=None if fusion is None else fusion.name,
        fusion_options=None if fusion is None else fusion.options,
        mode=options.mode,
    )


async def chunks(job: Job, outputs: OutputStream) -> AsyncGenerator[Completion]:
    """The stream of a job. Closing it closes `outputs`, which aborts what is unfinished.

    Raises RequestFailedError or NotReadyError where the engine gives up on one of the choices.
    """
    tally = Tally(job.num_choices)
    finished: set[int] = set()
    async with aclosing(outputs):
        async for index, output in outputs:
            tally.add(index, output)
            choice = to_choice(index, output)
            if choice.finish_reason is not None:
                finished.add(index)
            if choice.text or choice.finish_reason is not None or job.running_usage:
                yield job.chunk([choice], tally.usage() if job.running_usage else None)
    if len(finished) < len(job.requests):
        raise RequestFailedError("the engine stopped before all choices were done; try again")
    if job.final_usage:
        yield job.chunk([], tally.usage())


def to_choice(index: int, output: Output) -> Choice:
    """One output as a piece of its choice. Raises what a failed or aborted one stands for."""
    if output.finish_reason == "error":
        raise RequestFailedError(output.error or "the engine failed at this request")
    if output.finish_reason == "abort":
        raise NotReadyError("the server is stopping and ended this request; try again later")
    return Choice(
        index=index,
        text=output.text,
        logprobs=None,
        finish_reason=output.finish_reason,
        stop_reason=output.stop_reason,
    )


async def fold(job: Job, stream: AsyncIterator[Completion]) -> Completion:
    """The whole answer: texts joined, each choice's end, the usage of the last chunk."""
    texts: dict[int, list[str]] = {index: [] for index in range(len(job.requests))}
    ends: dict[int, Choice] = {}
    usage: Usage | None = None
    async for chunk in stream:
        usage = chunk.usage or usage
        for piece in chunk.choices:
            texts[piece.index].append(piece.text)
            ends[piece.index] = piece
    choices = [ends[index].model_copy(update={"text": "".join(text)}) for index, text in texts.items()]
    return job.chunk(choices, usage)
