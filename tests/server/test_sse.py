"""Framing against an independent parser."""

from __future__ import annotations

import json
import subprocess
import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.server.client import SseEvent, SseParser
from worker_orcd.server.sse import KEEP_ALIVE, EndEvent, TokenEvent, frame


@given(text=st.text(st.characters(exclude_categories=["Cs"])), cuts=st.lists(st.integers(0, 200), max_size=5))
def test_any_text_survives_in_any_pieces(text: str, cuts: list[int]) -> None:
    raw = frame("token", TokenEvent(text, 3, 70)) + KEEP_ALIVE + frame("token", TokenEvent("b", 4, 71))
    parser, events = SseParser(), []
    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(raw)], strict=True):
        events += parser.feed(raw[begin:end])
    parser.close()
    expected = [{"t": text, "i": 3, "id": 70}, {"t": "b", "i": 4, "id": 71}]
    assert events == [SseEvent("token", data) for data in expected]
    assert parser.comments == ["keep-alive"]


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_line_ends_in_the_data_forge_no_field(end: bytes) -> None:
    raw = frame("token", b'{"a":' + end + b"1," + end + b'"event": "error"}')
    assert SseParser().feed(raw) == [SseEvent("token", {"a": 1, "event": "error"})]


def test_an_event_name_is_one_word() -> None:
    with pytest.raises(AssertionError):
        frame("token\ndata: x", b"{}")


def test_optional_fields_of_the_end_are_left_out() -> None:
    end = EndEvent(tokens_out=1, decode_time_ms=2.0, stop_reason="eos", seed=3)
    assert json.loads(msgspec.json.encode(end)) == {
        "tokens_out": 1,
        "decode_time_ms": 2.0,
        "stop_reason": "eos",
        "seed": 3,
    }


def test_the_edge_needs_no_tensors() -> None:
    code = "import sys, worker_orcd.server.run, worker_orcd.server.app; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
