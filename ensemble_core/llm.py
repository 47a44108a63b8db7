"""The offline API: the same engine without a server.

    llm = LLM("configs/demo.yaml")
    for completion in llm.generate(["The capital of France is"], SamplingParams(max_tokens=32, temperature=0)):
        print(completion.text)

The prompts of one call are batched as the server batches requests. Not thread-safe: one thread must own an LLM.
"""

from __future__ import annotations

import itertools
from collections import abc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from ensemble_core import factory
from ensemble_core.config import Config
from ensemble_core.config_file import load_config
from ensemble_core.councils.book import CouncilBook
from ensemble_core.decoding.requests import (
    CouncilReport,
    FinishReason,
    GenerationRequest,
    Output,
    Overrides,
    Prompt,
    TokenLogprob,
    join,
)
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.decoding.sequence import Sequence
from ensemble_core.errors import InvalidRequestError, QueueFullError, UnisonoError
from ensemble_core.members.base import Member
from ensemble_core.offline import OfflineCouncils
from ensemble_core.recipes import ModelInfo
from ensemble_core.stats import Reason, Record, discard
from ensemble_core.text.tools import ToolCall, folded


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one prompt. token_ids and num_prompt_tokens are the main member's.

    calls: of tools, where the prompt is a conversation that has some; reasoning: what the model thought before its
    text, where the prompt is a conversation. dropped: members that the answer went on without, with the reason.
    served_by, report: of a council's answer, the model that wrote it and all calls.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None
    num_prompt_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    calls: tuple[ToolCall, ...] = ()
    dropped: Mapping[str, Reason] = field(default_factory=dict)
    served_by: str = ""
    report: CouncilReport | None = None
    reasoning: str = ""
    num_reasoning_tokens: int | None = None

    @property
    def num_generated(self) -> int:
        """Tokens that were generated for it; those of all calls where a council answered."""
        if self.report is None:
            return len(self.token_ids)
        return sum(call.completion_tokens for call in self.report.calls)


class LLM:
    """All models of a configuration, loaded in this process. Raises a UnisonoError if that fails."""

    def __init__(self, config: str | Path | Config, record: Record = discard) -> None:
        self._config = config if isinstance(config, Config) else load_config(config)
        loaded = factory.load(self._config, record)
        self._engine, self._admission = loaded.engine, loaded.admission
        self._councils = OfflineCouncils(loaded.engine, loaded.admission, loaded.councils, record)
        self.models: list[ModelInfo] = loaded.models
        self._inbox: dict[int, list[Output]] = {}  # seq_id -> unread outputs, for every open call
        self._names = itertools.count()

    def generate(
        self,
        prompts: str | abc.Sequence[Prompt],
        params: SamplingParams | abc.Sequence[SamplingParams] | None = None,
        model: str | None = None,
        overrides: Overrides | None = None,
    ) -> list[Completion]:
        """Complete every prompt (a text, main's ids or a conversation). Answers keep the order of the prompts.

        params: one for all, or one each. model: an ensemble, a council or a member; None: the first ensemble, else
        the first member. Raises InvalidRequestError, ModelNotFoundError before anything runs; UnisonoError if a
        request fails.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if model in self._councils.book:
            asked = self._asked(prompts, params, model, overrides, watched=False)
            for request in asked:
                self._admission.check_council(request, sorted(self._councils.book.speakers(request.model)))
            found = self._councils.answers(asked, self._config.scheduler.max_running)
            return [_completion([each]) for each in found]
        requests = self._requests(prompts, params, model, overrides, watched=False)
        outputs: dict[int, list[Output]] = {request.seq_id: [] for request in requests}
        with tqdm(total=len(requests), desc="generating", unit="prompt", disable=None) as bar:
            for seq_id, output in self._run(requests):
                outputs[seq_id].append(output)
                bar.update(output.finish_reason is not None)
        return [_completion(outputs[request.seq_id]) for request in requests]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        model: str | None = None,
        overrides: Overrides | None = None,
    ) -> Iterator[str]:
        """Complete one prompt and yield its text, without calls. Closing the generator aborts the request."""
        requests = self._requests([prompt], params, model, overrides, watched=True)
        for _, output in self._run(requests):
            if output.error:
                raise UnisonoError(output.error)
            if output.text:
                yield output.text

    @property
    def members(self) -> Mapping[str, Member]:
        """The resident members. A caller that feeds them must release its sequences before the next call here."""
        return self._engine.members

    def encode(self, model: str, text: str) -> list[int]:
        """A prompt's ids in a model's main member. Raises ModelNotFoundError, InvalidRequestError."""
        return self._admission.tokenize(model, text, add_special_tokens=True)[0]

    def use_councils(self, config: Config) -> None:
        """The councils of another configuration over the same members and ensembles, from the next call on."""
        self._councils.book = CouncilBook(config)

    def close(self) -> None:
        """Stop the engine's threads."""
        self._engine.close()

    def _requests(
        self,
        prompts: abc.Sequence[Prompt],
        params: SamplingParams | abc.Sequence[SamplingParams] | None,
        model: str | None,
        overrides: Overrides | None,
        *,
        watched: bool = False,
    ) -> list[Sequence]:
        return self._admission.admit_all(self._asked(prompts, params, model, overrides, watched=watched))

    def _asked(
        self,
        prompts: abc.Sequence[Prompt],
        params: SamplingParams | abc.Sequence[SamplingParams] | None,
        model: str | None,
        overrides: Overrides | None,
        *,
        watched: bool,
    ) -> list[GenerationRequest]:
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise InvalidRequestError(
                f"params: {len(params)} are given for {len(prompts)} prompts; give one for all, or one each",
                "params",
            )
        return [
            GenerationRequest(
                request_id=f"offline-{next(self._names)}",
                model=model or self.models[0].name,
                prompt=prompt,
                params=own,
                overrides=overrides or Overrides(),
                watched=watched,
            )
            for prompt, own in zip(prompts, params, strict=True)
        ]

    def _run(self, requests: list[Sequence]) -> Iterator[tuple[int, Output]]:
        """Drive the engine until all requests have ended. More requests than the queue holds are added as room comes.

        Several calls may be open at once (streams that are read in turn). Each step advances all of them.
        """
        waiting = list(reversed(requests))
        left = {request.seq_id for request in requests}
        self._inbox.update((seq_id, []) for seq_id in left)
        try:
            while left:
                self._step(waiting)
                for seq_id, output in self._unread(left):
                    if output.finish_reason is not None:
                        left.discard(seq_id)
                    yield seq_id, output
        finally:
            self._engine.abort(left)
            for request in requests:
                del self._inbox[request.seq_id]

    def _step(self, waiting: list[Sequence]) -> None:
        """Take one step and put each sequence's news into its inbox."""
        self._refill(waiting)
        for seq_id, output in self._engine.step():
            self._inbox[seq_id].append(output)

    def _unread(self, seq_ids: set[int]) -> list[tuple[int, Output]]:
        """Take the unread outputs of some sequences."""
        news = [(seq_id, output) for seq_id in sorted(seq_ids) for output in self._inbox[seq_id]]
        self._inbox.update((seq_id, []) for seq_id in seq_ids)
        return news

    def _refill(self, waiting: list[Sequence]) -> None:
        try:
            while waiting:
                self._engine.add([waiting[-1]])
                waiting.pop()
        except QueueFullError:
            return


def _completion(outputs: list[Output]) -> Completion:
    whole = join(outputs)
    if whole.error or whole.finish_reason is None:
        raise UnisonoError(whole.error or "the request did not end")
    return Completion(
        text=whole.text,
        token_ids=whole.token_ids,
        finish_reason=whole.finish_reason,
        stop_reason=whole.stop_reason,
        num_prompt_tokens=whole.num_prompt_tokens,
        logprobs=whole.logprobs,
        prompt_logprobs=whole.prompt_logprobs,
        calls=tuple(folded(whole.calls)),
        dropped=whole.dropped,
        served_by=whole.served_by,
        report=whole.report,
        reasoning=whole.reasoning,
        num_reasoning_tokens=whole.num_reasoning_tokens,
    )
