"""Whether a grammar may be sent to the engine: a child process that nobody would miss compiles it first."""

from __future__ import annotations

import subprocess
import sys
from functools import lru_cache
from threading import BoundedSemaphore

import msgspec

from worker_orcd.engine.request import Grammar
from worker_orcd.errors import FieldError, GrammarError, Overloaded

COMPILER_MODULE = "worker_orcd.engine.grammar_source"
MAX_GRAMMAR_BYTES = 2**16
NUM_CHILDREN = 2  # at once; others wait their turn
COMPILE_S = 5.0  # for one child, its start included
WAIT_S = 10.0
NUM_REMEMBERED = 256  # grammars found good; at most 16 MiB of text
REFUSED_EXIT = 4


class GrammarChecker:
    """Remembers what it has found good. Blocking, and safe to use from several threads."""

    def __init__(self) -> None:
        self._slots = BoundedSemaphore(NUM_CHILDREN)
        self._compile = lru_cache(NUM_REMEMBERED)(self._compile_apart)

    def check(self, grammar: Grammar, param: str = "response_format") -> None:
        """Raise GrammarError, naming `param`, for a grammar that is wrong, too large or too costly.

        Raises Overloaded when too many others are being checked.
        """
        try:
            if len(grammar.text.encode("utf-8", "replace")) > MAX_GRAMMAR_BYTES:
                raise _Bad("length", f" has more than {MAX_GRAMMAR_BYTES} bytes, the limit")
            if grammar.kind != "json_object":
                self._compile(grammar)
        except _Bad as bad:
            message = f"{param}{bad.message}"
            raise GrammarError(message, [FieldError(param, bad.constraint, message)]) from None

    def _compile_apart(self, grammar: Grammar) -> None:
        if not self._slots.acquire(timeout=WAIT_S):
            raise Overloaded("too many grammars are being compiled; try again")
        try:
            command = [sys.executable, "-P", "-m", COMPILER_MODULE]
            document = msgspec.json.encode(grammar)
            child = subprocess.run(
                command, input=document, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=COMPILE_S
            )
        except subprocess.TimeoutExpired:
            raise _Bad("cost", f" takes more than {COMPILE_S:g} s to compile; simplify it") from None
        finally:
            self._slots.release()
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
