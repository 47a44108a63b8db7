"""/v1/completions: turns bodies into jobs and outputs into answers. Nothing here knows HTTP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ensemble_core.decoding.requests import Alternative, Output, TokenLogprob
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.errors import InvalidRequestError
from server.api.jobs import ChoiceJob, end_of, finite, token_name, trace_steps
from server.api.tickets import Ticket, check_count, check_named, make_ticket, sampling_params
from server.schema.completions import CompletionRequest, Logprobs, TextChoice, TextCompletion


def plan(body: CompletionRequest, max_choices: int) -> CompletionJob:
    """The job that a body asks for. Raises InvalidRequestError. Bounds prompts x n before it allocates."""
    prompts = body.prompts
    counts = _counts(body, len(prompts), max_choices)
    params = _params(body, ranked=counts[0] < counts[1])
    most = body.truncate_prompt_tokens
    if most == 0:
        raise InvalidRequestError(
            "truncate_prompt_tokens must be -1 or at least 1, got 0", "truncate_prompt_tokens"
        )
    ticket = make_ticket(body, "cmpl-", prompts, params, counts, body.add_special_tokens is not False, most)
    return CompletionJob(ticket, body)


def _counts(body: CompletionRequest, num_prompts: int, max_choices: int) -> tuple[int, int]:
    """(n, best_of)."""
    num_choices = check_count("n", 1 if body.n is None else body.n, num_prompts, max_choices)
    if body.best_of is None:
        return num_choices, num_choices
    if body.best_of < num_choices:
        raise InvalidRequestError(f"best_of must be at least n = {num_choices}, got {body.best_of}", "best_of")
    if body.stream and body.best_of > num_choices:
        raise InvalidRequestError("best_of greater than n cannot be streamed; drop best_of or stream", "best_of")
    return num_choices, check_count("best_of", body.best_of, num_prompts, max_choices)


def _params(body: CompletionRequest, ranked: bool) -> SamplingParams:
    """ranked: choices are compared by log-probability, so log-probabilities are computed even if not sent."""
    check_named(body.logprob_token_ids, asked=body.logprobs is not None, needs="logprobs")
    logprobs = 0 if ranked and body.logprobs is None else body.logprobs
    return sampling_params(body, max_tokens=body.max_tokens, echo=body.echo, logprobs=logprobs)


class CompletionJob(ChoiceJob):
    """One body of /v1/completions."""

    def __init__(self, ticket: Ticket, body: CompletionRequest) -> None:
        super().__init__(ticket, body)
        self._num_top = body.logprobs
        self._echoes = bool(body.echo)
        self._sends_trace = bool(body.ensemble and body.ensemble.trace)

    def piece(self, index: int, output: Output, *, first: bool) -> TextCompletion:
        """A chunk with one choice."""
        return self._completion([self._choice(index, output, first)])

    def usage_chunk(self) -> TextCompletion:
        """A chunk without choices."""
        return self._completion([])

    def whole(self, outputs: Sequence[Output]) -> TextCompletion:
        """The answer with all choices; the n best of each prompt if more were sampled."""
        size = self.ticket.num_sampled
        kept = [
            output
            for start in range(0, len(outputs), size)
            for output in best(outputs[start : start + size], self.ticket.num_choices)
        ]
        choices = [self._choice(index, output, True) for index, output in enumerate(kept)]
        for choice, output in zip(choices, kept, strict=True):
            choice.prompt_logprobs = self._prompt_logprobs(output)
        return self._completion(choices)

    def _completion(self, choices: list[TextChoice]) -> TextCompletion:
        ticket = self.ticket
        return TextCompletion(
            id=ticket.id, object="text_completion", created=ticket.created, model=ticket.model, choices=choices
        )

    def _choice(self, index: int, output: Output, first: bool) -> TextChoice:
        reason = end_of(output)
        assert reason != "tool_calls"  # a prompt has no tools
        choice = TextChoice(
            index=index,
            text=output.prompt_text + output.text,
            logprobs=self._logprobs(output),
            finish_reason=reason,
            stop_reason=output.stop_reason,
        )
        if self._sends_ids:
            choice.token_ids = list(output.token_ids)
            if first:
                choice.prompt_token_ids = list(output.prompt_token_ids)
        if self._sends_trace:
            choice.trace = trace_steps(output.traces)
            if output.report is not None:
                choice.council = dict(output.report.trace)
        return choice

    def _logprobs(self, output: Output) -> Logprobs | None:
        if self._num_top is None:
            return None
        echoed = output.prompt_logprobs if self._echoes else ()
        prompt = [replace(token, top=token.top[: self._num_top]) for token in echoed]
        return to_logprobs([*prompt, *output.logprobs], as_ids=self._names_ids)


def best(outputs: Sequence[Output], num_kept: int) -> list[Output]:
    """The `num_kept` with the highest mean token log-probability, best first. If all are kept, their order stays."""
    if len(outputs) <= num_kept:
        return list(outputs)
    return sorted(outputs, key=_mean_logprob, reverse=True)[:num_kept]


def _mean_logprob(output: Output) -> float:
    values = [each.logprob for each in output.logprobs if each.logprob is not None]
    return sum(values) / len(values) if values else -math.inf


def to_logprobs(tokens: Sequence[TokenLogprob], *, as_ids: bool = False) -> Logprobs:
    """Parallel lists, one entry for each token. as_ids: tokens are named by their ids."""
    return Logprobs(
        tokens=[token_name(token, as_ids) for token in tokens],
        token_logprobs=[None if token.logprob is None else finite(token.logprob) for token in tokens],
        top_logprobs=[_alternatives(token, as_ids) for token in tokens],
        text_offset=[token.text_offset for token in tokens],
    )


def _alternatives(token: TokenLogprob, as_ids: bool) -> dict[str, float] | None:
    """Name -> log-probability, including the token itself; of two with the same name the likelier is kept."""
    if token.logprob is None:
        return None
    found: dict[str, float] = {}
    for each in (*token.top, Alternative(token.token_id, token.spelling, token.logprob)):
        name = token_name(each, as_ids)
        found[name] = max(found.get(name, -math.inf), finite(each.logprob))
    return found
