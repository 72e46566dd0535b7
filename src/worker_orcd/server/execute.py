"""The dialect of `POST /execute`: started, one event a token, metrics on request, then end or error."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from worker_orcd.engine.request import InferenceEngine, Tokens
from worker_orcd.errors import WorkerError
from worker_orcd.narration import rfc3339
from worker_orcd.server.exchange import Exchange
from worker_orcd.server.generation import Answer, Run
from worker_orcd.server.prepare import Prepared, Preparer
from worker_orcd.server.receipt import receipt_of
from worker_orcd.server.sse import EndEvent, ErrorEvent, MetricsEvent, StartedEvent, frame, token_frame
from worker_orcd.tokenizer.stream import TextStream

if TYPE_CHECKING:
    from worker_orcd.tokenizer.base import Tokenizer

METRICS_S = 0.5


class Execute:
    """Makes answers from bodies."""

    def __init__(self, engine: InferenceEngine, tokenizer: Tokenizer, preparer: Preparer) -> None:
        self._engine, self._tokenizer, self._preparer = engine, tokenizer, preparer

    def prepare(self, raw: bytes, exchange: Exchange) -> ExecuteAnswer:
        """Raises InvalidRequest naming every bad field."""
        prepared = self._preparer.prepare(raw, exchange.remaining_s(), exchange.tenant or "")
        run = Run(prepared.request, TextStream(self._tokenizer, prepared.stop))
        return ExecuteAnswer(self._engine, prepared, run, exchange.wants_full_receipt)


class ExecuteAnswer(Answer):
    """A stream that begins with `started`, even when it ends in the queue."""

    opens_for_failures = True

    def __init__(self, engine: InferenceEngine, prepared: Prepared, run: Run, wants_full_receipt: bool) -> None:
        super().__init__(prepared.request.id, [run], prepared.num_prompt_chars, prepared.prompt_sha256)
        self._engine, self._run, self._rest = engine, run, ""
        self._wants_full_receipt = wants_full_receipt
        if prepared.wants_metrics:
            self.pulse_s = METRICS_S

    def started(self, run: Run) -> bytes:
        started = StartedEvent(
            job_id=self.job_id,
            model=self._engine.info.name,
            started_at=rfc3339(datetime.now(UTC)),
            seed=run.request.sampling.seed,
            prompt_tokens=len(run.request.prompt_ids),
            cached_tokens=run.cached_tokens,
        )
        return frame("started", started)

    def tokens(self, run: Run, event: Tokens) -> bytes:
        frames = []
        for i, token_id in enumerate(event.ids, event.index):
            frames.append(token_frame(run.push(token_id), i, token_id))
            if run.is_complete:
                break
        return b"".join(frames)

    def ended(self, run: Run, rest: str) -> bytes:  # noqa: ARG002 - its event is the last one
        self._rest = rest
        return b""

    def closing(self) -> bytes:
        run = self._run
        assert run.stop_reason is not None
        assert run.decode_ms is not None
        end = EndEvent(
            tokens_out=run.num_tokens,
            decode_time_ms=run.decode_ms,
            stop_reason=run.stop_reason,
            seed=run.request.sampling.seed,
            cached_tokens=run.cached_tokens,
            stop_sequence_matched=run.text.matched,
            t=self._rest,
            receipt=receipt_of(run, self._engine.info, self._wants_full_receipt),
        )
        return self._opening() + frame("end", end)

    def failed(self, error: WorkerError) -> bytes:
        return self._opening() + frame("error", ErrorEvent(error.code, error.message, error.retriable))

    def pulse(self) -> bytes:
        status, num_tokens, elapsed_ms = self._engine.status(), self._run.num_tokens, self._run.elapsed_ms()
        metrics = MetricsEvent(
            job_id=self.job_id,
            tokens_out=num_tokens,
            decode_time_ms=elapsed_ms,
            tokens_per_second=round(num_tokens * 1e3 / max(elapsed_ms, 1e-3), 3),
            vram_bytes=status.vram_bytes_used,
            num_running=status.num_running,
            num_waiting=status.num_waiting,
        )
        return frame("metrics", metrics)

    def _opening(self) -> bytes:
        return self.started(self._run) if self._run.started_s is None else b""
