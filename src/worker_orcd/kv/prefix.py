"""Keys under which the blocks of a prefix are found again.

The key of a block is SHA-256 over its parent's key and its own tokens, so it names the whole text from position 0 on.
The chain starts at a root that names everything else the content depends on: model, cache type, and the tenant who
may share it. Fields are tagged and length-prefixed, so no two lists of fields can read the same.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence


def root_key(**fields: str) -> bytes:
    """The start of a chain, different for every difference in any name or value."""
    digest = hashlib.sha256(b"worker-orcd kv prefix 1")
    for name in sorted(fields):
        for part in (name.encode(), fields[name].encode()):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.digest()


def child_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full block that follows `parent`; token ids are below 2^32."""
    return hashlib.sha256(parent + array("I", tokens).tobytes()).digest()


class PrefixChain:
    """The keys of the full blocks of one growing text. Every block is hashed once, however often it is asked for."""

    def __init__(self, root: bytes, block_size: int) -> None:
        self._root, self._block_size = root, block_size
        self._keys: list[bytes] = []

    def keys(self, tokens: Sequence[int], num_tokens: int) -> list[bytes]:
        """Keys of the blocks that lie wholly within the first `num_tokens` of `tokens`, which only ever grows."""
        size, keys = self._block_size, self._keys
        num_full = num_tokens // size
        while len(keys) < num_full:
            start = len(keys) * size
            keys.append(child_key(keys[-1] if keys else self._root, tokens[start : start + size]))
        return keys[:num_full]
