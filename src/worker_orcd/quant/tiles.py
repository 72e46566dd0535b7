"""Sizes of the tiles in which a GPU keeps matrices: what `plan` must know without waiting for torch.

A tile is 16 rows by `k` inputs with the same bits the file has for them, in the order the matmul reads them
(`repack_bits` says which). A matrix is its tiles, the 16-row strip outermost, then along K. Rows and inputs that
do not fill a tile are padded with zero bytes. A vocabulary's strips end with half a tile where that is enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from types import MappingProxyType

from worker_orcd.gguf.types import GgmlType

TILE_ROWS = 16
MANY_ROWS = 2**16

TILE_K: Mapping[GgmlType, int] = MappingProxyType(
    {
        GgmlType.F32: 128,
        GgmlType.F16: 128,
        GgmlType.BF16: 128,
        GgmlType.Q4_0: 128,
        GgmlType.Q4_1: 128,
        GgmlType.Q5_0: 128,
        GgmlType.Q5_1: 128,
        GgmlType.Q8_0: 128,
        GgmlType.MXFP4: 128,
        GgmlType.Q4_K: 256,
        GgmlType.Q5_K: 256,
        GgmlType.Q6_K: 256,
    }
)
"""Inputs of one tile, by type; the keys are the types that can be run."""


def tile_bytes(type: GgmlType) -> int:
    return TILE_ROWS * type.row_bytes(TILE_K[type])


def tile_grid(type: GgmlType, shape: tuple[int, int]) -> tuple[int, int]:
    """How many tiles a matrix [N, K] has along N and along K."""
    return -(-shape[0] // TILE_ROWS), -(-shape[1] // TILE_K[type])


def fits_half(type: GgmlType, k: int) -> bool:
    """Whether half a tile is enough at the end of a strip of `k` inputs: for at most 64 of 128."""
    return TILE_K[type] == 128 and 0 < k % 128 <= 64


def ends_with_half(type: GgmlType, shape: tuple[int, int], count: int = 1) -> bool:
    """Whether the strips of a matrix [N, K], or of `count` matrices one under the other, end with half a tile.

    So for matrices of MANY_ROWS, vocabularies, which are read once a step: the others, experts most of all, would
    lose more time than memory is saved.
    """
    return shape[0] // count >= MANY_ROWS and fits_half(type, shape[1])


def strip_bytes(type: GgmlType, k: int, has_half: bool) -> int:
    """Of 16 rows of `k` inputs, padding included."""
    size = tile_bytes(type)
    return -(-k // TILE_K[type]) * size - (size // 2 if has_half else 0)


def packed_shape(type: GgmlType, shape: tuple[int, int], count: int = 1) -> tuple[int, int]:
    """Strips of a matrix [N, K], or of `count` one under the other, and the bytes of each."""
    return tile_grid(type, shape)[0], strip_bytes(type, shape[1], ends_with_half(type, shape, count))


def packed_bytes(type: GgmlType, shape: tuple[int, int], count: int = 1) -> int:
    """Bytes of as much in tiles, padding included."""
    return prod(packed_shape(type, shape, count))
