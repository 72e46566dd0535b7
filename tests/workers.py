"""Workers as child processes, real and fake: their log, their requests, their processes, their end."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.server.client import Answer, http_request, parse_answer

ROOT = Path(__file__).parents[1]
PROMPT = "Write a haiku about GPU computing"
REAL = (sys.executable, "-m", "worker_orcd", "serve", "--device", "cpu")
FAKE = (sys.executable, str(ROOT / "benchmarks" / "fake_worker.py"))
START_S = 60.0


class Worker:
    """A worker on a port of 127.0.0.1; its log lines as they come."""

    def __init__(self, command: tuple[str, ...], port: int | None = None, temp: Path | None = None) -> None:
        self.port = port or free_port()
        env = os.environ | ({"TMPDIR": str(temp)} if temp else {})
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port)], stderr=subprocess.PIPE, text=True, env=env
        )
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(iter(self.process.stderr.readline, ""))

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        events = [json.loads(line) for line in list(self.lines) if line.startswith("{")]
        return [event for event in events if name in (None, event["event"])]

    def wait_for(self, name: str) -> dict[str, Any]:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if found := self.events(name):
                return found[0]
            assert self.process.poll() is None, self.lines
            time.sleep(0.02)
        raise AssertionError(f"no {name} in {self.lines}")

    def request(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            return response.status, response.read()

    def execute(self, **fields: Any) -> list[tuple[str, dict[str, Any]]]:
        """The events of an answer that is given."""
        answer = asyncio.run(self.ask(**fields))
        assert answer.status == 200, answer.body
        return [(event.name, event.data) for event in answer.events]

    async def ask(self, **fields: Any) -> Answer:
        """What comes back, to the end of the connection; `fields` complete or replace those of a request."""
        return await self.call("POST", "/execute", request_body(**fields))

    async def call(self, method: str, path: str, body: object = None) -> Answer:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        with contextlib.closing(writer):
            writer.write(http_request(method, path, body))
            return parse_answer(await reader.read())

    def health(self) -> dict[str, Any]:
        status, raw = self.request("GET", "/health")
        assert status == 200, raw
        return json.loads(raw)

    def is_ready(self) -> bool:
        """Whether /ready says so; one that no longer listens is not."""
        try:
            return self.request("GET", "/ready")[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def engine_pid(self) -> int:
        (child,) = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return int(child)

    def end(self, timeout: float = 20) -> int:
        status = self.process.wait(timeout)
        self.reader.join(5)
        return status


@contextlib.contextmanager
def running(command: tuple[str, ...], port: int | None = None, temp: Path | None = None) -> Iterator[Worker]:
    """Killed on the way out if it still runs; its engine ends with it."""
    worker = Worker(command, port, temp)
    try:
        yield worker
    finally:
        if worker.process.poll() is None:
            worker.process.kill()
            worker.process.wait()


@contextlib.contextmanager
def real_worker(*flags: str, port: int | None = None, temp: Path | None = None) -> Iterator[Worker]:
    """On the embedded model."""
    with running((*REAL, *flags), port, temp) as worker:
        yield worker


@contextlib.contextmanager
def fake_worker(*flags: str, temp: Path | None = None) -> Iterator[Worker]:
    """Without a model; see benchmarks/fake_worker.py."""
    with running((*FAKE, *flags), temp=temp) as worker:
        yield worker


def request_body(**fields: Any) -> dict[str, Any]:
    return {"job_id": os.urandom(8).hex(), "prompt": PROMPT, "seed": 42} | fields


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for the signal (proc(5), SigCgt)."""
    return bool(int(_status(pid)["SigCgt"], 16) >> (number - 1) & 1)


def num_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def num_threads(pid: int) -> int:
    return int(_status(pid)["Threads"])


def resident_bytes(pid: int) -> int:
    return int(_status(pid)["VmRSS"].split()[0]) * 1024


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that only waits for its parent's wait does not."""
    try:
        return _status(pid)["State"][0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
