"""SerialEngine: order, ends, cancels and limits, on a scripted step; then the real step on a tiny model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.running import runtime_of
from worker_orcd.engine.engine import EngineLimits, SerialEngine
from worker_orcd.engine.metrics import NoOpMetrics
from worker_orcd.engine.request import Event, Failed, Finished, ModelInfo, Request, SamplingParams, Started, Token
from worker_orcd.engine.sampler import Sampler
from worker_orcd.engine.score import score
from worker_orcd.engine.sequence import Plan, Sequence
from worker_orcd.engine.step import PlainStep
from worker_orcd.errors import JobConflict, NumericFault, Overloaded, ShuttingDown
from worker_orcd.kv.allocator import ContiguousAllocator

EOS = 2
CONTEXT = 64


def info(context: int = CONTEXT) -> ModelInfo:
    return ModelInfo("m", "m.gguf", "qwen2", "F32", context, 321, "cpu", "test")


def request(name: str, *, max_tokens: int = 5, prompt: int = 3, timeout_s: float = 60.0) -> Request:
    return Request(name, [7] * prompt, max_tokens, SamplingParams(seed=1, temperature=0.0), timeout_s)


class ScriptedStep:
    """Emits 10, 11, 12 …; waits for `gate` before each step; `on_step` may raise."""

    def __init__(self, allocator: ContiguousAllocator) -> None:
        self.allocator = allocator
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()
        self.on_step: Callable[[Sequence], int | None] = lambda _: None
        self.chunks: list[int] = []

    def start(self, seq: Sequence) -> None:
        self.allocator.grow(seq.table, len(seq.tokens))

    def next_token(self, plan: Plan) -> list[list[int]]:
        self.entered.set()
        assert self.gate.wait(10)
        (chunk,) = plan
        self.chunks.append(chunk.num_tokens)
        samples, seq = chunk.samples, chunk.sequence
        forced = self.on_step(seq)
        seq.num_computed += chunk.num_tokens
        if not samples:
            return [[]]
        seq.tokens.append(10 + len(seq.generated) if forced is None else forced)
        return [[seq.tokens[-1]]]

    def free(self, seq: Sequence) -> None:
        self.allocator.release(seq.table)


class CountingMetrics(NoOpMetrics):
    def __init__(self) -> None:
        self.first, self.tokens, self.complete = [], [], []  # type: ignore[var-annotated]

    def record_first_token_latency(self, ms: float) -> None:
        self.first.append(ms)

    def record_token_generation(self, token_id: int) -> None:
        self.tokens.append(token_id)

    def record_inference_complete(self, total_ms: float) -> None:
        self.complete.append(total_ms)


class Rig:
    def __init__(self, max_queue: int = 2) -> None:
        self.allocator = ContiguousAllocator(1, CONTEXT)
        self.step, self.metrics = ScriptedStep(self.allocator), CountingMetrics()
        limits = EngineLimits(max_queue=max_queue, prefill_chunk=16, vram_bytes=0)
        self.engine = SerialEngine(info(), self.step, self.allocator, frozenset({EOS}), self.metrics, limits)

    def assert_empty(self) -> None:
        self.allocator.check()
        assert self.allocator.available() == self.allocator.num_blocks
        assert self.engine.status().num_running == self.engine.status().num_waiting == 0


@pytest.fixture
def rig():  # type: ignore[no-untyped-def]
    rig = Rig()
    yield rig
    rig.step.gate.set()
    rig.engine.close()
    rig.assert_empty()
    assert not rig.engine._thread.is_alive()


async def collect(engine: SerialEngine, req: Request) -> list[Event]:
    return [event async for event in engine.run(req)]


def kinds(events: list[Event]) -> list[type]:
    return [type(event) for event in events]


def test_events_come_in_order_and_timings_add_up(rig: Rig) -> None:
    events = asyncio.run(collect(rig.engine, request("a")))
    assert kinds(events) == [Started, Token, Token, Token, Token, Token, Finished]
    assert [e for e in events if isinstance(e, Token)] == [Token(10 + i, i) for i in range(5)]
    end = events[-1]
    assert isinstance(end, Finished)
    assert end.reason == "max_tokens"
    t = end.timings
    assert t.first_token_ms is not None
    assert 0 <= t.queue_ms <= t.total_ms
    assert 0 < t.first_token_ms <= t.decode_ms <= t.total_ms
    assert rig.metrics.tokens == [10, 11, 12, 13, 14]
    assert len(rig.metrics.first) == len(rig.metrics.complete) == 1


def test_end_of_generation_token_ends_and_is_not_emitted(rig: Rig) -> None:
    rig.step.on_step = lambda seq: EOS if len(seq.generated) == 2 else None
    events = asyncio.run(collect(rig.engine, request("a", max_tokens=50)))
    assert [e.id for e in events if isinstance(e, Token)] == [10, 11]
    assert isinstance(events[-1], Finished)
    assert events[-1].reason == "eos"


def test_full_context_ends(rig: Rig) -> None:
    events = asyncio.run(collect(rig.engine, request("a", max_tokens=1000, prompt=40)))
    assert isinstance(events[-1], Finished)
    assert events[-1].reason == "context_length"
    assert len(events) - 2 == CONTEXT - 40
    assert rig.step.chunks[:3] == [16, 16, 8], "the prompt goes through in chunks"


def test_requests_wait_their_turn_and_too_many_are_refused(rig: Rig) -> None:
    async def scenario() -> None:
        rig.step.gate.clear()
        tasks = [asyncio.create_task(collect(rig.engine, request(name))) for name in "abc"]
        await asyncio.sleep(0.05)
        with pytest.raises(Overloaded) as refused:
            await collect(rig.engine, request("d"))
        assert refused.value.retry_after_s >= 1
        with pytest.raises(JobConflict):
            await collect(rig.engine, request("b"))
        status = rig.engine.status()
        assert (status.num_running, status.num_waiting) == (1, 2)
        rig.step.gate.set()
        for events in await asyncio.gather(*tasks):
            assert kinds(events)[-1] is Finished
        await collect(rig.engine, request("b"))  # a name is free again once its request has ended

    asyncio.run(scenario())


def test_cancel_running_waiting_unknown_and_twice(rig: Rig) -> None:
    async def scenario() -> None:
        rig.step.gate.clear()
        running, waiting = (asyncio.create_task(collect(rig.engine, request(name))) for name in ("run", "wait"))
        await asyncio.to_thread(rig.step.entered.wait, 5)
        assert rig.engine.cancel("wait")
        events = await asyncio.wait_for(waiting, 1)  # at once, though the engine stands still
        assert events == [Failed("CANCELLED", "the request was cancelled", False)]
        assert not rig.engine.cancel("wait")
        assert not rig.engine.cancel("never heard of it")
        assert rig.engine.cancel("run")
        assert not rig.engine.cancel("run")
        events = await asyncio.wait_for(running, 1)
        assert isinstance(events[-1], Failed)
        assert events[-1].code == "CANCELLED"
        rig.step.gate.set()
        await collect(rig.engine, request("run", max_tokens=1))  # its name was free at once
        assert len(rig.step.chunks) == 2, "no step of its own after the cancel"

    asyncio.run(scenario())


def test_an_abandoned_iterator_frees_everything_within_one_step(rig: Rig) -> None:
    async def scenario() -> None:
        rig.step.on_step = lambda seq: rig.step.gate.clear() if len(seq.generated) == 3 else None
        stream = rig.engine.run(request("a", max_tokens=50))
        assert isinstance(await anext(stream), Started)
        for _ in range(4):
            await anext(stream)
        steps = len(rig.step.chunks)  # and the next step stands at the gate
        await stream.aclose()  # type: ignore[attr-defined]
        rig.step.gate.set()
        follower = await collect(rig.engine, request("a", max_tokens=1))
        assert kinds(follower) == [Started, Token, Finished]
        assert len(rig.step.chunks) == steps + 2

    asyncio.run(scenario())


def test_a_request_that_takes_too_long_ends_wherever_it_is(rig: Rig) -> None:
    async def scenario() -> None:
        rig.step.gate.clear()
        slow = asyncio.create_task(collect(rig.engine, request("slow", timeout_s=0.05)))
        await asyncio.to_thread(rig.step.entered.wait, 5)
        queued = asyncio.create_task(collect(rig.engine, request("queued", timeout_s=0.05)))
        fine = asyncio.create_task(collect(rig.engine, request("fine")))
        await asyncio.sleep(0.1)
        rig.step.gate.set()
        for events in (await slow, await queued):
            assert isinstance(events[-1], Failed)
            assert events[-1].code == "INFERENCE_TIMEOUT"
            assert events[-1].retriable
        assert kinds(await fine)[-1] is Finished

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("error", "code", "healthy"),
    [
        (NumericFault("not finite"), "NUMERIC_FAULT", True),
        (torch.OutOfMemoryError("secret prompt"), "VRAM_OOM", False),
        (ZeroDivisionError("secret prompt"), "INTERNAL", False),
    ],
)
def test_a_failing_step_fails_its_request_only(rig: Rig, error: Exception, code: str, healthy: bool) -> None:
    def fail(seq: Sequence) -> None:
        if len(seq.generated) == 1:
            raise error

    rig.step.on_step = fail
    events = asyncio.run(collect(rig.engine, request("a")))
    assert kinds(events) == [Started, Token, Failed]
    assert isinstance(events[-1], Failed)
    assert events[-1].code == code
    assert "secret" not in events[-1].message
    assert rig.engine.status().healthy is healthy
    rig.step.on_step = lambda _: None
    assert kinds(asyncio.run(collect(rig.engine, request("b"))))[-1] is Finished
    assert rig.engine.status().healthy


def test_close_ends_every_stream_and_refuses_new_work(rig: Rig) -> None:
    async def scenario() -> None:
        rig.step.gate.clear()
        tasks = [asyncio.create_task(collect(rig.engine, request(name))) for name in "ab"]
        await asyncio.to_thread(rig.step.entered.wait, 5)
        closing = asyncio.create_task(asyncio.to_thread(rig.engine.close))
        await asyncio.sleep(0.02)
        rig.step.gate.set()
        await closing
        for events in await asyncio.gather(*tasks):
            assert isinstance(events[-1], Failed)
            assert events[-1].code == "SHUTTING_DOWN"
        with pytest.raises(ShuttingDown):
            await collect(rig.engine, request("c"))

    asyncio.run(scenario())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("qwen2").write(tmp_path_factory.mktemp("model") / "tiny.gguf")


def generate(path: Path, prompt: list[int], params: SamplingParams, chunk: int) -> list[int]:
    runtime = runtime_of(path)
    limits = EngineLimits(max_queue=1, prefill_chunk=chunk, vram_bytes=0)
    step = PlainStep(runtime, Sampler([0]))
    engine = SerialEngine(info(512), step, runtime.allocator, frozenset({EOS}), NoOpMetrics(), limits)
    try:
        events = asyncio.run(collect(engine, Request("x", prompt, 24, params)))
    finally:
        engine.close()
    return [event.id for event in events if isinstance(event, Token)]


def test_greedy_tokens_are_the_argmax_of_the_scored_text(model: Path) -> None:
    prompt = list(range(5, 45))
    out = generate(model, prompt, SamplingParams(seed=0, temperature=0.0), chunk=128)
    logits = score(runtime_of(model), prompt + out, 128).clone()
    logits[:, 0] = -torch.inf
    assert out == logits[len(prompt) - 1 : -1].argmax(1).tolist()
    assert len(out) > 3


def test_chunking_and_repeating_change_no_token_and_no_logit(model: Path) -> None:
    prompt, hot = list(range(30, 100)), SamplingParams(seed=99, temperature=1.3, top_p=0.95)
    outs = [generate(model, prompt, hot, chunk) for chunk in (128, 128, 1, 7, 33)]
    assert all(out == outs[0] for out in outs)
    text = prompt + outs[0]
    whole = score(runtime_of(model), text, 512)
    for chunk in (1, 7, 64):
        assert torch.equal(score(runtime_of(model), text, chunk), whole)
    other = generate(model, prompt, SamplingParams(seed=100, temperature=1.3, top_p=0.95), 128)
    assert other != outs[0]
