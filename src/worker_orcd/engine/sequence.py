"""A request inside the engine: its tokens so far and how many of them are in the cache."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import msgspec

from worker_orcd.engine.grammar import Matcher
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
    num_prompt: int = 0
    end_ids: Collection[int] = ()  # those that end the answer
    table: BlockTable | None = None  # while it runs
    num_computed: int = 0  # tokens whose keys and values are in the cache, or will be after the steps launched
    num_unknown: int = 0  # tokens sampled by launched steps, not yet read
    num_in_flight: int = 0  # launched steps that write to its blocks
    sampled_row: int = 0  # where the step before left its newest token
    num_cached: int = 0  # tokens found in the prefix cache when it last started
    longest: int = 0  # tokens it can come to hold, set when it is queued
    num_steps: int = 0
    num_chunks: int = 0  # steps that computed tokens of the prompt
    num_preempted: int = 0
    num_overtaken: int = 0  # later arrivals that were admitted before it
    started_s: float | None = None
    first_token_s: float | None = None
    has_ended: bool = False
    needs_last_token: bool = False  # the host must know a token before the next one can be sampled
    wants_logprobs: bool = False  # of the answer or the prompt
    is_scoring: bool = False  # the prompt's are still to be told: all of it is computed, no prefix from the cache
    has_bias: bool = False  # some ids are made more or less likely, or banned
    matcher: Matcher | None = None  # where the answer stands in the request's grammar
    program: tuple[str, ...] | None = None  # the sampler's filters, once it has looked
    mirostat_mu: float | None = (
        None  # bits: the surprise from which on mirostat cuts off; None before the first token
    )
    num_scored: int = 0  # tokens of the prompt whose log-probabilities have been told

    @classmethod
    def of(cls, request: Request, number: int, chain: PrefixChain, arrived_s: float = 0.0) -> Sequence:
        seq, sampling = cls(request, number, chain, arrived_s, list(request.prompt_ids)), request.sampling
        seq.num_prompt = len(request.prompt_ids)
        has_state = sampling.dry_multiplier > 0 or sampling.mirostat_tau > 0
        seq.needs_last_token = has_state or request.grammar is not None
        seq.is_scoring = request.prompt_logprobs
        seq.wants_logprobs = request.num_logprobs is not None or request.prompt_logprobs
        seq.has_bias = bool(sampling.logit_bias or request.min_tokens or request.ignore_eos)
        return seq

    @property
    def block_table(self) -> BlockTable:
        """Its place in the cache; a sequence in a step has one."""
        assert self.table is not None
        return self.table

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

    def banned_ids(self, eog_ids: frozenset[int]) -> Collection[int]:
        """Ids that would end the answer and may not be drawn yet, or at all."""
        if self.num_generated < self.request.min_tokens:
            return eog_ids.union(self.request.stop_ids)
        return eog_ids if self.request.ignore_eos else ()

    @property
    def num_pending(self) -> int:
        """Tokens still to be computed before the next one can be sampled."""
        return self.num_tokens - self.num_computed


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """Pending tokens of a sequence, positions `first` to `first + num_tokens - 1`.

    One for each sequence and step: a Struct costs a quarter of a dataclass, and no cycle leads through it.
    """

    sequence: Sequence
    first: int
    num_tokens: int
    samples: bool  # the last pending token is among them, so the next one is sampled
    scores: bool = False  # the logits of every row are wanted

    @classmethod
    def of(cls, sequence: Sequence, num_tokens: int) -> Chunk:
        """The next `num_tokens` pending tokens."""
        first = sequence.num_computed
        pending = sequence.num_tokens - first
        assert 0 < num_tokens <= pending
        scores = sequence.is_scoring and first < sequence.num_prompt
        return cls(sequence, first, num_tokens, num_tokens == pending, scores)

    @property
    def num_logits(self) -> int:
        """Rows of logits it asks for."""
        return self.num_tokens if self.scores else int(self.samples)

    @property
    def scored(self) -> list[int]:
        """The prompt's tokens whose log-probability the first of these rows give."""
        seq, first = self.sequence, self.first + 1
        return seq.tokens[first : min(first + self.num_tokens, seq.num_prompt)] if self.scores else []


Plan = list[Chunk]  # what one step computes, each sequence at most once
