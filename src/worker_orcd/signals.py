"""Signals that ask for the end, outside an event loop: an exception until others handle them, then silence."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

HANGUP = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)  # nohup wants it ignored
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, *HANGUP)


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end. No code on the way may swallow it as an error."""


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
