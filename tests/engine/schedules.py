"""Random schedules on a real model, each sampled row compared with the same request computed alone.

`Bench` holds the model, a pool of requests, and for each the tokens and logits of a run alone: a cache of its own,
the whole prompt in one step. `Bench.run` draws up a schedule from a seed (limits, cache, arrivals, cancels) and
collects whatever differs by a single bit.
"""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tests.fakes import ByteTokenizer
from worker_orcd.backends.batch import Batch, LayerKV
from worker_orcd.engine.core import EngineCore
from worker_orcd.engine.grammar import GrammarCompiler, Matcher
from worker_orcd.engine.plain_step import PlainStep
from worker_orcd.engine.request import (
    SAMPLER_ORDER,
    Failed,
    Finished,
    Grammar,
    PromptLogprobs,
    Request,
    SamplingParams,
    Started,
    TokenLogprob,
    Tokens,
)
from worker_orcd.engine.runtime import Runtime
from worker_orcd.engine.sampler import Sampler
from worker_orcd.engine.scheduler import Policy, SchedulerLimits
from worker_orcd.engine.sequence import Plan
from worker_orcd.engine.step import Launched
from worker_orcd.kv.allocator import ContiguousAllocator, KVCacheAllocator
from worker_orcd.kv.paged import PagedAllocator
from worker_orcd.kv.pool import KVShape, allocate_pool, eraser
from worker_orcd.models.adapter import ModelAdapter

CONTEXT = 300  # beyond one attention split
LONG = 60  # tokens of a prompt that costs time
EOG_IDS = frozenset(range(2, 12))
UNSAMPLEABLE = [0, 1]
POLICIES: tuple[Policy, ...] = ("fcfs", "priority", "shortest-prompt-first")
FLAVOURS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 1.0},
    {"temperature": 1.7, "repetition_penalty": 1.2},
    {"temperature": 0.9, "top_k": 20},
    {"temperature": 1.2, "top_p": 0.8},
    {"temperature": 1.1, "min_p": 0.05},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.1},
    {"presence_penalty": 0.7, "frequency_penalty": 0.4, "logit_bias": {40: 3.0, 41: -100.0}},
    {"typical_p": 0.6, "xtc_probability": 0.5, "xtc_threshold": 0.02, "temperature": 1.4},
    {"dry_multiplier": 2.0, "dry_allowed_length": 1, "dry_breaker_ids": [50], "temperature": 0.0},
    {"mirostat_tau": 3.0, "mirostat_eta": 0.3, "repetition_penalty": 1.1},
    {"dynatemp_range": 0.6, "top_k": 40, "order": SAMPLER_ORDER[::-1], "presence_penalty": 0.3},
)
WISHES: tuple[dict[str, Any], ...] = (
    *({},) * 12,
    {"num_logprobs": 3},
    {"num_logprobs": 0, "ignore_eos": True},
    {"prompt_logprobs": True, "num_logprobs": 2},
    {"prompt_logprobs": True, "max_tokens": 0},
    {"min_tokens": 5, "stop_ids": list(range(60, 90))},
    {"grammar": Grammar("regex", "[a-f]{2}(-[0-9]{2})*!")},
    {"grammar": Grammar("json_object"), "num_logprobs": 1},
)


class Recorder:
    """A model that keeps the logits of every row that samples, by (request id, position)."""

    def __init__(self, adapter: ModelAdapter) -> None:
        self.adapter, self.plan = adapter, Plan()
        self.rows: dict[tuple[str, int], list[Tensor]] = {}  # left on the device: reading them would make it wait

    def forward(self, batch: Batch, kv: list[LayerKV]) -> Tensor:
        logits = self.adapter.forward(batch, kv)
        assert len(logits) == sum(chunk.num_logits for chunk in self.plan)
        end = 0
        for chunk in self.plan:
            end += chunk.num_logits
            if chunk.samples:
                key = chunk.sequence.request.id, chunk.first + chunk.num_tokens
                self.rows.setdefault(key, []).append(logits[end - 1])
        return logits


class PromptCompiler(GrammarCompiler):
    """Has compiled when it returns, so that a schedule is the same every time."""

    def compile(self, grammar: Grammar) -> Future[Matcher]:
        future = super().compile(grammar)
        future.exception()
        return future


class RecordingStep(PlainStep):
    """Tells the recorder which rows are whose."""

    def __init__(self, runtime: Runtime, recorder: Recorder, overlaps: bool) -> None:
        super().__init__(runtime, Sampler(UNSAMPLEABLE, runtime.device, EOG_IDS))
        self._recorder, self.overlaps = recorder, overlaps

    def launch(self, plan: Plan) -> Launched:
        self._recorder.plan = list(plan)
        return super().launch(plan)


@dataclass
class Outcome:
    """What became of one request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt: list[TokenLogprob | None] = field(default_factory=list)
    num_cached: int = 0
    end: str = ""  # a stop reason or an error code


@dataclass
class Course:
    """A schedule as it went: what differed, and what it covered."""

    differences: list[str] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)


class Bench:
    def __init__(self, runtime: Runtime, num_requests: int, seed: int = 0) -> None:
        self._runtime, self.adapter = runtime, runtime.adapter
        layer = runtime.kv[0]
        self._dims = len(runtime.kv), *layer.k.shape[2:]
        self._compiler = PromptCompiler(Letters, num_ids=300)
        self._requests = draw_requests(random.Random(seed), num_requests)
        self.alone = {request.id: self._run_alone(request) for request in self._requests}

    def run(self, seed: int, adapter: ModelAdapter | None = None) -> Course:
        """One schedule; `adapter` replaces the model."""
        rng, course = random.Random(seed), Course()
        is_crowd = seed % 25 == 0
        requests, limits = self._pick(rng, is_crowd), draw_limits(rng, is_crowd)
        recorder, overlaps = Recorder(adapter or self.adapter), rng.random() < 0.5
        allocator = self._draw_cache(rng, requests, is_crowd)
        core = self._core(recorder, limits, allocator, overlaps)
        outcomes = self._drive(core, requests, rng, course.seen)
        course.seen["overlapping"] += overlaps
        for request in requests:
            course.differences += self._compare(request, outcomes[request.id], recorder, seed)
        problem = core.check()
        course.differences += [f"schedule {seed}: {problem}"] if problem else []
        return course

    def _run_alone(self, request: Request) -> tuple[Outcome, dict[tuple[str, int], Tensor]]:
        """Outcome, and logits by key."""
        recorder, outcome = Recorder(self.adapter), Outcome()
        allocator = PagedAllocator(2, 256, share=False)
        core = self._core(recorder, SchedulerLimits(1, CONTEXT, CONTEXT), allocator, overlaps=False)
        core.submit(1, request)
        while core.has_work:
            for _, event in core.tick().events:
                note(outcome, event)
        return outcome, {key: bits(rows[0]) for key, rows in recorder.rows.items()}

    def _core(
        self, recorder: Recorder, limits: SchedulerLimits, allocator: KVCacheAllocator, overlaps: bool
    ) -> EngineCore:
        shape = KVShape(
            self._dims[0], allocator.num_blocks, allocator.block_size, self._dims[1], self._dims[2], torch.float32
        )
        kv = allocate_pool(shape, self._runtime.device)
        for layer in kv:  # whoever reads what was not written meets NaN
            layer.k.fill_(torch.nan)
            layer.v.fill_(torch.nan)
        allocator._erase = eraser(kv)  # type: ignore[attr-defined]
        runtime = Runtime(recorder, kv, allocator, self._runtime.device)
        step = RecordingStep(runtime, recorder, overlaps)
        return EngineCore(step, limits, EOG_IDS, {"model": "tiny"}, compiler=self._compiler)

    def _pick(self, rng: random.Random, is_crowd: bool) -> list[Request]:
        """Mostly a few requests, now and then a crowd; a long prompt is rare because it takes its time."""
        count = rng.randint(40, 64) if is_crowd else rng.randint(2, 8)
        short = [request for request in self._requests if len(request.prompt_ids) <= LONG]
        long = [request for request in self._requests if len(request.prompt_ids) > LONG]
        picked = rng.sample(short, count) + (rng.sample(long, 1) if rng.random() < 0.03 else [])
        return rng.sample(picked, len(picked))

    def _draw_cache(self, rng: random.Random, requests: list[Request], is_crowd: bool) -> KVCacheAllocator:
        """From just enough for the largest request to plenty."""
        most = max(len(request.prompt_ids) + max(1, request.max_tokens) for request in requests)
        if not is_crowd and rng.random() < 0.1:
            return ContiguousAllocator(rng.randint(1, len(requests)), most)
        block = rng.choice((1, 1, 2, 2, 4, 4, 8, 16, 32, 64, 256))
        least, plenty = -(-most // block), sum(-(-(len(r.prompt_ids) + r.max_tokens) // block) for r in requests)
        num_blocks = least + int(
            (plenty - least) * rng.choice((0.8, 1.0) if is_crowd else (0.0, 0.0, 0.1, 0.2, 0.4, 1.0))
        )
        return PagedAllocator(num_blocks, block, share=rng.random() < 0.85)

    def _drive(
        self, core: EngineCore, requests: list[Request], rng: random.Random, seen: Counter[str]
    ) -> dict[str, Outcome]:
        """Let requests arrive, some be cancelled, and turn the core until nobody is left."""
        outcomes = {request.id: Outcome() for request in requests}
        pace = 100.0 if len(requests) > 32 else rng.choice((0.5, 2.0, 100.0))
        cancel_rate = rng.choice((0.0, 0.0, 0.1))
        arrivals = list(enumerate(requests, 1))
        by_number = dict(arrivals)
        while arrivals or core.has_work:
            for _ in range(min(len(arrivals), int(pace) + (rng.random() < pace % 1.0))):
                core.submit(*arrivals.pop(0))
            if rng.random() < cancel_rate:
                core.cancel(rng.choice(list(by_number)))
            if rng.random() < 0.01 and not core.has_work:
                core.drop_cache()
            output = core.tick()
            for number, event in output.events:
                note(outcomes[by_number[number].id], event)
            if (stats := output.stats) is not None:
                seen["preempted"] += stats.num_preempted
                seen["hits"] += stats.cached_tokens > 0
                seen["crowds"] += stats.num_sequences > 32
                seen["mixed"] += stats.num_sequences > 1 and stats.num_rows > stats.num_sequences
        seen["cancelled"] += sum(outcome.end == "CANCELLED" and bool(outcome.tokens) for outcome in outcomes.values())
        return outcomes

    def _compare(self, request: Request, outcome: Outcome, recorder: Recorder, seed: int) -> list[str]:
        alone, expected = self.alone[request.id]
        place, num_prompt = f"schedule {seed}, request {request.id}", len(request.prompt_ids)
        if outcome.end != "CANCELLED" and replace(outcome, num_cached=0) != replace(alone, num_cached=0):
            return [f"{place}: {outcome} instead of {alone}"]
        if (
            outcome.tokens != alone.tokens[: len(outcome.tokens)]
            or outcome.prompt != alone.prompt[: len(outcome.prompt)]
        ):
            return [f"{place}: the tokens before the cancel are others"]
        if outcome.num_cached and request.prompt_logprobs:
            return [f"{place}: a prompt was scored from the cache"]
        differences = []
        for position in range(num_prompt, num_prompt + len(outcome.tokens) + (outcome.end == "eos")):
            if (request.id, position) not in expected:
                continue  # the answer was complete; its last token was not computed
            rows = recorder.rows.get((request.id, position), [])
            if not rows or any(not torch.equal(bits(row), expected[request.id, position]) for row in rows):
                differences.append(f"{place}: other logits for position {position}")
        return differences


class Letters(ByteTokenizer):
    """Ids that do not end an answer are bytes."""

    vocab_size = 256
    eog_ids = EOG_IDS  # type: ignore[assignment]

    def is_control(self, token_id: int) -> bool:
        return token_id in EOG_IDS


def bits(row: Tensor) -> Tensor:
    """Float32 as integers, so that nothing but the same bits is equal."""
    return row.cpu().view(torch.int32)


def note(outcome: Outcome, event: object) -> None:
    """Add an event; tokens must come without a gap, and nothing after the end."""
    assert not outcome.end
    if isinstance(event, Started):
        outcome.num_cached = event.cached_tokens
    elif isinstance(event, Tokens):
        assert event.index == len(outcome.tokens)
        outcome.tokens += event.ids
        outcome.logprobs += event.logprobs or []
    elif isinstance(event, PromptLogprobs):
        assert event.index == len(outcome.prompt)
        assert event.tokens
        assert not outcome.tokens
        outcome.prompt += event.tokens
    elif isinstance(event, Finished):
        outcome.end = event.reason
    elif isinstance(event, Failed):
        outcome.end = event.code


def draw_limits(rng: random.Random, is_crowd: bool) -> SchedulerLimits:
    max_batch = 64 if is_crowd else rng.choice((1, 2, 3, 5, 8, 16, 64))
    max_step_tokens = max_batch + rng.choice((100, 300) if is_crowd else (0, 1, 3, 7, 16, 40, 300))
    return SchedulerLimits(max_batch, max_step_tokens, CONTEXT, rng.choice(POLICIES))


def draw_requests(rng: random.Random, count: int) -> list[Request]:
    """Texts that often begin alike; every twentieth crosses the end of an attention split."""
    stems = [[rng.randrange(12, 260) for _ in range(16)] for _ in range(3)]
    requests = []
    for i in range(count):
        own = rng.randint(226, 256) if i % 20 == 0 else rng.randint(1, 6)
        prompt = [*rng.choice(stems)[: rng.choice((0, 4, 8, 16))], *(rng.randrange(12, 260) for _ in range(own))]
        sampling = SamplingParams(rng.getrandbits(64), **rng.choice(FLAVOURS))
        wishes = {"max_tokens": rng.choice((1, 4, 8, 16))} | rng.choice(WISHES)
        requests.append(Request(str(i), prompt, sampling=sampling, priority=rng.randint(0, 2), **wishes))
    return requests
