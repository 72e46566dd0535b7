"""What rendering one template may cost: time of its thread, and work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Final

MAX_STRING: Final = 8 * 2**20  # characters of any one string
MAX_WORK: Final = 64 * 2**20  # characters copied, and elements made at ELEMENT each
ELEMENT: Final = 16
_MAX_INT_BITS: Final = 1024
_MAX_MEMBER: Final = 64  # elements of a container that is looked for in another


class BudgetExceeded(Exception):
    """The template asked for more time, work or output than it may have."""


class Budget:
    """What one rendering may still use. Every method raises BudgetExceeded when that is used up."""

    def __init__(self, cpu_s: float, work: int = MAX_WORK) -> None:
        """`cpu_s` seconds of the calling thread, from now on."""
        self._deadline_s = time.thread_time() + cpu_s
        self._work = work

    def spend(self, work: int = 1) -> None:
        """Take `work` units, and look at the clock."""
        self._work -= work
        if self._work < 0 or time.thread_time() > self._deadline_s:
            raise BudgetExceeded

    def string(self, length: int) -> None:
        """Price of making a string."""
        if length > MAX_STRING:
            raise BudgetExceeded
        self.spend(length)

    def value(self, value: object) -> None:
        """Price of a new value by itself."""
        if isinstance(value, str):
            self.string(len(value))
        else:
            self.spend(ELEMENT * len(value) if isinstance(value, list | tuple | dict) else 1)

    def tree(self, value: object) -> None:
        """Price of walking a container with all it holds, counted as often as it is held."""
        for found in _walk(value):
            if isinstance(found, list | tuple | dict):
                self.spend(ELEMENT * (1 + len(found)))

    def text(self, value: object) -> None:
        """Price of printing a value: all its elements and the characters of its strings."""
        for found in _walk(value):
            self.value(found)

    def member(self, value: object) -> None:
        """Price of a value looked for in a container; it will be compared with each element there."""
        size = 0
        for found in _walk(value):
            size += len(found) if isinstance(found, list | tuple | dict) else 0
            if size > _MAX_MEMBER:
                raise BudgetExceeded
        self.spend()

    def times(self, left: object, right: object) -> None:
        """Price of `left * right`."""
        if isinstance(left, int):
            left, right = right, left
        if isinstance(left, str) and isinstance(right, int):
            self.string(len(left) * max(right, 0))
        elif isinstance(left, list | tuple) and isinstance(right, int):
            self.spend(ELEMENT * len(left) * max(right, 0))
        elif isinstance(left, int) and isinstance(right, int):
            self._integer(left.bit_length() + right.bit_length())

    def power(self, base: object, exponent: object) -> None:
        """Price of `base ** exponent`."""
        if isinstance(base, int) and isinstance(exponent, int):
            self._integer(base.bit_length() * abs(exponent))

    def replaced(self, text: str, old: str, new: str) -> None:
        """Price of `text.replace(old, new)`."""
        self.string(len(text) + text.count(old) * len(new))

    def joined(self, separator: str, items: list[Any]) -> None:
        """Price of `separator.join(items)`."""
        self.text(items)
        self.string(len(separator) * len(items))

    def _integer(self, num_bits: int) -> None:
        if num_bits > _MAX_INT_BITS:
            raise BudgetExceeded
        self.spend()


def _walk(value: object) -> Iterator[object]:
    """The value and all it holds, at any depth; cycles are for the caller's budget to end."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        yield found
        if isinstance(found, dict):
            waiting.extend(found)
            waiting.extend(found.values())
        elif isinstance(found, list | tuple):
            waiting.extend(found)
