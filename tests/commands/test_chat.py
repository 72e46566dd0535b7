"""`chat` as a person meets it: through a pipe, in a terminal, with a worker of its own."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fakes import ScriptedEngine, Step, UserTemplate, forever, text_script
from tests.server.client import Live, eventually, live
from worker_orcd.commands.client import WorkerClient
from worker_orcd.engine.request import Failed, Request
from worker_orcd.errors import InvalidRequest

CHAT = [sys.executable, "-m", "worker_orcd", "chat"]


def prompt_of(request: Request) -> str:
    return bytes(i for i in request.prompt_ids if i < 256).decode()


def script(request: Request) -> list[Step]:
    asked = prompt_of(request).rpartition("<user>")[2].partition("<")[0]
    if asked == "forever":
        return forever()  # type: ignore[return-value]
    if asked == "break":
        return [*text_script("half")[:-1], Failed("CUDA_ERROR", "the device failed", False)]
    return text_script("\033[2Jclear" if asked == "hostile" else f"You said {asked}.")


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(ScriptedEngine(script), template=UserTemplate()) as running:
        yield running


def url(server: Live) -> list[str]:
    return ["--url", f"http://127.0.0.1:{server.port}"]


def test_a_pipe_asks_one_question_a_line(server: Live) -> None:
    lines = "one\n\n/set temperature 0.2\n/set seed=9\n/system be brief\ntwo\n/set seed\n/reset\nthree\n"
    done = subprocess.run([*CHAT, *url(server)], input=lines, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "You said one.\nYou said two.\nYou said three.\n"
    first, second, third = server.rig.engine.requests[-3:]
    assert prompt_of(first) == "<user>one<assistant>"
    assert prompt_of(second) == "<system>be brief<user>one<assistant>You said one.<user>two<assistant>"
    assert prompt_of(third) == "<system>be brief<user>three<assistant>"
    assert (second.sampling.temperature, second.sampling.seed) == (0.2, 9)
    assert (third.sampling.temperature, third.sampling.seed == 9) == (0.2, False)


def test_what_fails_is_told_in_one_line_and_the_rest_goes_on(server: Live) -> None:
    lines = "break\n/set heat 3\n/set top_k many\n/nonsense\n/set top_k 99999999999\ntwo\n/set top_k\nthree\n"
    done = subprocess.run([*CHAT, *url(server)], input=lines, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout == "half\nYou said three.\n"
    told = done.stderr.splitlines()
    assert len(told) == 5
    for line, part in zip(told, ("device failed", "'heat'", "'many'", "/help", "top_k"), strict=True):
        assert re.match(r"[A-Z_]+: ", line)
        assert part in line
    assert prompt_of(server.rig.engine.requests[-1]) == "<user>three<assistant>", "failed questions are forgotten"


def test_nobody_there_is_one_line() -> None:
    done = subprocess.run([*CHAT, "--url", "http://127.0.0.1:9"], input="hi\n", capture_output=True, text=True)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("WORKER_UNREACHABLE: http://127.0.0.1:9: ")
    odd = (
        "http://localhost:99999",
        "http://localhost:abc",
        "http://[::1",
        "http://ä..b:80",
        "http://a/ä",
        "http://a b/",
    )
    for address in ("ftp://x", "nonsense", "http://", *odd):
        with pytest.raises(InvalidRequest, match="http://127"):
            WorkerClient(address)


def test_an_address_as_clients_of_openai_have_it_will_do(server: Live) -> None:
    done = subprocess.run(
        [*CHAT, *url(server)[:-1], f"{url(server)[-1]}/v1/"], input="one\n", capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("You said one.\n", "")


class Typist:
    """A person at a terminal."""

    def __init__(self, arguments: list[str]) -> None:
        self.master, slave = pty.openpty()
        env = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
        self.process = subprocess.Popen(
            [*CHAT, *arguments], stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True
        )
        os.close(slave)
        self.seen = ""
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # EIO at the end
            while data := os.read(self.master, 65536):
                self.seen += data.decode("utf-8", "replace")

    def type(self, line: str) -> None:
        os.write(self.master, f"{line}\n".encode())

    def waits_for(self, text: str, within_s: float = 40.0) -> None:
        eventually(lambda: text in self.seen, within_s)

    def signals(self, number: signal.Signals, until: Callable[[], object]) -> None:
        """Send a signal, again each second nothing comes of it.

        One that falls between CPython's last look at signals and the select() in which readline then waits is
        noticed only with the next key or the next signal: seen 4 times in 1,500 on a busy machine.
        """
        for _ in range(40):
            self.process.send_signal(number)
            with contextlib.suppress(AssertionError):
                return eventually(until, 1.0)
        raise AssertionError(f"nothing came of {number.name}")

    def quits(self) -> int:
        until = time.monotonic() + 40
        while self.process.poll() is None and time.monotonic() < until:
            self.type("/quit")  # which an interrupt that is still to come may take with it
            time.sleep(0.1)
        return self.end()

    def end(self) -> int:
        status = self.process.wait(30)
        self.reader.join(5)
        os.close(self.master)
        return status


def test_ctrl_c_ends_the_answer_and_not_the_program(server: Live, tmp_path: Path) -> None:
    person = Typist(url(server))
    person.waits_for("/help lists")
    person.type("forever")
    person.waits_for("xxxxx")
    person.process.send_signal(signal.SIGINT)
    person.waits_for("stopped")
    eventually(lambda: not server.rig.engine.running)
    assert re.search(r"\d+ tokens · [\d.]+ tokens/s · first token \d+ ms · stopped", person.seen)
    person.type("hostile")
    person.waits_for("[2Jclear")
    assert "\033[2J" not in person.seen, "what could steer the terminal is left out"
    person.type("/set min_p 0.1")
    person.waits_for("min_p 0.1")
    person.type(f"/save {tmp_path}/talk.json")
    person.waits_for("4 messages in ")
    person.signals(signal.SIGINT, until=lambda: "Ctrl-D or /quit" in person.seen)  # at the prompt
    assert person.quits() == 0
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [turn["role"] for turn in saved["messages"]] == ["user", "assistant"] * 2
    assert saved["messages"][1]["content"].startswith("xxxxx")
    assert saved["min_p"] == 0.1


def test_ctrl_c_at_any_moment_beside_the_prompt_does_not_end_it(server: Live) -> None:
    """While a command is followed or its answer is shown, too."""
    person = Typist(url(server))
    person.waits_for("/help lists")
    for i in range(40):
        person.type("/set")
        time.sleep(i * 1e-4)
        person.process.send_signal(signal.SIGINT)
    assert person.quits() == 0


def child_of(pid: int) -> int | None:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_worker_of_its_own_answers_and_ends_with_it(number: signal.Signals) -> None:
    person = Typist(["--device", "cpu", "--context-length", "256"])
    person.waits_for("/help lists")
    worker = child_of(person.process.pid)
    assert worker is not None
    person.type("Write a haiku about the sea")
    person.waits_for("first token")
    person.signals(number, until=lambda: person.process.poll() is not None)
    assert person.end() == (128 + number if number == signal.SIGTERM else -number)
    eventually(lambda: not Path(f"/proc/{worker}").exists(), 20.0)
