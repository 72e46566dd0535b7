"""An opened model file: positional reads that end in an error, never in a signal.

The file is not memory-mapped on purpose: a mapping of a file that another process shortens kills the reader
with SIGBUS, where a short read is an ordinary error.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from worker_orcd.errors import ModelLoadFailed

_NAME_LIMIT = 64
_OPEN_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
}


class GgufError(ModelLoadFailed):
    """The file cannot be used: names the file, the field, and where known the byte offset of the field."""

    def __init__(self, path: Path, field: str, offset: int | None, problem: str) -> None:
        place = field if offset is None else f"{field} at byte {offset}"
        printable = str(path).encode("utf-8", "backslashreplace").decode()
        super().__init__(f"{printable}: {place}: {problem}", field=field, offset=offset)


def shown(name: str | bytes) -> str:
    """A name found in a file, made safe to print: quoted ASCII, at most 64 characters of it."""
    quoted = ascii(name)
    return quoted if len(quoted) <= _NAME_LIMIT else quoted[: _NAME_LIMIT - 3] + "..."


class Source:
    """A regular file opened for reading. `size` is its length in bytes when it was opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = open_regular(path)
        self._opened_as = self._state()
        self.size = self._opened_as[0]

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def head(self, length: int) -> bytes:
        """The first `length` bytes. Raises GgufError when they can no longer be read."""
        try:
            data = os.pread(self._fd, length, 0)
        except OSError as error:
            raise GgufError(self.path, "header", 0, f"cannot be read: {error.strerror}") from error
        if len(data) < length:
            raise self._shortened("header", len(data))
        return data

    def read_into(self, field: str, offset: int, out: memoryview) -> None:
        """Fill `out` (bytes, writable) from `offset`.

        Raises GgufError naming `field` when the file ends early or changed since it was opened.
        """
        done = 0
        while done < len(out):
            try:
                count = os.preadv(self._fd, [out[done:]], offset + done)
            except OSError as error:
                problem = f"cannot be read: {error.strerror}"
                raise GgufError(self.path, field, offset + done, problem) from error
            if count == 0:
                raise self._shortened(field, offset + done)
            done += count
        if self._state() != self._opened_as:
            problem = "the file changed since it was opened; load it again"
            raise GgufError(self.path, field, offset, problem)

    def _state(self) -> tuple[int, int]:
        status = os.fstat(self._fd)
        return status.st_size, status.st_mtime_ns

    def _shortened(self, field: str, end: int) -> GgufError:
        problem = f"the file now ends here, it had {self.size} bytes when opened; load it again"
        return GgufError(self.path, field, end, problem)


def open_regular(path: Path, role: str = "model file") -> int:
    """A descriptor of a file opened for reading; `role` is what errors call it.

    Opens without blocking (a FIFO would wait for its writer) and refuses all but regular files unread, by GgufError.
    """
    try:
        fd = os.open(path, _OPEN_FLAGS)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise GgufError(path, role, None, f"cannot be opened: {reason}") from error
    kind = stat.S_IFMT(os.fstat(fd).st_mode)
    if kind == stat.S_IFREG:
        return fd
    os.close(fd)
    problem = f"is {_KINDS.get(kind, 'a special file')}, a {role.removesuffix(' file')} must be a regular file"
    raise GgufError(path, role, None, problem)
