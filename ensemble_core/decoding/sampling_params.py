"""The sampling parameters of one request: limits, randomness, penalties, stops and reports. No torch.

Invariant: an instance is valid by itself; what depends on a vocabulary (ids) is checked at admission. Every field is
checked on construction, so the offline API and HTTP refuse the same values with the same messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from ensemble_core.decoding.forms import TextForm
from ensemble_core.decoding.parameters import Parameter, declared

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters. From `repetition_penalty` on they act after fusion, in the order of the fields.

    Defaults from there on change nothing, and temperature 1 samples as fused. Token ids are the main member's.
    temperature: 0 is greedy. top_k: 0 is off. logprobs: number of alternatives to report per token, from the fused
    distribution before penalties, bias and temperature; None: no log-probabilities. echo: also report the prompt
    (with logprobs: its teacher-forced fused log-probabilities); only then may max_tokens be 0. prompt_logprobs: the
    same log-probabilities without the text, with ranks. form: what the text must be; None: free text.
    thinking_token_budget: tokens of reasoning; None or -1: any number. logprob_token_ids: what log-probabilities are
    reported of, in place of alternatives; the answer is the same.
    """

    max_tokens: int = declared("integer", 16, "maximum number of tokens of each choice", 5, low=1)
    min_tokens: int = declared(
        "integer", 0, "at most the length limit; no end of text and no stop before this many tokens", 3
    )
    stop: tuple[str, ...] = declared(
        "texts", (), "a text or a list of texts; each ends a choice and is left out of it", ["\n", "END"],
        low=1, high=1024, most=16,
    )  # fmt: skip
    stop_token_ids: tuple[int, ...] = declared("ids", (), "each ends a choice", [13], most=64)
    ignore_eos: bool = declared("boolean", False, "continue past the end of text", True)
    include_stop_str_in_output: bool = declared("boolean", False, "keep the stop string in the text", True)
    skip_special_tokens: bool = declared("boolean", True, "leave special tokens out of the text", False)
    seed: int | None = declared(
        "integer", None, "-2^63..2^63-1; makes sampling reproducible: choice i of each prompt uses seed + i", 7,
        low=-MAX_SEED - 1, high=MAX_SEED,
    )  # fmt: skip
    logprobs: int | None = declared(
        "integer", None, "send each token's fused log-probability and those of this many alternatives", 3, high=20
    )
    logprob_token_ids: tuple[int, ...] = declared(
        "ids", (), "only with `logprobs`: of these ids in place of the likeliest alternatives", [1, 2], most=128
    )
    echo: bool = declared("boolean", False, "the prompt comes first in `text`, and in `logprobs`", True)
    prompt_logprobs: int | None = declared(
        "integer", None, "send the fused log-probability of each token of the prompt, its rank and those of this "
        "many alternatives; not with `stream`", 2, high=20,
    )  # fmt: skip
    form: TextForm | None = declared("form", None, "what the text must be", None)  # noqa: RUF009, as the others
    thinking_token_budget: int | None = declared(
        "integer", None, "after so many tokens of reasoning its end marker is forced; -1: no bound", 5, low=-1
    )
    repetition_penalty: float = declared(
        "number", 1.0, "over 1 makes tokens of prompt and completion less likely", 1.2, low=0.01, high=10
    )
    presence_penalty: float = declared(
        "number", 0.0, "subtracted from the log-probability of generated tokens", 0.5, low=-2, high=2
    )
    frequency_penalty: float = declared(
        "number",
        0.0,
        "subtracted, times the count, from the log-probability of generated tokens",
        0.5,
        low=-2,
        high=2,
    )
    logit_bias: tuple[tuple[int, float], ...] = declared(
        "biases", (), "token id -> added to its log-probability", {"50": -100}, low=-100, high=100, most=1024
    )
    allowed_token_ids: tuple[int, ...] = declared("ids", (), "no other token may be written", [1, 2], most=1024)
    bad_words: tuple[str, ...] = declared(
        "texts", (), "in the tokens that spell them, alone or behind a space, none is written", ["never"],
        low=1, high=256, most=128,
    )  # fmt: skip
    temperature: float = declared("number", 1.0, "0 is greedy: always the likeliest token", 0.5, high=2)
    top_k: int = declared("integer", 0, "keep this many of the likeliest tokens; 0 or -1 is off", 40)
    top_p: float = declared(
        "number", 1.0, "keep the likeliest tokens that together hold this mass", 0.5, high=1, above=True
    )
    min_p: float = declared(
        "number", 0.0, "keep tokens at least this likely relative to the likeliest", 0.1, high=1
    )

    def __post_init__(self) -> None:
        for name, parameter in PARAMETERS.items():
            if name not in _OWN_CHECKS:
                parameter.check(name, getattr(self, name))
        PARAMETERS["max_tokens"].check("max_tokens", self.max_tokens, low=0 if self.echo else None)
        PARAMETERS["min_tokens"].check("min_tokens", self.min_tokens, high=self.max_tokens)

    @property
    def scores_prompt(self) -> bool:
        """True if log-probabilities of the prompt are asked for."""
        return self.prompt_logprobs is not None or (self.echo and self.logprobs is not None)

    @property
    def budget(self) -> int | None:
        """Tokens of reasoning; None: any number."""
        return None if self.thinking_token_budget == -1 else self.thinking_token_budget

    @property
    def greedy(self) -> bool:
        """True if the likeliest token is always taken."""
        return self.temperature == 0.0

    @property
    def shapes_logits(self) -> bool:
        """True if penalties, biases or bans change the fused distribution."""
        return self.penalises or bool(self.logit_bias or self.allowed_token_ids or self.bad_words)

    @property
    def pinned_ids(self) -> tuple[int, ...]:
        """Main's ids that must be among the candidates: those with a positive bias, and the allowed ones."""
        raised = (token_id for token_id, bias in self.logit_bias if bias > 0)
        return tuple(dict.fromkeys((*raised, *self.allowed_token_ids)))

    @property
    def reports_tokens(self) -> bool:
        """True if log-probabilities of what is written are asked for."""
        return self.logprobs is not None or bool(self.logprob_token_ids)

    @property
    def asked_ids(self) -> tuple[int, ...]:
        """Main's ids that it must tell of whatever their rank: those above, and those that are reported."""
        return tuple(dict.fromkeys((*self.pinned_ids, *self.logprob_token_ids)))

    @property
    def looks_back(self) -> bool:
        """True if tokens of the completion change what may follow them."""
        return self.penalises or bool(self.bad_words)

    @property
    def penalises(self) -> bool:
        """True if tokens already in the text change the fused distribution."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != _NEUTRAL


PARAMETERS: Mapping[str, Parameter] = {each.name: each.metadata["parameter"] for each in fields(SamplingParams)}
_OWN_CHECKS = ("max_tokens", "min_tokens")  # they depend on other fields
_NEUTRAL = tuple(
    PARAMETERS[name].default for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")
)
