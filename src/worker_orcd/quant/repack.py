"""GGUF blocks → device tiles and back, exactly, on any device.

u8 [N · row bytes] ↔ u8 [N / 16, bytes of a strip]; `repack_bits` says where each bit goes, `tiles` the sizes.
Signed bytes of Q8_0 are kept with the sign bit flipped (the number plus 128), the only change that is no move.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from worker_orcd.errors import ModelLoadFailed
from worker_orcd.gguf.types import GgmlType
from worker_orcd.quant.bits import halves
from worker_orcd.quant.repack_bits import bit_sources
from worker_orcd.quant.tiles import TILE_K, TILE_ROWS, packed_shape, tile_bytes, tile_grid

LARGEST_SCALE = 1024.0  # scale · 2^117 must be a bf16 number
LARGEST_EXPONENT = 144  # of MXFP4: E + 110 must be an exponent of bf16
SCALE_PLACES = {  # byte of d in a block, the largest number it is multiplied by
    GgmlType.Q4_0: (0, 1), GgmlType.Q4_1: (0, 1), GgmlType.Q5_0: (0, 1), GgmlType.Q5_1: (0, 1), GgmlType.Q8_0: (0, 1),
    GgmlType.Q4_K: (0, 63), GgmlType.Q5_K: (0, 63), GgmlType.Q6_K: (208, 128),
}  # fmt: skip
PIECE_BYTES = 2**23  # packed at once; the bits of a piece take eight bytes each


def pack(raw: Tensor, type: GgmlType, shape: tuple[int, int], count: int = 1) -> Tensor:
    """Stored blocks of a matrix [N, K], u8 [n] → its tiles, u8 [strips, bytes of a strip].

    It may be `count` matrices one under the other.
    """
    source, _ = _tables(type, raw.device)
    (strips, depth), size = tile_grid(type, shape), tile_bytes(type)
    tiles = torch.empty(packed_shape(type, shape, count), dtype=torch.uint8, device=raw.device)
    rows = raw.view(shape[0], -1)
    step = max(1, PIECE_BYTES // (depth * size))
    for start in range(0, strips, step):
        blocks = _pad(rows[start * TILE_ROWS : (start + step) * TILE_ROWS], type, depth)
        whole = _flip_signs(_move_bits(blocks, source).view(-1, depth, size), type).flatten(1)
        if whole.shape[1] > tiles.shape[1]:
            last = (depth - 1) * size
            whole = torch.cat([whole[:, :last], whole[:, last + _half_bytes(type, raw.device)]], 1)
        tiles[start : start + step] = whole
    return tiles


def check_scales(raw: Tensor, type: GgmlType) -> None:
    """Raises ModelLoadFailed when a scale is too large for the kernels, or no number; they take |scale| < 2^10."""
    blocks = raw.view(-1, type.block_bytes)
    if type is GgmlType.MXFP4:
        if int(blocks[:, 0].max()) > LARGEST_EXPONENT:
            raise ModelLoadFailed(f"a scale of a MXFP4 tensor is beyond 2^{LARGEST_EXPONENT - 127}")
    elif type in SCALE_PLACES:
        byte, factor = SCALE_PLACES[type]
        largest = float(halves(blocks[:, byte : byte + 2]).abs().max()) * factor
        if not largest < LARGEST_SCALE:
            raise ModelLoadFailed(f"a scale of a {type.name} tensor is {largest}, the limit is {LARGEST_SCALE}")


def unpack(tiles: Tensor, type: GgmlType, shape: tuple[int, int]) -> Tensor:
    """The inverse of `pack`."""
    _, place = _tables(type, tiles.device)
    (strips, depth), size = tile_grid(type, shape), tile_bytes(type)
    out = torch.empty(shape[0], type.row_bytes(shape[1]), dtype=torch.uint8, device=tiles.device)
    step = max(1, PIECE_BYTES // (depth * size))
    for start in range(0, strips, step):
        part = tiles[start : start + step].clone()
        if part.shape[1] < depth * size:
            last = (depth - 1) * size
            whole = part.new_zeros(len(part), depth * size)
            whole[:, :last] = part[:, :last]
            whole[:, last + _half_bytes(type, tiles.device)] = part[:, last:]
            part = whole
        part = _flip_signs(part.view(-1, depth, size), type)
        blocks = _move_bits(part.view(-1, size), place).view(len(part), depth, TILE_ROWS, -1)
        rows = blocks.transpose(1, 2).reshape(len(part) * TILE_ROWS, -1)
        piece = out[start * TILE_ROWS : (start + step) * TILE_ROWS]
        piece.copy_(rows[: len(piece), : piece.shape[1]])
    return out.flatten()


@lru_cache(maxsize=64)
def _tables(type: GgmlType, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each bit of a tile its place in the blocks, and the inverse: i64 [tile bits]."""
    source = bit_sources(type)
    return source.to(device), source.argsort().to(device)


@lru_cache(maxsize=64)
def _half_bytes(type: GgmlType, device: torch.device) -> Tensor:
    """Which bytes of a tile half a tile has, those of the first 64 inputs: i64 [tile bytes / 2]."""
    blocks = bit_sources(type)[::8] // (8 * type.block_bytes)  # of 16 rows one after another
    in_row = TILE_K[type] // type.block_elems
    return torch.nonzero(blocks % in_row < in_row // 2).flatten().to(device)


def _pad(rows: Tensor, type: GgmlType, depth: int) -> Tensor:
    """Rows of stored blocks → the blocks of each tile, 16 rows one after another: u8 [tiles, tile bytes]."""
    width = type.row_bytes(TILE_K[type])
    strips = -(-len(rows) // TILE_ROWS)
    if rows.shape != (strips * TILE_ROWS, depth * width):
        padded = rows.new_zeros(strips * TILE_ROWS, depth * width)
        padded[: len(rows), : rows.shape[1]] = rows
        rows = padded
    return rows.view(strips, TILE_ROWS, depth, width).transpose(1, 2).reshape(strips * depth, -1)


def _move_bits(data: Tensor, source: Tensor) -> Tensor:
    """u8 [n, bytes] → u8 [n, bytes] whose bit i is bit source[i] of the input."""
    shifts = torch.arange(8, dtype=torch.uint8, device=data.device)
    bits = ((data.unsqueeze(-1) >> shifts) & 1).view(len(data), -1)
    return _join_bits(bits.index_select(1, source))


def _join_bits(bits: Tensor) -> Tensor:
    """u8 [..., 8n] of zeros and ones, lowest bit first → u8 [..., n]."""
    parts = bits.view(*bits.shape[:-1], bits.shape[-1] // 8, 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (parts << shifts).sum(-1, dtype=torch.uint8)


def _flip_signs(tiles: Tensor, type: GgmlType) -> Tensor:
    if type is GgmlType.Q8_0:
        tiles[..., : TILE_ROWS * TILE_K[type]] ^= 0x80
    return tiles
