"""Signals that end the process, where an exception of the handler cannot be passed on."""

from __future__ import annotations

import signal
import subprocess
import sys
from textwrap import dedent

import pytest

LOST = """
    import os, signal, sys, time, weakref
    from worker_orcd.signals import StopRequest, Stopped, stoppable

    class Thing: pass

    def signalled_where_python_drops_what_is_raised(number):
        def die(_):
            os.kill(os.getpid(), number)
            time.sleep(0)  # the handler runs here at the latest
        thing = Thing()
        reference = weakref.ref(thing, die)
        del thing
"""
RAISED = """
    try:
        with stoppable():
            signalled_where_python_drops_what_is_raised(NUMBER)
            time.sleep(30)
    except Stopped:
        os.kill(os.getpid(), NUMBER)  # a second one
        sys.exit(7)
"""
KEPT = """
    with StopRequest() as stop:
        stop.check()
        signalled_where_python_drops_what_is_raised(NUMBER)
        try:
            stop.check()
        except Stopped:
            told = []
            stop.pass_to(lambda: told.append(1))
            os.kill(os.getpid(), NUMBER)
            time.sleep(0)
    os.kill(os.getpid(), NUMBER)
    sys.exit(5 + len(told))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("program", [RAISED, KEPT])
def test_a_signal_is_not_lost_and_later_ones_do_not_cut_the_end(program: str, number: signal.Signals) -> None:
    text = dedent(LOST) + dedent(program).replace("NUMBER", str(int(number)))
    run = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=20, check=False)
    assert (run.returncode, run.stderr) == (7, "")
