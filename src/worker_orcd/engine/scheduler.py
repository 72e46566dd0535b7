"""Scheduler: which tokens of which sequences the next step computes. Integers only.

A step has room for `max_step_tokens` rows. First every running sequence that only waits for its next token gets its
one row; then prompts continue, oldest first, with what room is left; then new sequences are admitted in the order of
the policy, each with blocks for its whole text so far, so that a prompt once begun never stops half way.

When a sequence needs another block and none can be had, the most junior one that runs gives up its blocks and waits
again; it later repeats the computation of its text, with the same bits, and goes on. Three rules keep everyone
moving. Only juniors yield, so the most senior always gets on. Admission leaves one block for each running sequence
that may need another. And one that has yielded MAX_PREEMPTED times is admitted again only with every block it can
ever need put aside: it never yields again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from worker_orcd.engine.sequence import Chunk, Plan, Sequence
from worker_orcd.engine.step import InferenceStep
from worker_orcd.kv.allocator import CacheFull

Policy = Literal["fcfs", "priority", "shortest-prompt-first"]
MAX_PREEMPTED = 3
SCORE_ROWS = 64  # of a step whose logits are wanted for a prompt's log-probabilities
MAX_OVERTAKEN = 64  # admissions a policy may let pass before a waiting sequence; then it is next


@dataclass(frozen=True)
class SchedulerLimits:
    max_batch: int  # sequences in a step
    max_step_tokens: int  # rows in a step; at least max_batch
    context_length: int  # tokens a sequence may hold
    policy: Policy = "fcfs"

    def __post_init__(self) -> None:
        assert 0 < self.max_batch <= self.max_step_tokens


Order = Callable[[Sequence], tuple[int, ...]]


def _by_arrival(seq: Sequence) -> tuple[int, ...]:
    return (seq.number,)


def _by_priority(seq: Sequence) -> tuple[int, ...]:
    return (seq.request.priority, seq.number)


def _by_prompt(seq: Sequence) -> tuple[int, ...]:
    return (seq.num_prompt, seq.number)


ORDERS: dict[Policy, tuple[Order, Order]] = {  # policy → order of admission, seniority once admitted
    "fcfs": (_by_arrival, _by_arrival),
    "priority": (_by_priority, _by_priority),
    "shortest-prompt-first": (_by_prompt, _by_arrival),
}


class Scheduler:
    """Owns who waits and who runs; `step` owns the cache."""

    def __init__(self, step: InferenceStep, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []  # most senior first: the last one yields first
        self.num_preempted = 0  # so far
        self._guaranteed: list[Sequence] = []  # those of them that never yield again
        self._step = step
        self._order, self._seniority = ORDERS[limits.policy]

    def misfit(self, seq: Sequence) -> str | None:
        """Why the sequence could never be completed, even alone; None when it could."""
        context, room = self.limits.context_length, self._step.num_blocks * self._step.block_size
        if not 0 < seq.num_prompt < context:
            return f"the prompt has {seq.num_prompt} tokens; from 1 to {context - 1} fit into the context"
        if self._blocks(self._longest(seq)) > self._step.num_blocks:
            return (
                f"{seq.num_prompt} prompt tokens and max_tokens {seq.request.max_tokens} can never fit into the KV "
                f"cache of {room} tokens; ask for less, or raise --kv-cache-size-mb"
            )
        return None

    def add(self, seq: Sequence) -> None:
        assert self.misfit(seq) is None
        seq.longest = self._longest(seq)
        self.waiting.append(seq)

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence, wherever it is. Its blocks are still its own."""
        if seq.table is None:
            self.waiting.remove(seq)
        else:
            self._leave(seq)

    def is_tight(self) -> bool:
        """Whether the next plan may have to preempt someone."""
        each = self._blocks(self._step.max_new_tokens)  # blocks one step may add to a sequence, at most
        room = self._step.available() - self._set_aside()
        return room < each * len(self.running) and room < each * self._num_growing()

    def plan(self) -> tuple[Plan, list[Sequence]]:
        """What to compute next, and who left the queue for it. Marks nothing as computed."""
        plan, prompts = self._next_tokens()
        admitted: list[Sequence] = []
        room, score_room = self.limits.max_step_tokens - len(plan), SCORE_ROWS
        while room:
            if prompts:
                seq = prompts.pop(0)
            elif (new := self._admit()) is not None:
                admitted.append(seq := new)
            else:
                break
            if num_tokens := min(room, seq.num_pending, score_room if seq.is_scoring else room):
                plan.append(Chunk.of(seq, num_tokens))
                room -= num_tokens
                score_room -= num_tokens if seq.is_scoring else 0
        return plan, admitted

    def _next_tokens(self) -> tuple[Plan, list[Sequence]]:
        """A row for everyone who only waits for the next token; and those who have more to compute before it."""
        plan: Plan = []
        prompts: list[Sequence] = []
        block_size, max_new_tokens = self._step.block_size, self._step.max_new_tokens
        for seq in self.running[:]:
            if seq.table is None:
                continue  # it has yielded a moment ago, to one before it
            first, num_tokens = seq.num_computed, seq.num_tokens
            if num_tokens - first > 1:
                prompts.append(seq)
            elif first < num_tokens < seq.longest:  # else its last one is on its way; reading it will tell
                has_room = first + max_new_tokens <= len(seq.table.blocks) * block_size
                if has_room or self._make_room(seq):
                    plan.append(Chunk.of(seq, 1) if seq.is_scoring else Chunk(seq, first, 1, True))
        return plan, prompts

    def _longest(self, seq: Sequence) -> int:
        """Tokens the sequence can come to hold; an answer of none still samples one."""
        return min(seq.num_prompt + max(1, seq.request.max_tokens), self.limits.context_length)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._step.block_size)

    # ------------------------------------------------------------------ room for the next token

    def _make_room(self, seq: Sequence) -> bool:
        """Give `seq` the block its next tokens need, at the cost of younger ones; False when it must yield itself."""
        assert seq.table is not None
        tokens = min(seq.num_computed + self._step.max_new_tokens, seq.longest)
        while tokens > seq.table.capacity_tokens:
            try:
                self._step.grow(seq, tokens, 0 if self._is_guaranteed(seq) else self._set_aside())
            except CacheFull:
                if not self._preempt_after(seq):
                    return False
        return True

    def _is_guaranteed(self, seq: Sequence) -> bool:
        return seq.num_preempted >= MAX_PREEMPTED

    def _set_aside(self) -> int:
        """Blocks that guaranteed sequences may still ask for."""
        return sum(self._blocks(seq.longest) - len(seq.block_table.blocks) for seq in self._guaranteed)

    def _num_growing(self) -> int:
        """Running sequences that may ask for another block, of which none is put aside."""
        return sum(
            len(seq.table.blocks) < self._blocks(seq.longest)
            for seq in self.running
            if seq.num_preempted < MAX_PREEMPTED and seq.table is not None
        )

    def _preempt_after(self, seq: Sequence) -> bool:
        """Preempt the last sequence that may be, down to `seq` itself; False when that was the one."""
        for victim in reversed(self.running):
            if victim is seq or not self._is_guaranteed(victim):
                self._preempt(victim)
                return victim is not seq
        raise AssertionError("a running sequence is not among those that run")

    def _preempt(self, seq: Sequence) -> None:
        assert seq.num_in_flight == 0
        self._step.free(seq)
        self._leave(seq)
        seq.num_computed = 0
        seq.num_preempted += 1
        self.num_preempted += 1
        self.waiting.append(seq)

    def _leave(self, seq: Sequence) -> None:
        self.running.remove(seq)
        if self._is_guaranteed(seq):
            self._guaranteed.remove(seq)

    # ------------------------------------------------------------------ admission

    def _admit(self) -> Sequence | None:
        """Move the next waiting sequence to the running ones, if it fits; nobody behind it may pass."""
        if not self.waiting or len(self.running) >= self.limits.max_batch:
            return None
        seq = self._next()
        spare = self._num_growing() + self._set_aside()
        if self._is_guaranteed(seq):
            spare += self._blocks(seq.longest) - self._blocks(seq.num_tokens)
        if self._step.available() <= spare:
            return None
        try:
            self._step.start(seq, spare)
        except CacheFull:
            return None
        self._move_up(seq)
        return seq

    def _next(self) -> Sequence:
        overtaken = [seq for seq in self.waiting if seq.num_overtaken >= MAX_OVERTAKEN]
        return min(overtaken, key=lambda seq: seq.number) if overtaken else min(self.waiting, key=self._order)

    def _move_up(self, seq: Sequence) -> None:
        self.waiting.remove(seq)
        for other in self.waiting:
            if other.number < seq.number:
                other.num_overtaken += 1
        self.running.append(seq)
        self.running.sort(key=self._seniority)
        if self._is_guaranteed(seq):
            self._guaranteed.append(seq)
