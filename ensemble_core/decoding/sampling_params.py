"""How one request wants its tokens: bounds, randomness, penalties, stops, what it wants to be told. No torch.

Invariant: an instance is valid by itself; what depends on a vocabulary (ids) is checked at admission. Every field
is checked on construction, so the offline API and HTTP refuse the same values with the same words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ensemble_core.errors import InvalidRequestError

MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
MAX_STOP_TOKENS = 64
MAX_BIASES = 1024
MAX_LOGPROBS = 20
MAX_SEED = 2**63 - 1
MAX_GRAMMAR_LENGTH = 65_536


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Parameters that act once, after fusion, in the order of the fields from `repetition_penalty` on.

    Token ids are the main member's. temperature: 0 is greedy. top_k: 0 is off. logprobs: how many alternatives to
    report per token, None for none; of the fused distribution, before everything below. echo: report the prompt
    too (with logprobs: its teacher-forced fused log-probabilities); the one case in which max_tokens may be 0.
    json_schema: the text must be JSON of this schema ("" is any JSON object); None is free text.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    seed: int | None = None
    logprobs: int | None = None
    echo: bool = False
    json_schema: str | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        _check_int("max_tokens", self.max_tokens, 0 if self.echo else 1, 2**31 - 1)
        _check_int("min_tokens", self.min_tokens, 0, max(self.max_tokens, 0))
        _check_stops(self.stop)
        _check_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKENS)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "echo"):
            _check_bool(name, getattr(self, name))
        if self.seed is not None:
            _check_int("seed", self.seed, -MAX_SEED - 1, MAX_SEED)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.json_schema is not None and len(self.json_schema) > MAX_GRAMMAR_LENGTH:
            raise InvalidRequestError(
                f"response_format: a schema may have up to {MAX_GRAMMAR_LENGTH} characters, got "
                f"{len(self.json_schema)}",
                "response_format",
            )
        self._check_numbers()

    def _check_numbers(self) -> None:
        _check_float("repetition_penalty", self.repetition_penalty, 0.01, 10.0)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_ids("logit_bias", tuple(token_id for token_id, _ in self.logit_bias), MAX_BIASES)
        for _, bias in self.logit_bias:
            _check_float("logit_bias", bias, -100.0, 100.0)
        _check_float("temperature", self.temperature, 0.0, 2.0)
        _check_int("top_k", self.top_k, 0, 2**31 - 1)
        _check_float("top_p", self.top_p, 0.0, 1.0)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise InvalidRequestError("top_p must be greater than 0 and at most 1, got 0", "top_p")

    @property
    def greedy(self) -> bool:
        """True where the likeliest token is taken."""
        return self.temperature == 0.0

    @property
    def shapes_logits(self) -> bool:
        """True where penalties or biases change the fused distribution."""
        neutral = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) == (1.0, 0.0, 0.0)
        return not neutral or bool(self.logit_bias)


def _check_int(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequestError(f"{name} must be an integer from {low} to {high}, got {value!r}", name)


def _check_float(name: str, value: float, low: float, high: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or math.isnan(value) or not low <= value <= high:
        raise InvalidRequestError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}", name)


def _check_bool(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise InvalidRequestError(f"{name} must be true or false, got {value!r}", name)


def _check_ids(name: str, ids: tuple[int, ...], most: int) -> None:
    if len(ids) > most:
        raise InvalidRequestError(f"{name} takes up to {most} entries, got {len(ids)}", name)
    for token_id in ids:
        _check_int(name, token_id, 0, 2**31 - 1)


def _check_stops(stops: tuple[str, ...]) -> None:
    if isinstance(stops, str):
        raise InvalidRequestError(f"stop must be a tuple of strings, got the string {stops!r}", "stop")
    if len(stops) > MAX_STOPS:
        raise InvalidRequestError(f"stop takes up to {MAX_STOPS} strings, got {len(stops)}", "stop")
    for stop in stops:
        if not 1 <= len(stop) <= MAX_STOP_LENGTH:
            raise InvalidRequestError(
                f"each stop string must have 1 to {MAX_STOP_LENGTH} characters, got {len(stop)}", "stop"
            )
