"""One exchange from the engine's acceptance to its last event on the wire, whatever its dialect.

An exchange holds one `Run` or, for several answers or prompts, several; an `Answer` says in its own dialect what
happens to them. Until the response is open every failure is raised, to be answered with its HTTP status; afterwards
it is what the dialect makes of it. A stream opens with the engine's first event or, for a request that waits, after
`ACCEPT_S`; an answer that is not streamed opens when it is complete. There is one way to end a run early (stop
string, cancel, disconnect, deadline, shutdown): closing the engine's iterator.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from starlette.types import Receive

from worker_orcd.engine.metrics import MetricsHook
from worker_orcd.engine.request import (
    Event,
    Failed,
    Finished,
    InferenceEngine,
    PromptLogprobs,
    Request,
    Started,
    StopReason,
    Tokens,
)
from worker_orcd.errors import Cancelled, InferenceTimeout, Internal, Overloaded, SlowClient, WorkerError, error_of
from worker_orcd.server.control import Job
from worker_orcd.server.exchange import Exchange
from worker_orcd.server.sse import KEEP_ALIVE, EventStream
from worker_orcd.tokenizer.stream import TextStream

ACCEPT_S = 0.1  # an engine refuses at once; what it has not refused by then is accepted
KEEP_ALIVE_S = 15.0
ROOM_S = 0.05  # between two tries of a further run to get into a full engine
MAX_TOKENS_PER_WRITE = 256  # some 15 KiB, so that tokens piled up for a slow reader are not all encoded at once


class Run:
    """One request to the engine, and what it has come to. Moments are on the monotonic clock."""

    def __init__(self, request: Request, text: TextStream, leader: Run | None = None, index: int = 0) -> None:
        """`leader` is a run with the same prompt that goes first, so that this one finds the prefix cached."""
        self.request, self.text, self.leader, self.index = request, text, leader, index
        self.has_begun = asyncio.Event()  # its prompt is in the cache, or it has ended
        self.is_cut = False  # the answer is complete before the engine says so
        self.output_ids = array("I")
        self.num_tokens = self.cached_tokens = 0
        self.started_s: float | None = None
        self.last_token_s = 0.0
        self.first_token_ms: float | None = None
        self.decode_ms: float | None = None
        self.stop_reason: StopReason | None = None

    def push(self, token_id: int) -> str:
        """Count a token; returns the text it releases."""
        self.num_tokens += 1
        self.output_ids.append(token_id)
        return self.text.push(token_id)

    @property
    def is_complete(self) -> bool:
        return self.is_cut or self.text.matched is not None

    def elapsed_ms(self) -> float:
        """Milliseconds since the run left the queue."""
        return 0.0 if self.started_s is None else round((time.monotonic() - self.started_s) * 1e3, 3)


class Answer:
    """What goes out on one response. Each method returns bytes for the wire; a dialect replaces those it needs.

    An answer that is not streamed returns nothing but its whole body, from `closing`.
    """

    is_streamed = True
    opens_for_failures = False  # a failure the engine tells, or a cancel, becomes a stream and no HTTP status
    pulse_s: float | None = None  # how often to ask for a `pulse`, if at all
    grammar_param = "response_format"  # the field of the body that the grammar of its runs comes from

    def __init__(self, job_id: str, runs: Sequence[Run], num_prompt_chars: int, prompt_sha256: str) -> None:
        self.job_id, self.runs = job_id, runs
        self.num_prompt_chars, self.prompt_sha256 = num_prompt_chars, prompt_sha256

    def started(self, run: Run) -> bytes:  # noqa: ARG002
        return b""

    def prompt(self, run: Run, event: PromptLogprobs) -> bytes:  # noqa: ARG002
        return b""

    def tokens(self, run: Run, event: Tokens) -> bytes:
        """Push every token into `run`, up to the one that completes it."""
        raise NotImplementedError

    def ended(self, run: Run, rest: str) -> bytes:  # noqa: ARG002
        """`rest` is text that was still held back."""
        return b""

    def closing(self) -> bytes:
        """All runs have ended."""
        return b""

    def failed(self, error: WorkerError) -> bytes:  # noqa: ARG002
        """The last event of a stream that ends early."""
        return b""

    def pulse(self) -> bytes:
        return b""


class Generation:
    """Runs the requests of one answer and writes what it says."""

    def __init__(
        self,
        engine: InferenceEngine,
        answer: Answer,
        stream: EventStream,
        exchange: Exchange,
        metrics: MetricsHook,
    ) -> None:
        self.code: str | None = "CANCELLED"  # None: it has ended well
        self.cause: str | None = None  # type of an exception nobody expected
        self._engine = engine
        self._answer = answer
        self._stream = stream
        self._exchange = exchange
        self._metrics = metrics
        self._num_open = len(answer.runs)
        self._last = b""  # of the run that ends last; goes out with the closing
        self._told_s: float | None = None  # when the last pulse was sent, or the start

    async def serve(self, job: Job, receive: Receive) -> None:
        """Write everything. Raises WorkerError when the job fails before the response is open."""
        watcher = asyncio.create_task(self._watch(job, receive))
        try:
            terminal = await self._outcome(job)
        finally:
            watcher.cancel()
        await (self._stream.end if self._answer.is_streamed else self._stream.respond)(terminal)
        if self.code is None and self._exchange.has_left:  # the last writes went nowhere
            self.code = (job.error or self._departure()).code
            for run in self._answer.runs:
                run.stop_reason = None

    async def _outcome(self, job: Job) -> bytes:
        is_told = False
        try:
            async with job.scope:
                await self._generate()
            self.code = None
            return self._last + self._answer.closing()
        except _Told as told:
            failure, is_told = told.error, True
        except WorkerError as error:
            failure = error
        except Exception as error:
            failure = self._expected(job, error)
        finally:
            job.is_settled = True
        self.code = failure.code
        opens_anyway = self._answer.opens_for_failures and (is_told or isinstance(failure, Cancelled))
        if not self._stream.is_open and not opens_anyway:
            raise failure
        return self._answer.failed(failure)

    def _expected(self, job: Job, error: Exception) -> WorkerError:
        """What to tell the client: why `job` was stopped or, when it was not, that we failed."""
        if isinstance(error, TimeoutError) and job.scope.expired():
            return job.error or InferenceTimeout("the time for this job passed before it was done")
        self.cause = type(error).__name__
        failure = Internal("the worker failed while serving this job")
        failure.__cause__ = error
        return failure

    async def _generate(self) -> None:
        runs = self._answer.runs
        if len(runs) == 1:
            await self._run(runs[0])
            return
        try:
            async with asyncio.TaskGroup() as group:
                for run in runs:
                    group.create_task(self._run(run))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _run(self, run: Run) -> None:
        try:
            async with aclosing(self._events(run)) as events:
                async for event in events:
                    if await self._handle(run, event):
                        return
        finally:
            run.has_begun.set()
        raise Internal("the engine ended the job without saying how")

    async def _events(self, run: Run) -> AsyncGenerator[Event, None]:
        """What the engine tells of a run. Those behind the first one wait here while the engine has no room."""
        if run.leader is not None:
            await run.leader.has_begun.wait()
        while True:
            try:
                async with aclosing(self._engine.run(run.request)) as events:
                    async for event in events:
                        yield event
                return
            except Overloaded:
                if run is self._answer.runs[0]:
                    raise
            await asyncio.sleep(ROOM_S)

    async def _handle(self, run: Run, event: Event) -> bool:
        """True when the run has ended."""
        match event:
            case Tokens():
                await self._tokens(run, event)
                if run.is_complete:
                    await self._end(run, "stop_sequence", run.elapsed_ms())
                    return True
            case Started():
                run.cached_tokens, run.started_s = event.cached_tokens, event.started_s or time.monotonic()
                await self._write(self._answer.started(run))
                self._told_s = time.monotonic()
            case PromptLogprobs():
                await self._write(self._answer.prompt(run, event))
                await asyncio.sleep(0)  # many may wait, of a step each; others get their turn between them
            case Finished():
                await self._end(run, event.reason, round(event.timings.decode_ms, 3))
                return True
            case Failed():
                raise _Told(event)
        return False

    async def _tokens(self, run: Run, event: Tokens) -> None:
        """Send the tokens of one event, up to the one that completes the answer."""
        for begin in range(0, len(event.ids), MAX_TOKENS_PER_WRITE):
            end, before = begin + MAX_TOKENS_PER_WRITE, run.num_tokens
            logprobs = event.logprobs and event.logprobs[begin:end]
            data = self._answer.tokens(run, Tokens(event.index + begin, event.ids[begin:end], logprobs))
            self._count(run, run.num_tokens - before)
            await self._write(data)
            if run.is_complete:
                return

    def _count(self, run: Run, num_tokens: int) -> None:
        now_s = time.monotonic()
        if run.has_begun.is_set():
            self._metrics.record_token_generation(num_tokens, (now_s - run.last_token_s) * 1e3)
        else:
            run.has_begun.set()
            run.first_token_ms = run.elapsed_ms()
            self._metrics.record_first_token_latency(self._exchange.age_ms())
            self._metrics.record_token_generation(num_tokens, None)
        run.last_token_s = now_s

    async def _end(self, run: Run, reason: StopReason, decode_ms: float) -> None:
        rest = run.text.finish()
        run.stop_reason = "stop_sequence" if run.text.matched is not None else reason
        run.decode_ms = decode_ms
        data = self._answer.ended(run, rest)
        self._num_open -= 1
        if self._num_open:
            await self._write(data)
        else:
            self._last = data

    async def _write(self, data: bytes) -> None:
        if data:
            await self._stream.write(data)

    async def _watch(self, job: Job, receive: Receive) -> None:
        """Keep a quiet stream alive, send pulses, and end the job when the client goes away."""
        wait_s = ACCEPT_S
        while True:
            try:
                async with asyncio.timeout(wait_s):
                    while (await receive())["type"] != "http.disconnect":
                        pass
            except TimeoutError:
                wait_s = await self._tick(job)
            else:
                return job.interrupt(self._departure())

    async def _tick(self, job: Job) -> float:
        """Write what is due; returns the seconds until something may be due again."""
        if not self._answer.is_streamed:
            return KEEP_ALIVE_S
        if not self._stream.is_open or self._stream.quiet_s() >= KEEP_ALIVE_S:
            await self._stream.write(KEEP_ALIVE)
        pulse_s = self._answer.pulse_s
        if pulse_s is None:
            return max(KEEP_ALIVE_S - self._stream.quiet_s(), 0.01)
        is_over = job.is_settled or job.error is not None
        if not is_over and self._told_s is not None and time.monotonic() - self._told_s >= pulse_s / 2:
            self._told_s = time.monotonic()
            await self._stream.write(self._answer.pulse())
        return pulse_s

    def _departure(self) -> WorkerError:
        """Why the client takes no more; counts the one that has left by itself."""
        if self._exchange.is_stalled:
            return SlowClient("the client read too slowly")
        self._metrics.record_client_disconnect()
        return Cancelled("the client is gone")


class _Told(Exception):
    """The engine itself has said that a run failed."""

    def __init__(self, event: Failed) -> None:
        super().__init__(event.code)
        self.error = error_of(event.code, event.message, {})
        self.error.retriable = event.retriable  # type: ignore[misc]
