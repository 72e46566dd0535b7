"""From logits to the next token, for all rows of a step at once, on the device that holds the logits.

Order: temperature → repetition penalty → top-k → top-p → min-p → one draw by inverse CDF. Temperature 0 is argmax
(lowest id among equals) after the penalty.

A row's token must not depend on its neighbours, but the order in which a device adds up a row may. So probabilities
become integers, in units of 2^-40 of the likeliest token's: integer sums are exact in every order. What is rarer than
half a unit is never drawn, less than 10^-6 of the mass for any vocabulary. The draw is a counter-based function of
(seed, sample index, position), so history cannot matter either.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worker_orcd.engine.pack import to_device
from worker_orcd.engine.sequence import Sequence

MIN_PENALTY = 1e-6  # a repetition penalty of 0 is legal; it divides
MIN_TEMPERATURE = 1e-6  # below it the likeliest token has all the mass, and dividing could overflow
UNITS = 2.0**40  # weight of the likeliest token; the sum over 2^20 ids stays below 2^63
ROW_TILE = 8  # rows worked on at once: bounds the float64 and int64 copies of the logits
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
MASK32 = np.uint64(0xFFFFFFFF)
SHIFT32 = np.uint64(32)

Words = NDArray[np.uint64]  # each element below 2^32


def philox(key: tuple[Words, Words], counter: tuple[Words, Words, Words, Words]) -> tuple[Words, ...]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), element by element."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    m0, m1 = (np.uint64(m) for m in PHILOX_MULTIPLIERS)
    w0, w1 = (np.uint64(w) for w in PHILOX_WEYL)
    for _ in range(10):
        p0, p1 = m0 * c0, m1 * c2
        c0, c1, c2, c3 = (p1 >> SHIFT32) ^ c1 ^ k0, p1 & MASK32, (p0 >> SHIFT32) ^ c3 ^ k1, p0 & MASK32
        k0, k1 = (k0 + w0) & MASK32, (k1 + w1) & MASK32
    return c0, c1, c2, c3


def uniforms(seeds: Sequences[int], positions: Sequences[int], sample_index: int = 0) -> NDArray[np.float64]:
    """The draws in [0, 1) that decide the tokens at `positions` (0 = first prompt token): 53 random bits each."""
    key = np.array(seeds, dtype=np.uint64)
    position = np.array(positions, dtype=np.uint64)
    zero = np.zeros_like(key)
    high, low, _, _ = philox((key & MASK32, key >> SHIFT32), (position, zero + np.uint64(sample_index), zero, zero))
    return ((high << np.uint64(21)) | (low >> np.uint64(11))).astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class SamplingBatch:
    """The sampling parameters of R rows as columns [R, 1], on the device of the logits."""

    temperature: Tensor  # f64; 1 for greedy rows
    is_greedy: Tensor  # bool
    top_k: Tensor  # i64; the largest integer when off
    top_p: Tensor  # f64
    min_p: Tensor  # f64
    uniform: Tensor  # f64, the draw
    penalty: Tensor  # f64 [P], one for each (row, id) below
    seen_rows: Tensor  # i64 [P]
    seen_ids: Tensor  # i64 [P], generated ids of rows with a penalty; doubles are fine
    seen_starts: list[int]  # [R + 1], where the ids of each row begin
    has_filters: bool  # top-k, top-p or min-p in any row
    is_all_greedy: bool

    @classmethod
    def of(cls, rows: list[Sequence], last_sampled: Tensor | None, device: torch.device) -> SamplingBatch:
        """For the next token of each sequence. Ids the host does not know yet come from `last_sampled` [R before]."""
        params = [seq.request.sampling for seq in rows]
        greedy = [p.temperature < MIN_TEMPERATURE for p in params]
        columns = [
            [1.0 if is_greedy else p.temperature for p, is_greedy in zip(params, greedy, strict=True)],
            greedy,
            [p.top_k or 2**62 for p in params],
            [p.top_p for p in params],
            [p.min_p for p in params],
            uniforms([p.seed for p in params], [seq.num_tokens for seq in rows]),
        ]
        floats = to_device(np.array(columns, dtype=np.float64), device).unsqueeze(-1)  # top_k ≤ 2^53 or off
        penalty, (seen_rows, seen_ids), seen_starts = _history(rows, last_sampled, device)
        return cls(
            floats[0], floats[1] > 0, floats[2].long(), floats[3], floats[4], floats[5], penalty, seen_rows, seen_ids,
            seen_starts,
            has_filters=any(p.top_k or p.top_p < 1.0 or p.min_p for p in params),
            is_all_greedy=all(greedy),
        )  # fmt: skip

    def tile(self, first: int, last: int) -> SamplingBatch:
        """Rows `first` to `last - 1`."""
        rows, starts = slice(first, last), self.seen_starts[first : last + 1]
        mine = slice(starts[0], starts[-1])  # known to the host: a mask would make it wait for the device
        return SamplingBatch(
            self.temperature[rows], self.is_greedy[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows],
            self.uniform[rows], self.penalty[mine], self.seen_rows[mine] - first, self.seen_ids[mine],
            [start - starts[0] for start in starts], self.has_filters, self.is_all_greedy,
        )  # fmt: skip


def _history(
    rows: list[Sequence], last_sampled: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor, list[int]]:
    """Penalty [P], row and id [2, P] of every generated token of rows with a penalty, and where each row's begin."""
    penalties, owners, ids, starts = list[float](), list[int](), list[int](), [0]
    late_at, late_sources = list[int](), list[int]()
    for row, seq in enumerate(rows):
        penalty = seq.request.sampling.repetition_penalty
        if penalty != 1.0:
            ids += seq.generated
            if seq.num_unknown:
                late_at.append(len(ids))
                late_sources.append(seq.sampled_row)
                ids.append(0)
            owners += [row] * (len(ids) - starts[-1])
            penalties += [max(penalty, MIN_PENALTY)] * (len(ids) - starts[-1])
        starts.append(len(ids))
    columns = to_device(np.array([owners, ids], dtype=np.int64), device)
    if late_at:
        assert last_sampled is not None
        late = to_device(np.array([late_at, late_sources], dtype=np.int64), device)
        columns[1, late[0]] = last_sampled[late[1]]
    return to_device(np.array(penalties, dtype=np.float64), device), columns, starts


class Sampler:
    """Chooses tokens; `unsampleable` ids (padding and unused rows of the vocabulary) never win."""

    def __init__(self, unsampleable: list[int], device: torch.device) -> None:
        self._unsampleable = torch.tensor(unsampleable, dtype=torch.int64, device=device)

    def sample(self, logits: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
        """`logits` [R, V] → ids i64 [R], and bool [R]: False where logits are not finite and the id means nothing."""
        tiles = range(0, len(logits), ROW_TILE)
        parts = [self._sample(logits[i : i + ROW_TILE], batch.tile(i, i + ROW_TILE)) for i in tiles]
        if not parts:
            return logits.new_empty(0, dtype=torch.int64), logits.new_empty(0, dtype=torch.bool)
        ids, is_finite = zip(*parts, strict=True)
        return torch.cat(ids), torch.cat(is_finite)

    def _sample(self, logits: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
        is_finite = torch.isfinite(logits).all(-1)
        scores = torch.where(is_finite[:, None], logits, 0.0).double()
        scores[:, self._unsampleable] = -torch.inf
        scores /= batch.temperature
        penalize(scores, batch)
        best = scores.argmax(-1)
        if batch.is_all_greedy:
            return best, is_finite
        weights = (torch.exp(scores - scores.amax(-1, keepdim=True)) * UNITS).round().long()
        if batch.has_filters:
            weights = filtered(scores, weights, batch)
        return torch.where(batch.is_greedy[:, 0], best, draw(weights, batch.uniform)), is_finite


def penalize(scores: Tensor, batch: SamplingBatch) -> None:
    """Divide positive and multiply negative scores [R, V] of every generated id, each id once, in place.

    Keskar et al., arXiv:1909.05858, section 4.1, over the answer only.
    """
    seen = scores[batch.seen_rows, batch.seen_ids]
    changed = torch.where(seen > 0, seen / batch.penalty, seen * batch.penalty)
    scores[batch.seen_rows, batch.seen_ids] = changed  # doubles write the same value


def filtered(scores: Tensor, weights: Tensor, batch: SamplingBatch) -> Tensor:
    """Weights i64 [R, V] with 0 for what top-k, top-p (arXiv:1904.09751) or min-p (arXiv:2407.01082) leaves out."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    ordered = weights.gather(-1, order)
    rank = torch.arange(weights.shape[-1], device=weights.device)
    in_top_k = rank < batch.top_k
    ordered = ordered * in_top_k
    before = ordered.cumsum(-1) - ordered  # the mass of everything likelier
    is_off = batch.top_p >= 1.0  # said, not computed: float64 rounds the sums of a large vocabulary
    is_kept = is_off | (before < batch.top_p * ordered.sum(-1, keepdim=True))
    is_kept &= ordered >= batch.min_p * ordered[:, :1]
    is_kept[:, 0] = True
    return torch.zeros_like(weights).scatter_(-1, order, ordered * is_kept)


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Index [R] of the first entry whose running sum exceeds `uniform` [R, 1] of the total; weight 0 never wins."""
    total = weights.sum(-1, keepdim=True)
    target = torch.minimum((uniform * total).long(), total - 1)
    return (weights.cumsum(-1) <= target).sum(-1)
