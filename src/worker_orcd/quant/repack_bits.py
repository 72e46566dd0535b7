"""Where each bit of a tile comes from: the definition of the device layout, one function a format.

Every format is a permutation of the bits of its blocks, so packing is exact and its inverse is the inverse
permutation. A *field* is an array of bit positions in the stored blocks of 16 rows; its last dimension runs over
the bits of one number, lowest first. A *plane* is a field put in the order of the tile. `TILES` joins the planes.

The inputs of a 128-wide chunk are split as k = 32·quad + 4·j + 2·hh + e, the rows as row = 8·r + g. Lane 4·g + quad
of a warp holds, for MMA j (16 inputs wide), the register (r, hh) with the pair e; so a lane works inside one block
of 32, and needs one scale a row. Letters of dimensions in `rearrange` strings below:
    r g      row halves (2) and rows in a half (8)
    c q      chunks of 128 in the tile, quads (4)
    v l j    j = 4v + 2l + j: a 16-byte load, a word pair in it, an MMA of the pair (2 each)
    h e      register half and element of the pair (2 each)
    b        bits of one number
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from worker_orcd.gguf.types import GgmlType
from worker_orcd.quant.tiles import TILE_K, TILE_ROWS

ELEMENT = "rgcqvljheb"  # a field with one number an element
BLOCK32 = "rgcqb"  # with one number for 32 elements
BLOCK16 = "rgcqvb"  # for 16
BLOCK256 = "rgb"  # for 256, which is the tile
SIZES = {"r": 2, "g": 8, "q": 4, "v": 2, "l": 2, "j": 2, "h": 2, "e": 2}


def rearrange(field: Tensor, dims: str, order: str) -> Tensor:
    """Split a field as `dims` say and put it in `order`: [positions]. Sizes of c and b follow from the field's."""
    bits = field.shape[-1]
    sizes = [bits if d == "b" else -1 if d == "c" else SIZES[d] for d in dims]
    return field.reshape(sizes).permute([dims.index(d) for d in order]).flatten()


def _blocks(type: GgmlType) -> Tensor:
    """Position of the first bit of each block: i64 [16, blocks a row, 1]."""
    count = TILE_K[type] // type.block_elems
    return (torch.arange(TILE_ROWS * count) * type.block_bytes * 8).view(TILE_ROWS, count, 1)


def _number(type: GgmlType, byte: int, bits: int, repeat: int = 1) -> Tensor:
    """`repeat` numbers side by side from `byte` of each block on: [16, blocks · repeat, bits]."""
    inside = byte * 8 + torch.arange(repeat * bits)
    return (_blocks(type) + inside).view(TILE_ROWS, -1, bits)


def _elements(type: GgmlType, first_bit: Tensor, bits: int) -> Tensor:
    """Numbers of one block's elements, given where each begins in the block [block_elems]: [16, K, bits]."""
    inside = first_bit[:, None] + torch.arange(bits)
    return (_blocks(type)[..., None] + inside).view(TILE_ROWS, TILE_K[type], bits)


def _nibbles(type: GgmlType, byte: int, group: int = 16) -> Tensor:
    """Four-bit numbers from `byte` on: `group` low nibbles, then the high ones of the same bytes, and so on."""
    i = torch.arange(type.block_elems)
    at = byte + i // (2 * group) * group + i % group
    return _elements(type, at * 8 + i // group % 2 * 4, 4)


WORDS = "cvgqlrejhb"  # u32 words, 16 bytes a lane: numbers of (j, h) in half e; a nibble at bit 4·(2j + h) + 16·e
REST = "gqcrevljhb"  # u32 word (c, r) of a lane: what the words (v, l) have no room for
PAIRS = "cgqrb"  # a lane's numbers of both row halves side by side


def _low_nibbles(type: GgmlType, byte: int, group: int = 16) -> Tensor:
    return rearrange(_nibbles(type, byte, group), ELEMENT, WORDS)


def _five_bits(type: GgmlType, nibbles: Tensor, fifths: Tensor) -> list[Tensor]:
    """Three numbers in each half of a word, and the top bit of a fourth. The lower bits of fourths are the rest.

    It is turned by one bit: they are at bits 1 to 4 when the top bit is at bit 5 of the word moved for number 2.
    """
    numbers = torch.cat([nibbles, _elements(type, fifths, 1)], -1)
    words = rearrange(numbers, ELEMENT, WORDS).view(-1, 20)[:, [*range(15), 19]]
    rest = rearrange(numbers, ELEMENT, REST).view(-1, 20)[:, 15:19]
    return [words.flatten(), rest.reshape(-1, 32).roll(1, -1).flatten()]


def _plain(type: GgmlType) -> list[Tensor]:
    """16-bit numbers: a lane's 16 bytes are the four registers of MMA j. 32-bit ones: of half of it."""
    bits = 8 * type.block_bytes
    order = "cvljgqhreb" if bits == 16 else "cvljhgqreb"
    return [rearrange(_elements(type, torch.zeros(1, dtype=torch.int64), bits), ELEMENT, order)]


def _q4_0(type: GgmlType) -> list[Tensor]:
    return [_low_nibbles(type, 2), rearrange(_number(type, 0, 16), BLOCK32, PAIRS)]


def _q4_1(type: GgmlType) -> list[Tensor]:
    return [_low_nibbles(type, 4), _scale_and_min(type)]


def _q5_0(type: GgmlType) -> list[Tensor]:
    numbers = _five_bits(type, _nibbles(type, 6), 16 + torch.arange(32))
    return [*numbers, rearrange(_number(type, 0, 16), BLOCK32, PAIRS)]


def _q5_1(type: GgmlType) -> list[Tensor]:
    return [*_five_bits(type, _nibbles(type, 8), 32 + torch.arange(32)), _scale_and_min(type)]


def _scale_and_min(type: GgmlType) -> Tensor:
    """Per lane: d of both rows, then m of both rows."""
    both = torch.stack([_number(type, 0, 16), _number(type, 2, 16)], dim=-2)  # [16, blocks, 2, 16]
    return rearrange(both.flatten(-2), BLOCK32, "cgqrb").view(-1, 2, 2, 16).transpose(1, 2).flatten()


def _q8_0(type: GgmlType) -> list[Tensor]:
    numbers = _elements(type, 16 + 8 * torch.arange(32), 8)
    return [rearrange(numbers, ELEMENT, "cvlgqjrheb"), rearrange(_number(type, 0, 16), BLOCK32, PAIRS)]


def _mxfp4(type: GgmlType) -> list[Tensor]:
    """Codes so that few instructions bring each pair to the sign, low exponent and top mantissa bits of bf16.

    Those are bits 15 and 8 to 6 of each half. Pair 0 lies there, pair 1 three bits below, pair 2 six. Pair 3 has what
    is left; the word turned by six brings its bits to the other half, so its two codes change places.
    """
    halves = rearrange(_nibbles(type, 1), ELEMENT, WORDS).view(-1, 2, 4, 4).clone()  # [words, half, pair, bit]
    halves[:, :, 3] = halves[:, :, 3].flip(1)
    lower = [(2, 0), (2, 1), (2, 2), (1, 0), (1, 1), (1, 2), (0, 0), (0, 1), (0, 2)]
    upper = [(2, 3), (3, 2), (3, 3), (1, 3), (3, 0), (3, 1), (0, 3)]
    order = torch.tensor([4 * pair + bit for pair, bit in lower + upper])
    codes = halves.flatten(2)[..., order].flatten()
    return [codes, rearrange(_number(type, 0, 8), BLOCK32, PAIRS)]


def _q4_k(type: GgmlType) -> list[Tensor]:
    return [_low_nibbles(type, 16, 32), *_k_scales(type)]


def _q5_k(type: GgmlType) -> list[Tensor]:
    i = torch.arange(256)
    numbers = _five_bits(type, _nibbles(type, 48, 32), (16 + i % 32) * 8 + i // 32)
    return [*numbers, *_k_scales(type)]


def _k_scales(type: GgmlType) -> list[Tensor]:
    """Byte (c, r) of a lane: six bits of scale, the upper two of the min; then the mins' lower four; then d, dmin."""
    first, second, low = (_number(type, byte, 8, 4) for byte in (4, 8, 12))
    scales = torch.cat([first[..., :6], torch.cat([low[..., :4], first[..., 6:]], -1)], 1)  # [16, 8, 6]
    mins = torch.cat([second[..., :6], torch.cat([low[..., 4:], second[..., 6:]], -1)], 1)
    upper = torch.cat([scales, mins[..., 4:]], -1)
    lane = "gqcrb"
    return [
        rearrange(upper, BLOCK32, lane),
        rearrange(mins[..., :4], BLOCK32, lane),
        rearrange(_number(type, 0, 32), BLOCK256, BLOCK256),
    ]


def _q6_k(type: GgmlType) -> list[Tensor]:
    """In each half of a word number 0, the upper four bits of number 3, number 1.

    In a byte of the rest the lower two bits of number 3, number 2: none but number 3 is put together.
    """
    i = torch.arange(256)
    low = _elements(type, (i // 128 * 64 + i % 64) * 8 + i % 128 // 64 * 4, 4)
    high = _elements(type, (128 + i // 128 * 32 + i % 32) * 8 + i % 128 // 32 * 2, 2)
    numbers = torch.cat([low, high], -1)
    words = rearrange(numbers, ELEMENT, WORDS).view(-1, 24)
    rest = rearrange(numbers, ELEMENT, "cgqvreljhb").view(-1, 24)
    return [
        words[:, [*range(6), *range(20, 24), *range(6, 12)]].flatten(),
        rest[:, [18, 19, *range(12, 18)]].flatten(),
        rearrange(_number(type, 192, 8, 16), BLOCK16, "cgqrvb"),
        rearrange(_number(type, 208, 16), BLOCK256, BLOCK256),
    ]


TILES: Mapping[GgmlType, Callable[[GgmlType], list[Tensor]]] = MappingProxyType(
    {
        GgmlType.F32: _plain,
        GgmlType.F16: _plain,
        GgmlType.BF16: _plain,
        GgmlType.Q4_0: _q4_0,
        GgmlType.Q4_1: _q4_1,
        GgmlType.Q5_0: _q5_0,
        GgmlType.Q5_1: _q5_1,
        GgmlType.Q8_0: _q8_0,
        GgmlType.MXFP4: _mxfp4,
        GgmlType.Q4_K: _q4_k,
        GgmlType.Q5_K: _q5_k,
        GgmlType.Q6_K: _q6_k,
    }
)


def bit_sources(type: GgmlType) -> Tensor:
    """For each bit of a tile its place in the stored blocks of the 16 rows: i64 [tile bits], a permutation."""
    return torch.cat(TILES[type](type))
