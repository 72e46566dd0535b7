"""The seam between models and devices: what a backend offers.

Glossary of dimensions, used in every shape comment:
    T  rows (tokens) in the step      S  sequences in the step       R  rows that sample
    N  outputs of a matrix            K  inputs of a matrix          V  vocabulary rows
    Hq query heads                    Hk key/value heads             D  head size
    F  feed-forward width             E  experts

A step flows through four forms: the residual stream, float32 [T, K]; an `Operand`, what a product multiplies; `Sums`,
what it gives; queries, float32 [T, Hq, D]. Operations hand them on without a round through a common form, so that a
backend can keep operands in the order its products read and leave sums to be added up by whoever reads them.

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
Activation = Literal["silu", "gelu", "gelu_tanh", "clamped"]


@dataclass(frozen=True)
class PackedWeight:
    """A matrix [N, K] as a backend keeps it; only the backend that packed it knows what `parts` mean."""

    type: GgmlType
    shape: tuple[int, int]  # (N, K)
    parts: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


Projection = tuple[tuple[PackedWeight, Tensor | None], ...]  # matrices and biases whose outputs stand side by side


@dataclass(frozen=True)
class Operand:
    """What a product multiplies: `num_rows` rows of `width` numbers, in the form this backend's products read."""

    data: Tensor
    num_rows: int
    width: int


@dataclass(frozen=True)
class Part:
    """Outputs of one matrix: the sum over `slices` in their order, plus the bias."""

    slices: Tensor  # f32 [slices, T, N]
    bias: Tensor | None  # f32 [N]


Sums = tuple[Part, ...]  # side by side


@dataclass(frozen=True)
class Norm:
    """x / sqrt(mean(x²) + eps) · weight (arXiv:1910.07467); with a bias, x - mean(x) for x (arXiv:1607.06450)."""

    weight: Tensor  # f32 [K]
    eps: float
    bias: Tensor | None = None  # f32 [K]


@dataclass(frozen=True)
class Heads:
    """How the outputs of the qkv projection are cut: Hq, Hk and Hk heads of D numbers.

    A norm of D numbers acts on each head, one of all heads' numbers on all of them together.
    """

    num_heads: int  # Hq
    num_kv_heads: int  # Hk, a divisor of Hq
    head_dim: int  # D
    q_norm: Norm | None = None
    k_norm: Norm | None = None


@dataclass(frozen=True)
class SharedExpert:
    """A gated MLP that every row takes, weighted by σ(gate)."""

    gate: Projection  # [1, K]
    gate_up: Projection  # gate and up, [F', K] each
    down: Projection  # [K, F']


@dataclass(frozen=True)
class Experts:
    """E gated MLPs, of which a row takes those that a router scores highest (arXiv:1701.06538).

    The matrices of all experts lie one under the other, and so do their biases: expert e owns the rows e·N to
    (e + 1)·N - 1 of each.
    """

    num_experts: int  # E
    num_used: int  # by a row
    is_normalized: bool  # a row weights experts by the softmax over those it takes; else over all
    router: Projection  # [E, K]
    gate_up: Projection  # gate and up, [E F, K] each; or joined, [E 2F, K]
    down: Projection  # [E K, F]
    activation: Activation
    shared: SharedExpert | None = None


@dataclass(frozen=True)
class AttnSpec:
    """Constants of attention in one layer."""

    num_heads: int  # Hq
    num_kv_heads: int  # Hk, a divisor of Hq
    head_dim: int  # D
    scale: float  # multiplies q·k
    window: int = 0  # a query sees the last `window` positions, its own included; 0: all of them
    soft_cap: float = 0.0  # scores become cap · tanh(score / cap); 0: they do not
    sinks: Tensor | None = None  # f32 [Hq], a logit that takes part in the softmax and has no value
    query_scales: Tensor | None = None  # f32 [context, 1, 1], a factor of the rotated queries at each position


@dataclass(frozen=True)
class Rope:
    """Rotation tables; row p holds the angles of position p. Dimensions beyond `2 * cos.shape[1]` pass: maybe all."""

    cos: Tensor  # f32 [context, rotated dims / 2]
    sin: Tensor
    style: RopeStyle  # which two dimensions form a pair: (i, i + half) or (2i, 2i + 1)


class AttentionKernel(Protocol):
    def __call__(self, q: Tensor, kv: LayerKV, batch: AttnBatch, spec: AttnSpec) -> Tensor:
        """Causal softmax(q·kᵀ·scale)·v over the cached context: [T, Hq, D] → [T, Hq, D]."""
        ...


class SampleKernel(Protocol):
    def __call__(self, logits: Tensor, table: Tensor, place: Tensor | None, is_greedy: bool) -> Tensor:
        """Next tokens: f32 [R, V] → i64 [2, R], tokens, and whether the row's logits are finite.

        table f64 [6, R]: temperature, greedy (0 or 1), top-k, top-p, min-p, the draw in [0, 1). The result is the
        beginning of `place` i64, if it is given and has room. `is_greedy`: every row is; it may help to know.
        """
        ...


class Backend(Protocol):
    """About ten operations, each row-invariant."""

    device: torch.device

    def sample_kernel(self, banned: list[int], vocab_size: int) -> SampleKernel | None:
        """What draws tokens, of which `banned` never wins; None: engine/sampler.py is to do it with torch."""
        ...

    def can_record(self, head_dim: int) -> bool:
        """Whether steps never wait for the device, so that they can be recorded as a CUDA graph."""
        ...

    def pack(self, raw: Tensor, type: GgmlType, shape: tuple[int, int], count: int = 1) -> PackedWeight:
        """GGUF bytes of one matrix (u8, on the device) → the backend's own form. Takes ownership of `raw`.

        Its rows may be those of `count` matrices, one under the other.
        """
        ...

    def join(self, weights: Sequence[PackedWeight], count: int = 1) -> PackedWeight | None:
        """One matrix with the rows of all, for inputs they share; None when they are better kept apart.

        Each may be `count` matrices, one under the other: then it is first of all the first of each, side by side.
        """
        ...

    def embed(self, tokens: Tensor, table: PackedWeight, sampled: Tensor | None = None) -> Tensor:
        """Rows of the table: i64 [T] → [T, K]; for a token -1 - r that of `sampled` [r]."""
        ...

    def linear(self, x: Operand, projection: Projection) -> Sums:
        """x · weightᵀ + bias for each matrix: [T, K] → [T, N]."""
        ...

    def total(self, sums: Sums) -> Tensor:
        """The sums added up: f32 [T, N]."""
        ...

    def norm(self, x: Tensor, norm: Norm | None) -> Operand:
        """[T, K] normalized over K; None: as it is."""
        ...

    def add(self, x: Tensor, y: Sums, after: Norm | None = None, scale: float = 1.0) -> Tensor:
        """x + scale · after(y): f32 [T, K]. `x` may be overwritten."""
        ...

    def add_norm(
        self, x: Tensor, y: Sums, norm: Norm | None, after: Norm | None = None, scale: float = 1.0
    ) -> tuple[Tensor, Operand]:
        """As `add`, and that as `norm`. `x` may be overwritten."""
        ...

    def attend(self, qkv: Sums, heads: Heads, rope: Rope, spec: AttnSpec, kv: LayerKV, batch: Batch) -> Operand:
        """Rotate q and k (arXiv:2104.09864), store k and v; causal softmax(q·kᵀ·scale)·v over the cached context.

        [T, (Hq + 2 Hk) D] → [T, Hq D], heads side by side.
        """
        ...

    def mlp(self, x: Operand, up: Projection, down: Projection, kind: Activation, is_gated: bool = True) -> Sums:
        """down · (act(gate) · up), for the first and the second half of the products with `up` (arXiv:2002.05202).

        [T, K] → [T, K]. Not gated: down · act(up). "silu" is x · σ(x); "gelu" x · Φ(x), and "gelu_tanh" its
        approximation x · σ(2u), u = √(2/π) (x + 0.044715 x³) (arXiv:1606.08415). "clamped", always gated, is
        σ(1.702 gate) · gate · (up + 1), with gate at most 7 and up within ±7 (arXiv:2508.10925).
        """
        ...

    def experts(self, x: Operand, experts: Experts) -> Sums:
        """What each row's experts give, weighted: [T, K] → [T, K].

        Added up in the order of their scores, equal ones by index, the shared expert last.
        """
        ...


def value_of(part: Part) -> Tensor:
    """A part added up in its order: f32 [T, N]."""
    total = part.slices[0]
    for piece in part.slices[1:]:
        total = total + piece
    return total if part.bias is None else total + part.bias
