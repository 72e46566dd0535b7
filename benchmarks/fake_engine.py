"""An engine without a model: everything of the real one but the forward pass and the search for the likeliest token.

Scheduler, paged cache, prefix keys, packing, the integers of recorded steps, sampling parameters and messages are the
worker's own, and go the way they go on a GPU: steps of decodes only are "recorded", a "kernel" samples. A token is a
letter that depends on (seed, position) alone, so answers are reproducible and never end by themselves. As the main
module of a child process (`python -m fake_engine ADDRESS`, see engine/process.py) it takes FakeOptions as JSON.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from fake_options import CRASH_STATUS, FATAL_SEED, FakeOptions, Fault
from torch import Tensor

from worker_orcd.backends.batch import Batch
from worker_orcd.engine.core import EngineCore
from worker_orcd.engine.graphs import Graphs, Recording
from worker_orcd.engine.loop import Broken, EngineFacts, warm_up
from worker_orcd.engine.plain_step import PlainStep
from worker_orcd.engine.process import FATAL_EXIT, EngineHost, Progress
from worker_orcd.engine.request import ModelInfo
from worker_orcd.engine.runtime import Runtime
from worker_orcd.engine.sampler import Sampler, SamplingBatch
from worker_orcd.engine.scheduler import SchedulerLimits
from worker_orcd.engine.sequence import Plan
from worker_orcd.engine.step import Launched, Result
from worker_orcd.errors import CudaError, ModelLoadFailed
from worker_orcd.kv.paged import PagedAllocator

LETTERS = 26
FIRST_LETTER = ord("a")


class FakeAdapter:
    """In place of a model: one number a row, which nobody looks at."""

    def forward(self, batch: Batch, kv: list[Any]) -> Tensor:  # noqa: ARG002 - as ModelAdapter has it
        return torch.zeros(len(batch.tokens if batch.sample_rows is None else batch.sample_rows), 1)


class FakeSampler(Sampler):
    """The draw of (seed, position) is the token, with the kernel and without."""

    def __init__(self, device: torch.device) -> None:
        super().__init__([], device, kernel=fake_kernel)

    def sample(self, logits: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        tokens = letters(batch.uniform[:, 0])
        return tokens, torch.ones(len(tokens), dtype=torch.bool)


def fake_kernel(logits: Tensor, table: Tensor, place: Tensor | None, is_greedy: bool) -> Tensor:  # noqa: ARG001
    """As SampleKernel has it."""
    tokens = letters(table[5])
    found = torch.stack([tokens, torch.ones_like(tokens)])
    return found if place is None else place[: found.numel()].view(found.shape).copy_(found)


def letters(draws: Tensor) -> Tensor:
    return (draws * LETTERS).long() + FIRST_LETTER


def record(work: Callable[[], Tensor]) -> Recording:
    """A repetition that takes no time."""
    return lambda: None, work()


@dataclass
class FakeLaunched:
    """Done when the device would be."""

    plan: Plan
    real: Launched
    done_s: float

    def wait(self) -> list[Result]:
        if (rest_s := self.done_s - time.monotonic()) > 0:
            time.sleep(rest_s)
        return self.real.wait()


class FakeStep(PlainStep):
    """PlainStep on a device that takes `step_ms` for a step, whatever is in it."""

    def __init__(self, options: FakeOptions) -> None:
        allocator = PagedAllocator(options.num_blocks, options.block_size)
        device = torch.device("cpu")
        runtime = Runtime(FakeAdapter(), [], allocator, device)
        super().__init__(runtime, FakeSampler(device), Graphs(runtime, options.context_length, record))
        self.overlaps = True
        self._step_s, self._done_s = options.step_ms / 1e3, 0.0
        self._has_fatal_seed = options.fault == "cuda"

    def launch(self, plan: Plan) -> Launched:
        if self._has_fatal_seed and any(c.sequence.request.sampling.seed == FATAL_SEED for c in plan):
            raise CudaError("an illegal memory access was encountered")
        real = super().launch(plan)
        self._done_s = max(self._done_s, time.monotonic()) + self._step_s
        return FakeLaunched(real.plan, real, self._done_s)


def build_fake_core(options: FakeOptions) -> tuple[EngineCore, EngineFacts]:
    torch.set_num_threads(1)  # all tensors are small
    limits = SchedulerLimits(options.max_batch, options.max_step_tokens, options.context_length)
    core = EngineCore(FakeStep(options), limits, frozenset(), {"model": "fake"})
    slowest_s = warm_up(core, options.max_step_tokens, options.context_length)
    info = ModelInfo(
        name="fake", path="", architecture="none", quant_kind="none", context_length=options.context_length,
        vocab_size=257, device="cpu", backend="fake",
    )  # fmt: skip
    facts = EngineFacts(info, options.num_blocks, options.block_size, options.max_batch, 0, slowest_s)
    return core, facts


def main() -> int:
    host = EngineHost(sys.argv[1])
    options = msgspec.json.decode(host.setup(), type=FakeOptions)
    try:
        _load(host, options.fault)
        core, facts = build_fake_core(options)
    except Exception as error:
        host.tell(Broken.by(error))
        host.end()
        return FATAL_EXIT
    host.tell(facts)
    return host.serve(core)


def _load(host: EngineHost, fault: Fault) -> None:
    host.tell(Progress(0, 0, 1))
    if fault == "refuse-load":
        raise ModelLoadFailed("the fake model is refused, as asked")
    if fault == "crash-load":
        os._exit(CRASH_STATUS)
    if fault == "hang-load":
        time.sleep(1e6)
    host.tell(Progress(100, 1, 1))


if __name__ == "__main__":
    sys.exit(main())
