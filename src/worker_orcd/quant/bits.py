"""The bit tricks that block formats share. B is the number of blocks; all work on the tensor's own device."""

from __future__ import annotations

import torch
from torch import Tensor


def reinterpret(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """u8 [B, n * itemsize], any strides → `dtype` [B, n] of the same bits (little-endian)."""
    raw = raw.contiguous()
    if raw.storage_offset() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype)


def halves(raw: Tensor) -> Tensor:
    """u8 [B, 2n] holding fp16 numbers → f32 [B, n]."""
    return reinterpret(raw, torch.float16).float()


def nibbles(packed: Tensor) -> Tensor:
    """u8 [..., n] → u8 [..., 2n]: all low nibbles, then all high nibbles."""
    return torch.cat((packed & 0x0F, packed >> 4), dim=-1)


def bit_planes(packed: Tensor, width: int) -> Tensor:
    """u8 [..., n] → u8 [..., 8 / width, n]: plane i holds bits i * width and up of every byte."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-2) >> shifts.unsqueeze(-1)).bitwise_and_(2**width - 1)
