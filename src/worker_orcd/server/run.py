"""Listening and serving: the socket, uvicorn, signals, and the way from the first signal to the exit code."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Iterator

import uvicorn
from starlette.applications import Starlette

from worker_orcd.config import WorkerConfig
from worker_orcd.engine.request import InferenceEngine
from worker_orcd.errors import StartFailed
from worker_orcd.narration import Narrator
from worker_orcd.server.connection import Connection
from worker_orcd.server.control import Control
from worker_orcd.signals import STOP_SIGNALS, ignore_signals

BACKLOG = 2048
KEEP_ALIVE_IDLE_S = 30
FLUSH_S = 2  # what sockets get to take the last bytes, after the last event


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to a TCP address, not yet listening; raises StartFailed naming both when that fails."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise StartFailed(f"cannot listen on {host} port {port}: {error.strerror}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _cannot_listen(host, port, error) from None
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> StartFailed:
    remedy = "a --host of this machine" if error.errno == errno.EADDRNOTAVAIL else "another --port"
    return StartFailed(f"cannot listen on {host} port {port}: {error.strerror}; choose {remedy}")


def _listen(listener: socket.socket) -> None:
    """From here on clients get through. Another worker may have taken the port since it was bound."""
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        host, port = listener.getsockname()[:2]
        raise _cannot_listen(host, port, error) from None


def tls_context(config: WorkerConfig) -> ssl.SSLContext | None:
    """The certificate to serve HTTPS with, if there is one. Raises StartFailed when it cannot be used."""
    if config.tls_cert_file is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # a key that is encrypted gets an empty password, and fails, rather than a question on the terminal
        context.load_cert_chain(config.tls_cert_file, config.tls_key_file, password=lambda: "")
    except OSError as error:  # SSLError, too
        names = f"tls_cert_file {config.tls_cert_file} and tls_key_file {config.tls_key_file}"
        raise StartFailed(f"{names} cannot be used: {error.strerror or error}") from None
    return context


def serve(
    app: Starlette,
    listener: socket.socket,
    engine: InferenceEngine,
    narrator: Narrator,
    tls: ssl.SSLContext | None = None,
) -> int:
    """Serve until a signal or POST /shutdown, then drain, or until the engine fails; returns the exit code.

    The code is 0 after a drain, 1 after a failure. A second signal ends the draining. Signals are handled only when
    called on the main thread. Owns `listener` and `engine` from here on: both are closed when it returns.
    """
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=logging.CRITICAL + 1,  # narration tells what matters
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_IDLE_S,
        timeout_graceful_shutdown=FLUSH_S,
        ssl_context_factory=None if tls is None else lambda *_: tls,
    )
    try:
        _listen(listener)
        main = _main(_Server(config), app.state.control, listener, engine, narrator)
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            exit_code = runner.run(main)
    finally:
        engine.close()
        listener.close()
    reason = "failed" if exit_code else "done"
    narrator.narrate("shutdown", "stopped", action="stop", reason=reason, exit_code=exit_code)
    return exit_code


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers; ours outlive the drain, which it knows nothing of."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _main(
    server: _Server, control: Control, listener: socket.socket, engine: InferenceEngine, narrator: Narrator
) -> int:
    with _signals(control.stop):
        vram_bytes = engine.status().vram_bytes_used
        narrator.narrate("ready", "ready", action="listen", vram_bytes=vram_bytes, port=listener.getsockname()[1])
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        ends = [asyncio.create_task(_drain(control, narrator)), asyncio.create_task(_fail(control, engine, narrator))]
        await asyncio.wait([serving, *ends], return_when=asyncio.FIRST_COMPLETED)
        if control.failure is not None:
            await ends[1]  # which still ends the jobs
        server.should_exit = True
        await serving
        for end in ends:
            if end.done():
                end.result()  # a bug of ours is not to be lost
            end.cancel()
    return 0 if control.failure is None else 1


async def _drain(control: Control, narrator: Narrator) -> None:
    """Wait for the wish to stop; let the jobs finish, then end them."""
    await control.end()
    if control.failure is None:  # else there is nothing to wait for
        narrator.narrate("shutdown", "draining", action="drain", reason="asked", in_flight=control.num_jobs)
        await control.drain()


async def _fail(control: Control, engine: InferenceEngine, narrator: Narrator) -> None:
    """Wait for the failure of the engine; end the jobs, and with them the service."""
    error = await engine.watch()
    narrator.narrate("error", error.message, level="fatal", action="fail", code=error.code)
    await control.fail(error)


@contextlib.contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` on the loop for every signal that asks for the end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    for name in STOP_SIGNALS:
        loop.add_signal_handler(name, stop)
    try:
        yield
    finally:
        for name in STOP_SIGNALS:
            loop.remove_signal_handler(name)
        ignore_signals()  # removing has restored the default, which would kill what still ends in order
