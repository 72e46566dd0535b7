"""The reference backend: right against float64, and each row the same bits among any neighbours."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from worker_orcd.backends.base import AttnSpec, Heads, Norm, Operand, PackedWeight, Part, Rope, Sums, value_of
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


def linear(backend: TorchBackend, x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    return backend.total(backend.linear(Operand(x, *x.shape), ((weight, bias),)))


def sums(*parts: Tensor) -> Sums:
    return tuple(Part(part[None], None) for part in parts)


def silu(backend: TorchBackend, gate: Tensor, up: Tensor) -> Tensor:
    return backend.activate(sums(gate, up), "silu").data


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_is_right(backend: TorchBackend, shape: tuple[int, int]) -> None:
    weight = packed(backend, shape)
    for rows in (0, 1, 7, 8, 9, 33):
        x, bias = torch.randn(rows, shape[1]), torch.randn(shape[0])
        expected = x.double() @ weight.parts[0].double().T + bias.double()
        y = linear(backend, x, weight, bias).double()
        assert y.shape == expected.shape
        assert (y - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_rows_are_bitwise_independent_of_neighbours(backend: TorchBackend, shape: tuple[int, int]) -> None:
    weight = packed(backend, shape)
    row = torch.randn(shape[1])
    alone = linear(backend, row[None], weight)[0]
    for rows in (2, 3, 8, 11, 64, 129):
        for place in {0, 1, rows // 2, rows - 1}:
            x = torch.randn(rows, shape[1]) * 100
            x[place] = row
            assert torch.equal(linear(backend, x, weight)[place], alone), f"row {place} of {rows}"


@pytest.mark.parametrize("width", [1, 3, 40, 96, 256, 896, 4864])
def test_elementwise_and_norm_rows_are_bitwise_independent(backend: TorchBackend, width: int) -> None:
    gate, up, norm = torch.randn(width) * 5, torch.randn(width), Norm(torch.randn(width), 1e-5)
    activated = silu(backend, gate[None], up[None])[0]
    normed = backend.norm(gate[None], norm).data[0]
    for rows in (2, 5, 8, 33, 300):
        for place in (0, rows - 1):
            joint = torch.randn(rows, 2 * width)
            joint[place] = torch.cat([gate, up])
            g, u = joint.split(width, 1)  # views with a stride, as a joined matrix makes them
            assert torch.equal(silu(backend, g, u)[place], activated)
            assert torch.equal(backend.norm(g, norm).data[place], normed)
            x, h = backend.add_norm(g - u, sums(u), norm)
            assert torch.equal(h.data, backend.norm(x, norm).data)


@pytest.mark.parametrize("width", [1, 3, 40, 321, 896])
def test_every_operation_of_a_row_gives_the_same_bits_among_any_neighbours(backend: TorchBackend, width: int) -> None:
    norm = Norm(torch.randn(width), 1e-5, torch.randn(width))
    after = Norm(torch.randn(width), 1e-6)

    def operations(x: Tensor, y: Tensor, z: Tensor) -> list[Tensor]:
        found = [backend.norm(x, norm).data, backend.norm(x, None).data, backend.add(x, sums(y), after, 0.22)]
        added, h = backend.add_norm(x, sums(y), None, after)
        found += [added, h.data, backend.add_norm(x, sums(y), norm, None, 3.0)[1].data]
        for kind in ("silu", "gelu", "gelu_tanh"):
            found.append(backend.activate(sums(y, z), kind).data)
            found.append(backend.activate(sums(y), kind, is_gated=False).data)
        return found

    row = [torch.randn(1, width) * 5 for _ in range(3)]
    alone = operations(*row)
    for rows in (2, 5, 33, 300):
        for place in (0, rows - 1):
            among = [torch.randn(rows, width) for _ in row]
            for tensor, own in zip(among, row, strict=True):
                tensor[place] = own[0]
            for found, expected in zip(operations(*among), alone, strict=True):
                assert torch.equal(found[place], expected[0])


def test_activations_layer_norm_and_what_is_added_against_float64(backend: TorchBackend) -> None:
    x, y = torch.randn(9, 40) * 4 + 2, torch.randn(9, 40)
    weight, bias = torch.randn(40), torch.randn(40)
    wide, wide_y = x.double(), y.double()
    expected = functional.layer_norm(wide, (40,), weight.double(), bias.double(), 1e-5)
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    close(backend.norm(x, Norm(weight, 1e-5, bias)).data.double(), expected)
    assert torch.equal(backend.norm(x, None).data, x)
    close(backend.activate(sums(x), "gelu", False).data.double(), functional.gelu(wide))
    for gate in (x, x * 20):
        tanh = functional.gelu(gate.double(), approximate="tanh")
        close(backend.activate(sums(gate), "gelu_tanh", False).data.double(), tanh)
        close(backend.activate(sums(gate, y), "gelu_tanh").data.double(), tanh * wide_y)
    after = wide_y / (wide_y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    close(backend.add(x, sums(y), Norm(weight, 1e-6), 0.22).double(), wide + 0.22 * after)
    close(backend.add(x, sums(y), scale=12.0).double(), wide + 12.0 * wide_y)


def test_a_norm_as_wide_as_all_heads_acts_on_them_together_and_an_empty_table_turns_nothing(
    backend: TorchBackend,
) -> None:
    heads = Heads(2, 1, 8, Norm(torch.randn(16), 1e-6), Norm(torch.randn(8), 1e-6))
    q, k, v = torch.randn(5, 16), torch.randn(5, 8), torch.randn(5, 8)
    kv, empty = LayerKV(torch.zeros(1, 8, 1, 8), torch.zeros(1, 8, 1, 8)), torch.empty(8, 0)
    at = torch.arange(5)
    attn = AttnBatch(at, torch.tensor([0, 5]), torch.tensor([5]), torch.tensor([[0]]), 8)
    out = backend.rope_and_store(sums(q, k, v), heads, kv, Batch(at, at, at, attn), Rope(empty, empty, "half"))
    assert torch.equal(out.flatten(1), backend.norm(q, heads.q_norm).data)
    assert torch.equal(kv.k[0, :5, 0], backend.norm(k, heads.k_norm).data)
    assert torch.equal(kv.v[0, :5, 0], v)


def test_sums_are_added_in_order(backend: TorchBackend) -> None:
    slices, bias = torch.tensor([[[1e8, 1.0]], [[1.0, 2.0]], [[-1e8, 3.0]]]), torch.tensor([0.5, 0.5])
    assert value_of(Part(slices, bias)).tolist() == [[0.5, 6.5]]  # 1e8 + 1 is 1e8 in float32
    both = (Part(slices, bias), Part(slices, None))
    assert backend.total(both).tolist() == [[0.5, 6.5, 0.0, 6.0]]
    x = torch.ones(1, 4)
    assert backend.add(x.clone(), both).tolist() == backend.add_norm(x, both, Norm(x[0], 0.0))[0].tolist()


def test_silu_and_norm_against_float64(backend: TorchBackend) -> None:
    x, up, weight = torch.randn(9, 40) * 8, torch.randn(9, 40), torch.randn(40)
    wide = x.double()
    torch.testing.assert_close(
        silu(backend, x, up).double(), wide * torch.sigmoid(wide) * up.double(), rtol=1e-5, atol=1e-6
    )
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    torch.testing.assert_close(backend.norm(x, Norm(weight, 1e-6)).data.double(), expected, rtol=1e-5, atol=1e-6)


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
    heads = Heads(2, 1, head_dim)
    qkv = sums(*(part.flatten(1) for part in (q, k, v)))
    out = backend.rope_and_store(qkv, heads, kv, Batch(positions, slots, positions, attn), rope)
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
    norms = Norm(torch.randn(head_dim), 1e-5), Norm(torch.randn(head_dim), 1e-5)
    normed = replace(heads, q_norm=norms[0], k_norm=norms[1])
    plain = sums(*(backend.norm(x.flatten(0, 1), n).data.view(3, -1) for x, n in zip((q, k), norms, strict=True)))
    expected = backend.rope_and_store((*plain, qkv[2]), heads, kv, Batch(positions, slots, positions, attn), rope)
    assert torch.equal(
        backend.rope_and_store(qkv, normed, kv, Batch(positions, slots, positions, attn), rope), expected
    )


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
        if cap := self.spec.soft_cap:
            scores = cap * torch.tanh(scores / cap)
        behind = torch.arange(self.length)[:, None] - torch.arange(self.length)
        scores = scores.masked_fill((behind < 0) | (behind >= (self.spec.window or self.length)), -torch.inf)
        if self.spec.sinks is not None:
            sinks = self.spec.sinks.double()[:, None, None].expand(-1, self.length, 1)
            scores = torch.cat([scores, sinks], -1)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., : self.length], v)


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
    out = backend._attention(torch.cat([c.q[c.length - n :] for c, n in work]), kv, batch, spec)
    return [out[a:b] for a, b in itertools.pairwise(starts)]


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 24), (4, 2, 64), (7, 1, 40)])
@pytest.mark.parametrize("variant", ["plain", "sinks", "all"])
def test_attention_is_right_and_independent(
    backend: TorchBackend, heads: int, kv_heads: int, dim: int, variant: str
) -> None:
    spec = AttnSpec(heads, kv_heads, dim, dim**-0.5)
    if variant != "plain":
        spec = replace(spec, sinks=2.0 * torch.randn(heads) + 2.0)
    if variant == "all":
        spec = replace(spec, window=128, soft_cap=2.0)
    contexts = [Context(n, spec) for n in (1, 2, 17, SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT + 9)]
    whole = [attend(backend, [(c, c.length)], c.length)[0] for c in contexts]
    for context, out in zip(contexts, whole, strict=True):
        torch.testing.assert_close(out.double(), context.expected(), rtol=1e-4, atol=1e-5)
    for block_size in (1, 16, 1024):
        for rows in (1, 5, 20):
            together = attend(backend, [(c, min(rows, c.length)) for c in contexts], block_size)
            for out, reference in zip(together, whole, strict=True):
                assert torch.equal(out, reference[len(reference) - len(out) :])
