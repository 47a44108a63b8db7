"""/v1/files and /v1/batches, as OpenAI's SDKs call them. Each client sees its own alone.

Invariant: a web page cannot upload to a server without keys: browsers send such bodies without asking, but never
without an Origin. Does not know how batches are worked on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse
from starlette.datastructures import FormData, UploadFile

from ensemble_core.errors import InvalidRequestError, NotStoredError, quoted
from server.api.services import REFUSALS, Services, ServicesOf
from server.batches.calls import batch_urls
from server.batches.desk import BatchDesk
from server.batches.records import BatchRecord
from server.batches.store import StoredFile
from server.edge.auth import CLIENT
from server.edge.bodies import BodyRoute
from server.edge.errors import RefusedBodyError
from server.schema.files import (
    BatchErrorList,
    BatchErrorObject,
    BatchList,
    BatchObject,
    BatchRequest,
    FileDeleted,
    FileList,
    FileObject,
    RequestCounts,
)

UPLOAD_PATH = "/v1/files"
_MAX_NAME = 255
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                    },
                }
            }
        },
    }
}

files = APIRouter(responses=REFUSALS)
batches = APIRouter(responses=REFUSALS, route_class=BodyRoute)

After = Annotated[str | None, Query(description="The id of the last one that was seen.")]
Item = TypeVar("Item", StoredFile, BatchRecord)


def _desk(services: Services) -> BatchDesk:
    assert services.batches is not None, "the routes are there only with a desk"
    return services.batches


def _owner(request: Request) -> str:
    return str(request.scope.get(CLIENT, ""))


@files.post(UPLOAD_PATH, openapi_extra=_FORM)
async def upload_file(request: Request, services: ServicesOf) -> FileObject:
    """Keep a file of requests for /v1/batches. A form with `file` and `purpose: batch`."""
    _refuse_pages(request, services)
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise RefusedBodyError(415, "send the file as multipart/form-data, with the fields file and purpose")
    async with request.form(max_files=1, max_fields=8) as form:
        file = _checked(form)
        name = (file.filename or "upload")[:_MAX_NAME]
        owner, store = _owner(request), _desk(services).files
        return _file(await asyncio.to_thread(store.add, owner, name, "batch", file.file))


def _refuse_pages(request: Request, services: Services) -> None:
    origin, allowed = request.headers.get("origin"), services.config.cors_origins
    if origin is not None and not services.keyed and origin not in allowed and "*" not in allowed:
        raise RefusedBodyError(403, "a web page may upload only from server.cors_origins, or with a key")


def _checked(form: FormData) -> UploadFile:
    file, purpose = form.get("file"), form.get("purpose")
    for name in form:
        if name not in ("file", "purpose"):
            raise InvalidRequestError(f"{quoted(name)[1:-1]}: is not served; files stay until deleted", name)
    if not isinstance(file, UploadFile):
        raise InvalidRequestError("file: is required, with a filename", "file")
    if purpose != "batch":
        raise InvalidRequestError(f"purpose: must be batch (given: {quoted(purpose)})", "purpose")
    return file


@files.get("/v1/files")
async def list_files(
    request: Request,
    services: ServicesOf,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> FileList:
    """The client's files."""
    found = _desk(services).files.files(_owner(request))
    chosen = [file for file in found if purpose in (None, file.purpose)][:: 1 if order == "desc" else -1]
    page, has_more = _page(chosen, after, limit)
    data = [_file(each) for each in page]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return FileList(data=data, first_id=first, last_id=last, has_more=has_more)


def _page(found: Sequence[Item], after: str | None, limit: int) -> tuple[Sequence[Item], bool]:
    """What comes behind `after`, and whether there is more."""
    ids = [each.id for each in found]
    if after is not None and after not in ids:
        raise NotStoredError(f"after: there is no {quoted(after)} in this list")
    start = 0 if after is None else ids.index(after) + 1
    return found[start : start + limit], len(found) > start + limit


@files.get("/v1/files/{file_id}")
async def get_file(file_id: str, request: Request, services: ServicesOf) -> FileObject:
    """What is known of a file."""
    return _file(_desk(services).files.get(_owner(request), file_id))


@files.get("/v1/files/{file_id}/content", response_class=FileResponse)
async def get_file_content(file_id: str, request: Request, services: ServicesOf) -> FileResponse:
    """What is in a file."""
    path = _desk(services).files.path(_owner(request), file_id)
    return FileResponse(path, media_type="application/octet-stream")


@files.delete("/v1/files/{file_id}")
async def delete_file(file_id: str, request: Request, services: ServicesOf) -> FileDeleted:
    """Forget a file that no open batch reads."""
    _desk(services).delete_file(_owner(request), file_id)
    return FileDeleted(id=file_id)


@batches.post("/v1/batches")
async def create_batch(body: BatchRequest, request: Request, services: ServicesOf) -> BatchObject:
    """Answer a file of requests, beside the requests of those who wait."""
    urls = batch_urls(request.app)
    if body.endpoint not in urls:
        raise InvalidRequestError(
            f"endpoint: must be one of {', '.join(sorted(urls))} (given: {quoted(body.endpoint)})", "endpoint"
        )
    made = _desk(services).create(_owner(request), body.endpoint, body.input_file_id, body.metadata)
    return _batch(made)


@batches.get("/v1/batches")
async def list_batches(
    request: Request,
    services: ServicesOf,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> BatchList:
    """The client's batches."""
    page, has_more = _page(_desk(services).book.batches(_owner(request)), after, limit)
    data = [_batch(each) for each in page]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return BatchList(data=data, first_id=first, last_id=last, has_more=has_more)


@batches.get("/v1/batches/{batch_id}")
async def get_batch(batch_id: str, request: Request, services: ServicesOf) -> BatchObject:
    """How far a batch is."""
    return _batch(_desk(services).book.get(_owner(request), batch_id))


@batches.post("/v1/batches/{batch_id}/cancel")
async def cancel_batch(batch_id: str, request: Request, services: ServicesOf) -> BatchObject:
    """Begin no more of a batch's requests; what is answered by then can be read."""
    return _batch(_desk(services).cancel(_owner(request), batch_id))


def _file(file: StoredFile) -> FileObject:
    return FileObject(
        id=file.id,
        bytes=file.num_bytes,
        created_at=file.created_at,
        filename=file.filename,
        purpose=file.purpose,
    )


def _batch(record: BatchRecord) -> BatchObject:
    faults = [BatchErrorObject(**asdict(each)) for each in record.errors]
    states = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
    times: dict[str, Any] = {f"{state}_at": record.times.get(state) for state in states}
    return BatchObject(
        id=record.id,
        endpoint=record.endpoint,
        errors=BatchErrorList(data=faults) if faults else None,
        input_file_id=record.input_file_id,
        status=record.status,
        output_file_id=record.output_file_id if record.has_output and record.has_ended else None,
        error_file_id=record.error_file_id if record.has_errors and record.has_ended else None,
        created_at=record.created_at,
        expires_at=record.expires_at,
        request_counts=RequestCounts(total=record.total, completed=record.completed, failed=record.failed),
        metadata=record.metadata,
        **times,
    )
