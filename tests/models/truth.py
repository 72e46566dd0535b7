"""What logits of a tiny model are held against: transformers, on the same weights."""

from __future__ import annotations

import torch
from torch import Tensor

from tests import tiny


def tokens(length: int) -> list[int]:
    return torch.randint(3, 321, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def check_close(ours: Tensor, model: tiny.Tiny, ids: list[int]) -> None:
    with torch.no_grad():
        expected = model.model(torch.tensor([ids])).logits[0]
    assert ours.shape == expected.shape
    assert ((ours - expected).norm() / expected.norm()).item() < 1e-4, f"{len(ids)} tokens"
    assert (ours - expected).abs().max() < 1e-3 * expected.abs().max()
