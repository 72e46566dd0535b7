"""Real sockets: peers that leave, read slowly, send too much or send nonsense."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import Iterator

import pytest

from tests.fakes import ScriptedEngine, Step, forever, text_script
from tests.server.client import (
    Live,
    SseParser,
    eventually,
    http_request,
    live,
    parse_answer,
    read_answer,
    wait_for_back_pressure,
)
from worker_orcd.engine.request import Request
from worker_orcd.server import connection

FREED_WITHIN_S = 1.0  # a few milliseconds on an idle machine


def by_prompt(request: Request) -> list[Step] | Iterator[Step]:
    """Behaviour chosen by the first letter of the prompt."""
    match chr(request.prompt_ids[0]):
        case "f":
            return iter(forever())
        case "s":
            return iter([60.0, "eos"])  # silent: not one token
        case "b":
            return (step for _ in range(10**9) for step in (ord("x"),) * 50 + (0.001,))  # floods
        case "p":
            return (step for _ in range(10**9) for step in ([ord("x")] * 4096, 0.001))  # as tokens pile up
        case "l":
            return [[ord("x")] * 100_000, "max_tokens"]  # long, and told all at once
        case _:
            return text_script("answer")


CANCELLED = 'worker_requests_total{outcome="cancelled",quant_kind="Q4_K_M",worker_id="worker-test"}'


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(ScriptedEngine(by_prompt, max_running=2, max_queue=4), max_tokens_out=2**20) as running:
        yield running


def body(job_id: str, prompt: str) -> dict[str, object]:
    return {"job_id": job_id, "prompt": prompt, "max_tokens": 2**20}


def leave(peer: socket.socket, how: str) -> None:
    if how == "reset":
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if how == "half-close":
        peer.shutdown(socket.SHUT_WR)
    else:
        peer.close()


def check_freed(server: Live, job_id: str) -> None:
    engine = server.rig.engine
    left_s = time.monotonic()
    eventually(lambda: job_id in engine.cancelled)
    assert time.monotonic() - left_s < FREED_WITHIN_S
    assert job_id not in engine.running
    assert job_id not in engine.waiting
    eventually(lambda: server.rig.app.state.control.num_jobs == 0)


@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
@pytest.mark.parametrize("prompt", ["flow", "silent", "burst"], ids=["decode", "prefill", "back-pressure"])
def test_a_peer_that_leaves_frees_its_job(server: Live, how: str, prompt: str) -> None:
    job_id = f"{how}-{prompt}"
    with server.send("/execute", body(job_id, prompt), receive_buffer=4096) as peer:
        eventually(lambda: job_id in server.rig.engine.running)
        assert peer.recv(64).startswith(b"HTTP/1.1 200")
        if prompt == "burst":
            wait_for_back_pressure(server.rig.engine)
        leave(peer, how)
        check_freed(server, job_id)


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_peer_that_leaves_the_queue_frees_its_place(server: Live, how: str) -> None:
    engine = server.rig.engine
    with contextlib.ExitStack() as stack:
        for i in range(2):
            stack.enter_context(server.send("/execute", body(f"runner-{how}-{i}", "silent")))
        eventually(lambda: len(engine.running) == 2)
        with server.send("/execute", body(f"waiter-{how}", "x")) as peer:
            eventually(lambda: engine.waiting == [f"waiter-{how}"])
            leave(peer, how)
            eventually(lambda: not engine.waiting, FREED_WITHIN_S)
    eventually(lambda: not engine.running)


def test_a_slow_reader_gets_everything_and_delays_nobody(server: Live) -> None:
    with server.send("/execute", body("slow", "burst"), receive_buffer=4096) as peer:
        wait_for_back_pressure(server.rig.engine)
        quick = server.post("/execute", body("quick", "x"))
        assert quick.text == "answer"
        parser, raw = SseParser(), b""
        while len(raw) < 300_000:
            raw += peer.recv(1000)
    events = parser.feed(_chunks(raw.partition(b"\r\n\r\n")[2]))
    assert [event.data["i"] for event in events[1:]] == list(range(len(events) - 1))
    check_freed(server, "slow")


def _chunks(raw: bytes) -> bytes:
    """The complete chunks at the start of a chunked body."""
    body = b""
    while True:
        size, found, rest = raw.partition(b"\r\n")
        if not found or len(rest) < int(size, 16) + 2:
            return body
        body, raw = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]


def test_a_reader_that_stalls_is_dropped(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "STALL_TIMEOUT_S", 0.3)
    with server.send("/execute", body("stalled", "burst"), receive_buffer=4096):
        eventually(lambda: "stalled" in server.rig.engine.cancelled)
    eventually(lambda: server.rig.log.events("execute_end")[-1]["job_id"] == "stalled")
    assert server.rig.log.events("execute_end")[-1]["code"] == "SLOW_CLIENT"


@pytest.mark.parametrize("path", ["/execute", "/v1/completions"], ids=["streamed", "whole"])
@pytest.mark.parametrize("how", ["stall", "reset"])
def test_an_answer_that_nobody_took_to_its_end_is_no_success(
    server: Live, monkeypatch: pytest.MonkeyPatch, path: str, how: str
) -> None:
    monkeypatch.setattr(connection, "STALL_TIMEOUT_S", 0.3 if how == "stall" else 30.0)
    before, num_ended = server.rig.scrape(), len(server.rig.log.events("execute_end"))
    fields = {"prompt": "long", "max_tokens": 2**20}
    fields |= {"job_id": f"lost-{how}"} if path == "/execute" else {}
    with server.send(path, fields, receive_buffer=4096) as peer:
        wait_for_back_pressure(server.rig.engine)  # all that is left of the answer waits to be written
        if how == "reset":
            leave(peer, how)
        eventually(lambda: len(server.rig.log.events("execute_end")) > num_ended, 10.0)
    end = server.rig.log.events("execute_end")[-1]
    assert (end["code"], end["outcome"]) == ("SLOW_CLIENT" if how == "stall" else "CANCELLED", "cancelled")
    passport = server.get(f"/v1/requests/{end['job_id']}").json
    assert (passport["stop_reason"], passport["error_code"]) == (None, end["code"])
    after = server.rig.scrape()
    assert after[CANCELLED] == before[CANCELLED] + 1
    name = "worker_client_disconnects_total"
    assert after[name] == before[name] + (how == "reset")


def test_what_waits_for_a_slow_reader_is_bounded(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    peers: list[connection.Connection] = []
    accept = connection.Connection.connection_made

    def connection_made(self: connection.Connection, transport: asyncio.Transport) -> None:
        peers.append(self)
        accept(self, transport)

    monkeypatch.setattr(connection.Connection, "connection_made", connection_made)
    with server.send("/execute", body("bounded", "piled"), receive_buffer=4096):
        eventually(lambda: any(peer.flow.write_paused for peer in peers))
        time.sleep(0.1)
        unsent = max(peer.transport.get_write_buffer_size() for peer in peers)
        assert unsent < 16 * 1024 + 24 * 1024  # the mark, and the write that passed it
    check_freed(server, "bounded")


def test_clients_that_leave_are_counted(server: Live) -> None:
    before = server.rig.scrape()
    with server.send("/execute", body("counted", "flow")):
        eventually(lambda: "counted" in server.rig.engine.running)
    check_freed(server, "counted")
    after = server.rig.scrape()
    assert after["worker_client_disconnects_total"] == before["worker_client_disconnects_total"] + 1
    assert after[CANCELLED] == before[CANCELLED] + 1


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics"])
def test_head_is_get_without_its_body(server: Live, path: str) -> None:
    head, whole = server.get(path, "HEAD"), server.get(path)
    assert (head.status, head.body) == (200, b"")
    assert whole.body
    assert head.headers["content-type"] == whole.headers["content-type"]
    assert int(head.headers["content-length"]) > 0


@pytest.mark.parametrize("prompt", ["x", "burst"])
def test_http_1_0_gets_no_chunks(server: Live, prompt: str) -> None:
    request = http_request("POST", "/execute", body("old", prompt) | {"max_tokens": 5000})
    with server.connect() as peer:
        peer.sendall(request.replace(b"HTTP/1.1", b"HTTP/1.0"))
        answer = read_answer(peer)
    assert "transfer-encoding" not in answer.headers
    assert answer.headers["connection"] == "close"
    assert answer.text == ("answer" if prompt == "x" else "x" * 5000)
    with server.connect() as peer:
        peer.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        health = read_answer(peer)
    assert health.status == 200
    assert int(health.headers["content-length"]) == len(health.body)


def test_http_1_0_under_back_pressure_is_whole(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker_orcd.server.execute.METRICS_S", 0.01)  # so that two write
    fields = body("old-slow", "piled") | {"max_tokens": 20_000, "metrics": True}
    with server.connect(receive_buffer=4096) as peer:
        peer.sendall(http_request("POST", "/execute", fields).replace(b"HTTP/1.1", b"HTTP/1.0"))
        wait_for_back_pressure(server.rig.engine)
        answer = read_answer(peer)
    assert answer.text == "x" * 20_000


def test_the_first_event_leaves_before_the_last_token(server: Live) -> None:
    with server.send("/execute", body("early", "flow")) as peer:
        raw = b""
        while b"event: token" not in raw:
            raw += peer.recv(4096)
        assert "early" in server.rig.engine.running
    check_freed(server, "early")


def test_keep_alive_serves_one_request_after_another(server: Live) -> None:
    with server.connect() as peer:
        for _ in range(3):
            peer.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            raw = b""
            while b'"protocol":"sse"}' not in raw:
                raw += peer.recv(4096)
            assert raw.startswith(b"HTTP/1.1 200")
            assert b"\r\nserver:" not in raw


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n", 421),
        (b"GET /health HTTP/1.0\r\nHost: evil.example\r\n\r\n", 421),
        (b"GET /health HTTP/1.0\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /health HTTP/1.0\r\nOrigin: http://evil.example\r\n\r\n", 403),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 33000 + b"\r\n\r\n", 431),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 40000, 431),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: 1\r\n" * 64 + b"\r\n", 431),
        (http_request("POST", "/execute", b"x" * (4 * 2**20 + 1)), 413),
        (
            b"POST /execute HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
            b"Content-Length: 5\r\n\r\n0\r\n\r\n",
            400,
        ),
        (b"POST /execute HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    ],
    ids=range(14),
)
def test_every_refusal_has_the_error_body(server: Live, request_bytes: bytes, status: int) -> None:
    with server.connect() as peer:
        peer.sendall(request_bytes)
        raw = b""
        while b'"details"' not in raw:
            data = peer.recv(65536)
            assert data, raw
            raw += data
    answer = parse_answer(raw)
    assert answer.status == status
    assert answer.error["code"] == "INVALID_REQUEST"
    assert answer.headers["x-correlation-id"] == answer.error["correlation_id"]


def test_a_chunked_body_is_counted_without_its_declared_length(server: Live) -> None:
    head = b"POST /execute HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with server.connect() as peer:
        peer.sendall(head + b"100000\r\n" + b" " * 2**20 + b"\r\n")
        with contextlib.suppress(OSError):
            for _ in range(4):
                peer.sendall(b"100000\r\n" + b" " * 2**20 + b"\r\n")
            peer.sendall(b"0\r\n\r\n")
        assert peer.recv(4096).startswith(b"HTTP/1.1 413")


def test_trailers_are_no_headers(server: Live) -> None:
    raw = b"POST /execute HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    raw += b"21\r\n%b\r\n0\r\nHost: evil\r\nX-Deadline: 1\r\n\r\n" % b'{"job_id": "tail", "prompt": "x"}'
    with server.connect() as peer:
        peer.sendall(raw)
        assert read_answer(peer).status == 200


def test_a_hopelessly_large_body_is_refused_unread(server: Live) -> None:
    with server.connect() as peer:
        peer.sendall(b"POST /execute HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n")
        assert peer.recv(4096).startswith(b"HTTP/1.1 413")
        with pytest.raises(OSError):  # noqa: PT012 - the send that fails is any of them
            for _ in range(200):
                peer.sendall(b" " * 2**20)


def test_a_head_that_trickles_is_cut_off(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.2)
    with server.connect() as peer:
        began_s = time.monotonic()
        with contextlib.suppress(OSError):
            for _ in range(40):
                peer.sendall(b"G")
                time.sleep(0.05)
        assert time.monotonic() - began_s < 1.5
    with server.connect() as peer:
        peer.sendall(b"GET /health HT")
        assert read_answer(peer).status == 408


def test_a_body_that_trickles_is_cut_off(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker_orcd.server.body.BODY_TIMEOUT_S", 0.2)
    with server.connect() as peer:
        peer.sendall(b"POST /execute HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{")
        answer = read_answer(peer)  # which ends where the connection does
    assert (answer.status, answer.headers["connection"]) == (408, "close")


H2C = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"
FORMS = {
    "whole": (f"{H2C}Content-Length: 31\r\n", b"%b"),
    "chunked": (f"Transfer-Encoding: chunked\r\n{H2C}", b"1f\r\n%b\r\n0\r\n\r\n"),
    "websocket": ("Content-Length: 31\r\nupgrade: websocket\r\nUPGRADE: h2c\r\nConnection: upgrade\r\n", b"%b"),
}


@pytest.mark.parametrize("step", [1, 150, 4096])
@pytest.mark.parametrize("form", FORMS)
def test_an_offer_to_upgrade_is_passed_over(server: Live, form: str, step: int) -> None:
    fields, framing = FORMS[form]
    raw = f"POST /execute HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n".encode()
    raw += framing % b'{"job_id": "up", "prompt": "x"}'
    with server.connect() as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(2):  # the connection stays
            for begin in range(0, len(raw), step):
                peer.sendall(raw[begin : begin + step])
            answer = b""
            while not answer.endswith(b"0\r\n\r\n"):
                answer += (data := peer.recv(4096))
                assert data, answer
            assert parse_answer(answer).text == "answer"


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (http_request("GET", "/health", headers=H2C), 200),
        (http_request("GET", "/execute", headers=H2C), 405),
        (http_request("GET", "/nowhere", headers="Upgrade: websocket\r\nConnection: Upgrade\r\n"), 404),
        (http_request("GET", "/" + "a" * 9000, headers=H2C), 414),
        (http_request("GET", "/health", headers=H2C + "Upgrade: h2c\r\n" * 64), 431),
        (http_request("GET", "/health", headers=H2C).replace(b"HTTP/1.1", b"HTTP/1.0"), 200),
    ],
    ids=range(6),
)
def test_an_offer_to_upgrade_changes_no_answer(server: Live, request_bytes: bytes, status: int) -> None:
    with server.connect() as peer:
        peer.sendall(request_bytes)
        assert read_answer(peer).status == status


def test_a_request_behind_an_offer_to_upgrade_ends_the_connection(server: Live) -> None:
    smuggled = http_request("POST", "/execute", body("smuggled", "flow"))
    with server.connect() as peer:
        peer.sendall(f"GET /health HTTP/1.1\r\nHost: localhost\r\n{H2C}\r\n".encode() + smuggled)
        assert read_answer(peer).status == 400
    assert all(request.id != "smuggled" for request in server.rig.engine.requests)


def test_a_request_before_the_answer_to_the_last_ends_the_connection(server: Live) -> None:
    with server.connect() as peer:
        peer.sendall(http_request("POST", "/execute", body("piped", "flow")).replace(b"Connection: close\r\n", b""))
        assert peer.recv(10) == b"HTTP/1.1 2"
        peer.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        check_freed(server, "piped")


def test_with_every_connection_taken_the_oldest_idle_one_gives_way(
    server: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 8)
    with contextlib.ExitStack() as stack:
        tricklers = [stack.enter_context(server.connect()) for _ in range(20)]
        assert server.get("/health").status == 200
        assert tricklers[0].recv(1) == b""


def test_many_random_partings_leave_nothing_behind(server: Live) -> None:
    engine = server.rig.engine
    for i in range(60):
        with server.send("/execute", body(f"r{i}", "fsx"[i % 3])) as peer:
            time.sleep(0.003 * (i % 7))
            leave(peer, ("close", "reset")[i % 2])
    eventually(lambda: not engine.running and not engine.waiting)
    eventually(lambda: server.rig.app.state.control.num_jobs == 0)
    assert server.post("/execute", body("after", "x")).text == "answer"


def test_health_is_quick_while_streams_run(server: Live) -> None:
    with server.send("/execute", body("h1", "burst")), server.send("/execute", body("h2", "burst")):
        eventually(lambda: {"h1", "h2"} <= server.rig.engine.running)
        times = []
        for _ in range(20):
            began_s = time.monotonic()
            assert server.get("/health").json["state"] == "busy"
            times.append(time.monotonic() - began_s)
    assert sorted(times)[10] < 0.25
