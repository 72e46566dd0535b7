"""The most that one step holds at once beside weights and cache, summed operation by operation; no torch here.

Sizes of operands, sums and partial results are those of `kernels`, which this layer may not import; tests hold them
together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from worker_orcd.gguf.types import GgmlType
from worker_orcd.quant.tiles import TILE_K, TILE_ROWS, tile_grid

F16, F32, F64, INTEGER = 2, 4, 8, 8  # bytes
SPLIT, QUERY_TILE, ROW_TILE, PIECE_ELEMS = 256, 8, 4, 2**20  # of backends/torch_ref.py
SAMPLE_TILE = 8  # ROW_TILE of engine/sampler.py
SCORE_ROWS = 64  # of engine/scheduler.py
SAMPLE_COPIES = 12  # of a tile of scores in 64 bits: scores, weights, order, running sums, and the sort's own
WARPS, MOST_WARPS, LONGEST_SLICE = 16 * 132, 28 * 132, 4096  # of kernels/linear/plan.py: what bounds its slices
ENOUGH_BLOCKS, BLOCK_ROWS, BLOCK_TOKENS = 66, 128, 128  # likewise: with so many blocks there are no partial sums
ATTENTION_PROGRAMS, HEAD_STEP, WIDEST_HEAD = 512, 16, 256  # of kernels/attention.py and backends/cuda.py
EXPERT_UNITS, SMALL_EXPERT_UNITS = {False: (8, 16, 32), True: (8, 24)}, (24, 32, 48, 64)  # kernels/ops/experts.py
GRAPH_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # ROWS of engine/graphs.py
GRAPH_TOKENS, GRAPH_GROWTH = 256, 4  # WIDTH_TOKENS and WIDTH_GROWTH of engine/graphs.py
GRAPH_BYTES = 4 * 2**20  # what the driver keeps of one graph; an estimate

Matrices = Mapping[str, tuple[GgmlType, tuple[int, int]]]  # by GGUF name, [N, K]


@dataclass(frozen=True)
class Dims:
    """What must be known of a model and its limits; tokens and elements."""

    num_layers: int
    hidden: int
    ffn: int  # of one token, all its experts together
    num_experts_used: int  # by a token; 0: there are none
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_dim: int
    vocab_size: int
    context_length: int  # of one sequence, after caps
    cache_tokens: int  # of all sequences together
    cache_bytes: int  # of an element
    table_width: int  # blocks of one sequence
    max_batch: int
    max_step_tokens: int
    query_scales: int = 0  # numbers in the table of that name of models/layers.py

    @property
    def q_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim


def reference_workspace(dims: Dims) -> int:
    """Of TorchBackend: everything in float32."""
    rows = dims.max_step_tokens
    residual = 3 * rows * dims.hidden  # stream, its norm, the sum
    qkv = 2 * rows * (dims.q_width + 2 * dims.kv_width)  # projections, then their rotated or joined copies
    mlp = rows * 6 * dims.ffn  # gate‖up, its two halves, silu and its steps
    logits = (2 * dims.max_batch + ROW_TILE) * dims.vocab_size  # rows in pieces, then joined, and a tile of the head
    sampling = 6 * SAMPLE_TILE * dims.vocab_size * F64 // F32
    return F32 * (residual + max(qkv + _basic_attention(dims), mlp) + logits + sampling)


def _basic_attention(dims: Dims) -> int:
    """Elements: keys and values of a sequence, gathered and turned, and the state of a tile of queries."""
    padded = -(-dims.context_length // SPLIT) * SPLIT
    return 4 * padded * dims.kv_width + QUERY_TILE * dims.q_width * (SPLIT + 4)


def cuda_workspace(dims: Dims, matrices: Matrices) -> int:
    """Of the largest step of CudaBackend: all sequences sample, and prompts are scored."""
    head_rows = min(dims.max_step_tokens, dims.max_batch + SCORE_ROWS)
    sampling = (F32 * dims.max_batch + SAMPLE_COPIES * SAMPLE_TILE * F64) * dims.vocab_size
    return forward_bytes(dims, matrices, dims.max_step_tokens, head_rows) + sampling


def graph_bytes(dims: Dims, matrices: Matrices) -> int:
    """CUDA graphs: one step's memory and the logits of each number of rows, which all share, and the record of each.

    Logits could be those of the most rows alone, were they recorded first.
    """
    buckets = [rows for rows in GRAPH_ROWS if rows < dims.max_batch]
    buckets += [rows for rows in GRAPH_ROWS if rows >= dims.max_batch][:1]
    num_widths, tokens = 1, GRAPH_TOKENS
    while tokens < dims.context_length:
        num_widths, tokens = num_widths + 1, tokens * GRAPH_GROWTH
    logits = F32 * dims.vocab_size * sum(buckets)
    return forward_bytes(dims, matrices, buckets[-1], 0) + logits + num_widths * len(buckets) * GRAPH_BYTES


def forward_bytes(dims: Dims, matrices: Matrices, rows: int, head_rows: int) -> int:
    """A step of `rows` rows, of which `head_rows` reach the head.

    Sums of a layer's two halves live until the next layer's replace them.
    """
    layers = _by_layer(matrices)
    stream = 2 * F32 * rows * dims.hidden + 2 * image_bytes(rows, dims.hidden)
    stream += INTEGER * (5 * rows + dims.max_batch * (dims.table_width + 2))
    kept = max(_product(rows, layer, "attn_output") + _mlp_sums(dims, rows, layer) for layer in layers)
    half = max(max(_attention(dims, rows, layer), _mlp(dims, rows, layer)) for layer in layers)
    head = product_bytes(head_rows, *matrices.get("output.weight", matrices["token_embd.weight"]))
    return stream + max(kept + half, kept + head)


def _by_layer(matrices: Matrices) -> list[Matrices]:
    """Those of each layer, by the name within it."""
    layers: dict[str, dict[str, tuple[GgmlType, tuple[int, int]]]] = {}
    for name, matrix in matrices.items():
        if name.startswith("blk."):
            _, index, inner = name.split(".", 2)
            layers.setdefault(index, {})[inner.removesuffix(".weight")] = matrix
    return list(layers.values())


def _attention(dims: Dims, rows: int, layer: Matrices) -> int:
    """Sums become rotated queries, these the result, that an operand, that sums."""
    q, image = F32 * rows * dims.q_width, image_bytes(rows, dims.q_width)
    inside = attention_partial_bytes(dims)
    if dims.head_dim % HEAD_STEP or dims.head_dim > WIDEST_HEAD:
        inside = F32 * _basic_attention(dims)
    projected = _product(rows, layer, "attn_qkv", "attn_q", "attn_k", "attn_v")
    return max(projected + q, 2 * q + max(inside, image), q + image + _product(rows, layer, "attn_output"))


def _mlp_sums(dims: Dims, rows: int, layer: Matrices) -> int:
    """What the second half of a layer leaves."""
    return _product(rows, layer, "ffn_down") or 2 * F32 * rows * dims.hidden


def _mlp(dims: Dims, rows: int, layer: Matrices) -> int:
    if "ffn_down_exps" in layer:
        return _experts(dims, rows, layer)
    up = _product(rows, layer, "ffn_gate", "ffn_up")
    return up + image_bytes(rows, dims.ffn) + _product(rows, layer, "ffn_down")


def _experts(dims: Dims, rows: int, layer: Matrices) -> int:
    """Every row once for each of its experts, each expert's padded to whole units: fewer rows than a large one has.

    Small units leave partial sums of each slice, large ones (for wgmma) do not.
    """
    num_experts, hidden = layer["ffn_gate_inp"][1]
    pairs = rows * dims.num_experts_used
    small, places = (pairs + num_experts * expert_unit(pairs, num_experts, wgmma) for wgmma in (False, True))
    ffn = layer["ffn_down_exps"][1][1]
    total = image_bytes(places, hidden) + image_bytes(places, ffn) + 3 * F32 * rows * hidden
    for name in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
        kind, (n, k) = layer[name]
        own = n // num_experts
        total += F32 * max(expert_slices(kind, (own, k), dims.num_experts_used) * small, places) * own
    shared = _product(rows, layer, "ffn_gate_shexp", "ffn_up_shexp") + 2 * _product(rows, layer, "ffn_down_shexp")
    return total + shared


def expert_slices(type: GgmlType, shape: tuple[int, int], num_used: int) -> int:
    """Those that kernels/linear/plan.py chooses for the matrix of one expert."""
    strips, depth = tile_grid(type, (shape[0] * num_used, shape[1]))
    return min(depth, max(-(-WARPS // strips), -(-depth * TILE_K[type] // LONGEST_SLICE)))


def expert_unit(pairs: int, num_experts: int, has_wgmma: bool) -> int:
    """The most rows of an expert that are multiplied at a time."""
    sizes, mean = EXPERT_UNITS[has_wgmma], pairs / num_experts
    alone = next((unit for unit in sizes if mean + 2 * mean**0.5 <= unit), 0)
    if alone or not has_wgmma:
        return alone or sizes[-1]
    return 2 * next((unit for unit in SMALL_EXPERT_UNITS if mean <= unit), SMALL_EXPERT_UNITS[-1])


def _product(rows: int, layer: Matrices, *names: str) -> int:
    """Matrices side by side; those of one type and width are joined to one where their tiles allow it."""
    found = [layer[name] for name in names if name in layer]
    if len({(kind, k) for kind, (_, k) in found}) == 1 and not any(n % TILE_ROWS for _, (n, _) in found[:-1]):
        kind, (_, k) = found[0]
        return product_bytes(rows, kind, (sum(n for _, (n, _) in found), k))
    return sum(product_bytes(rows, *matrix) for matrix in found)


def image_bytes(rows: int, width: int) -> int:
    """An operand in bf16, padded in both directions."""
    groups = next((g for g in (1, 2, 4, 8, 16) if rows <= 8 * g), -(-rows // 256) * 32)
    return -(-width // 256) * 4 * groups * 8 * 64 * F16


def product_bytes(rows: int, type: GgmlType, shape: tuple[int, int]) -> int:
    """The most a product of up to `rows` rows leaves: whole sums, or partial ones of each slice of K.

    Partial sums are of few rows; where wgmma is missing, of 128 at a time beside the whole.
    """
    slices = most_slices(type, shape)
    apart = min(rows, BLOCK_TOKENS * max(1, (ENOUGH_BLOCKS - 1) // -(-shape[0] // BLOCK_ROWS)))
    in_turns = rows + (slices + 2) * BLOCK_TOKENS if rows > BLOCK_TOKENS else 0
    return F32 * shape[0] * max(rows, slices * apart, in_turns)


def most_slices(type: GgmlType, shape: tuple[int, int]) -> int:
    """At least the slices that kernels/linear/plan.py chooses."""
    strips, depth = tile_grid(type, shape)
    fewest = -(-depth * TILE_K[type] // LONGEST_SLICE)
    return min(depth, max(WARPS // strips, 2 if 2 * strips <= MOST_WARPS else 1, fewest))


def attention_partial_bytes(dims: Dims) -> int:
    """Programs share a row only while there are few rows."""
    seqs = min(dims.max_batch, max(1, ATTENTION_PROGRAMS // 2 // dims.num_kv_heads))
    return F32 * seqs * dims.num_heads * -(-dims.context_length // SPLIT) * (dims.head_dim + 2)
