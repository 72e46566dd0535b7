"""Answers in harmony (gpt-oss): messages with a header that says whom they are for.

`<|start|>assistant<|channel|>analysis<|message|>…<|end|>`, the first one without its `<|start|>assistant`, which
the prompt ends with. The last ends with `<|return|>`, or with `<|call|>` when it calls a tool: ends of generation,
which the text does not show.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from worker_orcd.server.output.pieces import Content, Piece, Reasoning, ToolCall, add, first_marker
from worker_orcd.tokenizer.stream import num_undecided

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_ENDS: Final = ("<|end|>", "<|return|>", "<|call|>")
_BODY_MARKERS: Final = (START, CHANNEL, *_ENDS)
_HEADER_MARKERS: Final = (START, MESSAGE, *_ENDS)
_MAX_HEADER: Final = 512  # characters
_MAX_MARKER: Final = 11
_RECIPIENT: Final = re.compile(r"to=functions\.([^\s<]+)")
_CHANNEL: Final = re.compile(r"<\|channel\|>\s*(\w+)")
_NAMED: Final = re.compile(r"<\|(?:channel|constrain)\|>\s*\w*")
_ROLE: Final = re.compile(r"\s*[\w.-]*\s*(t|to|to=\S*)?\s*")  # what a header may begin with, after <|start|>
_TO: Final = re.compile(r"\s*(t|to|to=\S*)?\s*")  # the same where the prompt has said the role


class HarmonyParser:
    """The channel analysis is reasoning, final and commentary are content, `to=functions.NAME` is a call.

    Text outside of a message is content, and so are the calls where no tools were offered.
    """

    needs_special = True

    def __init__(self, has_tools: bool, new_id: Callable[[], str], prompt: str) -> None:
        """`prompt`: what the answer continues, a message begun in it included."""
        self._has_tools = has_tools
        self._new_id = new_id
        self._num_calls = 0
        self._buffer = ""
        self._is_header, self._beginning = True, _TO
        self._make: Callable[[str], Piece] = Content
        begun = prompt[prompt.rfind(START) :]
        if MESSAGE in begun and not begun.endswith(_ENDS):
            self._open(begun[: begun.rfind(MESSAGE)], [])

    def feed(self, text: str) -> list[Piece]:
        return self._run(text, is_final=False)

    def finish(self) -> list[Piece]:
        return self._run("", is_final=True)

    def _run(self, text: str, is_final: bool) -> list[Piece]:
        self._buffer += text
        pieces: list[Piece] = []
        while self._header(pieces, is_final) if self._is_header else self._body(pieces, is_final):
            pass
        return pieces

    def _body(self, pieces: list[Piece], is_final: bool) -> bool:
        """Tell what is sure to belong to the message; whether it has ended."""
        found = first_marker(self._buffer, _BODY_MARKERS)
        if found is None:
            cut = len(self._buffer) - (0 if is_final else num_undecided(self._buffer, _BODY_MARKERS))
            add(pieces, self._make(self._buffer[:cut]))
            self._buffer = self._buffer[cut:]
            return False
        begin, marker = found
        add(pieces, self._make(self._buffer[:begin]))
        self._make = Content
        self._is_header, self._beginning = marker not in _ENDS, _ROLE
        self._buffer = self._buffer[begin if marker == CHANNEL else begin + len(marker) :]
        return True

    def _header(self, pieces: list[Piece], is_final: bool) -> bool:
        """Read a header up to its `<|message|>`; text that cannot be one is content. Whether to go on."""
        found = first_marker(self._buffer, _HEADER_MARKERS)
        begin = found[0] if found else len(self._buffer) - _MAX_MARKER
        if begin > _MAX_HEADER or not self._beginning.fullmatch(self._buffer.split("<", 1)[0]):
            self._is_header, self._buffer = False, self._buffer.removeprefix(CHANNEL)
        elif found is not None:
            header, self._buffer = self._buffer[:begin], self._buffer[begin + len(found[1]) :]
            self._is_header = found[1] == START
            if found[1] == MESSAGE:
                self._open(header, pieces)
            else:
                self._give_up(header, pieces)
        else:
            if is_final:
                self._give_up(self._buffer, pieces)
            return False
        return True

    def _give_up(self, header: str, pieces: list[Piece]) -> None:
        """A header without a message: its words are content, unless they are a header's."""
        words = _NAMED.sub("", header)
        if (self._beginning is _TO and CHANNEL not in header) or not _ROLE.fullmatch(words):
            add(pieces, Content(words))
        self._beginning = _ROLE

    def _open(self, header: str, pieces: list[Piece]) -> None:
        """A message begins, of the kind its header says."""
        self._is_header, self._make = False, Content
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        if recipient and self._has_tools:
            index, self._num_calls = self._num_calls, self._num_calls + 1
            self._make = lambda text: ToolCall(index, None, None, text)
            add(pieces, ToolCall(index, self._new_id(), recipient[1], ""))
        elif channel and channel[1] == "analysis":
            self._make = Reasoning
