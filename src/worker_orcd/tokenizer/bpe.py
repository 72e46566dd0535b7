"""Byte-level BPE from the vocabulary and merges of a GGUF file (`tokenizer.ggml.model` = gpt2).

The merging is done by the `tokenizers` library, which needs some tenths of a second to take over 150,000 tokens and
merges. Until it has been asked to (`prepare`, or the first text that is much work), texts are merged here, so that
a command line that tokenizes a page does not wait for it. Both ways give the same ids, and both pass over merges
that make no token or are not two texts with one space between them.
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from typing import Final

from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer

from worker_orcd.gguf.access import TypedAccess
from worker_orcd.tokenizer.base import VocabularyTokenizer
from worker_orcd.tokenizer.library import library_ids
from worker_orcd.tokenizer.pretokenize import PreTokenizer, pre_tokenizer
from worker_orcd.tokenizer.special import SpecialTokens
from worker_orcd.tokenizer.vocabulary import read_vocabulary

_LITTLE_WORK: Final = 2**18  # pairs looked at, some 50 ms: still quicker than preparing the library
_NEVER: Final = 2**62  # the rank of a pair that no merge joins


class BpeTokenizer(VocabularyTokenizer):
    """Splits text into words by the model's expressions, then merges each word's bytes by rank."""

    model = "bpe"

    def __init__(self, gguf: TypedAccess) -> None:
        """Raises ModelLoadFailed for an unknown pre-tokenizer."""
        self._rule = pre_tokenizer(gguf.get("tokenizer.ggml.pre", str, "default"))
        super().__init__(read_vocabulary(gguf, add_bos=self._rule.add_bos))
        self._special = SpecialTokens(self.vocabulary)
        self._splitter = _splitter(self._rule)
        self._merges = gguf.require("tokenizer.ggml.merges", "strings").decode_all()  # lines "left right"

    def prepare(self) -> None:
        _ = self._library  # built when first asked for

    def _encode_plain(self, text: str, parse_special: bool) -> list[int]:
        ids: list[int] = []
        for part in self._special.split(text, parse_special):
            ids += [part] if isinstance(part, int) else self._encode_part(part)
        return ids

    def _encode_part(self, text: str) -> list[int]:
        if self._rule.composes:
            text = normalizers.NFC().normalize_str(text)
        if "_library" not in self.__dict__ and len(text) <= _LITTLE_WORK:
            words = self._words(text)
            if sum(len(word) ** 2 for word in words) <= _LITTLE_WORK:
                return self._merge(words)
        return library_ids(self._library, text)

    def _words(self, text: str) -> list[str]:
        return [word for word, _ in self._splitter.pre_tokenize_str(text)]

    def _merge(self, words: list[str]) -> list[int]:
        known = self.vocabulary.ids
        return [known[part] for word in words for part in self._parts(word) if part in known]

    def _parts(self, word: str) -> list[str]:
        """A word merged: the pair of the lowest rank first, the left-most of equal ones."""
        if self._rule.whole_words and word in self.vocabulary.ids:
            return [word]
        parts = list(word)
        while len(parts) > 1:
            ranks = [self._ranks.get(f"{left} {right}", _NEVER) for left, right in pairwise(parts)]
            lowest = min(ranks)
            if lowest == _NEVER:
                break
            at = ranks.index(lowest)
            joined = parts[at] + parts[at + 1]
            if joined in self.vocabulary.ids:
                parts[at : at + 2] = [joined]
            else:
                del self._ranks[f"{parts[at]} {parts[at + 1]}"]
        return parts

    @cached_property
    def _ranks(self) -> dict[str, int]:
        return dict(zip(self._merges, range(len(self._merges)), strict=True))

    @cached_property
    def _library(self) -> HfTokenizer:
        known, merges = self.vocabulary.ids, _pairs(self._merges)
        try:
            model = models.BPE(known, merges, ignore_merges=self._rule.whole_words)
        except Exception:  # a merge of or into something that is no token; the library raises bare Exception
            fitting = [pair for pair in merges if pair[0] in known and pair[1] in known and "".join(pair) in known]
            model = models.BPE(known, fitting, ignore_merges=self._rule.whole_words)
        tokenizer = HfTokenizer(model)
        tokenizer.pre_tokenizer = self._splitter
        return tokenizer


def _pairs(lines: list[str]) -> list[tuple[str, str]]:
    """The two sides of each merge. One split of the joined lines is twice as fast as one for each."""
    whole = [line for line in lines if line.count(" ") == 1]
    halves = " ".join(whole).split(" ") if whole else []
    return list(zip(halves[::2], halves[1::2], strict=True))


def _splitter(rule: PreTokenizer) -> pre_tokenizers.Sequence:
    """Text to words in byte letters."""
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
