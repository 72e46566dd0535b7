"""What an answer is made of, and what every parser of answers offers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    """Words for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The model thinking aloud."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A part of call number `index`: the first has its id and name, later ones only more of its arguments.

    The arguments, joined, are the text of a JSON object as the model wrote it; whether it is valid is not checked,
    and it is cut short where the answer is.
    """

    index: int
    id: str | None
    name: str | None
    arguments_delta: str


Piece = Content | Reasoning | ToolCall


class OutputParser(Protocol):
    """Turns the text of one answer into pieces, as it comes. Never raises, whatever the text.

    The pieces of each kind, joined, do not depend on how the text was cut, and text is held back only while what it
    is cannot be told. `needs_special`: the text must show special tokens (`<|channel|>`, `[TOOL_CALLS]`).
    """

    needs_special: bool

    def feed(self, text: str) -> list[Piece]: ...
    def finish(self) -> list[Piece]: ...


class PlainParser:
    """All is content."""

    needs_special = False

    def feed(self, text: str) -> list[Piece]:
        return [Content(text)] if text else []

    def finish(self) -> list[Piece]:
        return []


def add(pieces: list[Piece], piece: Piece) -> None:
    """Append, joining what belongs together and leaving out what is empty."""
    last = pieces[-1] if pieces else None
    match piece, last:
        case (Content("") | Reasoning("") | ToolCall(name=None, arguments_delta=""), _):
            pass
        case Content(text), Content(before):
            pieces[-1] = Content(before + text)
        case Reasoning(text), Reasoning(before):
            pieces[-1] = Reasoning(before + text)
        case ToolCall(name=None, arguments_delta=text), ToolCall(index, call_id, name, before):
            pieces[-1] = ToolCall(index, call_id, name, before + text)
        case _:
            pieces.append(piece)


def first_marker(text: str, markers: Sequence[str]) -> tuple[int, str] | None:
    """Where the first of the markers begins, the longest of those that begin there; None without one."""
    found = [(text.find(marker), -len(marker), marker) for marker in markers if marker in text]
    if not found:
        return None
    begin, _, marker = min(found)
    return begin, marker
