"""Blocks small enough to work out by eye, one or more for every format."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest
import torch

from worker_orcd.errors import ModelLoadFailed
from worker_orcd.gguf.types import GgmlType
from worker_orcd.quant.format import FORMATS, format_of


def half(*numbers: float) -> bytes:
    return struct.pack(f"<{len(numbers)}e", *numbers)


def decode(kind: GgmlType, block: bytes) -> list[float]:
    assert len(block) == kind.block_bytes
    raw = torch.frombuffer(bytearray(block), dtype=torch.uint8).view(1, -1)
    values = format_of(kind).dequantize(raw)
    assert values.dtype == torch.float32
    assert values.shape == (1, kind.block_elems)
    return values[0].tolist()


def expect(values: Sequence[float], filler: float, **at: float) -> None:
    """All values are `filler` but those named e<index>."""
    wanted = [at.get(f"e{i}", filler) for i in range(len(values))]
    assert list(values) == wanted


def test_plain_numbers() -> None:
    assert decode(GgmlType.F32, struct.pack("<f", -1.5)) == [-1.5]
    assert decode(GgmlType.F16, half(0.25)) == [0.25]
    assert decode(GgmlType.F16, b"\x01\x00") == [2.0**-24]
    assert decode(GgmlType.BF16, b"\x80\x3f") == [1.0]
    assert decode(GgmlType.BF16, b"\x40\xc0") == [-3.0]


def test_q4_0() -> None:
    # byte 0: low nibble 3 is element 0, high nibble 15 is element 16; all others 8, which is zero
    expect(decode(GgmlType.Q4_0, half(0.5) + b"\xf3" + b"\x88" * 15), 0.0, e0=-2.5, e16=3.5)


def test_q4_1() -> None:
    expect(decode(GgmlType.Q4_1, half(2, -1) + b"\x00" * 15 + b"\xa1"), -1.0, e15=1.0, e31=19.0)


def test_q5_0() -> None:
    # fifth bits: element 1 (bit 1) and element 31 (bit 31); without it a nibble of 0 means -16
    block = half(1) + struct.pack("<I", 1 << 1 | 1 << 31) + b"\x00\x03" + b"\x00" * 13 + b"\x20"
    expect(decode(GgmlType.Q5_0, block), -16.0, e1=3.0, e31=2.0)


def test_q5_1() -> None:
    block = half(0.5, 10) + struct.pack("<I", 1 << 8 | 1 << 16) + b"\x10" + b"\x00" * 15
    expect(decode(GgmlType.Q5_1, block), 10.0, e8=18.0, e16=18.5)


def test_q8_0() -> None:
    expect(decode(GgmlType.Q8_0, half(0.25) + b"\x80\x7f" + bytes(29) + b"\xff"), 0.0, e0=-32, e1=31.75, e31=-0.25)


def test_mxfp4() -> None:
    codes = bytes(low | high << 4 for low, high in zip(range(16), reversed(range(16)), strict=True))
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert decode(GgmlType.MXFP4, b"\x7f" + codes) == values + values[::-1]
    assert decode(GgmlType.MXFP4, b"\x82" + codes)[:8] == [8 * value for value in values[:8]]


@pytest.mark.parametrize("exponent", range(256))
def test_mxfp4_scale_is_a_power_of_two(exponent: int) -> None:
    # code 1 is one half; the smallest products are subnormal, and 255, a NaN elsewhere, is a number in ggml
    assert decode(GgmlType.MXFP4, bytes([exponent]) + b"\x01" * 16)[0] == 2.0 ** (exponent - 128)


def k_scales(scales: Sequence[int], mins: Sequence[int]) -> bytes:
    """Eight six-bit scales and mins in the twelve bytes of Q4_K and Q5_K."""
    first = bytes(scales[i] | scales[i + 4] >> 4 << 6 for i in range(4))
    second = bytes(mins[i] | mins[i + 4] >> 4 << 6 for i in range(4))
    return first + second + bytes(scales[i + 4] & 15 | (mins[i + 4] & 15) << 4 for i in range(4))


SCALES = [1, 2, 3, 63, 5, 22, 37, 63]
MINS = [0, 1, 62, 3, 63, 21, 38, 7]


def test_q4_k() -> None:
    # bytes 0-31 hold group 0 (low) and 1 (high), bytes 32-63 groups 2 and 3, and so on
    nibbles = b"".join(bytes([low | high << 4] * 32) for low, high in [(1, 2), (3, 4), (5, 6), (7, 15)])
    q = [1, 2, 3, 4, 5, 6, 7, 15]
    wanted = [0.5 * SCALES[g] * q[g] - 0.25 * MINS[g] for g in range(8) for _ in range(32)]
    assert decode(GgmlType.Q4_K, half(0.5, 0.25) + k_scales(SCALES, MINS) + nibbles) == wanted


def test_q4_k_places_single_elements() -> None:
    nibbles = bytearray(128)
    nibbles[33] = 0xF0  # group 3, element 1
    ones = k_scales([1] * 8, [0] * 8)
    expect(decode(GgmlType.Q4_K, half(1, 1) + ones + bytes(nibbles)), 0.0, e97=15.0)


def test_q5_k() -> None:
    high, nibbles = bytearray(32), bytearray(128)
    high[4] = 1 << 0 | 1 << 7  # element 4 of groups 0 and 7
    nibbles[96 + 31] = 0x50  # element 31 of group 7
    scales = k_scales([1, 1, 1, 1, 1, 1, 1, 2], [3] + [0] * 7)
    values = decode(GgmlType.Q5_K, half(1, 0.5) + scales + bytes(high) + bytes(nibbles))
    wanted = [-1.5] * 32 + [0.0] * 224
    wanted[4], wanted[7 * 32 + 4], wanted[255] = 14.5, 32.0, 10.0
    assert values == wanted


def test_q6_k() -> None:
    low, high = bytearray(128), bytearray(64)
    low[5] = 0x70  # high nibble of byte 5: element 64 + 5
    high[5] = 0b11_01_00_10  # element 5: 2, 37: 0, 69: 1, 101: 3
    low[64] = 0x0F  # second half, element 128
    scales = struct.pack("<16b", *[1] * 4, -2, *[1] * 11)
    values = decode(GgmlType.Q6_K, bytes(low) + bytes(high) + scales + half(0.5))
    wanted = [-16.0] * 64 + [32.0] * 16 + [-16.0] * 176
    wanted[5], wanted[69], wanted[101], wanted[128] = 0.0, 9.0, 8.0, -8.5
    assert values == wanted


def test_every_needed_type_has_a_format_under_its_own_name() -> None:
    needed = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "MXFP4"]
    assert [kind.name for kind in FORMATS] == needed
    for kind, found in FORMATS.items():
        assert found.type is kind is format_of(kind).type


@pytest.mark.parametrize("kind", [kind for kind in GgmlType if kind not in FORMATS])
def test_other_types_are_refused_by_name(kind: GgmlType) -> None:
    with pytest.raises(ModelLoadFailed, match=f"type {kind.name} cannot be run, use .* Q4_K"):
        format_of(kind)
