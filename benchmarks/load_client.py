"""The clients of bench_serve.py: a process of its own, so cheap that it does not measure itself.

Reads a Load as one JSON line from standard input, writes a list of Outcomes as JSON. An answer is not parsed: frames
are counted where they arrive, and every read is stamped once.
"""

from __future__ import annotations

import asyncio
import random
import re
import sys
import time
from collections.abc import AsyncIterator

import msgspec
import uvloop

TOKEN = b"event: token\n"
KEEP = len(TOKEN) - 1  # a frame may begin in one read and go on in the next
TAIL = 2048  # of an answer, to see how it ended
FIRST_S, ANSWER_S = 30.0, 600.0  # a client that waits for ever measures nothing
PROMPT_TOKENS = re.compile(rb'"prompt_tokens":(\d+)')
ERROR_CODE = re.compile(rb'"code":"(\w+)"')


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """Closed loop with `concurrency` clients, or, with a rate above 0, arrivals of a Poisson process."""

    host: str
    port: int
    num_requests: int
    concurrency: int
    rate: float  # requests a second
    prompts: list[str]  # used in turn
    max_tokens: int
    temperature: float
    seed: int
    name: str  # job ids begin with it


class Outcome(msgspec.Struct):
    """One request. Times in seconds on the client's monotonic clock."""

    began_s: float
    status: int = 0  # of HTTP; 0 when there was no answer
    end: str = ""  # `end`, the code of an error, or `lost`
    ended_s: float = 0.0
    prompt_tokens: int = 0
    reads: list[tuple[float, int]] = []  # with tokens: when, how many


class Answer(asyncio.Protocol):
    """Sends a request when connected and takes the answer to its end."""

    def __init__(self, request: bytes) -> None:
        self.outcome = Outcome(time.monotonic())
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request, self._last = request, b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        count = data.count(TOKEN)
        if self.outcome.status == 0 or not self.outcome.prompt_tokens:
            self._begin(data)
        else:
            count += (self._last[-KEEP:] + data[:KEEP]).count(TOKEN)
        if count:
            self.outcome.reads.append((time.monotonic(), count))
        self._last = (self._last + data)[-TAIL:] if len(data) < TAIL else data[-TAIL:]

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self.outcome.ended_s = time.monotonic()
        is_whole = b"event: end\n" in self._last
        code = ERROR_CODE.search(self._last)
        self.outcome.end = "end" if is_whole else code[1].decode() if code else "lost"
        if not self.done.done():
            self.done.set_result(None)

    def _begin(self, data: bytes) -> None:
        """The head, and the `started` event, which may come later."""
        if self.outcome.status == 0:
            self.outcome.status = int(data.split(b" ", 2)[1])
        if found := PROMPT_TOKENS.search(data):
            self.outcome.prompt_tokens = int(found[1])


async def ask(load: Load, number: int) -> Outcome:
    body = msgspec.json.encode({
        "job_id": f"{load.name}-{number}",
        "prompt": load.prompts[number % len(load.prompts)],
        "max_tokens": load.max_tokens,
        "temperature": load.temperature,
        "seed": load.seed + number,
    })  # fmt: skip
    head = f"POST /execute HTTP/1.1\r\nHost: {load.host}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    answer = Answer(head.encode() + body)
    try:
        async with asyncio.timeout(ANSWER_S):
            await asyncio.get_running_loop().create_connection(lambda: answer, load.host, load.port)
            await answer.done
    except (OSError, TimeoutError):
        answer.outcome.end, answer.outcome.ended_s = "lost", time.monotonic()
    return answer.outcome


async def closed_loop(load: Load) -> list[Outcome]:
    numbers, outcomes = iter(range(load.num_requests)), list[Outcome]()

    async def client() -> None:
        for number in numbers:
            outcomes.append(await ask(load, number))

    await asyncio.gather(*(client() for _ in range(load.concurrency)))
    return outcomes


async def poisson(load: Load) -> list[Outcome]:
    tasks = [asyncio.create_task(ask(load, number)) async for number in _arrivals(load)]
    return list(await asyncio.gather(*tasks))


async def _arrivals(load: Load) -> AsyncIterator[int]:
    """Numbers of requests at their moments. One that is late is not left out: the loop is open."""
    gaps, due_s = random.Random(load.seed), time.monotonic()
    for number in range(load.num_requests):
        await asyncio.sleep(max(0.0, due_s - time.monotonic()))
        yield number
        due_s += gaps.expovariate(load.rate)


def main() -> None:
    load = msgspec.json.decode(sys.stdin.buffer.readline(), type=Load)
    outcomes = uvloop.run(poisson(load) if load.rate else closed_loop(load))
    with open(sys.stdout.fileno(), "wb", closefd=False) as out:  # buffered, whatever PYTHONUNBUFFERED says
        out.write(msgspec.json.encode(outcomes))


if __name__ == "__main__":
    main()
