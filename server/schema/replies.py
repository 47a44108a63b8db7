"""Parts of answers that endpoints share: usage, traces, models, errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field


class Sent(BaseModel):
    """A part of an answer. What is not set is not sent, except for the fields of `always`, which are then null.

    These are the fields that vLLM sends as null: its clients read them without asking whether they are there.
    """

    always: ClassVar[tuple[str, ...]] = ()

    def model_post_init(self, _context: Any) -> None:
        """Count the fields of `always` as set."""
        self.__pydantic_fields_set__.update(self.always)


class PromptTokensDetails(BaseModel):
    """Details of `prompt_tokens`."""

    cached_tokens: int = Field(description="Found in the main member's cache of earlier prompts.")


class CompletionTokensDetails(BaseModel):
    """Details of `completion_tokens`."""

    reasoning_tokens: int = Field(description="Of reasoning, without the markers around it.")


class CallUsage(BaseModel):
    """One call that a council made. Tokens are the called model's."""

    choice: int = Field(description="Index of the choice that it was made for.")
    node: str = Field(description="Who was asked; within another council after that one's node and a slash.")
    model: str
    round: int
    sample: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    seconds: float
    reasoning_tokens: int
    outcome: str = Field(description="stop, length, or why there is no answer: failed, timeout, ended early.")


class Usage(BaseModel):
    """Counts of the main member's tokens. Each prompt counts once, however many choices it has.

    Of a council they are the sums of its calls.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = Field(
        None, description="Of models that may reason; not sent for others."
    )
    calls: list[CallUsage] | None = Field(None, description="Of a council; not sent for other models.")
    dropped_members: dict[str, str] | None = Field(
        None, description="Member -> why a choice went on without it; not sent if no member was lost."
    )


class PromptToken(BaseModel):
    """A token of the prompt, or an alternative to it, in vLLM's form."""

    logprob: float
    rank: int = Field(description="In the fused distribution; 1 is the likeliest.")
    decoded_token: str


class Reply(BaseModel):
    """Fields that completions, chat completions and their chunks share."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[BaseModel]
    usage: Usage | None = None
    served_by: str | None = Field(None, description="Of a council: the models that answered; not sent for others.")
    service_tier: None = Field(None, description="Null in whole answers: there is one tier.")
    system_fingerprint: None = Field(None, description="Null in whole answers.")
    kv_transfer_params: None = Field(None, description="Null in whole answers: there is one server.")

    def close(self) -> None:
        """Send null in a whole answer where vLLM does."""
        self.service_tier = self.system_fingerprint = self.kv_transfer_params = None


class TracedToken(BaseModel):
    """One candidate of a member or of the fused distribution, with its probability."""

    token: str
    prob: float


class TracedDraft(BaseModel):
    """How a drafted token fared (mode verify)."""

    token: str = Field(description="What was drafted.")
    drafter: str = Field(
        description="main; lookup or an assistant's name: the main member was fed its guess, and chose it."
    )
    sound: bool = Field(description="Every assistant has a token boundary before it.")
    needed: bool = Field(description="The fusion decided.")
    certified: bool = Field(description="No assistant could have changed it.")
    kept: bool


class TraceStep(BaseModel):
    """How one token was chosen."""

    token: str
    consulted: bool = Field(description="False where the main member decided alone.")
    members: dict[str, list[TracedToken]] = Field(description="Member -> its likeliest tokens, best first.")
    fused: list[TracedToken]
    agreed: dict[str, bool] = Field(description="Assistant -> whether its likeliest token spells the same.")
    weights: dict[str, float] = Field(description="Weights of the members that were consulted; they sum to 1.")
    left_out: dict[str, str] = Field(description="Member that was not asked -> why.")
    draft: TracedDraft | None = Field(None, description="Null where the token was not drafted.")
    prob: float = Field(description="Of the token in the fused distribution.")
    entropy: float = Field(description="Of the fused distribution, in nats.")
    given: dict[str, float | None] = Field(
        description="Member -> the probability that it gives to its own token of the same spelling: 0 beyond its "
        "candidates, null where it has no such token."
    )
    unmapped: dict[str, float] = Field(
        description="Member that was fused -> its mass that found no place in main's vocabulary."
    )
    bytes: list[int] | None = Field(description="What the token adds to the text; null for a control token.")


class ModelPermission(BaseModel):
    """What may be done with a model: the same for all, in the form of OpenAI's older API."""

    id: str
    object: Literal["model_permission"] = "model_permission"
    created: int
    allow_create_engine: bool = False
    allow_sampling: bool = True
    allow_logprobs: bool = True
    allow_search_indices: bool = False
    allow_view: bool = True
    allow_fine_tuning: bool = False
    organization: str = "*"
    group: str | None = None
    is_blocking: bool = False


class ModelCard(BaseModel):
    """One servable model. An ensemble has a `recipe`: members with weights, main, fusion, mode; a council its own.

    A model that lacks members answers 503 until they are back.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "unisono"
    root: str = Field(description="Its own id.")
    parent: str | None = Field(description="Of an adapter, the member whose weights it runs.")
    kind: Literal["ensemble", "council", "member"]
    max_model_len: int
    recipe: dict[str, Any] | None
    status: Literal["ready", "lacks_members"] = Field("ready", description="Whether all its members are there.")
    lacks: dict[str, str] = Field(
        default_factory=dict,
        description="Member that takes no requests now -> why: draining, unloaded, asleep, loading, waking.",
    )
    permission: list[ModelPermission]


class ModelList(BaseModel):
    """All servable models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class StrategyList(BaseModel):
    """What a request may choose under `ensemble`: name -> the JSON schema of its options."""

    fusions: dict[str, dict[str, Any]]
    modes: dict[str, dict[str, Any]]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every refusal."""

    error: ErrorDetail
