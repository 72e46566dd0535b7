"""A bounds-checked position in the bytes at the start of a GGUF file. All numbers are little-endian."""

from __future__ import annotations

import struct
from pathlib import Path

from worker_orcd.gguf.source import GgufError, shown

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class MoreBytesNeeded(Exception):
    """The parse ran past the bytes read so far, but not past what the file may provide: read more, retry."""


class Cursor:
    """Reads forward through `data`, the first bytes of a file of which up to `limit` may be asked for.

    `limit_note` follows "N remain" in errors, for a limit that is not the end of the file.
    """

    __slots__ = ("_limit_note", "data", "limit", "path", "pos")

    def __init__(self, path: Path, data: bytes, limit: int, limit_note: str) -> None:
        self.path = path
        self._limit_note = limit_note
        self.data = data
        self.limit = limit
        self.pos = 0

    def error(self, field: str, offset: int, problem: str) -> GgufError:
        return GgufError(self.path, field, offset, problem)

    def take(self, length: int, field: str) -> int:
        """Step over `length` bytes and return where they start."""
        start = self.pos
        end = start + length
        if end > len(self.data):
            self.check_left(length, field, start)
            raise MoreBytesNeeded
        self.pos = end
        return start

    def check_left(self, needed: int, field: str, offset: int, what: str = "the value needs") -> None:
        """Refuse a field (at `offset`) that asks for more bytes than the file can still provide."""
        left = self.limit - self.pos
        if needed > left:
            raise self.error(field, offset, f"{what} at least {needed} bytes, {left} remain{self._limit_note}")

    def u32(self, field: str) -> int:
        return self._number(_U32, field)

    def u64(self, field: str) -> int:
        return self._number(_U64, field)

    def _number(self, layout: struct.Struct, field: str) -> int:
        try:
            value: int = layout.unpack_from(self.data, self.pos)[0]
        except struct.error:  # cheaper than a check before each of a hundred thousand numbers
            self.take(layout.size, field)
            raise
        self.pos += layout.size
        return value

    def count(self, field: str, limit: int, entry_bytes: int) -> int:
        """A u64 number of entries, refused above `limit` or when they cannot fit in the bytes left."""
        offset = self.pos
        count = self.u64(field)
        if count * entry_bytes > self.limit - self.pos:
            self.check_left(count * entry_bytes, field, offset, f"{count} entries need")
        if count > limit:
            raise self.error(field, offset, f"{count} entries, the limit is {limit}")
        return count

    def skip_string(self, field: str, limit: int) -> int:
        """Step over a u64 length and that many bytes, at most `limit`; return where the bytes start."""
        offset = self.pos
        length = self.u64(field)
        if length > limit:
            raise self.error(field, offset, f"a string of {length} bytes, the limit is {limit}")
        return self.take(length, field)

    def text(self, field: str, limit: int) -> str:
        """A string that must be valid UTF-8."""
        start = self.skip_string(field, limit)
        raw = self.data[start : self.pos]
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.error(field, start + error.start, f"{shown(raw)} is not valid UTF-8") from None
