"""The engine in a process of its own: both ends of the socket between it and the API process.

ZeroMQ over a Unix socket in a directory that only this user may enter; messages are msgpack of the types in
engine/loop.py, so nothing that arrives is ever executed. The child lives as long as its standard input is open: when
the API process ends, however it ends, so does the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq

from worker_orcd.engine.core import EngineCore
from worker_orcd.engine.loop import Broken, Close, Command, EngineFacts, Inspect, Message, run_loop
from worker_orcd.errors import Internal, WorkerError, error_of

POLL_MS = 100
LAST_WORD_MS = 50
CLOSE_S = 1.0  # an engine gets to end in order before it is killed; by then nobody waits for it
MAX_DRAINED = 32  # messages taken in one go; then others get their turn

STDIN = 0
SOCKET_NAME = "engine"
DIRECTORY_PREFIX = "worker-orcd-"
MAX_DIRECTORY_BYTES = 90  # the kernel allows 107 for the path of a Unix socket
FATAL_EXIT = 3  # exit status of an engine that could not go on


class Progress(msgspec.Struct, frozen=True, tag=True):
    """Loading the model has come this far."""

    percent: int
    done_bytes: int
    total_bytes: int


OnProgress = Callable[[int, int, int], None]
_encoder = msgspec.msgpack.Encoder()
_start_decoder = msgspec.msgpack.Decoder(Progress | EngineFacts | Broken)
_message_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)


class ProcessLink:
    """The API process's end; starts the child, which is loading from then on."""

    def __init__(self, module: str) -> None:
        self._directory = _private_directory()
        address = f"ipc://{self._directory / SOCKET_NAME}"
        self._context = zmq.Context(io_threads=1)
        self._socket = _pair(self._context)
        self._socket.bind(address)
        command = [sys.executable, "-P", "-m", module, address]  # -P: nothing is imported from where we stand
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._receive: Callable[[Message], None] = lambda _: None
        self._is_closed = False

    def configure(self, setup: bytes) -> None:
        """Tell the child what to load: one line."""
        assert self._process.stdin is not None
        assert b"\n" not in setup
        with contextlib.suppress(BrokenPipeError):  # it is gone; wait_until_ready finds out why
            self._process.stdin.write(setup + b"\n")
            self._process.stdin.flush()

    def wait_until_ready(self, on_progress: OnProgress, check: Callable[[], None]) -> EngineFacts:
        """Block until the model is loaded. Raises what the child died of, and whatever `check` does."""
        while True:
            check()
            if not self._socket.poll(POLL_MS):
                if (gone := self.failure()) is not None and not self._socket.poll(LAST_WORD_MS):
                    raise gone
                continue
            message = _start_decoder.decode(self._socket.recv())
            if isinstance(message, EngineFacts):
                return message
            if isinstance(message, Broken):
                raise error_of(message.code, message.message, message.details)
            on_progress(message.percent, message.done_bytes, message.total_bytes)

    def attach(self, loop: asyncio.AbstractEventLoop, receive: Callable[[Message], None]) -> None:
        self._detach()
        self._loop, self._receive = loop, receive
        loop.add_reader(self._socket.FD, self._drain)
        loop.call_soon(self._drain)

    def send(self, command: Command) -> None:
        with contextlib.suppress(zmq.Again):  # nobody is there any more; whoever looks after us will notice
            self._socket.send(_encoder.encode(command), zmq.NOBLOCK)
        if self._loop is not None:
            self._loop.call_soon(self._drain)  # the descriptor tells of changes only, and sending may hide one

    def failure(self) -> WorkerError | None:
        status = self._process.poll()
        if status is None:
            return None
        if self._loop is not None and self._socket.poll(LAST_WORD_MS):
            self._drain()  # what it said last tells more than how it ended
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        return Internal(f"the engine process ended with {how}")

    def cpu_s(self) -> float:
        try:
            stat = Path(f"/proc/{self._process.pid}/stat").read_text()
        except OSError:
            return 0.0
        user, system = stat.rpartition(")")[2].split()[11:13]  # proc(5): fields 14 and 15
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def close(self, is_orderly: bool = True) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._detach()
        with contextlib.suppress(zmq.ZMQError):
            self._socket.send(_encoder.encode(Close()), zmq.NOBLOCK)
        try:
            self._process.wait(CLOSE_S if is_orderly else 0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._context.destroy(linger=0)
        remove_directory(self._directory)

    def _detach(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._socket.FD)
        self._loop = None

    def _drain(self) -> None:
        """Take what has arrived: several steps at once when we were slower than the engine."""
        if self._is_closed or self._loop is None:
            return
        with contextlib.suppress(zmq.Again):
            for _ in range(MAX_DRAINED):
                self._receive(_message_decoder.decode(self._socket.recv(zmq.NOBLOCK)))
            self._loop.call_soon(self._drain)


def _private_directory() -> Path:
    """Where the socket lies; its path must be short."""
    directory = tempfile.mkdtemp(prefix=DIRECTORY_PREFIX)
    if len(os.fsencode(directory)) > MAX_DIRECTORY_BYTES:
        os.rmdir(directory)
        directory = tempfile.mkdtemp(prefix=DIRECTORY_PREFIX, dir="/tmp")
    return Path(directory)


def remove_directory(directory: Path) -> None:
    """Only what is ours in it, and only if nothing else is."""
    with contextlib.suppress(OSError):
        (directory / SOCKET_NAME).unlink(missing_ok=True)
        directory.rmdir()


def _pair(context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    """Unbounded on purpose: what is under way is bounded by the requests that are."""
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.linger = 0
    return socket


class EngineHost:
    """The child's end. `setup` is the line the API process sent."""

    def __init__(self, address: str) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # the API process decides when the engine ends
        self._setup = bytearray()
        self._has_setup = threading.Event()
        directory = Path(address.removeprefix("ipc://")).parent
        threading.Thread(target=self._follow_parent, args=(directory,), daemon=True).start()
        self._context = zmq.Context(io_threads=1)
        self._socket = _pair(self._context)
        self._socket.connect(address)

    def setup(self) -> bytes:
        self._has_setup.wait()
        return bytes(self._setup)

    def tell(self, message: Progress | EngineFacts | Broken) -> None:
        self._socket.send(_encoder.encode(message))

    def serve(self, core: EngineCore, inspect: Inspect | None = None) -> int:
        """Turn `core` until the API process has enough of it; returns the exit status."""
        gc.collect()
        gc.freeze()  # what is loaded stays; looking through all of it again would hold up a step for 90 ms
        is_orderly = run_loop(core, self._incoming, self._send, inspect)
        self.end()
        return 0 if is_orderly else FATAL_EXIT

    def end(self) -> None:
        """Let the last message out."""
        self._socket.close(linger=1000)
        self._context.term()

    def _incoming(self, wait_s: float | None) -> list[Command]:
        commands: list[Command] = []
        if wait_s != 0.0:
            self._socket.poll(None if wait_s is None else int(wait_s * 1e3))
        with contextlib.suppress(zmq.Again):
            while True:
                commands.append(_command_decoder.decode(self._socket.recv(zmq.NOBLOCK)))
        return commands

    def _send(self, message: Message) -> None:
        self._socket.send(_encoder.encode(message))

    def _follow_parent(self, directory: Path) -> None:
        """Read standard input to its end, which comes when the API process is gone; `directory` was its to remove."""
        while chunk := os.read(STDIN, 65536):
            self._setup += chunk
            if self._setup.endswith(b"\n"):
                self._has_setup.set()
        remove_directory(directory)
        os._exit(0)
