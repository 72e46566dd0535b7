"""EngineClient over a link without an engine: the test speaks for the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
import pytest

from tests.engine.scripted import INFO, request
from worker_orcd.engine.client import WATCH_S, EngineClient
from worker_orcd.engine.core import Output
from worker_orcd.engine.loop import Broken, Cancel, Command, EngineFacts, Message, Report, Submit
from worker_orcd.engine.metrics import NoOpMetrics
from worker_orcd.engine.request import Event, Failed, Finished, Request, Started, StepStats, Timings, Tokens
from worker_orcd.errors import CudaError, Internal, JobConflict, Overloaded, ShuttingDown, WorkerError

DONE = Finished("max_tokens", Timings(0.0, 1.0, 2.0, 2.0))
CANCELLED = Failed("CANCELLED", "the request was cancelled", False)


class FakeLink:
    def __init__(self) -> None:
        self.sent: list[Command] = []
        self.gone: WorkerError | None = None
        self.num_attached, self.closed = 0, list[bool]()
        self.cpu_per_look_s, self._cpu_s = 0.0, 0.0
        self.receive: Callable[[Message], None] = lambda _: None

    def attach(self, loop: asyncio.AbstractEventLoop, receive: Callable[[Message], None]) -> None:
        assert loop is asyncio.get_running_loop()
        self.num_attached += 1
        self.receive = receive

    def send(self, command: Command) -> None:
        self.sent.append(command)

    def failure(self) -> WorkerError | None:
        return self.gone

    def cpu_s(self) -> float:
        self._cpu_s += self.cpu_per_look_s
        return self._cpu_s

    def close(self, is_orderly: bool = True) -> None:
        self.closed.append(is_orderly)

    def say(self, *events: tuple[int, Event], stats: StepStats | None = None, drift: str = "") -> None:
        self.receive(Report(Output(list(events), stats, drift)))


class CountingMetrics(NoOpMetrics):
    def __init__(self) -> None:
        self.cancels, self.queued, self.steps = list[float](), list[float](), list[StepStats]()

    def record_cancel_latency(self, ms: float) -> None:
        self.cancels.append(ms)

    def record_queue_time(self, ms: float) -> None:
        self.queued.append(ms)

    def record_step(self, stats: StepStats) -> None:
        self.steps.append(stats)


def step_stats(step_ms: float = 1.0, num_running: int = 1) -> StepStats:
    return StepStats(1, 1, 1, step_ms, num_running, 0, 5, 2, 0, 0, 0, 0)


class Rig:
    def __init__(
        self, max_batch: int = 2, max_queue: int = 1, slowest_step_s: float = 0.01, backend: str = "test"
    ) -> None:
        self.link, self.metrics = FakeLink(), CountingMetrics()
        info = msgspec.structs.replace(INFO, backend=backend)
        facts = EngineFacts(info, 16, 4, max_batch, 1000, slowest_step_s)
        self.client = EngineClient(self.link, facts, max_queue, self.metrics)

    async def open(self, name: str, **fields: object) -> asyncio.Task[list[Event]]:
        """A reader that takes what comes; the request has been sent when this returns."""
        task = asyncio.create_task(self.read(request(name, **fields)))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        return task

    async def read(self, req: Request) -> list[Event]:
        return [event async for event in self.client.run(req)]

    def look(self, seconds: float) -> None:
        for _ in range(round(seconds / WATCH_S)):
            self.client._look()


def test_events_reach_their_reader_in_order() -> None:
    async def scenario() -> None:
        rig = Rig()
        one, two = await rig.open("one"), await rig.open("two")
        assert [(c.number, c.request.id) for c in rig.link.sent if isinstance(c, Submit)] == [(1, "one"), (2, "two")]
        rig.link.say((1, Started(4)), (2, Started()), (1, Tokens(0, [5])), stats=step_stats())
        await asyncio.sleep(0)
        rig.link.say((2, Tokens(0, [6])), (1, Tokens(1, [7])), (1, DONE), (2, DONE))
        assert await one == [Started(4), Tokens(0, [5]), Tokens(1, [7]), DONE]
        assert await two == [Started(), Tokens(0, [6]), DONE]
        assert len(rig.metrics.queued) == 2
        three = await rig.open("three")
        began_s = rig.client._by_id["", "three"].arrived_s + 2.5  # of which the first step is no part
        rig.link.say((3, Started(0, began_s)), (3, DONE))
        await three
        assert rig.metrics.queued[2] == pytest.approx(2500.0)
        assert [c.arrived_s for c in rig.link.sent if isinstance(c, Submit)][2] == began_s - 2.5
        assert rig.metrics.steps == [step_stats()]
        status = rig.client.status()
        assert (status.num_running, status.num_waiting, status.blocks_used, status.blocks_cached) == (0, 0, 5, 2)

    asyncio.run(scenario())


def test_what_a_reader_has_not_taken_is_one_event_however_long_it_waits() -> None:
    async def scenario() -> None:
        rig = Rig()
        stream = rig.client.run(request("a", max_tokens=1000))
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        rig.link.say((1, Started()))
        await first
        for i in range(1000):
            rig.link.say((1, Tokens(i, [i])))
        (waiting,) = rig.client._streams.values()
        assert len(waiting.events) == 1
        rig.link.say((1, DONE))
        assert [event async for event in stream] == [Tokens(0, list(range(1000))), DONE]

    asyncio.run(scenario())


def test_status_counts_who_runs_and_who_waits() -> None:
    async def scenario() -> None:
        rig = Rig()
        tasks = [await rig.open(name) for name in "abc"]
        rig.link.say((1, Started()))
        status = rig.client.status()
        assert (status.num_running, status.num_waiting) == (1, 2)
        assert status.healthy
        assert status.ready
        assert status.resident
        assert (status.vram_bytes_used, status.blocks_total) == (1000, 16)
        rig.client.close()
        await asyncio.gather(*tasks)

    asyncio.run(scenario())


def test_a_name_in_use_is_a_conflict_and_free_again_at_the_end() -> None:
    async def scenario() -> None:
        rig = Rig()
        task = await rig.open("a")
        with pytest.raises(JobConflict, match="'a' is already running"):
            await rig.read(request("a"))
        rig.link.say((1, Started()), (1, DONE))
        again = await rig.open("a")
        assert (await task)[-1] == DONE
        rig.link.say((2, Started()), (2, DONE))
        assert (await again)[-1] == DONE

    asyncio.run(scenario())


def test_overload_beyond_batch_and_queue_with_a_retry_after_that_grows_with_the_backlog() -> None:
    def slow_job(seconds: float) -> Finished:
        return Finished("max_tokens", Timings(0.0, 1.0, seconds * 1e3, seconds * 1e3))

    async def scenario(max_queue: int) -> list[int]:
        rig = Rig(max_batch=2, max_queue=max_queue)
        for i in range(40):  # the pace of those before
            task = await rig.open("a")
            rig.link.say((i + 1, Started()), (i + 1, slow_job(3.0)), stats=step_stats(num_running=2))
            await task
        tasks, hints = [], []
        for i in range(2 + max_queue):
            tasks.append(await rig.open(str(i)))
            if i < 2:
                rig.link.say((41 + i, Started()))
            hints.append(rig.client.status().retry_after_s)
        with pytest.raises(Overloaded, match=f"2 may run and {max_queue} may wait") as refused:
            await rig.read(request("one more"))
        with pytest.raises(Overloaded):
            rig.client.check_room()
        assert not any(isinstance(c, Submit) and c.request.id == "one more" for c in rig.link.sent)
        hints.append(refused.value.retry_after_s)
        rig.client.close()
        await asyncio.gather(*tasks)
        return hints

    short, long = asyncio.run(scenario(2)), asyncio.run(scenario(40))
    assert 1 <= short[-1] < long[-1] <= 600
    assert long == sorted(long)
    assert 50 <= long[-1] <= 70, "41 jobs of about 3 s, two at a time"


def test_cancel_answers_at_once_and_frees_the_name_and_late_words_are_for_nobody() -> None:
    async def scenario() -> None:
        rig = Rig()
        task = await rig.open("a")
        rig.link.say((1, Started()), (1, Tokens(0, [5])))
        assert rig.client.cancel("a")
        assert not rig.client.cancel("a")
        assert not rig.client.cancel("never heard of it")
        assert await task == [Started(), Tokens(0, [5]), CANCELLED]
        assert rig.link.sent[1:] == [Cancel(1)]
        again = await rig.open("a")
        rig.link.say((1, Tokens(1, [6])))
        assert rig.metrics.cancels == [], "the engine has not freed it yet"
        rig.link.say((1, CANCELLED))
        assert len(rig.metrics.cancels) == 1
        rig.link.say((1, CANCELLED), (2, Started()), (2, DONE))
        assert len(rig.metrics.cancels) == 1
        assert await again == [Started(), DONE]

    asyncio.run(scenario())


def test_what_a_request_took_is_told_once_it_is_freed_and_once_only() -> None:
    async def scenario() -> None:
        rig, freed = Rig(), list[tuple[str, Timings]]()
        rig.client.on_freed = lambda request, timings: freed.append((request.id, timings))
        left, stayed = await rig.open("left"), await rig.open("stayed")
        rig.client.cancel("left")
        await left
        assert freed == [], "the engine has not freed it yet"
        took = Timings(1.0, None, 2.0, 3.0, num_steps=4, num_chunks=5, num_preempted=6)
        rig.link.say((1, Failed("CANCELLED", "", False, took)), (2, Started()), (2, Finished("eos", took)))
        await stayed
        rig.link.say((1, Failed("CANCELLED", "", False, took)))
        assert freed == [("left", took), ("stayed", took)]

    asyncio.run(scenario())


def test_tenants_may_use_the_same_names() -> None:
    async def scenario() -> None:
        rig = Rig()
        mine, theirs = await rig.open("a"), await rig.open("a", tenant="b")
        assert not rig.client.cancel("a", "c")
        assert rig.client.cancel("a", "b")
        assert await theirs == [CANCELLED]
        rig.link.say((1, Started()), (1, DONE))
        assert await mine == [Started(), DONE]

    asyncio.run(scenario())


def test_cancel_of_a_request_that_the_engine_has_just_finished() -> None:
    async def scenario() -> None:
        rig = Rig()
        task = await rig.open("a")
        rig.client.cancel("a")
        rig.link.say((1, Started()), (1, DONE))
        assert await task == [CANCELLED]
        assert len(rig.metrics.cancels) == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("how", ["aclose", "task", "unread"])
def test_an_abandoned_iterator_cancels(how: str) -> None:
    async def scenario() -> None:
        rig = Rig()
        if how == "aclose":
            stream = rig.client.run(request("a"))
            task = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            rig.link.say((1, Started()))
            await task
            await stream.aclose()
        elif how == "task":
            reader = await rig.open("a")
            reader.cancel()
            await asyncio.wait([reader])
        else:
            rig.client.run(request("a"))  # never begun: nothing was sent, nothing is held
            assert rig.link.sent == []
            return
        assert rig.link.sent[1:] == [Cancel(1)]
        assert rig.client.status().num_running == rig.client.status().num_waiting == 0

    asyncio.run(scenario())


def test_a_reader_that_stops_after_the_end_cancels_nothing() -> None:
    async def scenario() -> None:
        rig = Rig()
        stream = rig.client.run(request("a"))
        task = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        rig.link.say((1, Started()), (1, DONE))
        await task
        await stream.aclose()
        assert len(rig.link.sent) == 1

    asyncio.run(scenario())


def test_a_broken_engine_fails_every_stream_once_and_takes_nobody() -> None:
    async def scenario() -> None:
        rig = Rig()
        tasks = [await rig.open(name) for name in "ab"]
        watch = asyncio.create_task(rig.client.watch())
        rig.link.say((1, Started()))
        rig.link.receive(Broken("CUDA_ERROR", "the device is lost", {}))
        rig.link.receive(Broken("INTERNAL", "once more", {}))
        rig.link.say((1, DONE))
        lost = Failed("CUDA_ERROR", "the device is lost", False)
        assert [await task for task in tasks] == [[Started(), lost], [lost]]
        assert isinstance(await asyncio.wait_for(watch, 5), CudaError)
        status = rig.client.status()
        assert (status.healthy, status.ready, status.reason) == (False, False, "the device is lost")
        with pytest.raises(ShuttingDown):
            await rig.read(request("c"))
        rig.client.close()
        assert rig.link.closed == [False], "nobody waits for an engine that is broken"

    asyncio.run(scenario())


def test_an_engine_that_is_gone_is_seen_at_the_next_look() -> None:
    async def scenario() -> None:
        rig = Rig()
        task = await rig.open("a")
        rig.link.gone = Internal("the engine process ended with signal SIGKILL")
        rig.look(WATCH_S)
        assert (await task)[-1] == Failed("INTERNAL", "the engine process ended with signal SIGKILL", False)
        assert not rig.client.status().ready

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("slowest_step_s", "steps_ms", "limit_s"),
    [
        (0.01, [1.0] * 50, 5.0),  # at least so long
        (0.01, [1000.0] * 50, 20.0),  # 20 of its usual steps
        (4.0, [1.0] * 50, 12.0),  # 3 of the largest it is known to take
        (0.01, [1.0] * 50 + [60_000.0], 5.0),  # one slow step is not usual
    ],
)
def test_an_engine_with_work_that_stands_still_is_given_up(
    slowest_step_s: float, steps_ms: list[float], limit_s: float
) -> None:
    async def scenario() -> None:
        rig = Rig(slowest_step_s=slowest_step_s)
        task = await rig.open("a")
        for ms in steps_ms:
            rig.link.say(stats=step_stats(ms))
        rig.look(limit_s - 0.2)
        rig.link.say()  # any word is progress
        rig.look(limit_s - 0.2)
        assert rig.client.status().ready
        rig.look(0.4)
        (failed,) = await task
        assert isinstance(failed, Failed)
        assert failed.code == "INTERNAL"
        assert "made no progress" in failed.message
        assert not rig.client.status().ready

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("backend", "cpu_per_look_s", "is_given_up"),
    [("torch-reference", 0.09, False), ("torch-reference", 0.001, True), ("another", 0.09, True)],
)
def test_a_reference_step_that_is_being_computed_may_take_long(
    backend: str, cpu_per_look_s: float, is_given_up: bool
) -> None:
    """A late chunk of a long prompt takes many times the usual step; it is not repeated over and over."""

    async def scenario() -> None:
        rig = Rig(backend=backend)
        rig.link.cpu_per_look_s = cpu_per_look_s
        task = await rig.open("a")
        rig.look(60.0)
        assert rig.client.status().ready is not is_given_up
        rig.client.close()
        await task

    asyncio.run(scenario())


def test_an_idle_engine_may_be_silent() -> None:
    async def scenario() -> None:
        rig = Rig()
        await asyncio.wait([task := await rig.open("a"), asyncio.create_task(asyncio.sleep(0))], timeout=0)
        rig.link.say((1, Started()), (1, DONE))
        await task
        rig.look(60.0)
        assert rig.client.status().ready
        task = await rig.open("b")
        rig.look(4.0)
        assert rig.client.status().ready, "the time before it had work counts"
        rig.client.close()
        await task

    asyncio.run(scenario())


def test_drift_turns_readiness_off_until_a_look_finds_all_in_order() -> None:
    async def scenario() -> None:
        rig = Rig()
        task = await rig.open("a")
        rig.link.say((1, Started()), (1, DONE))
        await task
        rig.link.say(drift="3 blocks of the KV cache are lost")
        status = rig.client.status()
        assert (status.ready, status.healthy, status.reason) == (False, True, "3 blocks of the KV cache are lost")
        task = await rig.open("b")
        rig.link.say((2, Started()), (2, DONE), stats=step_stats())
        await task
        assert not rig.client.status().ready, "a step says nothing about the cache"
        rig.link.say()
        assert rig.client.status().ready

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("code", "healthy"),
    [("VRAM_OOM", False), ("INTERNAL", False), ("NUMERIC_FAULT", True), ("INFERENCE_TIMEOUT", True)],
)
def test_health_is_lost_by_our_own_faults_and_regained_by_a_success(code: str, healthy: bool) -> None:
    async def scenario() -> None:
        rig = Rig()
        task = await rig.open("a")
        rig.link.say((1, Started()), (1, Failed(code, "why", False)))
        await task
        assert rig.client.status().healthy is healthy
        task = await rig.open("b")
        rig.link.say((2, Started()))
        assert rig.client.status().healthy is healthy
        rig.link.say((2, DONE))
        await task
        assert rig.client.status().healthy

    asyncio.run(scenario())


def test_close_ends_every_stream_and_refuses_new_work_however_often_it_is_called() -> None:
    async def scenario() -> None:
        rig = Rig()
        tasks = [await rig.open(name) for name in "ab"]
        rig.client.close()
        rig.client.close()
        assert rig.link.closed == [True]
        for task in tasks:
            (failed,) = await task
            assert isinstance(failed, Failed)
            assert (failed.code, failed.retriable) == ("SHUTTING_DOWN", True)
        assert len(rig.link.sent) == 2, "nothing is sent to an engine that ends"
        with pytest.raises(ShuttingDown):
            await rig.read(request("c"))
        with pytest.raises(ShuttingDown):
            rig.client.check_room()
        assert not rig.client.status().ready

    asyncio.run(scenario())


def test_another_event_loop_takes_over() -> None:
    rig = Rig()

    async def scenario(number: int) -> None:
        task = await rig.open("a")
        rig.link.say((number, Started()), (number, DONE))
        assert await task == [Started(), DONE]

    asyncio.run(scenario(1))
    asyncio.run(scenario(2))
    assert rig.link.num_attached == 2
