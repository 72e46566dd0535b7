"""A short name for what is in a model file."""

from __future__ import annotations

import hashlib

from worker_orcd.gguf.reader import GgufFile
from worker_orcd.gguf.source import Source

SAMPLE_BYTES = 4096


def fingerprint(gguf: GgufFile) -> str:
    """SHA-256, in hex, over the size and the header of every file and both ends of every tensor.

    Any other training, quantization or metadata changes it. Hashing all of a large file would take a minute of a
    core and as many gigabytes of reading; whoever fears that single bytes were changed on purpose runs sha256sum.
    """
    digest = hashlib.sha256()
    for index, path in enumerate(gguf.paths):
        source = Source(path)
        try:
            stored = [part for info in gguf.tensors.values() for part in info.stored]
            begins = [part.offset for part in stored if part.split == index]
            digest.update(source.size.to_bytes(8, "little"))
            digest.update(source.head(min(begins, default=source.size)))
        finally:
            source.close()
    for name, info in gguf.tensors.items():
        end = 0
        for part in info.stored:
            begin, end, length = end, end + part.nbytes, min(SAMPLE_BYTES, part.nbytes)
            digest.update(gguf.read(name, start=begin, length=length))
            digest.update(gguf.read(name, start=end - length, length=length))
    return digest.hexdigest()
