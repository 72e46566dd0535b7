"""Waiting before a job begins: for the thread that prepares, and for the child that tries a grammar out."""

from __future__ import annotations

import asyncio
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fakes import ScriptedEngine, text_script
from tests.server.client import Answer, Rig, eventually, live, make_rig
from worker_orcd.server import grammar_check
from worker_orcd.tokenizer.chat import ChatTemplate

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


class Children:
    """In the place of child processes: they end, well, when `may_end` is set. `begun` has their grammars."""

    def __init__(self) -> None:
        self.may_end = threading.Event()
        self.begun: list[str] = []

    def run(self, _: list[str], *, input: bytes, **__: Any) -> subprocess.CompletedProcess[bytes]:
        self.begun.append(json.loads(input)["text"])
        assert self.may_end.wait(20)
        return subprocess.CompletedProcess([], 0, b"")


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Iterator[Children]:
    children = Children()
    monkeypatch.setattr(subprocess, "run", children.run)
    yield children
    children.may_end.set()


def engine() -> ScriptedEngine:
    return ScriptedEngine(lambda _: text_script("hi"), max_running=100)


def rig_of() -> Rig:
    return make_rig(engine(), ChatTemplate("{{ messages[0].content }}"))


def asking(regex: str) -> dict[str, Any]:
    return HELLO | {"structured_outputs": {"regex": regex}}


async def _until(condition: Any) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not happen")


def test_nobody_waits_for_the_grammars_of_others_without_need(
    children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What needs no child is answered, a deadline is kept, and more than can be served in time are refused."""
    monkeypatch.setattr(grammar_check, "WAIT_S", 0.87)
    rig, most = rig_of(), 4  # at seven eighths of half a second

    async def play() -> list[Answer]:
        children.may_end.set()
        assert (await rig.acall("POST", CHAT, asking("known"))).status == 200
        children.may_end.clear()
        waiting = [asyncio.create_task(rig.acall("POST", CHAT, asking(f"a{i}"))) for i in range(most)]
        await _until(lambda: len(children.begun) == 1 + grammar_check.NUM_CHILDREN)
        for body in (HELLO, asking("known"), HELLO | {"response_format": {"type": "json_object"}}):
            assert (await rig.acall("POST", CHAT, body)).status == 200
        same = asyncio.create_task(rig.acall("POST", CHAT, asking("a0")))
        full = await rig.acall("POST", CHAT, asking("b"))
        assert (full.status, full.error["code"], full.headers["retry-after"]) == (429, "OVERLOADED", "1")
        late = await rig.acall("POST", CHAT, asking("a1"), {"X-Deadline": str(int(time.time() * 1000) + 100)})
        assert (late.status, late.error["code"]) == (504, "INFERENCE_TIMEOUT")
        assert not any(task.done() for task in waiting)
        children.may_end.set()
        return await asyncio.gather(same, *waiting)

    assert [answer.status for answer in asyncio.run(play())] == [200] * (1 + most)
    assert sorted(children.begun) == sorted(["known", *(f"a{i}" for i in range(most))])


def test_a_worker_that_stops_lets_nobody_wait_for_a_grammar(children: Children) -> None:
    rig = rig_of()

    async def play() -> list[Answer]:
        waiting = [asyncio.create_task(rig.acall("POST", CHAT, asking(f"a{i}"))) for i in range(5)]
        await _until(lambda: len(children.begun) == grammar_check.NUM_CHILDREN)
        assert (await rig.acall("POST", "/shutdown", {})).status == 202
        return await asyncio.gather(*waiting)

    answers = asyncio.run(play())
    assert {(answer.status, answer.error["code"]) for answer in answers} == {(503, "SHUTTING_DOWN")}
    assert len(children.begun) == grammar_check.NUM_CHILDREN, "the others were not begun"


def test_the_grammar_of_a_client_that_left_is_not_looked_at(children: Children) -> None:
    with live(engine(), template=ChatTemplate("{{ messages[0].content }}")) as server:
        begun = [server.send(CHAT, asking(name)) for name in ("first", "second")]
        eventually(lambda: len(children.begun) == 2)
        gone = server.send(CHAT, asking("gone"))
        time.sleep(0.2)
        gone.close()
        eventually(lambda: server.rig.scrape()["worker_client_disconnects_total"] == 1)
        children.may_end.set()
        assert server.post(CHAT, asking("last")).status == 200
        for peer in begun:
            peer.close()
    assert sorted(children.begun) == ["first", "last", "second"]


def test_the_prompt_of_a_client_that_left_is_not_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor that of one whose time is over."""
    may_end, rendered, template = threading.Event(), [], ChatTemplate("")

    def render(messages: Any, *_: Any, **__: Any) -> str:
        rendered.append(messages[0]["content"])
        assert may_end.wait(20)
        return "x"

    monkeypatch.setattr(template, "render", render)

    def asks(name: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": name}]}

    with live(engine(), template=template) as server:
        first = server.send(CHAT, asks("first"))
        eventually(lambda: rendered)
        gone = server.send("/apply-template", asks("gone"))
        deadline = {"X-Deadline": str(int(time.time() * 1000) + 100)}
        late = server.rig.call("POST", CHAT, asks("late"), deadline)
        assert (late.status, late.error["code"]) == (504, "INFERENCE_TIMEOUT")
        gone.close()
        eventually(lambda: server.rig.scrape()["worker_client_disconnects_total"] == 1)
        may_end.set()
        assert server.post(CHAT, asks("last")).status == 200
        first.close()
    assert rendered == ["first", "last"]
