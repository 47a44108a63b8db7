"""Bodies and answers of /v1/files and /v1/batches, in OpenAI's form."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from server.schema.json_values import Strict, Text

_MAX_PAIRS = 16
_MetadataKey = Annotated[str, Field(min_length=1, max_length=64)]
_MetadataValue = Annotated[str, Field(max_length=512)]


class FileObject(BaseModel):
    """A file that a client gave or that a batch made."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class FileList(BaseModel):
    """Files, the newest first unless `order` says otherwise."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(BaseModel):
    """A file that is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class BatchRequest(Strict):
    """The body of POST /v1/batches."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "input_file_id": "file-abc",
                "endpoint": "/v1/chat/completions",
                "completion_window": "24h",
            }
        }
    )

    input_file_id: Text = Field(description="A file with purpose batch, of this client.")
    endpoint: Text = Field(description="The url of all its lines.")
    completion_window: Literal["24h"] = Field(description="24h; then the batch expires with what is ready.")
    metadata: dict[_MetadataKey, _MetadataValue] | None = Field(
        None, description="Up to 16 pairs; sent back as is."
    )
    output_expires_after: None = Field(None, description="Not served: files stay until they are deleted.")

    @field_validator("output_expires_after", mode="before")
    @classmethod
    def _never(cls, value: object) -> object:
        if value is not None:
            raise ValueError("is not served: files stay until they are deleted; leave it out")
        return value

    @field_validator("metadata")
    @classmethod
    def _few(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        if value is not None and len(value) > _MAX_PAIRS:
            raise ValueError(f"takes up to {_MAX_PAIRS} pairs, got {len(value)}")
        return value


class BatchErrorObject(BaseModel):
    """Why a batch failed, or a line that kept it from its begin."""

    code: str
    message: str
    line: int | None
    param: str | None


class BatchErrorList(BaseModel):
    """All of them, up to 100."""

    object: Literal["list"] = "list"
    data: list[BatchErrorObject]


class RequestCounts(BaseModel):
    """Of the requests of a batch."""

    total: int
    completed: int
    failed: int


class BatchObject(BaseModel):
    """A batch. Files appear when it has ended. Times are Unix seconds."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrorList | None
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: str = Field(
        description="validating, in_progress, finalizing, completed; failed, expired, cancelling, cancelled."
    )
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


class BatchList(BaseModel):
    """Batches, the newest first."""

    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
