"""What surrounds every exchange: error body, correlation id, deadline, host, origin, health, silent log."""

from __future__ import annotations

import time
import uuid
from datetime import UTC, datetime, timedelta, timezone

import pytest

from tests.fakes import ScriptedEngine, forever, text_script
from tests.server.client import Rig, make_rig
from worker_orcd.engine.request import Failed
from worker_orcd.server.exchange import is_loopback_host, parse_deadline


@pytest.fixture(scope="module")
def rig() -> Rig:
    return make_rig()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/health/", 404),
        ("POST", "/nowhere", 404),
        ("GET", "/execute", 405),
        ("POST", "/health", 405),
        ("DELETE", "/cancel", 405),
        ("POST", "/cancel", 400),
        ("POST", "/execute", 400),
    ],
)
def test_every_failure_has_the_error_body(rig: Rig, method: str, path: str, status: int) -> None:
    answer = rig.call(method, path)
    assert answer.status == status
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.error) == {"code", "message", "retriable", "correlation_id", "details"}
    assert answer.error["code"] == "INVALID_REQUEST"
    assert answer.error["retriable"] is False
    assert answer.error["correlation_id"] == answer.headers["x-correlation-id"]
    assert rig.log.events("error")[-1]["correlation_id"] == answer.headers["x-correlation-id"]
    assert ("allow" in answer.headers) == (status == 405)


def test_a_bug_is_internal_and_shows_nothing() -> None:
    rig = make_rig()
    rig.engine.status = None  # type: ignore[assignment, method-assign]
    answer = rig.call("GET", "/health")
    assert (answer.status, answer.error["code"]) == (500, "INTERNAL")
    assert b"NoneType" not in answer.body
    assert rig.log.events("error")[0]["reason"] == "TypeError"


@pytest.mark.parametrize(
    ("sent", "is_kept"),
    [
        ("a", True),
        ("A-1" * 21, True),
        ("a" * 64, True),
        ("dd7efd79-fad8-4c41-86ca-0fdfef7f513b", True),
        ("", False),
        ("a" * 65, False),
        ("a b", False),
        ("a_b", False),
        ("é", False),
        ("a\x00", False),
        ("a\r\nx: y", False),
    ],
)
@pytest.mark.parametrize("path", ["/health", "/nowhere"])
def test_correlation_ids(rig: Rig, sent: str, is_kept: bool, path: str) -> None:
    told = rig.call("GET", path, headers={"x-correlation-id": sent}).headers["x-correlation-id"]
    if is_kept:
        assert told == sent
    else:
        assert uuid.UUID(told).version == 4


def test_a_repeated_correlation_id_is_replaced(rig: Rig) -> None:
    told = rig.call("GET", "/health", headers={"x-correlation-id": "a", "X-Correlation-Id": "a"})
    assert told.headers["x-correlation-id"] != "a"


def test_streams_carry_the_correlation_id(rig: Rig) -> None:
    answer = rig.execute(headers={"x-correlation-id": "trace-7"})
    assert answer.headers["x-correlation-id"] == "trace-7"
    assert {event["correlation_id"] for event in rig.log.events()[-2:]} == {"trace-7"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0.0),
        ("1700000000123", 1700000000.123),
        ("1970-01-01T00:00:10Z", 10.0),
        ("1970-01-01t01:00:10.5+01:00", 10.5),
        ("1970-01-01T00:00:10", None),
        ("1970-13-01T00:00:10Z", None),
        ("-5", None),
        ("1e3", None),
        ("١٢٣", None),
        ("tomorrow", None),
        ("", None),
        ("9" * 16, None),
    ],
)
def test_deadlines(text: str, expected: float | None) -> None:
    assert parse_deadline(text) == expected


def test_a_deadline_that_has_passed_is_a_timeout_at_once(rig: Rig) -> None:
    past = (datetime.now(timezone(timedelta(hours=3))) - timedelta(seconds=1)).isoformat()
    answer = rig.execute(headers={"x-deadline": past})
    assert (answer.status, answer.error["code"], answer.error["retriable"]) == (504, "INFERENCE_TIMEOUT", True)


def test_a_deadline_bounds_the_time_of_a_job() -> None:
    rig = make_rig(ScriptedEngine(lambda _: forever()))
    began_s = time.monotonic()
    answer = rig.execute(headers={"x-deadline": str(int(time.time() * 1000) + 500)})
    assert answer.events[-1].data["code"] == "INFERENCE_TIMEOUT"
    assert 0.3 < time.monotonic() - began_s < 3
    assert 0 < rig.engine.requests[0].timeout_s <= 0.5
    assert rig.engine.cancelled == ["job"]
    assert rig.log.events("execute_end")[0]["outcome"] == "timeout"


def test_a_far_deadline_changes_nothing(rig: Rig) -> None:
    assert rig.execute(headers={"x-deadline": "9999-12-31T23:59:59Z"}).status == 200
    assert rig.engine.requests[-1].timeout_s == 300.0


def test_a_malformed_deadline_is_ignored_with_a_warning(rig: Rig) -> None:
    assert rig.execute(headers={"x-deadline": "soon"}).status == 200
    assert rig.log.events("error")[-1]["level"] == "WARN"
    assert "X-Deadline" in rig.log.events("error")[-1]["human"]


@pytest.mark.parametrize(
    ("host", "is_allowed"),
    [
        ("localhost", True),
        ("LOCALHOST:1", True),
        ("127.0.0.1:8080", True),
        ("127.8.9.1", True),
        ("[::1]", True),
        ("[::1]:80", True),
        ("::1", False),
        ("", False),
        ("example.com", False),
        ("localhost.example.com", False),
        ("127.0.0.1.example.com", False),
        ("10.0.0.1", False),
        ("0.0.0.0", False),
        ("[::2]:80", False),
        ("localhost:80:80", False),
        ("user@localhost", False),
    ],
)
def test_only_loopback_names_are_served(rig: Rig, host: str, is_allowed: bool) -> None:
    assert is_loopback_host(host) == is_allowed
    assert rig.call("GET", "/health", headers={"host": host}).status == (200 if is_allowed else 421)


@pytest.mark.parametrize(
    ("origin", "status"),
    [("http://localhost:3000", 200), ("http://127.0.0.1", 200), ("https://evil.example", 403), ("null", 403)],
)
def test_pages_of_other_origins_are_refused(rig: Rig, origin: str, status: int) -> None:
    assert rig.execute(headers={"origin": origin}).status == status


def test_encoded_bodies_are_refused(rig: Rig) -> None:
    assert rig.execute(headers={"content-encoding": "gzip"}).status == 415


def test_health_of_a_ready_worker(rig: Rig) -> None:
    answer = rig.call("GET", "/health")
    assert answer.status == 200
    uptime = answer.json.pop("uptime_seconds")
    assert uptime >= 0
    assert answer.json | {"uptime_seconds": 0} == {
        "status": "healthy",
        "state": "ready",
        "worker_id": "worker-test",
        "model": "scripted",
        "architecture": "llama",
        "quant_kind": "Q4_K_M",
        "resident": True,
        "vram_bytes_used": 1 << 20,
        "memory_bytes": {},
        "tokenizer_kind": "gguf-bpe",
        "tokenizer_model": "bpe",
        "vocab_size": 257,
        "context_length": 4096,
        "device": "cpu",
        "backend": "scripted",
        "uptime_seconds": 0,
        "num_running": 0,
        "num_waiting": 0,
        "blocks_total": 64,
        "blocks_used": 0,
        "blocks_cached": 8,
        "capabilities": ["text-gen"],
        "protocol": "sse",
    }


def test_health_is_built_at_intervals_but_a_change_shows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker_orcd.server.control.HEALTH_S", 1000.0)
    rig = make_rig()
    first = rig.call("GET", "/health").body
    assert rig.call("GET", "/health").body == first
    rig.engine.is_healthy = False
    failed = rig.call("GET", "/health")
    assert (failed.status, failed.json["state"], failed.json["resident"]) == (503, "failed", False)
    rig.engine.is_healthy = True
    assert rig.call("GET", "/health").json["state"] == "ready"
    rig.call("POST", "/shutdown")
    draining = rig.call("GET", "/health")
    assert (draining.status, draining.json["state"]) == (503, "draining")


def test_health_follows_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker_orcd.server.control.HEALTH_S", 0.0)
    rig = make_rig()
    assert rig.call("GET", "/health").json["num_waiting"] == 0
    rig.engine.waiting.append("somebody")
    assert rig.call("GET", "/health").json["num_waiting"] == 1


def test_readiness_is_progress_and_the_will_to_take_work() -> None:
    rig = make_rig()
    ready = rig.call("GET", "/ready")
    assert (ready.status, ready.json) == (200, {"ready": True})
    rig.engine.is_ready = False
    stuck = rig.call("GET", "/ready")
    assert (stuck.status, stuck.json) == (503, {"ready": False, "reason": "no step for 5 s"})
    assert rig.call("GET", "/health").status == 200  # alive all the same
    rig.engine.is_ready = True
    rig.call("POST", "/shutdown")
    draining = rig.call("GET", "/ready")
    assert (draining.status, draining.json) == (503, {"ready": False, "reason": "the worker is shutting down"})


def test_metrics_count_what_happened() -> None:
    failing = [65, 66, Failed("NUMERIC_FAULT", "NaN in logits", False)]
    rig = make_rig(ScriptedEngine(lambda request: failing if request.id == "bad" else text_script("abc")))
    rig.execute(prompt="hello")
    rig.execute(prompt="hello", stop=["b"])
    rig.execute(job_id="bad")
    rig.execute(top_k=-1)
    rig.execute(headers={"content-encoding": "gzip"})
    rig.execute(headers={"x-deadline": "1"})
    samples = rig.scrape()
    me = 'quant_kind="Q4_K_M",worker_id="worker-test"'
    outcomes = {o: samples[f'worker_requests_total{{outcome="{o}",{me}}}'] for o in ("success", "error", "timeout")}
    assert outcomes == {"success": 2, "error": 1, "timeout": 0}
    assert samples['worker_refusals_total{code="INVALID_REQUEST"}'] == 2
    assert samples['worker_refusals_total{code="INFERENCE_TIMEOUT"}'] == 1
    assert samples[f"worker_tokens_in_total{{{me}}}"] == 15
    assert samples[f"worker_tokens_generated_total{{{me}}}"] == 3 + 2 + 2
    assert samples["worker_first_token_latency_ms_count"] == 3
    assert samples["worker_per_token_latency_ms_count"] == 7 - 3
    assert samples[f"worker_inference_duration_ms_count{{{me}}}"] == 3
    assert samples[f"worker_vram_bytes{{{me}}}"] == 1 << 20


def test_gauges_of_a_scrape_are_of_that_moment() -> None:
    rig = make_rig()
    rig.engine.running.update("ab")
    assert rig.scrape()["worker_running_requests"] == 2
    assert rig.scrape()['worker_kv_blocks{state="used"}'] == 2
    rig.engine.running.clear()
    assert rig.scrape()["worker_running_requests"] == 0


def test_health_of_a_failed_worker() -> None:
    answer = make_rig(ScriptedEngine(is_healthy=False)).call("GET", "/health")
    assert (answer.status, answer.json["status"], answer.json["state"]) == (503, "unhealthy", "failed")


@pytest.mark.parametrize("body", [b"[]", b"{", b"x"])
def test_shutdown_takes_an_object_or_nothing(body: bytes) -> None:
    rig = make_rig()
    assert rig.call("POST", "/shutdown", body).status == 400
    assert rig.execute().status == 200
    assert rig.call("POST", "/shutdown", b"{}").status == 202
    assert rig.execute().status == 503


def test_jobs_are_narrated_with_counts(rig: Rig) -> None:
    rig.execute(job_id="told", prompt="hé", stop=["zz"])
    start, end = rig.log.events()[-2:]
    assert (start["event"], start["tokens_in"], start["prompt_chars"]) == ("execute_start", 3, 2)
    assert (end["event"], end["outcome"], end["stop_reason"]) == ("execute_end", "success", "eos")
    assert (end["tokens_in"], end["tokens_out"]) == (3, 3)
    assert end["first_token_ms"] >= 0
    assert end["decode_time_ms"] >= 0
    assert start["job_id"] == end["job_id"] == "told"


def test_nothing_a_client_wrote_reaches_the_log_or_an_error() -> None:
    """Canaries in every text field, over every way to fail."""
    scripts = [
        text_script("CANARY out"),
        [65, Failed("CUDA_ERROR", "device lost", False)],
        [65, RuntimeError("CANARY in an exception")],
        [RuntimeError("CANARY in an exception")],
    ]
    rig = make_rig(ScriptedEngine(lambda _: scripts[len(rig.engine.requests) % len(scripts)]))
    prompt = "CANARY " + "x" * 50
    bodies: list[object] = [
        {"job_id": "j", "prompt": prompt},
        {"job_id": "j", "prompt": prompt, "stop": ["CANARY"]},
        {"job_id": "j", "prompt": prompt, "stop": ["CANARY" * 10]},
        {"job_id": "j", "prompt": prompt * 100},
        {"job_id": "j", "prompt": prompt * 1000},
        {"job_id": "j", "prompt": [prompt]},
        {"job_id": "j\n" + prompt, "prompt": prompt},
        {"job_id": "j", "prompt": prompt, "stop": "CANARY", "grammar": "CANARY", "tools": ["CANARY"]},
        {"job_id": "j", "prompt": prompt, "CANARY": 1, "apply_chat_template": True},
        b'{"CANARY": CANARY}',
        b'{"prompt": "\\CANARY"}',
        b'{"prompt": "CANARY',
        b'{"CANARY": 1, "CANARY": 2}',
        b'{"prompt": "CANARY\\ud800"}',
    ]
    for i in range(500):
        answer = rig.call("POST", "/execute", bodies[i % len(bodies)], {"x-deadline": "CANARY"} if i % 3 else {})
        if answer.status != 200:
            assert b"CANARY" not in answer.body
        elif answer.events[-1].name == "error":
            assert "CANARY" not in str(answer.events[-1].data)
    assert len(rig.log.events()) > 500
    assert "CANARY" not in rig.log.text


def test_timestamps_are_utc(rig: Rig) -> None:
    started = rig.execute().events[0].data["started_at"]
    assert abs(datetime.now(UTC) - datetime.fromisoformat(started)) < timedelta(seconds=5)
