"""A request inside the engine: its tokens so far and how many of them are in the cache."""

from __future__ import annotations

from dataclasses import dataclass, field

from worker_orcd.engine.request import Request
from worker_orcd.kv.allocator import BlockTable


@dataclass
class Sequence:
    request: Request
    table: BlockTable
    tokens: list[int] = field(default_factory=list)  # prompt, then what was generated
    num_computed: int = 0  # tokens whose keys and values are in the cache

    @classmethod
    def of(cls, request: Request, table: BlockTable) -> Sequence:
        return cls(request, table, list(request.prompt_ids))

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def num_pending(self) -> int:
        """Tokens still to be computed before the next one can be sampled."""
        return len(self.tokens) - self.num_computed


@dataclass(frozen=True)
class Chunk:
    """The next `num_tokens` pending tokens of a sequence; the last pending one makes it sample."""

    sequence: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        return self.num_tokens == self.sequence.num_pending


Plan = list[Chunk]  # what one step computes, each sequence at most once
