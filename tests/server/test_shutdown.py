"""Draining, by request and by signal, up to the exit code."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.fakes import ScriptedEngine, Step, forever, text_script
from tests.server.client import (
    Answer,
    eventually,
    http_request,
    live,
    make_rig,
    parse_answer,
    read_answer,
    wait_for_back_pressure,
)
from worker_orcd.engine.request import Request
from worker_orcd.errors import CudaError, StartFailed
from worker_orcd.narration import Narrator
from worker_orcd.server.run import bind, serve

ROOT = Path(__file__).parents[2]


def by_prompt(request: Request) -> Iterator[Step]:
    return iter(forever() if request.prompt_ids[0] == ord("f") else text_script("answer", 0.05))


def body(job_id: str, prompt: str) -> dict[str, object]:
    return {"job_id": job_id, "prompt": prompt}


def test_an_idle_worker_stops_at_once() -> None:
    with live() as server:
        began_s = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began_s < 2
        assert server.rig.engine.is_closed
        with pytest.raises(OSError):
            server.connect()
    assert [event["reason"] for event in server.rig.log.events("shutdown")] == ["asked", "done"]


def test_work_in_flight_finishes_and_new_work_is_refused() -> None:
    with live(ScriptedEngine(by_prompt, max_running=1)) as server:
        running, queued = (server.send("/execute", body(job_id, "x")) for job_id in ("running", "queued"))
        eventually(lambda: server.rig.engine.running and server.rig.engine.waiting)
        assert server.post("/shutdown", b"").status == 202
        refused = server.post("/execute", body("late", "x"))
        health = server.get("/health")
        assert (refused.status, refused.error["code"]) == (503, "SHUTTING_DOWN")
        assert (health.status, health.json["state"]) == (503, "draining")
        assert server.post("/shutdown", {}).status == 202  # asking twice is no impatience
        for peer in (running, queued):
            with peer:
                assert read_answer(peer).text == "answer"
        assert server.stop() == 0


def test_after_the_limit_jobs_end_with_an_error_event() -> None:
    with live(ScriptedEngine(by_prompt, max_running=1), shutdown_timeout_sec=0.3) as server:
        peers = [server.send("/execute", body(f"j{i}", "forever")) for i in range(2)]
        eventually(lambda: server.rig.engine.running and server.rig.engine.waiting)
        time.sleep(0.2)  # the queued one's stream is open
        began_s = time.monotonic()
        server.post("/shutdown", b"")
        for peer in peers:
            with peer:
                assert read_answer(peer).events[-1].data["code"] == "SHUTTING_DOWN"
        assert server.stop() == 0
        assert 0.3 < time.monotonic() - began_s < 3
        assert sorted(server.rig.engine.cancelled) == ["j0", "j1"]


def test_a_reader_that_stalls_does_not_hold_up_the_exit() -> None:
    def flood(_: Request) -> Iterator[Step]:
        return (step for _ in range(10**9) for step in (ord("x"),) * 50 + (0.001,))

    engine = ScriptedEngine(flood)
    with (
        live(engine, shutdown_timeout_sec=0.2, max_tokens_out=2**20) as server,
        server.send("/execute", body("stalled", "x"), receive_buffer=4096),
    ):
        wait_for_back_pressure(engine)
        began_s = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began_s < 6


def test_a_failed_engine_ends_the_service() -> None:
    with live(ScriptedEngine(by_prompt, max_running=1), shutdown_timeout_sec=60.0) as server:
        peers = [server.send("/execute", body(f"j{i}", "forever")) for i in range(2)]
        eventually(lambda: server.rig.engine.running and server.rig.engine.waiting)
        began_s = time.monotonic()
        server.rig.engine.failure = CudaError("device 0 is lost")
        for peer in peers:
            with peer:
                answer = read_answer(peer)
            assert answer.events[-1].data["code"] == "CUDA_ERROR"
        server.thread.join(10)
        assert time.monotonic() - began_s < 5
        assert server.exit_codes == [1]
        assert server.rig.engine.is_closed
    told = server.rig.log.events()
    assert [(event["level"], event["code"]) for event in told if event["event"] == "error"] == [
        ("FATAL", "CUDA_ERROR")
    ]
    assert (told[-1]["event"], told[-1]["reason"], told[-1]["exit_code"]) == ("shutdown", "failed", 1)


def test_an_engine_that_fails_while_draining_ends_the_wait() -> None:
    with live(ScriptedEngine(by_prompt), shutdown_timeout_sec=60.0) as server:
        peer = server.send("/execute", body("a", "forever"))
        eventually(lambda: server.rig.engine.running)
        server.post("/shutdown", b"")
        server.rig.engine.failure = CudaError("device 0 is lost")
        with peer:
            assert read_answer(peer).events[-1].data["code"] == "CUDA_ERROR"
        server.thread.join(10)
        assert server.exit_codes == [1]


def test_jobs_that_a_failed_engine_forgot_are_ended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker_orcd.server.control.FAILED_S", 1.5)
    engine = ScriptedEngine(lambda _: [60.0, "eos"])
    with live(engine) as server:
        peer = server.send("/execute", body("forgotten", "x"))
        eventually(lambda: engine.running)
        engine.failure = CudaError("device 0 is lost")
        eventually(lambda: server.rig.app.state.control.failure)
        time.sleep(0.3)  # the worker still answers
        late = server.post("/execute", body("late", "x"))
        ready, health = server.get("/ready"), server.get("/health")
        with peer:
            assert read_answer(peer).events[-1].data["code"] == "CUDA_ERROR"
        server.thread.join(10)
        assert server.exit_codes == [1]
    assert (late.status, late.error["code"]) == (503, "SHUTTING_DOWN")
    assert (ready.status, ready.json["reason"]) == (503, "the worker has failed")
    assert (health.status, health.json["state"]) == (503, "failed")


def test_a_reader_that_stalls_does_not_hold_up_the_end_of_a_failed_worker() -> None:
    engine = ScriptedEngine(lambda _: ([ord("x")] * 50 for _ in range(10**9)))
    with (
        live(engine, max_tokens_out=2**20) as server,
        server.send("/execute", body("stalled", "x"), receive_buffer=4096),
    ):
        wait_for_back_pressure(engine)
        began_s = time.monotonic()
        engine.failure = CudaError("device 0 is lost")
        server.thread.join(10)
        assert server.exit_codes == [1]
        assert time.monotonic() - began_s < 5


def test_a_port_in_use_is_named() -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        taken.listen()
        with pytest.raises(StartFailed, match=f"port {port}: Address already in use"):
            bind("127.0.0.1", port)


def test_an_address_of_another_machine_is_named() -> None:
    with pytest.raises(StartFailed, match=r"192\.0\.2\.1 port 8080: Cannot assign.*; choose a --host"):
        bind("192.0.2.1", 8080)


def test_a_port_taken_while_loading_is_named_too() -> None:
    with bind("127.0.0.1", 0) as late, socket.socket() as quick:
        port = late.getsockname()[1]
        quick.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        quick.bind(("127.0.0.1", port))
        quick.listen()
        rig = make_rig(ScriptedEngine())
        with pytest.raises(StartFailed, match=f"port {port}: Address already in use"):
            serve(rig.app, late, rig.engine, Narrator("w", "m", None, sink=rig.log))
        assert rig.engine.is_closed


@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.07, 0.15, 0.3])
def test_at_any_moment_every_stream_gets_its_last_event(delay_s: float) -> None:
    engine = ScriptedEngine(by_prompt, max_running=3, max_queue=3)
    with live(engine, shutdown_timeout_sec=0.2) as server:
        peers = [server.send("/execute", body(f"j{i}", "fx"[i % 2])) for i in range(8)]
        time.sleep(delay_s)
        server.post("/shutdown", b"")
        for peer in peers:
            with peer:
                answer = read_answer(peer)
            if answer.status == 200:
                assert answer.events  # which checks the order
            else:
                assert answer.error["code"] in ("SHUTTING_DOWN", "OVERLOADED")
        assert server.stop() == 0
        assert not engine.running
        assert not engine.waiting


CHILD = """
import sys
from tests.server.test_shutdown import by_prompt
from tests.fakes import ByteTokenizer, ScriptedEngine
from worker_orcd.config import WorkerConfig
from worker_orcd.engine.metrics import PrometheusMetrics
from worker_orcd.narration import Narrator
from worker_orcd.server.app import create_app
from worker_orcd.server.run import bind, serve

engine, listener = ScriptedEngine(by_prompt, max_running=1), bind("127.0.0.1", 0)
config = WorkerConfig(worker_id="child", shutdown_timeout_sec=float(sys.argv[1]))
narrator = Narrator("child", "scripted", None, sys.stderr)
metrics = PrometheusMetrics("child", "Q4_K_M")
app = create_app(engine, ByteTokenizer(), None, config, narrator, metrics)
print(listener.getsockname()[1], flush=True)
sys.exit(serve(app, listener, engine, narrator))
"""


@contextmanager
def child(shutdown_timeout_s: float, stderr: int = subprocess.PIPE) -> Iterator[tuple[subprocess.Popen[str], int]]:
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    command = [sys.executable, "-c", CHILD, str(shutdown_timeout_s)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        assert process.stdout
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def connect(port: int) -> socket.socket:
    """A connection to a child, which told its port before it listened."""
    for _ in range(500):
        with suppress(ConnectionRefusedError):
            return socket.create_connection(("127.0.0.1", port), timeout=10)
        time.sleep(0.01)
    raise AssertionError("the child does not listen")


def send(port: int, job_id: str, prompt: str) -> socket.socket:
    peer = connect(port)
    peer.sendall(http_request("POST", "/execute", body(job_id, prompt)))
    assert peer.recv(1) == b"H"
    return peer


def rest(peer: socket.socket) -> Answer:
    with peer:
        raw = b"H"
        while data := peer.recv(65536):
            raw += data
    return parse_answer(raw)


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(name: signal.Signals) -> None:
    with child(5) as (process, port):
        peer = send(port, "a", "x")
        process.send_signal(name)
        assert rest(peer).text == "answer"
        assert process.wait(5) == 0
        assert "Traceback" not in process.communicate()[1]


def test_a_second_signal_waits_no_longer() -> None:
    with child(60) as (process, port):
        peers = [send(port, "running", "forever"), send(port, "queued", "forever")]
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        assert process.poll() is None
        began_s = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert [rest(peer).events[-1].data["code"] for peer in peers] == ["SHUTTING_DOWN"] * 2
        assert process.wait(5) == 0
        assert time.monotonic() - began_s < 4


def test_a_closed_log_pipe_does_not_stop_the_service() -> None:
    read_end, write_end = os.pipe()
    with child(5, stderr=write_end) as (process, port):
        os.close(read_end)
        os.close(write_end)
        for job_id in ("a", "b"):
            assert rest(send(port, job_id, "x")).text == "answer"
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
