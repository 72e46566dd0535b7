"""EngineCore: the engine itself, one `tick` at a time, single-threaded, without a queue, a socket or a log.

A tick expires deadlines, plans a step, launches it, and reads the results of the step before (or, where the device
does not run beside us, of this one). Everything that happened to anyone comes back as one Output.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path

import msgspec

from worker_orcd.engine.grammar import GrammarCompiler, Matcher
from worker_orcd.engine.request import (
    Event,
    Failed,
    Finished,
    PromptLogprobs,
    Request,
    Started,
    StepStats,
    StopReason,
    Timings,
    TokenLogprob,
    Tokens,
)
from worker_orcd.engine.scheduler import Scheduler, SchedulerLimits
from worker_orcd.engine.sequence import Chunk, Plan, Sequence
from worker_orcd.engine.step import InferenceStep, Launched, Result, Scored
from worker_orcd.errors import (
    Cancelled,
    CudaError,
    GrammarError,
    InferenceTimeout,
    Internal,
    InvalidRequest,
    WorkerError,
)
from worker_orcd.kv.prefix import PrefixChain, root_key

NEVER = float("inf")
COMPILE_S = 20.0  # a grammar that takes longer ends its request
COMPILE_WAIT_S = 0.005  # with nothing else to do, an engine looks this often whether a grammar is ready


class Output(msgspec.Struct, frozen=True, array_like=True):
    """What one tick has to say: events by request number, in order, and the step it ran."""

    events: list[tuple[int, Event]]
    stats: StepStats | None  # of no rows when nothing was computed; None when only the idle cache was looked at
    drift: str = ""  # the cache no longer adds up: how


@dataclass
class Done:
    """Results of chunks that were computed one by one."""

    plan: Plan
    results: list[Result]

    def wait(self) -> list[Result]:
        return self.results


class EngineCore:
    """`cache_scope` names everything but the tenant that cached keys and values depend on; `clock` gives seconds."""

    def __init__(
        self,
        step: InferenceStep,
        limits: SchedulerLimits,
        eog_ids: frozenset[int],
        cache_scope: dict[str, str],
        clock: Callable[[], float] = time.monotonic,
        compiler: GrammarCompiler | None = None,
    ) -> None:
        self._step, self._eog_ids, self._compiler = step, eog_ids, compiler
        self._cache_scope, self._clock = cache_scope, clock
        self._scheduler = Scheduler(step, limits)
        self._sequences: dict[int, Sequence] = {}  # compiling, waiting or running, by number
        self._compiling: dict[Sequence, tuple[Future[Matcher], float]] = {}  # since when; not with the scheduler yet
        self._in_flight: Launched | None = None
        self._events: list[tuple[int, Event]] = []
        self._next_deadline = NEVER
        self._evicted_before = self._preempted_before = 0

    @property
    def has_work(self) -> bool:
        return bool(self._sequences) or self._in_flight is not None or bool(self._events)

    def submit(self, number: int, request: Request, arrived_s: float | None = None) -> None:
        """Queue a request under a number larger than all before; what cannot ever fit fails at once.

        `arrived_s` is by our clock, which may be before the step that has just ended; now when left out.
        """
        root = root_key(**self._cache_scope, tenant=request.tenant)
        arrived_s = self._clock() if arrived_s is None else arrived_s
        seq = Sequence.of(request, number, PrefixChain(root, self._step.block_size), arrived_s)
        seq.end_ids = self._eog_ids.union(request.stop_ids)
        if (problem := self._misfit(seq)) is not None:
            self._events.append((number, Failed(InvalidRequest.code, problem, retriable=False)))
            return
        self._sequences[number] = seq
        self._next_deadline = min(self._next_deadline, seq.arrived_s + request.timeout_s)
        if request.grammar is not None and self._compiler is not None:
            self._compiling[seq] = self._compiler.compile(request.grammar), self._clock()
        else:
            self._scheduler.add(seq)

    def _misfit(self, seq: Sequence) -> str | None:
        if seq.request.grammar is not None and self._compiler is None:
            return "response_format: this engine follows no grammars"
        if seq.request.max_tokens == 0 and not seq.request.prompt_logprobs:
            return "max_tokens is 0; without prompt logprobs there is nothing to do"
        return self._scheduler.misfit(seq)

    def cancel(self, number: int) -> None:
        """End a request now; one that is unknown or over is left as it is."""
        if (seq := self._sequences.get(number)) is not None:
            self._fail(seq, Cancelled("the request was cancelled"))

    def fail_all(self, error: WorkerError) -> None:
        """End everyone; nothing is computed any more."""
        for seq in list(self._sequences.values()):
            self._fail(seq, error)

    def drop_cache(self) -> None:
        self._step.drop_cache()

    def check(self) -> str:
        """What does not add up now that nobody runs; empty when all is well."""
        assert not self.has_work
        try:
            self._step.check()
        except AssertionError as error:
            return f"the KV cache does not add up: {error}"
        used = self._step.usage()[0]
        return f"{used} blocks of the KV cache are lost: nobody runs" if used else ""

    @property
    def warning(self) -> str:
        """As InferenceStep has it."""
        return self._step.warning

    def tick(self) -> Output:
        """One turn. Raises CudaError when the device is lost, and then nothing can be computed any more."""
        began = self._clock()
        if began >= self._next_deadline:
            self._expire(began)
        if self._compiling:
            self._queue_compiled()
        if self._in_flight is not None and (self._scheduler.is_tight() or self._is_token_needed()):
            self._settle()  # someone may have to yield, and yields only what nobody is writing to
        plan, admitted = self._scheduler.plan()
        admitted = [seq for seq in admitted if seq.started_s is None]  # the others resume
        for seq in admitted:
            self._begin(seq)
        launched = self._launch(plan) if plan else None
        if self._in_flight is not None:
            self._settle()
        self._in_flight = launched
        if isinstance(launched, Done) or (launched is not None and not self._step.overlaps):
            self._settle()  # of what was Done one by one, the device keeps only the last token: the rest is read here
        stats = self._stats(plan, admitted, self._clock() - began)
        events, self._events = self._events, []
        return Output(events, stats)

    def _queue_compiled(self) -> None:
        """Hand the sequences over whose grammar is ready; end those that get none."""
        if self._in_flight is None and not (self._scheduler.running or self._scheduler.waiting or self._events):
            wait([future for future, _ in self._compiling.values()], COMPILE_WAIT_S, FIRST_COMPLETED)
        for seq, (future, began_s) in list(self._compiling.items()):
            if not future.done():
                if self._clock() - began_s > COMPILE_S:
                    self._fail(seq, GrammarError(f"response_format: not compiled within {COMPILE_S:g} s"))
                continue
            try:
                seq.matcher = future.result()
            except Exception as error:
                self._fail(seq, blame(error))
            else:
                del self._compiling[seq]
                self._scheduler.add(seq)

    def _is_token_needed(self) -> bool:
        """Whether someone cannot go on before the host knows what the step in flight has sampled."""
        return any(seq.needs_last_token and seq.num_unknown for seq in self._scheduler.running)

    def _begin(self, seq: Sequence) -> None:
        seq.started_s = self._clock()
        self._events.append((seq.number, Started(seq.num_cached, seq.started_s)))

    # ------------------------------------------------------------------ computing

    def _launch(self, plan: Plan) -> Launched:
        """Start the step. One that fails is repeated sequence by sequence, so that only the culprit ends."""
        launched: Launched
        try:
            launched = self._step.launch(plan)
        except CudaError:
            raise
        except Exception as error:
            launched = Done(plan, [blame(error)]) if len(plan) == 1 else self._one_by_one(plan)
        for chunk in launched.plan:
            seq = chunk.sequence
            seq.num_computed += chunk.num_tokens
            seq.num_unknown += chunk.samples
            seq.num_in_flight += 1
            seq.num_steps += 1
            if chunk.first < seq.num_prompt:
                seq.num_chunks += 1
        return launched

    def _one_by_one(self, plan: Plan) -> Launched:
        """The same chunks with the same bits: neighbours never mattered."""
        if self._in_flight is not None:
            self._settle()  # the tokens of the step before become known, and may end some of these
        plan = [chunk for chunk in plan if not chunk.sequence.has_ended]
        results: list[Result] = []
        for chunk in plan:
            try:
                results += self._step.launch([chunk]).wait()
            except CudaError:
                raise
            except Exception as error:
                results.append(blame(error))
        return Done(plan, results)

    def _settle(self) -> None:
        """Read the results of the step in flight and act on them."""
        launched, self._in_flight = self._in_flight, None
        assert launched is not None
        try:
            results = launched.wait()
        except CudaError:
            raise
        except Exception as error:
            results = [blame(error)] * len(launched.plan)
        for chunk, result in zip(launched.plan, results, strict=True):
            seq = chunk.sequence
            seq.num_unknown -= chunk.samples
            seq.num_in_flight -= 1
            if isinstance(result, WorkerError):
                self._step.distrust(seq)
            if seq.has_ended:
                self._release(seq)  # cancelled, or over, while this was computed
            elif isinstance(result, list):
                if result:
                    self._extend(seq, result)
            elif isinstance(result, Scored):
                self._score(seq, chunk, result)
            else:
                self._fail(seq, result)

    def _score(self, seq: Sequence, chunk: Chunk, result: Scored) -> None:
        """Tell what has become known of the prompt; then go on as with the others."""
        if chunk.scores and seq.is_scoring:
            known = [None, *result.prompt]  # from its first token on, of which only the chunk before knows
            if new := known[seq.num_scored - chunk.first :]:  # one that was preempted has begun again
                self._events.append((seq.number, PromptLogprobs(seq.num_scored, new)))
            seq.num_scored += len(new)
            seq.is_scoring = seq.num_scored < seq.num_prompt
        if result.tokens:
            self._extend(seq, result.tokens, result.logprobs)

    def _extend(self, seq: Sequence, new: list[int], logprobs: list[TokenLogprob] | None = None) -> None:
        """Append what was sampled, share what is now confirmed, and end the sequence where it ends."""
        before = len(seq.tokens)
        confirmed = before + len(new) - 1  # the newest one is not computed yet
        seq.num_computed += len(new) - 1
        try:
            reason = self._take(seq, new)
        except InvalidRequest as error:
            self._fail(seq, error)
            return
        if reason is not None:  # perhaps before the last of them
            new, confirmed = seq.tokens[before:], min(len(seq.tokens), confirmed)
        if new:
            if seq.first_token_s is None:
                seq.first_token_s = self._clock()
            known = logprobs and logprobs[: len(new)]
            self._events.append((seq.number, Tokens(before - seq.num_prompt, new, known)))
        self._step.confirm(seq, confirmed)
        if reason is not None:
            self._end(seq, Finished(reason, self._timings(seq)))

    def _take(self, seq: Sequence, new: list[int]) -> StopReason | None:
        """Move tokens over until one ends the answer; the end-of-generation token itself is not kept."""
        if seq.request.max_tokens == 0:
            return "max_tokens"
        for token in new:
            if token in seq.end_ids:
                return "eos"
            seq.tokens.append(token)
            if seq.matcher is not None and seq.matcher.advance(token):
                return "eos"
            if len(seq.tokens) >= seq.longest:
                is_complete = len(seq.tokens) >= seq.num_prompt + seq.request.max_tokens
                return "max_tokens" if is_complete else "context_length"
        return None

    # ------------------------------------------------------------------ ending

    def _expire(self, now: float) -> None:
        self._next_deadline = NEVER
        for seq in list(self._sequences.values()):
            deadline = seq.arrived_s + seq.request.timeout_s
            if now >= deadline:
                self._fail(seq, InferenceTimeout(f"the request took longer than its {seq.request.timeout_s:g} s"))
            else:
                self._next_deadline = min(self._next_deadline, deadline)

    def _fail(self, seq: Sequence, error: WorkerError) -> None:
        self._end(seq, Failed(error.code, error.message, error.retriable, self._timings(seq)))

    def _end(self, seq: Sequence, event: Event) -> None:
        """Nothing more is computed or said for it; its blocks are free now or, if being written, after this step."""
        del self._sequences[seq.number]
        if (compiling := self._compiling.pop(seq, None)) is not None:
            compiling[0].cancel()
        else:
            self._scheduler.remove(seq)
        seq.has_ended = True
        self._release(seq)
        self._events.append((seq.number, event))

    def _release(self, seq: Sequence) -> None:
        if seq.table is not None and seq.num_in_flight == 0:
            self._step.free(seq)

    def _timings(self, seq: Sequence) -> Timings:
        now = self._clock()
        started = now if seq.started_s is None else seq.started_s
        first = None if seq.first_token_s is None else (seq.first_token_s - started) * 1e3
        return Timings(
            queue_ms=(started - seq.arrived_s) * 1e3,
            first_token_ms=first,
            decode_ms=(now - started) * 1e3,
            total_ms=(now - seq.arrived_s) * 1e3,
            num_steps=seq.num_steps,
            num_chunks=seq.num_chunks,
            num_preempted=seq.num_preempted,
        )

    def _stats(self, plan: Plan, admitted: list[Sequence], seconds: float) -> StepStats:
        used, idle, evicted = self._step.usage()
        evicted_now, self._evicted_before = evicted - self._evicted_before, evicted
        preempted = self._scheduler.num_preempted
        preempted_now, self._preempted_before = preempted - self._preempted_before, preempted
        return StepStats(
            num_sequences=len(plan),
            num_rows=sum([chunk.num_tokens for chunk in plan]),
            num_sampled=sum([chunk.samples for chunk in plan]),
            step_ms=seconds * 1e3,
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting) + len(self._compiling),
            blocks_used=used,
            blocks_cached=idle,
            num_preempted=preempted_now,
            num_evicted=evicted_now,
            prompt_tokens=sum(seq.num_prompt for seq in admitted),
            cached_tokens=sum(seq.num_cached for seq in admitted),
        )


def blame(error: Exception) -> WorkerError:
    """What to tell the one whose computation raised `error`; its text might quote a prompt, so it is not shown."""
    if isinstance(error, WorkerError):
        return error
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return Internal(f"the engine failed: {type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}")
