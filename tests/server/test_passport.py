"""Request passports, and the replay receipt at the end of an answer."""

from __future__ import annotations

import asyncio
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.fakes import FREED, ScriptedEngine, Step, forever, text_script
from tests.server.client import Answer, Rig, make_rig
from worker_orcd.engine.request import Failed, Request, SamplingParams, StopReason
from worker_orcd.server.exchange import Exchange
from worker_orcd.server.generation import Answer as Generated
from worker_orcd.server.generation import Run
from worker_orcd.server.passport import Passports
from worker_orcd.server.receipt import Receipt, ids_sha256


def by_prompt(request: Request) -> list[Step]:
    if request.prompt_ids[0] == ord("f"):
        return [ord("a"), Failed("NUMERIC_FAULT", "not finite", False)]
    return text_script("one two three")


@pytest.fixture(scope="module")
def rig() -> Rig:
    rig = make_rig(ScriptedEngine(by_prompt, cached_tokens=4))
    rig.engine.info = msgspec.structs.replace(rig.engine.info, fingerprint="f" * 64, kernels="scripted 1")
    return rig


def show(rig: Rig, name: str, headers: dict[str, str] | None = None) -> Answer:
    return rig.call("GET", f"/v1/requests/{name}", headers=headers)


def test_a_passport_says_what_became_of_a_request(rig: Rig) -> None:
    answer = rig.execute(job_id="whole", prompt="hello", seed=7, headers={"x-correlation-id": "trace-1"})
    assert answer.text == "one two three"
    passport = show(rig, "whole").json
    assert passport.pop("received_at").endswith("Z")
    assert passport == {
        "id": "whole",
        "correlation_id": "trace-1",
        "state": "ended",
        "seed": 7,
        "prompt_tokens": 5,
        "cached_tokens": 4,
        "completion_tokens": 13,
        "stop_reason": "eos",
        "error_code": None,
        "queue_ms": FREED.queue_ms,
        "first_token_ms": FREED.first_token_ms,
        "decode_ms": FREED.decode_ms,
        "total_ms": FREED.total_ms,
        "steps": 7,
        "chunks": 3,
        "preemptions": 1,
        "others": [],
    }


@pytest.mark.parametrize(
    ("fields", "tokens", "reason", "code"),
    [
        ({"max_tokens": 3}, 3, "max_tokens", None),
        ({"stop": ["two"]}, 7, "stop_sequence", None),
        ({"prompt": "fail"}, 1, None, "NUMERIC_FAULT"),
    ],
)
def test_the_end_has_its_cause(
    rig: Rig, fields: dict[str, Any], tokens: int, reason: StopReason | None, code: str | None
) -> None:
    rig.execute(job_id="end/of it", **fields)
    passport = show(rig, "end/of it").json
    ended = (passport["completion_tokens"], passport["stop_reason"], passport["error_code"], passport["state"])
    assert ended == (tokens, reason, code, "ended")
    assert passport["steps"] == 7, "counted, even though the edge ended it"


def test_a_passport_can_be_seen_on_the_way() -> None:
    rig = make_rig(ScriptedEngine(lambda _: forever(), max_running=1))

    async def passport(name: str) -> dict[str, Any]:
        return (await rig.acall("GET", f"/v1/requests/{name}")).json

    async def scenario() -> None:
        body = {"prompt": "x", "max_tokens": 2000}
        jobs = [asyncio.create_task(rig.acall("POST", "/execute", body | {"job_id": name})) for name in "ab"]
        while (await passport("a")).get("completion_tokens", 0) < 3:
            await asyncio.sleep(0.005)
        running, queued = await passport("a"), await passport("b")
        assert (running["state"], running["steps"]) == ("running", None)
        assert (queued["state"], queued["completion_tokens"], queued["cached_tokens"]) == ("queued", 0, None)
        for name in "ba":
            await rig.acall("POST", "/cancel", {"job_id": name})
        await asyncio.gather(*jobs)
        for name in "ab":
            ended = await passport(name)
            assert (ended["state"], ended["error_code"], ended["stop_reason"]) == ("ended", "CANCELLED", None)

    asyncio.run(scenario())


def test_only_the_tenant_that_made_it_sees_it(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice:a-key\nbob:b-key\n")
    rig = make_rig(api_key_file=keys)
    alice, bob = {"x-api-key": "a-key"}, {"x-api-key": "b-key"}
    rig.execute(alice, job_id="mine", prompt="hello")
    assert show(rig, "mine", alice).json["prompt_tokens"] == 5
    assert show(rig, "mine").status == 401
    stranger, unknown = show(rig, "mine", bob), show(rig, "never", alice)
    assert (stranger.status, unknown.status) == (404, 404)
    assert stranger.error["message"] == unknown.error["message"]
    rig.execute(bob, job_id="mine", prompt="hi")
    assert show(rig, "mine", alice).json["prompt_tokens"] == 5
    assert show(rig, "mine", bob).json["prompt_tokens"] == 2


def answer_of(job_id: str, num_runs: int = 1) -> Generated:
    requests = [Request(f"{job_id}-{i}", [1, 2], 5, SamplingParams(seed=i)) for i in range(num_runs)]
    return Generated(job_id, [Run(request, None) for request in requests], 2, "")  # type: ignore[arg-type]


def test_the_ring_is_bounded_and_late_words_find_their_passport() -> None:
    passports, exchange = Passports(limit=10), Exchange("c", None)
    for i in range(100):
        answer = answer_of(f"job{i}", num_runs=3)
        passports.open(answer, exchange)
        if i % 2:
            passports.close(answer, exchange, "CANCELLED")
    assert len(passports._pages) == 3
    assert len(passports._by_request) == 9
    assert len(passports._running) <= 3
    passports.account(answer.runs[2].request, FREED)
    passports.account(answer_of("job1").runs[0].request, FREED)
    page = passports._pages["", "job99"]
    assert [passport.steps for passport in (page, *page.others)] == [None, None, 7]


def test_a_name_used_again_is_the_newer_request() -> None:
    passports, exchange = Passports(), Exchange("c", None)
    old, new = answer_of("same"), answer_of("same")
    passports.open(old, exchange)
    passports.open(new, exchange)
    passports.close(old, exchange, "CANCELLED")
    assert passports._pages["", "same"].state == "queued"
    passports.close(new, exchange, None)
    assert passports._pages["", "same"].state == "ended"


def test_the_last_event_carries_a_receipt(rig: Rig) -> None:
    fields = {"prompt": "hello", "seed": 2**64 - 1, "temperature": 0.5, "max_tokens": 6}
    short = rig.execute(job_id="short", **fields).events[-1].data["receipt"]
    assert short == {
        "model": "scripted",
        "fingerprint": "f" * 64,
        "kernels": "scripted 1",
        "sampling": {"seed": 2**64 - 1, "temperature": 0.5},
        "context_length": 4096,
        "max_tokens": 6,
        "stop_reason": "max_tokens",
        "prompt_tokens": 5,
        "prompt_sha256": hashlib.sha256(struct.pack("<5I", *b"hello")).hexdigest(),
        "output_tokens": 6,
        "output_sha256": hashlib.sha256(struct.pack("<6I", *b"one tw")).hexdigest(),
    }
    full = rig.execute({"x-receipt": "Full"}, job_id="full", **fields).events[-1].data["receipt"]
    assert full == short | {"prompt_ids": list(b"hello")}
    assert msgspec.json.decode(json.dumps(full), type=Receipt).sampling.temperature == 0.5


def test_a_receipt_counts_the_tokens_up_to_the_stop_string() -> None:
    rig = make_rig(ScriptedEngine(lambda _: [list(b"one two three"), "eos"]))
    receipt = rig.execute(stop=["two"]).events[-1].data["receipt"]
    assert (receipt["stop_reason"], receipt["output_tokens"]) == ("stop_sequence", 7)
    assert receipt["output_sha256"] == ids_sha256(list(b"one two"))
