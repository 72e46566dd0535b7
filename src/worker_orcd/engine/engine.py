"""SerialEngine: one request at a time, first come first served, through the same seams as a batching engine.

One thread owns model, cache and sequences. The event loop's side only appends to the waiting line, sets cancel
flags and receives events; a lock guards exactly the waiting line and the table of known requests. A request ends
(and its cache is free again) within one step of being cancelled, and `prefill_chunk` bounds what a step is.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from worker_orcd.engine.metrics import MetricsHook
from worker_orcd.engine.request import (
    EngineStatus,
    Event,
    Failed,
    Finished,
    ModelInfo,
    Request,
    Started,
    StopReason,
    Timings,
    Token,
)
from worker_orcd.engine.sequence import Chunk, Sequence
from worker_orcd.engine.step import InferenceStep
from worker_orcd.errors import (
    Cancelled,
    InferenceTimeout,
    Internal,
    JobConflict,
    Overloaded,
    ShuttingDown,
    VramOom,
    WorkerError,
)
from worker_orcd.kv.allocator import KVCacheAllocator


@dataclass
class _Job:
    """A request on its way through; times in seconds on the monotonic clock."""

    request: Request
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    stop: WorkerError | None = None  # set from any thread; honoured between steps
    has_ended: bool = False  # its last event is posted; its id and its place are free again
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    first_token: float | None = None

    def post(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is gone, and with it everyone who could read
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    def timings(self) -> Timings:
        now = time.monotonic()
        started = self.started if self.started is not None else now
        first = None if self.first_token is None else (self.first_token - started) * 1e3
        return Timings((started - self.arrived) * 1e3, first, (now - started) * 1e3, (now - self.arrived) * 1e3)


class SerialEngine:
    """Implements InferenceEngine. `max_queue` requests may wait while one runs."""

    def __init__(
        self,
        info: ModelInfo,
        step: InferenceStep,
        allocator: KVCacheAllocator,
        eog_ids: frozenset[int],
        metrics: MetricsHook,
        limits: EngineLimits,
    ) -> None:
        self.info = info
        self._step, self._allocator, self._eog_ids = step, allocator, eog_ids
        self._metrics, self._limits = metrics, limits
        self._lock = threading.Condition()
        self._waiting: deque[_Job] = deque()
        self._jobs: dict[str, _Job] = {}  # waiting or running, by request id
        self._closing = False
        self._is_busy = False
        self._healthy = True
        self._mean_job_s = 1.0  # running mean, for Retry-After
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ the event loop's side

    async def run(self, request: Request) -> AsyncGenerator[Event, None]:
        job = self._enqueue(request)
        try:
            while True:
                event = await job.events.get()
                yield event
                if isinstance(event, Finished | Failed):
                    return
        finally:
            self._end_early(job, Cancelled("the client went away"))

    def cancel(self, request_id: str) -> bool:
        job = self._jobs.get(request_id)
        if job is not None:
            self._end_early(job, Cancelled("the request was cancelled"))
        return job is not None

    def status(self) -> EngineStatus:
        return EngineStatus(
            healthy=self._healthy and self._thread.is_alive(),
            resident=self._limits.vram_bytes > 0,
            vram_bytes_used=self._limits.vram_bytes,
            num_running=int(self._is_busy),
            num_waiting=len(self._waiting),
            retry_after_s=self._retry_after_s(),
        )

    def close(self) -> None:
        with self._lock:
            self._closing = True
            for job in list(self._jobs.values()):
                self._end_early(job, ShuttingDown("the worker is shutting down"))
            self._lock.notify()
        self._thread.join()

    def _enqueue(self, request: Request) -> _Job:
        job = _Job(request, asyncio.get_running_loop())
        with self._lock:
            if self._closing:
                raise ShuttingDown("the worker is shutting down; send the request to another one")
            if request.id in self._jobs:
                raise JobConflict(f"job_id {request.id!r} is already running; use a new one")
            if len(self._jobs) > self._limits.max_queue:
                raise Overloaded(
                    f"{len(self._jobs)} requests are running or waiting; {self._limits.max_queue} may wait",
                    retry_after_s=self._retry_after_s(),
                )
            self._jobs[request.id] = job
            self._waiting.append(job)
            self._lock.notify()
        return job

    def _end_early(self, job: _Job, error: WorkerError) -> None:
        """The client hears of it now; the engine lets go of the running job before its next step."""
        with self._lock:
            if job.has_ended:
                return
            job.stop = error
            if job in self._waiting:
                self._waiting.remove(job)
            self._fail(job, error)

    def _retry_after_s(self) -> int:
        return max(1, round(self._mean_job_s * (1 + len(self._waiting))))

    # ------------------------------------------------------------------ the engine thread's side

    def _serve(self) -> None:
        while (job := self._next_job()) is not None:
            self._is_busy = True
            self._serve_one(job)
            self._is_busy = False

    def _serve_one(self, job: _Job) -> None:
        job.started = time.monotonic()
        job.post(Started())
        seq = Sequence.of(job.request, self._allocator.new_table())
        try:
            reason = self._generate(job, seq)
        except WorkerError as error:
            self._fail(job, error)
        except torch.OutOfMemoryError:
            self._fail(job, VramOom(f"no device memory for a request of {len(seq.tokens)} tokens"))
        except Exception as error:
            self._fail(job, Internal(f"the engine failed: {_origin(error)}"))
        else:
            self._healthy = True
            self._finish(job, Finished(reason, job.timings()))
        self._mean_job_s += 0.2 * (time.monotonic() - job.started - self._mean_job_s)

    def _next_job(self) -> _Job | None:
        with self._lock:
            while not self._waiting and not self._closing:
                self._lock.wait()
            return self._waiting.popleft() if self._waiting else None

    def _generate(self, job: _Job, seq: Sequence) -> StopReason:
        """Prefill in chunks, then a token a step until something ends it. The cache is free on return."""
        request = job.request
        try:
            self._step.start(seq)
            while True:
                self._check_stop(job)
                new = self._step.next_token([Chunk(seq, min(self._limits.prefill_chunk, seq.num_pending))])[0]
                for token in new:
                    if token in self._eog_ids:
                        return "eos"
                    self._emit(job, token, len(seq.generated) - 1)
                if len(seq.generated) >= request.max_tokens:
                    return "max_tokens"
                if len(seq.tokens) >= self.info.context_length:
                    return "context_length"
        finally:
            self._step.free(seq)

    def _emit(self, job: _Job, token: int, index: int) -> None:
        if job.first_token is None:
            job.first_token = time.monotonic()
            self._metrics.record_first_token_latency((job.first_token - job.arrived) * 1e3)
        self._metrics.record_token_generation(token)
        job.post(Token(token, index))

    def _check_stop(self, job: _Job) -> None:
        if job.stop is not None:
            raise job.stop
        now = time.monotonic()
        if now - job.arrived > job.request.timeout_s:
            raise InferenceTimeout(f"the request took longer than its {job.request.timeout_s:g} s")
        with self._lock:
            late = [j for j in self._waiting if now - j.arrived > j.request.timeout_s]
        for waiting in late:
            self._end_early(waiting, InferenceTimeout(f"waited longer than its {waiting.request.timeout_s:g} s"))

    def _fail(self, job: _Job, error: WorkerError) -> None:
        if error.code in ("VRAM_OOM", "CUDA_ERROR", "INTERNAL"):
            self._healthy = False  # until the next request succeeds
        self._finish(job, Failed(error.code, error.message, error.retriable))

    def _finish(self, job: _Job, event: Event) -> None:
        with self._lock:
            if job.has_ended:
                return
            job.has_ended = True
            del self._jobs[job.request.id]
        self._metrics.record_inference_complete(job.timings().total_ms)
        job.post(event)


def _origin(error: Exception) -> str:
    """Type and place of an unexpected exception; its text might quote a prompt."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"


@dataclass(frozen=True)
class EngineLimits:
    max_queue: int  # requests that may wait
    prefill_chunk: int  # tokens
    vram_bytes: int  # device memory the engine holds; 0 on the CPU
