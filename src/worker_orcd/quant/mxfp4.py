"""MXFP4: blocks of 32 four-bit floats (E2M1) under one power of two (E8M0), the OCP microscaling format."""

from __future__ import annotations

import torch
from torch import Tensor

from worker_orcd.gguf.types import GgmlType
from worker_orcd.quant.bits import nibbles


class MXFP4:
    """One E8M0 byte e, 16 bytes of nibbles: 2^(e − 127) · value. All 256 exponents are numbers, as in ggml."""

    type = GgmlType.MXFP4

    def dequantize(self, raw: Tensor) -> Tensor:
        """u8 [B, 17] → f32 [B, 32]."""
        values = _doubled_values(raw.device)
        codes = nibbles(raw[:, 1:])
        return values.index_select(0, codes.view(-1).int()).view(-1, 32).mul_(_half_scale(raw[:, :1]))


def _doubled_values(device: torch.device) -> Tensor:
    """f32 [16]: twice the value of each E2M1 code, 0 1 2 3 4 6 8 12 and their negatives.

    Doubled, so that all are integers; the scale is halved in turn. Code 8, minus zero, reads as plus zero as in
    ggml. Computed, for a table in host memory would make the device wait.
    """
    code = torch.arange(16, device=device)
    exponent, mantissa = (code >> 1) & 3, code & 1
    magnitude = torch.where(exponent == 0, mantissa, (mantissa + 2) << (exponent - 1).clamp_(min=0))
    return torch.where(code < 8, magnitude, -magnitude).float()


def _half_scale(exponents: Tensor) -> Tensor:
    """u8 [B, 1] → f32 [B, 1]: 2^(e − 128). The two smallest are subnormal, a shifted mantissa bit."""
    e = exponents.int()
    return torch.where(e < 2, 0x00200000 << e, (e - 1) << 23).view(torch.float32)
