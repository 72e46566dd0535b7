"""A request inside the engine: its tokens so far and how many of them are in the cache."""

from __future__ import annotations

from dataclasses import dataclass, field

from worker_orcd.engine.request import Request
from worker_orcd.kv.allocator import BlockTable
from worker_orcd.kv.prefix import PrefixChain


@dataclass(eq=False)
class Sequence:
    """Times in seconds on the engine's clock.

    A step may be launched before the tokens of the step before are known. Such tokens count in `num_unknown`, so
    lengths and positions are always right; only the ids follow later.
    """

    request: Request
    number: int  # order of arrival; also its name between the engine and its client
    chain: PrefixChain
    arrived_s: float = 0.0
    tokens: list[int] = field(default_factory=list)  # prompt, then what was generated; known ids only
    table: BlockTable | None = None  # while it runs
    num_computed: int = 0  # tokens whose keys and values are in the cache, or will be after the steps launched
    num_unknown: int = 0  # tokens sampled by launched steps, not yet read
    num_in_flight: int = 0  # launched steps that write to its blocks
    sampled_row: int = 0  # where the step before left its newest token
    num_cached: int = 0  # tokens found in the prefix cache when it last started
    longest: int = 0  # tokens it can come to hold, set when it is queued
    num_preempted: int = 0
    num_overtaken: int = 0  # later arrivals that were admitted before it
    started_s: float | None = None
    first_token_s: float | None = None
    has_ended: bool = False

    @classmethod
    def of(cls, request: Request, number: int, chain: PrefixChain, arrived_s: float = 0.0) -> Sequence:
        return cls(request, number, chain, arrived_s, list(request.prompt_ids))

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) + self.num_unknown

    @property
    def num_generated(self) -> int:
        return self.num_tokens - self.num_prompt

    @property
    def generated(self) -> list[int]:
        """The known part of the answer."""
        return self.tokens[self.num_prompt :]

    @property
    def num_pending(self) -> int:
        """Tokens still to be computed before the next one can be sampled."""
        return self.num_tokens - self.num_computed


@dataclass(frozen=True, slots=True)
class Chunk:
    """Pending tokens of a sequence, positions `first` to `first + num_tokens - 1`."""

    sequence: Sequence
    first: int
    num_tokens: int
    samples: bool  # the last pending token is among them, so the next one is sampled

    @classmethod
    def of(cls, sequence: Sequence, num_tokens: int) -> Chunk:
        """The next `num_tokens` pending tokens."""
        pending = sequence.num_tokens - sequence.num_computed
        assert 0 < num_tokens <= pending
        return cls(sequence, sequence.num_computed, num_tokens, num_tokens == pending)


Plan = list[Chunk]  # what one step computes, each sequence at most once
