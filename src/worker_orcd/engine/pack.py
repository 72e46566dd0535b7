"""Plan → Batch: lists of integers become the tensors of one step."""

from __future__ import annotations

import torch
from torch import Tensor

from worker_orcd.backends.batch import AttnBatch, Batch
from worker_orcd.engine.sequence import Plan


def pack(plan: Plan, device: torch.device) -> Batch:
    """Rows in the order of the plan; every sequence's table must already have room for its chunk."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts, lens, sample_rows = [0], [], []
    for chunk in plan:
        seq, table = chunk.sequence, chunk.sequence.table
        first, last = seq.num_computed, seq.num_computed + chunk.num_tokens
        assert chunk.num_tokens > 0
        assert last <= min(len(seq.tokens), table.capacity_tokens)
        tokens += seq.tokens[first:last]
        positions += range(first, last)
        slots += [table.blocks[p // table.block_size] * table.block_size + p % table.block_size
                  for p in range(first, last)]  # fmt: skip
        starts.append(len(tokens))
        lens.append(last)
        if chunk.samples:
            sample_rows.append(len(tokens) - 1)
    width = max(len(chunk.sequence.table.blocks) for chunk in plan)
    tables = [chunk.sequence.table.blocks + [0] * (width - len(chunk.sequence.table.blocks)) for chunk in plan]

    def tensor(values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    attn = AttnBatch(
        positions=tensor(positions),
        query_starts=tensor(starts),
        context_lens=tensor(lens),
        block_table=tensor(tables),
        block_size=plan[0].sequence.table.block_size,
    )
    return Batch(tensor(tokens), tensor(slots), tensor(sample_rows), attn)
