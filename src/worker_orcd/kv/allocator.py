"""Who owns which block of the KV cache. Plain integers; the tensors are in kv/pool.py.

A block is free, held by one or more tables, or idle: held by nobody, but still findable by its key (kv/prefix.py)
until its place is needed.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class CacheFull(Exception):
    """Too few blocks are free; nothing was taken."""


@dataclass(eq=False)
class BlockTable:
    """The blocks of one sequence, in order of position. Ends with `release`; a closed table is never used again."""

    block_size: int  # tokens a block holds
    blocks: array[int] = field(default_factory=lambda: array("q"))  # int64, to be copied as one piece
    num_published: int = 0  # leading blocks that others may find; full, and never written again
    is_closed: bool = False

    @property
    def capacity_tokens(self) -> int:
        return len(self.blocks) * self.block_size


class KVCacheAllocator(Protocol):
    """`erase` (given at construction) is called with blocks that must be overwritten before they are free."""

    block_size: int
    num_blocks: int
    num_evicted: int  # cached blocks given up so far

    def new_table(self) -> BlockTable: ...

    def available(self) -> int:
        """Blocks that can be had: free or idle."""
        ...

    def num_idle(self) -> int:
        """Blocks that only the prefix cache holds."""
        ...

    def reuse(self, table: BlockTable, keys: Sequence[bytes]) -> int:
        """Let an empty table begin with the cached blocks of the longest known start of `keys`; returns how many."""
        ...

    def grow(self, table: BlockTable, tokens: int, spare: int = 0) -> None:
        """Give `table` room for `tokens` tokens in all.

        Raises CacheFull, and then leaves all as it was, when fewer than `spare` blocks would be left.
        """
        ...

    def publish(self, table: BlockTable, keys: Sequence[bytes]) -> None:
        """Let others find the first len(keys) blocks of `table`: full, and confirmed to hold what `keys` say.

        Where an equal block is already known the table changes over to it and gives its own back: equal keys mean
        equal bits, here by the numerics contract.
        """
        ...

    def release(self, table: BlockTable) -> None:
        """Let go of every block and close the table."""
        ...

    def condemn(self, table: BlockTable) -> None:
        """The content is not to be trusted: nobody finds these blocks, or what was built on them, any more, and
        each is erased before it is free."""
        ...

    def drop_cache(self) -> None:
        """Free every idle block."""
        ...

    def check(self) -> None:
        """Assert that every block is free, idle or held, exactly once, and that the counts agree with the tables."""
        ...


def no_erase(blocks: list[int]) -> None:
    """For caches without tensors."""


class ContiguousAllocator:
    """A sequence holds one block, as long as the longest sequence may become. Nothing is shared."""

    def __init__(self, num_sequences: int, max_tokens: int, erase: Callable[[list[int]], None] = no_erase) -> None:
        assert num_sequences > 0
        assert max_tokens > 0
        self.block_size, self.num_blocks = max_tokens, num_sequences
        self.num_evicted = 0
        self._erase = erase
        self._free = list(range(num_sequences))
        self._owner: dict[int, BlockTable] = {}
        self._condemned: set[int] = set()

    def new_table(self) -> BlockTable:
        return BlockTable(self.block_size)

    def available(self) -> int:
        return len(self._free)

    def num_idle(self) -> int:
        return 0

    def reuse(self, table: BlockTable, keys: Sequence[bytes]) -> int:  # noqa: ARG002 - nothing is ever shared
        assert not table.is_closed
        return 0

    def grow(self, table: BlockTable, tokens: int, spare: int = 0) -> None:
        assert not table.is_closed
        if tokens <= table.capacity_tokens:
            return
        if tokens > self.block_size or len(self._free) <= spare:
            raise CacheFull(f"{tokens} tokens need a block of {self.block_size}; {len(self._free)} are free")
        block = self._free.pop()
        self._owner[block] = table
        table.blocks.append(block)

    def publish(self, table: BlockTable, keys: Sequence[bytes]) -> None:  # noqa: ARG002 - nothing is ever shared
        assert not table.is_closed

    def release(self, table: BlockTable) -> None:
        assert not table.is_closed
        table.is_closed = True
        for block in table.blocks:
            del self._owner[block]
            if block in self._condemned:
                self._condemned.remove(block)
                self._erase([block])
            self._free.append(block)
        del table.blocks[:]

    def condemn(self, table: BlockTable) -> None:
        assert not table.is_closed
        self._condemned.update(table.blocks)

    def drop_cache(self) -> None:
        pass

    def check(self) -> None:
        assert sorted([*self._free, *self._owner]) == list(range(self.num_blocks)), "a block was lost or doubled"
        for block, table in self._owner.items():
            assert list(table.blocks) == [block], f"block {block} is not where its owner thinks"
        assert self._condemned <= self._owner.keys(), "a condemned block is free"
