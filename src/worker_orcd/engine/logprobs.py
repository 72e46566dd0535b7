"""Log-probabilities of the model's own distribution, before any filter or penalty; on the device of the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from worker_orcd.engine.filters import UNITS, weigh
from worker_orcd.engine.request import TokenLogprob

ROW_TILE = 8  # rows worked on at once, as in engine/sampler.py


def log_probabilities(logits: Tensor, table: Tensor, k: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """For pairs of row and id, i64 [2, N], in logits [R, V]: the id's and the k largest, f32 and i64 [N, 1 + k].

    Equal ones go by id; `hidden` ids are no candidates. The sum over a row is one of integers, so a row has the same
    bits beside any others.
    """
    k = min(k, logits.shape[1] - len(hidden))
    tiles = table.split(ROW_TILE, dim=1)  # type: ignore[no-untyped-call]
    parts = [_log_probabilities(logits[rows], targets[:, None], k, hidden) for rows, targets in tiles]
    return torch.cat([values for values, _ in parts]), torch.cat([ids for _, ids in parts])


def _log_probabilities(logits: Tensor, targets: Tensor, k: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
    ids = torch.cat([targets, _largest(logits, k, hidden)], -1)
    total = weigh(logits.double()).sum(-1, keepdim=True).double()
    shift = logits.double().amax(-1, keepdim=True) + torch.log(total / UNITS)
    return (logits.gather(-1, ids).double() - shift).float(), ids


def _largest(logits: Tensor, k: int, hidden: Tensor) -> Tensor:
    """Ids [R, k] of the largest logits. Float and id make one number, so no two are equal and the answer is one."""
    bits = (logits + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ordered = (bits ^ (bits >> 31 & 0x7FFFFFFF)).long()
    keys = ordered * 2**32 - torch.arange(logits.shape[1], device=logits.device)
    keys[:, hidden] = torch.iinfo(torch.int64).min
    return keys.topk(k).indices


def describe(values: list[float], ids: list[int], num_top: int) -> TokenLogprob:
    """One row of `log_probabilities`."""
    return TokenLogprob(values[0], list(zip(ids[1 : 1 + num_top], values[1 : 1 + num_top], strict=True)))
