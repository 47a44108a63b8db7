"""The parameters that completions and chat share: sampling, stops, streaming, our extension.

`SamplingParams` declares and checks ranges, with the same messages for the offline API; here they only document.
The tables of docs/api.md are generated from the fields' descriptions and first examples.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from ensemble_core.decoding.forms import TextForm
from ensemble_core.decoding.requests import MOST_PRIORITY
from ensemble_core.decoding.sampling_params import PARAMETERS
from ensemble_core.errors import InvalidRequestError, quoted, shortened
from server.schema.forms import FormFields
from server.schema.json_values import (
    AllowedTokenIds,
    BadWords,
    Integer,
    LogitBias,
    LogprobTokenIds,
    Stop,
    StopTokenIds,
    Strict,
    Text,
)
from server.schema.unsupported import Ignored, Refused, refuse_unsupported

logger = logging.getLogger(__name__)

MAX_SALT = 1024  # characters, as in vLLM


def _strategy(value: object) -> object:
    """`"relative"` is short for `{"name": "relative"}`."""
    return {"name": value} if isinstance(value, str) else value


def parameter(name: str, note: str = "", **schema: Any) -> Any:
    """A field for the `SamplingParams` parameter of that name, with the description declared there.

    note, schema: replace the declared note and JSON Schema keywords for one endpoint.
    """
    found = PARAMETERS[name]
    return Field(
        None,
        description=found.describe(note),
        examples=[found.example],
        json_schema_extra=found.json_schema() | schema,
    )


class StreamOptions(Strict):
    """What a stream sends besides text."""

    include_usage: bool | None = Field(
        None, description="Send one more chunk before [DONE], with the usage and without choices."
    )
    continuous_usage_stats: bool | None = Field(
        None, description="Send the usage so far in each chunk; only with include_usage, else it changes nothing."
    )


class StrategyChoice(Strict):
    """A registered fusion or mode, and its options."""

    model_config = ConfigDict(extra="forbid")

    name: Text
    options: dict[str, Any] | None = None


def _weighting(value: object) -> object:
    """`"perplexity"` is short for `{"by": "perplexity"}`."""
    return {"by": value} if isinstance(value, str) else value


class WeightingChoice(Strict):
    """How weights are set: fixed, from the perplexity of the prompt, or by a gate at each place."""

    model_config = ConfigDict(extra="forbid")

    by: Literal["fixed", "perplexity", "gate"]
    tau: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = Field(
        None, description="Temperature of perplexity weighting, in nats per byte."
    )


class LimitsChoice(Strict):
    """Limits of a council, for this request."""

    model_config = ConfigDict(extra="forbid")

    max_calls: Annotated[Integer, Field(ge=1)] | None = Field(None, description="Calls to models.")
    max_tokens: Annotated[Integer, Field(ge=1)] | None = Field(None, description="Tokens of all calls.")
    seconds: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = Field(
        None, description="From arrival to the last token."
    )


class EnsembleOptions(Strict):
    """Our extension: what this request changes in its ensemble. Sent through the SDK's `extra_body`."""

    model_config = ConfigDict(extra="forbid")

    members: list[Text] | None = Field(
        None, min_length=1, max_length=64, description="The members to use, including the main member."
    )
    weights: dict[str, Annotated[float, Field(ge=0.0, allow_inf_nan=False)]] | None = Field(
        None, min_length=1, max_length=64, description="Member -> weight; scaled to sum to 1."
    )
    weighting: Annotated[
        WeightingChoice | None, BeforeValidator(_weighting, json_schema_input_type=str | WeightingChoice | None)
    ] = Field(
        None,
        description="fixed, perplexity, gate, or {by, tau}: whether weights depend on the prompt's perplexity, or on "
        "what members say at each place (where a gate is configured).",
    )
    fusion: Annotated[
        StrategyChoice | None, BeforeValidator(_strategy, json_schema_input_type=str | StrategyChoice | None)
    ] = Field(None, description="Name of a fusion, or {name, options}.")
    mode: Annotated[
        StrategyChoice | None, BeforeValidator(_strategy, json_schema_input_type=str | StrategyChoice | None)
    ] = Field(None, description="Name of a mode (lockstep), or {name, options}: how steps are taken.")
    limits: LimitsChoice | None = Field(
        None, description="Of a council: max_calls, max_tokens, seconds; lower than the configured ones."
    )
    trace: bool | None = Field(
        None, description="Each choice reports what every member proposed for each of its tokens."
    )

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: object) -> object:
        if isinstance(value, dict) and (unknown := [key for key in value if key not in cls.model_fields]):
            known = ", ".join(sorted(cls.model_fields))
            message = f"ensemble.{shortened(unknown[0])} is unknown; ensemble takes {known}"
            raise InvalidRequestError(message, f"ensemble.{unknown[0]}")
        return value


class GenerationFields(Strict):
    """A body that asks for text. Subclasses list the parameters that they refuse and those that they ignore."""

    refused: ClassVar[Mapping[str, Refused]] = {}
    ignored: ClassVar[Mapping[str, Ignored]] = {}

    model: Text = Field(
        description="an ensemble or a member, as `/v1/models` names it; unknown: 404", examples=["a"]
    )
    temperature: float | None = parameter("temperature")
    top_p: float | None = parameter("top_p")
    top_k: Integer | None = parameter("top_k", minimum=-1)
    min_p: float | None = parameter("min_p")
    presence_penalty: float | None = parameter("presence_penalty")
    frequency_penalty: float | None = parameter("frequency_penalty")
    repetition_penalty: float | None = parameter("repetition_penalty")
    logit_bias: LogitBias = parameter("logit_bias")
    allowed_token_ids: AllowedTokenIds = parameter("allowed_token_ids")
    bad_words: BadWords = parameter("bad_words")
    seed: Integer | None = parameter("seed")
    stop: Stop = parameter("stop")
    stop_token_ids: StopTokenIds = parameter("stop_token_ids")
    include_stop_str_in_output: bool | None = parameter("include_stop_str_in_output")
    ignore_eos: bool | None = parameter("ignore_eos")
    min_tokens: Integer | None = parameter("min_tokens")
    skip_special_tokens: bool | None = parameter("skip_special_tokens")
    stream: bool | None = Field(
        None, description="send text in server-sent events as it is generated, then `[DONE]`", examples=[True]
    )
    ensemble: EnsembleOptions | None = Field(
        None, description="our extension, see below", examples=[{"members": ["a"]}]
    )
    cache_salt: Annotated[Text, Field(min_length=1, max_length=MAX_SALT)] | None = Field(
        None,
        description=f"1..{MAX_SALT} characters; cached prefixes are shared only with requests of the same salt; keep "
        "it secret",
        examples=["salt"],
    )
    priority: Integer | None = Field(
        None,
        description=f"-{MOST_PRIORITY}..{MOST_PRIORITY}; of requests that wait a lower number goes first; only with "
        "`scheduler.priority`, else it changes nothing",
        examples=[1],
    )
    user: str | None = Field(None, description="nothing is kept about users", examples=["me"])

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, body: object) -> object:
        if isinstance(body, dict):
            refuse_unsupported(body, cls.refused)
            if unknown := body.keys() - cls.model_fields.keys() - cls.refused.keys() - cls.ignored.keys():
                logger.debug("ignored unknown fields: %s", quoted(sorted(unknown)))
        return body

    @property
    def form(self) -> TextForm | None:
        """What the text must be; None for free text. Raises InvalidRequestError."""
        return None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class SamplingFields(FormFields, GenerationFields):
    """A body that asks for choices: those of completions and chat."""

    n: Integer | None = Field(
        None,
        description="1 if not sent; number of choices of each prompt; they share its prefill",
        examples=[2],
        json_schema_extra={"minimum": 1},
    )
    prompt_logprobs: Integer | None = parameter("prompt_logprobs")
    logprob_token_ids: LogprobTokenIds = parameter("logprob_token_ids")
    return_tokens_as_token_ids: bool | None = Field(
        None, description='tokens in log-probabilities are named by their ids, `"token_id:123"`', examples=[True]
    )
    return_token_ids: bool | None = Field(
        None,
        description="send the token ids of the prompt and of each choice; in a stream the prompt's come once",
        examples=[True],
    )
    stream_options: StreamOptions | None = Field(
        None,
        description="`include_usage`, `continuous_usage_stats`; only with `stream`",
        examples=[{"include_usage": True}],
    )
