"""What ill-meaning clients send: framings that two parsers may read differently, and attacks on a live server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import h11
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from tests.server.client import http_request
from worker_orcd.server.connection import Connection

Seen = tuple[str, str, bytes]  # method, target, body

_LENGTHS = [b"5", b"05", b"+5", b"-5", b"5, 5", b"5 5", b"0x5", b"", b"6", b"99999999999999999999", b"5\t", b"\xb2"]
_CODINGS = [b"chunked", b"CHUNKED", b"identity", b"xchunked", b"gzip, chunked", b"chunked, chunked", b"chunked;a=b"]
_CODINGS += [b"\x0bchunked", b"chunked\x00", b"", b"chunked, identity", b"'chunked'", b"chunk\xc3\xa9d"]
_NAMES = [
    b"Content-Length",
    b"Transfer-Encoding",
    b"content-length",
    b"Content_Length",
    b"Transfer-Encoding ",
    b"X-A",
]
_ENDS = [b"\r\n"] * 30 + [b"\n", b"\r", b"\r\n ", b"\r\n\t", b" \r\n", b"\r\r\n", b"\x00\r\n", b"\n\r\n"]
_CHUNKS = [
    b"5\r\nhello\r\n0\r\n\r\n",
    b"5;a=b\r\nhello\r\n0\r\n\r\n",
    b"5 \r\nhello\r\n0\r\n\r\n",
    b"0x5\r\nhello\r\n0\r\n\r\n",
    b"5\nhello\n0\n\n",
    b"3\r\nhello\r\n0\r\n\r\n",
    b"5\r\nhello0\r\n\r\n",
    b"10000000000000005\r\nhello\r\n0\r\n\r\n",
    b"5\r\nhello\r\n0\r\nContent-Length: 3\r\n\r\n",
    b"5\r\nhello\r\n0\r\n\r\nGET /b HTTP/1.1\r\nHost: h\r\n\r\n",
    b"-5\r\nhello\r\n0\r\n\r\n",
    b"5\r\nhello\r\n00\r\n\r\n",
    b"5;\r\n\r\nhello\r\n0\r\n\r\n",
    b"hello",
]


def framing(draw: random.Random) -> bytes:
    """A POST whose body has 5 bytes, or so some would say."""
    lines = [b"POST /a HTTP/1.%d" % draw.choice((1, 1, 1, 0)), b"Host: h"]
    for _ in range(draw.randint(1, 3)):
        name = draw.choice(_NAMES)
        values = _CODINGS if b"ransfer" in name else _LENGTHS
        value = values[0] if draw.random() < 0.6 else draw.choice(values)
        lines.insert(draw.randint(1, len(lines)), name + draw.choice((b": ", b":", b":\t", b" : ")) + value)
    head = lines[0] + b"\r\n" + b"".join(line + draw.choice(_ENDS) for line in lines[1:])
    return head + b"\r\n" + (_CHUNKS[0] if draw.random() < 0.3 else draw.choice(_CHUNKS))


def oracle(raw: bytes) -> list[Seen]:
    """The requests that h11 finds complete; it stops at the first thing it does not like."""
    seen, connection = list[Seen](), h11.Connection(h11.SERVER)
    connection.receive_data(raw)
    with contextlib.suppress(h11.RemoteProtocolError):
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Request):
                request, body = event, b""
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                seen.append((request.method.decode(), request.target.decode(), body))
                connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
                connection.send(h11.EndOfMessage())
                if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                    return seen
                connection.start_next_cycle()
            else:
                return seen
    return seen


class FakeTransport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self._is_closing = b"", False

    def write(self, data: bytes) -> None:  # type: ignore[override]
        self.written += data

    def close(self) -> None:
        self._is_closing = True

    abort = close

    def is_closing(self) -> bool:
        return self._is_closing

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading


async def taken(raw: bytes) -> tuple[list[Seen], FakeTransport]:
    """The requests that reach an application behind a `Connection`, and what was answered."""
    seen: list[Seen] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message["body"], message["more_body"]
        seen.append((scope["method"], scope["raw_path"].decode(), body))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    config = uvicorn.Config(app, log_config=None, log_level=logging.CRITICAL + 1, lifespan="off", ws="none")
    config.load()
    transport, peer = FakeTransport(), Connection(config, ServerState(), {})
    peer.connection_made(transport)
    peer.data_received(raw)
    for _ in range(6):
        await asyncio.sleep(0)
    peer.connection_lost(ConnectionResetError())
    for _ in range(2):
        await asyncio.sleep(0)
    return seen, transport


async def differences(seed: int, num_cases: int) -> tuple[list[tuple[bytes, list[Seen], list[Seen]]], int]:
    """Framings that we take for other requests than h11 does; and how many requests were taken at all."""
    draw, found, num_taken = random.Random(seed), [], 0
    for _ in range(num_cases):
        raw = framing(draw)
        ours, transport = await taken(raw)
        theirs = oracle(raw)
        num_taken += len(ours)
        if ours != theirs[: len(ours)] or (len(ours) < len(theirs) and not transport.is_closing()):
            found.append((raw, ours, theirs))
    return found, num_taken


# ---------------------------------------------------------------------- attacks on a live server


@dataclass
class Attack:
    """What a client sends, piece by piece, and the status lines that are a right answer; b"" is none at all."""

    name: str
    pieces: Callable[[int], list[bytes]]
    statuses: tuple[int, ...]
    pause_s: float = 0.0


def _post(body: bytes, headers: str = "") -> bytes:
    return http_request("POST", "/execute", body, headers)


def _nested(n: int) -> bytes:
    return b'{"job_id": "a", "prompt": "x", "new": ' + b"[" * n + b"]" * n + b"}"


_START = b"POST /execute HTTP/1.1\r\nHost: localhost\r\n"
SLOW_HEAD = [_START, *[b"X: y\r\n"] * 30]
SLOW_BODY = [_START + b"Content-Length: 99\r\n\r\n", *[b" "] * 30]
ATTACKS = [
    Attack("slow head", lambda _: SLOW_HEAD, (408,), pause_s=0.1),
    Attack("slow body", lambda _: SLOW_BODY, (408,), pause_s=0.1),
    Attack("huge body", lambda _: [_post(b" " * (4 * 2**20 + 1))], (413,)),
    Attack("declared huge", lambda _: [_START + b"Content-Length: 9" + b"0" * 12 + b"\r\n\r\n"], (413,)),
    Attack("long target", lambda _: [b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"], (414,)),
    Attack("many fields", lambda _: [b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 70 + b"\r\n"], (431,)),
    Attack("smuggling", lambda i: [framing(random.Random(i)).replace(b": h", b": localhost")], (0, 400, 404)),
    Attack("deep JSON", lambda _: [_post(_nested(100_000))], (400,)),
    Attack("wide JSON", lambda _: [_post(b'{"a":' + json.dumps(list(range(200_000))).encode() + b"}")], (400,)),
    Attack("long number", lambda _: [_post(b'{"job_id": "a", "seed": ' + b"9" * 100_000 + b"}")], (400,)),
    Attack("bad UTF-8", lambda _: [_post(b'{"job_id": "a", "prompt": "\xff\xfe"}')], (400,)),
    Attack("half surrogate", lambda _: [_post(rb'{"job_id": "a", "prompt": "\ud800"}')], (400,)),
    Attack("compressed", lambda _: [_post(b"\x1f\x8b", "Content-Encoding: gzip\r\n")], (415,)),
    Attack("other host", lambda _: [b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n"], (421,)),
    Attack("gone at once", lambda i: [_post(json.dumps({"job_id": f"g{i}", "prompt": "forever"}).encode())], (-1,)),
]  # fmt: skip


@dataclass
class Clean:
    """A stream that should notice nothing: its tokens, and the longest wait between two of them."""

    ids: list[int] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    end: str = ""


async def strike(port: int, attack: Attack, i: int) -> int:
    """Carry out an attack; the status of the answer, 0 for none, -1 when we do not wait for one."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.closing(writer):
        reading = asyncio.create_task(reader.read(4096))
        with contextlib.suppress(OSError):
            for piece in attack.pieces(i):
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(attack.pause_s)
                if reading.done():
                    break
        if attack.statuses == (-1,):
            reading.cancel()
            return -1
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(3.0):
                raw = await reading
                return int(raw.split(b" ", 2)[1]) if raw else 0
        return 0


async def stream(port: int, body: dict[str, Any]) -> Clean:
    """Read one answer event by event."""
    clean, loop = Clean(), asyncio.get_running_loop()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.closing(writer):
        writer.write(http_request("POST", "/execute", body))
        last = 0.0
        async for line in reader:
            if line.startswith(b"event: "):
                clean.end = line[7:].strip().decode()
            elif line.startswith(b"data: ") and clean.end == "token":
                now = loop.time()
                clean.ids.append(json.loads(line[6:])["id"])
                clean.gaps_s += [now - last] if last else []
                last = now
    return clean
