"""What the rest of the worker may ask of a tokenizer, and what the three kinds have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Final, Literal, Protocol

from worker_orcd.errors import InvalidRequest
from worker_orcd.tokenizer.spelling import byte_of_token, bytes_of_letters, bytes_of_piece
from worker_orcd.tokenizer.vocabulary import TokenType, Vocabulary

TokenizerKind = Literal["gguf-bpe", "hf-json"]
TokenizerModel = Literal["bpe", "spm"]

_QUICK_CHARS: Final = 2**16  # some 50 ms
_MAX_GROWTH: Final = 8  # a text may begin with long tokens and go on with short ones
_MARGIN: Final = 1024  # of tokens: the longest token has some hundred bytes


class Tokenizer(Protocol):
    """Text to token ids and back, with the ids that mean something to the engine.

    kind           "gguf-bpe" (built from the model file) or "hf-json" (tokenizer.json beside it)
    model          "bpe" (byte-level) or "spm" (SentencePiece-style)
    vocab_size     rows of the vocabulary, padding rows included
    bos_id, eos_id None when the model has none
    eog_ids        every id that ends generation, eos_id among them
    unsampleable   ids that must never be sampled: unused tokens and padding rows
    """

    @property
    def kind(self) -> TokenizerKind: ...
    @property
    def model(self) -> TokenizerModel: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def eog_ids(self) -> frozenset[int]: ...
    @property
    def unsampleable(self) -> Sequence[int]: ...

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]: ...
    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str: ...
    def token_bytes(self, token_id: int) -> bytes: ...
    def is_control(self, token_id: int) -> bool: ...


class VocabularyTokenizer(ABC):
    """A tokenizer over a GGUF vocabulary; subclasses turn text into ids.

    Safe to use from several threads.
    """

    kind: TokenizerKind = "gguf-bpe"
    model: TokenizerModel

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.vocab_size = len(vocabulary.tokens)
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.eog_ids = vocabulary.eog_ids
        self.unsampleable: Sequence[int] = vocabulary.unsampleable
        self._silent = vocabulary.control | frozenset(vocabulary.unsampleable)
        self._verbatim = frozenset(vocabulary.of_type(TokenType.USER_DEFINED))
        self._bytes = {i: byte_of_token(vocabulary.tokens[i], i) for i in vocabulary.of_type(TokenType.BYTE)}

    def prepare(self) -> None:  # noqa: B027 (most have nothing left to do)
        """Do now what the first long text would wait for, before a server is ready. Raises ModelLoadFailed."""

    @abstractmethod
    def _encode_plain(self, text: str, parse_special: bool) -> list[int]:
        """Ids of a text without surrogates, no BOS or EOS added."""

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a prompt.

        `add_special` adds BOS and EOS where the model asks for them, but never a second BOS before a prompt that
        already starts with one. `parse_special` reads control tokens spelled in the text (`<|im_start|>`) as
        themselves; without it they are ordinary characters. Lone surrogates become U+FFFD.
        """
        ids = self._encode_plain(_without_surrogates(text), parse_special)
        return self._framed(ids) if add_special else ids

    def _framed(self, ids: list[int]) -> list[int]:
        vocabulary = self.vocabulary
        if vocabulary.add_bos and vocabulary.bos_id is not None and ids[:1] != [vocabulary.bos_id]:
            ids.insert(0, vocabulary.bos_id)
        if vocabulary.add_eos and vocabulary.eos_id is not None and ids[-1:] != [vocabulary.eos_id]:
            ids.append(vocabulary.eos_id)
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of token ids: their bytes joined, and only then decoded, invalid UTF-8 as U+FFFD.

        A SentencePiece token keeps the space it begins with, at the start of the text too.
        """
        return b"".join(map(self.token_bytes if skip_special else self._any_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes a generated token adds to the text: none for control, unused and padding tokens."""
        known = self._bytes.get(token_id)
        if known is None:
            if not 0 <= token_id < self.vocab_size:
                raise InvalidRequest(f"token id {token_id} is not in the vocabulary of {self.vocab_size} tokens")
            known = self._bytes[token_id] = self._spelled_bytes(token_id)
        return known

    def _spelled_bytes(self, token_id: int) -> bytes:
        text = self.vocabulary.tokens[token_id]
        if token_id in self._silent:
            return b""
        if token_id in self._verbatim:
            return text.encode()
        return bytes_of_letters(text) if self.model == "bpe" else bytes_of_piece(text)

    def is_control(self, token_id: int) -> bool:
        """True for tokens with a meaning instead of a text: BOS, `<|im_end|>`, …"""
        return token_id in self.vocabulary.control

    def _any_bytes(self, token_id: int) -> bytes:
        return self.vocabulary.tokens[token_id].encode() if token_id in self._silent else self.token_bytes(token_id)


def encode_within(tokenizer: Tokenizer, text: str, limit: int, add_special: bool = True) -> list[int] | None:
    """Token ids of a text; None where it is so long that they need not be counted to be more than `limit`.

    Such a text is judged by its beginning, and if that is too short to tell by one that should be long enough. What
    follows may change the last tokens of a beginning, by less than `_MARGIN` of them: merges depend on what is near,
    as they do in all rules of `pretokenize`.
    """
    size = _QUICK_CHARS
    while size < len(text):
        num_tokens = len(tokenizer.encode(text[:size], add_special))
        if num_tokens > limit + _MARGIN:
            return None
        size *= min(-(-(limit + 2 * _MARGIN) // max(num_tokens, 1)), _MAX_GROWTH)  # 2 at least
    return tokenizer.encode(text, add_special)


def _without_surrogates(text: str) -> str:
    """The text as UTF-8 can carry it: paired surrogates joined, lone ones replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
