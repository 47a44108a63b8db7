"""Runs the plans of councils: makes their calls, keeps their limits, and sends the answer as it comes.

Invariants: the places that a request's calls need at the same time are taken when it is admitted, so no call is
refused for a full queue; closing its stream ends every call; calls, tokens and seconds never pass the limits. It
knows of the engine what `Engine` lists below, and of models only their names.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ensemble_core.council_config import CouncilLimits
from ensemble_core.councils.base import Answer, Call, Round, Settled, Speak, Verdict
from ensemble_core.councils.book import Council, CouncilBook
from ensemble_core.decoding.requests import (
    CallReport,
    CouncilBounds,
    CouncilReport,
    GenerationRequest,
    Output,
    Overrides,
    join,
)
from ensemble_core.errors import (
    CouncilError,
    InvalidRequestError,
    NotReadyError,
    RequestTimeoutError,
    UnisonoError,
)
from ensemble_core.stats import CouncilStats, Record
from ensemble_core.streaming import OutputStream

logger = logging.getLogger(__name__)

Emit = Callable[[Output], None]


class Places(Protocol):
    """Places in the engine's queue that are kept for one request."""

    def release(self) -> None:
        """Give them back."""


@dataclass(frozen=True, slots=True)
class EngineDoor:
    """What a council needs of the engine.

    submit: requests to members and ensembles, all or none. room: tokens that a model's context has left behind a
    prompt. reserve: places in the queue; raises QueueFullError. stream: an empty stream whose requests end through
    the given function.
    """

    submit: Callable[[Sequence[GenerationRequest]], Awaitable[OutputStream]]
    room: Callable[[str, Any], Awaitable[int]]
    reserve: Callable[[int], Awaitable[Places]]
    stream: Callable[[Callable[[list[int]], None]], OutputStream]


class Chamber:
    """Where councils meet."""

    def __init__(self, book: CouncilBook, door: EngineDoor, record: Record) -> None:
        self._book, self._door, self._record = book, door, record

    def __contains__(self, model: str) -> bool:
        return model in self._book

    def speakers(self, model: str) -> set[str]:
        """See `CouncilBook.speakers`."""
        return self._book.speakers(model)

    async def submit(self, requests: Sequence[GenerationRequest]) -> OutputStream:
        """As `Runtime.submit`, for requests to one council.

        Raises InvalidRequestError, QueueFullError or NotReadyError before any output; later errors come from the
        stream.
        """
        council = self._book[requests[0].model]
        limits = self._limits(council, requests)
        for request in requests:
            _check(request, council)
        places = await self._door.reserve(council.cost.width * len(requests))
        meeting = _Meeting(self, council, places)
        return meeting.begin(requests, limits)

    def _limits(self, council: Council, requests: Sequence[GenerationRequest]) -> CouncilLimits:
        """The limits of each choice; the choices of one prompt share the request's."""
        limits = lowered(council.limits, requests[0].overrides.bounds)
        groups = [request.group or request.request_id for request in requests]
        choices = max(map(groups.count, set(groups)))
        if council.cost.calls * choices > limits.max_calls and not _spares(council, limits, choices):
            raise InvalidRequestError(
                f"{'n' if choices > 1 else 'ensemble.limits'}: each choice of {council.name!r} needs up to "
                f"{council.cost.calls} calls, and a request may make {limits.max_calls} (limits.max_calls); ask for "
                "fewer choices",
                "n" if choices > 1 else "ensemble.limits",
            )
        tokens = limits.max_tokens // choices
        if tokens - council.cost.fixed < council.cost.writers:
            raise InvalidRequestError(
                f"ensemble.limits.max_tokens: {choices} choices of {council.cost.writers} calls share "
                f"{limits.max_tokens} tokens, of which {council.cost.fixed * choices} are set aside for short calls; "
                "ask for fewer choices, or allow more tokens",
                "ensemble.limits",
            )
        return limits.model_copy(update={"max_calls": limits.max_calls // choices, "max_tokens": tokens})


def _spares(council: Council, limits: CouncilLimits, choices: int) -> bool:
    """Whether the calls beyond the limit are only those that a discussion makes if some are left."""
    return council.config.kind == "discuss" and council.cost.writers * choices <= limits.max_calls


def lowered(limits: CouncilLimits, bounds: CouncilBounds | None) -> CouncilLimits:
    """The limits that a request asks for. Raises InvalidRequestError for one that is higher than configured."""
    if bounds is None:
        return limits
    asked = {name: value for name in ("max_calls", "max_tokens", "seconds") if (value := getattr(bounds, name))}
    for name, value in asked.items():
        if value > getattr(limits, name):
            raise InvalidRequestError(
                f"ensemble.limits.{name}: this council allows {getattr(limits, name):g} at most, got {value:g}; "
                "a request may only lower limits",
                "ensemble.limits",
            )
    return limits.model_copy(update=asked)


def _check(request: GenerationRequest, council: Council) -> None:
    """Refuse what belongs to one model's tokens, and what a council does not have."""
    params, name = request.params, council.name
    one = f"{name!r} is a council, whose models have different tokens; send it to one of its models"
    for param, given in (
        ("logit_bias", params.logit_bias),
        ("stop_token_ids", params.stop_token_ids),
        ("prompt", isinstance(request.prompt, tuple)),
    ):
        if given:
            raise InvalidRequestError(f"{param}: {'token ids' if param == 'prompt' else 'this'}: {one}", param)
    if params.echo:
        raise InvalidRequestError(
            f"echo: {name!r} is a council, which scores no prompts; ask one of its models", "echo"
        )
    if replace(request.overrides, bounds=None) != Overrides():
        raise InvalidRequestError(
            f"ensemble: {name!r} is a council, for which a request may set limits and trace alone", "ensemble"
        )
    if council.config.kind == "discuss":
        _check_discussion(request, name)


def _check_discussion(request: GenerationRequest, name: str) -> None:
    params = request.params
    if params.logprobs is not None:
        raise InvalidRequestError(
            f"logprobs: the answer of {name!r} is put together from a discussion, so its tokens have none",
            "logprobs",
        )
    if params.json_schema is not None:
        raise InvalidRequestError(
            f"response_format: the answer of {name!r} has the form of its discussion; leave it out",
            "response_format",
        )
    if getattr(request.prompt, "continue_final", False):
        raise InvalidRequestError(
            f"continue_final_message: a discussion ({name!r}) begins with a question", "continue_final_message"
        )


class _Meeting:
    """The choices of one submission at work."""

    def __init__(self, chamber: Chamber, council: Council, places: Places) -> None:
        self._chamber, self._council, self._places = chamber, council, places
        self._tasks: list[asyncio.Task[None]] = []
        self._stream: OutputStream

    def begin(self, requests: Sequence[GenerationRequest], limits: CouncilLimits) -> OutputStream:
        self._stream = self._chamber._door.stream(self._abort)
        self._stream.follow(list(range(len(requests))))
        deadline = time.perf_counter() + limits.seconds
        self._tasks = [
            asyncio.create_task(self._choice(index, request, limits, deadline))
            for index, request in enumerate(requests)
        ]
        self._closing = asyncio.create_task(self._close())
        return self._stream

    def _abort(self, indices: list[int]) -> None:
        for index in indices:
            self._tasks[index].cancel()

    async def _close(self) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._places.release()

    async def _choice(
        self, index: int, request: GenerationRequest, limits: CouncilLimits, deadline: float
    ) -> None:
        """One choice from its first call to its last output. An error ends the whole stream."""
        ledger = _Ledger()
        run = _Deliberation(self._chamber, self._council, limits, deadline, ledger)
        try:
            await run.answer(request, lambda output: self._stream.put(index, output))
        except UnisonoError as error:
            self._stream.fail(error)
        except Exception as error:
            logger.exception("the council %s failed", self._council.name)
            self._stream.fail(error)


@dataclass(slots=True)
class _Ledger:
    """All calls of one choice."""

    calls: list[CallReport] = field(default_factory=list)


@dataclass(slots=True)
class _Heard:
    """What has come of one call so far."""

    call: Call
    began: float
    last: Output | None = None

    def report(self, outcome: str, node: str) -> CallReport:
        last = self.last
        return CallReport(
            node=node,
            model=self.call.model,
            round=self.call.round,
            sample=self.call.sample,
            prompt_tokens=0 if last is None else last.num_prompt_tokens,
            cached_tokens=0 if last is None else last.num_cached_tokens,
            completion_tokens=0 if last is None else last.num_completion_tokens,
            seconds=time.perf_counter() - self.began,
            outcome=outcome,
        )


class _SilentError(Exception):
    """A call that failed before its first text."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(slots=True)
class _Deliberation:
    """One answer of one council; councils within it have runs of their own."""

    chamber: Chamber
    council: Council
    limits: CouncilLimits
    deadline: float
    ledger: _Ledger
    path: str = ""  # the nodes above, for the report

    async def answer(self, request: GenerationRequest, emit: Emit) -> Output:
        """The council's answer; its outputs as they come. The last one has the report."""
        began = time.perf_counter()
        verdict = await self._deliberate(request)
        if isinstance(verdict, Settled):
            said = replace(verdict.output, served_by=verdict.output.served_by or verdict.served_by)
            last = self._closed(said, verdict)
            emit(last)
        else:
            last = await self._speak(verdict, request, emit)
        notes = verdict.notes
        self.chamber._record(
            CouncilStats(
                self.council.name,
                last.served_by,
                notes.rounds,
                notes.agreement,
                time.perf_counter() - began,
                tuple(call.model for call in self.ledger.calls) if not self.path else (),
            )
        )
        return last

    async def _deliberate(self, request: GenerationRequest) -> Verdict:
        """Everything before the answer is written."""
        plan = self.council.plan(request, self.limits)
        try:
            wanted = next(plan)
            while True:
                wanted = plan.send(await self._round(wanted, request))
        except StopIteration as stop:
            verdict: Verdict = stop.value
            return verdict
        finally:
            plan.close()

    async def _round(self, wanted: Round, request: GenerationRequest) -> list[Answer]:
        """All answers, in the order of the calls; those that came to be needless are ended and have none."""
        tasks = [asyncio.create_task(self._answered(call, request)) for call in wanted.calls]
        try:
            found = await self._gathered(tasks, wanted)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self._require_enough(found)
        return found

    async def _gathered(self, tasks: list[asyncio.Task[Answer]], wanted: Round) -> list[Answer]:
        found: list[Answer] = []
        pending = set(tasks)
        while pending:
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            while len(found) < len(tasks) and tasks[len(found)].done():
                found.append(tasks[len(found)].result())
                if wanted.enough is not None and wanted.enough(found):
                    return found
        return found

    def _require_enough(self, found: Sequence[Answer]) -> None:
        there = sum(answer.output is not None for answer in found)
        wrong = [answer for answer in found if answer.output is None]
        if not there and isinstance(wrong[0].error, InvalidRequestError) and not wrong[0].call.clipped:
            raise wrong[0].error  # nobody can serve what the client sent
        if wrong and self.limits.on_error == "fail":
            raise CouncilError(f"{wrong[0].call.model}: {wrong[0].error} (limits.on_error: fail)")
        if there < min(self.limits.min_answers, len(found)) or not there:
            reason = f"; {wrong[0].call.model}: {wrong[0].error}" if wrong else ""
            raise CouncilError(
                f"{self.council.name!r} got {there} answers of {len(found)}, and needs {self.limits.min_answers} "
                f"(limits.min_answers){reason}"
            )

    async def _answered(self, call: Call, request: GenerationRequest) -> Answer:
        """The answer to a call; a failure is one as well. Raises what concerns the whole request."""
        try:
            return Answer(call, await self._call(call, request, _nobody, watched=False))
        except (UnisonoError, _SilentError) as error:
            reason = error.error if isinstance(error, _SilentError) else error
            if isinstance(reason, NotReadyError) or not isinstance(reason, UnisonoError):
                raise reason from error
            return Answer(call, None, reason)

    async def _speak(self, verdict: Speak, request: GenerationRequest, emit: Emit) -> Output:
        """The answer of the first call that begins one."""
        failed: Exception = CouncilError(f"{self.council.name!r} has nobody to answer")
        for call in verdict.calls:
            try:
                return await self._call(call, request, emit, watched=request.watched, verdict=verdict)
            except _SilentError as silent:
                failed = silent.error
                if isinstance(failed, NotReadyError) or self.limits.on_error == "fail":
                    break
        raise failed

    async def _call(
        self, call: Call, request: GenerationRequest, emit: Emit, *, watched: bool, verdict: Verdict | None = None
    ) -> Output:
        """One call, its outputs emitted as they come. Raises _SilentError if it fails before its first text.

        verdict: the call's text is the council's answer, so its last output gets the report.
        """
        heard = _Heard(call, time.perf_counter())
        outputs: list[Output] = []

        def hear(output: Output) -> None:
            heard.last = output
            outputs.append(output)
            told = replace(output, served_by=output.served_by or call.model)
            if output.finish_reason is not None and verdict is not None:
                return  # comes with the report
            emit(told)

        node = f"{self.path}{call.node}"
        try:
            if call.model in self.chamber:
                await self._council_within(call, request, hear, node, watched=watched)
            else:
                await self._model(call, request, hear, watched=watched, speaks=verdict is not None)
        except BaseException as error:
            if call.model not in self.chamber:
                self.ledger.calls.append(heard.report(_outcome(error), node))
            if isinstance(error, Exception) and not any(output.text for output in outputs):
                raise _SilentError(error) from error
            raise
        whole = join(outputs)
        if call.model not in self.chamber:
            self.ledger.calls.append(heard.report(str(whole.finish_reason), node))
        if verdict is not None:
            last = self._closed(replace(outputs[-1], served_by=outputs[-1].served_by or call.model), verdict)
            emit(last)
            whole = replace(whole, report=last.report)
        return replace(whole, served_by=outputs[-1].served_by or call.model)

    async def _council_within(
        self, call: Call, request: GenerationRequest, hear: Emit, node: str, *, watched: bool
    ) -> None:
        """A call to a council: a run of its own, within what is left of this one's limits."""
        council = self.chamber._book[call.model]
        own = council.limits
        tokens = self._share() * council.cost.writers + council.cost.fixed
        limits = own.model_copy(update={"max_tokens": min(own.max_tokens, tokens)})
        deadline = min(self.deadline, time.perf_counter() + own.seconds)
        run = _Deliberation(self.chamber, council, limits, deadline, self.ledger, f"{node}/")
        inner = replace(request, model=call.model, prompt=call.prompt, params=call.params, watched=watched)
        await run.answer(replace(inner, overrides=call.overrides), hear)

    def _share(self) -> int:
        """Tokens of each call whose length the request sets."""
        cost = self.council.cost
        return max((self.limits.max_tokens - cost.fixed) // max(cost.writers, 1), 1)

    async def _model(
        self, call: Call, request: GenerationRequest, hear: Emit, *, watched: bool, speaks: bool
    ) -> None:
        """A call to a member or a token-level ensemble. One that speaks and runs out of time ends as too long."""
        left = self.deadline - time.perf_counter()
        last: Output | None = None
        try:
            async with asyncio.timeout(max(left, 0.0)):
                asked = await self._request(call, request, watched=watched)
                outputs = await self.chamber._door.submit([asked])
                async with aclosing(outputs):
                    async for _, output in outputs:
                        last = output
                        _require_alive(output)
                        hear(output)
        except TimeoutError:
            if not speaks or last is None or not last.num_completion_tokens:
                raise RequestTimeoutError(
                    f"{self.council.name!r} took longer than {self.limits.seconds:g} s (limits.seconds); ask for "
                    "fewer tokens, or try again later"
                ) from None
            empty = replace(last, text="", token_ids=(), logprobs=(), traces=(), prompt_token_ids=())
            hear(replace(empty, finish_reason="length"))

    async def _request(self, call: Call, request: GenerationRequest, *, watched: bool) -> GenerationRequest:
        params = call.params
        if params.max_tokens > (most := self._share()):
            params = replace(params, max_tokens=most, min_tokens=min(params.min_tokens, most))
        if call.clipped:
            room = max(await self.chamber._door.room(call.model, call.prompt), 1)
            params = replace(
                params, max_tokens=min(params.max_tokens, room), min_tokens=min(params.min_tokens, room)
            )
        shared = request.request_id if call.clipped else request.group or request.request_id
        return replace(
            request,
            request_id=f"{request.request_id}/{self.path}{call.node}/{call.round}/{call.sample}",
            model=call.model,
            prompt=call.prompt,
            params=params,
            overrides=call.overrides,
            trace=request.trace and call.final,
            group=f"{shared}/{self.path}{call.node}/{call.model}/{call.round}",
            watched=watched,
            reserved=True,
        )

    def _closed(self, last: Output, verdict: Verdict) -> Output:
        """The last output, with the report of the whole run. Councils within leave that to the one above."""
        trace = {self.council.name: {"kind": self.council.config.kind, **verdict.notes.trace}}
        within = {} if last.report is None else dict(last.report.trace)
        calls = sorted(self.ledger.calls, key=lambda call: (call.round, call.node, call.sample))
        return replace(last, report=CouncilReport(tuple(calls), within | trace))


def _nobody(_output: Output) -> None:
    """Hears what nobody is sent."""


def _require_alive(output: Output) -> None:
    if output.finish_reason == "error":
        raise CouncilError(output.error or "the engine failed at this call")
    if output.finish_reason == "abort":
        raise NotReadyError("the server is stopping and ended this request; try again later")


def _outcome(error: BaseException) -> str:
    """Why a call has no answer, in a word."""
    if isinstance(error, asyncio.CancelledError):
        return "ended early"
    return "timeout" if isinstance(error, RequestTimeoutError) else "failed"
