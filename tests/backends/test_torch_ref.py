"""The reference backend: right against float64, and each row the same bits among any neighbours."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from worker_orcd.backends.base import AttnSpec, PackedWeight, Rope
from worker_orcd.backends.batch import AttnBatch, Batch, LayerKV
from worker_orcd.backends.torch_ref import SPLIT, TorchBackend
from worker_orcd.gguf.types import GgmlType

SHAPES = [(256, 256), (33, 37), (5, 3), (1, 64), (640, 96), (896, 4864), (97, 1)]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Iterator[TorchBackend]:
    """Tensors of a test are made on the backend's device."""
    torch.manual_seed(0)
    torch.set_default_device(request.param)
    yield TorchBackend(torch.device(request.param))
    torch.set_default_device(None)


def packed(backend: TorchBackend, shape: tuple[int, int]) -> PackedWeight:
    raw = torch.randn(shape).view(torch.uint8).flatten()
    return backend.pack(raw, GgmlType.F32, shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_is_right(backend: TorchBackend, shape: tuple[int, int]) -> None:
    weight = packed(backend, shape)
    for rows in (0, 1, 7, 8, 9, 33):
        x, bias = torch.randn(rows, shape[1]), torch.randn(shape[0])
        expected = x.double() @ weight.parts[0].double().T + bias.double()
        y = backend.linear(x, weight, bias).double()
        assert y.shape == expected.shape
        assert (y - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_rows_are_bitwise_independent_of_neighbours(backend: TorchBackend, shape: tuple[int, int]) -> None:
    weight = packed(backend, shape)
    row = torch.randn(shape[1])
    alone = backend.linear(row[None], weight)[0]
    for rows in (2, 3, 8, 11, 64, 129):
        for place in {0, 1, rows // 2, rows - 1}:
            x = torch.randn(rows, shape[1]) * 100
            x[place] = row
            assert torch.equal(backend.linear(x, weight)[place], alone), f"row {place} of {rows}"


@pytest.mark.parametrize("width", [1, 3, 40, 96, 256, 896, 4864])
def test_elementwise_and_norm_rows_are_bitwise_independent(backend: TorchBackend, width: int) -> None:
    gate, up, weight = torch.randn(width) * 5, torch.randn(width), torch.randn(width)
    activated = backend.activate(gate[None], up[None], "silu")[0]
    normed = backend.norm(gate[None], weight, 1e-5)[0]
    head = backend.norm(torch.stack([up, gate, up])[None], weight, 1e-5)[0, 1]
    for rows in (2, 5, 8, 33, 300):
        for place in (0, rows - 1):
            joint = torch.randn(rows, 2 * width)
            joint[place] = torch.cat([gate, up])
            g, u = joint.split(width, 1)  # views with a stride, as the model makes them
            assert torch.equal(backend.activate(g, u, "silu")[place], activated)
            assert torch.equal(backend.norm(g, weight, 1e-5)[place], normed)
            heads = torch.randn(rows, 3, width)
            heads[place, 1] = gate
            assert torch.equal(backend.norm(heads, weight, 1e-5)[place, 1], head)


def test_silu_and_norm_against_float64(backend: TorchBackend) -> None:
    x, up, weight = torch.randn(9, 40) * 8, torch.randn(9, 40), torch.randn(40)
    wide = x.double()
    torch.testing.assert_close(
        backend.activate(x, up, "silu").double(), wide * torch.sigmoid(wide) * up.double(), rtol=1e-5, atol=1e-6
    )
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    torch.testing.assert_close(backend.norm(x, weight, 1e-6).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_rope_and_store(backend: TorchBackend, style: str) -> None:
    """Pairs turn by the angle of their position; dimensions beyond the table pass; k and v land in their slots."""
    head_dim, rotated = 12, 8
    angles = torch.arange(32, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.01])
    rope = Rope(angles.cos().float(), angles.sin().float(), style)  # type: ignore[arg-type]
    positions, slots = torch.tensor([0, 5, 31]), torch.tensor([9, 2, 7])
    kv = LayerKV(torch.zeros(2, 8, 1, head_dim), torch.zeros(2, 8, 1, head_dim))
    q, k, v = torch.randn(3, 2, head_dim), torch.randn(3, 1, head_dim), torch.randn(3, 1, head_dim)
    attn = AttnBatch(positions, torch.tensor([0, 3]), torch.tensor([32]), torch.tensor([[0, 1]]), 8)
    out = backend.rope_and_store((q, k, v), kv, Batch(positions, slots, positions, attn), rope)
    pairs = [(i, i + 4) if style == "half" else (2 * i, 2 * i + 1) for i in range(4)]
    for row, position in enumerate(positions.tolist()):
        expected = q[row].double().clone()
        for i, (a, b) in enumerate(pairs):
            turn = torch.polar(torch.tensor(1.0, dtype=torch.float64), angles[position, i])
            z = torch.complex(q[row, :, a].double(), q[row, :, b].double()) * turn
            expected[:, a], expected[:, b] = z.real, z.imag
        torch.testing.assert_close(out[row].double(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(out[row, :, rotated:], q[row, :, rotated:])
        assert torch.equal(kv.v.view(16, 1, head_dim)[slots[row]], v[row])
        assert torch.equal(kv.k.view(16, 1, head_dim)[slots[row], :, rotated:], k[row, :, rotated:])
    assert kv.v.view(16, -1).any(1).sum() == 3


class Context:
    """One sequence's keys, values and queries, with the answer in float64."""

    def __init__(self, length: int, spec: AttnSpec) -> None:
        self.length, self.spec = length, spec
        self.q = torch.randn(length, spec.num_heads, spec.head_dim)
        self.k = torch.randn(length, spec.num_kv_heads, spec.head_dim)
        self.v = torch.randn(length, spec.num_kv_heads, spec.head_dim)

    def expected(self) -> Tensor:
        group = self.spec.num_heads // self.spec.num_kv_heads
        k, v = (t.double().repeat_interleave(group, 1) for t in (self.k, self.v))
        scores = torch.einsum("qhd,khd->hqk", self.q.double(), k) * self.spec.scale
        future = torch.ones(self.length, self.length, dtype=torch.bool).triu(1)
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), v)


def attend(backend: TorchBackend, work: list[tuple[Context, int]], block_size: int) -> list[Tensor]:
    """The last n rows of each context, in one batch, over a paged cache with blocks in random order."""
    spec = work[0][0].spec
    needs = [-(-c.length // block_size) for c, _ in work]
    order = torch.randperm(sum(needs)).tolist()
    kv = LayerKV(*(torch.full((sum(needs), block_size, spec.num_kv_heads, spec.head_dim), 7.0) for _ in "kv"))
    tables, positions, starts = [], [], [0]
    for (context, rows), need in zip(work, needs, strict=True):
        blocks = [order.pop() for _ in range(need)]
        for p in range(context.length):
            kv.k[blocks[p // block_size], p % block_size] = context.k[p]
            kv.v[blocks[p // block_size], p % block_size] = context.v[p]
        tables.append(blocks + [0] * (max(needs) - need))
        positions += range(context.length - rows, context.length)
        starts.append(len(positions))
    batch = AttnBatch(
        torch.tensor(positions),
        torch.tensor(starts),
        torch.tensor([c.length for c, _ in work]),
        torch.tensor(tables),
        block_size,
    )
    out = backend.attention(torch.cat([c.q[c.length - n :] for c, n in work]), kv, batch, spec)
    return [out[a:b] for a, b in itertools.pairwise(starts)]


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 24), (4, 2, 64), (7, 1, 40)])
def test_attention_is_right_and_independent(backend: TorchBackend, heads: int, kv_heads: int, dim: int) -> None:
    spec = AttnSpec(heads, kv_heads, dim, dim**-0.5)
    contexts = [Context(n, spec) for n in (1, 2, 17, SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT + 9)]
    whole = [attend(backend, [(c, c.length)], c.length)[0] for c in contexts]
    for context, out in zip(contexts, whole, strict=True):
        torch.testing.assert_close(out.double(), context.expected(), rtol=1e-4, atol=1e-5)
    for block_size in (1, 16, 1024):
        for rows in (1, 5, 20):
            together = attend(backend, [(c, min(rows, c.length)) for c in contexts], block_size)
            for out, reference in zip(together, whole, strict=True):
                assert torch.equal(out, reference[len(reference) - len(out) :])
