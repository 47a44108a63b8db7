"""Adds to FastAPI's OpenAPI document which routes need a key."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from server.edge.auth import ADMIN_PATH, OPEN_PATHS

_SCHEME = {
    "type": "http",
    "scheme": "bearer",
    "description": "One of the server's keys; the admin's own for /v1/admin.",
}


def require_key(app: FastAPI, open_paths: frozenset[str] = OPEN_PATHS, *, clients: bool = True) -> None:
    """Make the document say that every operation needs a key, except those of `open_paths`.

    clients: whether others than the admin's operations need one.
    """
    derive = app.openapi

    def described() -> dict[str, Any]:
        document = derive()
        document.setdefault("components", {})["securitySchemes"] = {"key": _SCHEME}
        document["security"] = [{"key": []}] if clients else []
        for path in (path for path in document["paths"] if path.startswith(ADMIN_PATH)):
            for operation in document["paths"][path].values():
                operation["security"] = [{"key": []}]
        for path in open_paths & document["paths"].keys():
            for operation in document["paths"][path].values():
                operation["security"] = []
        return document

    app.openapi = described  # type: ignore[method-assign]
