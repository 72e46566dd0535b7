"""A KV allocator beside a naive model of it: every operation is done in both, and all they say is compared."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from worker_orcd.kv.allocator import BlockTable, CacheFull, ContiguousAllocator, KVCacheAllocator
from worker_orcd.kv.paged import PagedAllocator
from worker_orcd.kv.prefix import PrefixChain, root_key

KINDS = ("shared", "private", "contiguous")
Text = tuple[int, ...]


@dataclass(eq=False)
class Unit:
    """A block as the model sees it. `name` is (tenant, whole text up to its end) while others may find it."""

    block: int
    name: tuple[str, Text] | None = None
    is_condemned: bool = False


@dataclass(eq=False)
class Job:
    tenant: str
    text: Text
    table: BlockTable
    chain: PrefixChain
    units: list[Unit] = field(default_factory=list)

    def keys(self, tokens: int) -> list[bytes]:
        return self.chain.keys(self.text, tokens)


class Pair:
    """`jobs` are open; the model knows whose text each block holds, and finds everything by looking everywhere."""

    def __init__(self, num_blocks: int, block_size: int, kind: str = "shared") -> None:
        self.num_blocks, self.block_size, self.kind = num_blocks, block_size, kind
        self.erased: list[int] = []
        self.allocator: KVCacheAllocator
        if kind == "contiguous":
            self.allocator = ContiguousAllocator(num_blocks, block_size, self.erased.extend)
        else:
            self.allocator = PagedAllocator(num_blocks, block_size, self.erased.extend, share=kind == "shared")
        self.jobs: list[Job] = []
        self.public: dict[tuple[str, Text], Unit] = {}
        self.idle: list[Unit] = []  # public, held by nobody, oldest first
        self.num_evicted = 0
        self.to_erase: list[int] = []

    # ------------------------------------------------------------------ operations

    def admit(self, tenant: str, text: Text, spare: int = 0) -> Job | None:
        """Find what is known of `text`, all but its last token, and take blocks for the rest; None when full."""
        chain = PrefixChain(root_key(model="m", tenant=tenant), self.block_size)
        job = Job(tenant, text, self.allocator.new_table(), chain)
        self.jobs.append(job)
        names = self._names(job, len(text) - 1)
        while len(job.units) < len(names) and (unit := self.public.get(names[len(job.units)])) is not None:
            job.units.append(unit)
            if unit in self.idle:
                self.idle.remove(unit)
        assert self.allocator.reuse(job.table, job.keys(len(text) - 1)) == len(job.units)
        if self._grow(job, len(text), spare):
            return job
        self.release(job)
        return None

    def extend(self, job: Job, more: Text, spare: int = 0) -> None:
        if self._grow(job, len(job.text) + len(more), spare):
            for position in range(len(job.text), len(job.text) + len(more)):
                unit = job.units[position // self.block_size]
                assert unit.name is None, "a block others may find is written"
                assert self._holders(unit) == 1, "a shared block is written"
            job.text += more

    def publish(self, job: Job, tokens: int) -> None:
        self.allocator.publish(job.table, job.keys(tokens))
        if self.kind != "shared":
            return
        for i, name in enumerate(self._names(job, tokens)):
            mine, known = job.units[i], self.public.get(name)
            if mine.is_condemned:
                return
            if known is None:
                self.public[name], mine.name = mine, name
            elif known is not mine:
                if known in self.idle:
                    self.idle.remove(known)
                job.units[i] = known

    def release(self, job: Job) -> None:
        self.allocator.release(job.table)
        self.jobs.remove(job)
        for unit in reversed(job.units):
            if self._holders(unit) == 0:
                self._end(unit)

    def preempt(self, job: Job) -> None:
        self.release(job)
        self.admit(job.tenant, job.text)

    def condemn(self, job: Job) -> None:
        self.allocator.condemn(job.table)
        names = [unit.name for unit in job.units if unit.name is not None]
        for unit in job.units:
            unit.is_condemned = True
        for (tenant, text), unit in list(self.public.items()):
            if any(tenant == owner and text[: len(start)] == start for owner, start in names):
                del self.public[tenant, text]
                unit.name, unit.is_condemned = None, True
                if unit in self.idle:
                    self.idle.remove(unit)
                    self._end(unit)

    def drop_cache(self) -> None:
        self.allocator.drop_cache()
        while self.idle:
            self._evict()

    def use_closed(self, job: Job) -> None:
        """End `job`; whoever still has its table is told so, and changes nothing."""
        self.release(job)
        allocator, table = self.allocator, job.table
        for use in (
            lambda: allocator.grow(table, 1),
            lambda: allocator.reuse(table, []),
            lambda: allocator.publish(table, []),
            lambda: allocator.condemn(table),
            lambda: allocator.release(table),
        ):
            with pytest.raises(AssertionError):
                use()

    # ------------------------------------------------------------------ the model

    def _names(self, job: Job, tokens: int) -> list[tuple[str, Text]]:
        size = self.block_size
        return [(job.tenant, job.text[: end * size]) for end in range(1, tokens // size + 1)]

    def _holders(self, unit: Unit) -> int:
        return sum(unit in job.units for job in self.jobs)

    def _num_free(self) -> int:
        return self.num_blocks - len({unit for job in self.jobs for unit in job.units}) - len(self.idle)

    def _grow(self, job: Job, tokens: int, spare: int) -> bool:
        missing = max(0, -(-tokens // self.block_size) - len(job.units))
        fits = missing == 0 or missing + spare <= self._num_free() + len(self.idle)
        if self.kind == "contiguous" and tokens > self.block_size:
            fits = False
        if not fits:
            with pytest.raises(CacheFull):
                self.allocator.grow(job.table, tokens, spare)
            return False
        self.allocator.grow(job.table, tokens, spare)
        for block in job.table.blocks[len(job.units) : len(job.units) + missing]:
            if self._num_free() == 0:
                self._evict()
            job.units.append(Unit(block))
        return True

    def _evict(self) -> None:
        del self.public[self.idle.pop(0).name]  # type: ignore[arg-type]
        self.num_evicted += 1

    def _end(self, unit: Unit) -> None:
        if unit.name is not None:
            self.idle.append(unit)
        elif unit.is_condemned:
            self.to_erase.append(unit.block)

    # ------------------------------------------------------------------ what must hold after every operation

    def check(self) -> None:
        self.allocator.check()
        for job in self.jobs:
            assert list(job.table.blocks) == [unit.block for unit in job.units], "a table holds other blocks"
        units = {unit for job in self.jobs for unit in job.units} | set(self.idle)
        assert len({unit.block for unit in units}) == len(units), "one block stands for two texts"
        assert self.allocator.available() == self._num_free() + len(self.idle)
        assert self.allocator.num_idle() == len(self.idle)
        assert self.allocator.num_evicted == self.num_evicted
        assert sorted(self.erased) == sorted(self.to_erase), "condemned and erased are not the same"
        self.erased.clear()
        self.to_erase.clear()
        for (tenant, text), unit in self.public.items():
            parent = text[: -self.block_size]
            assert not parent or (tenant, parent) in self.public, "a block is found whose parent is not"
            assert not unit.is_condemned, "a condemned block is found"
        for unit in units:
            assert len({job.tenant for job in self.jobs if unit in job.units}) < 2, "two tenants share a block"

    def finish(self) -> None:
        """All end: nothing is lost."""
        while self.jobs:
            self.release(self.jobs[0])
            self.check()
        self.drop_cache()
        self.check()
        assert self.allocator.available() == self.num_blocks

    def state(self) -> tuple[object, ...]:
        """Pairs in equal states behave alike: tenants "a" and "b", symbols 0 and 1, jobs and blocks have no order."""
        return min(self._state(tenant, symbol) for tenant in "ab" for symbol in (0, 1))

    def _state(self, first: str, zero: int) -> tuple[object, ...]:
        """With tenant `first` called False and symbol `zero` called 0."""
        labels: dict[Unit, int] = {}

        def of(unit: Unit) -> tuple[int, bool, bool]:
            return labels.setdefault(unit, len(labels)), unit.is_condemned, unit.name is not None

        def name(tenant: str, text: Text) -> tuple[bool, Text]:
            return tenant != first, tuple(symbol ^ zero for symbol in text)

        named = sorted((name(job.tenant, job.text), index) for index, job in enumerate(self.jobs))
        jobs = tuple((text, tuple(map(of, self.jobs[index].units))) for text, index in named)
        return jobs, tuple(name(*unit.name) for unit in self.idle if unit.name is not None)
