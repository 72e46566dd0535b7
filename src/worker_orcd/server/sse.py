"""Server-sent events: the function that frames them, the events of `/execute`, and the stream they go out on.

The text of an answer is the concatenation of `t` over all `token` events and the `end` event. A token whose
bytes do not complete a character, or may be the start of a stop string, has an empty `t`; its text follows with
a later token, or with `end` when nothing follows.
"""

from __future__ import annotations

import asyncio
import time

import msgspec
from starlette.types import Send

from worker_orcd.engine.request import StopReason
from worker_orcd.server.receipt import Receipt

KEEP_ALIVE = b": keep-alive\n\n"
PIECE_BYTES = 16 * 1024
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]

_encode = msgspec.json.Encoder().encode


class StartedEvent(msgspec.Struct, frozen=True):
    """The request has left the queue. `started_at` is RFC 3339 in UTC."""

    job_id: str
    model: str
    started_at: str
    seed: int
    prompt_tokens: int
    cached_tokens: int


class TokenEvent(msgspec.Struct, frozen=True, gc=False):
    """One generated token: text released by it, its index from 0 and its id in the vocabulary."""

    t: str
    i: int
    id: int


class MetricsEvent(msgspec.Struct, frozen=True):
    """How far the answer is, and how busy the worker; on request, about twice a second."""

    job_id: str
    tokens_out: int
    decode_time_ms: float
    tokens_per_second: float
    vram_bytes: int
    num_running: int
    num_waiting: int


class EndEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """The answer is complete. `t` is text that was still held back, `decode_time_ms` runs from `started`."""

    tokens_out: int
    decode_time_ms: float
    stop_reason: StopReason
    seed: int
    cached_tokens: int
    stop_sequence_matched: str | None = None
    t: str = ""
    receipt: Receipt | None = None


class ErrorEvent(msgspec.Struct, frozen=True):
    """The answer ended early; `code` is one of errors.py."""

    code: str
    message: str
    retriable: bool


def frame(event: str, data: msgspec.Struct) -> bytes:
    """One event on the wire. JSON holds no line end, so no text can forge a field."""
    assert event.isidentifier(), event
    return b"event: %b\ndata: %b\n\n" % (event.encode(), _encode(data))


def token_frame(text: str, index: int, token_id: int) -> bytes:
    """The frame of a `TokenEvent`; there are tens of thousands a second."""
    return b"event: token\ndata: %b\n\n" % _encode(TokenEvent(text, index, token_id))


class EventStream:
    """One response of events; its first write sends the 200, `end` sends the last event and closes it.

    Two tasks write: the generation and its watcher. Each write is whole frames, so only the opening needs a lock.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._opening = asyncio.Lock()
        self._last_write_s = 0.0
        self.is_open = False

    def quiet_s(self) -> float:
        """Seconds since the last write."""
        return time.monotonic() - self._last_write_s

    async def write(self, data: bytes) -> None:
        """Send `data`; waits while the client reads too slowly."""
        if not self.is_open:
            await self._open()
        self._last_write_s = time.monotonic()
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, terminal: bytes) -> None:
        """Send the last event. Nobody else may be writing any more."""
        if not self.is_open:
            await self._open()
        await asyncio.sleep(0)  # whether the write before this one failed is known by the next turn of the loop
        await self._send({"type": "http.response.body", "body": terminal, "more_body": False})

    async def respond(self, body: bytes) -> None:
        """Send one JSON document instead of a stream, in pieces, so that a slow reader holds up the next one."""
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        self.is_open = True
        for begin in range(0, len(body), PIECE_BYTES):
            rest = begin + PIECE_BYTES < len(body)
            await asyncio.sleep(0)  # as in `end`
            await self._send(
                {"type": "http.response.body", "body": body[begin : begin + PIECE_BYTES], "more_body": rest}
            )

    async def _open(self) -> None:
        async with self._opening:
            if not self.is_open:
                await self._send({"type": "http.response.start", "status": 200, "headers": list(HEADERS)})
                self.is_open = True
