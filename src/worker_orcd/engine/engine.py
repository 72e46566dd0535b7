"""BatchEngine: an EngineCore on a thread of this process. For tests and tools; a worker uses engine/process.py."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable

from worker_orcd.engine.client import EngineClient
from worker_orcd.engine.core import EngineCore
from worker_orcd.engine.loop import Close, Command, EngineFacts, Message, run_loop
from worker_orcd.engine.metrics import MetricsHook
from worker_orcd.errors import WorkerError


class BatchEngine(EngineClient):
    """Takes `core` over: from here on one thread owns it."""

    def __init__(self, core: EngineCore, facts: EngineFacts, max_queue: int, metrics: MetricsHook) -> None:
        super().__init__(ThreadLink(core), facts, max_queue, metrics)


class ThreadLink:
    """Queues in place of sockets."""

    def __init__(self, core: EngineCore) -> None:
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._receive: Callable[[Message], None] = lambda _: None
        self._thread = threading.Thread(
            target=run_loop, args=(core, self._incoming, self._deliver), name="engine", daemon=True
        )
        self._thread.start()

    def attach(self, loop: asyncio.AbstractEventLoop, receive: Callable[[Message], None]) -> None:
        self._loop, self._receive = loop, receive

    def send(self, command: Command) -> None:
        self._inbox.put(command)

    def failure(self) -> WorkerError | None:
        return None  # a thread that fails says so itself

    def cpu_s(self) -> float:
        return time.process_time()

    def close(self, is_orderly: bool = True) -> None:
        self._inbox.put(Close())
        if is_orderly:
            self._thread.join()

    def _incoming(self, wait_s: float | None) -> list[Command]:
        commands: list[Command] = []
        with contextlib.suppress(queue.Empty):
            if wait_s != 0.0:
                commands.append(self._inbox.get(timeout=wait_s))
            while True:
                commands.append(self._inbox.get_nowait())
        return commands

    def _deliver(self, message: Message) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and with it everyone who could read
                self._loop.call_soon_threadsafe(self._receive, message)
