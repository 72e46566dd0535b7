"""What goes into an engine and what comes out: the types both processes share. No torch here.

A `Request` is already tokenized and already within the limits; an engine answers it with `Started`, then
`Tokens` whose ids carry the indices 0, 1, 2 … without a gap, then exactly one `Finished` or `Failed`, then
nothing. Text, stop strings and framing belong to the edge (`server/`), which cancels a request when its text
is complete.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Literal, Protocol

import msgspec

from worker_orcd.errors import WorkerError

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
    priority: int = 0  # smaller goes first, under the policy "priority"
    tenant: str = ""  # who may share its cached prefixes; comes from the credential, never from the body


class Started(msgspec.Struct, frozen=True, tag=True):
    """The request has left the queue."""

    cached_tokens: int = 0  # of the prompt, found in the prefix cache


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """Generated tokens, all that were ready: one in most steps, several when the reader fell behind."""

    index: int  # of the first one; 0 for the first of the answer
    ids: list[int]


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


Event = Started | Tokens | Finished | Failed


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


class StepStats(msgspec.Struct, frozen=True, array_like=True):
    """One step, and the state it left; counts of this step unless said otherwise."""

    num_sequences: int
    num_rows: int  # tokens computed
    num_sampled: int
    step_ms: float  # from plan to results
    num_running: int  # state
    num_waiting: int  # state
    blocks_used: int  # state: held by sequences
    blocks_cached: int  # state: held by the prefix cache alone
    num_preempted: int
    num_evicted: int  # cached blocks given up
    prompt_tokens: int  # of sequences admitted
    cached_tokens: int  # of those, found in the prefix cache


class EngineStatus(msgspec.Struct, frozen=True):
    """A snapshot that costs nothing to take: no device call, no lock."""

    healthy: bool  # False after VRAM_OOM or INTERNAL until a request succeeds, and once the engine has failed
    ready: bool  # work moves forward and the cache adds up; False is a reason to send traffic elsewhere
    reason: str  # why not ready; empty when ready
    resident: bool
    vram_bytes_used: int
    num_running: int
    num_waiting: int
    blocks_total: int
    blocks_used: int
    blocks_cached: int
    retry_after_s: int  # when a newcomer refused now should try again, from the backlog


class InferenceEngine(Protocol):
    """The seam between the HTTP edge and inference."""

    info: ModelInfo

    def run(self, request: Request) -> AsyncGenerator[Event, None]:
        """Queue `request` and yield its events.

        Raises Overloaded when the queue is full, ShuttingDown when closing or failed, JobConflict when
        `request.id` is still running. Closing the iterator early cancels the request: everything it holds is
        freed within one step.
        """
        ...

    def check_room(self, num_coming: int = 0) -> None:
        """Raise Overloaded or ShuttingDown if a request sent after `num_coming` others would be refused.

        Saves preparing it.
        """
        ...

    def cancel(self, request_id: str) -> bool:
        """End a request with Failed(CANCELLED); False when no such request is queued or running."""
        ...

    def status(self) -> EngineStatus: ...

    async def watch(self) -> WorkerError:
        """Return the reason when the engine has failed for good; every stream has had its error by then."""
        ...

    def close(self) -> None:
        """Stop at the next step and free everything; what still runs ends with Failed. Idempotent."""
        ...
