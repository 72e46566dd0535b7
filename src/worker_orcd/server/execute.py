"""`POST /execute`: prepares a body, runs it and narrates how it went."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from starlette.requests import Request as HttpRequest
from starlette.types import Receive, Scope, Send

from worker_orcd.engine.metrics import MetricsHook, Outcome
from worker_orcd.engine.request import InferenceEngine
from worker_orcd.errors import InferenceTimeout
from worker_orcd.narration import Narrator
from worker_orcd.server.body import read_body
from worker_orcd.server.control import Control
from worker_orcd.server.exchange import Exchange
from worker_orcd.server.generation import Generation
from worker_orcd.server.prepare import Prepared, Preparer
from worker_orcd.server.sse import EventStream
from worker_orcd.tokenizer.stream import TextStream

if TYPE_CHECKING:
    from worker_orcd.tokenizer.base import Tokenizer

_OUTCOMES: dict[str | None, Outcome] = {
    None: "success",
    "CANCELLED": "cancelled",
    "SLOW_CLIENT": "cancelled",
    "INFERENCE_TIMEOUT": "timeout",
}


class Execute:
    """The ASGI endpoint of `/execute`."""

    def __init__(
        self,
        engine: InferenceEngine,
        tokenizer: Tokenizer,
        preparer: Preparer,
        control: Control,
        narrator: Narrator,
        metrics: MetricsHook,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._preparer = preparer
        self._control = control
        self._narrator = narrator
        self._metrics = metrics
        self._thread = ThreadPoolExecutor(1, "prepare")
        self._num_preparing = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope["state"]["exchange"]
        remaining_s = exchange.remaining_s()
        if remaining_s is not None and remaining_s <= 0:
            raise InferenceTimeout("X-Deadline has already passed")
        raw = await read_body(HttpRequest(scope, receive))
        self._control.check_open()
        self._engine.check_room(self._num_preparing)
        prepared = await self._prepare(raw, exchange)
        with self._control.open(prepared.request.id, exchange.remaining_s()) as job:
            text, stream = TextStream(self._tokenizer, prepared.stop), EventStream(send)
            generation = Generation(self._engine, prepared, text, stream, exchange, self._metrics)
            self._narrate_start(prepared, exchange)
            try:
                await generation.serve(job, receive)
            finally:
                outcome = _OUTCOMES.get(generation.tally.code, "error")
                self._narrate_end(generation, prepared, exchange, outcome)
                if stream.is_open:  # else it is answered, and counted, as a refusal
                    tokens_in = len(prepared.request.prompt_ids)
                    self._metrics.record_inference_complete(outcome, exchange.age_ms(), tokens_in)

    async def _prepare(self, raw: bytes, exchange: Exchange) -> Prepared:
        """Long work goes to the one thread for it: several would take turns with the event loop, at its cost."""
        if self._preparer.is_quick(raw):
            return self._preparer.prepare(raw, exchange.remaining_s())
        self._num_preparing += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, self._prepare_if_open, raw, exchange)
        finally:
            self._num_preparing -= 1

    def _prepare_if_open(self, raw: bytes, exchange: Exchange) -> Prepared:
        self._control.check_open()  # it may have waited; at the end nobody waits for it any more
        return self._preparer.prepare(raw, exchange.remaining_s())

    def _narrate_start(self, prepared: Prepared, exchange: Exchange) -> None:
        request = prepared.request
        self._narrator.narrate(
            "execute_start",
            f"took a job of {len(request.prompt_ids)} prompt tokens",
            component="server",
            action="accept",
            target=request.id,
            job_id=request.id,
            correlation_id=exchange.correlation_id,
            tokens_in=len(request.prompt_ids),
            max_tokens=request.max_tokens,
            prompt_chars=prepared.num_prompt_chars,
            prompt_sha256=prepared.prompt_sha256,
        )

    def _narrate_end(self, generation: Generation, prepared: Prepared, exchange: Exchange, outcome: Outcome) -> None:
        request, tally = prepared.request, generation.tally
        self._narrator.narrate(
            "execute_end",
            f"ended a job after {tally.num_tokens} tokens: {tally.stop_reason or tally.code}",
            level="warn" if outcome == "error" else "info",
            component="server",
            action="finish",
            target=request.id,
            job_id=request.id,
            correlation_id=exchange.correlation_id,
            outcome=outcome,
            code=tally.code,
            reason=tally.cause,
            stop_reason=tally.stop_reason,
            tokens_in=len(request.prompt_ids),
            tokens_out=tally.num_tokens,
            first_token_ms=tally.first_token_ms,
            decode_time_ms=tally.decode_ms,
        )
