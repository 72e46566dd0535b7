"""SIGTERM and SIGINT outside an event loop: an exception until something else handles them, silence at the end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


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
