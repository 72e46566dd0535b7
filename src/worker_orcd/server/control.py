"""Lifecycle: the jobs in flight, cancelling, draining, and the control routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from worker_orcd.config import WorkerConfig
from worker_orcd.engine.metrics import CONTENT_TYPE, MetricsPage
from worker_orcd.engine.request import EngineStatus, InferenceEngine
from worker_orcd.errors import Cancelled, InvalidRequest, JobConflict, ShuttingDown, WorkerError
from worker_orcd.server.body import read_body
from worker_orcd.server.schemas import JOB_ID, JobState, check_fields, parse_object

if TYPE_CHECKING:
    from worker_orcd.tokenizer.base import Tokenizer

SETTLE_S = 1.0  # what interrupted jobs get to write their last event
FAILED_S = 0.5  # what jobs get to write the error of a failed engine, before they are interrupted
MAX_CONTROL_BYTES = 16 * 1024
HEALTH_S = 0.1  # how long an answer to /health is good for, while the state stays


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
        self._jobs: dict[tuple[str, str], Job] = {}  # by tenant and job_id
        self._idle = asyncio.Event()
        self._idle.set()
        self._impatient = asyncio.Event()
        self.is_stopping = False
        self._ends: set[asyncio.Future[None]] = set()
        self.failure: WorkerError | None = None

    @property
    def num_jobs(self) -> int:
        return len(self._jobs)

    def check_open(self) -> None:
        """Raise ShuttingDown when no new work is taken."""
        if self.failure is not None:
            raise ShuttingDown("the worker has failed; send the request to another one")
        if self.is_stopping:
            raise ShuttingDown("the worker is shutting down; send the request to another one")

    def end(self) -> asyncio.Future[None]:
        """Done as soon as no new work is taken. To be cancelled by who does not wait for it any more."""
        end = asyncio.get_running_loop().create_future()
        self._ends.add(end)
        end.add_done_callback(self._ends.discard)
        if self.is_stopping:
            end.set_result(None)
        return end

    def _take_no_more(self) -> None:
        self.is_stopping = True
        for end in self._ends:
            if not end.done():
                end.set_result(None)

    @contextmanager
    def open(self, job_id: str, remaining_s: float | None, tenant: str = "") -> Iterator[Job]:
        """Hold `job_id` of `tenant` for the life of one request; raises ShuttingDown or JobConflict."""
        self.check_open()
        key = (tenant, job_id)
        if key in self._jobs:
            raise JobConflict("a job with this job_id is running; wait for its end or choose another job_id")
        job = self._jobs[key] = Job(remaining_s)
        self._idle.clear()
        try:
            yield job
        finally:
            del self._jobs[key]
            if not self._jobs:
                self._idle.set()

    def cancel(self, job_id: str, tenant: str = "") -> None:
        """End a job of `tenant` with CANCELLED; one that is unknown or over is left as it is."""
        if job := self._jobs.get((tenant, job_id)):
            job.interrupt(Cancelled("the job was cancelled"))

    def stop(self) -> None:
        """First call: take no new work. Second call: wait for the work in flight no longer."""
        if self.is_stopping:
            self._impatient.set()
        self._take_no_more()

    async def drain(self) -> None:
        """Let jobs finish for up to the shutdown timeout, then end the rest with SHUTTING_DOWN."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self._idle, self._impatient)]
        await asyncio.wait(waits, timeout=self._shutdown_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        await self._interrupt(ShuttingDown("the worker shut down before the job was done"))

    async def fail(self, error: WorkerError) -> None:
        """Take no new work, and end the jobs: by what the engine told each of them, else with `error`."""
        self.failure = error
        self._take_no_more()
        await self._wait_idle(FAILED_S)
        await self._interrupt(error)

    async def _interrupt(self, error: WorkerError) -> None:
        for job in self._jobs.values():
            job.interrupt(error)
        await self._wait_idle(SETTLE_S)

    async def _wait_idle(self, timeout_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
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
    memory_bytes: dict[str, int]
    tokenizer_kind: str
    tokenizer_model: str
    vocab_size: int
    context_length: int
    device: str
    backend: str
    uptime_seconds: float
    num_running: int
    num_waiting: int
    blocks_total: int
    blocks_used: int
    blocks_cached: int
    capabilities: list[str]
    protocol: str


class ControlRoutes:
    """The handlers of the control routes."""

    def __init__(
        self,
        control: Control,
        engine: InferenceEngine,
        tokenizer: Tokenizer,
        config: WorkerConfig,
        metrics: MetricsPage,
    ) -> None:
        self._control = control
        self._engine = engine
        self._tokenizer = tokenizer
        self._worker_id = config.worker_id
        self._metrics = metrics
        self._born_s = time.monotonic()
        self._health_told: tuple[JobState, bool] | None = None  # what the bytes below were built for
        self._health_bytes, self._health_s = b"", 0.0

    async def health(self, request: HttpRequest) -> Response:
        status, state = self._engine.status(), self._state()
        code = 200 if state in ("ready", "busy") else 503
        if request.scope["state"]["exchange"].tenant is None:  # anybody at all: whether it lives, and no more
            return _json({"status": "healthy" if code == 200 else "unhealthy", "state": state}, code)
        now_s, told = time.monotonic(), (state, status.resident)
        if told != self._health_told or now_s - self._health_s >= HEALTH_S:
            self._health_bytes = msgspec.json.encode(self._health(status, state))
            self._health_told, self._health_s = told, now_s
        return Response(self._health_bytes, code, media_type="application/json")

    async def ready(self, request: HttpRequest) -> Response:  # noqa: ARG002
        status, reason = self._engine.status(), ""
        if self._control.failure is not None:
            reason = "the worker has failed"
        elif self._control.is_stopping:
            reason = "the worker is shutting down"
        elif not status.ready:
            reason = status.reason or "the engine makes no progress"
        if reason:
            return _json({"ready": False, "reason": reason}, 503)
        return _json({"ready": True}, 200)

    async def metrics(self, request: HttpRequest) -> Response:  # noqa: ARG002
        page = self._metrics.render(self._engine.status())
        return Response(page, headers={"content-type": CONTENT_TYPE})

    async def cancel(self, request: HttpRequest) -> Response:
        document = parse_object(await _small_body(request))
        good, errors = check_fields(document, {"job_id": JOB_ID}, frozenset({"job_id"}))
        if errors:
            raise InvalidRequest(errors[0].message, errors)
        self._control.cancel(good["job_id"], request.scope["state"]["exchange"].tenant)
        return _json({"job_id": good["job_id"]}, 202)

    async def shutdown(self, request: HttpRequest) -> Response:
        if body := await _small_body(request):
            parse_object(body)
        if not self._control.is_stopping:
            self._control.stop()
        return _json({"state": "draining"}, 202)

    def _health(self, status: EngineStatus, state: JobState) -> Health:
        info = self._engine.info
        return Health(
            status="healthy" if state in ("ready", "busy") else "unhealthy",
            state=state,
            worker_id=self._worker_id,
            model=info.name,
            architecture=info.architecture,
            quant_kind=info.quant_kind,
            resident=status.resident,
            vram_bytes_used=status.vram_bytes_used,
            memory_bytes=status.memory,
            tokenizer_kind=self._tokenizer.kind,
            tokenizer_model=self._tokenizer.model,
            vocab_size=info.vocab_size,
            context_length=info.context_length,
            device=info.device,
            backend=info.backend,
            uptime_seconds=round(time.monotonic() - self._born_s, 3),
            num_running=status.num_running,
            num_waiting=status.num_waiting,
            blocks_total=status.blocks_total,
            blocks_used=status.blocks_used,
            blocks_cached=status.blocks_cached,
            capabilities=["text-gen"],
            protocol="sse",
        )

    def _state(self) -> JobState:
        if self._control.failure is not None:
            return "failed"
        if self._control.is_stopping:
            return "draining"
        if not self._engine.status().healthy:
            return "failed"
        return "busy" if self._control.num_jobs else "ready"


async def _small_body(request: HttpRequest) -> bytes:
    """A body that takes no time to parse, for it is parsed between other people's tokens."""
    body = await read_body(request)
    if len(body) > MAX_CONTROL_BYTES:
        raise HTTPException(413, f"the body is larger than {MAX_CONTROL_BYTES} bytes")
    return body


def _json(content: Any, status: int) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")
