"""What is known of each batch, as `batch-ID.json` in the folder of the files: its states, times, counts and errors.

Invariant: a record on the disk is one of a whole change, so a server that starts again knows what to go on with. Does
not know how a batch is worked on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from ensemble_core.errors import ConfigError, InvalidRequestError, NotStoredError, quoted
from server.batches.store import new_id, write_record

BatchState = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
ENDED = frozenset({"failed", "completed", "expired", "cancelled"})
WINDOW_SECONDS = 24 * 3600  # the one completion window that there is


@dataclass(frozen=True, slots=True)
class BatchFault:
    """Why a batch failed. line: of its input, from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(slots=True)
class BatchRecord:
    """One batch. times: when it came into each state, Unix time. stopped_by: what keeps it from its end."""

    id: str
    owner: str
    endpoint: str
    input_file_id: str
    metadata: dict[str, str] | None
    created_at: int
    output_file_id: str
    error_file_id: str
    status: BatchState = "validating"
    times: dict[str, int] = field(default_factory=dict)
    errors: list[BatchFault] = field(default_factory=list)
    total: int = 0
    completed: int = 0
    failed: int = 0
    has_output: bool = False
    has_errors: bool = False
    stopped_by: Literal["cancelled", "expired"] | None = None

    @property
    def expires_at(self) -> int:
        """When it is ended, ready or not; Unix time."""
        return self.created_at + WINDOW_SECONDS

    @property
    def has_ended(self) -> bool:
        """Nothing will change any more."""
        return self.status in ENDED


class BatchBook:
    """The records of one folder."""

    def __init__(self, folder: Path, most: int) -> None:
        """most: that are kept for each client. Raises ConfigError."""
        self._folder, self._most = folder, most
        try:
            found = sorted(self._kept(), key=lambda each: each.created_at)
        except OSError as error:
            raise ConfigError(f"server.files_folder: {folder} cannot be used ({error.strerror})") from error
        self._records = {record.id: record for record in found}

    def _kept(self) -> Iterator[BatchRecord]:
        for path in self._folder.glob("batch-*.json"):
            try:
                told = json.loads(path.read_text(encoding="utf-8"))
                told["errors"] = [BatchFault(**each) for each in told["errors"]]
                yield BatchRecord(**told)
            except (ValueError, TypeError, KeyError) as error:
                raise ConfigError(f"server.files_folder: {path} is damaged; move it away") from error

    def add(self, owner: str, endpoint: str, input_file_id: str, metadata: dict[str, str] | None) -> BatchRecord:
        """Make a batch. The oldest that have ended are forgotten. Raises InvalidRequestError where all are open."""
        mine = [record for record in self._records.values() if record.owner == owner]
        ended = [record for record in mine if record.has_ended]
        for record in ended[: max(len(mine) - self._most + 1, 0)]:
            self._path(record).unlink(missing_ok=True)
            del self._records[record.id]
        if len(mine) - len(ended) >= self._most:
            raise InvalidRequestError(
                f"{self._most} batches are open already (server.limits.files); wait or cancel"
            )
        ids = new_id("batch"), new_id("file"), new_id("file")
        record = BatchRecord(ids[0], owner, endpoint, input_file_id, metadata, int(time.time()), ids[1], ids[2])
        self.save(record)
        self._records[record.id] = record
        return record

    def change(self, record: BatchRecord, status: BatchState) -> None:
        """Note a new state. Raises OSError."""
        record.status = status
        record.times[status] = int(time.time())
        self.save(record)

    def save(self, record: BatchRecord) -> None:
        """Write the record. Raises OSError."""
        write_record(self._path(record), asdict(record))

    def get(self, owner: str, batch_id: str) -> BatchRecord:
        """A batch of this client. Raises NotStoredError."""
        record = self._records.get(batch_id)
        if record is None or record.owner != owner:
            raise NotStoredError(f"there is no batch {quoted(batch_id)}; see GET /v1/batches")
        return record

    def batches(self, owner: str) -> list[BatchRecord]:
        """The client's batches, the newest first."""
        return [record for record in reversed(self._records.values()) if record.owner == owner]

    def open(self) -> list[BatchRecord]:
        """All that have not ended, the oldest first."""
        return [record for record in self._records.values() if not record.has_ended]

    def needs(self, file_id: str) -> bool:
        """A batch that has not ended reads this file."""
        return any(record.input_file_id == file_id for record in self.open())

    def _path(self, record: BatchRecord) -> Path:
        return self._folder / f"{record.id}.json"
