"""Structured output: what a grammar (llguidance's) allows next, for all rows of a step at once. No torch here.

A matcher lives on the host and follows the tokens of one answer as they become known, so preemption does not touch
it. Grammars are compiled on threads of their own, beside the steps of others; the library lets go of Python's lock
while it compiles and while it fills masks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from numpy.typing import NDArray

from worker_orcd.engine.grammar_source import SPECIAL, check, new_matcher
from worker_orcd.engine.request import Grammar
from worker_orcd.tokenizer.base import Tokenizer

NUM_THREADS = 2  # that compile
WORD = 32  # ids in an element of a mask


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, raw: LLMatcher, executor: LLExecutor, num_words: int) -> None:
        self.raw, self.executor, self.num_words = raw, executor, num_words

    def advance(self, token: int) -> bool:
        """Follow a token of the answer; True when it is complete and nothing may come after.

        Raises InvalidRequest when the grammar turns out too complex to follow.
        """
        self.raw.consume_token(token)
        check(self.raw)
        return self.raw.is_stopped()


def fill_masks(matchers: Sequence[Matcher | None], banned: Sequence[Collection[int]]) -> NDArray[np.int32]:
    """i32 [R, V / 32]: bit b of word w says whether id 32 w + b may come next; all of them where there is no matcher.

    Row r leaves out `banned[r]`, unless nothing else is left. Raises InvalidRequest, see `Matcher.advance`.
    """
    rows = [(row, matcher) for row, matcher in enumerate(matchers) if matcher is not None]
    first = rows[0][1]
    masks = np.full((len(matchers), first.num_words), -1, dtype=np.int32)
    jobs = [(matcher.raw, row) for row, matcher in rows]
    first.executor.unsafe_compute_mask_ptr(jobs, masks.ctypes.data, masks.strides[0], len(matchers))
    for row, matcher in rows:
        check(matcher.raw)
        if banned[row]:
            _ban(masks[row].view(np.uint32), banned[row])
    return masks


def _ban(words: NDArray[np.uint32], ids: Collection[int]) -> None:
    left = words.copy()
    for token in ids:
        left[token // WORD] &= np.uint32(0xFFFFFFFF ^ 1 << token % WORD)
    if left.any():
        words[:] = left


class _Vocabulary:
    """What LLTokenizer reads of a tokenizer: the bytes of each token, with a mark before those that are not text."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, tokenizer: Tokenizer, num_ids: int) -> None:
        self.tokens = [_bytes(tokenizer, i) if i < tokenizer.vocab_size else b"" for i in range(num_ids)]
        if not tokenizer.eog_ids:
            self.tokens.append(b"")  # stands for the end, which this model cannot say
        self.eos_ids = sorted(tokenizer.eog_ids) or [num_ids]
        self.eos_token_id = self.eos_ids[0]
        self._encode = tokenizer.encode
        self.spell: Callable[[str], list[int]] = lambda _: []

    def __call__(self, text: str) -> list[int]:
        """How the model writes a text that the grammar demands, byte for byte."""
        ids = self._encode(text, add_special=False, parse_special=False)
        is_exact = b"".join(self.tokens[i] for i in ids) == text.encode()  # some tokenizers put a space before it
        return ids if is_exact else self.spell(text)


def _bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """Control tokens only where a grammar names them; unused ones nowhere."""
    if tokenizer.is_control(token_id):
        return SPECIAL + tokenizer.decode([token_id], skip_special=False).encode()
    return tokenizer.token_bytes(token_id)


class GrammarCompiler:
    """Compiles for a model with `num_ids` ids; `load` gives its tokenizer, which is prepared in the background."""

    def __init__(self, load: Callable[[], Tokenizer], num_ids: int) -> None:
        self._load, self._num_ids = load, num_ids
        self._pool = ThreadPoolExecutor(NUM_THREADS, "grammar")
        self._tools = self._pool.submit(self._prepare)

    def compile(self, grammar: Grammar) -> Future[Matcher]:
        """The matcher at the beginning of an answer; raises InvalidRequest there."""
        return self._pool.submit(self._compile, grammar)

    def _prepare(self) -> tuple[LLTokenizer, LLExecutor]:
        vocabulary = _Vocabulary(self._load(), self._num_ids)
        tokenizer = LLTokenizer(vocabulary, eos_token=vocabulary.eos_ids)  # type: ignore[arg-type]
        vocabulary.spell = tokenizer.greedy_tokenize
        return tokenizer, LLExecutor()

    def _compile(self, grammar: Grammar) -> Matcher:
        tokenizer, executor = self._tools.result()
        return Matcher(new_matcher(tokenizer, grammar), executor, -(-tokenizer.vocab_size // WORD))
