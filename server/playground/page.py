"""`/` and `/playground/...`: the playground, from files of this package.

Invariants: the page asks no other host for anything and runs no script but these files; its Content-Security-Policy
forbids both, and with Trusted Types any text becoming markup. The files hold no secret, so they need no key; the
page sends one with each call of the API. Does not know the API, or what the page does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response

FOLDER = Path(__file__).parent / "static"
_KINDS = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "trusted-types 'none'",
        "require-trusted-types-for 'script'",
    )
)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": _POLICY,
    "Cache-Control": "no-cache",  # asked for again each time, and answered with a 304
}


@dataclass(frozen=True, slots=True)
class PageFile:
    """One file with its kind; the tag changes with the content."""

    body: bytes
    kind: str

    def answer(self, request: Request, **headers: str) -> Response:
        """The file, or a 304 where the client has it."""
        tag = f'"{hashlib.sha256(self.body).hexdigest()[:32]}"'
        told = {**_HEADERS, **headers, "ETag": tag}
        known = [each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")]
        if tag in known or "*" in known:
            return Response(status_code=304, headers=told)
        return Response(self.body, media_type=self.kind, headers=told)


def page_files() -> dict[str, PageFile]:
    """Name -> file, of all that the page loads."""
    paths = sorted(path for path in FOLDER.iterdir() if path.suffix in _KINDS)
    return {path.name: PageFile(path.read_bytes(), _KINDS[path.suffix]) for path in paths}


def page_paths() -> frozenset[str]:
    """The paths of the page and its files, which need no key."""
    return frozenset({"/", *(f"/playground/{name}" for name in page_files())})


def playground_router(stored: Sequence[Mapping[str, Any]] = ()) -> APIRouter:
    """The page's routes. stored: requests whose answers are replayed; the page says so and offers them."""
    router = APIRouter(include_in_schema=False)
    files = page_files()
    template = Template((FOLDER / "index.html").read_text(encoding="utf-8"))

    @router.get("/")
    async def page(request: Request) -> Response:
        """The page, for browsers; who does not ask for HTML gets the 404 of a path without a route."""
        if "text/html" not in request.headers.get("accept", ""):
            raise HTTPException(404)
        root = escape(str(request.scope.get("root_path", "")).rstrip("/"))
        text = template.substitute(root=root, stored=escape(json.dumps(stored)))
        return PageFile(text.encode(), "text/html; charset=utf-8").answer(request, Vary="Accept")

    @router.get("/playground/{name}")
    async def file(request: Request, name: str) -> Response:
        """A file of the page."""
        if name not in files:
            raise HTTPException(404)
        return files[name].answer(request)

    return router
