"""From the engine's outputs to an answer: streaming, usage, and what the endpoints share.

Invariant: a whole answer is made from all outputs of its stream, joined. Nothing here knows HTTP, or the form of an
endpoint's answers.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel

from ensemble_core.decoding.requests import (
    LEAST_LOGPROB,
    Alternative,
    CouncilReport,
    Output,
    TokenLogprob,
    Trace,
    join,
)
from ensemble_core.errors import InvalidRequestError, NotReadyError
from server.api.streams import Wire
from server.api.tickets import Ticket
from server.edge.errors import RequestFailedError
from server.schema.replies import (
    CallUsage,
    CompletionTokensDetails,
    PromptToken,
    PromptTokensDetails,
    Reply,
    TracedDraft,
    TracedToken,
    TraceStep,
    Usage,
)
from server.schema.sampling import SamplingFields

if TYPE_CHECKING:
    from ensemble_core.runtime import OutputStream


@dataclass(slots=True)
class Tally:
    """Tokens so far, for each prompt and for each choice.

    dropped: members that some choice has lost. reasons: why each choice ended. first: when the first output came, by
    time.perf_counter(). served_by, reports: of choices that a council answers; then usage counts all its calls.

    Only the first choice of a prompt computes the prompt; the others find it cached. So a prompt's cached tokens are
    the fewest that any of its choices reports.
    """

    num_sampled: int
    prompts: dict[int, int] = field(default_factory=dict)
    completions: dict[int, int] = field(default_factory=dict)
    cached: dict[int, int] = field(default_factory=dict)
    reasoning: dict[int, int] = field(default_factory=dict)  # of choices whose model may reason
    dropped: dict[str, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    first: float | None = None
    served_by: dict[int, str] = field(default_factory=dict)
    reports: dict[int, CouncilReport] = field(default_factory=dict)

    def add(self, index: int, output: Output) -> None:
        """Add the counts of one output."""
        if self.first is None:
            self.first = time.perf_counter()
        if output.finish_reason is not None:
            self.reasons[index] = output.finish_reason
        prompt = index // self.num_sampled
        self.prompts[prompt] = output.num_prompt_tokens
        self.completions[index] = output.num_completion_tokens
        self.cached[prompt] = min(output.num_cached_tokens, self.cached.get(prompt, output.num_cached_tokens))
        if output.num_reasoning_tokens is not None:
            self.reasoning[index] = output.num_reasoning_tokens
        self.dropped |= output.dropped
        if output.served_by:
            self.served_by[index] = output.served_by
        if output.report is not None:
            self.reports[index] = output.report

    @property
    def servers(self) -> str | None:
        """The models that answer for a council, each once; None: no council is asked."""
        return ", ".join(dict.fromkeys(self.served_by.values())) or None

    def usage(self) -> Usage:
        """The counts in the API's form."""
        prompt, completion = sum(self.prompts.values()), sum(self.completions.values())
        cached, reasoning = sum(self.cached.values()), sum(self.reasoning.values())
        calls = [(index, call) for index, report in sorted(self.reports.items()) for call in report.calls]
        if calls:
            prompt = sum(call.prompt_tokens for _, call in calls)
            completion = sum(call.completion_tokens for _, call in calls)
            cached = sum(call.cached_tokens for _, call in calls)
            reasoning = sum(call.reasoning_tokens for _, call in calls)
        usage = Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        )
        if self.reasoning or reasoning:
            usage.completion_tokens_details = CompletionTokensDetails(reasoning_tokens=reasoning)
        if calls:
            usage.calls = [CallUsage(choice=index, **asdict(call)) for index, call in calls]
        if self.dropped:
            usage.dropped_members = dict(self.dropped)
        return usage


class Job(ABC):
    """A ticket, and how its outputs become answers. wire: how the chunks of its stream are written."""

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket
        self.tally = Tally(ticket.num_sampled)
        self.wire = Wire()

    @abstractmethod
    def chunks(self, outputs: OutputStream) -> AsyncGenerator[BaseModel]:
        """The chunks of the stream. Closing it closes `outputs`, which aborts unfinished requests.

        Raises RequestFailedError or NotReadyError if the engine gives up on one of the choices.
        """

    @abstractmethod
    async def answer(self, outputs: OutputStream) -> BaseModel:
        """The whole answer. Closes `outputs` and raises errors as `chunks` does."""

    def headers(self) -> dict[str, str]:
        """Headers of the answer, by what is known of it now."""
        servers = self.tally.servers
        return {} if servers is None else {"X-Served-By": servers}


class EventJob(Job):
    """A job whose answer is one text, told in events of its own."""

    @abstractmethod
    def _events(self, output: Output, *, first: bool) -> Iterable[BaseModel]:
        """What one output tells. first: of the answer; the tally has counted it."""

    @abstractmethod
    def _end(self, output: Output, traces: list[Trace]) -> Iterable[BaseModel]:
        """What follows the last output. traces: of all outputs."""

    async def chunks(self, outputs: OutputStream) -> AsyncGenerator[BaseModel]:
        """See `Job`."""
        first, traces = True, list[Trace]()
        async with aclosing(checked(self.ticket, outputs)) as news:
            async for index, output in news:
                self.tally.add(index, output)
                traces += output.traces
                for each in self._events(output, first=first):
                    yield each
                first = False
                if output.finish_reason is not None:
                    for each in self._end(output, traces):
                        yield each


class ChoiceJob(Job):
    """A job whose answer is a list of choices."""

    def __init__(self, ticket: Ticket, body: SamplingFields) -> None:
        """Raises InvalidRequestError for what a stream cannot tell."""
        if body.stream and body.prompt_logprobs is not None:
            raise InvalidRequestError("prompt_logprobs cannot be streamed; drop it or stream", "prompt_logprobs")
        super().__init__(ticket)
        self._sends_ids = bool(body.return_token_ids)
        self._names_ids = bool(body.return_tokens_as_token_ids)
        self._num_prompt_top = body.prompt_logprobs

    @abstractmethod
    def piece(self, index: int, output: Output, *, first: bool) -> Reply:
        """A chunk for one output of one choice. first: this is the choice's first chunk."""

    @abstractmethod
    def usage_chunk(self) -> Reply:
        """A chunk without choices."""

    @abstractmethod
    def whole(self, outputs: Sequence[Output]) -> Reply:
        """The answer from each choice's joined outputs."""

    async def chunks(self, outputs: OutputStream) -> AsyncGenerator[BaseModel]:
        """See `Job`."""
        tally = self.tally
        begun: set[int] = set()
        async with aclosing(checked(self.ticket, outputs)) as news:
            async for index, output in news:
                tally.add(index, output)
                if self.ticket.running_usage or self._says_something(output):
                    chunk = self.piece(index, output, first=index not in begun)
                    begun.add(index)
                    if output.served_by:
                        chunk.served_by = output.served_by
                    yield self._counted(chunk, tally.usage() if self.ticket.running_usage else None)
        if self.ticket.final_usage:
            yield self._counted(self._served(self.usage_chunk()), tally.usage())

    async def answer(self, outputs: OutputStream) -> BaseModel:
        """See `Job`."""
        tally = self.tally
        parts: list[list[Output]] = [[] for _ in self.ticket.requests]
        async with aclosing(checked(self.ticket, outputs)) as news:
            async for index, output in news:
                tally.add(index, output)
                parts[index].append(output)
        reply = self.whole([join(each) for each in parts])
        reply.close()
        return self._counted(self._served(reply), tally.usage())

    def _prompt_logprobs(self, output: Output) -> list[dict[int, PromptToken] | None] | None:
        most = self._num_prompt_top
        return None if most is None else prompt_logprobs(output.prompt_logprobs, most)

    def _served(self, reply: Reply) -> Reply:
        if self.tally.servers is not None:
            reply.served_by = self.tally.servers
        return reply

    def _counted(self, chunk: Reply, usage: Usage | None) -> Reply:
        """The chunk, with its `usage` set if any chunk of this stream carries one."""
        if self.ticket.final_usage or self.ticket.running_usage:
            chunk.usage = usage
        return chunk

    def _says_something(self, output: Output) -> bool:
        news = (output.text, output.calls, output.finish_reason, output.logprobs, output.traces)
        prompt = (output.prompt_text, output.prompt_logprobs)
        ids = self._sends_ids and (output.token_ids or output.prompt_token_ids)
        return any(news) or any(prompt) or bool(ids)


async def checked(ticket: Ticket, outputs: OutputStream) -> AsyncGenerator[tuple[int, Output]]:
    """The outputs. Raises an error for a failed, aborted or missing one."""
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


def end_of(output: Output) -> Literal["stop", "length", "tool_calls"] | None:
    """The finish reason that a choice reports. Errors and aborts were raised before."""
    assert output.finish_reason in ("stop", "length", "tool_calls", None)
    return output.finish_reason


def finite(logprob: float) -> float:
    """A log-probability that JSON can represent."""
    return max(logprob, LEAST_LOGPROB) if not math.isnan(logprob) else LEAST_LOGPROB


def token_name(each: Alternative | TokenLogprob, as_ids: bool) -> str:
    """A token's name in log-probabilities: its text, or its id where that was asked for."""
    return f"token_id:{each.token_id}" if as_ids else each.text


def prompt_logprobs(tokens: Sequence[TokenLogprob], num_top: int) -> list[dict[int, PromptToken] | None]:
    """vLLM's form: id -> log-probability, rank and text, of each token and of its likeliest alternatives."""
    return [_ranked(token, num_top) for token in tokens]


def _ranked(token: TokenLogprob, num_top: int) -> dict[int, PromptToken] | None:
    if token.logprob is None or token.rank is None:
        return None
    found = {token.token_id: PromptToken(logprob=finite(token.logprob), rank=token.rank, decoded_token=token.text)}
    for rank, each in enumerate(token.top[:num_top], start=1):
        other = PromptToken(logprob=finite(each.logprob), rank=rank, decoded_token=each.text)
        found.setdefault(each.token_id, other)
    return found


def trace_steps(traces: Sequence[Trace]) -> list[TraceStep]:
    """Traces in the API's form."""
    return [
        TraceStep(
            token=trace.token,
            consulted=trace.consulted,
            members={name: _traced(proposed) for name, proposed in trace.members.items()},
            fused=_traced(trace.fused),
            agreed=dict(trace.agreed),
            weights=dict(trace.weights),
            left_out=dict(trace.left_out),
            draft=None if trace.draft is None else TracedDraft(**asdict(trace.draft)),
            prob=trace.prob,
            entropy=trace.entropy,
            given=dict(trace.given),
            unmapped=dict(trace.unmapped),
            bytes=None if trace.spelling is None else list(trace.spelling),
        )
        for trace in traces
    ]


def _traced(proposed: Sequence[tuple[str, float]]) -> list[TracedToken]:
    return [TracedToken(token=token, prob=prob) for token, prob in proposed]
