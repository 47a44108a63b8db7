"""Requests to the engine's thread and its outputs. No torch.

A request is one prompt with one set of parameters; `n` choices are n requests. Does not know HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import chain
from typing import Any, Literal, NamedTuple

from ensemble_core.config import DEFAULT_TAU
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.errors import InvalidRequestError, quoted
from ensemble_core.stats import Reason
from ensemble_core.text.tools import CallPiece, Message, ToolUse, merged
from ensemble_core.text.variables import TemplateVariables
from ensemble_core.text.vocabulary import readable

FinishReason = Literal["stop", "length", "tool_calls", "abort", "error"]
LEAST_LOGPROB = -9999.0  # of a token without mass, as in vLLM, since JSON has no infinity


@dataclass(frozen=True, slots=True)
class Weighting:
    """Where weights come from: fixed, scaled by each prompt's perplexity (tau in nats per byte), or by a gate."""

    by: Literal["fixed", "perplexity", "gate"] = "fixed"
    tau: float = DEFAULT_TAU


@dataclass(frozen=True, slots=True)
class CouncilBounds:
    """Limits that a request sets to its council; None: as configured."""

    max_calls: int | None = None
    max_tokens: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Overrides:
    """What a request changes in its ensemble: the `ensemble` extension of the API. None: as configured."""

    members: tuple[str, ...] | None = None  # a subset, main among them
    weights: Mapping[str, float] | None = None
    fusion: str | None = None
    fusion_options: Mapping[str, Any] | None = None
    mode: str | None = None
    mode_options: Mapping[str, Any] | None = None
    weighting: Weighting | None = None
    bounds: CouncilBounds | None = None  # of a council


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages for each member's own chat template.

    messages: role and content, and what belongs to calls of tools and to reasoning. continue_final: the answer
    continues the last message; otherwise the template opens a new turn of the assistant. tools: what the answer may
    call. variables: for the templates.
    """

    messages: tuple[Message, ...]
    continue_final: bool = False
    tools: ToolUse | None = None
    variables: TemplateVariables = field(default_factory=TemplateVariables)


Prompt = str | tuple[int, ...] | Conversation  # ids are the main member's, taken as they are


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt for one model (an ensemble or a member).

    add_special_tokens: let tokenizers put their BOS before a text; has no effect on ids and conversations. trace:
    report what each member proposed for every token. group: requests of one group have the same prompt and share its
    prefill. owner: who shares the places of the engine fairly with others: a client, and one request of that client.
    watched: somebody waits for each of its tokens, not for the whole answer. reserved: its place in the queue was
    taken before. truncate: of a longer prompt, the last so many of main's tokens are used; -1: as many as fit. salt:
    prefixes are shared only with requests of the same one; see `salted`. priority: among those that wait or whose
    prompts are read, a lower number goes first; see `fairness`. batch: nobody waits for it, so it is less urgent
    than all that others may ask for.
    """

    request_id: str
    model: str
    prompt: Prompt
    params: SamplingParams
    overrides: Overrides = field(default_factory=Overrides)
    add_special_tokens: bool = True
    trace: bool = False
    group: str | None = None
    owner: tuple[str, str] = ("", "")
    watched: bool = True
    reserved: bool = False
    truncate: int | None = None
    salt: str = ""
    priority: int = 0
    batch: bool = False


MOST_PRIORITY = 100  # or as much below 0
_BEHIND = 2 * MOST_PRIORITY + 1  # what a request of a batch adds: it is less urgent than any other


def prioritised(requests: Sequence[GenerationRequest], *, allowed: bool) -> Sequence[GenerationRequest]:
    """The requests with the priorities that count: without their own where none are allowed, batches behind others.

    Raises InvalidRequestError for one that is out of bounds.
    """
    most = MOST_PRIORITY
    for request in requests if allowed else ():
        if abs(request.priority) > most:
            raise InvalidRequestError(
                f"priority must be an integer from {-most} to {most}, got {quoted(request.priority)}", "priority"
            )
    if not any(request.priority or request.batch for request in requests):
        return requests
    return [
        replace(each, priority=each.priority * allowed + _BEHIND * each.batch, batch=False) for each in requests
    ]


def salted(text: str) -> str:
    """The salt that stands for a client's text. Members see no more of the secret than this."""
    return sha256(text.encode()).hexdigest()


class Alternative(NamedTuple):
    """A possible token with its fused log-probability. spelling: as in `TokenLogprob`."""

    token_id: int
    spelling: bytes
    logprob: float

    @property
    def text(self) -> str:
        """The token for people to read."""
        return readable(self.spelling)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token with its fused log-probability, before penalties, bias and temperature.

    spelling: its bytes, which may be part of a character; for a control token, its name. text_offset: where its text
    begins, in characters of the prompt (with echo) and completion. top: the likeliest alternatives, with the token
    itself among them. rank: of the token in the fused distribution, 1 for the likeliest, where it was asked for. The
    prompt's first token has no log-probability and no alternatives.
    """

    token_id: int
    spelling: bytes
    logprob: float | None
    text_offset: int
    top: tuple[Alternative, ...] = ()
    rank: int | None = None

    @property
    def text(self) -> str:
        """The token for people to read."""
        return readable(self.spelling)


@dataclass(frozen=True, slots=True)
class DraftTrace:
    """How a drafted token fared.

    token: what main drafted. drafter: lookup or an assistant where main was fed its guess and chose it. sound:
    every assistant has a token boundary before it. needed: the fusion decided; else the assistants agreed, or no
    assistant could have changed it (certified), or the place is not sound and main decided. kept: it stayed.
    """

    token: str
    drafter: str
    sound: bool
    needed: bool
    certified: bool
    kept: bool


@dataclass(frozen=True, slots=True)
class Trace:
    """What the members proposed for one token. members: member -> (text, probability), best first.

    given: member -> the probability that it gives to its own token of the same bytes (for an end of text, to all its
    ends), 0 beyond its candidates, None where it has no such token. spelling: the bytes of the token; None for a
    control token.
    """

    token: str
    consulted: bool  # False: main decided alone
    members: Mapping[str, tuple[tuple[str, float], ...]]
    fused: tuple[tuple[str, float], ...]
    agreed: Mapping[str, bool]  # assistant -> its best token spells the same
    weights: Mapping[str, float]  # of the consulted members
    left_out: Mapping[str, Reason] = field(default_factory=dict)  # member that did not count -> why
    draft: DraftTrace | None = None  # None: it was not drafted
    prob: float = 0.0  # of the token in the fused distribution
    entropy: float = 0.0  # of the fused distribution, in nats; what is outside the support counts as one token
    given: Mapping[str, float | None] = field(default_factory=dict)
    unmapped: Mapping[str, float] = field(
        default_factory=dict
    )  # member that was fused -> mass that found no place
    spelling: bytes | None = None


@dataclass(frozen=True, slots=True)
class CallReport:
    """One call that a council made. node: who spoke, with the nodes of the councils around it. outcome: the finish
    reason, or why there is no answer. Tokens are the called model's.
    """

    node: str
    model: str
    round: int
    sample: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    seconds: float
    outcome: str
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class CouncilReport:
    """How a council came to an answer. trace: council -> its votes, scores or rounds, ready for JSON."""

    calls: tuple[CallReport, ...]
    trace: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Output:
    """One step's news of one request. The last output has a `finish_reason`.

    text: whole characters, without stop strings unless they were asked for; may be empty. reasoning: what the
    model thinks before its text; calls: news of calls of tools; neither is part of the text. token_ids, logprobs,
    traces: for main's tokens since the last output (logprobs and traces only on request). prompt_logprobs: with
    echo and logprobs, only in the first output. num_*: main's tokens so far; num_reasoning_tokens: None where
    this model's answers have no reasoning. dropped: members that this request has lost for good, and why.
    served_by: the model whose text this is, where a council answers; report: of the council, in the last output.
    """

    text: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    num_completion_tokens: int
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string, or the id of a stop token other than the default
    error: str | None = None  # for finish_reason "error"
    logprobs: tuple[TokenLogprob, ...] = ()
    traces: tuple[Trace, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    prompt_text: str = ""  # with echo, only in the first output
    prompt_token_ids: tuple[int, ...] = ()  # only in the first output
    num_cached_tokens: int = 0  # prompt tokens that main had cached at the start
    dropped: Mapping[str, Reason] = field(default_factory=dict)
    calls: tuple[CallPiece, ...] = ()
    reasoning: str = ""
    num_reasoning_tokens: int | None = None
    served_by: str = ""
    report: CouncilReport | None = None


def join(outputs: Sequence[Output]) -> Output:
    """Join all outputs of one request, at least one, into one."""
    return replace(
        outputs[-1],
        text="".join(each.text for each in outputs),
        reasoning="".join(each.reasoning for each in outputs),
        token_ids=tuple(chain.from_iterable(each.token_ids for each in outputs)),
        logprobs=tuple(chain.from_iterable(each.logprobs for each in outputs)),
        traces=tuple(chain.from_iterable(each.traces for each in outputs)),
        prompt_logprobs=tuple(chain.from_iterable(each.prompt_logprobs for each in outputs)),
        prompt_text="".join(each.prompt_text for each in outputs),
        prompt_token_ids=tuple(chain.from_iterable(each.prompt_token_ids for each in outputs)),
        calls=tuple(merged(chain.from_iterable(each.calls for each in outputs))),
    )
