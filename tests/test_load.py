"""A worker under many clients: some leave, some are slow, most are too many. Real sockets, a fake model."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import statistics
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.server.client import Answer, eventually, http_request
from tests.workers import Worker, fake_worker, num_descriptors, num_threads, request_body, resident_bytes

MAX_BATCH, MAX_QUEUE = 64, 64
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def served() -> Iterator[Worker]:
    sizes = ("--max-batch", str(MAX_BATCH), "--max-queue", str(MAX_QUEUE), "--num-blocks", "16384")
    flags = ("--step-ms", "1", "--send-buffer", "8192", "--context-length", "16384", "--log-level", "error")
    with fake_worker(*sizes, *flags) as worker:
        eventually(worker.is_ready, 60)
        pool = min(32, (os.cpu_count() or 1) + 4)  # threads that asyncio.to_thread may start, as they are needed
        limit = num_threads(worker.pid) + pool
        asyncio.run(_at_once(worker, 64, max_tokens=4))
        _wait_until_idle(worker)
        yield worker
        assert num_threads(worker.pid) <= limit
        worker.process.terminate()
        assert worker.end() == 0


async def _at_once(worker: Worker, count: int, **fields: object) -> list[Answer]:
    return await asyncio.gather(*(worker.ask(**fields) for _ in range(count)))


def _wait_until_idle(worker: Worker) -> None:
    """Everything was given back, exactly."""

    def is_idle() -> bool:
        health = worker.health()
        return health["num_running"] == health["num_waiting"] == health["blocks_used"] == 0

    eventually(is_idle, 10)
    assert worker.is_ready()  # and the worker itself, which checks its cache when idle, found nothing amiss


def _resources(worker: Worker) -> dict[str, int]:
    """What may leak, once the last connection is closed."""
    before = len(worker.lines)
    os.kill(worker.pid, signal.SIGUSR1)
    eventually(lambda: len(worker.lines) > before)
    return {
        "tasks": int(worker.lines[-1].split()[1]),
        "descriptors": num_descriptors(worker.pid),
        "engine's descriptors": num_descriptors(worker.engine_pid),
        "engine's threads": num_threads(worker.engine_pid),
    }


@contextlib.contextmanager
def nothing_leaks(worker: Worker) -> Iterator[None]:
    before = _resources(worker)
    yield
    _wait_until_idle(worker)
    until = time.monotonic() + 10
    while (more := {k: n for k, n in _resources(worker).items() if n > before[k]}) and time.monotonic() < until:
        time.sleep(0.05)  # the last connections are being closed
    assert not more, before


def _terminal(answer: Answer) -> str:
    """How a stream ended; `events` asserts that it did so in order and once."""
    last = answer.events[-1]
    return last.name if last.name == "end" else last.data["code"]


# ---------------------------------------------------------------------- clients that leave


async def _leave(worker: Worker, draw: random.Random) -> None:
    """Ask and go away: before the answer, within it, with a FIN or a RST."""
    reader, writer = await asyncio.open_connection("127.0.0.1", worker.port)
    writer.write(http_request("POST", "/execute", request_body(max_tokens=2000)))
    await asyncio.sleep(draw.uniform(0, 0.3))
    if draw.random() < 0.5:
        await reader.read(draw.randrange(1, 4000))
    if draw.random() < 0.5:
        writer.transport.abort()
    writer.close()


async def _cancelled(worker: Worker, draw: random.Random) -> Answer:
    body = request_body(max_tokens=4000)
    stream = asyncio.create_task(worker.ask(**body))
    await asyncio.sleep(draw.uniform(0.1, 0.4))
    while not stream.done():  # it may not have arrived the first time
        assert (await worker.call("POST", "/cancel", {"job_id": body["job_id"]})).status == 202
        await asyncio.wait([stream], timeout=0.5)
    return await stream


async def _one_client(worker: Worker, draw: random.Random, ends: Counter[str]) -> None:
    for _ in range(6):
        chance = draw.random()
        if chance < 0.3:
            await _leave(worker, draw)
            ends["left"] += 1
        elif chance < 0.4:
            ends[_terminal(await _cancelled(worker, draw))] += 1
        else:
            prompt = "x" * draw.choice([1, 31, 32, 100, 700])
            ends[_terminal(await worker.ask(prompt=prompt, max_tokens=draw.randrange(1, 120)))] += 1


async def _ask_for_health(worker: Worker, latencies_s: list[float]) -> None:
    while True:
        began_s = time.monotonic()
        assert (await worker.call("GET", "/health")).status == 200
        latencies_s.append(time.monotonic() - began_s)
        await asyncio.sleep(0.02)


async def _crowd(worker: Worker, latencies_s: list[float]) -> Counter[str]:
    ends: Counter[str] = Counter()
    probe = asyncio.create_task(_ask_for_health(worker, latencies_s))
    await asyncio.gather(*(_one_client(worker, random.Random(seed), ends) for seed in range(64)))
    probe.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await probe
    return ends


def test_64_streams_of_which_a_third_is_left(served: Worker) -> None:
    latencies_s: list[float] = []
    with nothing_leaks(served):
        ends = asyncio.run(_crowd(served, latencies_s))
    assert ends.total() == 64 * 6
    assert set(ends) == {"end", "CANCELLED", "left"}
    assert ends["left"] > 64
    assert statistics.quantiles(latencies_s, n=100)[-1] < 1.0  # promised: 10 ms, where the worker has its cores


# ---------------------------------------------------------------------- too many


def test_ten_times_too_many_are_refused_at_once_and_the_others_served(served: Worker) -> None:
    took_s: dict[int, list[float]] = {200: [], 429: []}

    async def one() -> Answer:
        began_s = time.monotonic()
        answer = await served.ask(max_tokens=300)
        took_s[answer.status].append(time.monotonic() - began_s)
        return answer

    async def burst() -> list[Answer]:
        return await asyncio.gather(*(one() for _ in range(10 * (MAX_BATCH + MAX_QUEUE))))

    with nothing_leaks(served):
        answers = asyncio.run(burst())
    served_answers = [answer for answer in answers if answer.status == 200]
    refused = [answer for answer in answers if answer.status == 429]
    assert len(served_answers) >= MAX_BATCH + MAX_QUEUE
    assert len(refused) > MAX_BATCH + MAX_QUEUE
    assert {_terminal(answer) for answer in served_answers} == {"end"}
    assert {answer.error["code"] for answer in refused} == {"OVERLOADED"}
    assert all(1 <= int(answer.headers["retry-after"]) <= 600 for answer in refused)
    assert served.execute(max_tokens=1)[-1][0] == "end"


def test_of_equal_ids_at_once_one_is_served(served: Worker) -> None:
    with nothing_leaks(served):
        for _ in range(10):
            answers = asyncio.run(_at_once(served, 8, job_id="equal", max_tokens=50))
            assert sorted(answer.status for answer in answers) == [200, *[409] * 7]
            assert [_terminal(answer) for answer in answers if answer.status == 200] == ["end"]


# ---------------------------------------------------------------------- slow readers


def _slow_reader(worker: Worker) -> socket.socket:
    """A client that asks for 4,000 tokens, some 230 KB, and reads nothing."""
    peer = socket.socket()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    peer.connect(("127.0.0.1", worker.port))
    peer.sendall(http_request("POST", "/execute", request_body(max_tokens=4000)))
    return peer


def test_slow_readers_take_bounded_memory_and_nobody_elses_time(served: Worker) -> None:
    with nothing_leaks(served), contextlib.ExitStack() as readers:
        before = resident_bytes(served.pid)
        for _ in range(56):
            readers.enter_context(_slow_reader(served))
        eventually(lambda: served.health()["num_running"] == 56, 10)
        answers = asyncio.run(_at_once(served, 8, max_tokens=300))
        assert {_terminal(answer) for answer in answers} == {"end"}
        eventually(lambda: served.health()["num_running"] == 0, 60)  # all is generated, and little was sent
        assert resident_bytes(served.pid) - before < 96 * MIB  # 224,000 frames would take twice that
