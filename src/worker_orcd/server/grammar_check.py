"""Whether a grammar may be sent to the engine: a child process that nobody would miss compiles it first."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import msgspec

from worker_orcd.engine.request import Grammar
from worker_orcd.errors import FieldError, GrammarError, Overloaded

COMPILER_MODULE = "worker_orcd.engine.grammar_source"
MAX_GRAMMAR_BYTES = 2**16
NUM_CHILDREN = 2  # at once; others wait their turn
COMPILE_S = 5.0  # for one child, its start included
WAIT_S = 10.0  # that a grammar may have to wait for a child, as far as can be told
USUAL_S = 0.5  # that a child takes, until some have been seen
NUM_REMEMBERED = 256  # grammars found good; at most 16 MiB of text
REFUSED_EXIT = 4


@dataclass
class _Check:
    """One that is queued or under way, and how many requests want to know."""

    work: asyncio.Future[None]
    num_waiting: int = 0


class GrammarChecker:
    """Remembers what it has found good. Called on the event loop; its threads do nothing but wait for children."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(NUM_CHILDREN, "grammar")
        self._checks: dict[Grammar, _Check] = {}
        self._good: dict[Grammar, None] = {}  # the one least recently asked for first
        self._usual_s = USUAL_S

    async def check(self, grammar: Grammar, param: str = "response_format") -> None:
        """Raise GrammarError, naming `param`, for a grammar that is wrong, too large or too costly.

        Raises Overloaded, at once, when too many others are being checked. What a child need not look at takes no
        time. A check that is cancelled by all who wait for it leaves the queue.
        """
        try:
            if len(grammar.text.encode("utf-8", "replace")) > MAX_GRAMMAR_BYTES:
                raise _Bad("length", f" has more than {MAX_GRAMMAR_BYTES} bytes, the limit")
            if grammar.kind != "json_object":
                if grammar not in self._good:
                    await self._compiled(grammar)
                self._remember(grammar)
        except _Bad as bad:
            message = f"{param}{bad.message}"
            raise GrammarError(message, [FieldError(param, bad.constraint, message)]) from None

    async def _compiled(self, grammar: Grammar) -> None:
        if grammar not in self._checks:
            if len(self._checks) * self._usual_s > NUM_CHILDREN * WAIT_S:
                raise Overloaded("too many grammars are being compiled; try again")
            loop = asyncio.get_running_loop()
            self._checks[grammar] = _Check(loop.run_in_executor(self._threads, self._compile, grammar))
        check = self._checks[grammar]
        check.num_waiting += 1
        try:
            await asyncio.wait([check.work])
            check.work.result()
        finally:
            check.num_waiting -= 1
            if not check.num_waiting:
                check.work.cancel()
                del self._checks[grammar]

    def _remember(self, grammar: Grammar) -> None:
        self._good.pop(grammar, None)
        self._good[grammar] = None
        if len(self._good) > NUM_REMEMBERED:
            del self._good[next(iter(self._good))]

    def _compile(self, grammar: Grammar) -> None:
        """Blocking."""
        began_s = time.monotonic()
        try:
            command = [sys.executable, "-P", "-m", COMPILER_MODULE]
            document = msgspec.json.encode(grammar)
            child = subprocess.run(
                command, input=document, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=COMPILE_S
            )
        except subprocess.TimeoutExpired:
            raise _Bad("cost", f" takes more than {COMPILE_S:g} s to compile; simplify it") from None
        finally:
            self._usual_s += (time.monotonic() - began_s - self._usual_s) / 8
        if child.returncode == REFUSED_EXIT:
            message = child.stdout.decode("utf-8", "replace")
            raise _Bad("grammar", message.removeprefix("response_format"))
        if child.returncode != 0:
            raise _Bad("cost", " is too complex to compile; simplify it")


class _Bad(Exception):
    """What is wrong with a grammar, in words that follow the name of its field."""

    def __init__(self, constraint: str, message: str) -> None:
        super().__init__(message)
        self.constraint, self.message = constraint, message
