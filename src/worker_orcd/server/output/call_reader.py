"""One tool call written as a JSON object, read as it comes."""

from __future__ import annotations

import json
import math
import re
from typing import Any, Final

_KEYS: Final = ("name", "type", "id", "function", "arguments", "parameters")
_OUTSIDE: Final = re.compile(r'[\w\s{}\[\]:,.+"-]')  # what JSON has outside of strings, more or less
_BEHIND: Final = ' \t\r\n,:"}'  # and what the objects of calls have behind the arguments
_MAX_START: Final = 32  # characters that the beginning of the first key may take
_FIRST_KEY: Final = re.compile(r'\{\s*(?:"([^"]*)("?)|$)')
_NAME: Final = re.compile(r'\{\s*(?:"(?:type|id)"\s*:\s*"[^"\\]*"\s*,\s*)*"name"\s*:\s*("(?:[^"\\]|\\.)+")')
_HEAD: Final = re.compile(_NAME.pattern + r'\s*,\s*"(?:arguments|parameters)"\s*:\s*\{')


class CallReader:
    """Reads `{"name": …, "arguments": {…}}`, or "parameters", with more keys and in any order.

    The arguments are told as they come where the name stands right before them, else whole at the end. `is_bad` as
    soon as this can be no call, which it cannot become once `name` is told. `names`, when given, are all that may be
    called, and an object that begins with other keys than a call's is then refused at once.
    """

    def __init__(self, names: frozenset[str] | None = None) -> None:
        self.name: str | None = None  # told as soon as this is certain to be a call
        self.is_bad = self.is_done = False
        self._names = names
        self._raw: list[str] = []  # all characters read, while `name` is not told
        self._arguments: list[str] = []
        self._depth = 0
        self._is_quoted = self._is_escaped = self._is_streaming = False

    @property
    def raw(self) -> str:
        """What was read, for one that went bad."""
        return "".join(self._raw)

    def take_arguments(self) -> str:
        """The text of the arguments read since last asked."""
        text, self._arguments = "".join(self._arguments), []
        return text

    def feed(self, text: str) -> int:
        """Read on; returns how many characters were: all, unless the object ended or went bad before."""
        for i, character in enumerate(text):
            if self.is_done:
                return i
            if not self._accepts(character):
                self.is_done = self.name is not None  # a call with something wrong behind its arguments
                self.is_bad = not self.is_done
                return i
            if self.name is None:
                self._raw.append(character)
        return len(text)

    def _accepts(self, character: str) -> bool:
        if not self._is_quoted and not self._is_streaming:
            known = _OUTSIDE.match(character) if self.name is None else character in _BEHIND
            if not known:
                return False
        self._scan(character)
        if self._is_streaming:
            self._arguments.append(character)
            self._is_streaming = self._depth > 1
        elif self.name is None and (character in '{}"' or len(self._raw) < _MAX_START):
            return self._look(self.raw + character)
        self.is_done = self._depth == 0
        return True

    def _scan(self, character: str) -> None:
        """Keep track of strings, and of how deep the next character is."""
        if self._is_escaped:
            self._is_escaped = False
        elif self._is_quoted:
            self._is_escaped = character == "\\"
            self._is_quoted = character != '"'
        elif character == '"':
            self._is_quoted = True
        else:
            self._depth += (character in "{[") - (character in "}]")

    def _look(self, raw: str) -> bool:
        """Whether this may be, or become, a call."""
        if self._names is not None:
            first, name = _FIRST_KEY.match(raw), _NAME.match(raw)
            if first is None or (name and decoded(name[1]) not in self._names):
                return False
            key, is_whole = first[1] or "", bool(first[2])
            if not any(known == key if is_whole else known.startswith(key) for known in _KEYS):
                return False
        if (head := _HEAD.fullmatch(raw)) and (called := decoded(head[1])):
            self.name, self._arguments, self._is_streaming = called, ["{"], True
            return True
        return self._depth > 0 or self._end(decoded(raw))

    def _end(self, found: Any) -> bool:
        """Look up in the whole object what was not told on the way."""
        if isinstance(found, dict) and isinstance(found.get("function"), dict):
            found = found["function"]
        name, arguments = _name_and_arguments(found)
        if not name or arguments is None or (self._names is not None and name not in self._names):
            return False
        self.name, self._arguments, self.is_done = name, [arguments], True
        return True


def _name_and_arguments(found: Any) -> tuple[str | None, str | None]:
    """Of a whole object; arguments written as a string of JSON are unwrapped, none are an empty object."""
    if not isinstance(found, dict) or not isinstance(name := found.get("name"), str):
        return None, None
    arguments: Any = next((found[key] for key in _KEYS[-2:] if found.get(key) is not None), {})
    if isinstance(arguments, str) and isinstance(decoded(arguments), dict):
        return name, arguments
    return name, json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else None


def decoded(text: str) -> Any:
    """The value of a JSON text that a model wrote, None where it is none; all of it can go out as JSON again.

    Half of a surrogate pair becomes U+FFFD, and a number that JSON has not (NaN, 1e999) the string of its letters.
    """
    try:
        value = json.loads(text, strict=False, parse_float=_number, parse_constant=str)
        if "\\u" not in text:
            return value
        halved = json.dumps(value, ensure_ascii=False).encode("utf-16", "surrogatepass")
        return json.loads(halved.decode("utf-16", "replace"))
    except (ValueError, RecursionError):
        return None


def _number(text: str) -> float | str:
    return number if math.isfinite(number := float(text)) else text
