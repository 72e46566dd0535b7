"""PlainStep on a tiny model that fails in chosen ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.engine.scripted import request
from tests.running import EOS, last_tokens, runtime_of
from worker_orcd.backends.batch import Batch, LayerKV
from worker_orcd.engine.core import EngineCore
from worker_orcd.engine.plain_step import PlainStep
from worker_orcd.engine.request import Event, Failed, Request
from worker_orcd.engine.runtime import Runtime
from worker_orcd.engine.sampler import Sampler
from worker_orcd.engine.scheduler import SchedulerLimits
from worker_orcd.errors import CudaError
from worker_orcd.models.adapter import ModelAdapter

BAD = 299  # the token that brings harm


class Faulty:
    """A model; `harm` changes the logits of rows of a batch that holds BAD, or raises."""

    def __init__(self, adapter: ModelAdapter, harm: Callable[[Tensor], None]) -> None:
        self.adapter, self.harm = adapter, harm

    def forward(self, batch: Batch, kv: list[LayerKV]) -> Tensor:
        logits = self.adapter.forward(batch, kv)
        for row, token in enumerate(last_tokens(batch).tolist()):
            if token == BAD:
                self.harm(logits[row])
        return logits


def poison(row: Tensor) -> None:
    row[7] = torch.nan


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48}
    path = tiny.build("qwen2", **sizes).write(tmp_path_factory.mktemp("model") / "tiny.gguf")
    return runtime_of(path, kv_block_size=4, context_length=64, max_batch=4)


def core_of(runtime: Runtime, harm: Callable[[Tensor], None], overlaps: bool) -> EngineCore:
    step = PlainStep(replace(runtime, adapter=Faulty(runtime.adapter, harm)), Sampler([0, BAD], runtime.device))
    step.overlaps = overlaps
    return EngineCore(step, SchedulerLimits(4, 64, 64), frozenset({EOS}), {})


def run(core: EngineCore, *requests: Request) -> list[list[Event]]:
    events: list[list[Event]] = [[] for _ in requests]
    for i, req in enumerate(requests):
        core.submit(i + 1, req)
    while core.has_work:
        for number, event in core.tick().events:
            events[number - 1].append(event)
    assert core.check() == ""
    core.drop_cache()  # the allocator is the next core's too
    return events


@pytest.mark.parametrize("overlaps", [False, True])
def test_nan_ends_one_request_and_its_blocks_are_erased(runtime: Runtime, overlaps: bool) -> None:
    for layer in runtime.kv:
        layer.k.fill_(5.0)
        layer.v.fill_(5.0)
    good = request("good", prompt=list(range(10, 20)), max_tokens=2)  # needs no block that was erased
    bad = request("bad", prompt=[*range(30, 40), BAD])
    (alone,) = run(core_of(runtime, poison, overlaps), good)
    tokens, (started, failed) = run(core_of(runtime, poison, overlaps), good, bad)
    assert tokens[1:-1] == alone[1:-1]
    assert started.cached_tokens == 0
    assert isinstance(failed, Failed)
    assert (failed.code, failed.message) == ("NUMERIC_FAULT", "logits for position 11: not finite")
    for layer in runtime.kv:
        erased = (layer.k == 0).flatten(1).all(1)
        assert erased.sum() == 3, "11 positions in blocks of 4"
        assert torch.equal(erased, (layer.v == 0).flatten(1).all(1))


@pytest.mark.parametrize("overlaps", [False, True])
def test_device_memory_that_runs_out_ends_the_request_that_needs_it(runtime: Runtime, overlaps: bool) -> None:
    def no_memory(_: Tensor) -> None:
        raise torch.OutOfMemoryError("secret prompt")

    good, bad = request("good", prompt=list(range(10, 20))), request("bad", prompt=[30, BAD])
    (alone,) = run(core_of(runtime, no_memory, overlaps), good)
    tokens, failed = run(core_of(runtime, no_memory, overlaps), good, bad)
    assert tokens[1:-1] == alone[1:-1]
    assert isinstance(failed[-1], Failed)
    assert (failed[-1].code, failed[-1].retriable) == ("VRAM_OOM", True)
    assert "secret" not in failed[-1].message


def test_a_device_that_fails_ends_the_engine(runtime: Runtime) -> None:
    def broken(_: Tensor) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access\nmore")

    core = core_of(runtime, broken, overlaps=True)
    core.submit(1, request("bad", prompt=[30, BAD]))
    with pytest.raises(CudaError, match=r"the device failed: CUDA error: an illegal memory access$"):
        core.tick()
    core.fail_all(CudaError("over"))
