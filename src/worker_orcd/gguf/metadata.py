"""The key-value section of a GGUF file.

Text policy: keys, tensor names and single string values must be valid UTF-8. Strings inside arrays (tokens
may be cut anywhere) decode with U+FFFD in place of invalid bytes; `StringArray.raw` has the bytes.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from worker_orcd.gguf.cursor import Cursor
from worker_orcd.gguf.source import shown
from worker_orcd.gguf.types import VALUE_TYPES, ValueType

MAX_KEYS = 65_536
MAX_ARRAY = 4 * 2**20
MAX_STRING = 2**20
MAX_KEY = 2**16
MAX_TEMPLATE = 2**18
_MIN_KEY_BYTES = 8 + 1 + 4 + 1  # key length, key, type, value

_WINDOWS = (2**10, 2**16)  # fewest and most bytes searched for strings at once
_FEW = 512  # fewest strings to search for: a search costs as much as walking a hundred
_STRETCH = 256  # strings walked one by one after a search in vain

_SCALARS: Mapping[ValueType, struct.Struct] = {
    ValueType.UINT8: struct.Struct("<B"),
    ValueType.INT8: struct.Struct("<b"),
    ValueType.UINT16: struct.Struct("<H"),
    ValueType.INT16: struct.Struct("<h"),
    ValueType.UINT32: struct.Struct("<I"),
    ValueType.INT32: struct.Struct("<i"),
    ValueType.FLOAT32: struct.Struct("<f"),
    ValueType.UINT64: struct.Struct("<Q"),
    ValueType.INT64: struct.Struct("<q"),
    ValueType.FLOAT64: struct.Struct("<d"),
}
_DTYPES: Mapping[ValueType, np.dtype[Any]] = {
    ValueType.BOOL: np.dtype(np.uint8),
    **{kind: np.dtype(layout.format) for kind, layout in _SCALARS.items()},
}


class StringArray(Sequence[str]):
    """An array of strings left where they are in the file's bytes and decoded when asked for."""

    __slots__ = ("_data", "_starts")

    def __init__(self, data: bytes, starts: array[int]) -> None:
        """`starts` holds the position of each string's length field, then the end of the last string."""
        self._data = data
        self._starts = starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.raw(index).decode("utf-8", "replace")

    def __iter__(self) -> Iterator[str]:
        return iter(self.decode_all())

    def raw(self, index: int) -> bytes:
        """The bytes of one string as stored."""
        length = len(self)
        if not -length <= index < length:
            raise IndexError(f"string {index} of an array of {length}")
        index %= length
        return self._data[self._starts[index] + 8 : self._starts[index + 1]]

    def decode_all(self) -> list[str]:
        """All strings at once, in a fraction of the time of decoding one by one."""
        start, end = self._starts[0], self._starts[-1]
        region = np.frombuffer(self._data, np.uint8, end - start, start).copy()
        headers = np.frombuffer(self._starts, np.int64)[:-1] - start
        for i in range(3):  # a length of at most 1 MiB occupies the low three of its eight bytes
            region[headers + i] = 0
        if not len(self) or np.count_nonzero(region) != len(region) - 8 * len(self):
            return [self[i] for i in range(len(self))]  # NUL inside a string: zeros alone do not separate
        return region.tobytes().decode("utf-8", "replace").split("\0" * 8)[1:]


Value = int | float | bool | str | NDArray[Any] | StringArray


def parse_metadata(cursor: Cursor, count: int) -> tuple[dict[str, Value], dict[str, int]]:
    """Read `count` pairs. Returns the values by key, and the byte offset of each value's type tag."""
    values: dict[str, Value] = {}
    offsets: dict[str, int] = {}
    for i in range(count):
        start = cursor.pos
        key = cursor.text(f"key {i}", MAX_KEY)
        if not key:
            raise cursor.error(f"key {i}", start, "an empty key")
        if key in values:
            raise cursor.error(f"key {i}", start, f"{shown(key)} occurs twice")
        offsets[key] = cursor.pos
        values[key] = _parse_value(cursor, key)
    return values, offsets


def count_keys(cursor: Cursor) -> int:
    """Read the number of pairs."""
    return cursor.count("metadata_kv_count", MAX_KEYS, _MIN_KEY_BYTES)


def _parse_value(cursor: Cursor, key: str) -> Value:
    field = shown(key)
    kind = _parse_type(cursor, field)
    if kind is ValueType.STRING:
        limit = MAX_TEMPLATE if key.startswith("tokenizer.chat_template") else MAX_STRING
        return cursor.text(field, limit)
    if kind is ValueType.ARRAY:
        return _parse_array(cursor, field)
    if kind is ValueType.BOOL:
        start = cursor.take(1, field)
        if cursor.data[start] > 1:
            raise cursor.error(field, start, f"a bool of value {cursor.data[start]}, it must be 0 or 1")
        return cursor.data[start] == 1
    layout = _SCALARS[kind]
    value: int | float = layout.unpack_from(cursor.data, cursor.take(layout.size, field))[0]
    return value


def _parse_type(cursor: Cursor, field: str) -> ValueType:
    start = cursor.pos
    number = cursor.u32(field)
    kind = VALUE_TYPES.get(number)
    if kind is None:
        raise cursor.error(field, start, f"value type {number} does not exist")
    return kind


def _parse_array(cursor: Cursor, field: str) -> NDArray[Any] | StringArray:
    start = cursor.pos
    kind = _parse_type(cursor, field)
    if kind is ValueType.ARRAY:
        raise cursor.error(field, start, "arrays of arrays are not supported")
    if kind is ValueType.STRING:
        return _walk_strings(cursor, cursor.count(field, MAX_ARRAY, 8), field)
    dtype = _DTYPES[kind]
    count = cursor.count(field, MAX_ARRAY, dtype.itemsize)
    first = cursor.take(count * dtype.itemsize, field)
    numbers = np.frombuffer(cursor.data, dtype, count, first)
    return _as_bools(cursor, numbers, first, field) if kind is ValueType.BOOL else numbers


def _as_bools(cursor: Cursor, numbers: NDArray[np.uint8], first: int, field: str) -> NDArray[np.bool_]:
    wrong = np.flatnonzero(numbers > 1)
    if wrong.size:
        at = int(wrong[0])
        raise cursor.error(field, first + at, f"a bool of value {numbers[at]}, it must be 0 or 1")
    return numbers.view(np.bool_)


def _walk_strings(cursor: Cursor, count: int, field: str) -> StringArray:
    """Find where `count` strings start: the hot loop of opening a file.

    Runs of short strings without NUL bytes, which is what vocabularies are, are found by numpy at once. Whatever else
    is met is walked one by one. A search pays when it passes over half its window: the next window is then twice as
    large. Otherwise it is half as large, and comes after a walk, ever longer while no search pays. So the bytes
    searched stay in proportion to the bytes passed over, however the strings are chosen.
    """
    starts = array("q", [cursor.pos])
    window, stretch = _WINDOWS[0], _STRETCH
    while (left := count + 1 - len(starts)) > 0:
        start = cursor.pos
        if left >= _FEW:
            _advance(cursor, starts, _short_string_ends(cursor.data, start, left, window))
        if cursor.pos - start >= window // 2:
            window, stretch = min(window * 2, _WINDOWS[1]), _STRETCH
            continue
        left = count + 1 - len(starts)
        _advance(cursor, starts, _string_ends(cursor, min(stretch, left), field))
        window, stretch = max(window // 2, _WINDOWS[0]), stretch * 2
    return StringArray(cursor.data, starts)


def _advance(cursor: Cursor, starts: array[int], ends: array[int]) -> None:
    if ends:
        cursor.pos = ends[-1]
        starts.extend(ends)


def _short_string_ends(data: bytes, pos: int, count: int, size: int) -> array[int]:
    """Where strings from `pos` on end, as many as are seen in `size` bytes; none when the first looks unusual.

    The length of a string of 1 to 255 bytes is one byte and seven zeros, so a byte followed by seven zeros is one,
    provided that the string before it ends there.
    """
    window = np.frombuffer(data, np.uint8, min(size, len(data) - pos), pos)
    filled = np.flatnonzero(window)
    lengths = filled[:-1][np.diff(filled) >= 8]  # positions of bytes that look like a length
    ends = lengths + 8 + window[lengths]
    if not len(lengths) or lengths[0] != 0:
        return array("q")
    broken = np.flatnonzero(ends[:-1] != lengths[1:])
    num_linked = int(broken[0]) + 1 if len(broken) else len(ends)
    ends = ends[: min(num_linked, count)]
    ends = ends[ends <= len(window)] + pos
    return array("q", ends.tobytes())


def _string_ends(cursor: Cursor, count: int, field: str) -> array[int]:
    """Where strings of any allowed length end, each one checked. Moves the cursor."""
    ends = array("q")
    for _ in range(count):
        cursor.skip_string(field, MAX_STRING)
        ends.append(cursor.pos)
    return ends
