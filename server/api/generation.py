"""What completions and chat share between schema and engine: parameters, counts, and the life of a stream.

Invariants: a whole answer is worded from all outputs of its stream joined; choice i of prompt p is request
p * num_sampled + i; its seed is the request's seed + i, so a prompt's choices do not depend on the prompts beside
it. Nothing here knows HTTP, or how an endpoint words its answers.
"""

from __future__ import annotations

import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from ensemble_core.decoding.requests import (
    LEAST_LOGPROB,
    GenerationRequest,
    Output,
    Overrides,
    Prompt,
    Trace,
    Weighting,
)
from ensemble_core.decoding.sampling_params import MAX_SEED, SamplingParams
from ensemble_core.errors import InvalidRequestError, NotReadyError
from server.edge.errors import RequestFailedError
from server.schema.answer import Answer, Candidate, PromptTokensDetails, TraceStep, Usage
from server.schema.sampling import EnsembleOptions, SamplingFields, WeightingChoice

if TYPE_CHECKING:
    from ensemble_core.runtime import OutputStream

# Fields that are parameters of the same name.
_SAME_NAME = (
    "min_tokens", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "seed", "repetition_penalty",
    "presence_penalty", "frequency_penalty", "temperature", "top_p", "min_p",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ticket:
    """One accepted body: the engine's requests, and what its stream reports."""

    id: str
    created: int
    model: str
    num_choices: int  # n: that the client gets of each prompt
    num_sampled: int  # best_of: that the engine makes of each prompt
    requests: tuple[GenerationRequest, ...]
    final_usage: bool
    running_usage: bool


@dataclass(slots=True)
class Tally:
    """Tokens so far: of each prompt once, of each choice. dropped: members that some choice has lost.

    A prompt's first choice alone computes it, so of the cached tokens that choices tell the fewest count.
    """

    num_sampled: int
    prompts: dict[int, int] = field(default_factory=dict)
    completions: dict[int, int] = field(default_factory=dict)
    cached: dict[int, int] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    def add(self, index: int, output: Output) -> None:
        """Take in the counts of one output."""
        prompt = index // self.num_sampled
        self.prompts[prompt] = output.num_prompt_tokens
        self.completions[index] = output.num_completion_tokens
        self.cached[prompt] = min(output.num_cached_tokens, self.cached.get(prompt, output.num_cached_tokens))
        self.dropped |= output.dropped

    def usage(self) -> Usage:
        """As the API reports it."""
        prompt, completion = sum(self.prompts.values()), sum(self.completions.values())
        usage = Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self.cached.values())),
        )
        if self.dropped:
            usage.dropped_members = dict(self.dropped)
        return usage


class Job(ABC):
    """A ticket and the wording of its answers."""

    def __init__(self, ticket: Ticket, sends_ids: bool) -> None:
        self.ticket = ticket
        self._sends_ids = sends_ids

    @abstractmethod
    def piece(self, index: int, output: Output, *, first: bool) -> Answer:
        """A chunk that tells one output of one choice. first: nothing was told of this choice before."""

    @abstractmethod
    def usage_chunk(self) -> Answer:
        """A chunk without choices."""

    @abstractmethod
    def whole(self, outputs: Sequence[Output]) -> Answer:
        """The answer out of each choice's joined outputs."""

    async def chunks(self, outputs: OutputStream) -> AsyncGenerator[BaseModel]:
        """The stream. Closing it closes `outputs`, which aborts what is unfinished.

        Raises RequestFailedError or NotReadyError where the engine gives up on one of the choices.
        """
        tally = Tally(self.ticket.num_sampled)
        begun: set[int] = set()
        async with aclosing(_checked(self.ticket, outputs)) as news:
            async for index, output in news:
                tally.add(index, output)
                if self.ticket.running_usage or self._says_something(output):
                    chunk = self.piece(index, output, first=index not in begun)
                    begun.add(index)
                    yield self._counted(chunk, tally.usage() if self.ticket.running_usage else None)
        if self.ticket.final_usage:
            yield self._counted(self.usage_chunk(), tally.usage())

    async def answer(self, outputs: OutputStream) -> BaseModel:
        """The whole answer; closes and raises as `chunks` does."""
        tally = Tally(self.ticket.num_sampled)
        parts: list[list[Output]] = [[] for _ in self.ticket.requests]
        async with aclosing(_checked(self.ticket, outputs)) as news:
            async for index, output in news:
                tally.add(index, output)
                parts[index].append(output)
        return self._counted(self.whole([join(each) for each in parts]), tally.usage())

    def _counted(self, chunk: Answer, usage: Usage | None) -> Answer:
        """A chunk's `usage` is only set where some chunk of this stream carries one."""
        if self.ticket.final_usage or self.ticket.running_usage:
            chunk.usage = usage
        return chunk

    def _says_something(self, output: Output) -> bool:
        news = (output.text, output.finish_reason, output.logprobs, output.traces)
        prompt = (output.prompt_text, output.prompt_logprobs)
        ids = self._sends_ids and (output.token_ids or output.prompt_token_ids)
        return any(news) or any(prompt) or bool(ids)


async def _checked(ticket: Ticket, outputs: OutputStream) -> AsyncGenerator[tuple[int, Output]]:
    """The outputs; raises what a failed, aborted or missing one stands for."""
    left = set(range(len(ticket.requests)))
    async with aclosing(outputs):
        async for index, output in outputs:
            if output.finish_reason == "error":
                raise RequestFailedError(output.error or "the engine failed at this request")
            if output.finish_reason == "abort":
                raise NotReadyError("the server is stopping and ended this request; try again later")
            if output.finish_reason is not None:
                left.discard(index)
            yield index, output
    if left:
        raise RequestFailedError("the engine stopped before all choices were done; try again")


def join(outputs: Sequence[Output]) -> Output:
    """All outputs of one request as if they had come at once."""
    return replace(
        outputs[-1],
        text="".join(each.text for each in outputs),
        token_ids=tuple(chain.from_iterable(each.token_ids for each in outputs)),
        logprobs=tuple(chain.from_iterable(each.logprobs for each in outputs)),
        traces=tuple(chain.from_iterable(each.traces for each in outputs)),
        prompt_logprobs=tuple(chain.from_iterable(each.prompt_logprobs for each in outputs)),
        prompt_text="".join(each.prompt_text for each in outputs),
        prompt_token_ids=tuple(chain.from_iterable(each.prompt_token_ids for each in outputs)),
    )


def make_ticket(
    body: SamplingFields,
    prefix: str,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    counts: tuple[int, int],
    add_special_tokens: bool = True,
) -> Ticket:
    """The engine's requests, prompt by prompt. prefix: of the id; counts: n and best_of, already bounded."""
    final_usage, running_usage = stream_options(body)
    ticket_id = f"{prefix}-{uuid.uuid4().hex}"
    overrides = to_overrides(body.ensemble)
    trace = bool(body.ensemble and body.ensemble.trace)
    num_choices, num_sampled = counts
    seeded = [_with_seed(params, index) for index in range(num_sampled)]
    requests = tuple(
        GenerationRequest(
            f"{ticket_id}-{rank * num_sampled + index}",
            body.model,
            prompt,
            each,
            overrides,
            add_special_tokens,
            trace,
            group=f"{ticket_id}-{rank}",
        )
        for rank, prompt in enumerate(prompts)
        for index, each in enumerate(seeded)
    )
    created = int(time.time())
    return Ticket(ticket_id, created, body.model, num_choices, num_sampled, requests, final_usage, running_usage)


def check_count(name: str, count: int, num_prompts: int, max_choices: int) -> int:
    """`count`, once prompts x count is known to be within bounds. name: the field it was sent as."""
    if count < 1:
        raise InvalidRequestError(f"{name} must be at least 1, got {count}", name)
    if num_prompts * count > max_choices:
        raise InvalidRequestError(
            f"prompts x {name} must be at most {max_choices} (server.max_choices), got {num_prompts} x {count}",
            name if num_prompts <= max_choices else "prompt",
        )
    return count


def stream_options(body: SamplingFields) -> tuple[bool, bool]:
    """(usage at the end, usage in each chunk). A whole answer has the former."""
    options = body.stream_options
    if not body.stream:
        if options is not None:
            raise InvalidRequestError("stream_options is only allowed with stream: true", "stream_options")
        return True, False
    if options is None:
        return False, False
    return bool(options.include_usage), bool(options.continuous_usage_stats)


def sampling_params(body: SamplingFields, **own: Any) -> SamplingParams:
    """Parameters of the fields that endpoints share and of the endpoint's own; null means the default.

    Raises InvalidRequestError.
    """
    sent = {name: getattr(body, name) for name in _SAME_NAME} | own
    if body.top_k is not None:
        sent["top_k"] = 0 if body.top_k == -1 else body.top_k
    if body.stop_token_ids is not None:
        sent["stop_token_ids"] = tuple(body.stop_token_ids)
    if body.logit_bias is not None:
        sent["logit_bias"] = tuple(body.logit_bias.items())
    return SamplingParams(stop=body.stops, **{name: value for name, value in sent.items() if value is not None})


def _with_seed(params: SamplingParams, index: int) -> SamplingParams:
    """Parameters of choice `index`: its seed is shifted, within the range of a signed 64-bit integer."""
    if params.seed is None or index == 0:
        return params
    return replace(params, seed=(params.seed + index + MAX_SEED + 1) % (2 * (MAX_SEED + 1)) - MAX_SEED - 1)


def to_overrides(options: EnsembleOptions | None) -> Overrides:
    """The engine's form of our extension."""
    if options is None:
        return Overrides()
    fusion, weighting = options.fusion, options.weighting
    return Overrides(
        members=None if options.members is None else tuple(options.members),
        weights=options.weights,
        weighting=None if weighting is None else _weighting(weighting),
        fusion=None if fusion is None else fusion.name,
        fusion_options=None if fusion is None else fusion.options,
        mode=options.mode,
    )


def _weighting(choice: WeightingChoice) -> Weighting:
    return Weighting(choice.by) if choice.tau is None else Weighting(choice.by, choice.tau)


def end_of(output: Output) -> Literal["stop", "length"] | None:
    """The reasons that a choice can carry; the others were raised before."""
    assert output.finish_reason in ("stop", "length", None)
    return output.finish_reason


def finite(logprob: float) -> float:
    """A log-probability that JSON can spell."""
    return max(logprob, LEAST_LOGPROB) if not math.isnan(logprob) else LEAST_LOGPROB


def trace_steps(traces: Sequence[Trace]) -> list[TraceStep]:
    """As the API reports them."""
    return [
        TraceStep(
            token=trace.token,
            consulted=trace.consulted,
            members={name: _candidates(proposed) for name, proposed in trace.members.items()},
            fused=_candidates(trace.fused),
            agreed=dict(trace.agreed),
            weights=dict(trace.weights),
            left_out=dict(trace.left_out),
        )
        for trace in traces
    ]


def _candidates(proposed: Sequence[tuple[str, float]]) -> list[Candidate]:
    return [Candidate(token=token, prob=prob) for token, prob in proposed]
