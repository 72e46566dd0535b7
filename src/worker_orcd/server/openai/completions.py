"""`/v1/completions`: text in, text out; prompts as text or token ids, one or several, and scored when echoed."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from worker_orcd.engine.request import PromptLogprobs, TokenLogprob, Tokens
from worker_orcd.server.exchange import Exchange
from worker_orcd.server.generation import Run
from worker_orcd.server.openai.bodies import MAX_RUNS, CompletionBody, read_body, refuse
from worker_orcd.server.openai.choice import Choice, Offsets, Spelling
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
        self._logprobs: list[dict[str, list[Any]]] = [{} for _ in runs]  # not told yet
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
        text, ids, offsets = self._prompt(run), run.request.prompt_ids, self._offsets[run.index]
        begin, num_told = offsets.end, event.index + len(event.tokens)
        self._spell(run.index, list(zip(ids[event.index : num_told], event.tokens, strict=True)))
        is_last = num_told == len(ids)  # its text is the rest, whatever its tokens' is
        if is_last:
            self._offsets[run.index] = Offsets(self._tokenizer, len(text))
        text = text[begin : None if is_last else offsets.end]
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
        self._spell(run.index, self._choices[run.index].take_scored())
        text = "".join(piece.text for piece in pieces)  # type: ignore[union-attr] # a plain parser knows no calls
        if not self.is_streamed or not (text or self._logprobs[run.index]):
            return b""
        return self._frame(self._choice(run.index, text))

    def _spell(self, index: int, scored: Sequence[tuple[int, TokenLogprob | None]]) -> None:
        """As they come: those of a whole answer at once would hold up everyone."""
        if scored:
            for name, values in self._spelling.completion(self._offsets[index].place(scored)).items():
                self._logprobs[index].setdefault(name, []).extend(values)

    def _choice(self, index: int, text: str, finish_reason: str | None = None) -> dict[str, Any]:
        logprobs, self._logprobs[index] = self._logprobs[index] or None, {}
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
