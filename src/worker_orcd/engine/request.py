"""What goes into an engine and what comes out: the types both processes share. No torch here.

A `Request` is already tokenized and already within the limits; an engine answers it with `Started`, then
`Tokens` whose ids carry the indices 0, 1, 2 … without a gap, then exactly one `Finished` or `Failed`, then
nothing. Text, stop strings and framing belong to the edge (`server/`), which cancels a request when its text
is complete.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Literal, Protocol

import msgspec

from worker_orcd.errors import WorkerError

StopReason = Literal["eos", "max_tokens", "context_length", "stop_sequence"]


# The filters by the names that `SamplingParams.order` may use, in the order they apply by default.
SAMPLER_ORDER = ("penalties", "dry", "temperature", "top_k", "typical_p", "top_p", "min_p", "xtc")


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the next token is chosen; neutral values switch a filter off. Order: see engine/sampler.py."""

    seed: int  # 0 … 2^64 - 1; with (sample index, position) it alone decides every random draw
    temperature: float = 1.0  # 0 = argmax
    top_k: int = 0  # 0 = off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over generated tokens, each id once
    presence_penalty: float = 0.0  # subtracted from the logit of every generated id, once
    frequency_penalty: float = 0.0  # subtracted once for every time the id was generated
    typical_p: float = 1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_breaker_ids: list[int] = []  # a repeated run never reaches across one of these
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    mirostat_tau: float = 0.0  # target surprise in bits; 0 = off, else mirostat 2 replaces the truncating filters
    mirostat_eta: float = 0.1
    logit_bias: dict[int, float] = {}
    order: tuple[str, ...] = ()  # of SAMPLER_ORDER: these filters alone, in this order; empty = all of them
    sample_index: int = 0  # which of the `n` answers of one request this is


class Grammar(msgspec.Struct, frozen=True):
    """What the answer must look like; checked for cost before it gets here."""

    kind: Literal["json_object", "json_schema", "regex", "lark"]
    text: str = ""


class Request(msgspec.Struct, frozen=True):
    """One generation. `prompt_ids` is never empty and shorter than the context."""

    id: str
    prompt_ids: list[int]
    max_tokens: int
    sampling: SamplingParams
    timeout_s: float = 300.0  # from arrival, waiting included
    priority: int = 0  # smaller goes first, under the policy "priority"
    tenant: str = ""  # who may share its cached prefixes; comes from the credential, never from the body
    min_tokens: int = 0  # end-of-generation ids cannot be drawn before
    ignore_eos: bool = False  # end-of-generation ids cannot be drawn at all
    stop_ids: list[int] = []  # further ids that end the answer, like an end of generation
    num_logprobs: int | None = None  # most probable ids to report beside each token's own; None = report nothing
    prompt_logprobs: bool = False  # also for every token of the prompt; such a request reads no cached prefix
    grammar: Grammar | None = None


class Started(msgspec.Struct, frozen=True, tag=True):
    """The request has left the queue. Told with the results of its first step, so it says itself when that was."""

    cached_tokens: int = 0  # of the prompt, found in the prefix cache
    started_s: float | None = None  # on the monotonic clock, which all processes of a machine share


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural logarithms of probabilities of the model's own distribution, before any filter or penalty."""

    logprob: float
    top: list[tuple[int, float]]  # the most probable ids, falling


class PromptLogprobs(msgspec.Struct, frozen=True, tag=True):
    """After Started, before Tokens, when asked for: of prompt tokens from `index` on; several make up the prompt."""

    index: int
    tokens: list[TokenLogprob | None]  # None: of the prompt's first, which has nothing before it


class Tokens(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Generated tokens, all that were ready: one in most steps, several when the reader fell behind."""

    index: int  # of the first one; 0 for the first of the answer
    ids: list[int]
    logprobs: list[TokenLogprob] | None = None  # one for each id, when asked for


class Timings(msgspec.Struct, frozen=True):
    """What a request took. Milliseconds on the engine's monotonic clock."""

    queue_ms: float
    first_token_ms: float | None  # from leaving the queue to the first token: prefill and one sample
    decode_ms: float  # from leaving the queue to the end
    total_ms: float  # from arrival to the end
    num_steps: int = 0  # it took part in
    num_chunks: int = 0  # of those, steps that computed tokens of its prompt
    num_preempted: int = 0  # times it gave up its blocks to older ones


class Finished(msgspec.Struct, frozen=True, tag=True):
    """The end-of-generation token itself is never emitted."""

    reason: StopReason
    timings: Timings


class Failed(msgspec.Struct, frozen=True, tag=True):
    """`code` is one of errors.py."""

    code: str
    message: str
    retriable: bool
    timings: Timings | None = None  # None for one that never was in the engine


Event = Started | PromptLogprobs | Tokens | Finished | Failed


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
    fingerprint: str = ""  # of the file: gguf/fingerprint.py
    kernels: str = ""  # name and version of what computes: with the same ones the same request gives the same ids


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
    memory: dict[str, int] = {}  # bytes set aside at start, by purpose


OnFreed = Callable[[Request, Timings], None]


class InferenceEngine(Protocol):
    """The seam between the HTTP edge and inference."""

    info: ModelInfo
    on_freed: OnFreed  # called when all that a request held is free, which may be after its stream has ended

    def run(self, request: Request) -> AsyncGenerator[Event, None]:
        """Queue `request` and yield its events.

        Raises Overloaded when the queue is full, ShuttingDown when closing or failed, JobConflict when
        `request.id` of this tenant is still running. Closing the iterator early cancels the request: everything it
        holds is freed within one step.
        """
        ...

    def check_room(self, num_coming: int = 0) -> None:
        """Raise Overloaded or ShuttingDown if a request sent after `num_coming` others would be refused.

        Saves preparing it.
        """
        ...

    def cancel(self, request_id: str, tenant: str = "") -> bool:
        """End a request with Failed(CANCELLED); False when the tenant has no such request queued or running."""
        ...

    def status(self) -> EngineStatus: ...

    async def watch(self) -> WorkerError:
        """Return the reason when the engine has failed for good; every stream has had its error by then."""
        ...

    def close(self) -> None:
        """Stop at the next step and free everything; what still runs ends with Failed. Idempotent."""
        ...
