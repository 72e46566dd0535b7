"""The vocabulary of a GGUF file: token texts and types, and the ids with a meaning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from worker_orcd.errors import ModelLoadFailed
from worker_orcd.gguf.access import TypedAccess
from worker_orcd.gguf.metadata import StringArray
from worker_orcd.tokenizer.spelling import is_byte_token

# fmt: off
# Texts by which models mark the end of an answer.
END_TEXTS: Final = frozenset(
    {
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<|endoftext|>",
        "<|end_of_text|>", "<|eom_id|>", "<end_of_turn>", "</s>", "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
        "<end_of_utterance>", "<turn|>", "<｜end▁of▁sentence｜>", "[e~[",
    }
)
# Fill-in-the-middle and repository marks that separate documents: nothing of the answer can follow them.
BOUNDARY_TEXTS: Final = frozenset(
    {
        "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>",
        "<reponame>", "<|file_sep|>",
    }
)
# fmt: on
_END_KEYS: Final = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")


class TokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type`."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """`tokens[id]` is a text as stored, `types[id]` a TokenType, `ids` the inverse of `tokens`."""

    tokens: list[str]
    ids: dict[str, int]
    types: NDArray[Any]  # [V]
    bos_id: int | None
    eos_id: int | None
    eog_ids: frozenset[int]
    control: frozenset[int]
    unsampleable: Sequence[int]
    add_bos: bool
    add_eos: bool

    def of_type(self, *types: TokenType) -> list[int]:
        """Ids of all tokens of these types, ascending."""
        return [int(i) for i in np.flatnonzero(np.isin(self.types, types))]


def read_vocabulary(gguf: TypedAccess, add_bos: bool) -> Vocabulary:
    """Read the vocabulary; `add_bos` holds where the file does not say. Raises ModelLoadFailed."""
    stored = gguf.require("tokenizer.ggml.tokens", "strings")
    tokens = stored.decode_all()
    ids = _ids_by_text(tokens, stored)
    types = gguf.get("tokenizer.ggml.token_type", "ints", None, min=0, max=6)
    if types is None:
        types = _guessed_types(gguf, tokens)
    if len(types) != len(tokens):
        raise ModelLoadFailed(f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
    eog_ids = _end_ids(gguf, ids, types)
    padding = frozenset(_padding(tokens, types))
    unused = {int(i) for i in np.flatnonzero(types == TokenType.UNUSED)}
    control = {int(i) for i in np.flatnonzero(np.isin(types, (TokenType.CONTROL, TokenType.UNKNOWN)))}
    suppressed = gguf.get("tokenizer.ggml.suppress_tokens", "ints", np.empty(0, int), min=0, max=len(tokens) - 1)
    return Vocabulary(
        tokens=tokens,
        ids=ids,
        types=types,
        bos_id=_special_id(gguf, "bos", len(tokens)),
        eos_id=_special_id(gguf, "eos", len(tokens)),
        eog_ids=eog_ids,
        control=frozenset(control | eog_ids) - padding,
        unsampleable=tuple(sorted(padding | unused | set(suppressed.tolist()))),
        add_bos=gguf.get("tokenizer.ggml.add_bos_token", bool, add_bos),
        add_eos=gguf.get("tokenizer.ggml.add_eos_token", bool, False),
    )


def _guessed_types(gguf: TypedAccess, tokens: list[str]) -> NDArray[Any]:
    """All normal; except that byte tokens of a SentencePiece vocabulary tell themselves by their text."""
    has_bytes = gguf.get("tokenizer.ggml.model", str, "") == "llama"
    return np.array([TokenType.BYTE if has_bytes and is_byte_token(text) else TokenType.NORMAL for text in tokens])


def _ids_by_text(tokens: list[str], stored: StringArray) -> dict[str, int]:
    """Fills `tokens` in place where a text is empty, so that every id has a text of its own.

    Only tokens of invalid UTF-8, `stored` as different bytes, may share one (by their U+FFFD).
    """
    if not tokens:
        raise ModelLoadFailed("tokenizer.ggml.tokens is empty; the file has no vocabulary to build a tokenizer from")
    ids = dict(zip(tokens, range(len(tokens)), strict=True))
    if "" in ids:
        tokens[:] = [text or f"[EMPTY_{i}]" for i, text in enumerate(tokens)]
        ids = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(ids) != len(tokens):
        return _ids_of_shared_texts(tokens, stored)
    return ids


def _ids_of_shared_texts(tokens: list[str], stored: StringArray) -> dict[str, int]:
    """A shared text is the token stored as just that text, else the first of them."""
    ids: dict[str, int] = {}
    for i, text in enumerate(tokens):
        other = ids.setdefault(text, i)
        if other == i:
            continue
        if stored.raw(i) == stored.raw(other):
            raise ModelLoadFailed(f"tokenizer.ggml.tokens: ids {other} and {i} have the same text")
        if stored.raw(i) == text.encode():
            ids[text] = i
    return ids


def _special_id(gguf: TypedAccess, name: str, num_tokens: int) -> int | None:
    return gguf.get(f"tokenizer.ggml.{name}_token_id", int, None, min=0, max=num_tokens - 1)


def _end_ids(gguf: TypedAccess, ids: dict[str, int], types: NDArray[Any]) -> frozenset[int]:
    """Ids after which generation ends: those the file names, and those known by their text.

    Converters forget to mark such tokens as control (Phi-3's <|end|>), so the text alone decides; except that some
    vocabularies have learned tags of HTML like </s> as ordinary tokens, hence `<|` where the type is normal.
    """
    named = (_special_id(gguf, name, len(types)) for name in _END_KEYS)
    known = (END_TEXTS | BOUNDARY_TEXTS) & ids.keys()
    texts = {text for text in known if text.startswith("<|") or types[ids[text]] != TokenType.NORMAL}
    ends = {token_id for token_id in named if token_id is not None} | {ids[text] for text in texts}
    # Harmony and its kin end a message, not the answer, with <|end|>: the answer ends with one of the others.
    if {"<|return|>", "<|call|>"} <= texts or {"<|flush|>", "<|calls|>"} <= texts:
        ends.discard(ids.get("<|end|>", -1))
    return frozenset(ends)


def _padding(tokens: list[str], types: NDArray[Any]) -> Iterator[int]:
    """Rows that converters add to fill the embedding up: `[PAD<id>]`, of whatever type but normal."""
    for i in np.flatnonzero((types != TokenType.NORMAL) & (types != TokenType.BYTE)):
        if tokens[i] == f"[PAD{i}]":
            yield int(i)
