"""The seam between models and devices: what a backend offers.

Glossary of dimensions, used in every shape comment:
    T  rows (tokens) in the step      S  sequences in the step       R  rows that sample
    N  outputs of a matrix            K  inputs of a matrix          V  vocabulary rows
    Hq query heads                    Hk key/value heads             D  head size
    F  feed-forward width             E  experts

Numerics contract: row t of every result depends on row t of the inputs (and, in attention, on its own
sequence's cache) and on nothing else, bit for bit. The number of rows, their order and their neighbours are
not allowed to matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from worker_orcd.backends.batch import AttnBatch, Batch, LayerKV
from worker_orcd.gguf.types import GgmlType

RopeStyle = Literal["half", "interleaved"]
Activation = Literal["silu"]


@dataclass(frozen=True)
class PackedWeight:
    """A matrix [N, K] as a backend keeps it; only the backend that packed it knows what `parts` mean."""

    type: GgmlType
    shape: tuple[int, int]  # (N, K)
    parts: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class AttnSpec:
    """Constants of attention in one layer."""

    num_heads: int  # Hq
    num_kv_heads: int  # Hk, a divisor of Hq
    head_dim: int  # D
    scale: float  # multiplies q·k


@dataclass(frozen=True)
class Rope:
    """Rotation tables; row p holds the angles of position p. Dimensions beyond `2 * cos.shape[1]` pass."""

    cos: Tensor  # f32 [context, rotated dims / 2]
    sin: Tensor
    style: RopeStyle  # which two dimensions form a pair: (i, i + half) or (2i, 2i + 1)


class AttentionKernel(Protocol):
    def __call__(self, q: Tensor, kv: LayerKV, batch: AttnBatch, spec: AttnSpec) -> Tensor:
        """Causal softmax(q·kᵀ·scale)·v over the cached context: [T, Hq, D] → [T, Hq, D]."""
        ...


class Backend(Protocol):
    """About ten operations, float32 in and out, each row-invariant."""

    name: str
    device: torch.device
    attention: AttentionKernel

    def pack(self, raw: Tensor, type: GgmlType, shape: tuple[int, int]) -> PackedWeight:
        """GGUF bytes of one matrix (u8, on the device) → the backend's own form. Takes ownership of `raw`."""
        ...

    def join(self, weights: Sequence[PackedWeight]) -> PackedWeight | None:
        """One matrix with the rows of all, for inputs they share; None when they are better kept apart."""
        ...

    def embed(self, tokens: Tensor, table: PackedWeight) -> Tensor:
        """Rows of the table: i64 [T] → [T, K]."""
        ...

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
        """x · weightᵀ + bias: [T, K] → [T, N]."""
        ...

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMS norm over the last dimension: x / sqrt(mean(x²) + eps) · weight (arXiv:1910.07467)."""
        ...

    def rope_and_store(self, qkv: tuple[Tensor, Tensor, Tensor], kv: LayerKV, batch: Batch, rope: Rope) -> Tensor:
        """Rotate q [T, Hq, D] and k [T, Hk, D] (arXiv:2104.09864), store k and v, return the rotated q."""
        ...

    def activate(self, gate: Tensor, up: Tensor, kind: Activation) -> Tensor:
        """act(gate) · up, elementwise: [T, F], [T, F] → [T, F] (arXiv:2002.05202)."""
        ...
