"""Server-sent events: the function that frames them, the events of `/execute`, and the stream they go out on.

The text of an answer is the concatenation of `t` over all `token` events and the `end` event. A token whose
bytes do not complete a character, or may be the start of a stop string, has an empty `t`; its text follows with
a later token, or with `end` when nothing follows.
"""

from __future__ import annotations

import asyncio
import re

import msgspec
from starlette.types import Send

from worker_orcd.engine.request import StopReason

KEEP_ALIVE = b": keep-alive\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]

_LINE_END = re.compile(rb"\r\n|\r|\n")
_encoder = msgspec.json.Encoder()


class StartedEvent(msgspec.Struct, frozen=True):
    """The request has left the queue. `started_at` is RFC 3339 in UTC."""

    job_id: str
    model: str
    started_at: str
    seed: int
    prompt_tokens: int


class TokenEvent(msgspec.Struct, frozen=True):
    """One generated token: text released by it, its index from 0 and its id in the vocabulary."""

    t: str
    i: int
    id: int


class EndEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """The answer is complete. `t` is text that was still held back, `decode_time_ms` runs from `started`."""

    tokens_out: int
    decode_time_ms: float
    stop_reason: StopReason
    seed: int
    stop_sequence_matched: str | None = None
    t: str = ""


class ErrorEvent(msgspec.Struct, frozen=True):
    """The answer ended early; `code` is one of errors.py."""

    code: str
    message: str
    retriable: bool


def frame(event: str, data: bytes | msgspec.Struct) -> bytes:
    """One event on the wire. Line ends inside `data` start further data lines and cannot forge a field."""
    assert event.isidentifier(), event
    payload = data if isinstance(data, bytes) else _encoder.encode(data)
    lines = b"".join(b"data: " + line + b"\n" for line in _LINE_END.split(payload))
    return b"event: " + event.encode() + b"\n" + lines + b"\n"


class EventStream:
    """One response of events; its first write sends the 200, `end` sends the last event and closes it."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._lock = asyncio.Lock()  # a keep-alive must not fall between the headers and the first event
        self._last_write_s = 0.0
        self.is_open = False

    def quiet_s(self) -> float:
        """Seconds since the last write."""
        return asyncio.get_running_loop().time() - self._last_write_s

    async def write(self, data: bytes, *, more: bool = True) -> None:
        """Send `data`; waits while the client reads too slowly."""
        async with self._lock:
            if not self.is_open:
                await self._send({"type": "http.response.start", "status": 200, "headers": list(HEADERS)})
                self.is_open = True
            self._last_write_s = asyncio.get_running_loop().time()
            await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def end(self, terminal: bytes) -> None:
        await self.write(terminal, more=False)
