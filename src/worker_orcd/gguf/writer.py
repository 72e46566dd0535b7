"""Write a GGUF file, version 3, little-endian."""

from __future__ import annotations

import math
import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from worker_orcd.gguf.types import DEFAULT_ALIGNMENT, GgmlType, ValueType

TensorData = bytes | bytearray | memoryview | NDArray[Any] | Callable[[], Iterable[bytes]]
Tensor = tuple[str, Sequence[int], GgmlType, TensorData]

_VALUE_TYPES = {
    "u1": ValueType.UINT8,
    "i1": ValueType.INT8,
    "u2": ValueType.UINT16,
    "i2": ValueType.INT16,
    "u4": ValueType.UINT32,
    "i4": ValueType.INT32,
    "f4": ValueType.FLOAT32,
    "b1": ValueType.BOOL,
    "u8": ValueType.UINT64,
    "i8": ValueType.INT64,
    "f8": ValueType.FLOAT64,
}


class _Row(NamedTuple):
    name: str
    shape: Sequence[int]
    type: GgmlType
    data: bytes | Callable[[], Iterable[bytes]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.type.row_bytes(self.shape[-1])


def write_gguf(
    path: str | PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Iterable[Tensor] = (),
    alignment: int = DEFAULT_ALIGNMENT,
) -> None:
    """Write `metadata` and `tensors` (name, shape outermost first, type, stored bytes) to `path`.

    Scalars: bool; int as uint32, else int32, uint64, int64, whichever holds it first; float as float32; str.
    Arrays: list of str, bool, int (int32) or float (float32), not empty; a numpy array or scalar, which keeps
    its own type. Stored bytes may be a function that yields them in pieces, called when it is their turn.
    `general.alignment` is written when `alignment` (bytes) is not the default 32. The file appears under its
    name only once complete. Raises ValueError for a value of no such type or data of the wrong size.
    """
    if alignment != DEFAULT_ALIGNMENT:
        metadata = {**metadata, "general.alignment": alignment}
    rows = [_row(*tensor) for tensor in tensors]
    header = _header(metadata, rows, alignment)
    target = Path(path)
    handle, partial = tempfile.mkstemp(dir=target.parent, prefix=target.name)
    try:
        with open(handle, "wb") as file:
            file.write(header)
            for row in rows:
                file.write(bytes(-file.tell() % alignment))
                _write_data(file, row)
        os.chmod(partial, 0o644)
        os.replace(partial, target)
    except BaseException:
        os.unlink(partial)
        raise


def write_sparse(
    path: str | PathLike[str], metadata: Mapping[str, Any], tensors: Iterable[tuple[str, Sequence[int], GgmlType]]
) -> None:
    """Write the header of such a file and make it as long as it would be, with holes where the tensors belong."""
    rows = [_row(name, shape, kind, lambda: ()) for name, shape, kind in tensors]
    header = _header(metadata, rows, DEFAULT_ALIGNMENT)
    sizes = [len(header), *(row.nbytes for row in rows)]
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(sum(size + -size % DEFAULT_ALIGNMENT for size in sizes))


def _row(name: str, shape: Sequence[int], kind: GgmlType, data: TensorData) -> _Row:
    if not shape or shape[-1] % kind.block_elems:
        raise ValueError(f"tensor {name!r}: rows of shape {shape} are not whole {kind.name} blocks")
    if callable(data):
        return _Row(name, shape, kind, data)
    stored = data.tobytes() if isinstance(data, np.ndarray | memoryview) else bytes(data)
    row = _Row(name, shape, kind, stored)
    _check_size(row, len(stored))
    return row


def _check_size(row: _Row, size: int) -> None:
    if size != row.nbytes:
        raise ValueError(f"tensor {row.name!r}: {size} bytes, {row.type.name} of shape {row.shape} has {row.nbytes}")


def _write_data(file: IO[bytes], row: _Row) -> None:
    began = file.tell()
    for piece in row.data() if callable(row.data) else (row.data,):
        file.write(piece)
    _check_size(row, file.tell() - began)


def _header(metadata: Mapping[str, Any], rows: Sequence[_Row], alignment: int) -> bytes:
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(rows), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), _value(key, value)]
    start = 0
    for row in rows:
        num_dims = len(row.shape)
        parts.append(_string(row.name))
        parts.append(struct.pack(f"<I{num_dims}QIQ", num_dims, *reversed(row.shape), row.type, start))
        start += row.nbytes + -row.nbytes % alignment
    return b"".join(parts)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, value: Any) -> bytes:
    """Type tag and bytes of one metadata value."""
    if isinstance(value, str):
        return struct.pack("<I", ValueType.STRING) + _string(value)
    if isinstance(value, Sequence) and value and all(isinstance(item, str) for item in value):
        header = struct.pack("<IIQ", ValueType.ARRAY, ValueType.STRING, len(value))
        return header + b"".join(map(_string, value))
    numbers = _as_numbers(value)
    kind = _VALUE_TYPES.get(f"{numbers.dtype.kind}{numbers.dtype.itemsize}")
    if kind is None or numbers.ndim > 1:
        raise ValueError(f"key {key!r}: a value of type {type(value).__name__} cannot be stored")
    little = numbers.astype(numbers.dtype.newbyteorder("<")).tobytes()
    if numbers.ndim == 0:
        return struct.pack("<I", kind) + little
    return struct.pack("<IIQ", ValueType.ARRAY, kind, len(numbers)) + little


def _as_numbers(value: Any) -> NDArray[Any]:
    """A Python number or list of them with the type it is stored in; numpy values as they are."""
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)
    numbers = np.asarray(value)
    if numbers.size == 0:
        return numbers.astype(object)  # an empty list has no type
    if numbers.dtype.kind == "f":
        return numbers.astype(np.float32)
    if numbers.dtype.kind in "iu" and numbers.ndim == 1:
        return np.asarray(value, np.int32)
    if numbers.dtype.kind in "iu" and numbers.ndim == 0:
        narrow = (dtype for dtype in (np.uint32, np.int32, np.uint64, np.int64) if _holds(dtype, value))
        return np.asarray(value, next(narrow))
    return numbers


def _holds(dtype: type[np.integer[Any]], value: int) -> bool:
    return int(np.iinfo(dtype).min) <= value <= int(np.iinfo(dtype).max)
