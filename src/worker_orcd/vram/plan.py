"""Every byte a worker will need, from the header alone: nothing is loaded, no device is touched, no torch.

The reference backend keeps weights and cache in float32, the CUDA backend keeps weights in the file's bits and the
cache in float16. Weights, cache and tables are exact; workspace and graphs are upper bounds (`workspace`).

A GPU's cache takes what nothing else needs, up to a full context for every place of the batch; the host's stays below
HOST_CACHE_BYTES. Unless told otherwise it holds at least one full context, so whatever is accepted can be finished.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from worker_orcd.errors import InsufficientVram
from worker_orcd.gguf.reader import TensorInfo
from worker_orcd.quant.tiles import packed_bytes
from worker_orcd.vram.workspace import (
    F32,
    PIECE_ELEMS,
    Dims,
    Matrices,
    cuda_workspace,
    graph_bytes,
    reference_workspace,
)

CUDA_CONTEXT_BYTES = 672 * 2**20  # 621 to 651 MiB on an H200
CUDA_KERNELS_BYTES = 160 * 2**20  # code, and what libraries take for themselves
REPACK_BYTES = 340 * 2**20  # temporaries of quant/repack.py
PROCESS_BYTES = 256 * 2**20  # 228 MiB resident before anything is loaded
HOST_CACHE_BYTES = 2**28
LATER = frozenset({"kv_cache", "workspace", "cuda_graphs"})  # reserved when all is loaded
ITEMS_SHOWN = 3

Shapes = Mapping[str, tuple[int, ...]]  # of the tensors a model uses, by name


@dataclass(frozen=True)
class CacheSize:
    """Blocks of the KV cache, and the context one sequence may have in it."""

    num_blocks: int
    block_size: int  # tokens
    context_length: int  # tokens

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_size


def size_paged(bytes_per_token: int, context: int, max_batch: int, limit_bytes: int, block: int) -> CacheSize:
    """Blocks of `block` tokens within `limit_bytes`; a cache smaller than the context shortens the context."""
    full = -(-context // block) * max_batch
    num_blocks = min(full, limit_bytes // (bytes_per_token * block))
    return CacheSize(num_blocks, block, min(context, num_blocks * block))


def size_contiguous(bytes_per_token: int, context: int, max_batch: int, limit_bytes: int) -> CacheSize:
    """One block a sequence, as long as the context; a cache smaller than that shortens the context."""
    context = min(context, limit_bytes // bytes_per_token)
    return CacheSize(max(1, min(max_batch, limit_bytes // max(1, bytes_per_token * context))), context, context)


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

    def nbytes(self, *purposes: str) -> int:
        return sum(item.nbytes for item in self.items if item.purpose in purposes)

    @property
    def total_bytes(self) -> int:
        """The most at any time, while loading or afterwards."""
        return sum(item.nbytes for item in self.items)

    def in_context(self) -> Plan:
        """What is still to be taken by a process that has its CUDA context."""
        return replace(self, items=tuple(item for item in self.items if item.purpose != "cuda_context"))

    def cache_room(self, free_bytes: int) -> int:
        """Bytes that the cache could have of those that are free."""
        return max(0, free_bytes - self.total_bytes + self.nbytes("kv_cache", "load_scratch"))

    def require(self, free_bytes: int, device: str, path: str) -> None:
        """Raises InsufficientVram with every number when `free_bytes` are too few."""
        if self.total_bytes > free_bytes:
            largest = sorted(self.items, key=lambda item: item.nbytes, reverse=True)[:ITEMS_SHOWN]
            parts = ", ".join(f"{item.purpose} {item.nbytes}" for item in largest)
            raise InsufficientVram(
                f"{self.total_bytes} bytes on {device} are needed, {free_bytes} are free; {path} takes above all "
                f"{parts}; lower --context-length, --kv-cache-size-mb or --max-tokens-per-step, or choose another "
                "device",
                needed_bytes=self.total_bytes,
                free_bytes=free_bytes,
                device=device,
                model=path,
                items={item.purpose: item.nbytes for item in self.items},
            )


def plan_reference(tensors: Mapping[str, TensorInfo], dims: Dims, on_cuda: bool) -> Plan:
    """What TorchBackend will hold."""
    elements = sum(info.nbytes // info.type.block_bytes * info.type.block_elems for info in tensors.values())
    items = [
        PlanItem("weights", F32 * (elements + dims.query_scales), f"{len(tensors)} tensors as float32"),
        _cache_item(dims, "float32"),
        _rope_item(dims),
        PlanItem("workspace", reference_workspace(dims), f"one step of {dims.max_step_tokens} tokens"),
    ]
    items += _scratch(_load_scratch_bytes(tensors), items)
    if on_cuda:
        items += _cuda_items(0)
    else:
        items.append(PlanItem("process", PROCESS_BYTES, "Python, torch and its libraries"))
    return Plan(tuple(items), "VRAM" if on_cuda else "host memory")


def plan_cuda(
    tensors: Mapping[str, TensorInfo], shapes: Shapes, dims: Dims, has_graphs: bool, reserve_bytes: int
) -> Plan:
    """What CudaBackend will hold."""
    matrices = _matrices(tensors, shapes)
    tiles = sum(packed_bytes(*matrix, prod(shapes[name][:-2])) for name, matrix in matrices.items())
    vectors = F32 * (sum(prod(shape) for name, shape in shapes.items() if name not in matrices) + dims.query_scales)
    detail = f"{len(matrices)} matrices in their own bits, and {vectors:,} bytes of vectors in float32"
    graphs = graph_bytes(dims, matrices) if has_graphs else 0
    items = [
        PlanItem("weights", tiles + vectors, detail),
        _cache_item(dims, "float16"),
        _rope_item(dims),
        PlanItem("workspace", cuda_workspace(dims, matrices), f"one step of {dims.max_step_tokens} tokens"),
        PlanItem("cuda_graphs", graphs, f"steps of up to {dims.max_batch} answers; partly estimated"),
    ]
    items += _scratch(_repack_bytes(tensors), items)
    return Plan((*items, *_cuda_items(reserve_bytes)), "VRAM")


def _matrices(tensors: Mapping[str, TensorInfo], shapes: Shapes) -> Matrices:
    """What models/weights.py packs; experts lie one under the other."""
    return {
        name: (tensors[name].type, (prod(shape[:-1]), shape[-1]))
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) > 1
    }


def _cache_item(dims: Dims, kind: str) -> PlanItem:
    per_token = kv_bytes_per_token(dims.num_layers, dims.kv_width, dims.cache_bytes)
    detail = f"{dims.cache_tokens} tokens of {per_token:,} bytes, {kind}"
    return PlanItem("kv_cache", per_token * dims.cache_tokens, detail)


def _scratch(nbytes: int, items: list[PlanItem]) -> list[PlanItem]:
    """What loading takes for a while beyond what is reserved when it has given that back."""
    beyond = nbytes - sum(item.nbytes for item in items if item.purpose in LATER)
    return (
        [PlanItem("load_scratch", beyond, "while loading, beyond what is reserved afterwards")] if beyond > 0 else []
    )


def _rope_item(dims: Dims) -> PlanItem:
    return PlanItem("rope_tables", 2 * F32 * dims.context_length * (dims.rope_dim // 2), "cosines and sines")


def _cuda_items(reserve_bytes: int) -> list[PlanItem]:
    items = [
        PlanItem("cuda_kernels", CUDA_KERNELS_BYTES, "code and libraries; estimated"),
        PlanItem("cuda_context", CUDA_CONTEXT_BYTES, "of the driver; estimated"),
        PlanItem("reserve", reserve_bytes, "left free: --vram-reserve-mb"),
    ]
    return [item for item in items if item.nbytes]


def kv_bytes_per_token(num_layers: int, kv_width: int, element_bytes: int) -> int:
    """Keys and values of all layers for one position."""
    return 2 * num_layers * kv_width * element_bytes


def _repack_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    """Two tensors on their way, one of them being packed."""
    return 2 * max((info.nbytes for info in tensors.values()), default=0) + REPACK_BYTES


def _load_scratch_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    return max((info.nbytes for info in tensors.values()), default=0) + 3 * F32 * PIECE_ELEMS
