"""From logits to the next token.

Order: temperature → repetition penalty → top-k → top-p → min-p → one draw by inverse CDF. Temperature 0 is argmax
(lowest id among equals) after the penalty. Everything is float64 and sees one row at a time, so neighbours cannot
matter; the draw is a counter-based function of (seed, sample index, position), so neither can history.
"""

from __future__ import annotations

import torch
from torch import Tensor

from worker_orcd.engine.request import SamplingParams
from worker_orcd.errors import NumericFault

MIN_PENALTY = 1e-6  # a repetition penalty of 0 is legal; it divides
MIN_TEMPERATURE = 1e-6  # below it the likeliest token has all the mass, and dividing could overflow
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
MASK32 = 0xFFFFFFFF


def philox(seed: int, counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    `seed` is the 64-bit key, low word first; `counter` and result are four 32-bit words.
    """
    k0, k1 = seed & MASK32, seed >> 32
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0, p1 = PHILOX_MULTIPLIERS[0] * c0, PHILOX_MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK32, (p0 >> 32) ^ c3 ^ k1, p0 & MASK32
        k0, k1 = (k0 + PHILOX_WEYL[0]) & MASK32, (k1 + PHILOX_WEYL[1]) & MASK32
    return c0, c1, c2, c3


def uniform(seed: int, sample_index: int, position: int) -> float:
    """The draw in [0, 1) that decides the token at `position` (0 = first prompt token): 53 random bits."""
    high, low, _, _ = philox(seed, (position, sample_index, 0, 0))
    return ((high << 21) | (low >> 11)) * 2.0**-53


class Sampler:
    """Chooses tokens; `unsampleable` ids (padding and unused rows of the vocabulary) never win."""

    def __init__(self, unsampleable: list[int]) -> None:
        self._unsampleable = torch.tensor(unsampleable, dtype=torch.int64)

    def sample(self, logits: Tensor, params: SamplingParams, generated: list[int], position: int) -> int:
        """`logits` [V] → id of the token at `position`. Raises NumericFault on NaN or infinity."""
        scores = logits.double().cpu()  # a copy: filters write to it
        if not bool(torch.isfinite(scores).all()):
            raise NumericFault(f"logits for position {position} are not finite")
        scores[self._unsampleable] = -torch.inf
        is_greedy = params.temperature < MIN_TEMPERATURE
        if not is_greedy:
            scores /= params.temperature
        penalize(scores, generated, params.repetition_penalty)
        if is_greedy:
            return int(scores.argmax())
        ids, probs = distribution(scores, params)
        return int(ids[draw(probs, uniform(params.seed, 0, position))])


def penalize(scores: Tensor, generated: list[int], penalty: float) -> None:
    """Divide positive and multiply negative scores [V] of every generated id, each id once, in place.

    Keskar et al., arXiv:1909.05858, section 4.1, over the answer only.
    """
    if penalty == 1.0 or not generated:
        return
    penalty = max(penalty, MIN_PENALTY)
    ids = torch.tensor(sorted(set(generated)), dtype=torch.int64)
    seen = scores[ids]
    scores[ids] = torch.where(seen > 0, seen / penalty, seen * penalty)


def distribution(scores: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Ids [n] and unnormalised probabilities [n] of the tokens that pass the filters; at least one."""
    ids = torch.arange(len(scores))
    if 0 < params.top_k < len(scores):
        ids = torch.topk(scores, params.top_k).indices.sort().values
    probs = torch.exp(scores[ids] - scores[ids].max())
    if params.top_p < 1.0:
        keep = _nucleus(probs, params.top_p)
        ids, probs = ids[keep], probs[keep]
    if params.min_p > 0.0:
        keep = probs >= params.min_p * probs.max()
        ids, probs = ids[keep], probs[keep]
    return ids, probs


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Mask of the smallest set of likeliest tokens whose share reaches top_p (arXiv:1904.09751)."""
    ordered, order = probs.sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered  # the mass of everything likelier
    keep = torch.zeros_like(probs, dtype=torch.bool)
    keep[order] = before < top_p * ordered.sum()
    keep[order[0]] = True
    return keep


def draw(probs: Tensor, u: float) -> int:
    """Index of the first entry whose cumulative share exceeds `u`; entries of probability 0 never win."""
    cdf = probs.cumsum(0)
    index = int(torch.searchsorted(cdf, u * cdf[-1], right=True))
    return min(index, int(probs.nonzero()[-1]))
