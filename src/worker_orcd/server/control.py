"""Lifecycle: the jobs in flight, cancelling, draining, and the routes `/health`, `/cancel` and `/shutdown`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from worker_orcd.config import WorkerConfig
from worker_orcd.engine.request import InferenceEngine
from worker_orcd.errors import Cancelled, InvalidRequest, JobConflict, ShuttingDown, WorkerError
from worker_orcd.server.body import read_body
from worker_orcd.server.schemas import JOB_ID, JobState, check_fields, parse_object

if TYPE_CHECKING:
    from worker_orcd.tokenizer.base import Tokenizer

SETTLE_S = 1.0  # what interrupted jobs get to write their last event


class Job:
    """One `/execute` in flight. What runs inside `scope` stops at `interrupt` or after `remaining_s`."""

    def __init__(self, remaining_s: float | None) -> None:
        self.error: WorkerError | None = None
        self.scope = asyncio.timeout(remaining_s)
        self.is_settled = False  # its outcome is known; only the client still has to read it

    def interrupt(self, error: WorkerError) -> None:
        """End the job with `error`; only the first interruption counts."""
        if self.error is None and not self.is_settled:
            self.error = error
            if not self.scope.expired():
                self.scope.reschedule(asyncio.get_running_loop().time())


class Control:
    """Which jobs run, and whether the worker still takes new ones. Lives on the event loop's thread."""

    def __init__(self, shutdown_timeout_s: float) -> None:
        self._shutdown_timeout_s = shutdown_timeout_s
        self._jobs: dict[str, Job] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._impatient = asyncio.Event()
        self.stopping = asyncio.Event()

    @property
    def num_jobs(self) -> int:
        return len(self._jobs)

    @contextmanager
    def open(self, job_id: str, remaining_s: float | None) -> Iterator[Job]:
        """Hold `job_id` for the life of one request; raises ShuttingDown or JobConflict."""
        if self.stopping.is_set():
            raise ShuttingDown("the worker is shutting down; send the request to another one")
        if job_id in self._jobs:
            raise JobConflict("a job with this job_id is running; wait for its end or choose another job_id")
        job = self._jobs[job_id] = Job(remaining_s)
        self._idle.clear()
        try:
            yield job
        finally:
            del self._jobs[job_id]
            if not self._jobs:
                self._idle.set()

    def cancel(self, job_id: str) -> None:
        """End a job with CANCELLED; one that is unknown or over is left as it is."""
        if job := self._jobs.get(job_id):
            job.interrupt(Cancelled("the job was cancelled"))

    def stop(self) -> None:
        """First call: take no new work. Second call: wait for the work in flight no longer."""
        if self.stopping.is_set():
            self._impatient.set()
        self.stopping.set()

    async def drain(self) -> None:
        """Let jobs finish for up to the shutdown timeout, then end the rest with SHUTTING_DOWN."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self._idle, self._impatient)]
        await asyncio.wait(waits, timeout=self._shutdown_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        for job in self._jobs.values():
            job.interrupt(ShuttingDown("the worker shut down before the job was done"))
        with suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_S):
                await self._idle.wait()


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """The body of `/health`; `status` is healthy exactly when the HTTP status is 200."""

    status: str
    state: JobState
    worker_id: str
    model: str
    architecture: str
    quant_kind: str
    resident: bool
    vram_bytes_used: int
    tokenizer_kind: str
    tokenizer_model: str
    vocab_size: int
    context_length: int
    device: str
    backend: str
    uptime_seconds: float
    num_running: int
    num_waiting: int
    capabilities: list[str]
    protocol: str


class ControlRoutes:
    """The handlers of the three control routes."""

    def __init__(self, control: Control, engine: InferenceEngine, tokenizer: Tokenizer, config: WorkerConfig) -> None:
        self._control = control
        self._engine = engine
        self._tokenizer = tokenizer
        self._worker_id = config.worker_id
        self._born_s = time.monotonic()

    async def health(self, request: HttpRequest) -> Response:  # noqa: ARG002 - the router passes it
        body = self._health()
        return _json(body, 200 if body.status == "healthy" else 503)

    async def cancel(self, request: HttpRequest) -> Response:
        document = parse_object(await read_body(request))
        good, errors = check_fields(document, {"job_id": JOB_ID}, frozenset({"job_id"}))
        if errors:
            raise InvalidRequest(errors[0].message, errors)
        self._control.cancel(good["job_id"])
        return _json({"job_id": good["job_id"]}, 202)

    async def shutdown(self, request: HttpRequest) -> Response:
        if body := await read_body(request):
            parse_object(body)
        if not self._control.stopping.is_set():
            self._control.stop()
        return _json({"state": "draining"}, 202)

    def _health(self) -> Health:
        info, status, state = self._engine.info, self._engine.status(), self._state()
        return Health(
            status="healthy" if state in ("ready", "busy") else "unhealthy",
            state=state,
            worker_id=self._worker_id,
            model=info.name,
            architecture=info.architecture,
            quant_kind=info.quant_kind,
            resident=status.resident,
            vram_bytes_used=status.vram_bytes_used,
            tokenizer_kind=self._tokenizer.kind,
            tokenizer_model=self._tokenizer.model,
            vocab_size=info.vocab_size,
            context_length=info.context_length,
            device=info.device,
            backend=info.backend,
            uptime_seconds=round(time.monotonic() - self._born_s, 3),
            num_running=status.num_running,
            num_waiting=status.num_waiting,
            capabilities=["text-gen"],
            protocol="sse",
        )

    def _state(self) -> JobState:
        if self._control.stopping.is_set():
            return "draining"
        if not self._engine.status().healthy:
            return "failed"
        return "busy" if self._control.num_jobs else "ready"


def _json(content: Any, status: int) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")
