"""One answer while it comes: tokens become pieces of text and log-probabilities; and what both add up to."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from worker_orcd.engine.request import TokenLogprob, Tokens
from worker_orcd.errors import InvalidRequest
from worker_orcd.server.generation import Run
from worker_orcd.server.output import Content, OutputParser, Piece, Reasoning, ToolCall
from worker_orcd.server.output.pieces import add

if TYPE_CHECKING:
    from worker_orcd.tokenizer.base import Tokenizer

LOWEST = -9999.0  # JSON has no infinity

Scored = tuple[int, TokenLogprob]  # a token and what the model thought of it
Placed = tuple[int, TokenLogprob | None, int]  # the same, and where in the text the token begins


class Choice:
    """The pieces of one run; also all of them so far, for an answer that goes out whole."""

    def __init__(self, run: Run, parser: OutputParser, is_single_call: bool = False) -> None:
        self.run = run
        self.content, self.reasoning = "", ""
        self.calls: list[dict[str, Any]] = []
        self.scored: list[Scored] = []  # released, and not yet taken
        self.num_reasoning_tokens = 0
        self._parser, self._is_single_call = parser, is_single_call
        self._held: list[tuple[int, Scored]] = []  # with where the token's text begins
        self._num_pushed = self._num_released = 0  # characters
        self._num_untold = 0  # tokens of which no piece has come yet

    def push(self, event: Tokens) -> list[Piece]:
        """The pieces that become certain with these tokens."""
        pieces: list[Piece] = []
        for i, token_id in enumerate(event.ids):
            released = self.run.push(token_id)
            if event.logprobs:
                self._hold((token_id, event.logprobs[i]), released)
            self._num_untold += 1
            for piece in self._added(self._parser.feed(released)):
                add(pieces, piece)
            if self.run.is_complete:
                break
        return pieces

    def finish(self, rest: str) -> list[Piece]:
        """The last pieces."""
        if self.run.text.matched is None:
            self.scored += [scored for _, scored in self._held]
        return self._added(self._parser.feed(rest) + self._parser.finish())

    def take_scored(self) -> list[Scored]:
        """The log-probabilities that may be told now."""
        scored, self.scored = self.scored, []
        return scored

    @property
    def finish_reason(self) -> str:
        if self.run.stop_reason in ("max_tokens", "context_length"):
            return "length"
        return "tool_calls" if self.calls else "stop"

    def _hold(self, scored: Scored, released: str) -> None:
        """A token is told when its text is: one that becomes part of a stop string never is."""
        self._held.append((self._num_pushed, scored))
        self._num_released += len(released)
        text = self.run.text
        self._num_pushed = self._num_released + text.num_held
        if not text.num_held and text.matched is None:
            ready = len(self._held)
        else:
            ready = sum(begin < self._num_released for begin, _ in self._held)
        self.scored += [item for _, item in self._held[:ready]]
        del self._held[:ready]

    def _added(self, pieces: Sequence[Piece]) -> list[Piece]:
        kept = []
        for piece in pieces:
            match piece:
                case Content(text):
                    self.content += text
                case Reasoning(text):
                    self.reasoning += text
                case ToolCall(index, call_id, name, arguments):
                    if index and self._is_single_call:
                        self.run.is_cut = True
                        continue
                    if call_id:
                        self.calls.append(call_document(call_id, name or ""))
                    self.calls[-1]["function"]["arguments"] += arguments
            kept.append(piece)
        if kept:
            if all(isinstance(piece, Reasoning) for piece in kept):
                self.num_reasoning_tokens += self._num_untold
            self._num_untold = 0
        return kept


def call_document(call_id: str, name: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}


def usage(choices: Sequence[Run], num_reasoning_tokens: int = 0) -> dict[str, Any]:
    """Tokens of all runs; each prompt is counted once, as it was found by the first run that has it."""
    leaders = [run for run in choices if run.leader is None]
    num_in = sum(len(run.request.prompt_ids) for run in leaders)
    num_out = sum(run.num_tokens for run in choices)
    return {
        "prompt_tokens": num_in,
        "completion_tokens": num_out,
        "total_tokens": num_in + num_out,
        "prompt_tokens_details": {"cached_tokens": sum(run.cached_tokens for run in leaders)},
        "completion_tokens_details": {"reasoning_tokens": num_reasoning_tokens},
    }


class Spelling:
    """Tokens and log-probabilities in the words of the API."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def chat(self, scored: Sequence[Scored]) -> list[dict[str, Any]]:
        """The content of `logprobs` of a chat."""
        content = []
        for token_id, logprob in scored:
            top = [self._entry(other, value) for other, value in logprob.top]
            content.append(self._entry(token_id, logprob.logprob) | {"top_logprobs": top})
        return content

    def completion(self, placed: Sequence[Placed]) -> dict[str, Any]:
        """The `logprobs` of a completion."""
        return {
            "tokens": [self._name(token_id) for token_id, _, _ in placed],
            "token_logprobs": [item and max(item.logprob, LOWEST) for _, item, _ in placed],
            "top_logprobs": [item and self._top(token_id, item) for token_id, item, _ in placed],
            "text_offset": [offset for _, _, offset in placed],
        }

    def _top(self, token_id: int, item: TokenLogprob) -> dict[str, float]:
        ranked = {self._name(other): max(value, LOWEST) for other, value in item.top}
        return ranked | {self._name(token_id): max(item.logprob, LOWEST)}

    def _entry(self, token_id: int, value: float) -> dict[str, Any]:
        text = _bytes(self._tokenizer, token_id)
        token = text.decode("utf-8", "replace") or self._name(token_id)
        return {"token": token, "logprob": max(value, LOWEST), "bytes": list(text)}

    def _name(self, token_id: int) -> str:
        """Text of a token; of one that is no whole characters, its bytes, so that two of them stay apart."""
        text = _bytes(self._tokenizer, token_id)
        try:
            return text.decode() or self._tokenizer.decode([token_id], skip_special=False)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)
        except InvalidRequest:  # the head has more rows than the vocabulary
            return f"<{token_id}>"


class Offsets:
    """Where tokens, one after the other, begin in a text; those that make one character begin with it."""

    def __init__(self, tokenizer: Tokenizer, begin: int) -> None:
        self._tokenizer, self.end = tokenizer, begin
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def place(self, scored: Iterable[tuple[int, TokenLogprob | None]]) -> list[Placed]:
        placed = []
        for token_id, item in scored:
            placed.append((token_id, item, self.end))
            self.end += len(self._decoder.decode(_bytes(self._tokenizer, token_id)))
        return placed


def _bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    return tokenizer.token_bytes(token_id) if token_id < tokenizer.vocab_size else b""
