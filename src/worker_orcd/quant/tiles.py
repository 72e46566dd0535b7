"""Sizes of the tiles in which a GPU keeps matrices: what `plan` must know without waiting for torch.

A tile is 16 rows by `k` inputs with the same bits the file has for them, in the order the matmul reads them
(`repack_bits` says which). A matrix is its tiles, the 16-row strip outermost, then along K. Rows and inputs that
do not fill a tile are padded with zero bytes. A vocabulary's strips end with half a tile where that is enough.
"""

from __future__ import annotations

from collections.abc import Mapping
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


def ends_with_half(type: GgmlType, shape: tuple[int, int]) -> bool:
    """Whether the last tile of each strip of a matrix [N, K] is half a one, for at most 64 inputs of 128.

    So for matrices of MANY_ROWS, which are read once a step, or a row of them: the others would lose more time than
    memory is saved, and MXFP4's experts, matrices of many rows together, the most.
    """
    is_table = shape[0] >= MANY_ROWS and type is not GgmlType.MXFP4
    return is_table and TILE_K[type] == 128 and 0 < shape[1] % 128 <= 64


def tiles_shape(type: GgmlType, shape: tuple[int, int], has_half: bool | None = None) -> tuple[int, int]:
    """Strips of a matrix [N, K], and the bytes of each, padding included; `has_half`: other than as it is packed."""
    strips, depth = tile_grid(type, shape)
    has_half = ends_with_half(type, shape) if has_half is None else has_half
    return strips, depth * tile_bytes(type) - (tile_bytes(type) // 2 if has_half else 0)


def packed_bytes(type: GgmlType, shape: tuple[int, int]) -> int:
    """Bytes of a matrix [N, K] in tiles, padding included."""
    strips, strip_bytes = tiles_shape(type, shape)
    return strips * strip_bytes
