"""Adds to FastAPI's OpenAPI document which routes need a key."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from server.edge.auth import OPEN_PATHS

_SCHEME = {"type": "http", "scheme": "bearer", "description": "One of the server's API keys."}


def require_key(app: FastAPI, open_paths: frozenset[str] = OPEN_PATHS) -> None:
    """Make the document say that every operation needs a key, except those of `open_paths`."""
    derive = app.openapi

    def described() -> dict[str, Any]:
        document = derive()
        document.setdefault("components", {})["securitySchemes"] = {"key": _SCHEME}
        document["security"] = [{"key": []}]
        for path in open_paths & document["paths"].keys():
            for operation in document["paths"][path].values():
                operation["security"] = []
        return document

    app.openapi = described  # type: ignore[method-assign]
