"""InferenceStep: one turn of the engine, and what the scheduler sees of the cache. No torch here.

engine/plain_step.py samples one token a sequence; a speculative step drops in beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from worker_orcd.engine.request import TokenLogprob
from worker_orcd.engine.sequence import Plan, Sequence
from worker_orcd.errors import WorkerError
from worker_orcd.kv.allocator import CacheFull, KVCacheAllocator


@dataclass(frozen=True)
class Scored:
    """The result of a sequence that asked for log-probabilities."""

    tokens: list[int]
    logprobs: list[TokenLogprob] | None  # one for each token
    prompt: list[TokenLogprob]  # of the prompt's tokens that follow those computed


Result = list[int] | Scored | WorkerError  # new tokens of one sequence, or what went wrong with it alone


class Launched(Protocol):
    """A step that was started; `plan` is what it computes."""

    plan: Plan

    def wait(self) -> list[Result]:
        """Block until it is done; per chunk [] mid-prompt, [t], several accepted drafts, or an error."""
        ...


class InferenceStep(Protocol):
    """Owns the cache: the scheduler sees it through these methods only."""

    overlaps: bool  # launching returns before the device is done, and the next plan may be launched meanwhile
    max_new_tokens: int  # tokens one decoding step can add to a sequence
    block_size: int  # tokens a block of the cache holds
    num_blocks: int

    @property
    def warning(self) -> str:
        """What does not go as it should, and does no harm to answers; empty when all is well."""
        ...

    def available(self) -> int:
        """Blocks that can be had."""
        ...

    def start(self, seq: Sequence, spare: int) -> None:
        """Claim cache for all its tokens, prefix hits first, and set `num_computed` and `num_cached`.

        Raises CacheFull, and leaves all as it was, when fewer than `spare` blocks would be left.
        """
        ...

    def grow(self, seq: Sequence, tokens: int, spare: int) -> None:
        """Make room for `tokens` tokens in all; CacheFull as above."""
        ...

    def launch(self, plan: Plan) -> Launched:
        """Start computing the plan. An exception means that nothing of it counts."""
        ...

    def confirm(self, seq: Sequence, num_tokens: int) -> None:
        """The first `num_tokens` tokens are known, computed, and led to finite logits: they may be shared."""
        ...

    def distrust(self, seq: Sequence) -> None:
        """What the sequence has in the cache is not to be shared, and erased when it is freed."""
        ...

    def free(self, seq: Sequence) -> None:
        """Give everything back; at any moment after start, once."""
        ...

    def drop_cache(self) -> None:
        """Forget all prefixes that no running sequence holds."""
        ...

    def usage(self) -> tuple[int, int, int]:
        """Blocks held by sequences, blocks held by the prefix cache alone, blocks given up by it so far."""
        ...

    def check(self) -> None:
        """Assert that the cache adds up."""
        ...


class CachedStep:
    """The half of an InferenceStep that owns the cache. A subclass launches."""

    def __init__(self, allocator: KVCacheAllocator) -> None:
        self.allocator = allocator
        self.block_size, self.num_blocks = allocator.block_size, allocator.num_blocks

    @property
    def warning(self) -> str:
        return ""

    def available(self) -> int:
        return self.allocator.available()

    def start(self, seq: Sequence, spare: int) -> None:
        table = self.allocator.new_table()
        known = 0 if seq.is_scoring else len(seq.tokens) - 1  # rows whose logits are wanted are always computed
        try:
            num_hits = self.allocator.reuse(table, seq.chain.keys(seq.tokens, known))
            self.allocator.grow(table, seq.num_tokens, spare)
        except CacheFull:
            self.allocator.release(table)
            raise
        seq.table = table
        seq.num_cached = seq.num_computed = num_hits * self.block_size

    def grow(self, seq: Sequence, tokens: int, spare: int) -> None:
        assert seq.table is not None
        self.allocator.grow(seq.table, tokens, spare)

    def confirm(self, seq: Sequence, num_tokens: int) -> None:
        assert seq.table is not None
        if num_tokens // self.block_size > seq.table.num_published:
            self.allocator.publish(seq.table, seq.chain.keys(seq.tokens, num_tokens))

    def distrust(self, seq: Sequence) -> None:
        assert seq.table is not None
        self.allocator.condemn(seq.table)

    def free(self, seq: Sequence) -> None:
        assert seq.table is not None
        self.allocator.release(seq.table)
        seq.table = None

    def drop_cache(self) -> None:
        self.allocator.drop_cache()

    def usage(self) -> tuple[int, int, int]:
        idle = self.allocator.num_idle()
        return self.num_blocks - self.allocator.available(), idle, self.allocator.num_evicted

    def check(self) -> None:
        self.allocator.check()
