"""Files that clients gave or that batches made, in one folder: `file-ID.jsonl`, and its record as `file-ID.json`.

Invariants: a file is there whole or not at all, whenever the process ends; a client finds its own files alone; no
name that a client chose becomes a path. All is done in the caller's thread; the records are in memory, too. Does not
know HTTP, or what is in the files.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ensemble_core.errors import ConfigError, InvalidRequestError, NotStoredError, quoted

_PART = ".part"  # a file that is not whole yet


@dataclass(frozen=True, slots=True)
class StoredFile:
    """What is known of a file. owner: of the client's key, a digest; empty without keys."""

    id: str
    owner: str
    filename: str
    purpose: str
    num_bytes: int
    created_at: int  # Unix time


class FileStore:
    """The files of one folder."""

    def __init__(self, folder: Path, most: int, max_bytes: int) -> None:
        """most: files that are kept for each client. max_bytes: of one. Raises ConfigError."""
        self._folder = folder
        self._most, self._max_bytes = most, max_bytes
        self._files: dict[str, StoredFile] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for left in folder.glob(f"*{_PART}"):
                left.unlink()
            self._files = {file.id: file for file in sorted(self._kept(), key=lambda each: each.created_at)}
        except OSError as error:
            raise ConfigError(f"server.files_folder: {folder} cannot be used ({error.strerror})") from error

    def _kept(self) -> Iterator[StoredFile]:
        for path in self._folder.glob("file-*.json"):
            try:
                yield StoredFile(**json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise ConfigError(f"server.files_folder: {path} is damaged; move it away") from error

    def add(self, owner: str, filename: str, purpose: str, source: BinaryIO) -> StoredFile:
        """Copy a file into the folder. Raises InvalidRequestError for one too many, or one too large."""
        if sum(file.owner == owner for file in list(self._files.values())) >= self._most:
            raise InvalidRequestError(
                f"file: {self._most} files are kept already (server.limits.files); delete some", "file"
            )
        file_id = new_id("file")
        part = self._folder / (file_id + _PART)
        try:
            with part.open("xb") as target:
                shutil.copyfileobj(source, target)
                num_bytes = target.tell()
                os.fsync(target.fileno())
            if num_bytes > self._max_bytes:
                raise InvalidRequestError(
                    f"file: has {num_bytes} bytes; allowed are {self._max_bytes} (server.limits.file_bytes)",
                    "file",
                )
            return self._enter(StoredFile(file_id, owner, filename, purpose, num_bytes, int(time.time())), part)
        finally:
            part.unlink(missing_ok=True)

    def adopt(self, file_id: str, owner: str, filename: str, path: Path) -> bool:
        """Take over a result of a batch, which lies in the folder. False: it is empty, and gone now.

        Doing it again changes nothing.
        """
        if file_id in self._files:
            return True
        num_bytes = path.stat().st_size if path.exists() else 0
        if num_bytes == 0:
            path.unlink(missing_ok=True)
            return False
        self._enter(StoredFile(file_id, owner, filename, "batch_output", num_bytes, int(time.time())), path)
        return True

    def _enter(self, file: StoredFile, path: Path) -> StoredFile:
        """The content first: a record says that the file is whole."""
        os.replace(path, self._content(file.id))
        write_record(self._folder / f"{file.id}.json", asdict(file))
        self._files[file.id] = file
        return file

    def get(self, owner: str, file_id: str) -> StoredFile:
        """A file of this client. Raises NotStoredError."""
        file = self._files.get(file_id)
        if file is None or file.owner != owner:
            raise NotStoredError(f"there is no file {quoted(file_id)}; see GET /v1/files")
        return file

    def path(self, owner: str, file_id: str) -> Path:
        """Where the content lies. Raises NotStoredError."""
        return self._content(self.get(owner, file_id).id)

    def _content(self, file_id: str) -> Path:
        return self._folder / f"{file_id}.jsonl"

    def files(self, owner: str) -> list[StoredFile]:
        """The client's files, the newest first."""
        return [file for file in reversed(list(self._files.values())) if file.owner == owner]

    def delete(self, owner: str, file_id: str) -> None:
        """Forget a file. Raises NotStoredError."""
        file = self.get(owner, file_id)
        (self._folder / f"{file.id}.json").unlink(missing_ok=True)
        self._content(file.id).unlink(missing_ok=True)
        del self._files[file.id]


def new_id(kind: str) -> str:
    """An id that nobody can guess."""
    return f"{kind}-{uuid.uuid4().hex}"


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record whole, in place of the one before. Raises OSError."""
    part = path.with_name(path.name + _PART)
    with part.open("w", encoding="utf-8") as file:
        json.dump(record, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
