"""Open a GGUF model (version 3, little-endian; one file or a set of splits) and read its tensors' bytes.

Nothing in a file is trusted: counts are compared with the bytes left before anything is allocated, sizes are
exact integers below 2^63, tensors must follow one another without gap or overlap and end inside the file.
Files are never memory-mapped: headers are read into a private buffer and tensors by positional reads, because
a mapping of a file that shrinks kills the process (SIGBUS) where a read merely fails.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from worker_orcd.gguf.access import Bound, D, Numbers, T, TypedAccess
from worker_orcd.gguf.header import MAX_TENSORS, Header, TensorInfo, read_header
from worker_orcd.gguf.metadata import StringArray, Value
from worker_orcd.gguf.source import GgufError, Source, shown
from worker_orcd.gguf.splits import check_member, check_total, sibling_paths
from worker_orcd.gguf.types import FILE_TYPES
from worker_orcd.gguf.vocabulary import check_vocabulary

__all__ = ["GgufError", "GgufFile", "StringArray", "TensorInfo", "Value"]

_GUESSED_FILE_TYPE = 1024  # flag: the converter derived general.file_type from the tensors
_REQUIRED = object()


class GgufFile(TypedAccess):
    """An opened model. A context manager; `close` ends tensor reads, metadata stays usable.

    path         the file given to `open`; `paths` are all files of the set, in order
    version      3
    alignment    bytes, of the first file
    metadata     key → int, float, bool, str, read-only numpy array (a view of the header) or StringArray
    tensors      name → TensorInfo, in file order
    size_bytes   of all files
    """

    def __init__(self, sources: list[Source], headers: list[Header]) -> None:
        """Takes over the opened sources. Users call `open`."""
        values = headers[0].values
        super().__init__(values.path, MappingProxyType(values.metadata), values.offsets)
        self._sources = sources
        self.paths = [source.path for source in sources]
        self.version = headers[0].version
        self.alignment = headers[0].alignment
        self.size_bytes = sum(source.size for source in sources)
        self.tensors = MappingProxyType(_merged_tensors(headers))
        check_vocabulary(self)

    @classmethod
    def open(cls, path: str | PathLike[str]) -> GgufFile:
        """Open and check a model. The first file of a split model opens the whole set.

        Raises GgufError when a file is not a regular file, cannot be read, or is malformed in any way.
        """
        with ExitStack() as on_failure:
            sources = [_open_source(Path(path), on_failure)]
            headers = [read_header(sources[0])]
            siblings = sibling_paths(headers[0].values)
            for index, sibling in enumerate(siblings, start=1):
                sources.append(_open_source(sibling, on_failure))
                headers.append(read_header(sources[-1], index))
                check_member(headers[-1].values, index, len(siblings) + 1)
            if siblings:
                check_total(headers[0].values, sum(len(header.tensors) for header in headers))
            gguf = cls(sources, headers)
            on_failure.pop_all()
        return gguf

    def close(self) -> None:
        """Close all files; closing twice is fine."""
        for source in self._sources:
            source.close()

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def architecture(self) -> str:
        """`general.architecture`, which also prefixes the hyper-parameters' keys."""
        return self.require("general.architecture", str)

    @overload
    def hparam(self, name: str, kind: type[T], *, min: Bound = ..., max: Bound = ...) -> T: ...
    @overload
    def hparam(self, name: str, kind: type[T], default: D, *, min: Bound = ..., max: Bound = ...) -> T | D: ...
    @overload
    def hparam(self, name: str, kind: Literal["strings"]) -> StringArray: ...
    @overload
    def hparam(self, name: str, kind: Literal["strings"], default: D) -> StringArray | D: ...
    @overload
    def hparam(self, name: str, kind: Numbers, *, min: Bound = ..., max: Bound = ...) -> NDArray[Any]: ...
    @overload
    def hparam(
        self, name: str, kind: Numbers, default: D, *, min: Bound = ..., max: Bound = ...
    ) -> NDArray[Any] | D: ...
    def hparam(
        self, name: str, kind: Any, default: object = _REQUIRED, *, min: Bound = None, max: Bound = None
    ) -> object:
        """The value of `<architecture>.<name>`; required when no default is given. Else as `get`."""
        key = f"{self.architecture}.{name}"
        if default is _REQUIRED:
            return self.require(key, kind, min=min, max=max)
        return self.get(key, kind, default, min=min, max=max)

    @property
    def quant_kind(self) -> str:
        """What people call the file, such as "Q4_K_M": by `general.file_type`, else the type with most bytes.

        "unknown" for a file that has neither a known file type nor tensors.
        """
        label = self.get("general.file_type", int, -1)
        name = FILE_TYPES.get(label & ~_GUESSED_FILE_TYPE) if label >= 0 else None
        if name is not None:
            return name
        bytes_by_type: Counter[str] = Counter()
        for info in self.tensors.values():
            bytes_by_type[info.type.name] += info.nbytes
        return bytes_by_type.most_common(1)[0][0] if bytes_by_type else "unknown"

    def read(self, name: str, out: memoryview | None = None, start: int = 0, length: int | None = None) -> memoryview:
        """Read `length` bytes (default: to the end) of a tensor from its byte `start`, into `out` when given.

        Returns the bytes read: the front of `out`, or a new buffer. Raises GgufError when there is no such
        tensor, or the file was shortened or changed since it was opened.
        """
        info = self.tensors.get(name)
        if info is None:
            raise GgufError(self.path, f"tensor {shown(name)}", None, "is not in the file")
        length = info.nbytes - start if length is None else length
        assert 0 <= start <= start + length <= info.nbytes, f"bytes {start}+{length} of {info.nbytes}"
        whole = target = np.empty(length, np.uint8).data if out is None else out.cast("B")[:length]
        assert len(target) == length, f"a buffer of {len(target)} bytes for {length}"
        for part in info.stored:
            skipped = max(0, min(start, part.nbytes))
            count = min(part.nbytes - skipped, length)
            if count:
                source = self._sources[part.split]
                source.read_into(f"tensor {shown(part.name)}", part.offset + skipped, target[:count])
            start, length, target = start - skipped, length - count, target[count:]
        return whole


def _open_source(path: Path, on_failure: ExitStack) -> Source:
    source = Source(path)
    on_failure.callback(source.close)
    return source


def _merged_tensors(headers: list[Header]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for header in headers:
        for info in header.tensors:
            if info.name in tensors:
                problem = f"is also in file {tensors[info.name].split + 1} of the set"
                raise GgufError(header.values.path, f"tensor {shown(info.name)}", info.offset, problem)
            tensors[info.name] = info
    if len(tensors) > MAX_TENSORS:
        problem = f"{len(tensors)} in all files, the limit is {MAX_TENSORS}"
        raise GgufError(headers[0].values.path, "tensors", None, problem)
    return tensors
