"""Batch: everything one forward pass is told, frozen, built once a step by engine/pack.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttnBatch:
    """Which keys each query row sees. Sequence s owns rows query_starts[s] … query_starts[s+1] - 1.

    A contiguous cache is a block table with one block, so attention has one addressing rule: position p of
    sequence s lies in slot block_table[s, p // block_size] * block_size + p % block_size.
    """

    positions: Tensor  # i64 [T], absolute position of each row in its sequence
    query_starts: Tensor  # i64 [S + 1]
    context_lens: Tensor  # i64 [S], tokens in the cache once this step's rows are stored
    block_table: Tensor  # i64 [S, max blocks], unused entries 0
    block_size: int


@dataclass(frozen=True)
class Batch:
    """T rows of S sequences; rows of one sequence are consecutive and in order of position."""

    tokens: Tensor  # i64 [T]; -1 - r: the one that the step before sampled for its row r
    slots: Tensor  # i64 [T], where each row's key and value are stored
    sample_rows: Tensor | None  # i64 [R], the rows whose logits are wanted; None: all of them
    attn: AttnBatch
    sampled: Tensor | None = None  # i64, what the step before sampled, if that is needed


@dataclass(frozen=True)
class LayerKV:
    """The cache of one layer; every block of every sequence."""

    k: Tensor  # [blocks, block_size, Hk, D]
    v: Tensor  # [blocks, block_size, Hk, D]


def token_ids(tokens: Tensor, sampled: Tensor | None) -> Tensor:
    """A batch's tokens [T], with those that the step before sampled in their places."""
    if sampled is None or not len(sampled):
        return tokens
    return torch.where(tokens < 0, sampled[(-1 - tokens).clamp_min(0)], tokens)
