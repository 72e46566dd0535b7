"""A step on a fake device: what a sequence reads back from the cache decides its next token, and is checked.

Each slot of the fake memory holds a mark: a hash of the tenant and of every token up to there. So a slot of somebody
else, of another position, or of other tokens differs, and so does the token computed from it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from zlib import crc32

from worker_orcd.engine import scheduler
from worker_orcd.engine.request import Request
from worker_orcd.engine.scheduler import SchedulerLimits
from worker_orcd.engine.sequence import Chunk, Plan, Sequence
from worker_orcd.engine.step import CachedStep, Result
from worker_orcd.errors import NumericFault
from worker_orcd.kv.allocator import BlockTable, CacheFull, KVCacheAllocator

NAN, EMPTY = -1, None  # a hash is never -1
EOS, VOCABULARY = 1, 24


class Violation(BaseException):
    """A promise is broken. Not an Exception: the engine must not catch it."""


def require(holds: bool, promise: str) -> None:
    if not holds:
        raise Violation(promise)


class Truth:
    """The plain run: what the model answers to `request` alone. Marks by position; never stops at EOS."""

    def __init__(self, request: Request, seed: int, longest: int) -> None:
        self.root = hash((seed, crc32(request.tenant.encode())))
        self.tokens, self.marks = list(request.prompt_ids), list[int]()
        for position in range(longest):
            if position == len(self.tokens):
                self.tokens.append(next_token(self.marks[-1]))
            self.marks.append(hash((self.marks[-1] if self.marks else self.root, self.tokens[position])))
        self.num_prompt, self.longest = len(request.prompt_ids), longest

    def answer(self) -> tuple[list[int], bool]:
        """The tokens of the answer, and whether it ends with (and without) EOS."""
        generated = self.tokens[self.num_prompt : self.longest]
        return (generated[: generated.index(EOS)], True) if EOS in generated else (generated, False)


def next_token(mark: int) -> int:
    return 1 + (mark >> 9) % (VOCABULARY - 1)


@dataclass
class Faults:
    """Chances of each fault, drawn by the driver; all zero when faults are off."""

    rng: random.Random
    chances: dict[str, float]

    def hits(self, name: str) -> bool:
        return name in self.chances and self.rng.random() < self.chances[name]


class FakeLaunched:
    """The device runs behind the host, as late as it can: a step is computed when someone waits for it."""

    def __init__(self, step: FakeStep, plan: Plan) -> None:
        self.plan, self._step = plan, step
        self.sampled: list[int] = []
        self.results: list[Result] = []
        self._inputs = [self._input(chunk, step.last) for chunk in plan]
        for row, chunk in enumerate(chunk for chunk in plan if chunk.samples):
            chunk.sequence.sampled_row = row

    def _input(
        self, chunk: Chunk, last: FakeLaunched | None
    ) -> tuple[list[int], list[int], FakeLaunched | None, int]:
        """Blocks and tokens as they are now; the newest token may still be where the step before leaves it."""
        seq, end = chunk.sequence, chunk.first + chunk.num_tokens
        assert seq.table is not None
        is_known = end <= len(seq.tokens)
        return list(seq.table.blocks), seq.tokens[chunk.first : end], None if is_known else last, seq.sampled_row

    def run(self) -> None:
        step = self._step
        for chunk, (blocks, tokens, source, row) in zip(self.plan, self._inputs, strict=True):
            if source is not None:
                tokens.append(source.sampled[row])
            mark = step.memory.write_and_read(step.truths[chunk.sequence.number], blocks, chunk.first, tokens, step)
            if chunk.samples:
                self.sampled.append(EOS if mark == NAN else next_token(mark))
                self.results.append(NumericFault("not finite") if mark == NAN else [self.sampled[-1]])
            else:
                self.results.append([])

    def wait(self) -> list[Result]:
        return self._step.wait(self)


class Memory:
    """[num_blocks][block_size] marks; `sure` are those that led to a finite result the host has seen."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.size = block_size
        self.marks: list[list[int | None]] = [[EMPTY] * block_size for _ in range(num_blocks)]
        self.sure = [[False] * block_size for _ in range(num_blocks)]

    def at(self, blocks: list[int], position: int) -> int | None:
        return self.marks[blocks[position // self.size]][position % self.size]

    def write_and_read(self, truth: Truth, blocks: list[int], first: int, tokens: list[int], step: FakeStep) -> int:
        """Compute `tokens` from position `first` on; returns the mark of the last one, NAN when it read any."""
        before = self.at(blocks, first - 1) if first else truth.root
        for position, token in enumerate(tokens, first):
            block, offset = blocks[position // self.size], position % self.size
            is_nan = before == NAN or step.faults.hits("nan")
            before = NAN if is_nan else hash((before, token))
            self.marks[block][offset], self.sure[block][offset] = before, False
        context = [self.at(blocks, position) for position in range(first + len(tokens))]
        for position, mark in enumerate(context):
            require(mark in (truth.marks[position], NAN), f"I11: position {position} is not what was written there")
        if NAN in context:
            block, offset = blocks[(len(context) - 1) // self.size], (len(context) - 1) % self.size
            self.marks[block][offset] = NAN
            return NAN
        return truth.marks[len(context) - 1]

    def erase(self, blocks: list[int]) -> None:
        for block in blocks:
            self.marks[block], self.sure[block] = [EMPTY] * self.size, [False] * self.size


@dataclass
class FakeStep(CachedStep):
    """InferenceStep over a real allocator and the fake memory; PlainStep without tensors, plus the checks."""

    allocator: KVCacheAllocator
    memory: Memory
    overlaps: bool
    faults: Faults
    limits: SchedulerLimits
    truths: dict[int, Truth] = field(default_factory=dict)
    held: dict[int, Sequence] = field(default_factory=dict)  # sequences with a table
    reserved: dict[int, int] = field(default_factory=dict)  # tokens claimed at the start
    in_flight: list[FakeLaunched] = field(default_factory=list)
    suspect: set[int] = field(default_factory=set)  # blocks of which a fault was reported, not erased since
    poisoned: set[int] = field(default_factory=set)  # published, then spoiled
    excused: set[tuple[int, str]] = field(default_factory=set)  # who may fail, with which code
    clock_s: float = 0.0
    num_refused: int = 0  # times that room was refused without need
    plans: list[Plan] = field(default_factory=list)  # all that were tried
    starts: list[tuple[int, int, int]] = field(
        default_factory=list
    )  # number, prompt tokens, cached; 0 of those who resume
    last: FakeLaunched | None = None

    max_new_tokens = 1

    def __post_init__(self) -> None:
        super().__init__(self.allocator)
        self.allocator._erase = self._erase  # type: ignore[attr-defined]

    def start(self, seq: Sequence, spare: int) -> None:
        self._maybe_refuse("full at start")
        super().start(seq, spare)
        hits = self.table(seq).blocks[: seq.num_cached // self.block_size]
        require(not self.suspect.intersection(hits), "I18: a faulted block was found in the cache")
        self.held[seq.number], self.reserved[seq.number] = seq, seq.num_tokens
        is_first = seq.num_preempted == 0
        self.starts.append((seq.number, seq.num_prompt * is_first, seq.num_cached * is_first))

    def grow(self, seq: Sequence, tokens: int, spare: int) -> None:
        assert seq.table is not None
        is_guaranteed = seq.num_preempted >= scheduler.MAX_PREEMPTED
        if not self.in_flight and not is_guaranteed:  # else nobody is ready to yield
            self._maybe_refuse("full at growth")
        require(not is_guaranteed or self.available() > 0, "I14: blocks put aside for a sequence are gone")
        super().grow(seq, tokens, spare)

    def _maybe_refuse(self, fault: str) -> None:
        if self.faults.hits(fault):
            self.num_refused += 1
            raise CacheFull("refused without need")

    def launch(self, plan: Plan) -> FakeLaunched:
        self.plans.append(plan)
        self._check(plan)
        for chunk in plan:
            if self.faults.hits("culprit"):
                self.excused.add((chunk.sequence.number, "INTERNAL"))
        if self.faults.hits("launch") or any((c.sequence.number, "INTERNAL") in self.excused for c in plan):
            if len(plan) == 1:
                self.excused.add((plan[0].sequence.number, "INTERNAL"))
            raise RuntimeError("launch failed")
        self.last = FakeLaunched(self, plan)
        self.in_flight.append(self.last)
        if not self.overlaps:
            self.last.run()
        return self.last

    def _check(self, plan: Plan) -> None:
        sequences = [chunk.sequence for chunk in plan]
        require(len(set(map(id, sequences))) == len(plan) > 0, "I13: a sequence is twice in a step")
        require(len(plan) <= self.limits.max_batch, "I13: too many sequences in a step")
        room = self.limits.max_step_tokens - sum(chunk.num_tokens for chunk in plan)
        require(room >= 0, "I13: the step is too large")
        whole = {chunk.sequence for chunk in plan if chunk.samples}
        idle = [seq for seq in self.running() if seq.num_pending > 1 and seq not in whole]
        require(not (room and idle and len(self.plans) == 1), "I15: a prompt waits although there is room")
        counts: dict[int, int] = {}
        for holder in self.held.values():
            for block in self.table(holder).blocks:
                counts[block] = counts.get(block, 0) + 1
        for chunk in plan:
            table, seq = self.table(chunk.sequence), chunk.sequence
            require(not seq.has_ended, "P11: a sequence that ended is computed")
            require(chunk.first == seq.num_computed, "I11: a chunk leaves a gap")
            first, last = chunk.first // self.block_size, (chunk.first + chunk.num_tokens - 1) // self.block_size
            require(first >= table.num_published, "I5: a published block is written")
            require(
                all(counts[table.blocks[i]] == 1 for i in range(first, last + 1)),
                "I5, I13: a shared block is written",
            )

    def wait(self, launched: FakeLaunched) -> list[Result]:
        require(self.in_flight[0] is launched, "a step is read out of order")
        if self.overlaps:
            launched.run()
        self.in_flight.remove(launched)
        self.clock_s += 100.0 if self.faults.hits("slow") else 0.01
        has_raised = self.faults.hits("wait")
        for chunk, result in zip(launched.plan, launched.results, strict=True):
            blocks = self.table(chunk.sequence).blocks
            if has_raised or isinstance(result, NumericFault):
                self.suspect.update(blocks)
                self.excused.add((chunk.sequence.number, "INTERNAL" if has_raised else "NUMERIC_FAULT"))
            elif result:
                for position in range(chunk.first + chunk.num_tokens):
                    self.memory.sure[blocks[position // self.block_size]][position % self.block_size] = True
        if has_raised:
            raise RuntimeError("the device failed")
        return launched.results

    def confirm(self, seq: Sequence, num_tokens: int) -> None:
        table = self.table(seq)
        before = table.num_published
        super().confirm(seq, num_tokens)
        for i in range(before, table.num_published):
            truth = self.truths[seq.number].marks[i * self.block_size : (i + 1) * self.block_size]
            block = table.blocks[i]
            if block not in self.suspect and not (block in self.poisoned and NAN in self.memory.marks[block]):
                require(all(self.memory.sure[block]), "I8: a block is published before its content is confirmed")
                require(self.memory.marks[block] == truth, "I7: a published block holds another text")

    def free(self, seq: Sequence) -> None:
        planned = [chunk.sequence for launched in self.in_flight for chunk in launched.plan]
        require(seq not in planned, "I16: blocks are freed while a step writes to them")
        if not seq.has_ended:
            others = [o for o in self.running() if o.num_preempted < scheduler.MAX_PREEMPTED]
            require(seq is max(others, key=self._juniority, default=seq), "P17: a senior yields to a junior")
        super().free(seq)
        del self.held[seq.number]

    def running(self) -> list[Sequence]:
        return [seq for seq in self.held.values() if not seq.has_ended]

    def _juniority(self, seq: Sequence) -> tuple[int, int]:
        return (seq.request.priority if self.limits.policy == "priority" else 0, seq.number)

    def table(self, seq: Sequence) -> BlockTable:
        if seq.table is None:
            raise Violation("P11: a sequence without blocks is used")
        return seq.table

    def poison(self, block: int) -> None:
        """Spoil a published block, as a stray write would."""
        self.memory.marks[block][0] = NAN
        self.poisoned.add(block)

    def _erase(self, blocks: list[int]) -> None:
        held = {
            block for seq in self.held.values() if seq.table for block in seq.table.blocks if not seq.table.is_closed
        }
        require(not held.intersection(blocks), "I18: a block is erased that someone holds")
        self.memory.erase(blocks)
        self.suspect.difference_update(blocks)
        self.poisoned.difference_update(blocks)
