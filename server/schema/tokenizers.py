"""Bodies and answers of /tokenize and /detokenize."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ensemble_core.decoding.requests import Conversation
from ensemble_core.text.variables import TemplateVariables
from server.schema.chat import Message, to_conversation
from server.schema.json_values import Strict, Text, TokenIds, Variables
from server.schema.tools import Tools, to_tool_use


class _TokenizerBody(Strict):
    model: Text | None = Field(
        None,
        description="An ensemble, whose main member answers, or a member; the first of /v1/models if not sent.",
    )


class TokenizeRequest(_TokenizerBody):
    """The body of POST /tokenize: a text or a conversation."""

    model_config = ConfigDict(json_schema_extra={"example": {"model": "duo", "prompt": "The capital of France"}})

    prompt: Text | None = Field(None, description="A text; excludes messages.")
    messages: list[Message] | None = Field(
        None, min_length=1, fail_fast=True, description="A conversation; excludes prompt."
    )
    tools: Tools = Field(None, description="As in chat completions; only with messages.")
    add_special_tokens: bool | None = Field(None, description="As in completions; true if not sent.")
    add_generation_prompt: bool | None = Field(None, description="As in chat completions.")
    continue_final_message: bool | None = Field(None, description="As in chat completions.")
    chat_template_kwargs: Variables = Field(None, description="As in chat completions.")
    return_token_strs: bool | None = Field(None, description="Also send each token as the vocabulary writes it.")

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("either prompt or messages must be sent")
        if self.tools and self.messages is None:
            raise ValueError("tools are only allowed with messages")
        return self

    @property
    def input(self) -> str | Conversation:
        """What to tokenise. Raises InvalidRequestError as chat completions do."""
        if self.messages is None:
            return self.prompt or ""
        tools = to_tool_use(self.tools or (), None)
        variables = TemplateVariables(self.chat_template_kwargs or {})
        opens_turn = self.add_generation_prompt is not False
        return to_conversation(self.messages, bool(self.continue_final_message), opens_turn, tools, variables)


class TokenizeReply(BaseModel):
    """Token ids of the model's main member."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = Field(description="With return_token_strs: as the vocabulary writes them.")


class DetokenizeRequest(_TokenizerBody):
    """The body of POST /detokenize."""

    model_config = ConfigDict(json_schema_extra={"example": {"model": "duo", "tokens": [1, 2, 3]}})

    tokens: TokenIds = Field(description="Token ids of the model's main member.")


class DetokenizeReply(BaseModel):
    """The text of the token ids."""

    prompt: str
