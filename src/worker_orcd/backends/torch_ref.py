"""The reference backend: plain torch, float32, CPU or CUDA. What every kernel is compared with.

How a row stays independent of its neighbours, bit for bit:
  - matrix products are always computed for exactly ROW_TILE rows (short tiles are padded with zeros), because
    a BLAS library picks its kernel, and with it the order of addition, by the shape. That the position of a
    row inside such a tile does not matter either is measured for every shape of a matrix, not assumed; where it
    does matter, the tile is a single row;
  - attention cuts the context at multiples of SPLIT positions and combines the pieces in order with a running
    maximum and sum (arXiv:2205.14135), so every product has one shape at every context length, and a piece
    that is wholly masked for a row multiplies by one and adds zero;
  - sums over a row are taken in the same tiles, since on a GPU the number of rows decides how a sum is cut, and
    a row at a time where rows are no multiple of 16 bytes, since there the alignment decides it too;
  - silu is written with exp, since torch's own uses a different formula for the elements left over by the
    vector width, which depend on the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import pi, sqrt

import torch
from torch import Tensor

from worker_orcd.backends.base import (
    Activation,
    AttentionKernel,
    AttnSpec,
    Experts,
    Heads,
    Norm,
    Operand,
    PackedWeight,
    Part,
    Projection,
    Rope,
    SampleKernel,
    Sums,
    value_of,
)
from worker_orcd.backends.batch import AttnBatch, Batch, LayerKV, token_ids
from worker_orcd.errors import InsufficientVram
from worker_orcd.gguf.types import GgmlType
from worker_orcd.quant.format import format_of

ROW_TILE = 4  # rows a matrix product takes: a prompt reads the weights once for 4, one row pays little for it
QUERY_TILE = 8  # rows attention takes
SPLIT = 256  # positions
PIECE_ELEMS = 2**20  # elements dequantized at once
MASKED = float("-inf")
CLAMP, CLAMPED_SLOPE = 7.0, 1.702  # of the "clamped" activation
LOWEST = -1e30  # a running maximum before anything was seen; finite, so that differences are defined


class TorchBackend:
    """float32 on dequantized weights; correct and readable, not fast, and four bytes a weight."""

    def __init__(self, device: torch.device) -> None:
        torch.backends.cuda.matmul.allow_tf32 = False
        self.device = device
        self._attention: AttentionKernel = BasicAttention()
        self._row_tiles: dict[tuple[int, int], int] = {}

    def sample_kernel(self, banned: list[int], vocab_size: int) -> SampleKernel | None:  # noqa: ARG002
        return None

    def can_record(self, head_dim: int) -> bool:  # noqa: ARG002
        return False

    def pack(self, raw: Tensor, type: GgmlType, shape: tuple[int, int], count: int = 1) -> PackedWeight:  # noqa: ARG002
        """Dequantize to float32 [N, K]. Raises InsufficientVram when the device has no room for it."""
        try:
            matrix = dequantize(raw, type).view(shape)
        except torch.OutOfMemoryError as error:
            raise InsufficientVram(f"{shape[0] * shape[1] * 4} bytes for one matrix on {self.device}") from error
        return PackedWeight(type, shape, (matrix,))

    def join(self, weights: Sequence[PackedWeight], count: int = 1) -> PackedWeight | None:  # noqa: ARG002 - no gain
        return None

    def embed(self, tokens: Tensor, table: PackedWeight, sampled: Tensor | None = None) -> Tensor:
        return table.parts[0][token_ids(tokens, sampled)]

    def linear(self, x: Operand, projection: Projection) -> Sums:
        return tuple(Part(self._product(x.data, weight)[None], bias) for weight, bias in projection)

    def _product(self, x: Tensor, weight: PackedWeight) -> Tensor:
        if weight.shape not in self._row_tiles:
            self._row_tiles[weight.shape] = ROW_TILE if _is_row_invariant(weight.parts[0]) else 1
        return tiled_matmul(x, weight.parts[0], self._row_tiles[weight.shape])

    def total(self, sums: Sums) -> Tensor:
        parts = [value_of(part) for part in sums]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def norm(self, x: Tensor, norm: Norm | None) -> Operand:
        return _operand(normalize(x, norm))

    def add(self, x: Tensor, y: Sums, after: Norm | None = None, scale: float = 1.0) -> Tensor:
        return x + normalize(self.total(y), after) * scale

    def add_norm(
        self, x: Tensor, y: Sums, norm: Norm | None, after: Norm | None = None, scale: float = 1.0
    ) -> tuple[Tensor, Operand]:
        x = self.add(x, y, after, scale)
        return x, self.norm(x, norm)

    def attend(self, qkv: Sums, heads: Heads, rope: Rope, spec: AttnSpec, kv: LayerKV, batch: Batch) -> Operand:
        q = self.rope_and_store(qkv, heads, kv, batch, rope)
        if spec.query_scales is not None:
            q = q * spec.query_scales[batch.attn.positions]
        return _operand(self._attention(q, kv, batch.attn, spec).flatten(1))

    def rope_and_store(self, qkv: Sums, heads: Heads, kv: LayerKV, batch: Batch, rope: Rope) -> Tensor:
        """The first half of `attend`: → the rotated q [T, Hq, D]."""
        q, k, v = cut(self.total(qkv), heads)
        q, k = _normalize_heads(q, heads.q_norm), _normalize_heads(k, heads.k_norm)
        cos = rope.cos[batch.attn.positions].unsqueeze(1)  # [T, 1, half]
        sin = rope.sin[batch.attn.positions].unsqueeze(1)
        kv.k.view(-1, *kv.k.shape[2:])[batch.slots] = _rotate(k, cos, sin, rope).to(kv.k.dtype)
        kv.v.view(-1, *kv.v.shape[2:])[batch.slots] = v.to(kv.v.dtype)
        return _rotate(q, cos, sin, rope)

    def mlp(self, x: Operand, up: Projection, down: Projection, kind: Activation, is_gated: bool = True) -> Sums:
        return self.linear(self.activate(self.linear(x, up), kind, is_gated), down)

    def activate(self, gate_up: Sums, kind: Activation, is_gated: bool = True) -> Operand:
        x = self.total(gate_up)
        if not is_gated:
            return _operand(FUNCTIONS[kind](x))
        gate, up = x.chunk(2, 1)
        if kind == "clamped":
            gate, up = gate.clamp(max=CLAMP), up.clamp(-CLAMP, CLAMP)
            return _operand(gate * sigmoid(CLAMPED_SLOPE * gate) * (up + 1.0))
        return _operand(FUNCTIONS[kind](gate) * up)

    def experts(self, x: Operand, experts: Experts) -> Sums:
        """Expert by expert, its rows together."""
        scores = self.total(self.linear(x, experts.router))
        chosen, weights = choose(scores, experts)  # [T, used] each
        out = x.data.new_zeros(experts.num_used, *x.data.shape)
        for expert in sorted(set(chosen.flatten().tolist())):
            rows, slots = (chosen == expert).nonzero(as_tuple=True)
            gate_up, down = (part_of(p, expert, experts.num_experts) for p in (experts.gate_up, experts.down))
            y = self._mlp(_operand(x.data[rows]), gate_up, down, experts.activation)
            out[slots, rows] = y * weights[rows, slots, None]
        if experts.shared is not None:
            shared = experts.shared
            y = self._mlp(x, shared.gate_up, shared.down, experts.activation)
            out = torch.cat([out, (y * sigmoid(self.total(self.linear(x, shared.gate))))[None]])
        return (Part(out, None),)

    def _mlp(self, x: Operand, gate_up: Projection, down: Projection, activation: Activation) -> Tensor:
        return self.total(self.mlp(x, gate_up, down, activation))


def _operand(x: Tensor) -> Operand:
    return Operand(x, *x.shape)


def sigmoid(x: Tensor) -> Tensor:
    return 1.0 / (1.0 + torch.exp(-x))


def choose(scores: Tensor, experts: Experts) -> tuple[Tensor, Tensor]:
    """Router scores [T, E] → the experts of each row, best first, i64 [T, used], and their weights."""
    ordered, index = scores.sort(dim=-1, descending=True, stable=True)
    weighed = ordered[:, : experts.num_used] if experts.is_normalized else ordered
    exps = torch.exp(weighed - weighed[:, :1])
    total = by_rows(exps, lambda tile: tile.sum(-1, keepdim=True))
    return index[:, : experts.num_used], exps[:, : experts.num_used] / total


def part_of(projection: Projection, expert: int, num_experts: int) -> Projection:
    """One expert's rows, as views."""
    found = []
    for weight, bias in projection:
        matrix = weight.parts[0].view(num_experts, -1, weight.shape[1])[expert]
        own = PackedWeight(weight.type, (matrix.shape[0], matrix.shape[1]), (matrix,))
        found.append((own, None if bias is None else bias.view(num_experts, -1)[expert]))
    return tuple(found)


def gelu_tanh(x: Tensor) -> Tensor:
    return x / (1.0 + torch.exp(-2.0 * sqrt(2.0 / pi) * (x + 0.044715 * x * x * x)))


FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1.0 + torch.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1.0 + torch.erf(x * sqrt(0.5))),
    "gelu_tanh": gelu_tanh,
}


def normalize(x: Tensor, norm: Norm | None) -> Tensor:
    """Over the last dimension."""
    if norm is None:
        return x
    if norm.bias is not None:
        x = x - by_rows(x, lambda tile: tile.mean(-1, keepdim=True))
    mean = by_rows(x, lambda tile: tile.square().mean(-1, keepdim=True))
    x = x * (mean + norm.eps).rsqrt() * norm.weight
    return x if norm.bias is None else x + norm.bias


def _normalize_heads(x: Tensor, norm: Norm | None) -> Tensor:
    """x [T, H, D]: each head, or all of them together where the norm is as wide."""
    if norm is None or len(norm.weight) == x.shape[2]:
        return normalize(x, norm)
    return normalize(x.flatten(1), norm).view_as(x)


def cut(qkv: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """[T, (Hq + 2 Hk) D] → q [T, Hq, D], k and v [T, Hk, D]."""
    by_head = qkv.reshape(len(qkv), -1, heads.head_dim)
    q, k, v = by_head.split([heads.num_heads, heads.num_kv_heads, heads.num_kv_heads], 1)  # type: ignore[no-untyped-call]
    return q, k, v


def dequantize(raw: Tensor, type: GgmlType) -> Tensor:
    """GGUF bytes u8 [n] → float32, a piece at a time: the temporaries of a whole head would dwarf it."""
    blocks = raw.view(-1, type.block_bytes)
    out = torch.empty(len(blocks), type.block_elems, device=raw.device)
    piece = PIECE_ELEMS // type.block_elems
    for start in range(0, len(blocks), piece):
        out[start : start + piece] = format_of(type).dequantize(blocks[start : start + piece])
    return out


def by_tiles(x: Tensor, rows: int, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function` of x [T, ...], always asked for exactly `rows` rows. Tiles are copies, so equally aligned."""
    pieces = []
    for start in range(0, max(1, x.shape[0]), rows):
        piece = x[start : start + rows]
        tile = x.new_zeros(rows, *x.shape[1:])
        tile[: len(piece)] = piece
        pieces.append(function(tile)[: len(piece)])
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def by_rows(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A reduction over the last dimension of float32 x [T, ...], of which each row gets the bits it gets alone."""
    return by_tiles(x, ROW_TILE if x.shape[-1] % 4 == 0 else 1, function)


def tiled_matmul(x: Tensor, matrix: Tensor, rows: int) -> Tensor:
    """x [T, K] · matrix [N, K]ᵀ → [T, N]. Weights come first: as second operand BLAS would repack them."""
    return by_tiles(x, rows, lambda tile: torch.mm(matrix, tile.T).T)


def _is_row_invariant(matrix: Tensor) -> bool:
    """Whether a row gives the same bits at every place of a tile, among other neighbours."""
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(ROW_TILE, matrix.shape[1], generator=generator, device="cpu").to(matrix.device)
    y = tiled_matmul(x, matrix, ROW_TILE)
    shifted = [tiled_matmul(x.roll(shift, 0), matrix, ROW_TILE).roll(-shift, 0) for shift in range(1, ROW_TILE)]
    alone = tiled_matmul(x[-1:], matrix, ROW_TILE)
    return all(torch.equal(y, other) for other in shifted) and torch.equal(alone[0], y[-1])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, rope: Rope) -> Tensor:
    """Turn each pair of dimensions by its angle: x [T, H, D], cos and sin [T, 1, half]."""
    half = cos.shape[-1]
    out = x.clone()
    first, second = (
        (slice(0, half), slice(half, 2 * half))
        if rope.style == "half"
        else (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    )
    a, b = x[..., first], x[..., second]
    out[..., first] = a * cos - b * sin
    out[..., second] = a * sin + b * cos
    return out


class BasicAttention:
    """Attention sequence by sequence, QUERY_TILE query rows and SPLIT keys at a time."""

    def __call__(self, q: Tensor, kv: LayerKV, batch: AttnBatch, spec: AttnSpec) -> Tensor:
        out = torch.empty_like(q)
        starts, lens = batch.query_starts.tolist(), batch.context_lens.tolist()
        for s, context_len in enumerate(lens):
            k, v = _gather(kv, batch.block_table[s], batch.block_size, context_len)
            for start in range(starts[s], starts[s + 1], QUERY_TILE):
                rows = slice(start, min(start + QUERY_TILE, starts[s + 1]))
                out[rows] = _attend(q[rows], batch.positions[rows], k, v, spec)
        return out


def _gather(kv: LayerKV, blocks: Tensor, block_size: int, context_len: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one sequence, padded to whole splits: [splits, Hk, SPLIT, D] each."""
    padded = -(-context_len // SPLIT) * SPLIT
    positions = torch.arange(padded, device=blocks.device).clamp_(max=context_len - 1)
    slots = blocks[positions // block_size] * block_size + positions % block_size

    def pick(cache: Tensor) -> Tensor:
        heads, dim = cache.shape[2:]
        rows = cache.view(-1, heads, dim)[slots].float()
        return rows.view(-1, SPLIT, heads, dim).transpose(1, 2).contiguous()

    return pick(kv.k), pick(kv.v)


def _attend(q: Tensor, positions: Tensor, k: Tensor, v: Tensor, spec: AttnSpec) -> Tensor:
    """q [n ≤ QUERY_TILE, Hq, D] against k, v [splits, Hk, SPLIT, D] → [n, Hq, D]."""
    n, heads, dim = q.shape
    group = heads // spec.num_kv_heads
    tile = q.new_zeros(QUERY_TILE, spec.num_kv_heads, group, dim)
    tile[:n] = q.view(n, spec.num_kv_heads, group, dim)
    tile = tile.permute(1, 0, 2, 3).reshape(spec.num_kv_heads, QUERY_TILE * group, dim)
    row_positions = torch.full((QUERY_TILE,), -1, device=q.device)
    row_positions[:n] = positions
    row_positions = row_positions.repeat_interleave(group)[:, None]

    peak, total = _before_any_key(tile, spec)
    acc = torch.zeros_like(tile)
    offsets = torch.arange(SPLIT, device=q.device)
    for split in range(k.shape[0]):
        scores = torch.bmm(tile, k[split].transpose(1, 2)) * spec.scale
        if spec.soft_cap:
            scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
        behind = row_positions - (split * SPLIT + offsets)
        hidden = (behind < 0) | (behind >= spec.window) if spec.window else behind < 0
        scores = scores.masked_fill(hidden, MASKED)
        new_peak = torch.maximum(peak, scores.amax(-1, keepdim=True))
        weights = torch.exp(scores - new_peak)
        rescale = torch.exp(peak - new_peak)
        total = total * rescale + weights.sum(-1, keepdim=True)
        acc = acc * rescale + torch.bmm(weights, v[split])
        peak = new_peak
    acc = acc / total
    return acc.view(spec.num_kv_heads, QUERY_TILE, group, dim).permute(1, 0, 2, 3).reshape(QUERY_TILE, heads, dim)[:n]


def _before_any_key(tile: Tensor, spec: AttnSpec) -> tuple[Tensor, Tensor]:
    """Running maximum and sum of each row: [Hk, rows, 1]. A sink is a key seen before all others."""
    if spec.sinks is None:
        peak = tile.new_full((*tile.shape[:2], 1), LOWEST)
        return peak, torch.zeros_like(peak)
    sinks = spec.sinks.clamp(min=LOWEST).view(spec.num_kv_heads, 1, -1)  # [Hk, 1, group]
    peak = sinks.expand(-1, QUERY_TILE, -1).reshape(*tile.shape[:2], 1)
    return peak, torch.ones_like(peak)
