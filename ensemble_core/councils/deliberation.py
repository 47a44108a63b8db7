"""One answer of one council: the calls that its plan wants, and the text as it comes.

Invariants: calls, tokens and seconds never pass the limits; every call is in the ledger with what became of it, those
that were ended early too. A call whose model is a council is a deliberation of its own, within what this one leaves
it. Knows of the engine what `door` lists, and of models only their names.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from anyio import CapacityLimiter

from ensemble_core.council_config import CouncilLimits
from ensemble_core.councils.base import Answer, Call, Round, Settled, Speak, Verdict
from ensemble_core.councils.book import Council, CouncilBook
from ensemble_core.councils.door import EngineDoor
from ensemble_core.councils.reading import NUM_PROCESSES, Reader
from ensemble_core.decoding.requests import CallReport, CouncilReport, GenerationRequest, Output, join
from ensemble_core.errors import (
    CouncilError,
    InvalidRequestError,
    NotReadyError,
    RequestTimeoutError,
    UnisonoError,
)
from ensemble_core.stats import CouncilStats, Record

Emit = Callable[[Output], None]


@dataclass(frozen=True, slots=True)
class Hall:
    """What all deliberations share."""

    book: CouncilBook
    door: EngineDoor
    record: Record
    readers: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(NUM_PROCESSES))


@dataclass(slots=True)
class Ledger:
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
            reasoning_tokens=0 if last is None else last.num_reasoning_tokens or 0,
        )


class _SilentError(Exception):
    """A call that failed before its first text."""

    def __init__(self, error: UnisonoError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(slots=True)
class Deliberation:
    """One answer of one council; councils within it have runs of their own."""

    hall: Hall
    council: Council
    limits: CouncilLimits
    deadline: float
    ledger: Ledger
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
        self.hall.record(
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
        reader = None if wanted.form is None else Reader(wanted.form, self.hall.readers, self.deadline)
        pending = set(tasks)
        while pending:
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            while len(found) < len(tasks) and tasks[len(found)].done():
                answer = tasks[len(found)].result()
                if reader is not None and answer.output is not None:
                    answer = replace(answer, vote=await reader.vote(answer.text))
                found.append(answer)
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
            if isinstance(reason, NotReadyError):
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
            if call.model in self.hall.book:
                await self._council_within(call, request, hear, node, watched=watched)
            else:
                await self._model(call, request, hear, watched=watched, speaks=verdict is not None)
        except BaseException as error:
            if call.model not in self.hall.book:
                self.ledger.calls.append(heard.report(_outcome(error), node))
            if isinstance(error, UnisonoError) and not any(output.text or output.token_ids for output in outputs):
                raise _SilentError(error) from error
            raise
        whole = join(outputs)
        if call.model not in self.hall.book:
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
        council = self.hall.book[call.model]
        own = council.limits
        tokens = self._share() * council.cost.writers + council.cost.fixed
        limits = own.model_copy(update={"max_tokens": min(own.max_tokens, tokens)})
        deadline = min(self.deadline, time.perf_counter() + own.seconds)
        run = Deliberation(self.hall, council, limits, deadline, self.ledger, f"{node}/")
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
                outputs = await self.hall.door.submit([asked])
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
            empty = replace(
                last, text="", reasoning="", calls=(), token_ids=(), logprobs=(), traces=(), prompt_token_ids=()
            )
            hear(replace(empty, finish_reason="length"))

    async def _request(self, call: Call, request: GenerationRequest, *, watched: bool) -> GenerationRequest:
        params = call.params
        if params.max_tokens > (most := self._share()):
            params = replace(params, max_tokens=most, min_tokens=min(params.min_tokens, most))
        if call.clipped:
            room = max(await self.hall.door.room(call.model, call.prompt), 1)
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
