"""Signals outside an event loop: an exception, where one is awaited, and silence elsewhere."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

HANGUP = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)  # nohup wants it ignored
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, *HANGUP)


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end. No code on the way may swallow it as an error."""


class Interrupts:
    """Ctrl-C at a terminal: from `install` on it raises KeyboardInterrupt in a `with` block of it, else nothing.

    An exception that may come anywhere comes sooner or later where none is caught: in a handler of the one before.
    """

    def __init__(self) -> None:
        self._is_awaited = False

    def install(self) -> None:
        signal.signal(signal.SIGINT, self._interrupt)

    def __enter__(self) -> None:
        self._is_awaited = True

    def __exit__(self, *_: object) -> None:
        self._is_awaited = False

    def _interrupt(self, *_: object) -> None:
        if self._is_awaited:
            self._is_awaited = False  # before the exception, so that no second one meets it
            raise KeyboardInterrupt


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise Stopped on the first signal; from the end of the block on, ignore them: the process is ending anyway."""

    def stop(*_: object) -> None:
        ignore_signals()
        raise Stopped

    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, stop)
    try:
        yield
    finally:
        ignore_signals()


def ignore_signals() -> None:
    """What is left to do is short and must not be cut: later signals change nothing."""
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
