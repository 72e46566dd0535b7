"""Answers that mark reasoning and tool calls with tags: `<think>…</think>`, `<tool_call>{…}</tool_call>` and kin."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from worker_orcd.server.output.call_reader import CallReader
from worker_orcd.server.output.pieces import Content, Piece, Reasoning, ToolCall, add, first_marker
from worker_orcd.tokenizer.stream import num_undecided

THINK, END_THINK = "<think>", "</think>"
_SEPARATORS: Final = " \t\r\n[],;"
_NAMED_HEAD: Final = re.compile(r"[\w.\-\[\]\s]{1,128}")  # before the arguments of NAME[CALL_ID]id[ARGS]{…}
_NAMED: Final = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*")


@dataclass(frozen=True)
class Tags:
    """How a model marks things.

    has_think   reasoning may stand at the beginning, between <think> and </think>
    call_open   before one or more JSON objects that are calls; call_close behind them, if anything is
    is_bare     an answer may also be calls from its first character on, without a tag
    is_named    calls may also be written NAME[ARGS]{arguments}
    """

    has_think: bool = False
    call_open: str = ""
    call_close: str = ""
    is_bare: bool = False
    is_named: bool = False


class _Mode(Enum):
    CONTENT = auto()
    REASONING = auto()
    CALLS = auto()  # behind the tag of calls, or the end of one
    CALL = auto()


class TaggedParser:
    """Reasoning and calls by their tags, the rest is content.

    White space beside a tag belongs to neither side. Calls that turn out to be none are content, tag and all.
    """

    def __init__(self, tags: Tags, names: frozenset[str], new_id: Callable[[], str], is_thinking: bool) -> None:
        """`names`: the tools; without any, call tags are content. `is_thinking`: reasoning is open from the start."""
        self.needs_special = bool(names and tags.call_open)
        self._tags = tags
        self._names = names
        self._new_id = new_id
        self._mode = _Mode.REASONING if is_thinking else _Mode.CONTENT
        self._buffer = ""
        self._skips_space = is_thinking
        self._may_think = tags.has_think and not is_thinking
        self._may_be_bare = tags.is_bare and bool(names)
        self._call_tags = [tag for tag in (tags.call_open, tags.call_close) if tag]
        self._raw: str | None = None  # all from a tag on, while no call has been found behind it
        self._reader = CallReader()
        self._num_calls = 0

    def feed(self, text: str) -> list[Piece]:
        return self._run(text, is_final=False)

    def finish(self) -> list[Piece]:
        return self._run("", is_final=True)

    def _run(self, text: str, is_final: bool) -> list[Piece]:
        self._buffer += text
        pieces: list[Piece] = []
        steps = {
            _Mode.CONTENT: self._content,
            _Mode.REASONING: self._reasoning,
            _Mode.CALLS: self._calls,
            _Mode.CALL: self._call,
        }
        while steps[self._mode](pieces, is_final):
            pass
        return pieces

    # Each step takes from the buffer what it can, and returns whether there is more to do.

    def _content(self, pieces: list[Piece], is_final: bool) -> bool:
        if self._skips_space:
            self._buffer = self._buffer.lstrip()
        begin = len(self._buffer) - len(self._buffer.lstrip())
        if self._may_be_bare and self._buffer[begin : begin + 1] in ("{", "["):
            self._raw, self._buffer, self._mode = self._buffer[:begin], self._buffer[begin:], _Mode.CALLS
            return True
        markers = [THINK] if self._may_think else []
        markers += [self._tags.call_open] if self._names and self._tags.call_open else []
        found = first_marker(self._buffer, markers)
        if found is None or found[0] > begin:
            cut = found[0] if found else self._num_certain(markers, is_final)
            text = self._buffer[:cut].rstrip() if found else self._buffer[:cut]
            self._tell_content(text, pieces)
            self._buffer = self._buffer[len(text) :]
            return found is not None
        if found[1] == self._tags.call_open:
            self._raw, self._mode = self._buffer[:begin] + found[1], _Mode.CALLS
            self._may_be_bare = False
        else:
            self._mode, self._may_think, self._skips_space = _Mode.REASONING, False, True
        self._buffer = self._buffer[begin + len(found[1]) :]
        return True

    def _num_certain(self, markers: list[str], is_final: bool) -> int:
        """How much of the buffer is not part of a marker, nor white space before one, whatever comes."""
        size = len(self._buffer)
        if is_final or not (markers or self._may_be_bare):
            return size
        return len(self._buffer[: size - num_undecided(self._buffer, markers)].rstrip())

    def _tell_content(self, text: str, pieces: list[Piece]) -> None:
        if text.strip():
            self._skips_space = self._may_think = self._may_be_bare = False
        add(pieces, Content(text))

    def _reasoning(self, pieces: list[Piece], is_final: bool) -> bool:
        text = self._buffer.lstrip() if self._skips_space else self._buffer
        self._buffer = text
        end = text.find(END_THINK)
        cut = self._num_certain([END_THINK], is_final) if end < 0 else len(text[:end].rstrip())
        add(pieces, Reasoning(text[:cut]))
        self._skips_space = self._skips_space and cut == 0
        self._buffer = text[cut:]
        if end >= 0:
            self._mode, self._skips_space, self._buffer = _Mode.CONTENT, True, text[end + len(END_THINK) :]
        return end >= 0

    def _calls(self, pieces: list[Piece], is_final: bool) -> bool:
        buffer = self._buffer
        tag = next((tag for tag in self._call_tags if buffer.startswith(tag)), "")
        if not tag and not is_final and num_undecided(buffer, self._call_tags) == len(buffer):
            return False
        if buffer[:1] == "{":
            return self._begin_call(CallReader(self._names if self._may_be_bare else None), buffer)
        if tag and tag == self._tags.call_close:
            return self._leave(tag, pieces)
        if tag:
            self._raw = (self._raw or "") + tag
        elif buffer and buffer[0] in _SEPARATORS:
            tag = buffer[0]
            self._raw = None if self._raw is None else self._raw + tag
        else:
            return self._named(pieces, is_final)
        self._buffer = buffer[len(tag) :]
        return True

    def _named(self, pieces: list[Piece], is_final: bool) -> bool:
        """NAME[ARGS]{…} becomes what the reader reads."""
        head, brace, _ = self._buffer.partition("{")
        may_be = self._tags.is_named and _NAMED_HEAD.fullmatch(head)
        if may_be and not brace and not is_final:
            return False
        name = _NAMED.fullmatch(head) if may_be and brace else None
        if name is None:
            return self._leave("", pieces)
        reader = CallReader()
        reader.feed(f'{{"name": {json.dumps(name[1])}, "arguments": ')
        return self._begin_call(reader, self._buffer[len(head) :])

    def _begin_call(self, reader: CallReader, buffer: str) -> bool:
        self._reader, self._buffer, self._mode = reader, buffer, _Mode.CALL
        self._raw = self._raw or ""
        return True

    def _call(self, pieces: list[Piece], is_final: bool) -> bool:
        reader = self._reader
        self._buffer = self._buffer[reader.feed(self._buffer) :]
        if reader.name is not None and self._raw is not None:
            add(pieces, ToolCall(self._num_calls, self._new_id(), reader.name, ""))
            self._num_calls, self._raw = self._num_calls + 1, None
        add(pieces, ToolCall(self._num_calls - 1, None, None, reader.take_arguments()))
        if reader.is_done:
            self._mode = _Mode.CALLS
        elif self._raw is not None and (reader.is_bad or is_final):
            self._raw += reader.raw
            return self._leave("", pieces)
        return reader.is_done

    def _leave(self, tag: str, pieces: list[Piece]) -> bool:
        """The calls are over; where none was found, all of it is content."""
        self._skips_space = self._raw is None
        self._mode, self._may_be_bare = _Mode.CONTENT, False
        if self._raw is not None:
            self._tell_content(self._raw + tag, pieces)
        self._raw, self._buffer = None, self._buffer[len(tag) :]
        return True
