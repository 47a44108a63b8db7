"""The endpoints of models: completions, chat completions, responses, the list. There are no globals."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from ensemble_core.errors import ModelNotFoundError, quoted
from server.api import chat, completions, messages, responses
from server.api.jobs import Job
from server.api.services import REFUSALS, Services, ServicesOf
from server.api.streams import begin, unless_gone
from server.edge.auth import BATCH, CLIENT
from server.edge.bodies import BodyRoute
from server.edge.exchange import Generation, accepted
from server.schema.chat import ChatCompletion, ChatRequest
from server.schema.completions import CompletionRequest, TextCompletion
from server.schema.message_replies import MessageReply, TokenCount
from server.schema.messages import CountTokensRequest, MessagesRequest
from server.schema.replies import ModelCard, ModelList, ModelPermission, StrategyList
from server.schema.response_replies import ResponseObject
from server.schema.responses import ResponseRequest

if TYPE_CHECKING:
    from ensemble_core.runtime import ModelInfo

_EVENTS = "Server-sent events: each carries a chunk of the same object; the last carries `[DONE]`."
_NAMED_EVENTS = "Server-sent events, each with a name; there is no `[DONE]`."

router = APIRouter(responses=REFUSALS, route_class=BodyRoute)


def _answers(model: type, events: str = _EVENTS) -> dict[int | str, dict[str, Any]]:
    stream = {"text/event-stream": {"schema": {"description": events}}}
    return {200: {"model": model, "content": stream, "description": "An answer, or its stream."}}


@router.post("/v1/completions", response_model=None, responses=_answers(TextCompletion))
async def create_completion(body: CompletionRequest, request: Request, services: ServicesOf) -> Response:
    """Continue one or several prompts.

    With `stream` the answer is server-sent events, each a chunk of the same object, then `[DONE]`.
    """
    job = completions.plan(body, services.config.max_choices)
    return await _run(job, bool(body.stream), request, services)


@router.post("/v1/chat/completions", response_model=None, responses=_answers(ChatCompletion))
async def create_chat_completion(body: ChatRequest, request: Request, services: ServicesOf) -> Response:
    """Answer a conversation; each member reads it through its own chat template.

    With `stream` the answer is server-sent events of `chat.completion.chunk` objects, then `[DONE]`.
    """
    prompt = chat.conversation(body)
    limit = chat.length_limit(body)
    with chat.chat_words(body):
        if limit is None:
            found = await services.runtime.tightest(body.model, prompt)
            limit = chat.room_left(len(found.token_ids), found.max_model_len)
        job = chat.plan(body, prompt, limit, services.config.max_choices)
        return await _run(job, bool(body.stream), request, services)


@router.post("/v1/responses", response_model=None, responses=_answers(ResponseObject, _NAMED_EVENTS))
async def create_response(body: ResponseRequest, request: Request, services: ServicesOf) -> Response:
    """Answer a conversation in the form of OpenAI's newer API; nothing is stored.

    With `stream` the answer is server-sent events with names and numbers; the last has the whole response.
    """
    with responses.response_words():
        prompt, limit = await responses.fitted(body, partial(services.runtime.tightest, body.model))
        job = responses.plan(body, prompt, limit)
        return await _run(job, bool(body.stream), request, services)


@router.post("/v1/messages", response_model=None, responses=_answers(MessageReply, _NAMED_EVENTS))
async def create_message(body: MessagesRequest, request: Request, services: ServicesOf) -> Response:
    """Answer a conversation in Anthropic's form.

    With `stream` the answer is server-sent events with names, from `message_start` to `message_stop`.
    """
    with messages.message_words(body):
        return await _run(messages.plan(body), bool(body.stream), request, services)


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountTokensRequest, services: ServicesOf) -> TokenCount:
    """How many tokens the messages are, tools and the system's text among them; nothing is answered."""
    with messages.message_words(body):
        found = await services.runtime.tightest(body.model, messages.to_conversation(body))
        return TokenCount(input_tokens=len(found.token_ids))


async def _run(job: Job, stream: bool, request: Request, services: Services) -> Response:
    """The whole answer, or a stream once it has begun. Errors before that get real statuses."""
    client = str(request.scope.get(CLIENT, ""))
    owner, batch = (client, job.ticket.id), BATCH in request.scope
    requests = [replace(each, owner=owner, batch=batch) for each in job.ticket.requests]
    outputs = await services.runtime.submit(requests)
    accepted(_generation(job, stream))
    try:
        if stream:
            return await begin(job.chunks(outputs), request.receive, job.headers, job.wire)
        answer = await unless_gone(request.receive, job.answer(outputs))
        text = answer.model_dump_json(exclude_unset=True)
        return Response(text, media_type="application/json", headers=job.headers())
    except BaseException:
        await outputs.aclose()
        raise


def _generation(job: Job, stream: bool) -> Generation:
    """What the access log and traces report of a job."""
    ticket = job.ticket
    params = ticket.requests[0].params
    return Generation(ticket.id, ticket.model, ticket.num_choices, stream, params, job.tally)


@router.get("/v1/models")
async def list_models(services: ServicesOf) -> ModelList:
    """List every ensemble and every member."""
    return ModelList(data=[card_of(model, services) for model in services.runtime.models()])


@router.get("/v1/models/{model_id:path}")
async def get_model(model_id: str, services: ServicesOf) -> ModelCard:
    """One model by its name."""
    models = {model.name: model for model in services.runtime.models()}
    if model_id not in models:
        raise ModelNotFoundError(f"model {quoted(model_id)} is unknown; known are {sorted(models)}")
    return card_of(models[model_id], services)


@router.get("/v1/strategies")
async def list_strategies(services: ServicesOf) -> StrategyList:
    """The fusions and modes that a request may choose under `ensemble`, with the JSON schemas of their options."""
    return StrategyList.model_validate(services.runtime.strategies())


def card_of(model: ModelInfo, services: Services) -> ModelCard:
    """What a client is told of a model."""
    return ModelCard(
        id=model.name,
        created=services.created,
        kind=model.kind,
        max_model_len=model.max_model_len,
        recipe=model.recipe,
        status="lacks_members" if model.lacks else "ready",
        lacks=dict(model.lacks),
        root=model.name,
        parent=model.parent,
        permission=[ModelPermission(id=f"modelperm-{model.name}", created=services.created)],
    )
