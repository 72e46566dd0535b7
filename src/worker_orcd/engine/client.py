"""EngineClient: the InferenceEngine that the edge sees, whatever lies at the other end of its link.

Lives on one event loop at a time. Events of a request wait here until its stream takes them; tokens that wait
together become one event, so a reader that falls behind costs less, not more, and what waits is bounded by
`max_tokens` ids. The client is also the engine's watchdog.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Protocol

from worker_orcd.engine.loop import Broken, Cancel, Command, EngineFacts, Inspected, Message, Submit, Warned
from worker_orcd.engine.metrics import MetricsHook
from worker_orcd.engine.request import (
    EngineStatus,
    Event,
    Failed,
    Finished,
    ModelInfo,
    OnFreed,
    PromptLogprobs,
    Request,
    Started,
    StepStats,
    Tokens,
)
from worker_orcd.errors import (
    Cancelled,
    Internal,
    JobConflict,
    Overloaded,
    ShuttingDown,
    WorkerError,
    error_of,
)

WATCH_S = 0.1  # between two looks at the engine
MIN_STALL_S = 5.0  # without progress for so long, and for STALL_STEPS steps, an engine with work hangs
STALL_STEPS = 20
REFERENCE = "torch-reference"
WORK_S = 0.5  # processor time in which a hanging engine is told from a slow one
UNHEALTHY_CODES = frozenset({"VRAM_OOM", "INTERNAL"})
NO_STEP = StepStats(0, 0, 0, 0.0, 0, 0, 0, 0, 0, 0, 0, 0)


class Link(Protocol):
    """The way to an engine and back."""

    def attach(self, loop: asyncio.AbstractEventLoop, receive: Callable[[Message], None]) -> None:
        """Call `receive` on `loop` for every message from now on."""
        ...

    def send(self, command: Command) -> None: ...

    def failure(self) -> WorkerError | None:
        """Why nobody is at the other end any more."""
        ...

    def cpu_s(self) -> float:
        """Processor time the engine has used so far."""
        ...

    def close(self, is_orderly: bool = True) -> None:
        """End the engine; one that cannot be expected to listen any more is not asked. Idempotent."""
        ...


class _Stream:
    """The events of one request that its reader has not taken yet."""

    __slots__ = ("arrived_s", "events", "has_ended", "number", "request", "started_s", "waiter")

    def __init__(self, number: int, request: Request) -> None:
        self.number, self.request = number, request
        self.arrived_s = time.monotonic()
        self.events: deque[Event] = deque()
        self.waiter: asyncio.Future[None] | None = None
        self.started_s: float | None = None
        self.has_ended = False

    def post(self, event: Event) -> None:
        if self.events and isinstance(event, Tokens) and isinstance(last := self.events[-1], Tokens):
            last.ids.extend(event.ids)
            if last.logprobs is not None:
                last.logprobs.extend(event.logprobs or [])
        else:
            self.events.append(event)
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def next(self) -> Event:
        while not self.events:
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter
        return self.events.popleft()


class EngineClient:
    """Implements InferenceEngine; besides the batch, `max_queue` requests may wait."""

    def __init__(self, link: Link, facts: EngineFacts, max_queue: int, metrics: MetricsHook) -> None:
        self.info: ModelInfo = facts.info
        self.on_freed: OnFreed = lambda *_: None
        self._link, self._facts, self._max_queue, self._metrics = link, facts, max_queue, metrics
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams: dict[int, _Stream] = {}  # that may still get events
        self._by_id: dict[tuple[str, str], _Stream] = {}  # the same, by tenant and the client's name
        self._leaving: dict[int, tuple[Request, float]] = {}  # ended early, not yet freed by the engine; since when
        self._next_number = 1
        self._stats = NO_STEP
        self._step_s: deque[float] = deque([facts.slowest_step_s], maxlen=101)
        self._stalled_s = 0.0  # without progress although there is work
        self._worked_s = 0.0  # processor time of the engine when it was last seen at work
        self._mean_job_s: float | None = None  # from start to end, however it ended
        self._is_healthy, self._is_closed = True, False
        self._drift = ""
        self._misplaced = ""  # where a tensor lies that should lie in VRAM
        self.on_inspected: Callable[[str], None] = lambda _: None  # called when that changes
        self.on_warned: Callable[[str], None] = lambda _: None  # called when steps no longer go as they should
        self._failure: WorkerError | None = None

    # ------------------------------------------------------------------ the edge's side

    async def run(self, request: Request) -> AsyncGenerator[Event, None]:
        self._attach()
        stream = self._open(request)
        try:
            while True:
                event = await stream.next()
                yield event
                if isinstance(event, Finished | Failed):
                    return
        finally:
            self._end_early(stream, Cancelled("the client went away"))

    def check_room(self, num_coming: int = 0) -> None:
        if self._failure is not None or self._is_closed:
            raise ShuttingDown("the worker is shutting down; send the request to another one")
        limit = self._facts.max_batch + self._max_queue
        if len(self._streams) + num_coming >= limit:
            raise Overloaded(
                f"{len(self._streams)} requests are running or waiting; {self._facts.max_batch} may run and "
                f"{self._max_queue} may wait",
                retry_after_s=self._retry_after_s(self._max_queue),
            )

    def cancel(self, request_id: str, tenant: str = "") -> bool:
        stream = self._by_id.get((tenant, request_id))
        if stream is not None:
            self._end_early(stream, Cancelled("the request was cancelled"))
        return stream is not None

    def status(self) -> EngineStatus:
        stats, reason = self._stats, self._unready_reason()
        num_running = sum(stream.started_s is not None for stream in self._streams.values())
        return EngineStatus(
            healthy=self._is_healthy and not self._misplaced and self._failure is None,
            ready=not reason,
            reason=reason,
            resident=self._facts.vram_bytes > 0 and not self._misplaced,
            vram_bytes_used=self._facts.vram_bytes,
            num_running=num_running,
            num_waiting=len(self._streams) - num_running,
            blocks_total=self._facts.num_blocks,
            blocks_used=stats.blocks_used,
            blocks_cached=stats.blocks_cached,
            retry_after_s=self._retry_after_s(len(self._streams) - num_running),
            memory=self._facts.memory,
        )

    async def watch(self) -> WorkerError:
        self._attach()
        while self._failure is None:
            await asyncio.sleep(WATCH_S)
            self._look()
        return self._failure

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._end_all(ShuttingDown("the worker is shutting down"))
            self._link.close(is_orderly=self._failure is None)

    def _attach(self) -> None:
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop = loop
            self._link.attach(loop, self._receive)

    def _open(self, request: Request) -> _Stream:
        name = (request.tenant, request.id)
        if name in self._by_id:
            raise JobConflict(f"job_id {request.id!r} is already running; use a new one")
        self.check_room()
        stream = _Stream(self._next_number, request)
        self._next_number += 1
        self._link.send(Submit(stream.number, request, stream.arrived_s))
        if not self._streams:
            self._stalled_s = 0.0
        self._streams[stream.number] = self._by_id[name] = stream
        return stream

    def _retry_after_s(self, num_waiting: int) -> int:
        """When one more than those who wait now would be served, at the present pace."""
        at_once = max(1, self._stats.num_running)
        return max(1, min(600, round((self._mean_job_s or 1.0) * (num_waiting + 1) / at_once)))

    def _learn(self, job_s: float) -> None:
        """How long jobs take, from admission to their end."""
        mean = job_s if self._mean_job_s is None else self._mean_job_s
        self._mean_job_s = mean + 0.2 * (job_s - mean)

    def _end_early(self, stream: _Stream, error: WorkerError) -> None:
        """The reader hears of it now; the engine frees what it holds before its next step."""
        if not stream.has_ended:
            now = time.monotonic()
            if stream.started_s is not None:
                self._learn(now - stream.started_s)  # a stop string ends a job this way, too
            self._end(stream, Failed(error.code, error.message, error.retriable))
            self._leaving[stream.number] = (stream.request, now)
            if self._failure is None and not self._is_closed:
                self._link.send(Cancel(stream.number))

    def _end_all(self, error: WorkerError) -> None:
        for stream in list(self._streams.values()):
            self._end(stream, Failed(error.code, error.message, error.retriable))

    def _end(self, stream: _Stream, event: Event) -> None:
        stream.has_ended = True
        del self._streams[stream.number], self._by_id[stream.request.tenant, stream.request.id]
        stream.post(event)

    # ------------------------------------------------------------------ the engine's side

    def _receive(self, message: Message) -> None:
        if isinstance(message, Broken):
            self._break(error_of(message.code, message.message, message.details))
            return
        if isinstance(message, Inspected):
            self._misplaced = message.problem
            self.on_inspected(message.problem)
            return
        if isinstance(message, Warned):
            self.on_warned(message.warning)
            return
        output = message.output
        self._stalled_s = 0.0
        if output.stats is None:
            self._drift = output.drift  # of a look at the idle cache; steps do not look
        else:
            self._stats = output.stats
            if output.stats.num_rows:
                self._step_s.append(output.stats.step_ms / 1e3)
            self._metrics.record_step(output.stats)
        for number, event in output.events:
            stream = self._streams.get(number)
            if stream is not None:
                self._pass_on(stream, event)
            elif isinstance(event, Finished | Failed) and number in self._leaving:
                request, since_s = self._leaving.pop(number)
                self._metrics.record_cancel_latency((time.monotonic() - since_s) * 1e3)
                self._account(request, event)

    def _pass_on(self, stream: _Stream, event: Event) -> None:
        if isinstance(event, Tokens | PromptLogprobs):
            stream.post(event)
            return
        if isinstance(event, Started):
            stream.started_s = event.started_s or time.monotonic()
            self._metrics.record_queue_time((stream.started_s - stream.arrived_s) * 1e3)
            stream.post(event)
            return
        if isinstance(event, Finished):
            self._is_healthy = True
            self._learn(event.timings.decode_ms / 1e3)
        elif event.code in UNHEALTHY_CODES:
            self._is_healthy = False  # until the next request succeeds
        self._account(stream.request, event)
        self._end(stream, event)

    def _account(self, request: Request, event: Finished | Failed) -> None:
        if event.timings is not None:
            self.on_freed(request, event.timings)

    # ------------------------------------------------------------------ the watchdog

    def _look(self) -> None:
        """Called every WATCH_S of our own time: when all of us were stopped, that is no fault of the engine."""
        if (gone := self._link.failure()) is not None:
            self._break(gone)
            return
        if not self._streams:
            return
        self._stalled_s += WATCH_S
        if self.info.backend == REFERENCE and self._link.cpu_s() - self._worked_s > WORK_S:
            self._worked_s, self._stalled_s = self._link.cpu_s(), 0.0  # its steps may take long, but it works on one
        if self._stalled_s > self._stall_limit_s():
            self._break(Internal(f"the engine made no progress for {self._stalled_s:.1f} s and is given up"))

    def _stall_limit_s(self) -> float:
        return max(MIN_STALL_S, STALL_STEPS * statistics.median(self._step_s), 3 * self._facts.slowest_step_s)

    def _break(self, error: WorkerError) -> None:
        if self._failure is None:
            self._failure = error
            self._end_all(error)

    def _unready_reason(self) -> str:
        if self._failure is not None:
            return self._failure.message
        return "the worker is shutting down" if self._is_closed else self._misplaced or self._drift
