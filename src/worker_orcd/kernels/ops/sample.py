"""Launching the sampler: logits [R, V] and a table of parameters → the next tokens. sample.cu says how."""

from __future__ import annotations

import torch
from torch import Tensor

from worker_orcd.kernels.gpu import Gpu, Work
from worker_orcd.kernels.source import Source

BLOCK = 1024  # threads, of sample.cu
MAX_CLUSTER = 8  # what every card with clusters takes
STATE_BYTES = 9216  # of sample.cu's Shared, at the most
COLUMNS = 6  # temperature, greedy, top-k, top-p, min-p, uniform draw
SOURCE = Source("ops", "sample.cu")


def banned_bits(ids: list[int], vocab_size: int, device: torch.device) -> Tensor:
    """Bit i says that token i may not be drawn: i32 [ceil(V / 32)]."""
    flags = torch.zeros(-(-vocab_size // 32) * 32, dtype=torch.int64)
    flags[ids] = 1
    words = (flags.view(-1, 32) << torch.arange(32)).sum(1)
    return (words - (words >> 31 << 32)).int().to(device)


def sample(
    gpu: Gpu, logits: Tensor, table: Tensor, banned: Tensor, place: Tensor | None = None, is_greedy: bool = False
) -> Tensor:
    """logits f32 [R, V], table f64 [6, R] → i64 [2, R]: tokens, and 1 where the row's logits are finite.

    The result is the beginning of `place` i64, if it is given and has room. `is_greedy`: every row is, so none needs
    to be read twice; nothing else depends on it.
    """
    gpu.require(logits)
    gpu.require(table, dtype=torch.float64)
    gpu.require(banned, dtype=torch.int32)
    num_rows, vocab_size = logits.shape
    if not vocab_size or table.shape != (COLUMNS, num_rows) or banned.shape != (-(-vocab_size // 32),):
        raise ValueError(f"parameters {tuple(table.shape)} and bans {tuple(banned.shape)} for {tuple(logits.shape)}")
    if place is None or len(place) < 2 * num_rows:
        place = torch.empty(2 * num_rows, dtype=torch.int64, device=gpu.device)
    gpu.require(place, dtype=torch.int64)
    out = place[: 2 * num_rows].view(2, num_rows)
    blocks = cluster(gpu, num_rows, vocab_size, is_greedy)
    has_room = not is_greedy and fits(gpu, vocab_size, blocks)
    shared_bytes = STATE_BYTES + (part_bytes(vocab_size, blocks) if has_room else 0)
    work = Work((num_rows * blocks, 1, 1), BLOCK, shared_bytes)
    gpu.launch(SOURCE, f"sample_{blocks}", work, [logits, table, banned, out, num_rows, vocab_size, int(has_room)])
    return out


def cluster(gpu: Gpu, num_rows: int, vocab_size: int, is_greedy: bool = False) -> int:
    """Blocks that share a row: as few as fill the card and hold the row in shared memory, if it is read again.

    The result is the same.
    """
    blocks = 1
    while gpu.card.has_clusters and blocks < MAX_CLUSTER:
        if num_rows * blocks * 2 > gpu.num_sms and (is_greedy or fits(gpu, vocab_size, blocks)):
            break
        blocks *= 2
    return blocks


def part_bytes(vocab_size: int, blocks: int) -> int:
    """Logits of one block."""
    return -(-vocab_size // (blocks * 32)) * 128


def fits(gpu: Gpu, vocab_size: int, blocks: int) -> bool:
    return STATE_BYTES + part_bytes(vocab_size, blocks) <= gpu.card.shared_bytes
