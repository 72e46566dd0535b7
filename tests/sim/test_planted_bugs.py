"""Who tests the tests: twelve bugs, each planted in the real classes, each found by a few seeds."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.kv.drivers import drive
from tests.sim.driver import simulate
from worker_orcd.engine import core
from worker_orcd.engine.core import EngineCore
from worker_orcd.engine.request import Event
from worker_orcd.engine.scheduler import Scheduler
from worker_orcd.engine.sequence import Plan, Sequence
from worker_orcd.engine.step import Launched
from worker_orcd.kv.allocator import BlockTable
from worker_orcd.kv.paged import PagedAllocator
from worker_orcd.kv.prefix import root_key

Patch = pytest.MonkeyPatch


def skip_one_decrement(patch: Patch) -> None:
    let_go = PagedAllocator._let_go

    def planted(self: PagedAllocator, block: int) -> None:
        if self._blocks[block].num_holders != 2:
            let_go(self, block)

    patch.setattr(PagedAllocator, "_let_go", planted)


def publish_before_confirm(patch: Patch) -> None:
    launch = EngineCore._launch

    def planted(self: EngineCore, plan: Plan) -> Launched:
        launched = launch(self, plan)
        for seq in {chunk.sequence for chunk in launched.plan}:
            self._step.confirm(seq, min(seq.num_computed, len(seq.tokens)))
        return launched

    patch.setattr(EngineCore, "_launch", planted)


def free_twice_on_cancel_during_prefill(patch: Patch) -> None:
    def planted(self: EngineCore, number: int) -> None:
        seq = self._sequences.get(number)
        if seq is not None and seq.table is not None and seq.num_generated == 0:
            self._step.allocator.release(seq.table)  # type: ignore[attr-defined]
        cancel(self, number)

    cancel = EngineCore.cancel
    patch.setattr(EngineCore, "cancel", planted)


def forget_pin(patch: Patch) -> None:
    def planted(self: EngineCore, seq: Sequence) -> None:
        if seq.table is not None:
            self._step.free(seq)

    patch.setattr(EngineCore, "_release", planted)


def untagged_key(patch: Patch) -> None:
    patch.setattr(core, "root_key", lambda tenant, **scope: root_key(**scope))  # noqa: ARG005


def evict_parent_first(patch: Patch) -> None:
    def planted(self: PagedAllocator) -> int:
        block, _ = self._idle.popitem()
        self._unlink(block)
        self.num_evicted += 1
        return block

    patch.setattr(PagedAllocator, "_evict", planted)


def off_by_one_in_ceil(patch: Patch) -> None:
    grow = PagedAllocator.grow

    def planted(self: PagedAllocator, table: BlockTable, tokens: int, spare: int = 0) -> None:
        grow(self, table, tokens // self.block_size * self.block_size + 1, spare)

    patch.setattr(PagedAllocator, "grow", planted)


def reuse_without_zeroing(patch: Patch) -> None:
    let_go = PagedAllocator._let_go

    def planted(self: PagedAllocator, block: int) -> None:
        if self._blocks[block].num_holders == 1:
            self._blocks[block].is_condemned = False
        let_go(self, block)

    patch.setattr(PagedAllocator, "_let_go", planted)


def global_cancel_flag(patch: Patch) -> None:
    def planted(self: EngineCore, number: int) -> None:
        cancel(self, number)
        if self._scheduler.running:  # the flag is still up when the next one looks at it
            cancel(self, self._scheduler.running[0].number)

    cancel = EngineCore.cancel
    patch.setattr(EngineCore, "cancel", planted)


def late_completion_asserted_away(patch: Patch) -> None:
    def planted(self: EngineCore) -> None:
        assert self._in_flight is not None
        assert not any(chunk.sequence.has_ended for chunk in self._in_flight.plan)
        settle(self)

    settle = EngineCore._settle
    patch.setattr(EngineCore, "_settle", planted)


def reserved_block_counted_as_free(patch: Patch) -> None:
    patch.setattr(Scheduler, "_set_aside", lambda self: 0)  # noqa: ARG005


def terminal_event_twice(patch: Patch) -> None:
    def planted(self: EngineCore, seq: Sequence, event: Event) -> None:
        is_in_flight = seq.num_in_flight > 0
        end(self, seq, event)
        if is_in_flight and len(self._events) > 1:
            self._events.append((seq.number, event))

    end = EngineCore._end
    patch.setattr(EngineCore, "_end", planted)


BUGS = (
    skip_one_decrement,
    publish_before_confirm,
    free_twice_on_cancel_during_prefill,
    forget_pin,
    untagged_key,
    evict_parent_first,
    off_by_one_in_ceil,
    reuse_without_zeroing,
    global_cancel_flag,
    late_completion_asserted_away,
    reserved_block_counted_as_free,
    terminal_event_twice,
)
MOST_SEEDS = 60


@pytest.mark.parametrize("bug", BUGS)
def test_every_planted_bug_is_found(bug: Callable[[Patch], None], monkeypatch: Patch) -> None:
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        live(use_the_allocator if bug is evict_parent_first else simulate)


def use_the_allocator(seed: int) -> None:
    """For what only costs hits, and breaks no promise of the engine."""
    drive(seed, 100)


def live(life: Callable[[int], object]) -> None:
    for seed in range(MOST_SEEDS):
        life(seed)
