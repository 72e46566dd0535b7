"""One TCP connection: bounds on what a peer may send, how slowly it may send or read, and noticing that it left.

The HTTP parsing and the ASGI cycle are uvicorn's; this adds what it leaves open. Limits: request target 8 KiB, head
32 KiB and 64 fields within 10 s; 12 MiB of body with its framing; 16 KiB unsent for at most 30 s; 2048 connections,
beyond which the oldest without a request in progress gives way to the newcomer.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from http import HTTPStatus
from typing import Any

import httptools
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from worker_orcd.errors import InvalidRequest
from worker_orcd.server.exchange import Exchange
from worker_orcd.server.schemas import MAX_BODY_BYTES, error_body

MAX_TARGET_BYTES = 8 * 1024
MAX_HEAD_BYTES = 32 * 1024
MAX_FIELDS = 64
MAX_WIRE_BYTES = 3 * MAX_BODY_BYTES  # room for framing, and for the rest of a body that was refused
HEAD_TIMEOUT_S = 10.0
STALL_TIMEOUT_S = 30.0
MAX_UNSENT_BYTES = 16 * 1024  # a buffered write of a few bytes costs several hundred besides
MAX_CONNECTIONS = 2048


class Connection(HttpToolsProtocol):
    """A uvicorn protocol with limits; uvicorn creates one per connection."""

    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _idle_since_s = 0.0
    _num_wire_bytes = 0
    _refusal: HTTPException | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=MAX_UNSENT_BYTES)
        self._expect_head()
        if len(self.connections) > MAX_CONNECTIONS:
            self._evict()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timers()
        super().connection_lost(exc)
        if (exchange := self._exchange()) is not None and self.is_busy:
            exchange.has_left = True

    def eof_received(self) -> None:
        """A peer that stops sending has left; what is buffered for it must not delay that news."""
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
        self._num_wire_bytes += len(data)
        if self._num_wire_bytes > (MAX_HEAD_BYTES if self._head_timer else MAX_WIRE_BYTES):
            self._refuse(431 if self._head_timer else 413, "the request is too large")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._head_timer is not None:  # trailers come behind the head, and the request may be under way
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._check_head()
        if self.is_busy:
            raise self._refused(400, "send the next request after the answer to this one")
        if self.parser.should_upgrade():
            return
        self._cancel_head_timer()
        self._num_wire_bytes = 0
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            _forgo_chunks(self.cycle)

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Called when the parser, or a check above, refuses what was sent."""
        refusal = self._refusal or HTTPException(400, msg)
        self._refuse(refusal.status_code, refusal.detail)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer = self.loop.call_later(STALL_TIMEOUT_S, self._drop_stalled)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()

    @property
    def is_busy(self) -> bool:
        """A request was taken and its answer is not complete."""
        return self.cycle is not None and not self.cycle.response_complete

    def _parse(self, data: bytes) -> None:
        """Feed the parser. It stops after a head with an offer to upgrade, whose body it would not read; a new one
        reads the request again from that head, as it would be without the offer."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as stop:
            target = b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
            fields = [b"%b: %b" % field for field in self.headers if field[0] != b"upgrade"]
            head = b"\r\n".join([target, *fields, b"\r\n"])
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
            self._parse(head + data[stop.args[0] :])

    def _expect_head(self) -> None:
        self._cancel_head_timer()
        self._num_wire_bytes = 0
        self._idle_since_s = time.monotonic()  # the loop's clock stands still while it accepts many
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._refuse, 408, "the request head came too slowly")

    def _check_head(self) -> None:
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise self._refused(505, "HTTP/1.1 and HTTP/1.0 are spoken here")
        codings = [value.lower() for name, value in self.headers if name == b"transfer-encoding"]
        if codings and (codings != [b"chunked"] or version == "1.0"):
            raise self._refused(400, "the only transfer coding is chunked, and HTTP/1.0 has none")
        if self.parser.get_method() == b"CONNECT":
            raise self._refused(501, "this is no proxy: CONNECT is not served")
        if not self.url.startswith(b"/"):  # a name in it would stand beside the one in Host
            raise self._refused(400, "the request target must begin with /")
        if len(self.url) > MAX_TARGET_BYTES:
            raise self._refused(414, f"the request target is longer than {MAX_TARGET_BYTES} bytes")
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > MAX_HEAD_BYTES or len(self.headers) > MAX_FIELDS:
            raise self._refused(431, f"the head is larger than {MAX_HEAD_BYTES} bytes or {MAX_FIELDS} fields")

    def _refused(self, status: int, message: str) -> HTTPException:
        self._refusal = HTTPException(status, message)
        return self._refusal

    def _refuse(self, status: int, message: str) -> None:
        """Answer, unless an answer is under way, and close."""
        if self.transport.is_closing():
            return
        if self.is_busy and self.cycle.response_started:
            self.transport.abort()
            return
        correlation_id = str(uuid.uuid4())
        body = error_body(InvalidRequest(message), correlation_id)
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
            f"x-correlation-id: {correlation_id}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _drop_stalled(self) -> None:
        if (exchange := self._exchange()) is not None:
            exchange.is_stalled = True
        self.transport.abort()

    def _exchange(self) -> Exchange | None:
        """Of the request taken last."""
        return self.cycle.scope["state"].get("exchange") if self.cycle else None

    def _evict(self) -> None:
        idle = [peer for peer in self.connections if isinstance(peer, Connection) and not peer.is_busy]
        min(idle, key=lambda peer: peer._idle_since_s).transport.abort()

    def _cancel_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _cancel_timers(self) -> None:
        self._cancel_head_timer()
        if self._stall_timer is not None:
            self._stall_timer.cancel()


def _forgo_chunks(cycle: RequestResponseCycle) -> None:
    """HTTP/1.0 knows no chunks: a body ends where the connection does."""
    send = cycle.send

    async def send_plainly(message: Any) -> None:
        while cycle.flow.write_paused and not cycle.disconnected:  # so that `send` does not wait, and let others in
            await cycle.flow.drain()
        cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    cycle.chunked_encoding = False
    cycle.send = send_plainly  # type: ignore[method-assign]
