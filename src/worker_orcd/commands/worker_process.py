"""A worker of our own for the time of a command: started on a free port, waited for, stopped."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO

from worker_orcd.assemble import embedded_model
from worker_orcd.config import WorkerConfig
from worker_orcd.errors import StartFailed, error_of

START_TIMEOUT_S = 600.0  # a large model on a slow disk
# `python -m worker_orcd serve` that gets SIGTERM when we end, however we end: it must not keep the GPU.
SERVE = (
    "import ctypes, runpy; ctypes.CDLL(None).prctl(1, 15); "  # PR_SET_PDEATHSIG, SIGTERM
    "runpy.run_module('worker_orcd', run_name='__main__')"
)
SECRETS = {"api_key": "LLORCH_API_KEY"}  # flags show in the list of processes


def private(config: WorkerConfig) -> WorkerConfig:
    """`config` for a worker that only the command itself talks to."""
    return replace(
        config,
        model=config.model or embedded_model(),
        host="127.0.0.1",
        port=free_port(),
        log_level="mute",  # it still says in one line why it cannot start
        api_key_file=None,
        tls_cert_file=None,
        tls_key_file=None,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_worker(config: WorkerConfig) -> Iterator[subprocess.Popen[bytes]]:
    """A worker process with exactly this configuration, ready; killed on the way out if it still runs.

    It has a process group of its own: Ctrl-C in the terminal is for the command.
    """
    command = [sys.executable, "-P", "-c", SERVE, "serve"]  # -P: nothing is imported from where we stand
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LLORCH_")}
    for name, value in asdict(config).items():
        flag = name.replace("_", "-")
        if name in SECRETS:
            environment[SECRETS[name]] = str(value)
        elif isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            command += [f"--{flag}", str(value.resolve() if isinstance(value, Path) else value)]
    with tempfile.TemporaryFile() as said:
        worker = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, env=environment, process_group=0)
        try:
            _wait_until_ready(config, worker, said)
            yield worker
        finally:
            if worker.poll() is None:
                worker.kill()
                worker.wait()


def _wait_until_ready(config: WorkerConfig, worker: subprocess.Popen[bytes], said: IO[bytes]) -> None:
    """Raises what the worker ends with, or StartFailed when it takes longer than START_TIMEOUT_S."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if worker.poll() is not None:
            said.seek(0)
            line = (said.read().decode("utf-8", "replace").splitlines() or [""])[-1]
            code, is_told, message = line.partition(": ")
            if worker.returncode == 1 and is_told:
                raise error_of(code, message, {})
            raise StartFailed(f"the worker ended with status {worker.returncode}. {line}".rstrip())
        try:
            with socket.create_connection(("127.0.0.1", config.port), timeout=1.0):
                return
        except OSError:
            time.sleep(0.05)
    raise StartFailed(f"the worker was not ready after {START_TIMEOUT_S:g} s")
