"""One job from the engine's acceptance to its last event on the wire.

Until the stream is open every failure is raised, to be answered with its HTTP status; afterwards it is the `error`
event. The stream opens with the engine's first event or, for a request that waits, after `ACCEPT_S`. There is one
way to end a job early (stop string, cancel, disconnect, deadline, shutdown): closing the engine's iterator.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime

from starlette.types import Receive

from worker_orcd.engine.metrics import MetricsHook
from worker_orcd.engine.request import Failed, Finished, InferenceEngine, Started, StopReason, Tokens
from worker_orcd.errors import Cancelled, InferenceTimeout, Internal, SlowClient, WorkerError
from worker_orcd.narration import rfc3339
from worker_orcd.server.control import Job
from worker_orcd.server.exchange import Exchange
from worker_orcd.server.prepare import Prepared
from worker_orcd.server.sse import (
    KEEP_ALIVE,
    EndEvent,
    ErrorEvent,
    EventStream,
    MetricsEvent,
    StartedEvent,
    frame,
    token_frame,
)
from worker_orcd.tokenizer.stream import TextStream

ACCEPT_S = 0.1  # an engine refuses at once; what it has not refused by then is accepted
KEEP_ALIVE_S = 15.0
METRICS_S = 0.5
MAX_TOKENS_PER_WRITE = 256  # some 15 KiB, so that tokens piled up for a slow reader are not all encoded at once


@dataclass
class Tally:
    """What a job has come to; `code` is None unless it failed. Moments are on the monotonic clock."""

    num_tokens: int = 0
    cached_tokens: int = 0
    started_s: float | None = None
    last_token_s: float = 0.0
    first_token_ms: float | None = None
    decode_ms: float | None = None
    stop_reason: StopReason | None = None
    code: str | None = "CANCELLED"
    cause: str | None = None  # type of an exception nobody expected

    def elapsed_ms(self) -> float:
        """Milliseconds since the job left the queue."""
        return 0.0 if self.started_s is None else round((time.monotonic() - self.started_s) * 1e3, 3)


class Generation:
    """Runs one request and writes its events."""

    def __init__(
        self,
        engine: InferenceEngine,
        prepared: Prepared,
        text: TextStream,
        stream: EventStream,
        exchange: Exchange,
        metrics: MetricsHook,
    ) -> None:
        self.tally = Tally()
        self._engine = engine
        self._request = prepared.request
        self._text = text
        self._stream = stream
        self._exchange = exchange
        self._metrics = metrics
        self._wants_metrics = prepared.wants_metrics
        self._told_s: float | None = None  # when the last `metrics` event, or `started`, was sent

    async def serve(self, job: Job, receive: Receive) -> None:
        """Write every event. Raises WorkerError when the job fails before the stream is open."""
        watcher = asyncio.create_task(self._watch(job, receive))
        try:
            terminal = await self._outcome(job)
        finally:
            watcher.cancel()
        if self.tally.started_s is None:  # every stream begins with `started`, one that ends in the queue too
            await self._start()
        await self._stream.end(frame("end" if isinstance(terminal, EndEvent) else "error", terminal))

    async def _outcome(self, job: Job) -> EndEvent | ErrorEvent:
        try:
            async with job.scope:
                return await self._generate()
        except WorkerError as error:
            failure = error
        except Exception as error:
            failure = self._expected(job, error)
        finally:
            job.is_settled = True
        self.tally.code = failure.code
        if not self._stream.is_open and not isinstance(failure, Cancelled):
            raise failure
        return ErrorEvent(failure.code, failure.message, failure.retriable)

    def _expected(self, job: Job, error: Exception) -> WorkerError:
        """What to tell the client: why `job` was stopped or, when it was not, that we failed."""
        if isinstance(error, TimeoutError) and job.scope.expired():
            return job.error or InferenceTimeout("X-Deadline passed before the job was done")
        self.tally.cause = type(error).__name__
        failure = Internal("the worker failed while serving this job")
        failure.__cause__ = error
        return failure

    async def _generate(self) -> EndEvent | ErrorEvent:
        async with aclosing(self._engine.run(self._request)) as events:
            async for event in events:
                match event:
                    case Tokens():
                        await self._tokens(event)
                        if self._text.matched is not None:
                            return self._end("stop_sequence", self.tally.elapsed_ms())
                    case Started():
                        self.tally.cached_tokens = event.cached_tokens
                        await self._start()
                    case Finished():
                        return self._end(event.reason, round(event.timings.decode_ms, 3))
                    case Failed():
                        self.tally.code = event.code
                        return ErrorEvent(event.code, event.message, event.retriable)
        raise Internal("the engine ended the job without saying how")

    async def _start(self) -> None:
        self.tally.started_s = time.monotonic()
        started = StartedEvent(
            job_id=self._request.id,
            model=self._engine.info.name,
            started_at=rfc3339(datetime.now(UTC)),
            seed=self._request.sampling.seed,
            prompt_tokens=len(self._request.prompt_ids),
            cached_tokens=self.tally.cached_tokens,
        )
        await self._stream.write(frame("started", started))
        self._told_s = time.monotonic()

    async def _tokens(self, event: Tokens) -> None:
        """Send the tokens of one event, up to the one that completes a stop string."""
        for begin in range(0, len(event.ids), MAX_TOKENS_PER_WRITE):
            frames = self._frames(event.index + begin, event.ids[begin : begin + MAX_TOKENS_PER_WRITE])
            self._count(len(frames))
            await self._stream.write(b"".join(frames))
            if self._text.matched is not None:
                return

    def _frames(self, index: int, ids: Sequence[int]) -> list[bytes]:
        frames, text = [], self._text
        for i, token_id in enumerate(ids, index):
            frames.append(token_frame(text.push(token_id), i, token_id))
            if text.matched is not None:
                break
        return frames

    def _count(self, num_tokens: int) -> None:
        tally, now_s = self.tally, time.monotonic()
        if tally.num_tokens:
            self._metrics.record_token_generation(num_tokens, (now_s - tally.last_token_s) * 1e3)
        else:
            tally.first_token_ms = tally.elapsed_ms()
            self._metrics.record_first_token_latency(self._exchange.age_ms())
            self._metrics.record_token_generation(num_tokens, None)
        tally.last_token_s = now_s
        tally.num_tokens += num_tokens

    def _end(self, reason: StopReason, decode_ms: float) -> EndEvent:
        rest = self._text.finish()
        if self._text.matched is not None:
            reason = "stop_sequence"
        self.tally.stop_reason, self.tally.decode_ms, self.tally.code = reason, decode_ms, None
        return EndEvent(
            tokens_out=self.tally.num_tokens,
            decode_time_ms=decode_ms,
            stop_reason=reason,
            seed=self._request.sampling.seed,
            cached_tokens=self.tally.cached_tokens,
            stop_sequence_matched=self._text.matched,
            t=rest,
        )

    async def _watch(self, job: Job, receive: Receive) -> None:
        """Keep a quiet stream alive, tell metrics, and end the job when the client goes away."""
        wait_s = ACCEPT_S
        while True:
            try:
                async with asyncio.timeout(wait_s):
                    while (await receive())["type"] != "http.disconnect":
                        pass
            except TimeoutError:
                wait_s = await self._tick(job)
            else:
                return self._client_left(job)

    async def _tick(self, job: Job) -> float:
        """Write what is due; returns the seconds until something may be due again."""
        if not self._stream.is_open or self._stream.quiet_s() >= KEEP_ALIVE_S:
            await self._stream.write(KEEP_ALIVE)
        if not self._wants_metrics:
            return max(KEEP_ALIVE_S - self._stream.quiet_s(), 0.01)
        is_over = job.is_settled or job.error is not None
        if not is_over and self._told_s is not None and time.monotonic() - self._told_s >= METRICS_S / 2:
            self._told_s = time.monotonic()
            await self._stream.write(frame("metrics", self._metrics_event()))
        return METRICS_S

    def _metrics_event(self) -> MetricsEvent:
        status, num_tokens, elapsed_ms = self._engine.status(), self.tally.num_tokens, self.tally.elapsed_ms()
        return MetricsEvent(
            job_id=self._request.id,
            tokens_out=num_tokens,
            decode_time_ms=elapsed_ms,
            tokens_per_second=round(num_tokens * 1e3 / max(elapsed_ms, 1e-3), 3),
            vram_bytes=status.vram_bytes_used,
            num_running=status.num_running,
            num_waiting=status.num_waiting,
        )

    def _client_left(self, job: Job) -> None:
        if self._exchange.is_stalled:
            job.interrupt(SlowClient("the client read too slowly"))
        else:
            self._metrics.record_client_disconnect()
            job.interrupt(Cancelled("the client is gone"))
