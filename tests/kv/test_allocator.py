"""The allocators against a naive model, and the memory behind them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.kv.drivers import AllocatorMachine, drive_all, search
from tests.kv.model import KINDS, Pair
from worker_orcd.kv.pool import KVShape, allocate_pool, eraser


def test_any_use_agrees_with_the_model() -> None:
    run_state_machine_as_test(
        AllocatorMachine,
        settings=settings(max_examples=200, stateful_step_count=60),
    )


def test_long_use_agrees_with_the_model() -> None:
    drive_all(100_000)


def test_every_short_use_agrees_with_the_model() -> None:
    assert search(depth=5) > 4000


@pytest.mark.parametrize("kind", KINDS)
def test_check_finds_a_lost_and_a_doubled_block(kind: str) -> None:
    pair = Pair(2, 8, kind)
    job = pair.admit("a", (1, 2))
    assert job is not None
    pair.allocator._free.append(job.table.blocks[0])  # type: ignore[attr-defined]
    with pytest.raises(AssertionError):
        pair.allocator.check()
    pair.allocator._free.clear()  # type: ignore[attr-defined]
    with pytest.raises(AssertionError):
        pair.allocator.check()


def test_pool_is_zeroed_as_large_as_it_says_and_erased_by_block() -> None:
    shape = KVShape(3, num_blocks=2, block_size=5, num_kv_heads=4, head_dim=6, dtype=torch.float16)
    pool = allocate_pool(shape, torch.device("cpu"))
    assert sum(layer.k.nbytes + layer.v.nbytes for layer in pool) == shape.nbytes == 2 * 3 * 2 * 5 * 4 * 6 * 2
    assert not any(layer.k.any() or layer.v.any() for layer in pool)
    for layer in pool:
        layer.k.fill_(torch.nan)
        layer.v.fill_(torch.nan)
    eraser(pool)([1])
    assert all(layer.k[0].isnan().all() and layer.v[0].isnan().all() for layer in pool)
    assert not any(layer.k[1].any() or layer.v[1].any() for layer in pool)
