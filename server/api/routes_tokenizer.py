"""The tokenizer endpoints: what a model's main member makes of text, and of ids."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from server.edge.state import REFUSALS, Edge, EdgeOf
from server.schema.tokenizer import DetokenizeAnswer, DetokenizeRequest, TokenizeAnswer, TokenizeRequest

router = APIRouter(responses=REFUSALS)


def _model(edge: Edge, sent: str | None) -> str:
    """The model that was asked for, or the first."""
    return edge.runtime.models()[0].name if sent is None else sent


@router.post("/tokenize", response_model_exclude_unset=True)
async def tokenize(body: TokenizeRequest, edge: EdgeOf) -> TokenizeAnswer:
    """The token ids of a text or a conversation."""
    special = body.add_special_tokens is not False
    found = await edge.runtime.tokenize(_model(edge, body.model), body.input, special)
    ids = list(found.token_ids)
    answer = TokenizeAnswer(count=len(ids), max_model_len=found.max_model_len, tokens=ids)
    if body.return_token_strs:
        answer.token_strs = list(found.tokens)
    return answer


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, edge: EdgeOf) -> DetokenizeAnswer:
    """The text of token ids."""
    text = await edge.runtime.detokenize(_model(edge, body.model), body.tokens)
    return DetokenizeAnswer(prompt=text)


@router.get("/tokenizer_info")
async def tokenizer_info(edge: EdgeOf, model: str | None = None) -> dict[str, Any]:
    """Vocabulary, special tokens and chat template of the model's main member."""
    return edge.runtime.tokenizer_info(_model(edge, model))
