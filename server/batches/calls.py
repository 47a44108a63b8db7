"""Calls of the app's own endpoints from inside the process: the server's whole path, without a socket.

Invariant: an endpoint needs nothing of its own; whatever takes JSON by POST can be in a batch. Does not know what the
endpoints do.
"""

from __future__ import annotations

import json
import logging
from types import TracebackType
from typing import Any, Self

import httpx
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from server.batches.lines import BatchItem
from server.batches.results import BatchReply
from server.edge.auth import BATCH, CLIENT

logger = logging.getLogger(__name__)

_BASE = "http://127.0.0.1"  # an address is served whatever server.allowed_hosts says
_JSON = "application/json"
_NEVER = ("/v1/admin", "/v1/batches", "/v1/files")  # what they do concerns the server, not a model


def batch_urls(app: FastAPI) -> frozenset[str]:
    """The endpoints that take JSON by POST."""
    return frozenset(
        path
        for path, operations in app.openapi()["paths"].items()
        if _JSON in operations.get("post", {}).get("requestBody", {}).get("content", {})
        and "{" not in path
        and not path.startswith(_NEVER)
    )


class InnerClient:
    """Sends requests to an app of this process. The app's lifespan is its owner's."""

    def __init__(self, app: ASGIApp, client: str) -> None:
        """client: whose requests these are, as the gate would have found by the key."""

        async def inside(scope: Scope, receive: Receive, send: Send) -> None:
            await app({**scope, CLIENT: client, BATCH: True}, receive, send)

        self._client = httpx.AsyncClient(
            transport=httpx.ASGITransport(inside), base_url=_BASE, timeout=None, trust_env=False
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def __call__(self, item: BatchItem) -> BatchReply:
        """The endpoint's answer or refusal. Cancelling ends the request in the engine."""
        try:
            found = await self._client.post(item.url, content=item.body, headers={"Content-Type": _JSON})
        except Exception:
            logger.exception("line %d failed", item.line)
            message = "the server failed at this request; the details are in its log"
            return BatchReply(500, "", {"error": {"message": message, "type": "server_error", "code": None}})
        return BatchReply(found.status_code, found.headers.get("x-request-id", ""), _value(found.text))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text or None
