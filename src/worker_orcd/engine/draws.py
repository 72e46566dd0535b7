"""Randomness without state: a draw is a function of a request's seed, its sample index and the token's position."""

from __future__ import annotations

from collections.abc import Sequence as Sequences

import numpy as np
from numpy.typing import NDArray

from worker_orcd.engine.sequence import Sequence

PHILOX_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
PHILOX_WEYL = np.array([[[i * 0x9E3779B9], [i * 0xBB67AE85]] for i in range(10)], dtype=np.uint64)
MASK32 = np.uint64(0xFFFFFFFF)
SHIFT32 = np.uint64(32)

Words = NDArray[np.uint64]  # each element below 2^32


def philox(key: tuple[Words, Words], counter: tuple[Words, Words, Words, Words]) -> tuple[Words, ...]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), element by element."""
    even, odd = np.array(counter[::2]), np.array(counter[1::2])
    for keys in (np.array(key) + PHILOX_WEYL) & MASK32:  # of each round
        products = PHILOX_MULTIPLIERS * even
        even, odd = (products >> SHIFT32)[::-1] ^ odd ^ keys, (products & MASK32)[::-1]
    return even[0], odd[0], even[1], odd[1]


def uniforms(
    seeds: Sequences[int], positions: Sequences[int], sample_index: int | Sequences[int] = 0, stream: int = 0
) -> NDArray[np.float64]:
    """The draws in [0, 1) that decide the tokens at `positions` (0 = first prompt token): 53 random bits each.

    Stream 1 gives a second, independent one.
    """
    key = np.array(seeds, dtype=np.uint64)
    position = np.array(positions, dtype=np.uint64)
    zero = np.zeros_like(key)
    index = zero + np.array(sample_index, dtype=np.uint64)
    words = philox((key & MASK32, key >> SHIFT32), (position, index, zero, zero))
    high, low = words[2 * stream : 2 * stream + 2]
    return ((high << np.uint64(21)) | (low >> np.uint64(11))).astype(np.float64) * 2.0**-53


def draws(rows: list[Sequence], stream: int = 0) -> NDArray[np.float64]:
    """For the next token of each sequence."""
    params = [seq.request.sampling for seq in rows]
    seeds, indices = [p.seed for p in params], [p.sample_index for p in params]
    return uniforms(seeds, [seq.num_tokens for seq in rows], indices, stream)
