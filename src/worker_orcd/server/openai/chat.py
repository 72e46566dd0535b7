"""`/v1/chat/completions`: one object, or chunks from the one with the role to the one with the reason of the end."""

from __future__ import annotations

import uuid
from typing import Any

from worker_orcd.engine.request import Tokens
from worker_orcd.server.exchange import Exchange
from worker_orcd.server.generation import Run
from worker_orcd.server.openai.bodies import ChatBody, read_body, refuse
from worker_orcd.server.openai.choice import Choice, Spelling
from worker_orcd.server.openai.chunks import ChoicesAnswer
from worker_orcd.server.openai.prepare import Chat, Preparer, Wish, grammar_param
from worker_orcd.server.output import Content, Piece, Reasoning


def chat_choices(
    preparer: Preparer, body: ChatBody, chat: Chat, exchange: Exchange, job_id: str, param: str
) -> list[Choice]:
    """The answers to a conversation, ready to run; `param` is what the dialect calls `response_format`."""
    if body.top_logprobs and not body.logprobs:
        refuse("top_logprobs", "value", "needs logprobs to be true")
    parsers = [preparer.parser(chat) for _ in range(body.n)]
    wish = Wish(
        max_tokens=body.max_completion_tokens,
        num_logprobs=body.top_logprobs if body.logprobs else None,
        grammar=preparer.chat_grammar(body, chat, param),
        shows_special=parsers[0].needs_special,
    )
    runs = preparer.runs(body, [chat.ids], exchange, job_id, wish)
    is_single = not body.parallel_tool_calls
    return [Choice(run, parser, is_single) for run, parser in zip(runs, parsers, strict=True)]


class ChatAnswer(ChoicesAnswer):
    """The chunks, or the one object, of a chat."""

    _kinds = ("chat.completion", "chat.completion.chunk")

    def __init__(self, preparer: Preparer, body: ChatBody, exchange: Exchange) -> None:
        """Raises InvalidRequest or TemplateError."""
        chat, job_id = preparer.chat(body), f"chatcmpl-{uuid.uuid4().hex}"
        choices = chat_choices(preparer, body, chat, exchange, job_id, self.grammar_param)
        super().__init__(job_id, choices, chat.prompt, body, preparer.info, exchange)
        self.grammar_param = grammar_param(body, self.grammar_param, chat)
        self._has_logprobs = body.logprobs
        self._logprobs: list[list[Any]] = [[] for _ in choices]  # of an answer that goes out whole
        self._spelling = Spelling(preparer.tokenizer)

    @classmethod
    def read(cls, preparer: Preparer, raw: bytes, exchange: Exchange) -> ChatAnswer:
        return cls(preparer, read_body(raw, ChatBody), exchange)

    def started(self, run: Run) -> bytes:
        return self._chunk(run.index, {"role": "assistant", "content": ""}) if self.is_streamed else b""

    def tokens(self, run: Run, event: Tokens) -> bytes:
        choice = self._choices[run.index]
        pieces = choice.push(event)
        return self._chunks(choice, pieces) if self.is_streamed else self._keep(choice)

    def ended(self, run: Run, rest: str) -> bytes:
        choice = self._choices[run.index]
        pieces = choice.finish(rest)
        if not self.is_streamed:
            return self._keep(choice)
        last = {"index": run.index, "delta": {}, "logprobs": None, "finish_reason": choice.finish_reason}
        return self._chunks(choice, pieces) + self._frame(last, run)

    def _keep(self, choice: Choice) -> bytes:
        """Spelled as they come: those of a whole answer at once would hold up everyone."""
        if scored := choice.take_scored():
            self._logprobs[choice.run.index] += self._spelling.chat(scored)
        return b""

    def _chunks(self, choice: Choice, pieces: list[Piece]) -> bytes:
        """One chunk a piece; the log-probabilities go with the first, or alone."""
        deltas = [_delta(piece) for piece in pieces]
        logprobs = _logprobs(self._spelling.chat(scored)) if (scored := choice.take_scored()) else None
        if logprobs and not deltas:
            deltas = [{}]
        index = choice.run.index
        return b"".join(self._chunk(index, delta, None if i else logprobs) for i, delta in enumerate(deltas))

    def _chunk(self, index: int, delta: dict[str, Any], logprobs: Any = None) -> bytes:
        return self._frame({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None})

    def _whole(self, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.content, "refusal": None}
        if choice.reasoning:
            message["reasoning_content"] = choice.reasoning
        if choice.calls:
            message["content"] = choice.content or None
            message["tool_calls"] = choice.calls
        return {
            "index": choice.run.index,
            "message": message,
            "logprobs": _logprobs(self._logprobs[choice.run.index]) if self._has_logprobs else None,
            "finish_reason": choice.finish_reason,
        }


def _logprobs(content: list[Any]) -> dict[str, Any]:
    return {"content": content, "refusal": None}


def _delta(piece: Piece) -> dict[str, Any]:
    if isinstance(piece, Content):
        return {"content": piece.text}
    if isinstance(piece, Reasoning):
        return {"reasoning_content": piece.text}
    call: dict[str, Any] = {"index": piece.index}
    if piece.id:
        call |= {"id": piece.id, "type": "function"}
    name = {"name": piece.name} if piece.name else {}
    return {"tool_calls": [call | {"function": name | {"arguments": piece.arguments_delta}}]}
