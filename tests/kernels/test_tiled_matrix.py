"""Dimensions that cannot be right are refused when a matrix is made, long before a launch; needs no GPU."""

from __future__ import annotations

import pytest
import torch

from worker_orcd.gguf.types import GgmlType
from worker_orcd.kernels.linear.linear import TiledMatrix, tiled
from worker_orcd.kernels.linear.plan import plan_linear

K = GgmlType.Q4_K


def tiles(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.uint8)


def test_right_ones_are_taken() -> None:
    assert tiled(tiles(4, 4608), K, (50, 512)).plan.slices == 2
    assert tiled(tiles(1, 576), GgmlType.Q4_0, (1, 32)).plan.slices == 1  # half a tile is enough
    assert tiled(tiles(1, 1152 + 576), GgmlType.Q4_0, (1, 192)).plan.slices == 2
    assert tiled(tiles(1, 2 * 1152), GgmlType.Q4_0, (1, 224)).plan.slices == 2


@pytest.mark.parametrize(
    ("wrong", "shape", "message"),
    [
        (lambda: tiles(4, 4608), (0, 512), "each side must be from 1"),
        (lambda: tiles(4, 4608), (50, -256), "each side must be from 1"),
        (lambda: tiles(4, 4608), (2**31, 512), "each side must be from 1"),
        (lambda: tiles(4, 4608), (65, 512), r"must be u8 \(5, 4608\)"),
        (lambda: tiles(4, 4608), (48, 512), r"must be u8 \(3, 4608\)"),
        (lambda: tiles(4, 4608), (50, 768), r"must be u8 \(4, 6912\)"),
        (lambda: tiles(4, 4607), (50, 512), r"must be u8 \(4, 4608\)"),
        (lambda: tiles(4, 3456), (50, 512), r"must be u8 \(4, 4608\)"),  # Q4_K has no halves
        (lambda: tiles(4, 4608).char(), (50, 512), "not torch.int8"),
        (lambda: tiles(4, 9216)[..., ::2], (50, 512), "contiguous and aligned"),
        (lambda: tiles(4 * 4608 + 1)[1:].view(4, 4608), (50, 512), "aligned to 16 bytes"),
    ],
)
def test_wrong_ones_are_refused(wrong: object, shape: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiled(wrong(), K, shape)  # type: ignore[operator]


@pytest.mark.parametrize("k", [128, 224])
def test_half_a_tile_is_refused_where_more_is_needed(k: int) -> None:
    whole = -(-k // 128) * 1152
    with pytest.raises(ValueError, match=rf"must be u8 \(1, {whole}\)"):
        tiled(tiles(1, whole - 576), GgmlType.Q4_0, (16, k))


def test_a_plan_must_be_of_the_matrix() -> None:
    with pytest.raises(ValueError, match="a plan of Q4_K"):
        TiledMatrix(K, (50, 512), tiles(4, 4608), plan_linear(50, 256, K))
    for slices in (0, 3):
        with pytest.raises(ValueError, match=f"{slices} slices of a matrix with 2 tiles"):
            TiledMatrix(K, (50, 512), tiles(4, 4608), plan_linear(50, 512, K, slices))
