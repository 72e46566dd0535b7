"""Who owns which block of the KV cache. Plain integers; the tensors are in kv/pool.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


class CacheFull(Exception):
    """No block is free; nothing was taken."""


@dataclass
class BlockTable:
    """The blocks of one sequence, in order of position."""

    block_size: int  # tokens a block holds
    blocks: list[int] = field(default_factory=list)

    @property
    def capacity_tokens(self) -> int:
        return len(self.blocks) * self.block_size


class KVCacheAllocator(Protocol):
    """Every block is free or owned by exactly one table. A paged allocator drops in here."""

    block_size: int
    num_blocks: int

    def new_table(self) -> BlockTable: ...

    def available(self) -> int:
        """Free blocks."""
        ...

    def grow(self, table: BlockTable, tokens: int) -> None:
        """Give `table` room for `tokens` tokens in all. Raises CacheFull and then leaves all as it was."""
        ...

    def release(self, table: BlockTable) -> None:
        """Take every block back; releasing an empty table is fine."""
        ...

    def check(self) -> None:
        """Assert that every block is free or owned, exactly once."""
        ...


class ContiguousAllocator:
    """A sequence owns one block, as long as the longest sequence may become."""

    def __init__(self, num_sequences: int, max_tokens: int) -> None:
        assert num_sequences > 0
        assert max_tokens > 0
        self.block_size, self.num_blocks = max_tokens, num_sequences
        self._free = list(range(num_sequences))
        self._owned: set[int] = set()

    def new_table(self) -> BlockTable:
        return BlockTable(self.block_size)

    def available(self) -> int:
        return len(self._free)

    def grow(self, table: BlockTable, tokens: int) -> None:
        if tokens <= table.capacity_tokens:
            return
        if tokens > self.block_size or not self._free:
            raise CacheFull(f"{tokens} tokens need a block of {self.block_size}; {len(self._free)} are free")
        block = self._free.pop()
        self._owned.add(block)
        table.blocks.append(block)

    def release(self, table: BlockTable) -> None:
        for block in table.blocks:
            self._owned.remove(block)
            self._free.append(block)
        table.blocks.clear()

    def check(self) -> None:
        assert sorted([*self._free, *self._owned]) == list(range(self.num_blocks)), "a block was lost or doubled"
