"""The scheduler by example; tests/sim drives it at random."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.scripted import Rig, ScriptedStep, request
from worker_orcd.engine.scheduler import MAX_OVERTAKEN, MAX_PREEMPTED, SchedulerLimits


def test_a_step_takes_decodes_first_then_prompts_oldest_first_within_its_tokens() -> None:
    rig = Rig(max_step_tokens=8)
    rig.submit(request("a", prompt=3, max_tokens=9), request("b", prompt=9), request("c", prompt=4))
    for _ in range(3):
        rig.tick()
    assert rig.step.plans == [
        [("a", 0, 3), ("b", 0, 5)],
        [("a", 3, 1), ("b", 5, 4), ("c", 0, 3)],
        [("a", 4, 1), ("b", 9, 1), ("c", 3, 1)],
    ]


def test_no_more_sequences_than_the_batch_holds() -> None:
    rig = Rig(max_batch=2)
    rig.submit(*(request(name, prompt=1, max_tokens=3) for name in "abcd"))
    rig.run()
    assert max(len(plan) for plan in rig.step.plans) == 2
    assert [name for plan in rig.step.plans for name, first, _ in plan if first == 0] == list("abcd")


@pytest.mark.parametrize(
    ("policy", "order"),
    [("fcfs", "abcd"), ("priority", "cbda"), ("shortest-prompt-first", "bdac")],
)
def test_the_policy_says_who_leaves_the_queue_first(policy: str, order: str) -> None:
    rig = Rig(max_batch=1, policy=policy)
    for name, prompt, priority in (("a", 5, 3), ("b", 2, 1), ("c", 6, 0), ("d", 2, 1)):
        rig.submit(request(name, prompt=prompt, priority=priority, max_tokens=1))
    rig.run()
    assert "".join(name for plan in rig.step.plans for name, _, _ in plan) == order


def test_no_policy_lets_anyone_wait_for_ever() -> None:
    rig = Rig(max_batch=1, policy="shortest-prompt-first")
    rig.submit(request("first", prompt=1, max_tokens=1), request("long", prompt=9, max_tokens=1))
    rig.tick()
    passed = 0
    while not rig.events["long"]:
        passed += 1
        rig.submit(request(f"short {passed}", prompt=1, max_tokens=1))
        rig.tick()
    assert passed == MAX_OVERTAKEN + 1


def preempted(rig: Rig) -> dict[str, int]:
    """How often each of those in the engine yields until all is done."""
    sequences = list(rig.core._sequences.values())
    rig.run()
    return {seq.request.id: seq.num_preempted for seq in sequences}


@pytest.mark.parametrize("overlaps", [False, True])
def test_the_youngest_yields_and_the_oldest_never(overlaps: bool) -> None:
    rig = Rig(ScriptedStep(num_blocks=8, overlaps=overlaps))
    rig.submit(*(request(name, prompt=[i] * 5, max_tokens=18) for i, name in enumerate(("old", "mid", "young"))))
    yielded = preempted(rig)
    assert yielded["old"] == 0
    assert yielded["young"] >= 1
    for name in ("old", "mid", "young"):
        assert rig.tokens(name) == list(range(10, 28))


def test_under_priority_the_least_urgent_yields() -> None:
    rig = Rig(ScriptedStep(num_blocks=6), policy="priority")
    rig.submit(request("idle", prompt=[1] * 5, max_tokens=15, priority=5))
    rig.submit(request("urgent", prompt=[2] * 5, max_tokens=15))
    assert preempted(rig) == {"idle": 1, "urgent": 0}


def test_who_has_yielded_often_comes_back_for_good() -> None:
    """Urgent requests that just fit keep pushing it out, until its whole need is put aside."""
    rig = Rig(ScriptedStep(num_blocks=20, block_size=1), policy="priority", context_length=20)
    rig.submit(request("victim", prompt=1, max_tokens=12, priority=9))
    (victim,) = rig.core._sequences.values()
    num_urgent = 0
    while not victim.has_ended:
        if victim.table is not None and len(rig.core._sequences) == 1:
            num_urgent += 1
            fits = rig.step.available() - 2
            rig.submit(request(f"urgent {num_urgent}", prompt=[20 + num_urgent] * fits, max_tokens=2))
        rig.tick()
    rig.run()
    assert victim.num_preempted == MAX_PREEMPTED < num_urgent
    assert rig.tokens("victim") == list(range(10, 22))


def test_admission_leaves_a_block_for_everyone_who_runs() -> None:
    rig = Rig(ScriptedStep(num_blocks=4))
    rig.submit(request("a", prompt=[1] * 4, max_tokens=9), request("b", prompt=[2] * 9, max_tokens=1))
    rig.tick()
    assert rig.step.plans == [[("a", 0, 4)]], "three blocks are free, b needs them all, a grows next"


def test_a_prompt_takes_its_blocks_at_once_and_finds_its_prefix() -> None:
    rig = Rig(max_step_tokens=4)
    rig.submit(request("a", prompt=[5] * 12, max_tokens=1))
    assert rig.tick().stats.blocks_used == 3  # type: ignore[union-attr]
    rig.run()
    rig.submit(request("b", prompt=[5] * 12, max_tokens=1))
    rig.tick()
    assert rig.step.plans[-1] == [("b", 8, 4)], "the last token is computed anew: its logits are wanted"


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"prompt": 40}, "the prompt has 40 tokens; from 1 to 39 fit into the context"),
        ({"prompt": []}, "the prompt has 0 tokens"),
        (
            {"prompt": 30, "max_tokens": 3},
            "30 prompt tokens and max_tokens 3 can never fit into the KV cache of 32 tokens",
        ),
    ],
)
def test_misfits(fields: dict[str, Any], part: str) -> None:
    rig = Rig(ScriptedStep(num_blocks=8))
    rig.submit(request("a", **fields))
    rig.tick()
    assert part in rig.events["a"][0].message  # type: ignore[union-attr]


def test_limits_that_make_no_sense_are_a_bug() -> None:
    for max_batch, max_step_tokens in ((0, 4), (5, 4)):
        with pytest.raises(AssertionError):
            SchedulerLimits(max_batch, max_step_tokens, 10)
