"""Two processes, and what each does when the other dies, hangs, fails or is told to stop.

Bounds of time are generous; the promise behind each stands beside it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.client import Answer, eventually
from tests.workers import REAL, Worker, fake_worker, is_alive, real_worker, request_body, running
from worker_orcd.assemble import embedded_model
from worker_orcd.engine.process import remove_directory

STREAMS = 8
ENDLESS = {"max_tokens": 2000}  # with SLOW, 10 s of tokens
SLOW = ("--step-ms", "5", "--log-level", "info")


@pytest.fixture
def temp(tmp_path: Path) -> Iterator[Path]:
    """The directory for temporary files of a worker, which leaves nothing in it."""
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


async def _while_streaming(worker: Worker, act: Callable[[], None], **fields: Any) -> list[Answer]:
    """What streams get that have begun when `act` is called."""
    streams = [asyncio.create_task(worker.ask(**ENDLESS | fields)) for _ in range(STREAMS)]
    while worker.health()["num_running"] < STREAMS:
        assert not any(stream.done() for stream in streams), [s.result() for s in streams if s.done()]
        await asyncio.sleep(0.02)
    act()
    return await asyncio.gather(*streams)


def answers_while(worker: Worker, act: Callable[[], None], **fields: Any) -> list[Answer]:
    worker.wait_for("ready")
    return asyncio.run(_while_streaming(worker, act, **fields))


def codes(answers: list[Answer]) -> set[str]:
    """Of the errors that ended the streams, each in order up to that one last event."""
    assert all(answer.status == 200 for answer in answers)
    assert all(answer.events[-1].name == "error" for answer in answers)
    return {answer.events[-1].data["code"] for answer in answers}


def seconds_until(condition: Callable[[], bool], within_s: float) -> float:
    began_s = time.monotonic()
    eventually(condition, within_s)
    return time.monotonic() - began_s


# ---------------------------------------------------------------------- odd surroundings


def test_a_long_way_to_the_temporary_files(tmp_path: Path) -> None:
    """The path of a Unix socket is short; TMPDIR need not be."""
    deep = tmp_path / ("x" * 120)
    deep.mkdir()
    with fake_worker(temp=deep) as worker:
        worker.wait_for("ready")
        assert worker.execute(max_tokens=3)[-1][0] == "end"
        worker.process.send_signal(signal.SIGTERM)
        assert worker.end() == 0
    assert list(deep.iterdir()) == []


def test_a_closed_standard_output_and_a_model_whose_name_is_not_text(temp: Path) -> None:
    model = os.fsencode(temp) + b"/m\xff.gguf"
    Path(os.fsdecode(model)).write_bytes(embedded_model().read_bytes())
    command = ("sh", "-c", 'exec "$@" >&-', "sh", *REAL, "--model", os.fsdecode(model))
    with running(command, temp=temp) as worker:
        worker.wait_for("ready")
        assert worker.execute(max_tokens=3)[-1][0] == "end"
        worker.process.send_signal(signal.SIGTERM)
        assert worker.end() == 0
    os.unlink(model)


def test_the_engine_removes_nothing_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "engine").touch()
    (tmp_path / "precious").touch()
    remove_directory(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


# ---------------------------------------------------------------------- the engine ends


def test_an_engine_that_is_killed_ends_the_streams_and_the_worker(temp: Path) -> None:
    with fake_worker(*SLOW, temp=temp) as worker:
        unready_s: list[float] = []

        def kill() -> None:
            os.kill(worker.engine_pid, signal.SIGKILL)
            unready_s.append(seconds_until(lambda: not worker.is_ready(), 5))  # promised: 1 s

        assert codes(answers_while(worker, kill)) == {"INTERNAL"}
        assert worker.end(20) == 1  # promised: 10 s
        assert "SIGKILL" in worker.events("error")[-1]["human"]
        assert unready_s


def test_a_new_worker_gives_the_answer_the_killed_one_was_giving() -> None:
    greedy = {"temperature": 0, "max_tokens": 60}
    with real_worker() as worker:
        worker.wait_for("ready")
        before = worker.execute(**greedy)
        assert codes(answers_while(worker, lambda: os.kill(worker.engine_pid, signal.SIGKILL), temperature=2))
        assert worker.end(20) == 1
    with real_worker() as worker:
        worker.wait_for("ready")
        again = worker.execute(**greedy)
    assert [data for name, data in again if name == "token"] == [data for name, data in before if name == "token"]


def test_an_engine_that_hangs_is_given_up_and_killed_and_left_alone_while_idle(temp: Path) -> None:
    with fake_worker(*SLOW, temp=temp) as idle, fake_worker(*SLOW, temp=temp) as worker:
        idle.wait_for("ready")
        os.kill(idle_pid := idle.engine_pid, signal.SIGSTOP)
        unready_s: list[float] = []

        def stop() -> None:
            os.kill(engine_pid := worker.engine_pid, signal.SIGSTOP)
            stopped.append(engine_pid)
            unready_s.append(seconds_until(lambda: not worker.is_ready(), 30))  # promised: 6 s

        stopped: list[int] = []
        assert codes(answers_while(worker, stop)) == {"INTERNAL"}
        assert unready_s[0] > 4  # a short hiccup is no reason to give up
        assert worker.end(20) == 1
        assert not is_alive(stopped[0])
        assert idle.is_ready(), "it hung for longer, and owed nobody an answer"
        os.kill(idle_pid, signal.SIGCONT)
        assert idle.execute(max_tokens=2)[-1][0] == "end"
        idle.process.terminate()
        assert idle.end() == 0


def test_a_device_error_ends_the_streams_and_the_worker(temp: Path) -> None:
    with fake_worker(*SLOW, "--fault", "cuda", temp=temp) as worker:
        fatal: list[bytes] = []

        def touch() -> None:
            fatal.append(worker.request("POST", "/execute", request_body(seed=13))[1])

        assert codes(answers_while(worker, touch)) == {"CUDA_ERROR"}
        assert b'"CUDA_ERROR"' in fatal[0]
        assert worker.end(20) == 1


# ---------------------------------------------------------------------- the API process ends


@pytest.mark.parametrize("is_loading", [False, True])
def test_the_engine_does_not_outlive_a_killed_api_process(is_loading: bool, temp: Path) -> None:
    with fake_worker(*SLOW, *(["--fault", "hang-load"] if is_loading else []), temp=temp) as worker:
        worker.wait_for("model_load_start" if is_loading else "ready")
        engine_pid = worker.engine_pid
        worker.process.kill()
        eventually(lambda: not is_alive(engine_pid), 10)  # promised: 2 s


def test_nothing_of_a_busy_engine_outlives_a_killed_api_process(temp: Path) -> None:
    with real_worker(temp=temp) as worker:
        engine_pids: list[int] = []

        async def kill_while_streaming() -> None:
            stream = asyncio.create_task(worker.ask(temperature=2, max_tokens=2000))
            while not worker.events("execute_start"):
                await asyncio.sleep(0.02)
            engine_pids.append(worker.engine_pid)
            worker.process.kill()
            await asyncio.wait([stream])
            stream.exception()

        worker.wait_for("ready")
        asyncio.run(kill_while_streaming())
        eventually(lambda: not is_alive(engine_pids[0]), 10)


# ---------------------------------------------------------------------- loading


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("crash-load", "INTERNAL: the engine process ended with status 7"),
        ("refuse-load", "MODEL_LOAD_FAILED: the fake model is refused, as asked"),
    ],
)
def test_an_engine_that_ends_while_loading_is_one_clear_line(fault: str, line: str, temp: Path) -> None:
    with fake_worker("--fault", fault, temp=temp) as worker:
        assert worker.end() == 1
        assert worker.lines[-1].strip() == line
        assert "Traceback" not in "".join(worker.lines)


def test_an_engine_killed_while_loading_is_one_clear_line(temp: Path) -> None:
    with fake_worker("--fault", "hang-load", temp=temp) as worker:
        worker.wait_for("model_load_start")
        os.kill(worker.engine_pid, signal.SIGKILL)
        assert worker.end() == 1
        assert worker.lines[-1].strip() == "INTERNAL: the engine process ended with signal SIGKILL"


def test_sigterm_while_loading_ends_both_at_once(temp: Path) -> None:
    with fake_worker("--fault", "hang-load", temp=temp) as worker:
        worker.wait_for("model_load_start")
        engine_pid = worker.engine_pid
        worker.process.terminate()
        assert worker.end() == 0
        assert not is_alive(engine_pid)
        assert "Traceback" not in "".join(worker.lines)


# ---------------------------------------------------------------------- told to stop


def test_sigterm_lets_streams_finish_and_refuses_new_work(temp: Path) -> None:
    with fake_worker(*SLOW, temp=temp) as worker:
        engine_pids: list[int] = []
        refused: list[tuple[int, Any]] = []

        def terminate() -> None:
            engine_pids.append(worker.engine_pid)
            worker.process.terminate()
            eventually(lambda: not worker.is_ready())
            refused.append(worker.request("POST", "/execute", {"job_id": "late", "prompt": "x"}))

        answers = answers_while(worker, terminate, max_tokens=400)
        assert [answer.events[-1].data["tokens_out"] for answer in answers] == [400] * STREAMS
        status, raw = refused[0]
        assert status == 503
        assert json.loads(raw)["error"]["code"] == "SHUTTING_DOWN"
        assert worker.end() == 0
        assert not is_alive(engine_pids[0])


def test_a_second_sigterm_does_not_wait_for_streams(temp: Path) -> None:
    with fake_worker(*SLOW, temp=temp) as worker:

        def terminate_twice() -> None:
            worker.process.terminate()
            eventually(lambda: not worker.is_ready())
            worker.process.terminate()

        assert codes(answers_while(worker, terminate_twice)) == {"SHUTTING_DOWN"}  # or they would have ended well
        assert worker.end() == 0


def test_the_drain_ends_at_its_limit(temp: Path) -> None:
    with fake_worker(*SLOW, "--shutdown-timeout-sec", "0.5", temp=temp) as worker:
        assert codes(answers_while(worker, worker.process.terminate)) == {"SHUTTING_DOWN"}
        assert worker.end() == 0


def test_ctrl_c_reaches_both_processes_and_ends_in_order(temp: Path) -> None:
    with fake_worker(*SLOW, temp=temp) as worker:

        def interrupt() -> None:
            os.kill(worker.engine_pid, signal.SIGINT)
            worker.process.send_signal(signal.SIGINT)

        answers = answers_while(worker, interrupt, max_tokens=200)
        assert [answer.events[-1].name for answer in answers] == ["end"] * STREAMS
        assert worker.end() == 0
