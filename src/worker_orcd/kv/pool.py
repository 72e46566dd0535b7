"""The memory of the KV cache: one pair of tensors a layer, allocated once, zeroed, and never resized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from worker_orcd.backends.batch import LayerKV
from worker_orcd.errors import InsufficientVram


@dataclass(frozen=True)
class KVShape:
    """Size of the cache; `block_size` in tokens."""

    num_layers: int
    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        per_token = 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize
        return per_token * self.num_blocks * self.block_size


def allocate_pool(shape: KVShape, device: torch.device) -> list[LayerKV]:
    """Raises InsufficientVram with the bytes asked for."""
    size = (shape.num_blocks, shape.block_size, shape.num_kv_heads, shape.head_dim)
    try:
        return [
            LayerKV(
                torch.zeros(size, dtype=shape.dtype, device=device),
                torch.zeros(size, dtype=shape.dtype, device=device),
            )
            for _ in range(shape.num_layers)
        ]
    except torch.OutOfMemoryError as error:
        raise InsufficientVram(
            f"{shape.nbytes} bytes on {device} are needed for the KV cache; lower --context-length or "
            "--kv-cache-size-mb, or raise --vram-reserve-mb",
            needed_bytes=shape.nbytes,
            device=str(device),
        ) from error


def eraser(pool: list[LayerKV]) -> Callable[[list[int]], None]:
    """A function that zeroes blocks of `pool`, in the order of the device's stream."""

    def erase(blocks: list[int]) -> None:
        for layer in pool:
            layer.k[blocks] = 0
            layer.v[blocks] = 0

    return erase
