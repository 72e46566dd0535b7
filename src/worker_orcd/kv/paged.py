"""PagedAllocator: small blocks, given out one by one, shared between sequences that begin alike."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from worker_orcd.kv.allocator import BlockTable, CacheFull, no_erase


@dataclass(eq=False)
class _Block:
    """`key` and `parent` are set while the block can be found; `children` are found blocks that follow it."""

    num_holders: int = 0
    key: bytes | None = None
    parent: int | None = None  # None for the first block of a text
    children: set[int] = field(default_factory=set)
    is_condemned: bool = False


class PagedAllocator:
    """Implements KVCacheAllocator. With `share` off nothing is kept for reuse.

    A sequence that holds a published block holds its parent too (`publish` sees to that), and gives blocks up last
    first. So in `_idle`, oldest first, children stand before their parents, and what is evicted has no children.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        erase: Callable[[list[int]], None] = no_erase,
        share: bool = True,
    ) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks, self.block_size = num_blocks, block_size
        self.num_evicted = 0  # cached blocks given up so far
        self._erase, self._share = erase, share
        self._blocks = [_Block() for _ in range(num_blocks)]
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._by_key: dict[bytes, int] = {}
        self._tables: set[BlockTable] = set()

    def new_table(self) -> BlockTable:
        table = BlockTable(self.block_size)
        self._tables.add(table)
        return table

    def available(self) -> int:
        return len(self._free) + len(self._idle)

    def num_idle(self) -> int:
        return len(self._idle)

    def reuse(self, table: BlockTable, keys: Sequence[bytes]) -> int:
        assert not table.is_closed
        assert not table.blocks
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            self._hold(block)
            table.blocks.append(block)
        table.num_published = len(table.blocks)
        return table.num_published

    def grow(self, table: BlockTable, tokens: int, spare: int = 0) -> None:
        assert not table.is_closed
        missing = -(-tokens // self.block_size) - len(table.blocks)
        if missing <= 0:
            return
        if missing + spare > self.available():
            raise CacheFull(
                f"{tokens} tokens need {missing} more blocks; {self.available()} can be had, {spare} kept"
            )
        for _ in range(missing):
            block = self._free.pop() if self._free else self._evict()
            self._blocks[block].num_holders = 1
            table.blocks.append(block)

    def publish(self, table: BlockTable, keys: Sequence[bytes]) -> None:
        assert not table.is_closed
        assert len(keys) <= len(table.blocks)
        if not self._share:
            return
        for i in range(table.num_published, len(keys)):
            parent = table.blocks[i - 1] if i else None
            if parent is not None and self._blocks[parent].key != keys[i - 1]:
                return  # the parent was condemned: what follows it stays private
            self._publish_one(table, i, keys[i], parent)
            table.num_published = i + 1

    def _publish_one(self, table: BlockTable, i: int, key: bytes, parent: int | None) -> None:
        mine, known = table.blocks[i], self._by_key.get(key)
        if self._blocks[mine].is_condemned:
            return
        if known is None:
            self._by_key[key] = mine
            self._blocks[mine].key, self._blocks[mine].parent = key, parent
            if parent is not None:
                self._blocks[parent].children.add(mine)
        elif known != mine:
            self._hold(known)
            table.blocks[i] = known
            self._let_go(mine)

    def release(self, table: BlockTable) -> None:
        assert not table.is_closed
        table.is_closed = True
        self._tables.remove(table)
        for block in reversed(table.blocks):
            self._let_go(block)
        del table.blocks[:]

    def condemn(self, table: BlockTable) -> None:
        assert not table.is_closed
        for block in table.blocks:
            self._blocks[block].is_condemned = True
            self._forget(block)

    def drop_cache(self) -> None:
        while self._idle:
            self._free.append(self._evict())

    def _hold(self, block: int) -> None:
        if self._blocks[block].num_holders == 0:
            del self._idle[block]
        self._blocks[block].num_holders += 1

    def _let_go(self, block: int) -> None:
        state = self._blocks[block]
        assert state.num_holders > 0, f"block {block} is released once too often"
        state.num_holders -= 1
        if state.num_holders:
            return
        if state.key is not None:
            self._idle[block] = None
            return
        if state.is_condemned:
            state.is_condemned = False
            self._erase([block])
        self._free.append(block)

    def _evict(self) -> int:
        """Give up the block that nobody has used for longest; the caller owns it now."""
        block, _ = self._idle.popitem(last=False)
        assert not self._blocks[block].children, f"block {block} is evicted before what follows it"
        self._unlink(block)
        self.num_evicted += 1
        return block

    def _forget(self, block: int) -> None:
        """Nobody finds `block` any more, nor what follows it: that was computed from its content."""
        pending = [block]
        while pending:
            lost = pending.pop()
            state = self._blocks[lost]
            pending += state.children
            if state.key is None:
                continue
            self._unlink(lost)
            state.is_condemned = True
            if state.num_holders == 0:
                del self._idle[lost]
                state.is_condemned = False
                self._erase([lost])
                self._free.append(lost)

    def _unlink(self, block: int) -> None:
        state = self._blocks[block]
        assert state.key is not None
        del self._by_key[state.key]
        if state.parent is not None:
            self._blocks[state.parent].children.discard(block)
        state.key, state.parent, state.children = None, None, set()

    def check(self) -> None:
        holders = [0] * self.num_blocks
        for table in self._tables:
            assert len(set(table.blocks)) == len(table.blocks), "a table holds a block twice"
            for block in table.blocks:
                holders[block] += 1
        held = [block for block, count in enumerate(holders) if count]
        everywhere = sorted([*self._free, *self._idle, *held])
        assert everywhere == list(range(self.num_blocks)), "a block was lost or doubled"
        for block, state in enumerate(self._blocks):
            assert state.num_holders == holders[block], f"block {block} has {holders[block]} holders, not as counted"
            assert (state.key is not None) == (self._by_key.get(state.key or b"") == block), "key and block disagree"
            assert state.key is not None or not state.children, f"block {block} cannot be found, its children can"
            assert all(self._blocks[child].parent == block for child in state.children), "a child has other parents"
            assert not (state.is_condemned and holders[block] == 0), f"block {block} is free and was not erased"
        assert all(self._blocks[block].key is not None for block in self._idle), "an idle block cannot be found"
        assert not any(self._blocks[block].key for block in self._free), "a free block can be found"
