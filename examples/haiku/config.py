"""The shape of the haiku model; row lengths are multiples of 256, as K-quants ask."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    vocab_size: int = 3072
    width: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 1024
    context: int = 2048
    rope_base: float = 10000.0
    norm_eps: float = 1e-6

    @property
    def head_size(self) -> int:
        return self.width // self.heads
