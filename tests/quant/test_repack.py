"""Packing moves bits and loses none; the order is that of the reference layout."""

from __future__ import annotations

import pytest
import torch

import worker_orcd.quant.tiles as tiles_module
from worker_orcd.errors import ModelLoadFailed
from worker_orcd.gguf.types import GgmlType
from worker_orcd.quant.format import FORMATS
from worker_orcd.quant.repack import SCALE_PLACES, check_scales, pack, unpack
from worker_orcd.quant.repack_bits import bit_sources
from worker_orcd.quant.tiles import TILE_K, packed_bytes, tile_bytes
from worker_orcd.quant.types import RUNNABLE

FORMAT_NAMES = pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)


def random_raw(kind: GgmlType, n: int, k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(int(kind) + n + k)
    return torch.randint(0, 256, (n * kind.row_bytes(k),), dtype=torch.uint8, generator=generator)


def widths(kind: GgmlType) -> list[int]:
    """Inputs that fill tiles, and that do not where the format allows it."""
    return [512, 768] if kind.block_elems == 256 else [128, 96, 416] if kind.block_elems == 32 else [128, 5, 203]


def test_every_runnable_type_has_tiles() -> None:
    assert set(TILE_K) == RUNNABLE


@FORMAT_NAMES
def test_a_tile_is_a_permutation_of_the_bits_of_its_blocks(kind: GgmlType) -> None:
    assert torch.equal(bit_sources(kind).sort().values, torch.arange(8 * tile_bytes(kind)))


@FORMAT_NAMES
@pytest.mark.parametrize(("n", "many_rows"), [(1, 2**16), (16, 2**16), (50, 2**16), (1, 1), (50, 1)])
def test_unpack_is_the_inverse_of_pack(
    kind: GgmlType, n: int, many_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles_module, "MANY_ROWS", many_rows)
    for k in widths(kind):
        raw = random_raw(kind, n, k)
        tiles = pack(raw, kind, (n, k))
        assert tiles.nbytes == packed_bytes(kind, (n, k))
        assert torch.equal(unpack(tiles, kind, (n, k)), raw)


def test_a_vocabulary_keeps_half_a_tile_where_that_is_enough() -> None:
    """The tables of GPT-OSS: 22 tiles and a half."""
    q8, size = GgmlType.Q8_0, tile_bytes(GgmlType.Q8_0)
    assert packed_bytes(q8, (201088, 2880)) == 201088 * q8.row_bytes(2880)
    assert packed_bytes(q8, (201088, 2912)) == 201088 // 16 * 23 * size, "more than half is there"
    assert packed_bytes(q8, (5120, 2880)) == 5120 // 16 * 23 * size, "few rows"
    assert packed_bytes(q8, (201088, 4096)) == 201088 * q8.row_bytes(4096)
    assert packed_bytes(q8, (32 * 5760, 2880), 32) == 32 * 5760 // 16 * 23 * size, "few rows each"


@FORMAT_NAMES
def test_a_matrix_of_many_pieces(kind: GgmlType, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = random_raw(kind, 120, 512)
    whole = pack(raw, kind, (120, 512))
    monkeypatch.setattr("worker_orcd.quant.repack.PIECE_BYTES", 3 * whole[0].nbytes)
    assert torch.equal(pack(raw, kind, (120, 512)), whole)
    assert torch.equal(unpack(whole, kind, (120, 512)), raw)


def word(tiles: torch.Tensor, byte: int) -> int:
    return int.from_bytes(bytes(tiles.flatten()[byte : byte + 4].tolist()), "little")


def one_element(kind: GgmlType, first: int, row: int, k: int, value: int) -> torch.Tensor:
    """One tile of zero bytes but for a nibble: blocks of 32, `first` the byte where nibbles begin."""
    raw = torch.zeros(16 * kind.row_bytes(TILE_K[kind]), dtype=torch.uint8)
    at = (row * TILE_K[kind] + k) // 32 * kind.block_bytes + first + k % 16
    raw[at] = value << (4 if k % 32 >= 16 else 0)
    return pack(raw, kind, (16, TILE_K[kind]))


@pytest.mark.parametrize(("row", "k"), [(0, 0), (3, 33), (11, 127), (8, 18), (15, 70)])
def test_where_a_nibble_lies(row: int, k: int) -> None:
    """k = 32·quad + 4·j + 2·hh + e; 16-byte load j // 4, word 2·(j // 2 % 2) + r, bits 4·(2·(j % 2) + hh) + 16·e."""
    quad, j, hh, e = k // 32, k % 32 // 4, k // 2 % 2, k % 2
    lane, half = 4 * (row % 8) + quad, row // 8
    byte = j // 4 * 512 + lane * 16 + 4 * (2 * (j // 2 % 2) + half)
    tiles = one_element(GgmlType.Q4_0, 2, row, k, 13)
    assert word(tiles, byte) == 13 << (4 * (2 * (j % 2) + hh) + 16 * e)
    assert int(tiles.count_nonzero()) == 1


def test_a_code_of_mxfp4_lies_under_the_bits_of_bf16() -> None:
    """Pairs 0 to 3 of a word come to 0x81C0 in each half: as they are, << 3, turned by 6, and that times 0x4108."""
    for k in range(8):
        for code in range(16):
            bits = word(one_element(GgmlType.MXFP4, 1, 0, k, code), 0)
            turned = bits << 6 & 0xFFFFFFFF | bits >> 26
            moved = (bits, bits << 3, turned, (turned & 0x001B001B) * 0x4108)[k // 2]
            assert moved & 0x81C081C0 == ((code & 8) << 12 | (code & 7) << 6) << 16 * (k % 2)


def numbers_of(first: int, second: int, third: int, fourth: int, bits: int) -> list[int]:
    return [pair >> 16 * e & (1 << bits) - 1 for pair in (first, second, third, fourth) for e in (0, 1)]


def test_where_numbers_of_5_bits_lie() -> None:
    """Three in each half of a word; the fourth, one place up, in the rest after a turn and in the word >> 10."""
    numbers = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    raw = torch.zeros(16, 88, dtype=torch.uint8)
    raw[0, 2:6] = ((numbers >> 4).view(4, 8) << torch.arange(8)).sum(1)
    raw[0, 6:22] = numbers[:16] & 15 | (numbers[16:] & 15) << 4
    tiles = pack(raw.flatten(), GgmlType.Q5_0, (16, 128))
    rest = word(tiles, 1024)
    for i in range(4):
        w, turned = word(tiles, i // 2 * 512 + i % 2 * 8), rest >> 4 * i | rest << 32 - 4 * i
        fourth = turned & 0x001E001E | w >> 10 & 0x00200020
        assert numbers_of(w, w >> 5, w >> 10, fourth >> 1, 5) == numbers[8 * i : 8 * i + 8].tolist()


def test_where_numbers_of_6_bits_lie() -> None:
    """Two in each half of a word with bits of the fourth between them; the third in a byte of the rest."""
    numbers = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:32]
    raw = torch.zeros(16, 210, dtype=torch.uint8)
    raw[0, :32], raw[0, 128:160] = numbers & 15, numbers >> 4
    tiles = pack(raw.flatten(), GgmlType.Q6_K, (16, 256))
    for i in range(4):
        w, rest = word(tiles, i // 2 * 512 + i % 2 * 8), word(tiles, 2048 + i // 2 * 8) >> 8 * (i % 2)
        fourth = w >> 4 & 0x003C003C | rest & 0x00030003
        assert numbers_of(w, w >> 10, rest >> 2, fourth, 6) == numbers[8 * i : 8 * i + 8].tolist()


def test_bytes_of_q8_0_are_stored_with_the_sign_bit_flipped() -> None:
    tiles = pack(torch.zeros(16 * 136, dtype=torch.uint8), GgmlType.Q8_0, (16, 128)).flatten()
    assert torch.equal(tiles[:2048], torch.full((2048,), 0x80, dtype=torch.uint8))
    assert not tiles[2048:].any()


@pytest.mark.parametrize("kind", SCALE_PLACES, ids=lambda kind: kind.name)
def test_scales_beyond_what_the_kernels_take_are_refused(kind: GgmlType) -> None:
    byte, factor = SCALE_PLACES[kind]
    blocks = torch.zeros(5, kind.block_bytes, dtype=torch.uint8)

    def set_scale(value: float) -> torch.Tensor:
        blocks[3, byte : byte + 2] = torch.tensor([value]).half().view(torch.uint8)
        return blocks.flatten()

    check_scales(set_scale(-1020.0 / factor), kind)
    for value in (1026.0 / factor, -1026.0 / factor, torch.inf, torch.nan):
        with pytest.raises(ModelLoadFailed, match=f"a scale of a {kind.name} tensor"):
            check_scales(set_scale(value), kind)


def test_exponents_of_mxfp4_beyond_what_the_kernels_take_are_refused() -> None:
    blocks = torch.full((5, 17), 255, dtype=torch.uint8)
    blocks[:, 0] = 144
    check_scales(blocks.flatten(), GgmlType.MXFP4)
    blocks[4, 0] = 145
    with pytest.raises(ModelLoadFailed, match="MXFP4"):
        check_scales(blocks.flatten(), GgmlType.MXFP4)
