"""Files beside the model that a user may give."""

from __future__ import annotations

from pathlib import Path

from worker_orcd.errors import ModelLoadFailed
from worker_orcd.gguf.source import open_regular


def read_limited(path: Path, kind: str, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit`; raises ModelLoadFailed, which names the file as a `kind`."""
    try:
        with open(open_regular(path, kind), "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise ModelLoadFailed(f"{path.name} cannot be read: {error.strerror}") from error
    if len(content) > limit:
        raise ModelLoadFailed(f"{path.name} has more than {limit} bytes, the limit")
    return content
