"""Hostile HTTP: each kind gets the answer it deserves, and the clean streams beside it get all of theirs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest

from tests.fakes import ScriptedEngine, Step, forever
from tests.server.client import eventually, http_request, live, make_rig
from tests.server.hostile import ATTACKS, Attack, differences, oracle, stream, strike, taken
from worker_orcd.engine.request import Request
from worker_orcd.server import connection

NUM_TOKENS = 150


def by_prompt(request: Request) -> Iterable[Step]:
    if bytes(request.prompt_ids).startswith(b"clean"):
        return [step for i in range(NUM_TOKENS) for step in (0.01, i % 256)]
    return forever()


async def under_fire(port: int, num_rounds: int) -> tuple[list[list[int]], list[str], list[float]]:
    """Ids of eight streams, what was answered wrongly meanwhile, and the gaps between tokens."""
    bodies = [{"job_id": f"clean{i}", "prompt": "clean", "max_tokens": NUM_TOKENS} for i in range(8)]
    streams = [asyncio.create_task(stream(port, body)) for body in bodies]
    await asyncio.sleep(0.05)
    wrong: list[str] = []

    async def strike_and_check(attack: Attack, i: int) -> None:
        status = await strike(port, attack, i)
        if status not in attack.statuses:
            wrong.append(f"{attack.name}: {status}")

    for number in range(num_rounds):
        await asyncio.gather(*(strike_and_check(attack, number) for attack in ATTACKS))
    clean = [await one for one in streams]
    assert {one.end for one in clean} == {"end"}
    return [one.ids for one in clean], wrong, [gap for one in clean for gap in one.gaps_s]


def test_attacks_are_answered_and_disturb_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.5)
    monkeypatch.setattr("worker_orcd.server.body.BODY_TIMEOUT_S", 0.5)
    engine = ScriptedEngine(by_prompt, max_running=16, max_queue=16)
    with live(engine) as server:
        ids, wrong, gaps = asyncio.run(under_fire(server.port, num_rounds=3))
        eventually(lambda: not engine.running and not engine.waiting)
        eventually(lambda: server.rig.app.state.control.num_jobs == 0)
        assert server.get("/ready").status == 200
        assert server.rig.scrape().get('worker_refusals_total{code="INTERNAL"}', 0) == 0
    assert wrong == []
    assert ids == [[i % 256 for i in range(NUM_TOKENS)]] * 8
    assert sorted(gaps)[len(gaps) // 2] < 0.1  # 10 ms by the script; loaded machines are slow, but not that slow


def test_ten_times_overload_is_refused_at_once_and_loses_nobody() -> None:
    engine = ScriptedEngine(by_prompt, max_running=4, max_queue=4)
    load = Attack("load", lambda i: [http_request("POST", "/execute", {"job_id": f"{i}", "prompt": "x"})], (200, 429))

    async def scenario(port: int) -> list[int]:
        return await asyncio.gather(*(strike(port, load, i) for i in range(80)))

    with live(engine) as server:
        statuses = asyncio.run(scenario(server.port))
        assert set(statuses) == {200, 429}
        assert statuses.count(429) >= 80 - 8 - len(engine.cancelled)
        eventually(lambda: not engine.running and not engine.waiting)
        assert len(engine.freed) == statuses.count(200)


def test_no_framing_is_read_in_two_ways() -> None:
    """The same requests as a second parser finds, or fewer and the connection closed."""
    found, num_taken = asyncio.run(differences(seed=1, num_cases=1500))
    assert found == []
    assert num_taken > 100, "the mutations leave hardly anything to compare"


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 5\r\nContent-Length: 5",
        b"Content-Length: 5\r\nContent-Length: 6",
        b"Content-Length: 5, 5",
        b"Content-Length: +5",
        b"Content-Length: 5\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5",
        b"Transfer-Encoding: gzip, chunked",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: identity",
        b"Transfer-Encoding : chunked",
        b" Transfer-Encoding: chunked",
        b"X-A: b\r\n c: d\r\nContent-Length: 5",
        b"Transfer-Encoding:\r\n chunked",
        b"X-A: b\nContent-Length: 5",
        b"X-A: b\rContent-Length: 5",
        b"X-A: b\x00\r\nContent-Length: 5",
    ],
)
@pytest.mark.parametrize("body", [b"hello", b"5\r\nhello\r\n0\r\n\r\n"])
@pytest.mark.parametrize("offer", [b"", b"Connection: Upgrade\r\nUpgrade: h2c\r\n"])
def test_ambiguous_framings_end_the_connection(framing: bytes, body: bytes, offer: bytes) -> None:
    raw = b"POST /a HTTP/1.1\r\nHost: h\r\n" + offer + framing + b"\r\n\r\n" + body
    seen, transport = asyncio.run(taken(raw))
    assert seen == []
    assert transport.written.startswith(b"HTTP/1.1 400 ")
    assert transport.is_closing()


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"GET / HTTP/2.0", 505),
        (b"GET / HTTP/1.2", 400),
        (b"GET http://evil.example/ HTTP/1.1", 400),
        (b"OPTIONS * HTTP/1.1", 400),
        (b"CONNECT h:80 HTTP/1.1", 501),
        (b"CONNECT /a HTTP/1.1", 501),
        (b"GET\t/\tHTTP/1.1", 400),
        (b"PRI * HTTP/2.0", 400),
    ],
)
def test_request_lines_that_are_not_for_us(line: bytes, status: int) -> None:
    seen, transport = asyncio.run(taken(line + b"\r\nHost: h\r\n\r\n"))
    assert seen == []
    assert transport.written.startswith(b"HTTP/1.1 %d " % status)
    assert transport.is_closing()


def test_http_1_0_knows_no_chunks() -> None:
    raw = b"POST /a HTTP/1.0\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    seen, transport = asyncio.run(taken(raw))
    assert seen == []
    assert transport.written.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("chunked", [True, False])
def test_plain_framings_are_read_alike(chunked: bool) -> None:
    head = b"POST /a HTTP/1.1\r\nHost: h\r\n"
    body = (
        b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n" if chunked else b"Content-Length: 5\r\n\r\nhello"
    )
    seen, _ = asyncio.run(taken(head + body))
    assert seen == oracle(head + body) == [("POST", "/a", b"hello")]


def _body(items: bytes, count: int) -> bytes:
    return b'{"job_id": "a", "prompt": "x", "new": [' + b",".join([items] * count) + b"]}"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (_body(b"1", 262_000), 200),
        (_body(b"1", 262_200), 400),
        (_body(b"[]", 65_500), 200),
        (_body(b"[]", 65_540), 400),
        (_body(b'{"a":1}', 32_700), 200),
        (_body(b'{"a":1}', 32_800), 400),
        (b'{"job_id": "a", "prompt": "' + b",[{:" * 200 + rb"\",[\\" + b'"}', 200),
        (b'{"job_id": "a", "prompt": "x", "new": "' + rb"\",[{:" * 300_000 + b'"}', 200),
        (b'{"job_id": "a", "prompt": "x", "new": "' + b",[" * 300_000 + rb"\"}", 400),
        (b"[" * 4_000_000, 400),
    ],
    ids=range(10),
)
def test_bodies_of_too_many_parts_are_refused_before_they_are_parsed(body: bytes, status: int) -> None:
    """What stands within strings is no part."""
    answer = make_rig().call("POST", "/execute", body)
    assert answer.status == status, answer.error


@pytest.mark.parametrize("path", ["/cancel", "/shutdown"])
def test_control_routes_take_small_bodies_only(path: str) -> None:
    rig = make_rig()
    assert rig.call("POST", path, b'{"job_id": "a", "new": "' + b"x" * 16_384 + b'"}').status == 413
    assert rig.call("POST", path, b'{"job_id": "a", "new": "' + b"x" * 16_000 + b'"}').status == 202
