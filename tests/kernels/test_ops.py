"""Norm, rotation and activation on the device: close to the reference, the same bits in any company."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from worker_orcd.backends.base import Rope
from worker_orcd.backends.batch import AttnBatch, Batch, LayerKV
from worker_orcd.backends.torch_ref import TorchBackend
from worker_orcd.kernels.ops.ops import Ops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
BLOCK_SIZE = 16


@pytest.fixture(scope="module")
def ops() -> Ops:
    return Ops(torch.device("cuda", 0))


@pytest.fixture(scope="module")
def reference() -> TorchBackend:
    return TorchBackend(torch.device("cuda", 0))


def close(found: Tensor, expected: Tensor, limit: float = 2e-6) -> None:
    assert found.shape == expected.shape
    assert ((found.double() - expected.double()).norm() / expected.double().norm()).item() < limit


@pytest.mark.parametrize("k", [1, 24, 96, 255, 4096, 5000])
def test_norm(k: int, ops: Ops, reference: TorchBackend) -> None:
    x, weight = torch.randn(70, k, device="cuda"), torch.randn(k, device="cuda")
    found = ops.norm(x, weight, 1e-5)
    close(found, reference.norm(x, weight, 1e-5))
    assert torch.equal(ops.norm(x[5:9], weight, 1e-5), found[5:9])
    heads = torch.randn(3, 4, k, device="cuda")
    assert torch.equal(ops.norm(heads, weight, 1e-5)[1], ops.norm(heads[1], weight, 1e-5))


@pytest.mark.parametrize("width", [1, 160, 257, 14336])
def test_silu(width: int, ops: Ops, reference: TorchBackend) -> None:
    both = torch.randn(9, 2 * width, device="cuda") * 4
    gate, up = both.split(width, 1)
    found = ops.silu_times(gate, up)
    close(found, reference.activate(gate, up, "silu"))
    assert torch.equal(ops.silu_times(gate[2:3].contiguous(), up[2:3].contiguous()), found[2:3])
    assert ops.silu_times(gate[:0], up[:0]).shape == (0, width)


@dataclass
class Case:
    """Three sequences with contexts of 700, 20 and 257 tokens, whose last 5, 20 and 1 tokens are the rows."""

    batch: Batch
    kv: LayerKV


def case(kv_heads: int, dim: int, dtype: torch.dtype, contexts: tuple[int, ...] = (700, 20, 257)) -> Case:
    counts = tuple(min(c, n) for c, n in zip(contexts, (5, 20, 1), strict=True))
    longest = -(-max(contexts) // BLOCK_SIZE)
    generator = torch.Generator("cuda").manual_seed(dim)
    table = torch.randperm(3 * longest, device="cuda", generator=generator).view(3, longest)
    positions = torch.cat([torch.arange(c - n, c, device="cuda") for c, n in zip(contexts, counts, strict=True)])
    starts = torch.tensor([0, *counts], device="cuda").cumsum(0)
    owner = torch.repeat_interleave(torch.arange(3, device="cuda"), torch.tensor(counts, device="cuda"))
    slots = table[owner, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    attn = AttnBatch(positions, starts, torch.tensor(contexts, device="cuda"), table, BLOCK_SIZE)
    shape = (3 * longest, BLOCK_SIZE, kv_heads, dim)
    kv = LayerKV(*(torch.randn(shape, device="cuda", generator=generator).to(dtype) for _ in range(2)))
    return Case(Batch(positions, slots, positions[:1], attn), kv)


HEADS = [(4, 2, 24), (14, 2, 64), (32, 8, 128), (32, 32, 96), (8, 1, 256), (5, 5, 80)]


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_rope_and_store(style: str, heads: int, kv_heads: int, dim: int, ops: Ops, reference: TorchBackend) -> None:
    made, other = case(kv_heads, dim, torch.float32), case(kv_heads, dim, torch.float32)
    batch = made.batch
    angles = torch.rand(700, dim // 2 - 2, device="cuda") * 7  # the last four dimensions pass
    rope = Rope(angles.cos(), angles.sin(), style)  # type: ignore[arg-type]
    rows = len(batch.attn.positions)
    q = torch.randn(rows, heads, dim, device="cuda")
    k, v = torch.randn(2, rows, kv_heads, dim, device="cuda")
    at, cache = (batch.attn.positions, batch.slots), (made.kv.k, made.kv.v)
    found = ops.rope_store((q, k, v), cache, at, (rope.cos, rope.sin), style == "interleaved")
    assert torch.equal(found, reference.rope_and_store((q, k, v), other.kv, batch, rope))
    assert torch.equal(made.kv.k, other.kv.k)
    assert torch.equal(made.kv.v, other.kv.v)


def test_what_does_not_match_is_refused_before_a_launch(ops: Ops) -> None:
    x = torch.randn(4, 96, device="cuda")
    with pytest.raises(ValueError, match="rows have 96"):
        ops.norm(x, x[0, :95].contiguous(), 1e-5)
    with pytest.raises(ValueError, match=r"float32 .* is needed"):
        ops.norm(x.half(), x[0].half(), 1e-5)
    with pytest.raises(ValueError, match="differ"):
        ops.silu_times(x[:, :48].contiguous(), x[:, :47].contiguous())
