"""The way of every generation through the edge, whatever its dialect: body, room, preparing, running, narrating."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.types import Receive, Scope, Send

from worker_orcd.engine.metrics import MetricsHook, Outcome
from worker_orcd.engine.request import InferenceEngine
from worker_orcd.errors import InferenceTimeout
from worker_orcd.narration import Narrator
from worker_orcd.server.body import read_body
from worker_orcd.server.control import Control
from worker_orcd.server.exchange import Exchange
from worker_orcd.server.generation import Answer, Generation
from worker_orcd.server.grammar_check import GrammarChecker
from worker_orcd.server.passport import Passports
from worker_orcd.server.sse import EventStream

T = TypeVar("T")
Prepare = Callable[[bytes, Exchange], T]  # a body becomes what was asked for; blocking, raises WorkerError

_OUTCOMES: dict[str | None, Outcome] = {
    None: "success",
    "CANCELLED": "cancelled",
    "SLOW_CLIENT": "cancelled",
    "INFERENCE_TIMEOUT": "timeout",
}


class Pipeline:
    """What the endpoints that generate share."""

    def __init__(self, engine: InferenceEngine, control: Control, narrator: Narrator, metrics: MetricsHook) -> None:
        self.passports = Passports()
        engine.on_freed = self.passports.account
        self._engine = engine
        self._control = control
        self._narrator = narrator
        self._metrics = metrics
        self._thread = ThreadPoolExecutor(1, "prepare")
        self._num_preparing = 0
        self._grammars = GrammarChecker()

    async def prepare(self, request: HttpRequest, prepare: Prepare[T], is_quick: Callable[[bytes], bool]) -> T:
        """What `prepare` makes of the body.

        Long work goes to the one thread for it: several would take turns with the event loop, at its cost. Raises
        InferenceTimeout when the request's time is over, ClientDisconnect when the client does not wait for it.
        """
        exchange: Exchange = request.scope["state"]["exchange"]
        remaining_s = exchange.remaining_s()
        if remaining_s is not None and remaining_s <= 0:
            raise InferenceTimeout("X-Deadline has already passed")
        raw = await read_body(request)
        self._control.check_open()
        self._engine.check_room(self._num_preparing)
        if is_quick(raw):
            return prepare(raw, exchange)
        self._num_preparing += 1
        try:
            return await self.work(request, prepare, raw)
        finally:
            self._num_preparing -= 1

    async def work(self, request: HttpRequest, prepare: Prepare[T], raw: bytes) -> T:
        """What `prepare` makes of `raw`, on the thread."""
        loop, exchange = asyncio.get_running_loop(), request.scope["state"]["exchange"]
        work = loop.run_in_executor(self._thread, self._prepare_if_open, prepare, raw, exchange)
        return await self._while_wanted(work, request.receive, exchange.remaining_s())

    def _prepare_if_open(self, prepare: Prepare[T], raw: bytes, exchange: Exchange) -> T:
        self._control.check_open()  # it may have waited; at the end nobody waits for it any more
        return prepare(raw, exchange)

    async def check_grammar(self, answer: Answer, receive: Receive) -> None:
        """Have the grammar of `answer` tried out, if it has one, within the time of its request."""
        request = answer.runs[0].request
        if request.grammar is not None:
            check = self._grammars.check(request.grammar, answer.grammar_param)
            await self._while_wanted(asyncio.ensure_future(check), receive, request.timeout_s)

    async def _while_wanted(self, work: asyncio.Future[T], receive: Receive, remaining_s: float | None) -> T:
        """What `work` comes to. It is cancelled, and skipped by a queue, when nobody waits for it any more."""
        departure = asyncio.ensure_future(_departure(receive))
        waits = (work, departure, self._control.end())
        try:
            done, _ = await asyncio.wait(waits, timeout=remaining_s, return_when=asyncio.FIRST_COMPLETED)
            if work in done:
                return work.result()
            if departure in done:
                self._metrics.record_client_disconnect()
                raise ClientDisconnect
            self._control.check_open()
            raise InferenceTimeout("the time for this job passed before it was begun")
        finally:
            for wait in waits:
                wait.cancel()

    async def generate(self, answer: Answer, exchange: Exchange, receive: Receive, send: Send) -> None:
        """Run `answer` to its end, however it ends."""
        remaining_s = exchange.remaining_s()
        if len(answer.runs) > 1:  # the engine measures the time of a run from when it gets it
            timeout_s = max(0.0, answer.runs[0].request.timeout_s)
            remaining_s = timeout_s if remaining_s is None else min(timeout_s, remaining_s)
        with self._control.open(answer.job_id, remaining_s, exchange.tenant or "") as job:
            stream = EventStream(send)
            generation = Generation(self._engine, answer, stream, exchange, self._metrics)
            self._narrate_start(answer, exchange)
            self.passports.open(answer, exchange)
            try:
                await generation.serve(job, receive)
            finally:
                outcome = _OUTCOMES.get(generation.code, "error")
                self.passports.close(answer, exchange, generation.code)
                self._narrate_end(generation, answer, exchange, outcome)
                if stream.is_open or any(run.started_s is not None for run in answer.runs):  # else it is a refusal
                    self._metrics.record_inference_complete(outcome, exchange.age_ms(), tokens_in(answer))

    def _narrate_start(self, answer: Answer, exchange: Exchange) -> None:
        num_tokens = tokens_in(answer)
        self._narrator.narrate(
            "execute_start",
            f"took a job of {num_tokens} prompt tokens",
            component="server",
            action="accept",
            target=answer.job_id,
            job_id=answer.job_id,
            correlation_id=exchange.correlation_id,
            tokens_in=num_tokens,
            max_tokens=answer.runs[0].request.max_tokens,
            prompt_chars=answer.num_prompt_chars,
            prompt_sha256=answer.prompt_sha256,
        )

    def _narrate_end(self, generation: Generation, answer: Answer, exchange: Exchange, outcome: Outcome) -> None:
        first = answer.runs[0]
        num_tokens = sum(run.num_tokens for run in answer.runs)
        self._narrator.narrate(
            "execute_end",
            f"ended a job after {num_tokens} tokens: {generation.code or first.stop_reason}",
            level="warn" if outcome == "error" else "info",
            component="server",
            action="finish",
            target=answer.job_id,
            job_id=answer.job_id,
            correlation_id=exchange.correlation_id,
            outcome=outcome,
            code=generation.code,
            reason=generation.cause,
            stop_reason=None if generation.code else first.stop_reason,
            tokens_in=tokens_in(answer),
            tokens_out=num_tokens,
            first_token_ms=first.first_token_ms,
            decode_time_ms=first.decode_ms,
        )


async def _departure(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def tokens_in(answer: Answer) -> int:
    """Prompt tokens, each prompt counted once."""
    return sum(len(run.request.prompt_ids) for run in answer.runs if run.leader is None)


class Endpoint:
    """An ASGI endpoint that prepares a body and generates its answer."""

    def __init__(
        self, pipeline: Pipeline, prepare: Prepare[Answer], is_quick: Callable[[bytes], bool] = lambda _: False
    ) -> None:
        self._pipeline, self._prepare, self._is_quick = pipeline, prepare, is_quick

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = await self._pipeline.prepare(HttpRequest(scope, receive), self._prepare, self._is_quick)
        await self._pipeline.check_grammar(answer, receive)
        await self._pipeline.generate(answer, scope["state"]["exchange"], receive, send)
