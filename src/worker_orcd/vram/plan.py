"""Every byte a worker will need, from the header alone: nothing is loaded, no device is touched, no torch.

The reference backend keeps weights and cache in float32, the CUDA backend keeps weights in the file's bits and the
cache in float16. Weights, cache and tables are exact; the step's workspace is an upper bound of what is alive at
once, summed operation by operation.

The cache is as large as the user says or, unless told, gives every place of the batch a full context as long as that
stays below DEFAULT_CACHE_BYTES; it always holds at least one full context, so whatever is accepted can be finished.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from worker_orcd.errors import InsufficientVram
from worker_orcd.gguf.reader import TensorInfo
from worker_orcd.quant.tiles import packed_bytes

F16, F32, F64 = 2, 4, 8  # bytes
CUDA_CONTEXT_BYTES = 800 * 2**20  # driver context 621 MiB, libraries and kernels about 100 (H200), and slack
SLICE_BYTES_PER_ROW = 132 * 2**10  # sums of K slices, at most, beyond 16 tokens
REPACK_BYTES = 340 * 2**20  # temporaries of quant/repack.py
EMBED_ROWS, EMBED_BYTES = 256, 27  # rows gathered at once, and bytes an element of one takes on the way
PROCESS_BYTES = 256 * 2**20  # 228 MiB resident before anything is loaded
DEFAULT_CACHE_BYTES = 2**28
SPLIT, QUERY_TILE, ROW_TILE, PIECE_ELEMS = 256, 8, 4, 2**20  # of backends/torch_ref.py; a test holds them equal
SAMPLE_TILE = 8  # ROW_TILE of engine/sampler.py, likewise


@dataclass(frozen=True)
class Dims:
    """What the plan must know of a model; tokens and elements."""

    num_layers: int
    hidden: int
    ffn: int
    q_width: int
    kv_width: int
    rope_dim: int
    vocab_size: int
    context_length: int  # of one sequence, after caps
    cache_tokens: int  # of all sequences together
    cache_bytes: int  # of an element
    max_batch: int
    max_step_tokens: int


@dataclass(frozen=True)
class CacheSize:
    """Blocks of the KV cache, and the context one sequence may have in it."""

    num_blocks: int
    block_size: int  # tokens
    context_length: int  # tokens

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_size


def size_paged(bytes_per_token: int, context: int, max_batch: int, limit_bytes: int | None, block: int) -> CacheSize:
    """Blocks of `block` tokens within `limit_bytes`; a cache smaller than the context shortens the context."""
    one, full = -(-context // block), -(-context // block) * max_batch
    if limit_bytes is None:
        num_blocks = max(one, min(full, DEFAULT_CACHE_BYTES // (bytes_per_token * block)))
    else:
        num_blocks = min(full, limit_bytes // (bytes_per_token * block))
    return CacheSize(num_blocks, block, min(context, num_blocks * block))


def size_contiguous(bytes_per_token: int, context: int, max_batch: int, limit_bytes: int | None) -> CacheSize:
    """One block a sequence, as long as the context; a cache smaller than that shortens the context."""
    limit = DEFAULT_CACHE_BYTES if limit_bytes is None else limit_bytes
    if limit_bytes is not None:
        context = min(context, limit // bytes_per_token)
    return CacheSize(max(1, min(max_batch, limit // max(1, bytes_per_token * context))), context, context)


@dataclass(frozen=True)
class PlanItem:
    purpose: str
    nbytes: int
    detail: str


@dataclass(frozen=True)
class Plan:
    """`place` is where the bytes lie: "host memory" for the CPU reference backend, else VRAM."""

    items: tuple[PlanItem, ...]
    place: str

    @property
    def total_bytes(self) -> int:
        return sum(item.nbytes for item in self.items)

    def require(self, free_bytes: int, device: str, path: str) -> None:
        """Raises InsufficientVram with every number when `free_bytes` are too few."""
        if self.total_bytes > free_bytes:
            parts = ", ".join(f"{item.purpose} {item.nbytes}" for item in self.items)
            raise InsufficientVram(
                f"{path} needs {self.total_bytes} bytes on {device} ({parts}), {free_bytes} are free; "
                "lower --kv-cache-size-mb, --context-length or --max-tokens-per-step, or choose another device",
                needed_bytes=self.total_bytes,
                free_bytes=free_bytes,
                device=device,
                model=path,
            )


def plan_reference(tensors: Mapping[str, TensorInfo], dims: Dims, on_cuda: bool) -> Plan:
    """What TorchBackend will hold."""
    elements = {name: info.nbytes // info.type.block_bytes * info.type.block_elems for name, info in tensors.items()}
    items = [
        PlanItem("weights", F32 * sum(elements.values()), f"{len(tensors)} tensors as float32"),
        PlanItem(
            "kv_cache",
            kv_bytes_per_token(dims.num_layers, dims.kv_width, dims.cache_bytes) * dims.cache_tokens,
            f"{dims.cache_tokens} tokens, float32",
        ),
        PlanItem("rope_tables", 2 * F32 * dims.context_length * (dims.rope_dim // 2), "cosines and sines"),
        PlanItem("workspace", _workspace_bytes(dims), f"one step of {dims.max_step_tokens} tokens"),
        PlanItem("load_scratch", _load_scratch_bytes(tensors), "the largest tensor, stored and in pieces"),
    ]
    if on_cuda:
        items.append(PlanItem("cuda_context", CUDA_CONTEXT_BYTES, "driver, libraries and kernels"))
    else:
        items.append(PlanItem("process", PROCESS_BYTES, "Python, torch and its libraries"))
    return Plan(tuple(items), "VRAM" if on_cuda else "host memory")


def plan_cuda(tensors: Mapping[str, TensorInfo], dims: Dims) -> Plan:
    """What CudaBackend will hold."""
    matrices = [info for info in tensors.values() if len(info.shape) == 2]
    weights = sum(packed_bytes(info.type, (info.shape[0], info.shape[1])) for info in matrices)
    weights += F32 * sum(prod(info.shape) for info in tensors.values() if len(info.shape) != 2)
    cache = kv_bytes_per_token(dims.num_layers, dims.kv_width, dims.cache_bytes) * dims.cache_tokens
    items = (
        PlanItem("weights", weights, f"{len(tensors)} tensors in their own bits"),
        PlanItem("kv_cache", cache, f"{dims.cache_tokens} tokens, float16"),
        PlanItem("rope_tables", 2 * F32 * dims.context_length * (dims.rope_dim // 2), "cosines and sines"),
        PlanItem("workspace", _cuda_workspace_bytes(dims), f"one step of {dims.max_step_tokens} tokens"),
        PlanItem("load_scratch", _repack_bytes(tensors), "the largest tensors while they are packed and joined"),
        PlanItem("cuda_context", CUDA_CONTEXT_BYTES, "driver, libraries and kernels"),
    )
    return Plan(items, "VRAM")


def kv_bytes_per_token(num_layers: int, kv_width: int, element_bytes: int) -> int:
    """Keys and values of all layers for one position."""
    return 2 * num_layers * kv_width * element_bytes


def _workspace_bytes(dims: Dims) -> int:
    rows = dims.max_step_tokens
    residual = 3 * rows * dims.hidden  # stream, its norm, the sum
    qkv = 2 * rows * (dims.q_width + 2 * dims.kv_width)  # projections, then their rotated or joined copies
    mlp = rows * 6 * dims.ffn  # gate‖up, its two halves, silu and its steps
    padded = -(-dims.context_length // SPLIT) * SPLIT
    attention = 4 * padded * dims.kv_width + QUERY_TILE * dims.q_width * (SPLIT + 4)
    logits = (2 * dims.max_batch + ROW_TILE) * dims.vocab_size  # rows in pieces, then joined, and a tile of the head
    sampling = 6 * SAMPLE_TILE * dims.vocab_size * F64 // F32  # scores, weights, order, running sum and temporaries
    return F32 * (residual + max(qkv + attention, mlp) + logits + sampling)


def _cuda_workspace_bytes(dims: Dims) -> int:
    """Activations in float32; a linear adds the image of its input and the sums of its slices (kernels/linear)."""
    rows = dims.max_step_tokens
    widest = max(dims.ffn, dims.hidden, dims.q_width)
    image = 2 * _up(rows, 256) * _up(widest, 256)
    slices = max(SLICE_BYTES_PER_ROW * rows, F32 * 16 * 2 * widest * 8)
    residual = 3 * rows * dims.hidden
    qkv = 3 * rows * (dims.q_width + 2 * dims.kv_width)
    mlp = rows * 4 * dims.ffn
    splits = -(-dims.context_length // SPLIT)
    partials = F32 * 256 * splits * 2 * max(dims.q_width, 256)
    embed = EMBED_ROWS * EMBED_BYTES * dims.hidden
    logits = 3 * dims.max_batch * dims.vocab_size
    sampling = 6 * SAMPLE_TILE * dims.vocab_size * F64
    return F32 * (residual + max(qkv, mlp) + logits) + image + slices + partials + embed + sampling


def _repack_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    largest = max((info.nbytes for info in tensors.values()), default=0)
    return 2 * largest + REPACK_BYTES


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _load_scratch_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    return max((info.nbytes for info in tensors.values()), default=0) + 3 * F32 * PIECE_ELEMS
