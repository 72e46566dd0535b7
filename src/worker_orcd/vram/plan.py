"""Every byte a worker will need, from the header alone: nothing is loaded, no device is touched, no torch.

For the reference backend, which keeps weights in float32. Weights, cache and tables are exact; the step's
workspace is an upper bound of what is alive at once, summed operation by operation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from worker_orcd.errors import InsufficientVram
from worker_orcd.gguf.reader import TensorInfo

F32, F64, I64 = 4, 8, 8  # bytes
CUDA_CONTEXT_BYTES = 800 * 2**20  # driver context 621 MiB, libraries and kernels about 100 (H200), and slack
SPLIT, QUERY_TILE, ROW_TILE, PIECE_ELEMS = 256, 8, 4, 2**20  # of backends/torch_ref.py; a test holds them equal


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
    context_length: int  # of the cache, after caps
    prefill_chunk: int


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
                "lower --context-length, or choose another device",
                needed_bytes=self.total_bytes,
                free_bytes=free_bytes,
                device=device,
                model=path,
            )


def plan_reference(tensors: Mapping[str, TensorInfo], dims: Dims, on_cuda: bool) -> Plan:
    """What TorchBackend will hold with one sequence of `dims.context_length` tokens."""
    elements = {name: info.nbytes // info.type.block_bytes * info.type.block_elems for name, info in tensors.items()}
    items = [
        PlanItem("weights", F32 * sum(elements.values()), f"{len(tensors)} tensors as float32"),
        PlanItem(
            "kv_cache", kv_bytes_per_token(dims) * dims.context_length, f"{dims.context_length} tokens, float32"
        ),
        PlanItem("rope_tables", 2 * F32 * dims.context_length * (dims.rope_dim // 2), "cosines and sines"),
        PlanItem("workspace", _workspace_bytes(dims), f"one step of {dims.prefill_chunk} tokens"),
        PlanItem("load_scratch", _load_scratch_bytes(tensors), "the largest tensor, stored and in pieces"),
    ]
    if on_cuda:
        items.append(PlanItem("cuda_context", CUDA_CONTEXT_BYTES, "driver, libraries and kernels"))
    return Plan(tuple(items), "VRAM" if on_cuda else "host memory")


def kv_bytes_per_token(dims: Dims) -> int:
    """Keys and values of all layers for one position."""
    return 2 * dims.num_layers * dims.kv_width * F32


def _workspace_bytes(dims: Dims) -> int:
    rows = dims.prefill_chunk
    residual = 3 * rows * dims.hidden  # stream, its norm, the sum
    qkv = 2 * rows * (dims.q_width + 2 * dims.kv_width)  # projections, then their rotated or joined copies
    mlp = rows * 6 * dims.ffn  # gate‖up, its two halves, silu and its steps
    padded = -(-dims.context_length // SPLIT) * SPLIT
    attention = 4 * padded * dims.kv_width + QUERY_TILE * dims.q_width * (SPLIT + 4)
    logits = (1 + ROW_TILE) * dims.vocab_size  # the tile the head computes, and the row kept of it
    sampling = 4 * dims.vocab_size * F64 // F32  # scores, probabilities, order, running sum
    return F32 * (residual + max(qkv + attention, mlp) + logits + sampling)


def _load_scratch_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    return max((info.nbytes for info in tensors.values()), default=0) + 3 * F32 * PIECE_ELEMS
