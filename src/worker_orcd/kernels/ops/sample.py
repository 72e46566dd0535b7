"""Launching the sampler: logits [R, V] and a table of parameters → the next tokens. sample.cu says how."""

from __future__ import annotations

import torch
from torch import Tensor

from worker_orcd.kernels.gpu import Gpu, Work
from worker_orcd.kernels.source import Source

BLOCK = 1024  # threads, of sample.cu
COLUMNS = 6  # temperature, greedy, top-k, top-p, min-p, uniform draw
SOURCE = Source("ops", "sample.cu")


def banned_bits(ids: list[int], vocab_size: int, device: torch.device) -> Tensor:
    """Bit i says that token i may not be drawn: i32 [ceil(V / 32)]."""
    flags = torch.zeros(-(-vocab_size // 32) * 32, dtype=torch.int64)
    flags[ids] = 1
    words = (flags.view(-1, 32) << torch.arange(32)).sum(1)
    return (words - (words >> 31 << 32)).int().to(device)


def sample(gpu: Gpu, logits: Tensor, table: Tensor, banned: Tensor) -> Tensor:
    """logits f32 [R, V], table f64 [6, R] → i64 [2, R]: tokens, and 1 where the row's logits are finite."""
    gpu.require(logits)
    gpu.require(table, dtype=torch.float64)
    gpu.require(banned, dtype=torch.int32)
    num_rows, vocab_size = logits.shape
    if not vocab_size or table.shape != (COLUMNS, num_rows) or banned.shape != (-(-vocab_size // 32),):
        raise ValueError(f"parameters {tuple(table.shape)} and bans {tuple(banned.shape)} for {tuple(logits.shape)}")
    out = torch.empty(2, num_rows, dtype=torch.int64, device=gpu.device)
    gpu.launch(SOURCE, "sample", Work((num_rows, 1, 1), BLOCK), [logits, table, banned, out, num_rows, vocab_size])
    return out
