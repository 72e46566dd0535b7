"""Plain numbers, and the formats with blocks of 32: one or two fp16 scales and 4, 5 or 8 bits an element.

`dequantize` takes the stored blocks, u8 [B, block_bytes], and gives f32 [B, block_elems] in new memory. Products
and sums are rounded one by one, as in ggml's reference, so results are the same to the last bit on any device.
Layouts follow ggml's block structs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from worker_orcd.gguf.types import GgmlType
from worker_orcd.quant.bits import bit_planes, halves, nibbles, reinterpret


class F32:
    type = GgmlType.F32

    def dequantize(self, raw: Tensor) -> Tensor:
        return reinterpret(raw, torch.float32).clone()


class F16:
    type = GgmlType.F16

    def dequantize(self, raw: Tensor) -> Tensor:
        return halves(raw)


class BF16:
    type = GgmlType.BF16

    def dequantize(self, raw: Tensor) -> Tensor:
        return reinterpret(raw, torch.bfloat16).float()


class Q4_0:  # noqa: N801 - the format's name
    """fp16 d, 16 bytes of nibbles: d · (q − 8)."""

    type = GgmlType.Q4_0

    def dequantize(self, raw: Tensor) -> Tensor:
        return nibbles(raw[:, 2:]).float().sub_(8).mul_(halves(raw[:, :2]))


class Q4_1:  # noqa: N801
    """fp16 d and m, 16 bytes of nibbles: d · q + m."""

    type = GgmlType.Q4_1

    def dequantize(self, raw: Tensor) -> Tensor:
        return nibbles(raw[:, 4:]).float().mul_(halves(raw[:, :2])).add_(halves(raw[:, 2:4]))


class Q5_0:  # noqa: N801
    """fp16 d, 32 fifth bits, 16 bytes of nibbles: d · (q − 16)."""

    type = GgmlType.Q5_0

    def dequantize(self, raw: Tensor) -> Tensor:
        return _five_bits(raw[:, 6:], raw[:, 2:6]).float().sub_(16).mul_(halves(raw[:, :2]))


class Q5_1:  # noqa: N801
    """fp16 d and m, 32 fifth bits, 16 bytes of nibbles: d · q + m."""

    type = GgmlType.Q5_1

    def dequantize(self, raw: Tensor) -> Tensor:
        q = _five_bits(raw[:, 8:], raw[:, 4:8])
        return q.float().mul_(halves(raw[:, :2])).add_(halves(raw[:, 2:4]))


class Q8_0:  # noqa: N801
    """fp16 d, 32 int8: d · q."""

    type = GgmlType.Q8_0

    def dequantize(self, raw: Tensor) -> Tensor:
        return reinterpret(raw[:, 2:], torch.int8).float().mul_(halves(raw[:, :2]))


def _five_bits(low: Tensor, fifth: Tensor) -> Tensor:
    """u8 [B, 16] nibbles and u8 [B, 4] one bit an element → u8 [B, 32] in 0..31."""
    high = bit_planes(fifth, 1).transpose(1, 2).reshape(-1, 32)  # byte j, bit i is element 8j + i
    return nibbles(low) | (high << 4)
