"""One seed, one world: draws what can happen, lets it happen, and checks every promise after every tick.

Phase A has faults and asks for safety only; in phase B nothing goes wrong any more and everyone must finish in time.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

from tests.sim.fakes import EOS, FakeStep, Faults, Memory, Truth, require
from worker_orcd.engine import scheduler
from worker_orcd.engine.core import EngineCore, Output
from worker_orcd.engine.request import Event, Failed, Finished, Request, SamplingParams, Started, StepStats, Tokens
from worker_orcd.engine.scheduler import ORDERS, SchedulerLimits
from worker_orcd.errors import ShuttingDown
from worker_orcd.kv.allocator import ContiguousAllocator, KVCacheAllocator
from worker_orcd.kv.paged import PagedAllocator

FEATURES = (
    *("cancel", "deadline", "priorities", "tenants", "long pauses", "drop cache", "poison", "drain"),
    *("nan", "launch", "culprit", "wait", "slow", "full at start", "full at growth"),
)


class Stream:
    """What one client sees (I19), against what it should see (I17)."""

    def __init__(self, number: int, request: Request, truth: Truth, now: float, tick: int, misfit: bool) -> None:
        self.number, self.request, self.truth, self.misfit = number, request, truth, misfit
        self.deadline_s, self.submitted = now + request.timeout_s, tick
        self.num_tokens = self.num_overtaken = 0
        self.fair_wait = 0  # ticks until it must have started, when served in order of arrival
        self.started = self.ended = -1  # ticks
        self.excuses: set[str] = set()

    def hear(self, event: Event, tick: int, now: float) -> None:
        require(self.ended < 0, "I19: an event after the end")
        answer, ends_itself = self.truth.answer()
        if isinstance(event, Started):
            require(self.started < 0 and self.num_tokens == 0, "I19: started twice")
            require(event.cached_tokens < self.request_tokens, "I19: the whole prompt cannot come from the cache")
            self.started = tick
        elif isinstance(event, Tokens):
            require(self.started >= 0 and event.index == self.num_tokens, "I19: a gap between tokens")
            self.num_tokens += len(event.ids)
            require(event.ids == answer[event.index : self.num_tokens], "I17: not the tokens of a plain run")
        elif isinstance(event, Finished):
            full = "max_tokens" if len(answer) == self.request.max_tokens else "context_length"
            require(self.num_tokens == len(answer), "I17: the answer ends too early")
            require(event.reason == ("eos" if ends_itself else full), "I17: it ends for another reason")
            times = event.timings
            require(min(times.queue_ms, times.decode_ms, times.first_token_ms or 0) >= 0, "time runs backwards")
            require(abs(times.queue_ms + times.decode_ms - times.total_ms) < 1e-3, "time is lost")
            self.ended = tick
        else:
            if now >= self.deadline_s:
                self.excuses.add("INFERENCE_TIMEOUT")
            require(event.code in self.excuses, f"it failed without reason: {event.code} {event.message}")
            self.ended = tick
        require(not self.misfit or isinstance(event, Failed), "P10: what can never fit was begun")

    @property
    def request_tokens(self) -> int:
        return len(self.request.prompt_ids)


class World:
    def __init__(self, seed: int, features: frozenset[str] | None = None) -> None:
        rng = self.rng = random.Random(seed)
        self.seed = seed
        self.has = features if features is not None else frozenset(f for f in FEATURES if rng.random() < 0.4)
        chances = {name: rng.choice([0.01, 0.05]) for name in FEATURES if name in self.has}
        chances |= {name: 0.002 for name in ("nan", "culprit") if name in chances}
        chances |= {name: rng.choice([0.1, 0.5]) for name in ("cancel", "long pauses") if name in chances}
        self.faults = Faults(random.Random(seed + 1), chances)
        is_crowded = rng.random() < 0.5  # short prompts, long answers, little room: many must yield
        self.allocator = self._draw_allocator(is_crowded)
        most = 16 if is_crowded else rng.choice([1, 2, 4, 16])
        policy = rng.choice(list(ORDERS))
        self.limits = SchedulerLimits(
            most, most + rng.choice([0, 2, 24]), 64 if is_crowded else rng.choice([8, 32, 64]), policy
        )
        memory = Memory(self.allocator.num_blocks, self.allocator.block_size)
        overlaps = rng.random() < 0.6
        self.step = FakeStep(self.allocator, memory, overlaps, self.faults, self.limits)
        scope = {"model": "m"}
        self.core = EngineCore(self.step, self.limits, frozenset({EOS}), scope, lambda: self.step.clock_s)
        self.streams: dict[int, Stream] = {}
        self.open: dict[int, Stream] = {}  # those of the streams that have not ended
        self.trace = hashlib.sha256()
        self.tick_number = self.last_progress = self.num_preempted = self.num_evicted = 0
        self.pause, self.longest_queue = rng.choice([0.0, 0.3, 0.8]), rng.choice([1, 4, 32])
        self.longest_prompt = 4 if is_crowded else rng.choice([4, 16, 16, self.limits.context_length + 1])
        self.longest_answer = 40 if is_crowded else rng.choice([8, 40])

    def _draw_allocator(self, is_crowded: bool) -> KVCacheAllocator:
        rng = self.rng
        if is_crowded:
            size, tokens = rng.choice([1, 2]), rng.randint(44, 100)
        elif rng.random() < 0.15:
            return ContiguousAllocator(rng.randint(1, 8), 64)
        else:
            size, tokens = rng.choice([1, 2, 4, 16]), rng.choice([rng.randint(1, 80), rng.randint(80, 600)])
        return PagedAllocator(tokens // size + 1, size, share=rng.random() < 0.8)

    # ------------------------------------------------------------------ a life

    def run(self, num_requests: int) -> str:
        """Returns the hash of all that happened (I22)."""
        while len(self.streams) < num_requests:
            self._submit()
            while self.rng.random() < self.pause or len(self.core._scheduler.waiting) >= self.longest_queue:
                self._disturb()
                self.tick()
        self.faults.chances = {}
        self._submit()
        bound = self.tick_number + self._work() * (1 + scheduler.MAX_PREEMPTED)
        while self.core.has_work:
            require(self.tick_number < bound, "I15: not everyone finishes")
            self.tick()
        self._check_idle()
        return self.trace.hexdigest()

    def _work(self) -> int:
        """Ticks in which all open requests are through, one after the other, a token a tick."""
        return 3 + sum(stream.truth.longest + 3 for stream in self.open.values())

    def _submit(self) -> None:
        rng, context = self.rng, self.limits.context_length
        prompt = rng.choices((2, 3, 4), weights=(8, 1, 1), k=rng.randint(1, self.longest_prompt))
        request = Request(
            id=str(len(self.streams)),
            prompt_ids=prompt,
            max_tokens=rng.randint(1, rng.choice([3, self.longest_answer, self.longest_answer])),
            sampling=SamplingParams(0),
            timeout_s=rng.uniform(0.05, 2) if "deadline" in self.has and rng.random() < 0.3 else 1e9,
            priority=rng.randint(-1, 1) if "priorities" in self.has else 0,
            tenant=rng.choice("abc") if "tenants" in self.has else "",
        )
        longest = min(len(prompt) + request.max_tokens, context)
        blocks = -(-longest // self.allocator.block_size)
        misfit = len(prompt) >= context or blocks > self.allocator.num_blocks
        number, truth = len(self.streams), Truth(request, self.seed, longest)
        stream = Stream(number, request, truth, self.step.clock_s, self.tick_number, misfit)
        if misfit:
            stream.excuses.add("INVALID_REQUEST")
        stream.fair_wait = self._work()
        self.streams[number] = self.open[number] = stream
        self.step.truths[number] = truth
        self.core.submit(number, request)

    def _disturb(self) -> None:
        """What clients, operators and fate do between two ticks."""
        if self.faults.hits("long pauses"):
            self.step.clock_s += self.rng.uniform(0, 1)
        if self.faults.hits("cancel"):
            number = max(0, len(self.streams) + 1 - self.rng.randint(0, 12))  # unknown, over, or alive; some twice
            for _ in range(self.rng.randint(1, 2)):
                self.core.cancel(number)
            if number in self.streams:
                self.streams[number].excuses.add("CANCELLED")
        if self.faults.hits("drop cache"):
            self.core.drop_cache()
        if self.faults.hits("poison"):
            tables = [self.step.table(seq) for seq in self.step.held.values()]
            idle = getattr(self.allocator, "_idle", ())
            if published := sorted(
                {*idle, *(block for table in tables for block in table.blocks[: table.num_published])}
            ):
                self.step.poison(self.rng.choice(published))
        if "drain" in self.has and self.rng.random() < 0.005:
            for stream in self.streams.values():
                stream.excuses.add("SHUTTING_DOWN")
            self.core.fail_all(ShuttingDown("drained"))

    # ------------------------------------------------------------------ one tick

    def tick(self) -> None:
        self.step.plans.clear()
        self.step.starts.clear()
        self.tick_number += 1
        began_s = self.step.clock_s
        output = self.core.tick()
        for number, code in self.step.excused:
            self.streams[number].excuses.add(code)
        for number, event in output.events:
            self.streams[number].hear(event, self.tick_number, self.step.clock_s)
        self.open = {number: stream for number, stream in self.open.items() if stream.ended < 0}
        self.trace.update(repr(output).encode())
        faulted = {number for number, _ in self.step.excused}
        for number, stream in self.open.items():
            require(began_s < stream.deadline_s, "its time is over, and it goes on")
            require(not stream.excuses & {"CANCELLED", "SHUTTING_DOWN"}, "P11: a cancelled request goes on")
            require(number not in faulted, "P18: a request goes on after its fault")
        self._check_cache()
        self._check_fairness(output)
        if output.stats is not None:
            self._check_stats(output.stats)

    def _check_cache(self) -> None:
        self.allocator.check()
        step, owners = self.step, dict[int, str]()
        for number, seq in step.held.items():
            table, request = step.table(seq), self.streams[number].request
            tokens = max(step.reserved[number], seq.num_computed)
            require(
                len(table.blocks) == -(-tokens // table.block_size), "I6: a table is longer or shorter than its text"
            )
            require(seq.num_computed <= seq.num_tokens <= self.limits.context_length, "I6: beyond the text")
            for block in table.blocks:
                require(owners.setdefault(block, request.tenant) == request.tenant, "I10: two tenants share a block")
            ended = self.streams[number].ended
            has_pin = ended == self.tick_number and seq.num_in_flight > 0
            require(ended < 0 or has_pin, "P11: blocks are kept after the end")
        require(len(owners) == step.num_blocks - step.available(), "I1: blocks are held by nobody")
        require(owners.keys() >= step.suspect, "I18: a faulted block is free and was not erased")

    def _check_fairness(self, output: Output) -> None:
        """I15, P17."""
        is_moving = any(not isinstance(event, Started) for _, event in output.events)
        if is_moving or not self.core.has_work or self.step.num_refused:
            self.last_progress, self.step.num_refused = self.tick_number, 0
        patience = self.limits.context_length * (1 + scheduler.MAX_PREEMPTED) + 4
        require(self.tick_number - self.last_progress <= patience, "I15: nobody gets on")
        for seq in (*self.core._scheduler.waiting, *self.core._scheduler.running):
            require(seq.num_preempted <= scheduler.MAX_PREEMPTED, "P17: preempted too often")
        for number, _, _ in self.step.starts:
            for other, stream in self.open.items():
                stream.num_overtaken += other < number and other not in self.step.held
                require(stream.num_overtaken <= scheduler.MAX_OVERTAKEN, "P17: overtaken too often")
        for number, event in output.events:
            if isinstance(event, Started) and number in self.step.held:
                self._check_order(number)
        if self.limits.policy == "fcfs" and "full at start" not in self.has:
            for stream in self.open.values():
                waited = self.tick_number - stream.submitted
                require(stream.started >= 0 or waited <= 3 * stream.fair_wait, "P17: waits beyond its fair share")

    def _check_order(self, number: int) -> None:
        """Nobody who should have gone first still waits to begin, unless `number` had waited long enough."""

        def order(request: Request) -> int:
            ranks = {"fcfs": 0, "priority": request.priority, "shortest-prompt-first": len(request.prompt_ids)}
            return ranks[self.limits.policy]

        for other, stream in self.open.items():
            if stream.started < 0 and self.step.held[number].num_overtaken < scheduler.MAX_OVERTAKEN:
                mine, theirs = (order(self.streams[number].request), number), (order(stream.request), other)
                require(mine < theirs, f"P17: {number} is begun before {other}")

    def _check_stats(self, stats: StepStats) -> None:
        """I20: what is exported equals what is seen from outside."""
        plan, step = self.step.plans[0] if self.step.plans else [], self.step
        self.num_preempted += stats.num_preempted
        self.num_evicted += stats.num_evicted
        seen = (stats.num_running + stats.num_waiting, stats.blocks_used, stats.blocks_cached, self.num_evicted)
        held = {block for seq in step.held.values() for block in step.table(seq).blocks}
        is_so = (len(self.open), len(held), self.allocator.num_idle(), self.allocator.num_evicted)
        require(seen == is_so, f"I20: {seen} are exported, {is_so} is so")
        require(self.num_preempted == self.core._scheduler.num_preempted, "I20: a preemption is not counted")
        prompts, cached = (sum(column) for column in list(zip((0, 0, 0), *step.starts, strict=True))[1:])
        require((stats.prompt_tokens, stats.cached_tokens) == (prompts, cached), "I20: cache hits")
        rows, sampled = sum(chunk.num_tokens for chunk in plan), sum(chunk.samples for chunk in plan)
        require((stats.num_sequences, stats.num_rows, stats.num_sampled) == (len(plan), rows, sampled), "I20: rows")

    def _check_idle(self) -> None:
        """I21, P12."""
        require(not self.open, "I19: a stream without an end")
        require(self.core.check() == "", f"I21: {self.core.check()}")
        require(not self.step.held and not self.step.in_flight, "I21: someone still holds blocks")
        self.core.drop_cache()
        require(self.allocator.available() == self.allocator.num_blocks, "I21: blocks are lost")
        require(self.allocator.num_idle() == 0, "I21: the cache was dropped and is not empty")
        require(not self.step.suspect, "I18: a faulted block was never erased")


@contextmanager
def patience(max_preempted: int, max_overtaken: int) -> Iterator[None]:
    """The scheduler's two bounds, lowered so that small worlds reach them."""
    before = scheduler.MAX_PREEMPTED, scheduler.MAX_OVERTAKEN
    scheduler.MAX_PREEMPTED, scheduler.MAX_OVERTAKEN = max_preempted, max_overtaken
    try:
        yield
    finally:
        scheduler.MAX_PREEMPTED, scheduler.MAX_OVERTAKEN = before


class BrokenPromise(AssertionError):
    pass


def simulate(seed: int, features: frozenset[str] | None = None, num_requests: int = 200) -> str:
    """Live through the world of `seed`; raises BrokenPromise, which names it."""
    rng = random.Random(seed + 2)
    with patience(rng.choice([1, 2, 3]), rng.choice([2, 8, 64])):
        world = World(seed, features)
        try:
            return world.run(num_requests)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            life = f"simulate({seed}, {features}, {num_requests})"
            raise BrokenPromise(f"{life} at tick {world.tick_number}: {error!r}") from error
