"""The whole worker as a child process: start, serve, and every way to end it."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.workers import PROMPT, Worker, catches, real_worker
from worker_orcd.assemble import embedded_model

FIVE = ["0", "25", "50", "75", "100"]


@pytest.fixture(scope="module")
def served() -> Iterator[Worker]:
    with real_worker() as running:
        running.wait_for("ready")
        yield running


def test_what_may_not_be_expected_is_warned_of() -> None:
    with real_worker("--kv-cache-size-mb", "1") as worker:
        worker.wait_for("ready")
        [warning] = worker.events("error")
    assert (warning["level"], warning["action"]) == ("WARN", "start")
    assert "context_length is 160, not the model's 2048" in warning["reason"]


def ids(events: list[tuple[str, dict[str, Any]]]) -> list[int]:
    return [data["id"] for name, data in events if name == "token"]


def test_a_life_is_narrated_in_order(served: Worker) -> None:
    served.execute(max_tokens=2)
    served.wait_for("execute_end")
    names = [event["event"] for event in served.events()]
    assert names[:9] == ["startup", "model_load_start", *["model_load_progress"] * 5, "model_load_complete", "ready"]
    assert [str(event["percent"]) for event in served.events("model_load_progress")] == FIVE
    assert {"execute_start", "execute_end"} <= set(names[9:])
    assert served.events("ready")[0]["port"] == served.port


def test_events_tokens_and_text(served: Worker) -> None:
    events = served.execute(temperature=0, max_tokens=60)
    assert [name for name, _ in events] == ["started", *["token"] * (len(events) - 2), "end"]
    assert [data["i"] for name, data in events if name == "token"] == list(range(len(events) - 2))
    end = events[-1][1]
    assert end["tokens_out"] == len(events) - 2
    assert end["stop_reason"] == "eos"
    assert end["seed"] == events[0][1]["seed"] == 42
    text = "".join(data.get("t", "") for _, data in events)
    assert len(text.strip().splitlines()) == 3


def test_the_same_request_gives_the_same_ids_in_two_processes(served: Worker) -> None:
    with real_worker() as other:
        other.wait_for("ready")
        for temperature in (0.0, 0.7):
            fields = {"temperature": temperature, "max_tokens": 50}
            first = ids(served.execute(**fields))
            assert ids(served.execute(**fields)) == first
            assert ids(other.execute(**fields)) == first


def test_stop_string_limits_and_template(served: Worker) -> None:
    whole = "".join(data.get("t", "") for _, data in served.execute(temperature=0))
    stop = whole.strip().split("\n")[1][3:8]
    events = served.execute(temperature=0, stop=["never said", stop])
    assert events[-1][1]["stop_reason"] == "stop_sequence"
    assert events[-1][1]["stop_sequence_matched"] == stop
    assert "".join(data.get("t", "") for _, data in events) == whole[: whole.index(stop)]
    end = served.execute(max_tokens=3)[-1][1]
    receipt = end.pop("receipt")
    assert receipt["max_tokens"] == 3
    assert end | {"decode_time_ms": 0} == {
        "tokens_out": 3, "decode_time_ms": 0, "stop_reason": "max_tokens", "seed": 42, "cached_tokens": 0,
    }  # fmt: skip
    assert served.execute(temperature=0, apply_chat_template=True)[0][1]["prompt_tokens"] > len(PROMPT.split())


def test_every_bad_field_is_named(served: Worker) -> None:
    body = {"job_id": "", "prompt": 3, "temperature": 9, "top_k": -1, "seed": 1.5, "n": 2}
    status, raw = served.request("POST", "/execute", body)
    assert status == 400
    error = json.loads(raw)["error"]
    assert error["code"] == "INVALID_REQUEST"
    assert {e["field"] for e in error["details"]["errors"]} == set(body)


def test_a_prompt_too_long_is_refused_with_counts(served: Worker) -> None:
    status, raw = served.request("POST", "/execute", {"job_id": "long", "prompt": "x?" * 3000})
    assert status == 400
    message = json.loads(raw)["error"]["details"]["errors"][0]["message"]
    assert "2047" in message
    assert any(int(word) > 2047 for word in message.split() if word.isdigit())


def test_health(served: Worker) -> None:
    status, raw = served.request("GET", "/health")
    health = json.loads(raw)
    assert status == 200
    assert health["status"] == "healthy"
    assert (health["quant_kind"], health["tokenizer_kind"]) == ("Q4_K_M", "gguf-bpe")
    assert (health["device"], health["vram_bytes_used"], health["resident"]) == ("cpu", 0, False)
    assert health["context_length"] == 2048


def test_a_client_that_leaves_makes_room_for_the_next(served: Worker) -> None:
    body = json.dumps({"job_id": "leaver", "prompt": "Tell a story.", "temperature": 2, "max_tokens": 2000}).encode()
    with socket.create_connection(("127.0.0.1", served.port)) as peer:
        peer.sendall(b"POST /execute HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert b"200 OK" in peer.recv(1000)
    assert served.execute(max_tokens=1)[-1][0] == "end"


def test_no_text_in_the_log(served: Worker) -> None:
    served.execute(prompt="Write a haiku about xylophones", max_tokens=8)
    served.request("POST", "/execute", {"job_id": "bad", "prompt": "xylophones", "temperature": "xylophones"})
    assert "xylophone" not in "".join(served.lines)


def test_shutdown_over_http_ends_with_status_0() -> None:
    with real_worker() as running:
        running.wait_for("ready")
        assert running.request("POST", "/shutdown")[0] == 202
        assert running.end() == 0
        assert running.events("shutdown")[-1]["exit_code"] == 0


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        *((number, moment) for number in (15, 2) for moment in ("startup", "model_load_start", "ready")),
        (signal.SIGHUP, "ready"),
    ],
)
def test_signals_end_it_cleanly_at_any_moment(number: int, moment: str) -> None:
    with real_worker() as running:
        running.wait_for(moment)
        running.process.send_signal(number)
        assert running.end() == 0
        assert "Traceback" not in "".join(running.lines)


@pytest.mark.parametrize("delay_s", [0.0, 0.5, 1.0])
def test_signals_before_the_first_line_of_the_log(delay_s: float) -> None:
    with real_worker() as running:
        while not catches(running.process.pid, signal.SIGTERM):
            time.sleep(0.01)
        time.sleep(delay_s)
        running.process.terminate()
        assert running.end() == 0
        assert "Traceback" not in "".join(running.lines)


@pytest.mark.parametrize("gap_s", [0.05, 0.3])
def test_a_second_signal_does_not_cut_the_end(gap_s: float) -> None:
    with real_worker() as running:
        running.wait_for("ready")
        running.process.terminate()
        time.sleep(gap_s)
        if running.process.poll() is None:
            running.process.terminate()
        assert running.end() == 0


def test_a_job_id_is_free_as_soon_as_its_stream_has_ended(served: Worker) -> None:
    for _ in range(20):
        events = served.execute(job_id="same", temperature=0, stop=["s"], max_tokens=40)
        assert events[-1][1]["stop_reason"] == "stop_sequence"


def test_sigterm_lets_a_running_answer_finish() -> None:
    with real_worker() as running:
        running.wait_for("ready")
        answers: list[list[tuple[str, dict[str, Any]]]] = []
        asking = threading.Thread(target=lambda: answers.append(running.execute(temperature=0)))
        asking.start()
        running.wait_for("execute_start")
        running.process.terminate()
        asking.join(20)
        assert running.end() == 0
        assert answers[0][-1][1]["stop_reason"] == "eos"


def test_a_port_in_use_is_one_clear_line(served: Worker) -> None:
    with real_worker(port=served.port) as second:
        assert second.end() == 1
        assert f"port {served.port}" in second.lines[-1]
        assert second.lines[-1].startswith("WORKER_START_FAILED: ")
        assert "Traceback" not in "".join(second.lines)


def test_a_bad_model_is_one_clear_line_and_a_fatal_event(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + b"\0" * 60)
    with real_worker("--model", str(bad)) as running:
        assert running.end() == 1
        assert running.lines[-1].startswith("MODEL_LOAD_FAILED: ")
        assert running.events("error")[0]["code"] == "MODEL_LOAD_FAILED"


def test_a_file_that_vanishes_while_serving_changes_nothing(served: Worker, tmp_path: Path) -> None:
    copy = tmp_path / "a model with späces.gguf"
    copy.write_bytes(embedded_model().read_bytes())
    with real_worker("--model", str(copy)) as running:
        running.wait_for("ready")
        with copy.open("r+b") as file:
            file.truncate(100)
        copy.unlink()
        assert ids(running.execute(temperature=0)) == ids(served.execute(temperature=0))


@pytest.mark.parametrize("delay_s", [0.1, 0.5, 1.0, 1.5])
def test_a_file_cut_while_starting_ends_in_an_error_or_a_sound_worker(tmp_path: Path, delay_s: float) -> None:
    """Never a signal and never a traceback, whenever it happens."""
    copy = tmp_path / "model.gguf"
    copy.write_bytes(embedded_model().read_bytes())
    with real_worker("--model", str(copy)) as running:
        time.sleep(delay_s)
        with copy.open("r+b") as file:
            file.truncate(2_000_000)
        while running.process.poll() is None and not running.events("ready"):
            time.sleep(0.02)
        if running.process.poll() is None:
            assert running.execute(max_tokens=3)[-1][0] == "end"
        else:
            assert running.end() == 1
            assert running.lines[-1].startswith("MODEL_LOAD_FAILED: ")
        assert "Traceback" not in "".join(running.lines)
