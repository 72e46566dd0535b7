"""How token texts spell bytes: GPT-2's byte letters, SentencePiece's spaces and byte tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from worker_orcd.errors import ModelLoadFailed

SPACE: Final = "▁"  # a space in SentencePiece texts
_BYTE_TOKEN: Final = re.compile("<0x([0-9A-Fa-f]{2})>")


def _byte_letters() -> dict[str, int]:
    """Printable Latin-1 characters stand for themselves, the other bytes for the letters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_LETTER: Final[Mapping[str, int]] = MappingProxyType(_byte_letters())


def bytes_of_letters(text: str) -> bytes:
    """Bytes of a token written in byte letters; a text with any other letter stands for itself in UTF-8."""
    try:
        return bytes([BYTE_OF_LETTER[letter] for letter in text])
    except KeyError:
        return text.encode()


def bytes_of_piece(text: str) -> bytes:
    """Bytes of a SentencePiece text."""
    return text.replace(SPACE, " ").encode()


def is_byte_token(text: str) -> bool:
    """Whether a text is spelled as a byte token is."""
    return _BYTE_TOKEN.fullmatch(text) is not None


def byte_of_token(text: str, token_id: int) -> bytes:
    """The byte that a byte token stands for. Raises ModelLoadFailed when the text is not <0x00> to <0xFF>."""
    match = _BYTE_TOKEN.fullmatch(text)
    if match is None:
        raise ModelLoadFailed(f"tokenizer.ggml.tokens[{token_id}] is a byte token, but not one of <0x00> to <0xFF>")
    return bytes([int(match[1], 16)])
