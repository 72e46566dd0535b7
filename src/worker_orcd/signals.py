"""Signals outside an event loop: a wish that is kept, or an exception where one is awaited, and silence elsewhere."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

HANGUP = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)  # nohup wants it ignored
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, *HANGUP)
RETRY_S = 0.05  # by then the callback that dropped the exception has ended


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


class StopRequest:
    """The wish of a signal to end the process, kept until `check` is asked; from the end of the `with` on, ignored.

    For what must not lose it: an exception raised by a handler is lost where Python cannot pass it on.
    """

    def __init__(self) -> None:
        self._is_made = False
        self._receiver: Callable[[], None] = lambda: None

    def __enter__(self) -> Self:
        for number in STOP_SIGNALS:
            signal.signal(number, self._make)
        return self

    def __exit__(self, *_: object) -> None:
        ignore_signals()

    def check(self) -> None:
        """Raise Stopped if a signal has come."""
        if self._is_made:
            raise Stopped

    def pass_to(self, receiver: Callable[[], None]) -> None:
        """Call it for a signal that comes, or has come, instead of waiting for `check`."""
        self._receiver = receiver
        if self._is_made:
            receiver()

    def _make(self, *_: object) -> None:
        self._is_made = True
        self._receiver()


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise Stopped on the first signal; from the end of the block on, ignore them: the process is ending anyway.

    Where Python cannot pass it on, as in a callback of the import machinery, it comes again a moment later.
    """

    def stop(*_: object) -> None:
        ignore_signals()
        raise Stopped

    tell_unraisable = sys.unraisablehook

    def not_passed_on(what: sys.UnraisableHookArgs) -> None:
        if isinstance(what.exc_value, Stopped):
            signal.setitimer(signal.ITIMER_REAL, RETRY_S)
        else:
            tell_unraisable(what)

    for number in (*STOP_SIGNALS, signal.SIGALRM):
        signal.signal(number, stop)
    sys.unraisablehook = not_passed_on
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        sys.unraisablehook = tell_unraisable
        ignore_signals()


def ignore_signals() -> None:
    """What is left to do is short and must not be cut: later signals change nothing."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
