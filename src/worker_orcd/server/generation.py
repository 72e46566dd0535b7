"""One job from the engine's acceptance to its last event on the wire.

Until the stream is open every failure is raised, to be answered with its HTTP status; afterwards it is the `error`
event. The stream opens with the engine's first event or, for a request that waits, after `ACCEPT_S`. There is one
way to end a job early (stop string, cancel, disconnect, deadline, shutdown): closing the engine's iterator.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime

from starlette.types import Receive

from worker_orcd.engine.request import (
    Failed,
    Finished,
    InferenceEngine,
    Request,
    Started,
    StopReason,
    Token,
)
from worker_orcd.errors import Cancelled, InferenceTimeout, Internal, SlowClient, WorkerError
from worker_orcd.narration import rfc3339
from worker_orcd.server.control import Job
from worker_orcd.server.exchange import Exchange
from worker_orcd.server.sse import KEEP_ALIVE, EndEvent, ErrorEvent, EventStream, StartedEvent, TokenEvent, frame
from worker_orcd.tokenizer.stream import TextStream

ACCEPT_S = 0.1  # an engine refuses at once; what it has not refused by then is accepted
KEEP_ALIVE_S = 15.0


@dataclass
class Tally:
    """What a job has come to; `code` is None unless it failed."""

    num_tokens: int = 0
    started_s: float | None = None
    first_token_ms: float | None = None
    decode_ms: float | None = None
    stop_reason: StopReason | None = None
    code: str | None = "CANCELLED"
    cause: str | None = None  # type of an exception nobody expected

    def elapsed_ms(self) -> float:
        """Milliseconds since the job left the queue."""
        return 0.0 if self.started_s is None else round((_now_s() - self.started_s) * 1000, 3)


class Generation:
    """Runs one request and writes its events."""

    def __init__(self, engine: InferenceEngine, request: Request, text: TextStream, stream: EventStream) -> None:
        self.tally = Tally()
        self._engine = engine
        self._request = request
        self._text = text
        self._stream = stream

    async def serve(self, job: Job, receive: Receive, exchange: Exchange) -> None:
        """Write every event. Raises WorkerError when the job fails before the stream is open."""
        watcher = asyncio.create_task(self._watch(job, receive, exchange))
        try:
            terminal = await self._outcome(job)
        finally:
            watcher.cancel()
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
        if self.tally.started_s is None:  # every stream begins with `started`, one that ends in the queue too
            await self._start()
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
                    case Started():
                        await self._start()
                    case Token():
                        await self._token(event)
                        if self._text.matched is not None:
                            return self._end("stop_sequence", self.tally.elapsed_ms())
                    case Finished():
                        return self._end(event.reason, round(event.timings.decode_ms, 3))
                    case Failed():
                        self.tally.code = event.code
                        return ErrorEvent(event.code, event.message, event.retriable)
        raise Internal("the engine ended the job without saying how")

    async def _start(self) -> None:
        self.tally.started_s = _now_s()
        started = StartedEvent(
            job_id=self._request.id,
            model=self._engine.info.name,
            started_at=rfc3339(datetime.now(UTC)),
            seed=self._request.sampling.seed,
            prompt_tokens=len(self._request.prompt_ids),
        )
        await self._stream.write(frame("started", started))

    async def _token(self, token: Token) -> None:
        if self.tally.first_token_ms is None:
            self.tally.first_token_ms = self.tally.elapsed_ms()
        self.tally.num_tokens += 1
        await self._stream.write(frame("token", TokenEvent(self._text.push(token.id), token.index, token.id)))

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
            stop_sequence_matched=self._text.matched,
            t=rest,
        )

    async def _watch(self, job: Job, receive: Receive, exchange: Exchange) -> None:
        """Keep a quiet stream alive, and end the job when the client goes away."""
        wait_s = ACCEPT_S
        while True:
            try:
                async with asyncio.timeout(wait_s):
                    while (await receive())["type"] != "http.disconnect":
                        pass
            except TimeoutError:
                if not self._stream.is_open or self._stream.quiet_s() >= KEEP_ALIVE_S:
                    await self._stream.write(KEEP_ALIVE)
                wait_s = max(KEEP_ALIVE_S - self._stream.quiet_s(), 0.01)
            else:
                slow = SlowClient("the client read too slowly")
                job.interrupt(slow if exchange.is_stalled else Cancelled("the client is gone"))
                return


def _now_s() -> float:
    return asyncio.get_running_loop().time()
