"""The contract of a KVCacheAllocator."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from worker_orcd.kv.allocator import BlockTable, CacheFull, ContiguousAllocator
from worker_orcd.kv.pool import KVShape, allocate_pool


def table_of(allocator: ContiguousAllocator) -> BlockTable:
    return BlockTable(allocator.block_size)


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["grow", "release"]), st.integers(1, 40)), max_size=60))
def test_random_use_loses_nothing(operations: list[tuple[int, str, int]]) -> None:
    allocator = ContiguousAllocator(num_sequences=3, max_tokens=32)
    tables = [table_of(allocator) for _ in range(6)]
    for which, operation, tokens in operations:
        table, before = tables[which], (allocator.available(), list(tables[which].blocks))
        if operation == "release":
            allocator.release(table)
            assert table.capacity_tokens == 0
        else:
            try:
                allocator.grow(table, tokens)
                assert table.capacity_tokens >= tokens
            except CacheFull:
                assert (allocator.available(), table.blocks) == before
        allocator.check()
        owned = [block for t in tables for block in t.blocks]
        assert len(owned) == len(set(owned)) == allocator.num_blocks - allocator.available()
    for table in tables:
        allocator.release(table)
    assert allocator.available() == allocator.num_blocks


def test_check_finds_a_lost_and_a_doubled_block() -> None:
    allocator = ContiguousAllocator(2, 8)
    table = table_of(allocator)
    allocator.grow(table, 8)
    allocator._free.append(table.blocks[0])
    with pytest.raises(AssertionError):
        allocator.check()
    allocator._free.clear()
    with pytest.raises(AssertionError):
        allocator.check()


def test_pool_is_zeroed_and_as_large_as_it_says() -> None:
    shape = KVShape(3, num_blocks=2, block_size=5, num_kv_heads=4, head_dim=6, dtype=torch.float16)
    pool = allocate_pool(shape, torch.device("cpu"))
    assert sum(layer.k.nbytes + layer.v.nbytes for layer in pool) == shape.nbytes == 2 * 3 * 2 * 5 * 4 * 6 * 2
    assert not any(layer.k.any() or layer.v.any() for layer in pool)
