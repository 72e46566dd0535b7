"""What goes into an engine and what comes out: the types both processes share. No torch here.

A `Request` is already tokenized and already within the limits; an engine answers it with `Started`, then
one `Token` per generated token with index 0, 1, 2 …, then exactly one `Finished` or `Failed`, then nothing.
Text, stop strings and framing belong to the edge (`server/`), which cancels a request when its text is
complete.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Literal, Protocol

import msgspec

StopReason = Literal["eos", "max_tokens", "context_length", "stop_sequence"]


class SamplingParams(msgspec.Struct, frozen=True):
    """How the next token is chosen; neutral values switch a filter off. Order: see engine/sampler.py."""

    seed: int  # 0 … 2^64 - 1; with (sample index, position) it alone decides every random draw
    temperature: float = 1.0  # 0 = argmax
    top_k: int = 0  # 0 = off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over generated tokens, each id once


class Request(msgspec.Struct, frozen=True):
    """One generation. `prompt_ids` is never empty and shorter than the context."""

    id: str
    prompt_ids: list[int]
    max_tokens: int
    sampling: SamplingParams
    timeout_s: float = 300.0  # from arrival, waiting included


class Started(msgspec.Struct, frozen=True, tag=True):
    """The request has left the queue."""


class Token(msgspec.Struct, frozen=True, tag=True):
    id: int
    index: int  # 0 for the first generated token


class Timings(msgspec.Struct, frozen=True):
    """Milliseconds on the engine's monotonic clock."""

    queue_ms: float
    first_token_ms: float | None  # from leaving the queue to the first token: prefill and one sample
    decode_ms: float  # from leaving the queue to the end
    total_ms: float  # from arrival to the end


class Finished(msgspec.Struct, frozen=True, tag=True):
    """The end-of-generation token itself is never emitted."""

    reason: StopReason
    timings: Timings


class Failed(msgspec.Struct, frozen=True, tag=True):
    """`code` is one of errors.py."""

    code: str
    message: str
    retriable: bool


Event = Started | Token | Finished | Failed


class ModelInfo(msgspec.Struct, frozen=True):
    """What is loaded; fixed for the life of the engine."""

    name: str
    path: str
    architecture: str
    quant_kind: str
    context_length: int  # tokens one sequence may hold, prompt and answer together
    vocab_size: int  # rows of the head: the range of a token id
    device: str  # "cpu", "cuda:0"
    backend: str


class EngineStatus(msgspec.Struct, frozen=True):
    """A snapshot that costs nothing to take: no device call, no lock."""

    healthy: bool
    resident: bool
    vram_bytes_used: int
    num_running: int
    num_waiting: int
    retry_after_s: int  # when a newcomer refused now should try again, from the backlog


class InferenceEngine(Protocol):
    """The seam between the HTTP edge and inference."""

    info: ModelInfo

    def run(self, request: Request) -> AsyncGenerator[Event, None]:
        """Queue `request` and yield its events.

        Raises Overloaded when the queue is full, ShuttingDown when closing, JobConflict when `request.id` is
        still running. Closing the iterator early cancels the request: everything it holds is freed within
        one step.
        """
        ...

    def cancel(self, request_id: str) -> bool:
        """End a request with Failed(CANCELLED); False when no such request is queued or running."""
        ...

    def status(self) -> EngineStatus: ...

    def close(self) -> None:
        """Stop at the next step and free everything; what still runs ends with Failed. Idempotent."""
        ...
