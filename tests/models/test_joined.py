"""Matrices that share an input become one where they are neighbours of one format."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from worker_orcd.backends.base import PackedWeight
from worker_orcd.backends.torch_ref import TorchBackend
from worker_orcd.gguf.types import GgmlType
from worker_orcd.models.layers import _joined

Q4, Q6 = GgmlType.Q4_K, GgmlType.Q6_K


class Joiner(TorchBackend):
    def join(self, weights: Sequence[PackedWeight], count: int = 1) -> PackedWeight | None:
        assert count == 1
        if sum(weight.shape[0] for weight in weights) > 100:
            return None  # as one that does not end with a tile
        parts = tuple(part for weight in weights for part in weight.parts)
        return PackedWeight(weights[0].type, (sum(w.shape[0] for w in weights), weights[0].shape[1]), parts)


@pytest.mark.parametrize(
    ("kinds", "widths", "biased", "expected"),
    [
        ([Q4, Q4, Q4], [32, 16, 16], [False] * 3, [64]),
        ([Q4, Q4, Q6], [32, 16, 16], [True] * 3, [48, 16]),
        ([Q4, Q6, Q4], [32, 16, 16], [False] * 3, [32, 16, 16]),
        ([Q4, Q4, Q4], [32, 16, 16], [True, True, False], [48, 16]),
        ([Q4, Q4], [96, 16], [False] * 2, [96, 16]),
        ([Q4], [32], [True], [32]),
    ],
)
def test_neighbours(kinds: list[GgmlType], widths: list[int], biased: list[bool], expected: list[int]) -> None:
    parts = tuple(
        (PackedWeight(kind, (n, 256), (torch.tensor(i),)), torch.full((n,), float(i)) if has_bias else None)
        for i, (kind, n, has_bias) in enumerate(zip(kinds, widths, biased, strict=True))
    )
    found = _joined(parts, Joiner(torch.device("cpu")), 1)
    assert [weight.shape[0] for weight, _ in found] == expected
    assert [int(part) for weight, _ in found for part in weight.parts] == list(range(len(kinds)))
    biases = [bias for _, bias in found if bias is not None]
    assert all(bias is None or len(bias) == weight.shape[0] for weight, bias in found)
    assert sum(map(len, biases)) == sum(n for n, has in zip(widths, biased, strict=True) if has)
