"""`/v1/completions`: text in, text out; prompts as text or token ids, one or several, and scored when echoed."""

from __future__ import annotations

import uuid
from typing import Any

from worker_orcd.engine.request import PromptLogprobs, Tokens
from worker_orcd.server.exchange import Exchange
from worker_orcd.server.generation import Run
from worker_orcd.server.openai.bodies import MAX_RUNS, CompletionBody, read_body, refuse
from worker_orcd.server.openai.choice import Choice, Offsets, Placed, Spelling
from worker_orcd.server.openai.chunks import ChoicesAnswer
from worker_orcd.server.openai.grammars import grammar_of
from worker_orcd.server.openai.prepare import Preparer, Wish, grammar_param
from worker_orcd.server.output import Piece
from worker_orcd.server.output.pieces import PlainParser


def prompts_of(preparer: Preparer, prompt: Any) -> tuple[list[str], list[list[int]]]:
    """Texts and token ids of every prompt."""
    is_one = isinstance(prompt, str) or (isinstance(prompt, list) and all(type(item) is int for item in prompt))
    prompts = [prompt] if is_one else prompt
    if not isinstance(prompts, list) or not 0 < len(prompts) <= MAX_RUNS:
        refuse("prompt", "type", f"must be text, token ids, or a list of 1 to {MAX_RUNS} of either")
    texts, ids = [], []
    for i, item in enumerate(prompts):
        param = "prompt" if is_one else f"prompt[{i}]"
        if isinstance(item, str):
            texts.append(item)
            ids.append(preparer.encode(item, param))
        elif isinstance(item, list) and all(type(token) is int for token in item):
            ids.append(preparer.checked(item, param))
            if max(item) >= preparer.tokenizer.vocab_size:
                refuse(param, "range", f"holds a token id outside 0 to {preparer.tokenizer.vocab_size - 1}")
            texts.append(preparer.tokenizer.decode(item))
        else:
            refuse(param, "type", "must be text or a list of token ids")
    return texts, ids


class CompletionAnswer(ChoicesAnswer):
    """The chunks, or the one object, of completions."""

    _kinds = ("text_completion", "text_completion")

    def __init__(self, preparer: Preparer, body: CompletionBody, exchange: Exchange) -> None:
        """Raises InvalidRequest."""
        self._prompts, ids = prompts_of(preparer, body.prompt)
        self._is_scoring = body.echo and body.max_tokens == 0  # the engine draws a token; it is not told
        self._body, job_id = body, f"cmpl-{uuid.uuid4().hex}"
        wish = Wish(
            max_tokens=1 if self._is_scoring else None,
            num_logprobs=body.logprobs,
            prompt_logprobs=body.echo and body.logprobs is not None,
            grammar=grammar_of(body, self.grammar_param),
        )
        runs = preparer.runs(body, ids, exchange, job_id, wish)
        choices = [Choice(run, PlainParser()) for run in runs]
        super().__init__(job_id, choices, "".join(self._prompts), body, preparer.info, exchange)
        self.grammar_param = grammar_param(body, self.grammar_param)
        self._scores: list[list[Placed]] = [[] for _ in runs]  # not told yet
        self._tokenizer = preparer.tokenizer
        self._offsets = [Offsets(self._tokenizer, 0) for _ in runs]
        self._spelling = Spelling(preparer.tokenizer)

    @classmethod
    def read(cls, preparer: Preparer, raw: bytes, exchange: Exchange) -> CompletionAnswer:
        return cls(preparer, read_body(raw, CompletionBody), exchange)

    def started(self, run: Run) -> bytes:
        is_echo = self.is_streamed and self._body.echo and self._body.logprobs is None
        return self._frame(self._choice(run.index, self._prompt(run))) if is_echo else b""

    def prompt(self, run: Run, event: PromptLogprobs) -> bytes:
        text = self._prompt(run)
        scored = zip(run.request.prompt_ids, event.tokens, strict=True)
        self._scores[run.index] += self._offsets[run.index].place(scored)
        self._offsets[run.index] = Offsets(self._tokenizer, len(text))
        return self._frame(self._choice(run.index, text)) if self.is_streamed else b""

    def tokens(self, run: Run, event: Tokens) -> bytes:
        if self._is_scoring:
            run.output_ids.extend(event.ids)  # for the receipt alone
            return b""
        return self._told(run, self._choices[run.index].push(event))

    def ended(self, run: Run, rest: str) -> bytes:
        choice = self._choices[run.index]
        data = b"" if self._is_scoring else self._told(run, choice.finish(rest))
        if not self.is_streamed:
            return data
        return data + self._frame(self._choice(run.index, "", choice.finish_reason), run)

    def _prompt(self, run: Run) -> str:
        return self._prompts[run.index // self._body.n]

    def _whole(self, choice: Choice) -> dict[str, Any]:
        text = (self._prompt(choice.run) if self._body.echo else "") + choice.content
        return self._choice(choice.run.index, text, choice.finish_reason)

    def _told(self, run: Run, pieces: list[Piece]) -> bytes:
        self._scores[run.index] += self._offsets[run.index].place(self._choices[run.index].take_scored())
        text = "".join(piece.text for piece in pieces)  # type: ignore[union-attr] # a plain parser knows no calls
        if not self.is_streamed or not (text or self._scores[run.index]):
            return b""
        return self._frame(self._choice(run.index, text))

    def _choice(self, index: int, text: str, finish_reason: str | None = None) -> dict[str, Any]:
        logprobs = None
        if scores := self._scores[index]:
            logprobs = self._spelling.completion(scores)
            self._scores[index] = []
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
