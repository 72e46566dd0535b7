"""Logits of a given text at every position, for comparisons and debugging; nothing is sampled."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from worker_orcd.engine.pack import pack
from worker_orcd.engine.request import Request, SamplingParams
from worker_orcd.engine.runtime import Runtime
from worker_orcd.engine.sequence import Chunk, Sequence
from worker_orcd.kv.prefix import PrefixChain


@torch.inference_mode()
def score(runtime: Runtime, ids: list[int], chunk: int) -> Tensor:
    """Row p is what follows ids[: p + 1]: float32 [len(ids), V] on the CPU, computed `chunk` tokens a step."""
    request = Request("score", ids, max_tokens=1, sampling=SamplingParams(seed=0))
    seq = Sequence.of(request, 0, PrefixChain(b"", runtime.allocator.block_size))
    seq.table = runtime.allocator.new_table()
    rows: list[Tensor] = []
    runtime.allocator.grow(seq.table, len(ids))
    try:
        while seq.num_pending:
            step = Chunk.of(seq, min(chunk, seq.num_pending))
            batch = replace(pack([step], runtime.device), sample_rows=None)
            rows.append(runtime.adapter.forward(batch, runtime.kv).cpu())
            seq.num_computed += step.num_tokens
    finally:
        runtime.allocator.release(seq.table)
    return torch.cat(rows)
