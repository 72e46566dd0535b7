"""The engine keeps its promises in every world we can think of, and then some."""

from __future__ import annotations

import random

import pytest

from tests.sim.driver import FEATURES, simulate
from tests.sim.fakes import EOS, FakeStep, Faults, Memory, Truth
from worker_orcd.engine.core import EngineCore
from worker_orcd.engine.request import Request, SamplingParams
from worker_orcd.engine.scheduler import SchedulerLimits
from worker_orcd.kv.allocator import ContiguousAllocator


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_promises_hold_in_random_worlds(first: int) -> None:
    for seed in range(first, first + 50):
        simulate(seed, num_requests=120)


@pytest.mark.parametrize("feature", FEATURES)
def test_promises_hold_when_one_thing_goes_wrong(feature: str) -> None:
    for seed in range(3):
        simulate(seed, frozenset({feature}))


def test_the_same_seed_lives_the_same_life() -> None:
    lives = [[simulate(seed, num_requests=50) for seed in range(10)] for _ in range(2)]
    assert lives[0] == lives[1]
    assert len(set(lives[0])) == 10


def test_a_contiguous_cache_is_used_to_the_last_place() -> None:
    limits = SchedulerLimits(8, 64, 32)
    step = FakeStep(ContiguousAllocator(4, 32), Memory(4, 32), True, Faults(random.Random(0), {}), limits)
    core = EngineCore(step, limits, frozenset({EOS}), {"model": "m"})
    for number in range(6):
        request = Request(str(number), [2, 3, 4], 20, SamplingParams(0))
        step.truths[number] = Truth(request, 0, 23)
        core.submit(number, request)
    stats = core.tick().stats
    assert stats is not None
    assert (stats.num_running, stats.num_waiting) == (4, 2)
