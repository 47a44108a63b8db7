"""The tokenizer endpoints: they use the tokenizer of a model's main member."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from server.api.services import REFUSALS, Services, ServicesOf
from server.edge.bodies import BodyRoute
from server.schema.tokenizers import DetokenizeReply, DetokenizeRequest, TokenizeReply, TokenizeRequest

router = APIRouter(responses=REFUSALS, route_class=BodyRoute)


def _model(services: Services, sent: str | None) -> str:
    """The model named in the request, or the first one."""
    return services.runtime.models()[0].name if sent is None else sent


@router.post("/tokenize", response_model_exclude_unset=True)
async def tokenize(body: TokenizeRequest, services: ServicesOf) -> TokenizeReply:
    """The token ids of a text or a conversation."""
    special = body.add_special_tokens is not False
    found = await services.runtime.tokenize(_model(services, body.model), body.input, special)
    ids = list(found.token_ids)
    pieces = list(found.tokens) if body.return_token_strs else None
    return TokenizeReply(count=len(ids), max_model_len=found.max_model_len, tokens=ids, token_strs=pieces)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, services: ServicesOf) -> DetokenizeReply:
    """The text of token ids."""
    text = await services.runtime.detokenize(_model(services, body.model), body.tokens)
    return DetokenizeReply(prompt=text)


@router.get("/tokenizer_info")
async def tokenizer_info(services: ServicesOf, model: str | None = None) -> dict[str, Any]:
    """Vocabulary, special tokens and chat template of the model's main member."""
    return services.runtime.tokenizer_info(_model(services, model))
