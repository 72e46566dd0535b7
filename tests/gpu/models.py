"""Whole models on a backend of the test's choice, and the logits they give however a text is cut into steps.

python -m tests.gpu.models emulated|cuda FILE ... prints a digest of each file's logits.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence as Sequences
from functools import lru_cache
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from tests.kernels.emulator.gpu import EmulatedGpu
from worker_orcd.assemble import _adapter
from worker_orcd.backends.base import Backend
from worker_orcd.backends.cuda import CudaBackend
from worker_orcd.engine.graphs import Graphs
from worker_orcd.engine.pack import pack
from worker_orcd.engine.request import Request, SamplingParams
from worker_orcd.engine.runtime import Runtime
from worker_orcd.engine.sequence import Chunk, Sequence
from worker_orcd.gguf.reader import GgufFile
from worker_orcd.kernels.gpu import Gpu
from worker_orcd.kv.paged import PagedAllocator
from worker_orcd.kv.pool import KVShape, allocate_pool, eraser
from worker_orcd.kv.prefix import PrefixChain
from worker_orcd.models.spec import read_spec
from worker_orcd.models.tensors import tensor_table
from worker_orcd.models.weights import load_weights

CONTEXT, BLOCK_SIZE, NUM_BLOCKS = 512, 16, 64


@lru_cache(maxsize=2)
def backend_on(device: str) -> CudaBackend:
    """ "emulated" or "cuda"."""
    gpu = EmulatedGpu() if device == "emulated" else Gpu(torch.device("cuda", 0))
    return CudaBackend(gpu.device, gpu)


def runtime_on(path: Path, backend: Backend, dtype: torch.dtype) -> Runtime:
    """The file on `backend`, with a cache of `dtype`."""
    with GgufFile.open(path) as gguf:
        spec = read_spec(gguf)
        weights = load_weights(gguf, tensor_table(spec, gguf.tensors), backend, 2**20, lambda *_: None)
    adapter = _adapter(spec)(spec, weights, backend, CONTEXT)
    shape = KVShape(spec.num_layers, NUM_BLOCKS, BLOCK_SIZE, spec.num_kv_heads, spec.head_dim, dtype)
    kv = allocate_pool(shape, backend.device)
    can_record = backend.can_record(spec.head_dim)
    return Runtime(adapter, kv, PagedAllocator(NUM_BLOCKS, BLOCK_SIZE, eraser(kv), False), backend.device, can_record)


@torch.inference_mode()
def walk(runtime: Runtime, texts: Sequences[list[int]], sizes: Sequences[int], graphs: Graphs | None = None
         ) -> list[Tensor]:  # fmt: skip
    """Logits after every token of each text, f32 [len(text), V]; texts go side by side, in steps of sizes[i] tokens.

    With `graphs`, steps that can be recorded are.
    """
    seqs = [_sequence(runtime, text) for text in texts]
    rows: list[list[Tensor]] = [[] for _ in texts]
    turn = 0
    while waiting := [i for i, seq in enumerate(seqs) if seq.num_pending]:
        chosen = [(i, min(sizes[(i + turn) % len(sizes)], seqs[i].num_pending)) for i in waiting]
        plan = [msgspec.structs.replace(Chunk.of(seqs[i], count), scores=True) for i, count in chosen]
        logits = None if graphs is None else graphs.logits(plan, None)
        if logits is None:
            logits = runtime.adapter.forward(pack(plan, runtime.device), runtime.kv)
        for (i, count), part in zip(chosen, logits.cpu().split([count for _, count in chosen]), strict=True):
            rows[i].append(part.clone())
            seqs[i].num_computed += count
        turn += 1
    for seq in seqs:
        runtime.allocator.release(seq.block_table)
    return [torch.cat(parts) for parts in rows]


def last_row(runtime: Runtime, text: list[int]) -> Tensor:
    """Logits after all of the text, f32 [V], by a step that asks for no others."""
    seq = _sequence(runtime, text)
    batch = pack([Chunk.of(seq, len(text))], runtime.device)
    assert batch.sample_rows is not None or len(text) == 1
    logits = runtime.adapter.forward(batch, runtime.kv).cpu()
    runtime.allocator.release(seq.block_table)
    return logits[0]


def _sequence(runtime: Runtime, text: list[int]) -> Sequence:
    request = Request("walk", text, max_tokens=1, sampling=SamplingParams(seed=0))
    seq = Sequence.of(request, 0, PrefixChain(b"", runtime.allocator.block_size))
    seq.table = runtime.allocator.new_table()
    runtime.allocator.grow(seq.table, len(text))
    return seq


def random_text(length: int, seed: int) -> list[int]:
    return torch.randint(3, 321, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def divergence(found: Tensor, truth: Tensor) -> Tensor:
    """KL(truth ‖ found) after each token, in nats: f64 [T]."""
    p, q = truth.double().log_softmax(-1), found.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def digest(tensors: Sequences[Tensor]) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def main(device: str, paths: list[str]) -> None:
    texts = [random_text(length, 0) for length in ((300, 17, 130) if device == "cuda" else (20, 9))]
    for path in paths:
        print(digest(walk(runtime_on(Path(path), backend_on(device), torch.float16), texts, (7, 1))))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
