"""The endpoints. Each takes what it needs from `Edge`, which the app carries; there are no globals."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any, cast

from fastapi import APIRouter, Depends, Request, Response

from ensemble_core.config import ServerConfig
from ensemble_core.errors import ModelNotFoundError, NotReadyError
from server.completions import Job, chunks, fold, plan
from server.metrics import CONTENT_TYPE, PrometheusSink
from server.schemas import Completion, CompletionRequest, ErrorBody, ModelCard, ModelList
from server.sse import EventStream, unless_gone

if TYPE_CHECKING:
    from ensemble_core.runtime import ModelInfo, Runtime


@dataclass(frozen=True, slots=True)
class Edge:
    """What the routes of one app share."""

    runtime: Runtime
    config: ServerConfig
    metrics: PrometheusSink
    created: int  # Unix time of the app's start


async def _edge(request: Request) -> Edge:
    return cast(Edge, request.app.state.edge)


EdgeOf = Annotated[Edge, Depends(_edge)]
_ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {"model": ErrorBody, "description": "Any refusal, in OpenAI's shape."}
}
_STREAM = {"text/event-stream": {"schema": {"type": "string"}}}

router = APIRouter(responses=_ERRORS)


@router.post(
    "/v1/completions",
    response_model=None,
    responses={200: {"model": Completion, "content": _STREAM, "description": "An answer, or its stream."}},
)
async def create_completion(body: CompletionRequest, request: Request, edge: EdgeOf) -> Response:
    """Continue one or several prompts.

    With `stream` the answer is server-sent events, each a chunk of the same object, then `[DONE]`.
    """
    job = plan(body, edge.config.max_choices)
    outputs = await edge.runtime.submit(job.requests)
    stream = chunks(job, outputs)
    try:
        return await _respond(body, request, job, stream)
    except BaseException:
        await stream.aclose()
        await outputs.aclose()
        raise


async def _respond(
    body: CompletionRequest, request: Request, job: Job, stream: AsyncGenerator[Completion]
) -> Response:
    """The whole answer, or a stream whose first chunk is there: until then errors are real statuses."""
    if body.stream:
        return EventStream(await unless_gone(request.receive, anext(stream)), stream)
    answer = await unless_gone(request.receive, fold(job, stream))
    return Response(answer.model_dump_json(), media_type="application/json")


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
