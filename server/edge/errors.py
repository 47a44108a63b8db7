"""Errors over HTTP: the one place that maps the error tree to statuses.

Invariant: every refusal has OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`, or Anthropic's at its
endpoint, whether it comes from the engine, from validation, from routing or from a bug. This module does not know
what routes do.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from ensemble_core.errors import (
    ChangeConflictError,
    InvalidRequestError,
    MemberAwayError,
    ModelNotFoundError,
    NotReadyError,
    NotStoredError,
    QueueFullError,
    RequestTimeoutError,
    UnisonoError,
    quoted,
    shortened,
)
from server.edge.metrics import PrometheusMetrics
from server.schema.names import declared_part

logger = logging.getLogger(__name__)

INVALID = "invalid_request_error"
SERVER = "server_error"
CLIENT_CLOSED = 499  # no client reads it; it only appears in our log line
MESSAGES = ("/v1/messages", "/v1/messages/count_tokens")  # the endpoints with errors in Anthropic's shape
_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_MAX_LINES = 5
_MAX_MESSAGE = 2000  # characters; a message quotes some client text at most
_MAX_PARAM = 200


class RequestFailedError(UnisonoError):
    """The engine failed at a request that it had accepted."""


class RefusedBodyError(HTTPException):
    """A body that is refused before it is validated. param: the field at fault, if it is one."""

    def __init__(
        self, status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status, message, headers)
        self.param = param


class ClientGoneError(Exception):
    """The client closed its connection before the answer was complete."""


@dataclass(frozen=True, slots=True)
class ApiError:
    """One refusal. `reason` is the label of the metric that counts it; None: not counted."""

    status: int
    message: str
    type: str = INVALID
    param: str | None = None
    code: str | None = None
    reason: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def detail(self) -> dict[str, str | None]:
        """What the client is told, bounded."""
        param = None if self.param is None else _cut(self.param, _MAX_PARAM)
        return {
            "message": _cut(self.message, _MAX_MESSAGE),
            "type": self.type,
            "param": param,
            "code": self.code,
        }

    def json(self) -> str:
        """The body: pure ASCII, so that a message may quote text that UTF-8 cannot encode."""
        return json.dumps({"error": self.detail()})

    def json_of_messages(self) -> str:
        """The body in the shape of Anthropic's API."""
        error = self.detail() | {"type": _KINDS.get(self.status, "api_error")}
        return json.dumps({"type": "error", "error": error})

    def response(self, path: str) -> Response:
        """The whole answer. path: of the request, whose API says in which shape."""
        body = self.json_of_messages() if path.endswith(MESSAGES) else self.json()
        return Response(body, self.status, headers=self.headers, media_type="application/json")


def _cut(text: str, most: int) -> str:
    """The text, or its beginning and end."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


def to_api_error(error: Exception) -> ApiError:
    """Map an exception of the engine, or a bug, to the error that the client gets."""
    match error:
        case InvalidRequestError(param=param):
            return ApiError(400, str(error), param=param, reason="invalid_request")
        case ModelNotFoundError():
            return ApiError(404, str(error), param="model", code="model_not_found", reason="model_not_found")
        case NotStoredError():
            return ApiError(404, str(error), code="not_found", reason="invalid_request")
        case QueueFullError():
            return _come_back(429, "rate_limit_error", "queue_full", str(error), seconds=1)
        case MemberAwayError():
            refusal = _come_back(503, "service_unavailable", "lacks_members", str(error), seconds=5)
            return replace(refusal, param="model", reason="not_ready")
        case ChangeConflictError():
            return ApiError(409, str(error), code="change_conflict", headers={"Retry-After": "5"})
        case NotReadyError():
            return _come_back(503, "service_unavailable", "not_ready", str(error), seconds=5)
        case RequestTimeoutError():
            return ApiError(504, str(error), SERVER, code="request_timeout", reason="timeout")
        case UnisonoError():
            return ApiError(500, str(error), SERVER, code="request_failed", reason="failed")
        case _:
            message = "the server failed at this request; the details are in its log, under this X-Request-Id"
            return ApiError(500, message, SERVER, code="internal_error", reason="failed")


def _come_back(status: int, kind: str, code: str, message: str, seconds: int) -> ApiError:
    headers = {"Retry-After": str(seconds)}
    return ApiError(status, message, kind, code=code, reason=code, headers=headers)


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """A 400 from pydantic's list of errors. `param` is the first wrong field; the message describes up to five."""
    lines = [_line(item) for item in errors[:_MAX_LINES]]
    return ApiError(400, "; ".join(lines), param=_path(errors[0]), reason="invalid_request")


def _path(item: Mapping[str, Any]) -> str | None:
    """The field's path, such as `stream_options.include_usage`; None if the body as a whole is wrong."""
    if item["type"] == "json_invalid":
        return None
    return ".".join(str(part) for part in item["loc"][1:]) or None


def _line(item: Mapping[str, Any]) -> str:
    path = _path(item)
    if item["type"] == "json_invalid":
        return f"the body is not valid JSON: {item['ctx']['error']} at character {item['loc'][-1]}"
    if path is None:
        return f"the body must be a JSON object: {item['msg'].removeprefix('Value error, ')}"
    path = shortened(path)
    if item["type"] == "missing":
        return f"{path}: is required and was not sent"
    if item["type"] == "extra_forbidden":
        return f"{path}: unknown key (given: {quoted(item['input'])})"
    return f"{path}: {item['msg'].removeprefix('Value error, ')} (given: {quoted(item['input'])})"


def from_http(error: HTTPException, request: Request) -> ApiError:
    """The error for an exception of routing or of the body limit."""
    headers = dict(error.headers or {})
    where = f"{shortened(request.method)} {shortened(request.url.path)}"
    match error.status_code:
        case 404:
            return ApiError(404, f"there is no route {where}; see /docs", code="not_found")
        case 405:
            allowed = headers.get("Allow", "another method")
            if "GET" in allowed and "HEAD" not in allowed:
                allowed = headers["Allow"] = f"{allowed}, HEAD"
            message = f"{where}: this method is not allowed; allowed: {allowed}"
            return ApiError(405, message, code="method_not_allowed", headers=headers)
        case 413:
            return ApiError(413, error.detail, code="body_too_large", reason="body_too_large", headers=headers)
        case 408:
            return ApiError(408, error.detail, code="body_too_slow", reason="body_too_slow", headers=headers)
        case 503:
            return _come_back(503, "service_unavailable", "busy", error.detail, seconds=1)
        case status if isinstance(error, RefusedBodyError):
            return ApiError(status, error.detail, param=error.param, reason="invalid_request", headers=headers)
        case status:
            kind = INVALID if status < 500 else SERVER
            return ApiError(status, error.detail, kind, reason="invalid_request", headers=headers)


def _log(refusal: ApiError, level: int) -> None:
    """Log a refusal without its message, which may quote a prompt, and without names that the client chose; log a
    500 with its message.
    """
    if refusal.status == 500:
        logger.error("failed: %s", refusal.message)
    else:
        param = declared_part(refusal.param)
        logger.log(level, "refused: status=%d code=%s param=%s", refusal.status, refusal.code, param)


def install(app: FastAPI, metrics: PrometheusMetrics) -> None:
    """Register handlers that turn each kind of exception into an answer and count the refusals."""

    def refuse(request: Request, refusal: ApiError) -> Response:
        _log(refusal, logging.INFO if request.method == "POST" else logging.DEBUG)
        if refusal.reason is not None and request.method == "POST":
            metrics.rejected(refusal.reason)
        return refusal.response(request.url.path)

    async def engine(request: Request, error: Exception) -> Response:
        return refuse(request, to_api_error(error))

    async def validation(request: Request, error: Exception) -> Response:
        return refuse(request, from_validation(cast(RequestValidationError, error).errors()))

    async def routing(request: Request, error: Exception) -> Response:
        return refuse(request, from_http(cast(HTTPException, error), request))

    async def gone(_request: Request, _error: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED)

    app.add_exception_handler(UnisonoError, engine)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(HTTPException, routing)
    app.add_exception_handler(ClientGoneError, gone)
