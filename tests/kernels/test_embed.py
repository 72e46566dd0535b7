"""Rows out of tiles: the bits of the formats' own float32, whatever the stored bytes are."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.kernels.weights import HALVES
from worker_orcd.gguf.types import GgmlType
from worker_orcd.kernels.gpu import Gpu
from worker_orcd.kernels.ops.ops import Ops
from worker_orcd.quant import tiles
from worker_orcd.quant.format import FORMATS, format_of
from worker_orcd.quant.repack import pack

ROWS = 37  # three strips, the last of which is not full
EVERY_FORMAT = pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)


class Table:
    """A matrix [ROWS, k] of random bytes, with scales of both signs below 2."""

    def __init__(self, kind: GgmlType, k: int, gpu: Gpu) -> None:
        self.kind, self.shape, self.ops, self.device = kind, (ROWS, k), Ops(gpu), gpu.device
        generator = torch.Generator().manual_seed(k)
        count = ROWS * k // kind.block_elems
        raw = torch.randint(0, 256, (count, kind.block_bytes), dtype=torch.uint8, generator=generator)
        for byte in (0,) if kind is GgmlType.F16 else HALVES.get(kind, {}):
            raw[:, byte + 1] &= 0xBF  # the upper bit of the exponent
        raw = raw.to(gpu.device)
        self.values = format_of(kind).dequantize(raw).view(ROWS, k)
        self.tiles = pack(raw.flatten(), kind, self.shape)

    def embed(self, tokens: Sequence[int], sampled: Sequence[int] | None = None) -> Tensor:
        late = None if sampled is None else torch.tensor(sampled, dtype=torch.int64, device=self.device)
        return self.ops.embed(torch.tensor(tokens, device=self.device), self.tiles, self.kind, self.shape, late)


def exactly(found: Tensor, expected: Tensor) -> None:
    """The same bits: of zeros the sign too, and numbers that are none."""
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


def widths(kind: GgmlType) -> tuple[int, ...]:
    """Less than a tile, whole tiles, and where there can be one, part of a tile."""
    return (256, 768) if kind.block_elems == 256 else (32, 256, 416) if kind.block_elems == 32 else (4, 256, 300)


@EVERY_FORMAT
@pytest.mark.parametrize("many_rows", [2**16, 1])
def test_every_row_has_the_bits_of_the_format(
    kind: GgmlType, many_rows: int, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "MANY_ROWS", many_rows)  # with 1, strips end with half a tile
    for k in widths(kind):
        table, tokens = Table(kind, k, gpu), [*reversed(range(ROWS)), 0, ROWS - 1]
        exactly(table.embed(tokens), table.values[tokens])
        for token in (0, 15, 16, ROWS - 1):
            exactly(table.embed([token]), table.values[[token]])


@EVERY_FORMAT
def test_tokens_without_a_row_read_nothing(kind: GgmlType, gpu: Gpu) -> None:
    table = Table(kind, widths(kind)[-1], gpu)
    found = table.embed([3, -1, ROWS, 48, 2**40, -(2**63), 2**63 - 1, 4])
    assert found[1:7].isnan().all()
    exactly(found[[0, 7]], table.values[[3, 4]])


@EVERY_FORMAT
def test_tokens_that_the_step_before_sampled(kind: GgmlType, gpu: Gpu) -> None:
    table = Table(kind, widths(kind)[-1], gpu)
    sampled = [20, 36, -1, ROWS]
    found = table.embed([3, -2, -1, 5, -2], sampled)
    exactly(found, table.values[[3, 36, 20, 5, 36]])
    assert table.embed([-3, -4, -5, -(2**63)], sampled).isnan().all(), "no tokens, or more than there are"
    assert table.embed([-1], []).isnan().all()


def test_every_exponent_of_mxfp4_is_met(gpu: Gpu) -> None:
    kind, k = GgmlType.MXFP4, 256 * 32
    raw = torch.randint(0, 256, (256, 17), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    raw[:, 0] = torch.arange(256)
    raw = raw.to(gpu.device)
    found = Ops(gpu).embed(torch.tensor([0], device=gpu.device), pack(raw.flatten(), kind, (1, k)), kind, (1, k))
    exactly(found, format_of(kind).dequantize(raw).view(1, k))
