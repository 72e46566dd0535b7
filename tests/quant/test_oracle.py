"""Bit for bit the values of the gguf package, an independent implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from worker_orcd.gguf.types import GgmlType
from worker_orcd.quant.format import FORMATS, format_of

oracle = pytest.importorskip("gguf.quants", reason="the oracle")

HALF_SCALES = {
    GgmlType.F16: (0,),
    GgmlType.Q4_0: (0,),
    GgmlType.Q4_1: (0, 2),
    GgmlType.Q5_0: (0,),
    GgmlType.Q5_1: (0, 2),
    GgmlType.Q8_0: (0,),
    GgmlType.Q4_K: (0, 2),
    GgmlType.Q5_K: (0, 2),
    GgmlType.Q6_K: (208,),
}


def random_blocks(kind: GgmlType, count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(int(kind)).integers(0, 256, (count, kind.block_bytes), np.uint8)


def same_bits(kind: GgmlType, blocks: NDArray[np.uint8]) -> None:
    """All bits agree; where the oracle has a NaN (a NaN scale, inf times 0) so have we, whatever its payload."""
    with np.errstate(all="ignore"):
        wanted = oracle.dequantize(blocks.copy(), int(kind)).reshape(len(blocks), kind.block_elems)
    found = format_of(kind).dequantize(torch.from_numpy(blocks)).numpy()
    nan = np.isnan(wanted)
    assert np.array_equal(np.isnan(found), nan)
    assert np.array_equal(found.view(np.uint32)[~nan], wanted.view(np.uint32)[~nan])


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_random_blocks(kind: GgmlType) -> None:
    same_bits(kind, random_blocks(kind, 3000))


@pytest.mark.parametrize("kind", HALF_SCALES, ids=lambda kind: kind.name)
def test_every_half_precision_scale(kind: GgmlType) -> None:
    """All 65,536 bit patterns: zeros, subnormals, normal numbers, infinities, NaN."""
    every = np.arange(65_536, dtype=np.uint16).view(np.uint8).reshape(-1, 2)
    step = max(1, kind.block_elems // 64)
    every = every[::step] if kind.block_elems > 32 else every
    for at in HALF_SCALES[kind]:
        blocks = random_blocks(kind, len(every))
        for scale in HALF_SCALES[kind]:
            blocks[:, scale : scale + 2] = (0, 60)  # 1.0
        blocks[:, at : at + 2] = every
        same_bits(kind, blocks)


def test_every_exponent_and_code_of_mxfp4() -> None:
    blocks = random_blocks(GgmlType.MXFP4, 256 * 16)
    blocks[:, 0] = np.arange(256).repeat(16)
    blocks[:, 1:] = (np.arange(256, dtype=np.uint8).reshape(16, 16))[np.arange(256 * 16) % 16]
    same_bits(GgmlType.MXFP4, blocks)


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_zero_blocks_strided_and_unaligned_input(kind: GgmlType) -> None:
    dequantize = format_of(kind).dequantize
    assert dequantize(torch.empty(0, kind.block_bytes, dtype=torch.uint8)).shape == (0, kind.block_elems)
    blocks = random_blocks(kind, 8)
    expected = dequantize(torch.from_numpy(blocks))
    wide = torch.zeros(8, kind.block_bytes + 3, dtype=torch.uint8)
    wide[:, 3:] = torch.from_numpy(blocks)
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), torch.from_numpy(blocks).flatten()])[1:]
    for raw in (wide[:, 3:], shifted.view(8, -1)):
        before = raw.clone()
        assert torch.equal(dequantize(raw).view(torch.int32), expected.view(torch.int32))
        assert torch.equal(raw, before)


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_the_result_is_new_memory(kind: GgmlType) -> None:
    raw = torch.from_numpy(random_blocks(kind, 4))
    before = raw.clone()
    format_of(kind).dequantize(raw).zero_()
    assert torch.equal(raw, before)


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_memory_beyond_the_result_is_small(kind: GgmlType) -> None:
    """All that is ever allocated is less than three results: one, and no copy as 64-bit numbers."""
    blocks = torch.from_numpy(random_blocks(kind, 65_536 // kind.block_elems))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        values = format_of(kind).dequantize(blocks)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
    assert allocated <= 3 * values.nbytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_same_bits_on_the_device(kind: GgmlType) -> None:
    blocks = torch.from_numpy(random_blocks(kind, 3000))
    expected = format_of(kind).dequantize(blocks)
    on_device = blocks.cuda()
    torch.cuda.set_sync_debug_mode("error")  # nothing may pass through host memory
    try:
        found = format_of(kind).dequantize(on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.is_cuda
    nan = expected.isnan()
    assert torch.equal(found.cpu().isnan(), nan)
    assert torch.equal(found.cpu().view(torch.int32)[~nan], expected.view(torch.int32)[~nan])
