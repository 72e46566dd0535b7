"""BatchEngine end to end: a real model on a thread of this process, read from event loops."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.engine.scripted import INFO, ScriptedStep, request
from tests.running import EOS, engine_of, runtime_of
from worker_orcd.engine.core import EngineCore
from worker_orcd.engine.engine import BatchEngine
from worker_orcd.engine.loop import EngineFacts
from worker_orcd.engine.metrics import NoOpMetrics
from worker_orcd.engine.request import Event, Failed, Finished, Request, SamplingParams, Started, Tokens
from worker_orcd.engine.scheduler import SchedulerLimits
from worker_orcd.engine.score import score
from worker_orcd.errors import CudaError, ShuttingDown

SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48}
SMALL = {"max_batch": 8, "max_tokens_per_step": 24, "kv_block_size": 4, "context_length": 128}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("qwen2", **SIZES).write(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="module")
def shared(model: Path) -> Iterator[BatchEngine]:
    engine = engine_of(model, **SMALL)
    yield engine
    engine.close()
    assert not engine._link._thread.is_alive()  # type: ignore[attr-defined]


def of(name: str, seed: int = 1, **fields: float) -> Request:
    rng = random.Random(name)
    prompt = [rng.randrange(3, 260) for _ in range(rng.randint(1, 40))]
    sampling = SamplingParams(seed, **({"temperature": 1.1, "top_p": 0.95} | fields))  # type: ignore[arg-type]
    return Request(name, prompt, rng.randint(5, 25), sampling)


async def collect(engine: BatchEngine, req: Request) -> list[Event]:
    return [event async for event in engine.run(req)]


def ids(events: list[Event]) -> list[int]:
    """The answer, after a look at the order of the events."""
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Finished), events[-1]
    tokens = events[1:-1]
    assert all(isinstance(event, Tokens) for event in tokens)
    out: list[int] = []
    for event in tokens:
        assert event.index == len(out)  # type: ignore[union-attr]
        out += event.ids  # type: ignore[union-attr]
    return out


async def quiet(engine: BatchEngine) -> None:
    """Wait until the engine has nothing left, and has looked at its cache."""
    for _ in range(2):
        await collect(engine, of("last", temperature=0.0))
    status = engine.status()
    assert (status.num_running, status.num_waiting, status.blocks_used) == (0, 0, 0)
    assert status.ready


def test_greedy_tokens_are_the_argmax_of_the_scored_text(model: Path, shared: BatchEngine) -> None:
    req = of("greedy", temperature=0.0, top_p=1.0)
    out = ids(asyncio.run(collect(shared, req)))
    logits = score(runtime_of(model), req.prompt_ids + out, 128).clone()
    logits[:, 0] = -torch.inf
    assert out == logits[len(req.prompt_ids) - 1 : -1].argmax(1).tolist()[: len(out)]
    assert len(out) > 3


def test_many_streams_at_once_are_what_each_is_alone(shared: BatchEngine) -> None:
    requests = [of(str(i), seed=i) for i in range(40)]

    async def alone() -> list[list[int]]:
        return [ids(await collect(shared, req)) for req in requests]

    async def together() -> list[list[int]]:
        return [ids(events) for events in await asyncio.gather(*(collect(shared, req) for req in requests))]

    expected = asyncio.run(alone())
    assert asyncio.run(together()) == expected
    assert asyncio.run(together()) == expected, "and again, on another event loop and a warm cache"
    assert len({tuple(out) for out in expected}) > 30
    asyncio.run(quiet(shared))


def test_the_seed_decides(shared: BatchEngine) -> None:
    async def outs() -> list[list[int]]:
        return [ids(await collect(shared, of("text", seed=seed, temperature=1.9))) for seed in (1, 2, 2**64 - 1, 1)]

    one, two, top, again = asyncio.run(outs())
    assert one == again
    assert one != two != top


def test_readers_that_leave_harm_nobody_and_leave_nothing(shared: BatchEngine) -> None:
    async def leave_after(req: Request, num_events: int) -> None:
        stream = shared.run(req)
        for _ in range(num_events):
            if isinstance(await anext(stream), Finished):
                break
        await stream.aclose()

    async def scenario() -> None:
        stayers = [of(f"stay {i}", seed=i) for i in range(10)]
        expected = [ids(await collect(shared, req)) for req in stayers]
        leavers = [leave_after(of(f"leave {i}", seed=i), i % 4) for i in range(20)]
        cancels = [asyncio.create_task(collect(shared, of(f"cancel {i}", seed=i))) for i in range(10)]
        staying = [asyncio.create_task(collect(shared, req)) for req in stayers]
        leaving = asyncio.gather(*leavers)
        await asyncio.sleep(0.02)
        for i in range(10):
            shared.cancel(f"cancel {i}")
        assert [ids(events) for events in await asyncio.gather(*staying)] == expected
        for events in await asyncio.gather(*cancels):
            last = events[-1]
            assert isinstance(last, Finished) or (isinstance(last, Failed) and last.code == "CANCELLED")
        await leaving
        await quiet(shared)

    asyncio.run(scenario())


def test_an_event_loop_that_ends_in_the_middle_takes_its_requests_along(shared: BatchEngine) -> None:
    async def walk_away() -> None:
        asyncio.create_task(collect(shared, of("forgotten")))  # noqa: RUF006 - asyncio.run cancels it
        stream = shared.run(of("half read"))
        await anext(stream)

    for _ in range(3):
        asyncio.run(walk_away())
    asyncio.run(quiet(shared))
    assert ids(asyncio.run(collect(shared, of("forgotten"))))


class GatedStep(ScriptedStep):
    """Waits for `gate` before every step."""

    def launch(self, plan):  # type: ignore[no-untyped-def]
        self.entered.set()
        assert self.gate.wait(30)
        return super().launch(plan)


def gated(**fields: object) -> tuple[GatedStep, BatchEngine]:
    step = GatedStep(**fields)  # type: ignore[arg-type]
    step.gate, step.entered = threading.Event(), threading.Event()  # type: ignore[attr-defined]
    step.gate.set()  # type: ignore[attr-defined]
    core = EngineCore(step, SchedulerLimits(4, 16, 64), frozenset({EOS}), {})
    return step, BatchEngine(core, EngineFacts(INFO, step.num_blocks, step.block_size, 4, 0, 0.01), 8, NoOpMetrics())


def test_close_ends_every_stream_and_the_thread() -> None:
    step, engine = gated()

    async def scenario() -> None:
        step.gate.clear()  # type: ignore[attr-defined]
        tasks = [asyncio.create_task(collect(engine, request(name))) for name in "abcdef"]
        await asyncio.to_thread(step.entered.wait, 30)  # type: ignore[attr-defined]
        threading.Timer(0.05, step.gate.set).start()  # type: ignore[attr-defined]
        engine.close()
        for events in await asyncio.gather(*tasks):
            assert isinstance(events[-1], Failed)
            assert events[-1].code == "SHUTTING_DOWN"
        with pytest.raises(ShuttingDown):
            await collect(engine, request("late"))

    asyncio.run(scenario())
    engine.close()
    assert step.usage()[0] == 0
    assert not engine._link._thread.is_alive()  # type: ignore[attr-defined]


def test_a_lost_device_ends_every_stream_and_is_reported() -> None:
    def lose(chunk):  # type: ignore[no-untyped-def]
        if chunk.sequence.num_generated == 2:
            raise CudaError("the device is lost")

    _, engine = gated(on_chunk=lose)

    async def scenario() -> None:
        watch = asyncio.create_task(engine.watch())
        streams = await asyncio.gather(*(collect(engine, request(name)) for name in "ab"))
        for events in streams:
            assert events[-1] == Failed("CUDA_ERROR", "the device is lost", False)
        assert isinstance(await asyncio.wait_for(watch, 30), CudaError)
        assert not engine.status().ready

    asyncio.run(scenario())
    engine.close()


def test_blocks_that_are_lost_make_an_idle_engine_unready() -> None:
    step, engine = gated()

    async def scenario() -> None:
        await collect(engine, request("a"))
        step.allocator.grow(step.allocator.new_table(), 4)
        await collect(engine, request("b"))
        for _ in range(3000):
            if not engine.status().ready:
                break
            await asyncio.sleep(0.01)
        assert engine.status().reason == "1 blocks of the KV cache are lost: nobody runs"

    asyncio.run(scenario())
    engine.close()
