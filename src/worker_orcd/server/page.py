"""The page at `/`: three files of the package, under a policy that lets them reach this worker and nothing else.

The page holds no secret, but like every route it needs a key where there are keys: the browser asks (HTTP Basic).
"""

from __future__ import annotations

import hashlib
from importlib.resources import files

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

FILES = {"": "text/html", "app.js": "text/javascript", "style.css": "text/css"}
POLICY = "; ".join([
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'", "img-src data:",
    "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'", "require-trusted-types-for 'script'",
    "trusted-types 'none'",
])  # fmt: skip
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # asked for again each time, answered by 304
}


def page_routes() -> list[Route]:
    """A GET route for each file; they are read once."""
    return [_route(name, media_type) for name, media_type in FILES.items()]


def _route(name: str, media_type: str) -> Route:
    content = (files("worker_orcd") / "server" / "page" / (name or "index.html")).read_bytes()
    headers = HEADERS | {"etag": f'"{hashlib.sha256(content).hexdigest()[:16]}"'}

    async def send(request: HttpRequest) -> Response:
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)

    return Route(f"/{name}", send, methods=["GET"])
