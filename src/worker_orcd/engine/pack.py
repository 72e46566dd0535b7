"""Plan → Batch: the integers of one step, in one buffer, with one copy to the device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from worker_orcd.backends.batch import AttnBatch, Batch
from worker_orcd.engine.sequence import Plan


def pack(plan: Plan, device: torch.device, last_sampled: Tensor | None = None) -> Batch:
    """Rows in the order of the plan; every sequence's table must already have room for its chunk.

    A token the host does not know yet is told by its row in `last_sampled`, the result [R] of the step before.
    """
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts, lens, sample_rows = [0], list[int](), list[int]()
    block_size, width = 0, 0
    for chunk in plan:
        seq, first, last = chunk.sequence, chunk.first, chunk.first + chunk.num_tokens
        table = seq.table
        assert table is not None
        assert last <= min(seq.num_tokens, table.capacity_tokens)
        blocks, block_size = table.blocks, table.block_size
        width = max(width, len(blocks))
        if last > len(seq.tokens):
            assert last_sampled is not None
            tokens += [*seq.tokens[first:], -1 - seq.sampled_row]
        else:
            tokens += seq.tokens[first:last]
        if chunk.num_tokens == 1:  # most chunks; the general way costs a tenth of the step
            positions.append(first)
            slots.append(blocks[first // block_size] * block_size + first % block_size)
        else:
            positions += range(first, last)
            slots += [blocks[p // block_size] * block_size + p % block_size for p in range(first, last)]
        starts.append(len(tokens))
        lens.append(last)
        if chunk.scores:
            sample_rows += range(len(tokens) - chunk.num_tokens, len(tokens))
        elif chunk.samples:
            sample_rows.append(len(tokens) - 1)
    is_all = len(sample_rows) == len(tokens)
    sections = [tokens, positions, slots, starts, lens, [] if is_all else sample_rows]
    sizes = [*map(len, sections), len(plan) * width]
    host = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
    _fill(host.numpy(), sections, plan, width)
    parts = host.to(device, non_blocking=True).split(sizes)  # type: ignore[no-untyped-call]
    attn = AttnBatch(parts[1], parts[3], parts[4], parts[6].view(len(plan), width), block_size)
    return Batch(parts[0], parts[2], None if is_all else parts[5], attn, last_sampled)


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """A copy that the host does not wait for: from ordinary memory it would wait for all that is launched."""
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def overwrite(tensor: Tensor, values: np.ndarray) -> None:
    """Likewise, to a place that is there already."""
    host = torch.from_numpy(values)
    tensor.copy_(host.pin_memory() if tensor.is_cuda else host, non_blocking=True)


def _fill(flat: np.ndarray, sections: list[list[int]], plan: Plan, width: int) -> None:
    """Write the sections one after the other, then the block tables, padded with zeros."""
    at = 0
    for section in sections:
        flat[at : at + len(section)] = section
        at += len(section)
    tables = flat[at:].reshape(len(plan), width)
    for row, chunk in zip(tables, plan, strict=True):
        assert chunk.sequence.table is not None
        blocks = np.frombuffer(chunk.sequence.table.blocks, dtype=np.int64)
        row[: len(blocks)] = blocks
        row[len(blocks) :] = 0
