"""How answers and errors of the OpenAI dialect look on the wire."""

from __future__ import annotations

from typing import Any

import msgspec

from worker_orcd import __version__
from worker_orcd.errors import InvalidRequest, WorkerError

DONE = b"data: [DONE]\n\n"
FINGERPRINT = f"worker-orcd-{__version__}"
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {
    "context_length": "context_length_exceeded",
    "unsupported": "unsupported_parameter",
    "model": "model_not_found",
}

encode = msgspec.json.Encoder().encode


def data_frame(document: dict[str, Any]) -> bytes:
    """One event without a name."""
    return b"data: %b\n\n" % encode(document)


def event_frame(document: dict[str, Any]) -> bytes:
    """One event named by its type."""
    return b"event: %b\ndata: %b\n\n" % (document["type"].encode(), encode(document))


def error_document(error: WorkerError, status: int, correlation_id: str | None = None) -> dict[str, Any]:
    """The body of an answer that is no success, or the last event of a stream."""
    field = error.fields[0] if isinstance(error, InvalidRequest) and error.fields else None
    content = {
        "message": error.message,
        "type": _TYPES.get(status, "invalid_request_error" if 400 <= status < 500 else "server_error"),
        "param": field and field.field,
        "code": (field and _CODES.get(field.constraint)) or error.code,
    }
    return {"error": content | ({"correlation_id": correlation_id} if correlation_id else {})}
