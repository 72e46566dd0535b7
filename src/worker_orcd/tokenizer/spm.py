"""SentencePiece-style BPE from the scores of a GGUF file (`tokenizer.ggml.model` = llama).

The original merges, of all neighbours whose concatenation is a piece, the one with the highest score, the left-most
first among equals. An ordinary BPE is told the same by a rank for each pair: pairs are sorted by the score of the
piece they make. Among equal scores the longer left half comes first, so that a run (the pieces of spaces all
have one score) grows at its left end, as left-most-first has it. Pairs equal in both follow the ids of what they
make, wherever they stand in the text; there a vocabulary with such pieces, which published ones do not have, may be
merged otherwise than by the original.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer

from worker_orcd.errors import ModelLoadFailed
from worker_orcd.gguf.access import TypedAccess
from worker_orcd.tokenizer.base import VocabularyTokenizer
from worker_orcd.tokenizer.library import library_ids
from worker_orcd.tokenizer.special import SpecialTokens
from worker_orcd.tokenizer.spelling import SPACE
from worker_orcd.tokenizer.vocabulary import TokenType, Vocabulary, read_vocabulary

MAX_PIECE_CHARS = 1024  # published ones have at most some hundred; all their halves are looked up


class SpmTokenizer(VocabularyTokenizer):
    """Merges pieces by score; a character without a piece becomes its UTF-8 bytes' tokens, else the unknown token."""

    model = "spm"

    def __init__(self, gguf: TypedAccess) -> None:
        """Raises ModelLoadFailed when scores are missing or the vocabulary is malformed."""
        vocabulary = read_vocabulary(gguf, add_bos=True)
        super().__init__(vocabulary)
        self._special = SpecialTokens(vocabulary, _right_strip(gguf, vocabulary))
        scores = gguf.require("tokenizer.ggml.scores", "floats")
        if len(scores) != self.vocab_size:
            raise ModelLoadFailed(f"tokenizer.ggml.scores has {len(scores)} entries for {self.vocab_size} tokens")
        self._space_prefix = gguf.get("tokenizer.ggml.add_space_prefix", bool, True)
        unknown_id = gguf.get("tokenizer.ggml.unknown_token_id", int, 0, min=0, max=self.vocab_size - 1)
        self._tokenizer = _build(vocabulary, scores, unknown_id)

    def _encode_plain(self, text: str, parse_special: bool) -> list[int]:
        """The space that begins a word is added before the text, and again after each special token."""
        ids: list[int] = []
        prefix = SPACE if self._space_prefix else ""
        pending = prefix
        for part in self._special.split(text, parse_special):
            if isinstance(part, int):
                ids.append(part)
                pending = prefix
            else:
                ids += library_ids(self._tokenizer, pending + part.replace(" ", SPACE))
                pending = ""
        return ids


def _right_strip(gguf: TypedAccess, vocabulary: Vocabulary) -> frozenset[int]:
    """Phi-3's special tokens own the white space after them; the file does not say so."""
    name = gguf.get("general.name", str, "").lower()
    if gguf.get("general.architecture", str, "") != "phi3" and "phi-3" not in name and "phi3" not in name:
        return frozenset()
    exempt = {vocabulary.ids.get(text) for text in ("<unk>", "<s>", "<|endoftext|>")}
    return vocabulary.control.union(vocabulary.of_type(TokenType.USER_DEFINED)) - exempt


def _merges(pieces: dict[str, int], scores: NDArray[Any]) -> Iterator[tuple[str, str]]:
    """All pairs of pieces that make a piece, by falling score of what they make; `pieces` has that order already."""
    score_of = dict(zip(pieces, scores[list(pieces.values())].tolist(), strict=True))
    for _, group in groupby(pieces, key=score_of.__getitem__):
        texts = list(group)
        pairs = [pair for text in texts for pair in _halves(text, pieces)]
        if len(texts) > 1:
            pairs.sort(key=lambda pair: -len(pair[0]))
        yield from pairs


def _halves(text: str, pieces: dict[str, int]) -> list[tuple[str, str]]:
    """Splits of a piece into two pieces, the longest left half first."""
    cuts = range(len(text) - 1, 0, -1)
    return [(text[:cut], text[cut:]) for cut in cuts if text[:cut] in pieces and text[cut:] in pieces]


def _build(vocabulary: Vocabulary, scores: NDArray[Any], unknown_id: int) -> HfTokenizer:
    tokens = vocabulary.tokens
    order = np.argsort(-scores, kind="stable")
    normal = [int(i) for i in order[vocabulary.types[order] == TokenType.NORMAL]]
    pieces = {tokens[i]: i for i in normal if i not in vocabulary.control}
    longest = max(pieces, key=len, default="")
    if len(longest) > MAX_PIECE_CHARS:
        raise ModelLoadFailed(f"token {pieces[longest]} has {len(longest)} characters; {MAX_PIECE_CHARS} are allowed")
    fallback = {tokens[i]: i for i in vocabulary.of_type(TokenType.BYTE)}
    merges = list(_merges(pieces, scores))
    unknown = tokens[unknown_id]
    known = {unknown: unknown_id} | pieces | fallback
    # All bytes or none: with only some, the library puts unknown tokens after bytes that follow them in the text.
    has_bytes = len(fallback) == 256
    tokenizer = HfTokenizer(models.BPE(known, merges, unk_token=unknown, byte_fallback=has_bytes))
    if not any(SPACE in text.lstrip(SPACE) for text in pieces):
        # No piece crosses into a following space, so words can be merged, and cached, on their own.
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{SPACE}*[^{SPACE}]+|{SPACE}+"), "isolated")
    return tokenizer
