"""The endpoints. Each takes what it needs from `Edge`, which the app carries; there are no globals."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from ensemble_core.errors import ModelNotFoundError, NotReadyError
from server.api import chat, completions
from server.api.generation import Job
from server.api.sse import EventStream, unless_gone
from server.edge.metrics import CONTENT_TYPE
from server.edge.state import REFUSALS, Edge, EdgeOf
from server.schema.answer import ModelCard, ModelList
from server.schema.chat import ChatCompletion, ChatRequest
from server.schema.completion import Completion, CompletionRequest

if TYPE_CHECKING:
    from ensemble_core.runtime import ModelInfo

_EVENTS = "Events: the data of each is a chunk of the same object, of the last `[DONE]`."
_STREAM = {"text/event-stream": {"schema": {"description": _EVENTS}}}

router = APIRouter(responses=REFUSALS)


def _answers(model: type) -> dict[int | str, dict[str, Any]]:
    return {200: {"model": model, "content": _STREAM, "description": "An answer, or its stream."}}


@router.post("/v1/completions", response_model=None, responses=_answers(Completion))
async def create_completion(body: CompletionRequest, request: Request, edge: EdgeOf) -> Response:
    """Continue one or several prompts.

    With `stream` the answer is server-sent events, each a chunk of the same object, then `[DONE]`.
    """
    job = completions.plan(body, edge.config.max_choices)
    return await _run(job, bool(body.stream), request, edge)


@router.post("/v1/chat/completions", response_model=None, responses=_answers(ChatCompletion))
async def create_chat_completion(body: ChatRequest, request: Request, edge: EdgeOf) -> Response:
    """Answer a conversation; each member reads it through its own chat template.

    With `stream` the answer is server-sent events of `chat.completion.chunk` objects, then `[DONE]`.
    """
    prompt = chat.conversation(body)
    limit = chat.length_limit(body)
    with chat.chat_words(body):
        if limit is None:
            found = await edge.runtime.tokenize(body.model, prompt)
            limit = chat.room_left(len(found.token_ids), found.max_model_len)
        job = chat.plan(body, prompt, limit, edge.config.max_choices)
        return await _run(job, bool(body.stream), request, edge)


async def _run(job: Job, stream: bool, request: Request, edge: Edge) -> Response:
    """The whole answer, or a stream whose first chunk is there: until then errors are real statuses."""
    outputs = await edge.runtime.submit(job.ticket.requests)
    try:
        if stream:
            chunks = job.chunks(outputs)
            return EventStream(await unless_gone(request.receive, anext(chunks)), chunks)
        answer = await unless_gone(request.receive, job.answer(outputs))
        return Response(answer.model_dump_json(exclude_unset=True), media_type="application/json")
    except BaseException:
        await outputs.aclose()
        raise


@router.get("/v1/models")
async def list_models(edge: EdgeOf) -> ModelList:
    """Every ensemble and every member."""
    return ModelList(data=[_card(model, edge) for model in edge.runtime.models()])


@router.get("/v1/models/{model_id:path}")
async def get_model(model_id: str, edge: EdgeOf) -> ModelCard:
    """One model by its name."""
    models = {model.name: model for model in edge.runtime.models()}
    if model_id not in models:
        raise ModelNotFoundError(f"model {model_id!r} is unknown; there are {sorted(models)}")
    return _card(models[model_id], edge)


def _card(model: ModelInfo, edge: Edge) -> ModelCard:
    return ModelCard(
        id=model.name,
        created=edge.created,
        kind=model.kind,
        max_model_len=model.max_model_len,
        recipe=model.recipe,
    )


@router.get("/health")
async def health(edge: EdgeOf) -> dict[str, str]:
    """200 while the engine's loop is alive, be it loading or draining."""
    status = edge.runtime.status()
    if status.state == "dead":
        raise NotReadyError(f"the engine is dead: {status.reason}")
    return {"status": status.state}


@router.get("/ready")
async def ready(edge: EdgeOf) -> dict[str, str]:
    """200 once everything is loaded and while nothing drains."""
    status = edge.runtime.status()
    if status.state != "ready":
        raise NotReadyError(f"not ready, {status.state}: {status.reason}")
    return {"status": status.state}


@router.get("/version")
async def get_version() -> dict[str, str]:
    """Of this server."""
    return {"version": version("unisono")}


@router.get("/metrics", response_class=Response)
async def get_metrics(edge: EdgeOf) -> Response:
    """Prometheus' text format."""
    members = [model.name for model in edge.runtime.models() if model.kind == "member"]
    edge.metrics.members_up(members, edge.runtime.status().state in ("ready", "draining"))
    return Response(edge.metrics.render(), headers={"Content-Type": CONTENT_TYPE})
