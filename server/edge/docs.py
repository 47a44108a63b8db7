"""`/docs`: Swagger UI over our own OpenAPI document, from files of this package.

Invariant: the page asks no other host for anything. Its Content-Security-Policy forbids that, and scripts within the
page as well. Does not know what the document says.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from string import Template

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import FileResponse, HTMLResponse

router = APIRouter(include_in_schema=False)

FOLDER = Path(__file__).parent / "swagger_ui"
FILES = frozenset({"swagger-ui.css", "swagger-ui-bundle.js", "start.js", "favicon-32x32.png"})
_SAFE = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<link rel="icon" href="$root/docs/favicon-32x32.png">
<link rel="stylesheet" href="$root/docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui" data-document="$root/openapi.json"></div>
<script src="$root/docs/swagger-ui-bundle.js"></script>
<script src="$root/docs/start.js"></script>
</body>
</html>
""")


@router.get("/docs")
async def page(request: Request) -> HTMLResponse:
    """The page."""
    root = escape(str(request.scope.get("root_path", "")).rstrip("/"))
    text = _PAGE.substitute(title=escape(request.app.title), root=root)
    return HTMLResponse(text, headers={**_SAFE, "Content-Security-Policy": _POLICY})


@router.get("/docs/{name}")
async def file(name: str) -> FileResponse:
    """A file of the page."""
    if name not in FILES:
        raise HTTPException(404)
    return FileResponse(FOLDER / name, headers={**_SAFE, "Cache-Control": "max-age=3600"})
