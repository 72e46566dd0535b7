"""`worker-orcd haiku`: a worker seen from outside, start to stop, over its own HTTP interface."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from worker_orcd.assemble import embedded_model
from worker_orcd.config import WorkerConfig
from worker_orcd.errors import StartFailed
from worker_orcd.gguf.reader import GgufFile

SEED = 42
MAX_TOKENS = 64
START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Answer:
    text: str
    token_ids: list[int]
    first_token_ms: float
    tokens_per_second: float


def run_haiku(config: WorkerConfig, prompt: str, as_json: bool) -> int:
    """Exit status: 0 when both answers are the same and the worker stopped cleanly."""
    config = replace(
        config, model=config.model or embedded_model(), host="127.0.0.1", port=_free_port(), log_level="error"
    )
    if config.device == "cpu":
        print("Running the float32 reference backend on the CPU, because --device cpu asks for it.")
    print(f"Starting a worker on {config.model} …", flush=True)
    with _worker(config) as worker:
        print(f"> {prompt}\n")
        first = ask(config, prompt, "haiku-1", show=True)
        second = ask(config, prompt, "haiku-2", show=False)
        _post(config, "/shutdown", {}).close()
        stopped = worker.wait(timeout=config.shutdown_timeout_sec + 10)
    identical = first.token_ids == second.token_ids
    print(f"\nAsked twice with seed {SEED}: the token ids are {'identical' if identical else 'DIFFERENT'}.")
    print(
        f"{len(second.token_ids)} tokens, {second.tokens_per_second:.0f} tokens/s, "
        f"first token after {second.first_token_ms:.0f} ms; worker stopped with status {stopped}."
    )
    if as_json:
        print(_json_line(first, second, identical))
    return 0 if identical and stopped == 0 else 1


def _json_line(first: Answer, second: Answer, identical: bool) -> str:
    report = {
        "text": first.text,
        "token_ids": first.token_ids,
        "repeat_identical": identical,
        "tokens_per_second": round(second.tokens_per_second, 1),
        "first_token_ms": round(second.first_token_ms, 2),
    }
    return json.dumps(report)


def ask(config: WorkerConfig, prompt: str, job_id: str, show: bool) -> Answer:
    """One POST /execute, its stream read to the end. Raises StartFailed when the worker reports an error."""
    body = {
        "job_id": job_id,
        "prompt": prompt,
        "temperature": 0.0,
        "seed": SEED,
        "max_tokens": min(MAX_TOKENS, config.max_tokens_out),
    }
    body["apply_chat_template"] = _has_chat_template(config)
    began = time.perf_counter()
    first = last = began
    text, ids = "", list[int]()
    with _post(config, "/execute", body) as response:
        for event, data in _events(response):
            if event == "error":
                raise StartFailed(f"the worker answered {data['code']}: {data['message']}")
            if event == "token":
                last = time.perf_counter()
                first = last if not ids else first
                ids.append(int(str(data["id"])))
            piece = str(data.get("t", ""))
            text += piece
            if show:
                print(piece, end="", flush=True)
    if show:
        print()
    speed = (len(ids) - 1) / (last - first) if last > first else 0.0
    return Answer(text, ids, (first - began) * 1e3, speed)


def _events(response: http.client.HTTPResponse) -> Iterator[tuple[str, dict[str, object]]]:
    """The events of our own stream: one `event:` and one `data:` line each."""
    event = ""
    for line in response:
        name, _, value = line.decode().rstrip("\r\n").partition(": ")
        if name == "event":
            event = value
        elif name == "data":
            yield event, json.loads(value)


def _post(config: WorkerConfig, path: str, body: dict[str, object]) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", config.port, timeout=config.inference_timeout_sec)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status >= 300:
        raise StartFailed(f"POST {path} answered {response.status}: {response.read(500).decode(errors='replace')}")
    return response


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _has_chat_template(config: WorkerConfig) -> bool:
    assert config.model is not None
    with GgufFile.open(config.model) as gguf:
        return "tokenizer.chat_template" in gguf.metadata


@contextmanager
def _worker(config: WorkerConfig) -> Iterator[subprocess.Popen[bytes]]:
    """A worker process with exactly this configuration, ready; killed on the way out if it still runs."""
    command = [sys.executable, "-P", "-m", "worker_orcd", "serve"]  # -P: nothing is imported from where we stand
    for name, value in asdict(config).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            command += [f"--{flag}", str(value.resolve() if isinstance(value, Path) else value)]
    worker = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        _wait_until_ready(config, worker)
        yield worker
    finally:
        if worker.poll() is None:
            worker.kill()
            worker.wait()


def _wait_until_ready(config: WorkerConfig, worker: subprocess.Popen[bytes]) -> None:
    """Raises StartFailed when the worker ends or takes longer than START_TIMEOUT_S."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if worker.poll() is not None:
            raise StartFailed(f"the worker ended with status {worker.returncode}; its error stands above")
        try:
            with socket.create_connection(("127.0.0.1", config.port), timeout=1.0):
                return
        except OSError:
            time.sleep(0.05)
    raise StartFailed(f"the worker was not ready after {START_TIMEOUT_S:g} s")
