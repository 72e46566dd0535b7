"""The K formats: blocks of 256 in groups, whose 6- or 8-bit scales are themselves scaled by one fp16 a block.

Shapes and rounding as in `block32`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from worker_orcd.gguf.types import GgmlType
from worker_orcd.quant.bits import bit_planes, halves, nibbles, reinterpret


class Q4_K:  # noqa: N801 - the format's name
    """fp16 d and dmin, 12 bytes of scales and mins, 128 of nibbles; 8 groups of 32: d · sc · q − dmin · m."""

    type = GgmlType.Q4_K

    def dequantize(self, raw: Tensor) -> Tensor:
        q = nibbles(raw[:, 16:].reshape(-1, 4, 32)).view(-1, 8, 32)
        return _scale_and_shift(q, raw)


class Q5_K:  # noqa: N801
    """As Q4_K, with 32 bytes of fifth bits before the nibbles: bit g of byte j is of element j of group g."""

    type = GgmlType.Q5_K

    def dequantize(self, raw: Tensor) -> Tensor:
        q = nibbles(raw[:, 48:].reshape(-1, 4, 32)).view(-1, 8, 32)
        q |= bit_planes(raw[:, 16:48], 1) << 4
        return _scale_and_shift(q, raw)


class Q6_K:  # noqa: N801
    """128 bytes of low nibbles, 64 of high pairs, 16 int8 scales, fp16 d; groups of 16: d · sc · (q − 32)."""

    type = GgmlType.Q6_K

    def dequantize(self, raw: Tensor) -> Tensor:
        q = nibbles(raw[:, :128].reshape(-1, 2, 64)).view(-1, 2, 4, 32)
        q |= bit_planes(raw[:, 128:192].reshape(-1, 2, 32), 2) << 4
        scales = reinterpret(raw[:, 192:208], torch.int8).float().mul_(halves(raw[:, 208:]))
        return q.view(-1, 16, 16).float().sub_(32).mul_(scales.unsqueeze(-1)).view(-1, 256)


def _scale_and_shift(q: Tensor, raw: Tensor) -> Tensor:
    """u8 [B, 8, 32] elements, u8 [B, 16+] block starts → f32 [B, 256]."""
    scales, mins = _scales_and_mins(raw[:, 4:16])
    scales = scales.float().mul_(halves(raw[:, :2])).unsqueeze(-1)
    mins = mins.float().mul_(halves(raw[:, 2:4])).unsqueeze(-1)
    return q.float().mul_(scales).sub_(mins).view(-1, 256)


def _scales_and_mins(packed: Tensor) -> tuple[Tensor, Tensor]:
    """u8 [B, 12] → two u8 [B, 8] in 0..63.

    Groups 0-3 keep their six bits in bytes 0-3 (scale) and 4-7 (min). Groups 4-7 keep the low four in the
    nibbles of bytes 8-11 and the high two on top of the bytes of groups 0-3.
    """
    first, second, low = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat((first & 0x3F, (low & 0x0F) | ((first >> 2) & 0x30)), dim=-1)
    mins = torch.cat((second & 0x3F, (low >> 4) | ((second >> 2) & 0x30)), dim=-1)
    return scales, mins
