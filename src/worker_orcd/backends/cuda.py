"""The backend for NVIDIA GPUs: weights stay in their quantized bits, kernels of `kernels/` do the work.

Every operation is float32 in and out; matrix products take bf16 operands and add in float32. Each row's bits are its
own at every number of rows (see the kernels for how), and nothing ever leaves the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker_orcd.backends import base
from worker_orcd.backends.base import (
    Activation,
    AttentionKernel,
    AttnSpec,
    Experts,
    Heads,
    Norm,
    Operand,
    Projection,
    Rope,
    SampleKernel,
    Sums,
)
from worker_orcd.backends.batch import AttnBatch, Batch, LayerKV
from worker_orcd.backends.torch_ref import BasicAttention, normalize, sigmoid
from worker_orcd.errors import InsufficientVram
from worker_orcd.gguf.types import GgmlType
from worker_orcd.kernels.attention import FlashAttention, Form, Pages, Unrotated, can_rotate, takes
from worker_orcd.kernels.gpu import Gpu
from worker_orcd.kernels.linear.linear import Linear, TiledMatrix, check_equal_bits, tiled
from worker_orcd.kernels.linear.plan import choose_expert_slices, plan_linear
from worker_orcd.kernels.ops import ops
from worker_orcd.kernels.ops.experts import ExpertOps, Routing
from worker_orcd.kernels.ops.ops import Ops
from worker_orcd.kernels.ops.sample import SOURCE as SAMPLE
from worker_orcd.kernels.ops.sample import banned_bits, sample
from worker_orcd.quant.repack import check_scales, pack
from worker_orcd.quant.tiles import TILE_ROWS, packed_bytes


@dataclass(frozen=True)
class PackedWeight(base.PackedWeight):
    """`parts` is the one tensor of tiles; `matrix` the same with its plan."""

    matrix: TiledMatrix


class CudaBackend:
    """Operands are images of `kernels/ops`, sums the slices that the matmuls of `kernels/linear` leave."""

    def __init__(self, device: torch.device, gpu: Gpu | None = None) -> None:
        """Runs the self-test. Raises CudaError on a card that does not pass it."""
        gpu = gpu or Gpu(device)
        self.device, self._gpu = gpu.device, gpu
        self._ops, self._linear = Ops(gpu), Linear(gpu)
        self._experts = ExpertOps(gpu, self._ops)
        self._flash = FlashAttention(gpu, self._ops)
        self._basic: AttentionKernel = BasicAttention()
        check_equal_bits(self._linear, self._ops, self.device)

    def sample_kernel(self, banned: list[int], vocab_size: int) -> SampleKernel | None:
        self._gpu.compile_ahead(SAMPLE)
        bits = banned_bits(banned, vocab_size, self.device)
        return lambda logits, table, place, is_greedy: sample(self._gpu, logits, table, bits, place, is_greedy)

    def can_record(self, head_dim: int) -> bool:
        return takes(head_dim)

    def pack(self, raw: Tensor, type: GgmlType, shape: tuple[int, int], count: int = 1) -> base.PackedWeight:
        """Move the bits into tiles, on the device. Raises InsufficientVram, and ModelLoadFailed for absurd scales."""
        check_scales(raw, type)
        try:
            tiles = pack(raw, type, shape, count)
        except torch.OutOfMemoryError as error:
            raise InsufficientVram(
                f"{packed_bytes(type, shape, count)} bytes for one matrix on {self.device}"
            ) from error
        return self._weight(tiles, type, shape)

    def _weight(self, tiles: Tensor, type: GgmlType, shape: tuple[int, int]) -> PackedWeight:
        matrix = tiled(tiles, type, shape)
        self._linear.compile_ahead(matrix)
        return PackedWeight(type, shape, (tiles,), matrix)

    def join(self, weights: Sequence[base.PackedWeight], count: int = 1) -> base.PackedWeight | None:
        """None where formats, widths or the bytes of a strip differ.

        Tiles stay as they are, so all matrices but the last must end with a tile. For a moment both copies exist.
        """
        first, total = weights[0], sum(weight.shape[0] for weight in weights)
        if any(w.type is not first.type or w.shape[1] != first.shape[1] for w in weights):
            return None
        if any(w.parts[0].shape[1] != first.parts[0].shape[1] for w in weights):
            return None
        if any(w.shape[0] // count % TILE_ROWS for w in (weights if count > 1 else weights[:-1])):
            return None
        tiles = torch.cat([w.parts[0].view(count, -1, *w.parts[0].shape[1:]) for w in weights], 1).flatten(0, 1)
        return self._weight(tiles, first.type, (total, first.shape[1]))

    def embed(self, tokens: Tensor, table: base.PackedWeight, sampled: Tensor | None = None) -> Tensor:
        return self._ops.embed(tokens, table.parts[0], table.type, table.shape, sampled)

    def linear(self, x: Operand, projection: Projection) -> Sums:
        matrices, biases = [_matrix(weight) for weight, _ in projection], [bias for _, bias in projection]
        if len(matrices) == 2:
            sums: Sequence[Tensor] = self._linear.pair(x.data, x.num_rows, *matrices)
        else:
            sums = [self._linear(x.data, x.num_rows, matrix) for matrix in matrices]
        return tuple(base.Part(y, bias) for y, bias in zip(sums, biases, strict=True))

    def total(self, sums: Sums) -> Tensor:
        first = sums[0]
        if len(sums) == 1 and len(first.slices) == 1 and first.bias is None:
            return first.slices[0]
        return self._ops.total(_parts(sums))

    def norm(self, x: Tensor, norm: Norm | None) -> Operand:
        image = self._ops.to_image(x) if norm is None else self._ops.add_norm(x, None, _norm(norm))
        return _operand(image, *x.shape)

    def add(self, x: Tensor, y: Sums, after: Norm | None = None, scale: float = 1.0) -> Tensor:
        self._ops.add_norm(x, _part(y), None, _norm(after), scale)
        return x

    def add_norm(
        self, x: Tensor, y: Sums, norm: Norm | None, after: Norm | None = None, scale: float = 1.0
    ) -> tuple[Tensor, Operand]:
        if norm is None:
            return self.add(x, y, after, scale), self.norm(x, None)
        return x, _operand(self._ops.add_norm(x, _part(y), _norm(norm), _norm(after), scale), *x.shape)

    def attend(self, qkv: Sums, heads: Heads, rope: Rope, spec: AttnSpec, kv: LayerKV, batch: Batch) -> Operand:
        """In steps where every sequence has one row, one kernel does what it can; else rotation is another."""
        made_of = _unrotated(qkv, heads, rope, spec, batch)
        if made_of is not None:
            num_rows, width = batch.slots.shape[0], spec.num_heads * spec.head_dim
            image = self._ops.image(num_rows, width)
            self._flash.store_and_attend(made_of, kv.k, kv.v, _pages(batch.attn), _form(spec), spec.sinks, image)
            return _operand(image, num_rows, width)
        q = self._rope_and_store(qkv, heads, kv, batch, rope)
        if spec.query_scales is not None:
            q = q * spec.query_scales[batch.attn.positions]
        return self._attention(q, kv, batch.attn, spec)

    def _rope_and_store(self, qkv: Sums, heads: Heads, kv: LayerKV, batch: Batch, rope: Rope) -> Tensor:
        dims = heads.num_heads, heads.num_kv_heads, heads.head_dim
        if heads.q_norm is not None and len(heads.q_norm.weight) != heads.head_dim:
            qkv, heads = self._normalized(qkv, heads), Heads(*dims)
        norms = _norm(heads.q_norm), _norm(heads.k_norm)
        at, table = (batch.attn.positions, batch.slots), (rope.cos, rope.sin)
        return self._ops.rope_store(_parts(qkv), dims, norms, (kv.k, kv.v), at, table, rope.style == "interleaved")

    def _normalized(self, qkv: Sums, heads: Heads) -> Sums:
        """With norms over all heads of q and of k: rare, so the reference does."""
        widths = [n * heads.head_dim for n in (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads)]
        parts = self.total(qkv).split(widths, 1)  # type: ignore[no-untyped-call]
        norms = heads.q_norm, heads.k_norm, None
        normed = [normalize(x, norm).contiguous() for x, norm in zip(parts, norms, strict=True)]
        return tuple(base.Part(x[None], None) for x in normed)

    def _attention(self, q: Tensor, kv: LayerKV, batch: AttnBatch, spec: AttnSpec) -> Operand:
        num_rows, width = q.shape[0], q.shape[1] * q.shape[2]
        if not takes(spec.head_dim):
            found = self._basic(q, kv, batch, spec).flatten(1)
            return _operand(self._ops.to_image(found), num_rows, width)
        image = self._ops.image(num_rows, width)
        self._flash.attend(q, kv.k, kv.v, _pages(batch), _form(spec), spec.sinks, image)
        return _operand(image, num_rows, width)

    def mlp(self, x: Operand, up: Projection, down: Projection, kind: Activation, is_gated: bool = True) -> Sums:
        """One launch for each projection where its shape and the number of rows allow it, else one between them."""
        width, image = sum(weight.shape[0] for weight, _ in up) // (1 + is_gated), None
        if is_gated and len(up) == 1:
            ((weight, bias),) = up
            image = self._linear.up(x.data, x.num_rows, _matrix(weight), bias, kind)
        if image is None:
            gate_up = _parts(self.linear(x, up))
            if len(down) == 1:
                ((weight, bias),) = down
                y = self._linear.of_sums(gate_up, kind, is_gated, _matrix(weight))
                if y is not None:
                    return (base.Part(y, bias),)
            image = self._ops.activate(gate_up, width, kind, is_gated)
        return self.linear(_operand(image, x.num_rows, width), down)

    def experts(self, x: Operand, experts: Experts) -> Sums:
        scores = _parts(self.linear(x, experts.router))
        routing = self._experts.route(scores, experts.num_experts, experts.num_used, experts.is_normalized)
        spread = self._experts.spread(x.data, routing)
        given = self._mlp(spread, experts, routing)
        y = self._experts.combine(given, routing)
        shared = self._shared(x, experts)
        return (base.Part(y[None] if shared is None else torch.stack([y, shared]), None),)

    def _mlp(self, spread: Tensor, experts: Experts, routing: Routing) -> ops.Part:
        """As `mlp`, each place by its expert."""
        matrices = [(_own_matrix(weight, experts), bias) for weight, bias in experts.gate_up]
        ((weight, bias),) = experts.down
        down, kind, image = _own_matrix(weight, experts), experts.activation, None
        if len(matrices) == 1:
            image = self._experts.up(spread, *matrices[0], routing, kind)
        if image is None:
            gate_up = [self._experts.multiply(spread, matrix, bias, routing) for matrix, bias in matrices]
            given = self._experts.of_sums(gate_up, kind, down, bias, routing)
            if given is not None:
                return given
            image = self._ops.activate(gate_up, down.shape[1], kind, places=routing.places)
        return self._experts.multiply(image, down, bias, routing)

    def _shared(self, x: Operand, experts: Experts) -> Tensor | None:
        shared = experts.shared
        if shared is None:
            return None
        y = self.mlp(x, shared.gate_up, shared.down, experts.activation)
        return self.total(y) * sigmoid(self.total(self.linear(x, shared.gate)))


def _matrix(weight: base.PackedWeight) -> TiledMatrix:
    assert isinstance(weight, PackedWeight)
    return weight.matrix


def _unrotated(qkv: Sums, heads: Heads, rope: Rope, spec: AttnSpec, batch: Batch) -> Unrotated | None:
    """What attention of single rows can add up, rotate and store itself."""
    is_decode = batch.slots.shape == batch.attn.context_lens.shape  # a sequence has at least one row
    has_more = any(x is not None for x in (heads.q_norm, heads.k_norm, spec.query_scales))
    if has_more or not (is_decode and can_rotate(spec.head_dim, rope.cos.shape[1])):
        return None
    return Unrotated(_parts(qkv), rope.cos, rope.sin, rope.style == "interleaved")


def _form(spec: AttnSpec) -> Form:
    return Form(spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.scale, spec.window, spec.soft_cap)


def _pages(batch: AttnBatch) -> Pages:
    return Pages(batch.query_starts, batch.context_lens, batch.block_table)


def _own_matrix(weight: base.PackedWeight, experts: Experts) -> TiledMatrix:
    """That of each expert. A row's experts fill the card together, so K is cut as for all their rows."""
    n, k = weight.shape[0] // experts.num_experts, weight.shape[1]
    plan = plan_linear(n, k, weight.type, choose_expert_slices(n, k, weight.type, experts.num_used))
    return TiledMatrix(weight.type, (n, k), weight.parts[0], plan, experts.num_experts)


def _operand(image: Tensor | None, num_rows: int, width: int) -> Operand:
    assert image is not None
    return Operand(image, num_rows, width)


def _parts(sums: Sums) -> list[ops.Part]:
    return [ops.Part(part.slices, part.bias) for part in sums]


def _part(sums: Sums) -> ops.Part:
    (part,) = sums  # what is added to the residual stream comes from one matrix
    return ops.Part(part.slices, part.bias)


def _norm(norm: Norm | None) -> ops.Norm | None:
    return None if norm is None else (norm.weight, norm.bias, norm.eps)
