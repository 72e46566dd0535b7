"""Narration: the shape of a line, what is redacted, what a broken sink costs."""

from __future__ import annotations

import contextlib
import json
import os
import select
import threading
import time
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker_orcd.narration import EVENTS, LEVELS, BackgroundSink, Capture, Level, Narrator, clean
from worker_orcd.worker import _warn


def make(level: Level = "info") -> tuple[Narrator, Capture]:
    sink = Capture()
    return Narrator("worker-1", "model.gguf", 0, sink=sink, level=level), sink


@pytest.mark.parametrize("event", sorted(EVENTS))
def test_every_event_with_every_field_is_one_line_of_one_shape(event: str) -> None:
    narrator, sink = make()
    narrator.narrate(event, "did it", job_id="j", correlation_id="c", **dict.fromkeys(EVENTS[event], 1))
    assert sink.text.count("\n") == 1
    record = json.loads(sink.text)
    assert set(record) == EVENTS[event] | {
        *("timestamp", "level", "component", "worker_id", "job_id", "correlation_id", "model_ref", "gpu_device"),
        *("event", "actor", "action", "target", "human", "emitted_by", "emitted_at_ms"),
    }
    assert abs(datetime.fromisoformat(record["timestamp"]).timestamp() * 1000 - record["emitted_at_ms"]) < 2
    assert record["timestamp"].endswith("Z")
    assert record["emitted_by"].startswith("worker-orcd@")
    assert record["level"] == "INFO"


def test_there_are_nine_events_and_none_has_room_for_text() -> None:
    assert len(EVENTS) == 9
    assert not set().union(*EVENTS.values()) & {"prompt", "output", "text", "stop", "token"}


@pytest.mark.parametrize(
    ("event", "fields"), [("nonsense", {}), ("ready", {"prompt": "x"}), ("ready", {"percent": 1})]
)
def test_unknown_events_and_fields_are_bugs(event: str, fields: dict[str, object]) -> None:
    narrator, _ = make()
    with pytest.raises(AssertionError):
        narrator.narrate(event, "x", **fields)


def test_fields_without_a_value_are_left_out() -> None:
    narrator, sink = make()
    narrator.narrate("error", "x", job_id=None, code=None, retriable=False)
    assert {"job_id", "code"}.isdisjoint(sink.events()[0])
    assert sink.events()[0]["retriable"] is False


@pytest.mark.parametrize("least", LEVELS)
def test_levels(least: Level) -> None:
    narrator, sink = make(least)
    for level in LEVELS:
        narrator.narrate("error", "x", level=level)
    expected = [name.upper() for name in LEVELS[LEVELS.index(least) :] if name != "mute"]
    assert [event["level"] for event in sink.events()] == expected


SECRETS = [
    "Bearer abc.def-123",
    "authorization: Basic dXNlcjpwYXNz",
    "sk-abcdefghijklmnop",
    "hf_abcdefghijklmnop",
    "ghp_abcdefghijklmnop",
    "AKIAABCDEFGHIJKLMNOP",
    "api_key=hunter22",
    'api-key: "hunter22"',
    "LLORCH_WORKER_TOKEN=hunter22",
    "password: hunter22",
    "eyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJ",
    "https://user:hunter22@host/x",
    "redis://:hunter22@host",
    "-----BEGIN RSA PRIVATE KEY-----\nhunter22\nhunter22\n-----END RSA PRIVATE KEY-----",
    "-----BEGIN PRIVATE KEY-----\nhunter22",
]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("field", ["human", "reason", "target", "fields"])
def test_secrets_are_redacted_everywhere(secret: str, field: str) -> None:
    narrator, sink = make()
    text = f"before {secret} after"
    given = {"human": "x"} | {field: [text] if field == "fields" else text}
    narrator.narrate("error", given.pop("human"), **given)
    assert "[redacted]" in sink.text
    tail = secret.replace("Bearer ", "").replace("authorization: Basic ", "")
    for piece in ("hunter22", tail):
        assert piece not in sink.text


def test_a_secret_split_by_an_invisible_character_is_redacted() -> None:
    assert clean("sk-abcd\u200befghijklmnop") == "[redacted]"


def test_ordinary_text_stays() -> None:
    text = "loaded 12 tensors of model.gguf: tokens_in 5, https://host:80/path, basic facts"
    assert clean(text) == text


@given(st.text())
def test_no_text_breaks_a_line_or_hides(text: str) -> None:
    narrator, sink = make()
    narrator.narrate("error", text, reason=text, job_id=text, actor=text, target=text, fields=[text])
    assert sink.text.count("\n") == 1
    assert len(sink.text.splitlines()) == 1
    record = json.loads(sink.text)
    assert len(record["human"]) <= 100
    assert record["actor"].isascii()
    for char in "\r\n\t\x00\x1b\u200b\u200d\u202e\u2028\ufeff":
        assert char not in record["reason"]


def test_human_is_cut_at_a_hundred_characters() -> None:
    narrator, sink = make()
    narrator.narrate("error", "é" * 101)
    assert sink.events()[0]["human"] == "é" * 99 + "…"


def test_a_broken_sink_costs_lines_only() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    pipe = os.fdopen(write_end, "w")
    narrator = Narrator("w", "m", None, sink=pipe)
    narrator.narrate("ready", "x")
    narrator.narrate("ready", "x")
    assert narrator.num_dropped == 2
    with contextlib.suppress(BrokenPipeError):
        pipe.close()
    narrator.narrate("ready", "x")
    assert narrator.num_dropped == 3


def test_a_pipe_that_nobody_reads_costs_lines_and_no_time() -> None:
    read_fd, write_fd = os.pipe()
    sink = BackgroundSink(write_fd, max_lines=100)
    narrator = Narrator("w", "m", None, sink=sink)
    began = time.monotonic()
    for i in range(1000):
        narrator.narrate("error", "x" * 90, code=str(i))
    assert time.monotonic() - began < 10
    assert 0 < narrator.num_dropped < 1000
    lines = b""
    reader = threading.Thread(target=sink.close, args=(10,))
    reader.start()
    while reader.is_alive() or select.select([read_fd], [], [], 0)[0]:
        if select.select([read_fd], [], [], 0.05)[0]:
            lines += os.read(read_fd, 65536)
    os.close(write_fd)
    os.close(read_fd)
    codes = [int(json.loads(line)["code"]) for line in lines.splitlines()]
    assert codes == sorted(codes)
    assert len(codes) == 1000 - narrator.num_dropped


def test_a_pipe_whose_reader_left_costs_nothing() -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    sink = BackgroundSink(write_fd)
    Narrator("w", "m", None, sink=sink).narrate("error", "x")
    sink.close(5)
    assert not sink._thread.is_alive()
    os.close(write_fd)


def test_what_the_engine_warns_of_is_a_line() -> None:
    narrator, sink = make("warn")
    _warn(narrator, "step", "steps are launched one by one")
    record = json.loads(sink.text)
    assert (record["level"], record["action"]) == ("WARN", "step")
    assert record["reason"] == "steps are launched one by one"
