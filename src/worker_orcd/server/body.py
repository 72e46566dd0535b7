"""Reading a request body within bounds of size and time."""

from __future__ import annotations

import asyncio

from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest

from worker_orcd.server.schemas import MAX_BODY_BYTES

BODY_TIMEOUT_S = 30.0
MAX_DISCARDED_BYTES = 2 * MAX_BODY_BYTES


async def read_body(request: HttpRequest) -> bytes:
    """The whole body; raises HTTPException 413, 415 or 408 when it is too large, encoded or too slow.

    A body that is somewhat too large is read to its end before it is refused: closing on a peer that still
    sends would destroy the answer on its way.
    """
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415, "content-encoding is not supported; send the body as it is")
    declared = request.headers.get("content-length", "0")
    is_hopeless = declared.isdecimal() and int(declared[:20]) > MAX_DISCARDED_BYTES
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            body = None if is_hopeless else await _read(request)
    except TimeoutError:
        message = f"the body did not arrive within {BODY_TIMEOUT_S:g} s"
        raise HTTPException(408, message, {"connection": "close"}) from None
    if body is None:
        raise HTTPException(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
    return body


async def _read(request: HttpRequest) -> bytes | None:
    """The body, or None when it is too large."""
    body, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_DISCARDED_BYTES:
            return None
        if size <= MAX_BODY_BYTES:
            body += chunk
    return bytes(body) if size <= MAX_BODY_BYTES else None
