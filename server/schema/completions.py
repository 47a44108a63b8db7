"""Bodies and answers of /v1/completions."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.schema.json_values import Prompts
from server.schema.replies import Reply, TraceStep
from server.schema.sampling import SamplingFields
from server.schema.unsupported import COMPLETION_IGNORED, COMPLETION_NEUTRAL, Neutral


class CompletionRequest(SamplingFields):
    """The body of POST /v1/completions."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"model": "duo", "prompt": "The capital of France is", "max_tokens": 32}}
    )
    neutral: ClassVar[Neutral] = COMPLETION_NEUTRAL
    ignored: ClassVar[frozenset[str]] = COMPLETION_IGNORED

    prompt: Prompts = Field(
        description="One text or several, or token ids of the main member, one list or several; none empty."
    )
    max_tokens: int | None = Field(
        None,
        description="Most tokens of each choice, 16 if not sent; 0 only with echo.",
        json_schema_extra={"minimum": 0},
    )
    best_of: int | None = Field(
        None,
        description="Sample this many and send the n with the highest mean log-probability; not in streams.",
        json_schema_extra={"minimum": 1},
    )
    echo: bool | None = Field(None, description="Send the prompt in front of each choice, too.")
    logprobs: int | None = Field(
        None,
        description="Send each token's log-probability and this many alternatives, of the fused distribution.",
        json_schema_extra={"minimum": 0, "maximum": 20},
    )
    add_special_tokens: bool | None = Field(
        None, description="Let tokenizers put their own tokens in front of a text prompt; true if not sent."
    )

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        """The prompts, one or several, as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [item for item in self.prompt if isinstance(item, int)]
        if ids:
            return [tuple(ids)]
        return [tuple(item) if isinstance(item, list) else str(item) for item in self.prompt]


class Logprobs(BaseModel):
    """Parallel lists, an entry a token. With echo the prompt's come first; its first token has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(BaseModel):
    """One choice, or a piece of it. index = prompt index * n + i."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None
    prompt_token_ids: list[int] | None = Field(None, description="With return_token_ids.")
    token_ids: list[int] | None = Field(None, description="With return_token_ids.")
    trace: list[TraceStep] | None = Field(None, description="With ensemble.trace: an entry a token.")


class TextCompletion(Reply):
    """An answer, or one chunk of a stream. `usage` is left out of chunks unless it was asked for."""

    object: Literal["text_completion"]
    choices: list[Choice]
