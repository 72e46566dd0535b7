"""Answers of dialects that cut them into blocks, one after the other: text, reasoning, calls."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

from worker_orcd.engine.request import Tokens
from worker_orcd.server.exchange import Exchange
from worker_orcd.server.generation import Answer, Run
from worker_orcd.server.openai.bodies import ChatBody, Sampling, refuse
from worker_orcd.server.openai.chat import chat_choices
from worker_orcd.server.openai.prepare import Preparer, digest, grammar_param
from worker_orcd.server.openai.wire import event_frame
from worker_orcd.server.output import Piece, Reasoning, ToolCall
from worker_orcd.server.receipt import Receipt, receipt_of

Event = dict[str, Any]  # with its type


@dataclass
class Block:
    """A part of an answer; `text` is what came of it so far. A call has an id and a name."""

    index: int
    kind: Literal["text", "reasoning", "call"]
    call: int = -1
    id: str = ""
    name: str = ""
    text: str = ""


def chat_body(body: Sampling, messages: list[dict[str, Any]], **fields: Any) -> ChatBody:
    """The same wish as a chat of one answer."""
    shared = {name: getattr(body, name) for name in Sampling.__struct_fields__}
    return ChatBody(**shared | {"n": 1, "messages": messages} | fields)


def response_format(wish: Any, param: str) -> dict[str, Any]:
    """That of a chat, for the format that a body wishes for in `param`."""
    wish = wish or {"type": "text"}
    if not isinstance(wish, dict):
        refuse(param, "type", "must be an object")
    return wish | {"json_schema": wish}


class BlockAnswer(Answer):
    """One answer as a sequence of blocks."""

    prompt_param = "messages"  # the field of the body that the conversation comes in

    def __init__(self, preparer: Preparer, body: ChatBody, exchange: Exchange, job_id: str) -> None:
        """Raises InvalidRequest or TemplateError."""
        chat = preparer.chat(body, self.prompt_param)
        (self._choice,) = chat_choices(preparer, body, chat, exchange, job_id, self.grammar_param)
        super().__init__(job_id, [self._choice.run], len(chat.prompt), digest(chat.prompt))
        self.grammar_param = grammar_param(body, self.grammar_param, chat)
        self.is_streamed = body.stream
        self._blocks: list[Block] = []
        self._has_open = False
        self._info, self._is_full = preparer.info, exchange.wants_full_receipt

    def tokens(self, run: Run, event: Tokens) -> bytes:  # noqa: ARG002 - there is only one
        return self._told(self._choice.push(event))

    def ended(self, run: Run, rest: str) -> bytes:  # noqa: ARG002
        return self._told(self._choice.finish(rest)) + self._frames(self._close())

    def _receipt(self) -> dict[str, Receipt]:
        """An extension of the last event, or of the body."""
        return {"receipt": receipt_of(self._choice.run, self._info, self._is_full)}

    @abstractmethod
    def _opened(self, block: Block) -> list[Event]: ...

    @abstractmethod
    def _added(self, block: Block, text: str) -> list[Event]: ...

    @abstractmethod
    def _closed(self, block: Block) -> list[Event]: ...

    def _told(self, pieces: list[Piece]) -> bytes:
        events: list[Event] = []
        for piece in pieces:
            kind, call = _kind(piece)
            last = self._blocks[-1] if self._has_open else None
            if last is None or (last.kind, last.call) != (kind, call):
                events += self._close()
                last = Block(len(self._blocks), kind, call)
                if isinstance(piece, ToolCall):
                    last.id, last.name = piece.id or "", piece.name or ""
                self._blocks.append(last)
                self._has_open = True
                events += self._opened(last)
            if text := piece.arguments_delta if isinstance(piece, ToolCall) else piece.text:
                last.text += text
                events += self._added(last, text)
        return self._frames(events)

    def _close(self) -> list[Event]:
        if not self._has_open:
            return []
        self._has_open = False
        return self._closed(self._blocks[-1])

    def _frames(self, events: list[Event]) -> bytes:
        return b"".join(map(event_frame, events)) if self.is_streamed else b""


def _kind(piece: Piece) -> tuple[Literal["text", "reasoning", "call"], int]:
    if isinstance(piece, ToolCall):
        return "call", piece.index
    return ("reasoning" if isinstance(piece, Reasoning) else "text"), -1
