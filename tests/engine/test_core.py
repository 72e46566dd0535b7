"""EngineCore, tick by tick, on a scripted step: ends, faults, deadlines, cancels and counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.engine.scripted import EOS, Rig, ScriptedStep, request
from worker_orcd.engine.request import Failed, Finished, Started, StepStats, Timings, Tokens
from worker_orcd.engine.sequence import Chunk
from worker_orcd.engine.step import Result
from worker_orcd.errors import CudaError, NumericFault, Overloaded, VramOom

both_ways = pytest.mark.parametrize("overlaps", [False, True])


Script = Callable[[Chunk], Result | None]


def on(name: str, position: int, result: Result) -> Script:
    """The token at `position` of the answer to `name` is `result`."""

    def script(chunk: Chunk) -> Result | None:
        return result if chunk.samples and is_at(chunk, name, position) else None

    return script


def is_at(chunk: Chunk, name: str, position: int) -> bool:
    seq = chunk.sequence
    return seq.request.id == name and chunk.first + chunk.num_tokens == seq.num_prompt + position


def raising(name: str, position: int, error: Exception) -> Script:
    """The step that computes it raises instead."""

    def script(chunk: Chunk) -> None:
        if is_at(chunk, name, position):
            raise error

    return script


@both_ways
def test_events_in_order_and_timings_on_the_clock(overlaps: bool) -> None:
    rig = Rig(ScriptedStep(overlaps=overlaps))
    rig.submit(request(max_tokens=3))
    rig.clock.now_s += 2.0
    while rig.core.has_work:
        rig.tick()
        rig.clock.now_s += 0.5
    started, *tokens, end = rig.events["a"]
    assert started == Started(0, 102.0), "when it began, not when that was told"
    assert tokens == [Tokens(i, [10 + i]) for i in range(3)]
    assert isinstance(end, Finished)
    assert end.reason == "max_tokens"
    late = 500.0 * overlaps  # a result is read one tick after its launch
    assert end.timings.queue_ms == 2000.0
    assert end.timings.first_token_ms == late
    assert end.timings.decode_ms == 1000.0 + late
    assert end.timings.total_ms == 3000.0 + late


@both_ways
@pytest.mark.parametrize(
    ("fields", "script", "reason", "num_tokens"),
    [
        ({"max_tokens": 50}, on("a", 2, [EOS]), "eos", 2),
        ({"max_tokens": 50}, on("a", 0, [EOS]), "eos", 0),
        ({"max_tokens": 1}, lambda _: None, "max_tokens", 1),
        ({"max_tokens": 7}, on("a", 6, [EOS]), "eos", 6),
        ({"max_tokens": 50, "prompt": 30}, lambda _: None, "context_length", 10),
        ({"max_tokens": 10, "prompt": 30}, lambda _: None, "max_tokens", 10),
    ],
)
def test_every_way_to_finish(
    overlaps: bool, fields: dict[str, Any], script: Script, reason: str, num_tokens: int
) -> None:
    rig = Rig(ScriptedStep(overlaps=overlaps, on_chunk=script))
    rig.submit(request(**fields), request("neighbour"))
    rig.run()
    assert rig.end("a") == reason
    assert rig.tokens("a") == list(range(10, 10 + num_tokens))
    assert rig.tokens("neighbour") == list(range(10, 15))
    longest = max(first + count for plan in rig.step.plans for name, first, count in plan if name == "a")
    assert longest <= 40, "nothing is computed beyond the context"


def test_several_tokens_a_step_are_cut_where_the_answer_ends() -> None:
    rig = Rig(ScriptedStep())
    rig.step.on_chunk = on("a", 0, [20, 21, EOS, 22])
    rig.submit(request(max_tokens=50))
    rig.run()
    assert rig.events["a"][1] == Tokens(0, [20, 21])
    assert rig.end("a") == "eos"


@both_ways
def test_a_fault_in_one_row_ends_that_request_only_and_erases_its_blocks(overlaps: bool) -> None:
    rig = Rig(ScriptedStep(overlaps=overlaps, on_chunk=on("bad", 2, NumericFault("not finite"))))
    rig.submit(request("good", prompt=[5] * 9), request("bad", prompt=[6] * 9))
    rig.run()
    assert rig.end("bad") == "NUMERIC_FAULT"
    assert rig.tokens("bad") == [10, 11]
    assert (rig.end("good"), rig.tokens("good")) == ("max_tokens", list(range(10, 15)))
    assert len(rig.step.erased) == len(set(rig.step.erased)) == 3, "12 positions, every block once"
    rig.step.on_chunk = lambda _: None
    rig.submit(request("again", prompt=[6] * 9), request("good again", prompt=[5] * 9))
    rig.run()
    assert rig.events["again"][0].cached_tokens == 0, "what the faulty request had computed was found again"
    assert rig.events["good again"][0].cached_tokens == 8


@both_ways
def test_blocks_built_on_a_faulty_prefix_are_forgotten_too(overlaps: bool) -> None:
    rig = Rig(ScriptedStep(overlaps=overlaps))
    rig.submit(request("first", prompt=[6] * 9))
    rig.run()
    rig.step.on_chunk = on("second", 1, NumericFault("not finite"))
    rig.submit(request("second", prompt=[6] * 9))
    rig.run()
    assert rig.events["second"][0].cached_tokens == 8
    rig.step.on_chunk = lambda _: None
    rig.submit(request("third", prompt=[6] * 9))
    rig.run()
    assert rig.events["third"][0].cached_tokens == 0


@both_ways
@pytest.mark.parametrize(
    ("error", "code"),
    [(VramOom("no memory"), "VRAM_OOM"), (ZeroDivisionError("secret prompt"), "INTERNAL")],
)
def test_a_step_that_raises_is_repeated_one_by_one_and_only_the_culprit_ends(
    overlaps: bool, error: Exception, code: str
) -> None:
    rig = Rig(ScriptedStep(overlaps=overlaps, on_chunk=raising("bad", 2, error)))
    rig.submit(request("one"), request("bad"), request("two"))
    rig.run()
    assert rig.end("bad") == code
    assert rig.tokens("bad") == [10, 11]
    assert "secret" not in rig.events["bad"][-1].message  # type: ignore[union-attr]
    for name in ("one", "two"):
        assert (rig.end(name), rig.tokens(name)) == ("max_tokens", list(range(10, 15)))
    assert [len(plan) for plan in rig.step.plans].count(1) == 3, "once each"


@both_ways
def test_after_one_by_one_no_token_is_left_for_the_next_step_to_guess(overlaps: bool) -> None:
    """The results of single launches do not stand together on the device, where the next step would look."""
    rig = Rig(ScriptedStep(overlaps=overlaps, on_chunk=raising("bad", 1, ZeroDivisionError())))
    unknown: list[int] = []

    def script(chunk: Chunk) -> None:
        if any(len(plan) == 1 for plan in rig.step.plans[:-1]) and len(rig.step.plans[-1]) > 1 and not unknown:
            unknown.append(chunk.sequence.num_unknown)
        fail(chunk)

    fail, rig.step.on_chunk = rig.step.on_chunk, script
    rig.submit(request("one"), request("bad"), request("two"))
    rig.run()
    assert unknown == [0]


@both_ways
def test_results_that_cannot_be_read_end_everyone_of_that_step(overlaps: bool) -> None:
    rig = Rig(ScriptedStep(overlaps=overlaps, on_wait=VramOom("no memory")))
    rig.submit(request("one"), request("two"))
    rig.tick()
    rig.step.on_wait = None
    rig.submit(request("three"))
    rig.run()
    assert (rig.end("one"), rig.end("two"), rig.end("three")) == ("VRAM_OOM", "VRAM_OOM", "max_tokens")


@both_ways
@pytest.mark.parametrize("where", ["launch", "one by one", "wait"])
def test_a_lost_device_is_not_survived(overlaps: bool, where: str) -> None:
    rig = Rig(ScriptedStep(overlaps=overlaps))
    if where == "wait":
        rig.step.on_wait = CudaError("device lost")
    elif where == "launch":
        rig.step.on_chunk = raising("b", 0, CudaError("device lost"))
    else:
        errors: list[Exception] = [ZeroDivisionError(), CudaError("device lost"), CudaError("device lost")]
        rig.step.on_chunk = lambda _: (_ for _ in ()).throw(errors.pop(0))
    rig.submit(request("a"), request("b"))
    with pytest.raises(CudaError, match="device lost"):
        rig.run()


@both_ways
def test_deadlines_count_from_arrival_in_the_queue_and_while_running(overlaps: bool) -> None:
    rig = Rig(ScriptedStep(overlaps=overlaps), max_batch=1)
    rig.submit(request("runs", max_tokens=20, timeout_s=5.0), request("waits", timeout_s=3.0), request("fine"))
    for _ in range(2):
        rig.tick()
    rig.clock.now_s += 2.999
    rig.tick()
    assert not rig.events["waits"]
    rig.clock.now_s += 0.001
    rig.tick()
    (event,) = rig.events["waits"]
    assert isinstance(event, Failed)
    assert (event.code, event.retriable) == ("INFERENCE_TIMEOUT", True)
    assert event.message == "the request took longer than its 3 s"
    assert event.timings == Timings(3000.0, None, 0.0, 3000.0)
    known = len(rig.tokens("runs"))
    rig.clock.now_s += 2.0
    rig.tick()
    assert rig.end("runs") == "INFERENCE_TIMEOUT"
    assert len(rig.tokens("runs")) == known, "nothing is said after the deadline"
    rig.run()
    assert rig.end("fine") == "max_tokens"


@both_ways
def test_cancel_in_every_state_frees_within_one_step(overlaps: bool) -> None:
    rig = Rig(ScriptedStep(overlaps=overlaps), max_batch=2, max_step_tokens=4)
    rig.submit(request("decodes", max_tokens=30), request("mid-prompt", prompt=[5] * 30), request("waits"))
    for _ in range(3):
        rig.tick()
    assert rig.tokens("decodes")
    assert [type(event) for event in rig.events["mid-prompt"]] == [Started]
    assert not rig.events["waits"]
    for name in ("decodes", "mid-prompt", "waits"):
        rig.cancel(name)
    rig.tick()
    for name in ("decodes", "mid-prompt", "waits"):
        assert rig.end(name) == "CANCELLED"
        rig.cancel(name)  # over: nothing happens
    assert not rig.core.has_work
    assert rig.step.usage()[0] == 0
    rig.core.cancel(99)
    assert rig.core.tick().events == []


@both_ways
def test_cancel_after_preemption(overlaps: bool) -> None:
    rig = Rig(ScriptedStep(overlaps=overlaps, num_blocks=6))
    rig.submit(request("old", prompt=7, max_tokens=15), request("young", prompt=[5] * 7, max_tokens=15))
    while not rig.tick().stats.num_preempted:  # type: ignore[union-attr]
        assert rig.core.has_work
    rig.cancel("young")
    rig.run()
    assert rig.end("young") == "CANCELLED"
    assert rig.tokens("old") == list(range(10, 25))


@both_ways
def test_preempted_work_is_repeated_and_said_once(overlaps: bool) -> None:
    rig = Rig(ScriptedStep(overlaps=overlaps, num_blocks=6))
    rig.submit(request("old", prompt=[4] * 7, max_tokens=15), request("young", prompt=[5] * 7, max_tokens=15))
    outputs = rig.run()
    assert sum(output.stats.num_preempted for output in outputs if output.stats) >= 1
    for name in ("old", "young"):
        assert [type(event) for event in rig.events[name]].count(Started) == 1
        assert rig.tokens(name) == list(range(10, 25))
        indices = [event.index for event in rig.events[name] if isinstance(event, Tokens)]
        assert indices == list(range(15))


def test_what_can_never_fit_is_refused_at_once() -> None:
    rig = Rig(ScriptedStep(num_blocks=4), context_length=40)
    rig.submit(request("long prompt", prompt=40), request("too much", prompt=10, max_tokens=7))
    rig.submit(request("fits", prompt=10, max_tokens=6))
    assert rig.core.has_work
    rig.run()
    for name, part in (("long prompt", "from 1 to 39"), ("too much", "--kv-cache-size-mb")):
        (event,) = rig.events[name]
        assert isinstance(event, Failed)
        assert (event.code, event.retriable) == ("INVALID_REQUEST", False)
        assert part in event.message
    assert rig.end("fits") == "max_tokens"


def test_fail_all_ends_everyone_in_every_state() -> None:
    rig = Rig(ScriptedStep(overlaps=True), max_batch=1)
    rig.submit(request("runs"), request("waits"))
    rig.tick()
    rig.core.fail_all(Overloaded("enough"))
    rig.run()
    assert rig.end("runs") == rig.end("waits") == "OVERLOADED"


def test_stats_count_what_the_step_did() -> None:
    rig = Rig(max_batch=2, max_step_tokens=8)
    rig.submit(
        request("a", prompt=[5] * 9, max_tokens=2), request("b", prompt=4, max_tokens=1), request("c", prompt=2)
    )
    first, second = rig.tick().stats, rig.tick().stats
    assert first == StepStats(
        num_sequences=1, num_rows=8, num_sampled=0, step_ms=0.0, num_running=1, num_waiting=2, blocks_used=3,
        blocks_cached=0, num_preempted=0, num_evicted=0, prompt_tokens=9, cached_tokens=0,
    )  # fmt: skip
    assert second == StepStats(
        num_sequences=2, num_rows=5, num_sampled=2, step_ms=0.0, num_running=1, num_waiting=1, blocks_used=3,
        blocks_cached=1, num_preempted=0, num_evicted=0, prompt_tokens=4, cached_tokens=0,
    )  # fmt: skip
    rig.run()
    rig.submit(request("again", prompt=[5] * 9, max_tokens=1))
    stats = rig.tick().stats
    assert stats is not None
    assert (stats.prompt_tokens, stats.cached_tokens, stats.num_rows) == (9, 8, 1)
    nothing = rig.tick().stats
    assert nothing is not None
    assert (nothing.num_rows, nothing.blocks_used, nothing.blocks_cached) == (0, 0, 4), "state without a step"


def test_timings_count_steps_chunks_and_preemptions() -> None:
    rig = Rig(ScriptedStep(num_blocks=5), max_step_tokens=4, context_length=20)
    rig.submit(request("old", prompt=9, max_tokens=8), request("young", prompt=3, max_tokens=8))
    rig.run()
    old, young = (rig.events[name][-1].timings for name in ("old", "young"))
    assert (old.num_chunks, old.num_steps, old.num_preempted) == (3, 3 + 7, 0)
    assert (young.num_chunks, young.num_steps, young.num_preempted) == (1, 1 + 7, 1), "its prompt stayed in the cache"


def test_prefixes_are_shared_within_a_tenant_only() -> None:
    rig = Rig()
    for name, tenant in (("a", "x"), ("b", "x"), ("c", "y")):
        rig.submit(request(name, prompt=[5] * 9, tenant=tenant))
        rig.run()
    cached = [rig.events[name][0].cached_tokens for name in "abc"]
    assert cached == [0, 8, 0]


def test_check_names_what_does_not_add_up() -> None:
    rig = Rig()
    rig.submit(request())
    rig.run()
    lost = rig.step.allocator.new_table()
    rig.step.allocator.grow(lost, 5)
    assert rig.core.check() == "2 blocks of the KV cache are lost: nobody runs"
    rig.step.allocator._free.append(lost.blocks[0])
    assert "does not add up" in rig.core.check()


def test_a_request_arrives_when_it_was_sent_not_when_the_step_before_has_ended() -> None:
    rig = Rig()
    rig.core.submit(1, request(max_tokens=1, timeout_s=5.0), rig.clock.now_s - 4.0)
    rig.clock.now_s += 0.5
    [(_, started), _, (_, end)] = rig.core.tick().events
    assert (started.started_s, end.timings.queue_ms) == (100.5, 4500.0)
    rig.core.submit(2, request(max_tokens=1, timeout_s=5.0), rig.clock.now_s - 5.0)
    assert [event.code for _, event in rig.core.tick().events] == ["INFERENCE_TIMEOUT"]
