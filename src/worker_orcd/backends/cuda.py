"""The backend for NVIDIA GPUs: weights stay in their quantized bits, kernels of `kernels/` do the work.

Every operation is float32 in and out; matrix products take bf16 operands and add in float32. Each row's bits are its
own at every number of rows (see the kernels for how), and nothing ever leaves the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker_orcd.backends.base import Activation, AttentionKernel, AttnSpec, PackedWeight, Rope
from worker_orcd.backends.batch import AttnBatch, Batch, LayerKV
from worker_orcd.backends.torch_ref import BasicAttention
from worker_orcd.errors import InsufficientVram
from worker_orcd.gguf.types import GgmlType
from worker_orcd.kernels.attention import Form, Pages, attend
from worker_orcd.kernels.linear.linear import Linear, TiledMatrix, check_equal_bits, tiled
from worker_orcd.kernels.ops.ops import Ops
from worker_orcd.quant.repack import check_scales, gather_rows, pack
from worker_orcd.quant.tiles import TILE_ROWS, packed_bytes

HEAD_DIM_STEP, MAX_HEAD_DIM = 16, 256


@dataclass(frozen=True)
class CudaWeight(PackedWeight):
    """`parts` is the one tensor of tiles; `matrix` the same with its plan."""

    matrix: TiledMatrix


class CudaBackend:
    name = "cuda"

    def __init__(self, device: torch.device) -> None:
        """Compiles and runs the self-test. Raises CudaError on a card that does not pass it."""
        self.device = device
        self._linear, self._ops = Linear(device), Ops(device)
        self.attention: AttentionKernel = FlashAttention()
        check_equal_bits(self._linear)

    def pack(self, raw: Tensor, type: GgmlType, shape: tuple[int, int]) -> PackedWeight:
        """Move the bits into tiles, on the device. Raises InsufficientVram, and ModelLoadFailed for absurd scales."""
        check_scales(raw, type)
        try:
            tiles = pack(raw, type, shape)
        except torch.OutOfMemoryError as error:
            raise InsufficientVram(f"{packed_bytes(type, shape)} bytes for one matrix on {self.device}") from error
        return self._weight(tiles, type, shape)

    def _weight(self, tiles: Tensor, type: GgmlType, shape: tuple[int, int]) -> CudaWeight:
        matrix = tiled(tiles, type, shape)
        self._linear.compile_ahead(matrix)
        return CudaWeight(type, shape, (tiles,), matrix)

    def join(self, weights: Sequence[PackedWeight]) -> PackedWeight | None:
        """One matrix with the rows of all, for inputs they share; None where formats or widths differ.

        Tiles stay as they are, so all matrices but the last must end with a tile. For a moment both copies exist.
        """
        first, total = weights[0], sum(weight.shape[0] for weight in weights)
        if any(w.type is not first.type or w.shape[1] != first.shape[1] for w in weights):
            return None
        if any(w.shape[0] % TILE_ROWS for w in weights[:-1]):
            return None
        tiles = torch.cat([weight.parts[0] for weight in weights])
        return self._weight(tiles, first.type, (total, first.shape[1]))

    def embed(self, tokens: Tensor, table: PackedWeight) -> Tensor:
        return gather_rows(table.parts[0], table.type, table.shape[1], tokens)

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
        assert isinstance(weight, CudaWeight)
        return self._linear(x.contiguous(), weight.matrix, bias)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._ops.norm(x, weight, eps)

    def rope_and_store(self, qkv: tuple[Tensor, Tensor, Tensor], kv: LayerKV, batch: Batch, rope: Rope) -> Tensor:
        at = batch.attn.positions, batch.slots
        return self._ops.rope_store(qkv, (kv.k, kv.v), at, (rope.cos, rope.sin), rope.style == "interleaved")

    def activate(self, gate: Tensor, up: Tensor, kind: Activation) -> Tensor:
        assert kind == "silu"
        return self._ops.silu_times(gate, up)


class FlashAttention:
    """kernels/attention.py; head sizes the tensor cores cannot take go to the reference."""

    def __init__(self) -> None:
        self._basic = BasicAttention()

    def __call__(self, q: Tensor, kv: LayerKV, batch: AttnBatch, spec: AttnSpec) -> Tensor:
        if spec.head_dim % HEAD_DIM_STEP or spec.head_dim > MAX_HEAD_DIM:
            return self._basic(q, kv, batch, spec)
        form = Form(spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.scale)
        pages = Pages(batch.query_starts, batch.context_lens, batch.block_table)
        return attend(q.contiguous(), kv.k, kv.v, pages, form)
