"""Framing against an independent parser."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message

from tests.server.client import SseEvent, SseParser
from worker_orcd.server.sse import KEEP_ALIVE, EndEvent, ErrorEvent, EventStream, TokenEvent, frame, token_frame


@given(text=st.text(st.characters(exclude_categories=["Cs"])), cuts=st.lists(st.integers(0, 200), max_size=5))
def test_any_text_survives_in_any_pieces(text: str, cuts: list[int]) -> None:
    raw = frame("token", TokenEvent(text, 3, 70)) + KEEP_ALIVE + token_frame("b", 4, 71)
    parser, events = SseParser(), []
    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(raw)], strict=True):
        events += parser.feed(raw[begin:end])
    parser.close()
    expected = [{"t": text, "i": 3, "id": 70}, {"t": "b", "i": 4, "id": 71}]
    assert events == [SseEvent("token", data) for data in expected]
    assert parser.comments == ["keep-alive"]


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_a_token_is_framed_as_any_event(text: str) -> None:
    assert token_frame(text, 3, 70) == frame("token", TokenEvent(text, 3, 70))


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\u2028", "\x85"])
def test_line_ends_in_the_data_forge_no_field(end: str) -> None:
    forged = f"a{end}event: end{end}{end}data: {{}}"
    raw = frame("error", ErrorEvent("INTERNAL", forged, False))
    assert raw.count(b"\n") == 3
    assert b"\r" not in raw
    data = {"code": "INTERNAL", "message": forged, "retriable": False}
    assert SseParser().feed(raw) == [SseEvent("error", data)]


def test_an_event_name_is_one_word() -> None:
    with pytest.raises(AssertionError):
        frame("token\ndata: x", TokenEvent("", 0, 0))


def test_a_stream_opens_once_though_two_write() -> None:
    sent: list[str] = []

    async def send(message: Message) -> None:
        await asyncio.sleep(0)
        sent.append(message["type"])

    async def story() -> None:
        stream = EventStream(send)
        await asyncio.gather(stream.write(KEEP_ALIVE), stream.write(KEEP_ALIVE))

    asyncio.run(story())
    assert sent == ["http.response.start", "http.response.body", "http.response.body"]


def test_optional_fields_of_the_end_are_left_out() -> None:
    end = EndEvent(tokens_out=1, decode_time_ms=2.0, stop_reason="eos", seed=3, cached_tokens=2)
    assert json.loads(msgspec.json.encode(end)) == {
        "tokens_out": 1,
        "decode_time_ms": 2.0,
        "stop_reason": "eos",
        "seed": 3,
        "cached_tokens": 2,
    }


def test_the_edge_needs_no_tensors() -> None:
    code = "import sys, worker_orcd.server.run, worker_orcd.server.app; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
