"""A tokenizer.json beside the model: it encodes; the vocabulary, checked to be the same, is the GGUF file's.

Its regular expressions run as they stand, with no limit of time: the file needs the trust that the model needs.
"""

from __future__ import annotations

from pathlib import Path
from threading import Lock

import numpy as np
from tokenizers import Tokenizer as HfTokenizer

from worker_orcd.errors import ModelLoadFailed
from worker_orcd.gguf.access import TypedAccess
from worker_orcd.tokenizer.base import TokenizerModel, VocabularyTokenizer
from worker_orcd.tokenizer.files import read_limited
from worker_orcd.tokenizer.library import library_ids
from worker_orcd.tokenizer.pretokenize import PRE_TOKENIZERS
from worker_orcd.tokenizer.vocabulary import read_vocabulary

_NUM_COMPARED = 4096
MAX_JSON_BYTES = 64 * 2**20


class HfJsonTokenizer(VocabularyTokenizer):
    """Encodes as the file's own pipeline does, special tokens included; BOS and EOS are added as GGUF says."""

    kind = "hf-json"

    def __init__(self, gguf: TypedAccess, path: Path) -> None:
        """Raises ModelLoadFailed when `path` is no tokenizer.json or has another vocabulary than the model."""
        self.model: TokenizerModel = "spm" if gguf.require("tokenizer.ggml.model", str) == "llama" else "bpe"
        rule = PRE_TOKENIZERS.get(gguf.get("tokenizer.ggml.pre", str, "default"))
        vocabulary = read_vocabulary(gguf, add_bos=self.model == "spm" or (rule is not None and rule.add_bos))
        super().__init__(vocabulary)
        self._tokenizer = _read(path)
        self._check_same(path)
        self._by_parsing: dict[bool, HfTokenizer] = {}
        self._lock = Lock()

    def _encode_plain(self, text: str, parse_special: bool) -> list[int]:
        return library_ids(self._by_parsing.get(parse_special) or self._set_up(parse_special), text)

    def _set_up(self, parse_special: bool) -> HfTokenizer:
        """A library's object that parses special tokens, or does not: that cannot be changed while it encodes.

        Few need both; whoever comes second pays for a copy.
        """
        with self._lock:
            if parse_special not in self._by_parsing:
                copy = HfTokenizer.from_str(self._tokenizer.to_str()) if self._by_parsing else self._tokenizer
                copy.encode_special_tokens = not parse_special
                self._by_parsing[parse_special] = copy
            return self._by_parsing[parse_special]

    def _check_same(self, path: Path) -> None:
        """Every special token and some thousands of the others, evenly spread, must have the same text in both."""
        tokens, padding = self.vocabulary.tokens, set(self.vocabulary.unsampleable)
        num_ours, num_theirs = len(tokens) - len(padding), self._tokenizer.get_vocab_size()
        if not num_ours <= num_theirs <= len(tokens):
            raise ModelLoadFailed(
                f"{path.name} has {num_theirs} tokens, the model file {num_ours} and {len(padding)} padding rows;"
                " it belongs to another model: remove it or replace it"
            )
        spread = np.linspace(0, len(tokens) - 1, min(_NUM_COMPARED, len(tokens))).astype(int).tolist()
        for token_id in sorted({*spread, *self.vocabulary.control} - padding):
            theirs = self._tokenizer.id_to_token(token_id)
            if theirs != tokens[token_id]:
                raise ModelLoadFailed(
                    f"{path.name} has {theirs!r:.80} as token {token_id}, the model file {tokens[token_id]!r:.80};"
                    " it belongs to another model: remove it or replace it"
                )


def _read(path: Path) -> HfTokenizer:
    content = read_limited(path, "tokenizer.json", MAX_JSON_BYTES)
    try:
        tokenizer = HfTokenizer.from_buffer(content)
    except ValueError as error:
        raise ModelLoadFailed(f"{path.name} is not a tokenizer.json: {str(error)[:200]}") from error
    tokenizer.no_truncation()  # what training or a sentence encoder asked for would cut prompts, or fill them up
    tokenizer.no_padding()
    return tokenizer
