"""The parameters that completions and chat share: sampling, stops, streaming, our extension.

Ranges are checked by `SamplingParams`, in the same words for the offline API; here they only document.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from ensemble_core.decoding.sampling_params import MAX_STOP_TOKENS, MAX_STOPS
from ensemble_core.errors import InvalidRequestError
from server.schema.json_values import LogitBias, Stop, StopTokenIds, Strict, Text, decoded
from server.schema.unsupported import Neutral, refuse_unsupported

logger = logging.getLogger(__name__)


def _fusion(value: object) -> object:
    """`"relative"` is short for `{"name": "relative"}`."""
    return {"name": value} if isinstance(value, str) else value


def _range(low: float, high: float) -> dict[str, Any]:
    return {"minimum": low, "maximum": high}


class StreamOptions(Strict):
    """What a stream carries besides text."""

    include_usage: bool | None = Field(
        None, description="One more chunk before [DONE], without choices, that carries the usage."
    )
    continuous_usage_stats: bool | None = Field(None, description="Usage so far in each chunk.")


class FusionChoice(Strict):
    """A registered fusion and its options."""

    model_config = ConfigDict(extra="forbid")

    name: Text
    options: dict[str, Any] | None = None


def _weighting(value: object) -> object:
    """`"perplexity"` is short for `{"by": "perplexity"}`."""
    return {"by": value} if isinstance(value, str) else value


class WeightingChoice(Strict):
    """Where weights come from."""

    model_config = ConfigDict(extra="forbid")

    by: Literal["fixed", "perplexity"]
    tau: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = Field(
        None, description="Of perplexity, in nats per byte."
    )


class EnsembleOptions(Strict):
    """Our extension: what this request changes of its ensemble. Sent through the SDK's `extra_body`."""

    model_config = ConfigDict(extra="forbid")

    members: list[Text] | None = Field(
        None, min_length=1, max_length=64, description="The members to use, the main one among them."
    )
    weights: dict[str, Annotated[float, Field(ge=0.0, allow_inf_nan=False)]] | None = Field(
        None, min_length=1, max_length=64, description="Member -> weight; scaled to sum to 1."
    )
    weighting: Annotated[
        WeightingChoice | None, BeforeValidator(_weighting, json_schema_input_type=str | WeightingChoice | None)
    ] = Field(None, description="fixed, perplexity, or {by, tau}: whether weights follow the prompt's perplexity.")
    fusion: Annotated[
        FusionChoice | None, BeforeValidator(_fusion, json_schema_input_type=str | FusionChoice | None)
    ] = Field(None, description="Name of a fusion, or {name, options}.")
    mode: Literal["lockstep"] | None = Field(None, description="How steps are taken.")
    trace: bool | None = Field(
        None, description="Each choice carries, for each of its tokens, what every member proposed."
    )

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: object) -> object:
        if isinstance(value, dict) and (unknown := [key for key in value if key not in cls.model_fields]):
            path = f"ensemble.{unknown[0]}"
            known = ", ".join(sorted(cls.model_fields))
            raise InvalidRequestError(f"{path} is unknown; ensemble takes {known}", path)
        return value


class SamplingFields(Strict):
    """A body that asks for text. Subclasses say what they refuse and what they know to ignore."""

    neutral: ClassVar[Neutral] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()

    model: Text = Field(description="An ensemble or a member; GET /v1/models lists them.")
    temperature: float | None = Field(
        None, description="1 if not sent; 0 takes the likeliest token.", json_schema_extra=_range(0, 2)
    )
    top_p: float | None = Field(
        None,
        description="Keep the likeliest tokens that together hold this mass; 1 (all) if not sent.",
        json_schema_extra={"exclusiveMinimum": 0, "maximum": 1},
    )
    top_k: int | None = Field(
        None,
        description="Keep this many of the likeliest tokens; -1 or 0 (all) if not sent.",
        json_schema_extra=_range(-1, 2**31 - 1),
    )
    min_p: float | None = Field(
        None,
        description="Keep tokens at least this likely relative to the likeliest; 0 (all) if not sent.",
        json_schema_extra=_range(0, 1),
    )
    presence_penalty: float | None = Field(
        None,
        description="Off the logit of generated tokens; 0 if not sent.",
        json_schema_extra=_range(-2, 2),
    )
    frequency_penalty: float | None = Field(
        None,
        description="Off the logit of generated tokens, times their count; 0 if not sent.",
        json_schema_extra=_range(-2, 2),
    )
    repetition_penalty: float | None = Field(
        None,
        description="Divides the logit of tokens of prompt and completion; 1 if not sent.",
        json_schema_extra=_range(0.01, 10),
    )
    logit_bias: LogitBias = Field(None, description="Id of the main member -> added to its logit, -100..100.")
    n: int | None = Field(
        None, description="Choices for each prompt, 1 if not sent.", json_schema_extra={"minimum": 1}
    )
    seed: int | None = Field(
        None,
        description="Makes sampling reproducible. Choice i of each prompt draws with seed + i.",
        json_schema_extra=_range(-(2**63), 2**63 - 1),
    )
    stop: Stop = Field(None, description=f"Up to {MAX_STOPS} texts that end a choice; they are not part of it.")
    stop_token_ids: StopTokenIds = Field(
        None, description=f"Up to {MAX_STOP_TOKENS} ids of the main member that end a choice."
    )
    include_stop_str_in_output: bool | None = Field(None, description="Keep the stop string in the text.")
    ignore_eos: bool | None = Field(None, description="Go on past the end of text.")
    min_tokens: int | None = Field(
        None, description="No end of text and no stop before this many tokens.", json_schema_extra={"minimum": 0}
    )
    skip_special_tokens: bool | None = Field(None, description="Leave special tokens out of the text; true.")
    return_token_ids: bool | None = Field(None, description="Send the ids of prompt and choices, too.")
    stream: bool | None = Field(None, description="Send server-sent events as text comes.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    user: str | None = Field(None, description="Accepted; changes nothing.")
    ensemble: EnsembleOptions | None = Field(None, description="What to change of the ensemble; see there.")

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, value: object) -> object:
        body = decoded(value)
        if isinstance(body, dict):
            refuse_unsupported(body, cls.neutral)
            if unknown := body.keys() - cls.model_fields.keys() - cls.neutral.keys() - cls.ignored:
                logger.debug("ignored unknown fields: %s", sorted(unknown))
        return body

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
