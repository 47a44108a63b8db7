"""What goes into the engine's thread and what comes out of it. No torch.

A request is one prompt with one set of parameters; `n` choices are n requests. It does not know HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Literal, NamedTuple

from ensemble_core.config import DEFAULT_TAU
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.stats import Reason
from ensemble_core.text.vocabulary import readable

FinishReason = Literal["stop", "length", "abort", "error"]
LEAST_LOGPROB = -9999.0  # as in vLLM: of a token without any mass, since JSON has no infinity


@dataclass(frozen=True, slots=True)
class Weighting:
    """Where weights come from: as they are given, or times what each prompt says (tau in nats per byte)."""

    by: Literal["fixed", "perplexity"] = "fixed"
    tau: float = DEFAULT_TAU


@dataclass(frozen=True, slots=True)
class Overrides:
    """What a request changes of its ensemble: our extension `ensemble` of the API. None: as configured."""

    members: tuple[str, ...] | None = None  # a subset, main among them
    weights: Mapping[str, float] | None = None
    fusion: str | None = None
    fusion_options: Mapping[str, Any] | None = None
    mode: str | None = None
    mode_options: Mapping[str, Any] | None = None
    weighting: Weighting | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages for each member's own chat template.

    messages: role and content. continue_final: the last message is the beginning of the answer, which goes on
    from it; otherwise the template opens the assistant's turn.
    """

    messages: tuple[Mapping[str, str], ...]
    continue_final: bool = False


Prompt = str | tuple[int, ...] | Conversation  # ids are the main member's, taken as they are


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt for one model (an ensemble or a member).

    add_special_tokens: let tokenizers put their BOS in front of a text; ids and conversations get none. trace:
    report what every member proposed at each token. group: requests with the same group have the same prompt and
    share its prefill.
    """

    request_id: str
    model: str
    prompt: Prompt
    params: SamplingParams
    overrides: Overrides = field(default_factory=Overrides)
    add_special_tokens: bool = True
    trace: bool = False
    group: str | None = None


class Alternative(NamedTuple):
    """A token that could have come, with its fused log-probability. spelling: as of `TokenLogprob`."""

    token_id: int
    spelling: bytes
    logprob: float

    @property
    def text(self) -> str:
        """The token for people to read."""
        return readable(self.spelling)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token with its fused log-probability, before temperature, penalties and bias.

    spelling: its bytes, which may be a part of a character; of a control token, its name. text_offset: where its
    text begins, in characters of prompt (with echo) and completion. top: the likeliest alternatives, the token
    itself among them with the identical number. The prompt's first token has no log-probability and no
    alternatives.
    """

    token_id: int
    spelling: bytes
    logprob: float | None
    text_offset: int
    top: tuple[Alternative, ...] = ()

    @property
    def text(self) -> str:
        """The token for people to read."""
        return readable(self.spelling)


@dataclass(frozen=True, slots=True)
class Trace:
    """What the members proposed for one emitted token: member -> (text, probability), best first."""

    token: str
    consulted: bool  # False: main decided alone
    members: Mapping[str, tuple[tuple[str, float], ...]]
    fused: tuple[tuple[str, float], ...]
    agreed: Mapping[str, bool]  # assistant -> its best token spells the same
    weights: Mapping[str, float]  # of those who were consulted
    left_out: Mapping[str, Reason] = field(default_factory=dict)  # member that failed -> why it was not asked


@dataclass(frozen=True, slots=True)
class Output:
    """One step's news of one request. The last one has a `finish_reason`.

    text: whole characters, stop strings already cut; may be empty. token_ids, logprobs, traces: of main's tokens
    emitted since the last output (logprobs and traces only where asked for). prompt_logprobs: with echo and
    logprobs, once, in the first output. Counts are main's tokens so far. dropped: members that this request has lost
    for good, and why.
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
    prompt_text: str = ""  # with echo, once, in the first output
    prompt_token_ids: tuple[int, ...] = ()  # once, in the first output
    num_cached_tokens: int = 0  # of the prompt, that main did not have to compute
    dropped: Mapping[str, Reason] = field(default_factory=dict)


def join(outputs: Sequence[Output]) -> Output:
    """All outputs of one request, at least one, as if they had come at once."""
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
