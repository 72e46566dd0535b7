"""A ledger that forgets nothing, a check that names what lies elsewhere, and the way of its news to /health."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from tests.engine import scripted
from tests.engine.scripted import request
from tests.engine.test_client import Rig
from worker_orcd.backends.base import Rope
from worker_orcd.backends.batch import LayerKV
from worker_orcd.engine import loop
from worker_orcd.engine.loop import Close, Command, Inspected, Message, Report, Submit, run_loop
from worker_orcd.engine.process import _encoder, _message_decoder
from worker_orcd.errors import CudaError
from worker_orcd.vram import residency
from worker_orcd.vram.ledger import UNCOUNTED_BYTES, Ledger, disagreement
from worker_orcd.vram.residency import Residency, locate_by_driver

MIB = 2**20


def test_the_ledger_counts_shared_memory_once_and_tables_apart() -> None:
    weight, rope = torch.zeros(10), Rope(torch.zeros(4), torch.zeros(4), "half")
    ledger = Ledger()
    ledger.enter("weights", "model", {"head": [weight, weight.view(2, 5)], "tied": (weight[:5],), "rope": rope})
    ledger.enter("kv_cache", "cache", [LayerKV(torch.zeros(3), torch.zeros(3))])
    assert ledger.by_purpose() == {"weights": 40, "rope_tables": 32, "kv_cache": 24}
    assert set(ledger.tensors) == {"model.head.0", "model.rope.cos", "model.rope.sin", "cache.0.k", "cache.0.v"}
    assert ledger.with_workspace(100)["workspace"] == 4


def test_what_ledger_and_driver_see_differently_is_said_with_both_numbers() -> None:
    memory = {"weights": 9000 * MIB, "workspace": 1000 * MIB}
    assert disagreement(memory, 10_000 * MIB + UNCOUNTED_BYTES, 1000 * MIB) == ""
    assert disagreement(memory, 10_200 * MIB, 1000 * MIB) == "", "within 2 %"
    told = disagreement(memory, 10_300 * MIB, 1000 * MIB)
    assert str(10_300 * MIB) in told
    assert str(10_000 * MIB) in told
    assert f"{999 * MIB} were planned" in disagreement(memory, 10_000 * MIB, 999 * MIB)


def test_a_tensor_that_lies_elsewhere_is_named() -> None:
    tensors = {"model.a": torch.zeros(1), "cache.0.k": torch.zeros(1)}
    places = {tensor.data_ptr(): "device 0" for tensor in tensors.values()}
    tensors["model.rope.cos"] = torch.zeros(16, 0)  # of a model without rotation: it lies nowhere
    inspect = Residency(tensors, "device 0", places.__getitem__)
    assert inspect() == ""
    for place in ("managed memory", "device 1"):
        places[tensors["cache.0.k"].data_ptr()] = place
        assert inspect() == f"cache.0.k lies in {place}, not on device 0"


class FakeDriver:
    """Writes what the driver would: the memory's type, whether it is managed, the device."""

    def __init__(self, code: int, *values: int) -> None:
        self.code, self.values = code, values

    def cuPointerGetAttributes(  # noqa: N802 - the name it has in C
        self, count: int, attributes: Any, values: Any, address: ctypes.c_uint64
    ) -> int:
        assert list(attributes) == [2, 8, 9]  # CU_POINTER_ATTRIBUTE_MEMORY_TYPE, _IS_MANAGED, _DEVICE_ORDINAL
        assert (count, address.value) == (3, 2**63 + 5)
        for where, value in zip(values, self.values, strict=True):
            ctypes.c_int.from_address(where).value = value
        return self.code


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((2, 0, 3), "device 3"),
        ((1, 0, 0), "host memory"),
        ((2, 1, 0), "managed memory"),
        ((0, 0, -2), "unknown memory"),
    ],
)
def test_the_driver_is_asked_by_its_own_numbers(
    values: tuple[int, int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = FakeDriver(0, *values)
    monkeypatch.setattr(residency.ctypes, "CDLL", lambda _: driver)
    locate = locate_by_driver()
    assert locate(2**63 + 5) == expected
    driver.code = 201
    with pytest.raises(CudaError, match="error 201"):
        locate(2**63 + 5)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now_s=100.0)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    return clock


def test_the_loop_looks_every_minute_idle_or_not_and_speaks_when_it_changes(clock: SimpleNamespace) -> None:
    answers: Iterator[str] = iter(["", "cache.0.k lies in host memory", "cache.0.k lies in host memory", ""])
    waits: list[float | None] = []
    sent: list[Message] = []
    looked_s: list[float] = []

    def receive(wait_s: float | None) -> list[Command]:
        waits.append(wait_s)
        clock.now_s += 20.0
        if len(waits) == 1:
            return [Submit(1, request(max_tokens=5))]
        return [Close()] if len(waits) == 13 else []

    def inspect() -> str:
        looked_s.append(clock.now_s)
        return next(answers)

    assert run_loop(scripted.Rig().core, receive, sent.append, inspect)
    assert looked_s == [160.0, 220.0, 280.0, 340.0]
    problems = [message.problem for message in sent if isinstance(message, Inspected)]
    assert problems == ["cache.0.k lies in host memory", ""]
    assert {0.0, loop.IDLE_CHECK_S, loop.INSPECT_S} == set(waits), "an idle engine wakes to look, a busy one goes on"


def test_without_an_inspector_an_idle_engine_sleeps() -> None:
    waits: list[float | None] = []
    run_loop(scripted.Rig().core, lambda wait_s: waits.append(wait_s) or [Close()], lambda _: None)
    assert waits == [None]


class Slowing(scripted.ScriptedStep):
    """Warns from its third launch on."""

    @property
    def warning(self) -> str:
        return "steps are launched one by one" if len(self.plans) > 2 else ""


def test_a_step_that_begins_to_warn_is_heard_once() -> None:
    rig, told, sent = Rig(), list[str](), list[Message]()
    commands: Iterator[list[Command]] = iter([[Submit(1, request(max_tokens=6))], *([[]] * 8), [Close()]])
    run_loop(scripted.Rig(Slowing()).core, lambda _: next(commands), sent.append)
    rig.client.on_warned = told.append
    for message in sent:
        if not isinstance(message, Report):
            rig.client._receive(_message_decoder.decode(_encoder.encode(message)))
    assert told == ["steps are launched one by one"]
    assert rig.client.status().healthy


def test_health_follows_what_the_inspector_says() -> None:
    rig, told = Rig(), list[str]()
    rig.client.on_inspected = told.append
    assert rig.client.status().resident
    for problem in ("cache.0.k lies in host memory", ""):
        message = _message_decoder.decode(_encoder.encode(Inspected(problem)))
        rig.client._receive(message)
        status = rig.client.status()
        assert (status.healthy, status.ready, status.resident) == (not problem,) * 3
        assert status.reason == problem
    assert told == ["cache.0.k lies in host memory", ""]


def test_memory_by_purpose_travels_with_the_facts() -> None:
    rig = Rig()
    rig.client._facts = msgspec.structs.replace(rig.client._facts, memory={"weights": 7})
    assert rig.client.status().memory == {"weights": 7}
