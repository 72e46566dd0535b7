"""From tokens to text while it is generated: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol


class TokenBytes(Protocol):
    """The part of a tokenizer that a stream needs."""

    def token_bytes(self, token_id: int) -> bytes: ...


class TextStream:
    """Text of one generation, token by token.

    Bytes of a character that is not complete yet are held back, and so is any end of the text that may become a
    stop string. Bytes that can never become a character turn into U+FFFD as soon as that is certain. The pieces
    returned, joined, are the text of all tokens up to the stop string, however the bytes fell into tokens.

    The stop string completed first ends the text (of two completed by the same character, the longer one); it and
    everything after it is left out. `matched` then names it.
    """

    def __init__(self, tokenizer: TokenBytes, stop: Sequence[str] = ()) -> None:
        """`stop` must not hold empty strings."""
        assert all(stop), "an empty stop string matches everywhere"
        self.matched: str | None = None
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    @property
    def num_held(self) -> int:
        """Characters that may become a stop string."""
        return len(self._held)

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that may be shown now, "" after a stop string."""
        if self.matched is not None:
            return ""
        text = self._decoder.decode(self._tokenizer.token_bytes(token_id))
        if not self._stop:
            return text  # the decoder alone holds back what is not complete
        self._held += text
        return self._release(final=False)

    def finish(self) -> str:
        """The text still held back, once no token follows."""
        if self.matched is not None:
            return ""
        self._held += self._decoder.decode(b"", final=True)
        return self._release(final=True)

    def _release(self, final: bool) -> str:
        found = self._first_stop()
        if found is not None:
            end, self.matched = found
            text, self._held = self._held[:end], ""
            return text
        cut = len(self._held) - (0 if final else num_undecided(self._held, self._stop))
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def _first_stop(self) -> tuple[int, str] | None:
        """Where the stop string that is completed first begins, and which it is."""
        found = ((self._held.find(stop), stop) for stop in self._stop)
        ends = [(begin + len(stop), begin, stop) for begin, stop in found if begin >= 0]
        return min(ends)[1:] if ends else None


def num_undecided(text: str, markers: Sequence[str]) -> int:
    """Length of the longest end of the text that begins a marker."""
    longest = max(map(len, markers), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        end = text[-length:]
        if any(marker.startswith(end) for marker in markers):
            return length
    return 0
