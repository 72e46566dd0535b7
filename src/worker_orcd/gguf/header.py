"""Parse what precedes the tensor bytes of one GGUF file: magic, counts, metadata, tensor table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from worker_orcd.gguf.access import TypedAccess
from worker_orcd.gguf.cursor import Cursor, MoreBytesNeeded
from worker_orcd.gguf.metadata import Value, count_keys, parse_metadata
from worker_orcd.gguf.source import Source, shown
from worker_orcd.gguf.types import DEFAULT_ALIGNMENT, GGML_TYPES, GgmlType, ValueType

VERSION = 3
MAX_TENSORS = 9_999
MAX_HEADER_BYTES = 128 * 2**20
_READ_BYTES = (16 * 2**20, MAX_HEADER_BYTES)  # few files need more than the first
_MAX_TENSOR_NAME = 64
_MAX_DIMS = 4
_MAX_BYTES = 2**63 - 1
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # name length, name, n_dims, one dim, type, offset
_ALIGNMENT_KEY = "general.alignment"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. `shape` is in numpy order, outermost first: ne = [K, N] is shape (N, K)."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    offset: int
    """bytes from the start of its file"""
    nbytes: int
    split: int
    """index of its file among `GgufFile.paths`"""
    parts: tuple[TensorInfo, ...] = ()
    """tensors of the file whose bytes it is, one after the other; none where the file has it as it is"""

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """What the file has of it, in order."""
        return self.parts or (self,)


@dataclass(frozen=True)
class Header:
    """All that is known of one file without reading a tensor."""

    version: int
    alignment: int
    values: TypedAccess
    tensors: list[TensorInfo]


def read_header(source: Source, split: int = 0) -> Header:
    """Parse the header of `source`; its tensors are marked as belonging to file number `split`."""
    limit = min(source.size, MAX_HEADER_BYTES)
    note = "" if limit == source.size else f" of the {MAX_HEADER_BYTES} a header may take"
    for length in _READ_BYTES:
        try:
            cursor = Cursor(source.path, source.head(min(length, limit)), limit, note)
            return _parse(cursor, source.size, split)
        except MoreBytesNeeded:
            continue
    raise AssertionError("the cursor asked for bytes beyond its limit")


def _parse(cursor: Cursor, file_bytes: int, split: int) -> Header:
    version = _parse_version(cursor)
    num_tensors = cursor.count("tensor_count", MAX_TENSORS, _MIN_TENSOR_BYTES)
    metadata, offsets = parse_metadata(cursor, count_keys(cursor))
    alignment = _alignment(cursor, metadata, offsets)
    table = _parse_table(cursor, num_tensors, alignment)
    data_start = _padded(cursor.pos, alignment)
    tensors = []
    for entry in table:
        start = data_start + entry.start
        if start + entry.nbytes > file_bytes:
            problem = f"{entry.nbytes} bytes from byte {start} end past the file's {file_bytes} bytes"
            raise cursor.error(f"tensor {shown(entry.name)} offset", entry.at, problem)
        tensors.append(TensorInfo(entry.name, entry.shape, entry.type, start, entry.nbytes, split))
    return Header(version, alignment, TypedAccess(cursor.path, metadata, offsets), tensors)


def _parse_version(cursor: Cursor) -> int:
    start = cursor.take(4, "magic")
    magic = cursor.data[start : start + 4]
    if magic != b"GGUF":
        raise cursor.error("magic", start, f"{shown(magic)}, a GGUF file starts with the bytes 'GGUF'")
    start = cursor.pos
    version = cursor.u32("version")
    if version & 0xFFFF == 0 and version:
        problem = "is byte-swapped: a big-endian file, convert the model to little-endian"
        raise cursor.error("version", start, problem)
    if version != VERSION:
        problem = f"{version}, only version {VERSION} is supported: convert the model again"
        raise cursor.error("version", start, problem)
    return version


def _alignment(cursor: Cursor, metadata: dict[str, Value], offsets: dict[str, int]) -> int:
    value = metadata.get(_ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    at = offsets.get(_ALIGNMENT_KEY, 0)
    if at and cursor.data[at] != ValueType.UINT32:
        problem = f"has value type {cursor.data[at]}, it must be {int(ValueType.UINT32)} (uint32)"
        raise cursor.error(_ALIGNMENT_KEY, at, problem)
    assert isinstance(value, int)
    if not 8 <= value <= 65536 or value & (value - 1):
        raise cursor.error(_ALIGNMENT_KEY, at, f"{value} is not a power of two from 8 to 65536")
    return value


class _Entry(NamedTuple):
    """A row of the tensor table; `start` counts from where the data start, `at` is where that field lies."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    start: int
    nbytes: int
    at: int


def _parse_table(cursor: Cursor, count: int, alignment: int) -> list[_Entry]:
    """Read all rows; each tensor must start where the one before ended, padded to the alignment."""
    table: list[_Entry] = []
    names: set[str] = set()
    expected = 0
    for i in range(count):
        entry = _parse_entry(cursor, i, names)
        if entry.start != expected:
            problem = f"{entry.start}, but the tensors before it end at {expected}"
            raise cursor.error(f"tensor {shown(entry.name)} offset", entry.at, problem)
        expected = _padded(entry.start + entry.nbytes, alignment)
        names.add(entry.name)
        table.append(entry)
    return table


def _parse_entry(cursor: Cursor, index: int, names: set[str]) -> _Entry:
    at = cursor.pos
    name = cursor.text(f"tensor {index} name", _MAX_TENSOR_NAME)
    if not name or name in names:
        problem = f"{shown(name)} occurs twice" if name else "an empty name"
        raise cursor.error(f"tensor {index} name", at, problem)
    field = f"tensor {shown(name)}"
    at = cursor.pos
    num_dims = cursor.u32(f"{field} n_dims")
    if not 1 <= num_dims <= _MAX_DIMS:
        raise cursor.error(f"{field} n_dims", at, f"{num_dims} dimensions, there must be 1 to {_MAX_DIMS}")
    at = cursor.pos
    dims = [cursor.u64(f"{field} shape") for _ in range(num_dims)]
    if 0 in dims:
        raise cursor.error(f"{field} shape", at + 8 * dims.index(0), "a dimension of 0")
    kind = _parse_type(cursor, field)
    nbytes = _tensor_bytes(cursor, field, at, dims, kind)
    at = cursor.pos
    return _Entry(name, tuple(reversed(dims)), kind, cursor.u64(f"{field} offset"), nbytes, at)


def _parse_type(cursor: Cursor, field: str) -> GgmlType:
    at = cursor.pos
    number = cursor.u32(f"{field} type")
    found = GGML_TYPES.get(number)
    if found is None:
        raise cursor.error(f"{field} type", at, f"type {number} is unknown or retired")
    return found


def _tensor_bytes(cursor: Cursor, field: str, at: int, dims: list[int], kind: GgmlType) -> int:
    """Size in bytes; the product is an exact integer, so nothing wraps before the ceiling is checked."""
    if dims[0] % kind.block_elems:
        problem = f"rows of {dims[0]} elements are not whole {kind.name} blocks of {kind.block_elems}"
        raise cursor.error(f"{field} shape", at, problem)
    nbytes = math.prod(dims[1:]) * kind.row_bytes(dims[0])
    if max(math.prod(dims), nbytes) > _MAX_BYTES:
        raise cursor.error(f"{field} shape", at, f"{nbytes} bytes are more than any file has")
    return nbytes


def _padded(length: int, alignment: int) -> int:
    return -(-length // alignment) * alignment
