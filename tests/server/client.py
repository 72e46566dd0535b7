"""The other side of the wire: a strict event-stream parser, an in-memory caller and a server on a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette

from tests.fakes import ByteTokenizer, ScriptedEngine
from worker_orcd.config import WorkerConfig
from worker_orcd.engine.metrics import PrometheusMetrics
from worker_orcd.narration import Capture, Narrator
from worker_orcd.server.app import create_app
from worker_orcd.server.prepare import ChatTemplate
from worker_orcd.server.run import bind, serve

FIELDS = {"event", "data", "id", "retry"}
TERMINAL = ("end", "error")


@dataclass(frozen=True)
class SseEvent:
    name: str
    data: dict[str, Any]


class SseParser:
    """Event streams as WHATWG HTML, section 9.2.6, defines them; unknown fields are an error here."""

    def __init__(self) -> None:
        self.comments: list[str] = []
        self._pending = b""
        self._name, self._data = "", []

    def feed(self, data: bytes) -> list[SseEvent]:
        """The events completed by `data`."""
        events = []
        lines = re.split(rb"\r\n|\n|\r", self._pending + data)
        self._pending = lines.pop()
        for line in lines:
            if line:
                self._field(line.decode())
            elif self._data:
                events.append(SseEvent(self._name or "message", json.loads("\n".join(self._data))))
                self._name, self._data = "", []
        return events

    def close(self) -> None:
        assert not self._pending, "the stream ended inside a line"
        assert not self._data, "the stream ended inside an event"

    def _field(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not name:
            self.comments.append(value)
            return
        assert name in FIELDS, name
        if name == "event":
            self._name = value
        elif name == "data":
            self._data.append(value)


@dataclass
class Answer:
    """What one exchange gave."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    writes: list[bytes] = field(default_factory=list)  # the pieces of the body, when it was taken in memory

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]

    @property
    def bad_fields(self) -> dict[str, str]:
        """Field to constraint, of an answer that refuses fields."""
        return {item["field"]: item["constraint"] for item in self.error["details"]["errors"]}

    @property
    def events(self) -> list[SseEvent]:
        """The events of a complete stream, checked for their order."""
        parser = SseParser()
        events = parser.feed(self.body)
        parser.close()
        check_order(events)
        return events

    @property
    def text(self) -> str:
        return "".join(event.data.get("t", "") for event in self.events)


def check_order(events: list[SseEvent]) -> None:
    """started, token 0, 1, 2 … with metrics between, then exactly one of end and error."""
    names = [event.name for event in events]
    assert names[-1] in TERMINAL
    assert not set(names[:-1]) & set(TERMINAL)
    assert names[0] == "started"
    assert set(names[1:-1]) <= {"token", "metrics"}
    tokens = [event.data["i"] for event in events if event.name == "token"]
    assert tokens == list(range(len(tokens)))
    if names[-1] == "end":
        assert events[-1].data["tokens_out"] == len(tokens)


@dataclass
class Rig:
    """An application over a scripted engine."""

    engine: ScriptedEngine
    app: Starlette
    log: Capture
    metrics: PrometheusMetrics

    def scrape(self) -> dict[str, float]:
        """Every sample of /metrics, by its name with its labels as they are written."""
        answer = self.call("GET", "/metrics")
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        lines = [line for line in answer.body.decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def call(self, method: str, path: str, body: object = b"", headers: dict[str, str] | None = None) -> Answer:
        """One exchange in memory, on a loop of its own."""
        return asyncio.run(self.acall(method, path, body, headers))

    def execute(self, headers: dict[str, str] | None = None, **fields: object) -> Answer:
        return self.call("POST", "/execute", {"job_id": "job", "prompt": "hello"} | fields, headers)

    async def acall(
        self,
        method: str,
        path: str,
        body: object = b"",
        headers: dict[str, str] | None = None,
        answer: Answer | None = None,
    ) -> Answer:
        """One exchange in memory, held to the rules of ASGI. `answer` grows while it goes on."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer, gone = answer or Answer(), asyncio.Event()
        messages = [{"type": "http.request", "body": raw, "more_body": False}]
        has_ended = False

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            nonlocal has_ended
            await asyncio.sleep(0)
            if message["type"] == "http.response.start":
                assert answer.status == 0, "started twice"
                answer.status = message["status"]
                answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            else:
                assert answer.status, "a body before the start"
                assert not has_ended, "more after the end"
                answer.body += message["body"]
                answer.writes.append(message["body"])
                has_ended = not message.get("more_body", False)

        await self.app(_scope(method, path, headers or {}), receive, send)
        assert has_ended
        return answer


def _scope(method: str, path: str, headers: dict[str, str]) -> dict[str, Any]:
    named = {"host": "127.0.0.1:8080"} | headers
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in named.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8080),
    }


def make_rig(engine: ScriptedEngine | None = None, template: ChatTemplate | None = None, **options: Any) -> Rig:
    """`options` are those of WorkerConfig."""
    engine = engine or ScriptedEngine()
    log = Capture()
    config = WorkerConfig(worker_id="worker-test", **options)
    narrator = Narrator(config.worker_id, "scripted", None, sink=log, level="debug")
    metrics = PrometheusMetrics(config.worker_id, engine.info.quant_kind)
    return Rig(engine, create_app(engine, ByteTokenizer(), template, config, narrator, metrics), log, metrics)


@dataclass
class Live:
    """A rig on a port."""

    rig: Rig
    port: int
    exit_codes: list[int]
    thread: threading.Thread

    def wait_until_open(self) -> None:
        for _ in range(500):
            with contextlib.suppress(ConnectionRefusedError):
                self.connect().close()
                return
            time.sleep(0.01)
        raise AssertionError("the server does not listen")

    def connect(self, receive_buffer: int | None = None) -> socket.socket:
        peer = socket.socket()
        if receive_buffer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        peer.settimeout(10)
        peer.connect(("127.0.0.1", self.port))
        return peer

    def send(self, path: str, body: object, receive_buffer: int | None = None) -> socket.socket:
        """A connection on which a POST was sent."""
        peer = self.connect(receive_buffer)
        peer.sendall(http_request("POST", path, body))
        return peer

    def post(self, path: str, body: object) -> Answer:
        with self.send(path, body) as peer:
            return read_answer(peer)

    def get(self, path: str, method: str = "GET") -> Answer:
        with self.connect() as peer:
            peer.sendall(http_request(method, path))
            return read_answer(peer)

    def stop(self) -> int:
        """Shut down over HTTP; the exit code."""
        if self.thread.is_alive():
            with contextlib.suppress(OSError):
                self.post("/shutdown", {})
            self.thread.join(20)
        assert not self.thread.is_alive()
        return self.exit_codes[0]


@contextlib.contextmanager
def live(engine: ScriptedEngine | None = None, tls: ssl.SSLContext | None = None, **options: Any) -> Iterator[Live]:
    """A server on an ephemeral port of 127.0.0.1, in a thread."""
    rig = make_rig(engine, **({"shutdown_timeout_sec": 5.0} | options))
    listener = bind("127.0.0.1", 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # so that a slow reader is felt soon
    codes: list[int] = []
    narrator = Narrator("worker-test", "scripted", None, sink=rig.log)
    port = listener.getsockname()[1]
    thread = threading.Thread(
        target=lambda: codes.append(serve(rig.app, listener, rig.engine, narrator, tls)), daemon=True
    )
    thread.start()
    server = Live(rig, port, codes, thread)
    server.wait_until_open()
    try:
        yield server
    finally:
        server.stop()


def http_request(method: str, path: str, body: object = None, headers: str = "") -> bytes:
    raw = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(raw)}\r\n{headers}"
    return head.encode("latin-1") + b"Connection: close\r\n\r\n" + raw


def read_answer(peer: socket.socket) -> Answer:
    """Everything up to the end of the connection, taken apart."""
    raw = b""
    while data := peer.recv(65536):
        raw += data
    return parse_answer(raw)


def parse_answer(raw: bytes) -> Answer:
    head, _, body = raw.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        body = _unchunk(body)
    return Answer(int(status.split()[1]), headers, body)


def _unchunk(raw: bytes) -> bytes:
    body = b""
    while True:
        size, _, raw = raw.partition(b"\r\n")
        if not (length := int(size, 16)):
            assert raw == b"\r\n"
            return body
        body, raw = body + raw[:length], raw[length + 2 :]


def wait_for_back_pressure(engine: ScriptedEngine) -> None:
    """Wait until an engine that could go on gets no further, because nobody reads."""
    seen = -1
    while seen != engine.num_tokens:
        seen = engine.num_tokens
        time.sleep(0.1)


def eventually(condition: Callable[[], object], within_s: float = 3.0) -> None:
    """Wait for a condition; fails when it does not come true in time."""
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.002)
