"""Residual, norm, rotation and activation: close to the reference, the same bits in any company."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import NO_COMPILER
from tests.kernels.emulator.gpu import EmulatedGpu
from worker_orcd.backends.base import Heads, Norm, Part, Rope, value_of
from worker_orcd.backends.batch import AttnBatch, Batch, LayerKV
from worker_orcd.backends.torch_ref import TorchBackend, normalize
from worker_orcd.kernels.gpu import Gpu
from worker_orcd.kernels.ops import ops as kernel_ops
from worker_orcd.kernels.ops.ops import Ops, image_shape

BLOCK_SIZE = 16


def close(found: Tensor, expected: Tensor, limit: float = 2e-6) -> None:
    assert found.shape == expected.shape
    assert ((found.double() - expected.double()).norm() / expected.double().norm()).item() < limit


def random(gpu: Gpu, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[-1])).to(gpu.device)


def rows_of(image: Tensor, num_rows: int, width: int) -> Tensor:
    """An image undone: bf16 [T, K], after a look at the zeros that pad it."""
    pieces, groups = image.shape[:2]
    units = image.view(pieces, groups * 8, 8, 8)
    token = torch.arange(groups * 8, device=image.device)[:, None]
    unit = torch.arange(8, device=image.device)
    straight = units[:, token, unit ^ (token & 7)]  # [pieces, tokens, units, 8]
    chunks = straight.view(pieces // 2, 2, groups * 8, 8, 8).transpose(1, 2).reshape(pieces // 2, groups * 8, 128)
    place = torch.arange(128, device=image.device)
    k = 32 * (place >> 1 & 3) + 4 * (place >> 4) + 2 * (place >> 3 & 1) + (place & 1)
    rows = torch.empty_like(chunks)
    rows[:, :, k] = chunks
    rows = rows.transpose(0, 1).reshape(groups * 8, -1)[:num_rows]
    assert not rows[:, width:].any()
    return rows[:, :width]


@pytest.mark.parametrize("num_rows", [0, 1, 9, 20])
@pytest.mark.parametrize("width", [4, 96, 256, 300])
def test_image(num_rows: int, width: int, gpu: Gpu) -> None:
    x = random(gpu, num_rows, width)
    image = Ops(gpu).to_image(x)
    assert tuple(image.shape) == image_shape(num_rows, width)
    assert torch.equal(rows_of(image, num_rows, width), x.bfloat16())


def test_image_of_rows_that_end_anywhere(gpu: Gpu) -> None:
    x = random(gpu, 3, 37)
    assert torch.equal(rows_of(Ops(gpu).to_image(x), 3, 37), x.bfloat16())


@pytest.mark.parametrize("width", [4, 96, 2052, 5120])
@pytest.mark.parametrize("slices", [1, 3])
def test_add_and_norm(width: int, slices: int, gpu: Gpu) -> None:
    ops, rows = Ops(gpu), 11
    x, y, bias, weight = (random(gpu, *s, width) for s in ((rows,), (slices, rows), (), ()))
    expected = x + value_of(Part(y, bias))
    kept = x.clone()
    image = ops.add_norm(kept, kernel_ops.Part(y, bias), (weight, None, 1e-5))
    assert image is not None
    assert torch.equal(kept, expected)
    close(rows_of(image, rows, width).float(), normalize(expected, Norm(weight, 1e-5)), 4e-3)
    for start, end in ((0, 1), (3, 11)):
        part = x[start:end].clone()
        again = ops.add_norm(part, kernel_ops.Part(y[:, start:end].contiguous(), bias), (weight, None, 1e-5))
        assert again is not None
        assert torch.equal(part, expected[start:end])
        assert torch.equal(rows_of(again, end - start, width), rows_of(image, rows, width)[start:end])
    only = x.clone()
    assert ops.add_norm(only, kernel_ops.Part(y, bias), None) is None
    assert torch.equal(only, expected)
    normed = ops.add_norm(only, None, (weight, None, 1e-5))
    assert normed is not None
    assert torch.equal(only, expected), "without something to add the rows stay as they are"
    assert torch.equal(rows_of(normed, rows, width), rows_of(image, rows, width))


def test_norm_of_what_is_added_and_layer_norm(gpu: Gpu) -> None:
    ops, width = Ops(gpu), 96
    x, y, weight, bias = (
        random(gpu, 5, width),
        random(gpu, 1, 5, width) * 3 + 1,
        random(gpu, width),
        random(gpu, width),
    )
    expected = x + 0.25 * normalize(y[0], Norm(weight, 1e-6))
    image = ops.add_norm(x, kernel_ops.Part(y, None), (weight, bias, 1e-5), after=(weight, None, 1e-6), factor=0.25)
    assert image is not None
    close(x, expected)
    wanted = torch.nn.functional.layer_norm(expected, (width,), weight, bias, 1e-5)
    close(rows_of(image, 5, width).float(), wanted, 4e-3)


@pytest.mark.parametrize("width", [96, 2052, 5120])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_after", [False, True])
def test_one_operation_gives_the_bits_of_two(width: int, has_bias: bool, has_after: bool, gpu: Gpu) -> None:
    """A last layer ends with both or each by itself: it depends on which rows are wanted."""
    ops, rows = Ops(gpu), 5
    x, y, weight, bias = (random(gpu, *s, width) for s in ((rows,), (3, rows), (), ()))
    part, after = kernel_ops.Part(y, bias), (weight, None, 1e-6) if has_after else None
    norm = weight, bias * 2 if has_bias else None, 1e-5
    together, apart = x.clone(), x.clone()
    image = ops.add_norm(together, part, norm, after, 0.25)
    ops.add_norm(apart, part, None, after, 0.25)
    second = ops.add_norm(apart[[3, 1]], None, norm)
    assert image is not None
    assert second is not None
    assert torch.equal(together, apart)
    assert torch.equal(rows_of(second, 2, width), rows_of(image, rows, width)[[3, 1]])


@pytest.mark.parametrize("width", [4, 160, 2052])
@pytest.mark.parametrize("is_joined", [False, True])
def test_activate(width: int, is_joined: bool, gpu: Gpu) -> None:
    ops = Ops(gpu)
    gate, up, bias = random(gpu, 2, 9, width) * 4, random(gpu, 3, 9, width), random(gpu, width)
    parts = [kernel_ops.Part(gate), kernel_ops.Part(up, bias)]
    if is_joined:
        parts = [kernel_ops.Part(torch.cat([gate, up[:2]], 2), torch.cat([torch.zeros_like(bias), bias]))]
        up = up[:2].contiguous()
    g, u = value_of(Part(gate, None)), value_of(Part(up, bias))
    image = ops.activate(parts, width)
    close(rows_of(image, 9, width).float(), g / (1 + torch.exp(-g)) * u, 4e-3)
    few = [part._replace(slices=part.slices[:, 4:6].contiguous()) for part in parts]
    assert torch.equal(rows_of(ops.activate(few, width), 2, width), rows_of(image, 9, width)[4:6])


@pytest.mark.parametrize("widths", [(5,), (257, 3), (64, 32, 32)])
def test_total(widths: tuple[int, ...], gpu: Gpu) -> None:
    sums = [kernel_ops.Part(random(gpu, i + 1, 6, n), random(gpu, n) if i else None) for i, n in enumerate(widths)]
    expected = torch.cat([value_of(Part(part.slices, part.bias)) for part in sums], 1)
    assert torch.equal(Ops(gpu).total(sums), expected)


@dataclass
class Case:
    """Three sequences with contexts of 700, 20 and 257 tokens, whose last 5, 20 and 1 tokens are the rows."""

    batch: Batch
    kv: LayerKV


def case(gpu: Gpu, kv_heads: int, dim: int, dtype: torch.dtype, contexts: tuple[int, ...] = (700, 20, 257)) -> Case:
    counts = tuple(min(c, n) for c, n in zip(contexts, (5, 20, 1), strict=True))
    longest = -(-max(contexts) // BLOCK_SIZE)
    generator = torch.Generator().manual_seed(dim)
    table = torch.randperm(3 * longest, generator=generator).view(3, longest)
    positions = torch.cat([torch.arange(c - n, c) for c, n in zip(contexts, counts, strict=True)])
    starts = torch.tensor([0, *counts]).cumsum(0)
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    slots = table[owner, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    shape = (3 * longest, BLOCK_SIZE, kv_heads, dim)
    kv = LayerKV(*(torch.randn(shape, generator=generator).to(gpu.device, dtype) for _ in range(2)))
    at = [t.to(gpu.device) for t in (positions, starts, torch.tensor(contexts), table, slots)]
    attn = AttnBatch(at[0], at[1], at[2], at[3], BLOCK_SIZE)
    return Case(Batch(at[0], at[4], at[0][:1], attn), kv)


HEADS = [(4, 2, 24), (14, 2, 64), (8, 1, 256), (5, 5, 80)]


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
@pytest.mark.parametrize("is_normed", [False, True])
def test_rope_and_store(style: str, heads: int, kv_heads: int, dim: int, is_normed: bool, gpu: Gpu) -> None:
    made, other = (case(gpu, kv_heads, dim, torch.float32) for _ in range(2))
    batch, reference = made.batch, TorchBackend(gpu.device)
    angles = torch.rand(700, dim // 2 - 2).to(gpu.device) * 7  # the last four dimensions pass
    rope = Rope(angles.cos(), angles.sin(), style)  # type: ignore[arg-type]
    rows, shape = len(batch.attn.positions), Heads(heads, kv_heads, dim)
    norms = [Norm(random(gpu, dim), 1e-6) if is_normed else None for _ in range(2)]
    qkv = [
        kernel_ops.Part(random(gpu, 2, rows, heads * dim), random(gpu, heads * dim)),
        kernel_ops.Part(random(gpu, 1, rows, kv_heads * dim)),
        kernel_ops.Part(random(gpu, 3, rows, kv_heads * dim)),
    ]
    found = Ops(gpu).rope_store(
        qkv, (heads, kv_heads, dim), tuple(n and (n.weight, None, n.eps) for n in norms),  # type: ignore[arg-type]
        (made.kv.k, made.kv.v), (batch.attn.positions, batch.slots), (rope.cos, rope.sin), style == "interleaved",
    )  # fmt: skip
    shape = Heads(heads, kv_heads, dim, *norms)
    expected = reference.rope_and_store(tuple(Part(p.slices, p.bias) for p in qkv), shape, other.kv, batch, rope)
    same: Callable[[Tensor, Tensor], None] = close if is_normed else exactly
    same(found, expected)
    same(made.kv.k, other.kv.k)
    exactly(made.kv.v, other.kv.v)


def exactly(found: Tensor, expected: Tensor) -> None:
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cache_of_16_bits_is_rounded_to_the_nearest(dtype: torch.dtype, gpu: Gpu) -> None:
    made = case(gpu, 2, 24, dtype)
    batch, rows = made.batch, len(made.batch.slots)
    qkv, table = random(gpu, 1, rows, 5 * 24), torch.ones(700, 12, device=gpu.device)
    Ops(gpu).rope_store(
        [kernel_ops.Part(qkv)], (1, 2, 24), (None, None), (made.kv.k, made.kv.v), (batch.attn.positions, batch.slots),
        (table, table * 0), False,
    )  # fmt: skip
    stored = made.kv.v.view(-1, 2 * 24)[batch.slots]
    assert torch.equal(stored, qkv[0, :, 3 * 24 :].to(dtype))
    assert torch.equal(made.kv.k.view(-1, 2 * 24)[batch.slots], qkv[0, :, 24 : 3 * 24].to(dtype))


@NO_COMPILER
@pytest.mark.parametrize("order", [1, 2])
def test_the_order_in_which_threads_run_does_not_matter(order: int) -> None:
    """A barrier too few would show here."""
    plain, other = Ops(EmulatedGpu()), Ops(EmulatedGpu(order=order))
    x, y, weight = torch.randn(2, 2052), torch.randn(3, 2, 2052), torch.randn(2052)
    images = [
        ops.add_norm(x.clone(), kernel_ops.Part(y, None), (weight, weight, 1e-5), (weight, None, 1e-5))
        for ops in (plain, other)
    ]
    assert all(image is not None for image in images)
    assert torch.equal(rows_of(images[0], 2, 2052), rows_of(images[1], 2, 2052))  # type: ignore[arg-type]


def test_what_does_not_match_is_refused_before_a_launch(gpu: Gpu) -> None:
    ops, x = Ops(gpu), random(gpu, 4, 96)
    y, weight = kernel_ops.Part(x[None].contiguous()), x[0].contiguous()
    table, cache = random(gpu, 8, 6), (torch.zeros(1, 8, 2, 24, device=gpu.device),) * 2
    at = (torch.zeros(4, dtype=torch.int64, device=gpu.device),) * 2
    qkv = kernel_ops.Part(random(gpu, 1, 4, 6 * 24))

    def rope(**changes: object) -> Callable[[], object]:
        args = {"qkv": [qkv], "heads": (2, 2, 24), "norms": (None, None), "cache": cache, "at": at,
                "table": (table, table), "interleaved": False}  # fmt: skip
        return lambda: ops.rope_store(**(args | changes))  # type: ignore[arg-type]

    bad: list[tuple[str, Callable[[], object]]] = [
        ("rows of numbers", lambda: ops.add_norm(x, None, (weight[:95], None, 1e-5))),
        ("float32 and contiguous", lambda: ops.add_norm(x.half(), None, (weight, None, 1e-5))),
        ("float32 and contiguous", lambda: ops.add_norm(x.T, None, None)),
        ("multiple of 4", lambda: ops.add_norm(x[:, :95].contiguous(), None, None)),
        ("sums", lambda: ops.add_norm(x[:2], y, None)),
        ("the bias", lambda: ops.add_norm(x, kernel_ops.Part(y[0], weight[:95].contiguous()), None)),
        ("gate and up", lambda: ops.activate([y, y], 95)),
        ("gate and up", lambda: ops.activate([y, kernel_ops.Part(y[0][..., :48].contiguous())], 48)),
        ("columns are needed", lambda: ops.activate([y], 96)),
        ("has a gate", lambda: ops.activate([y], 96, "clamped", is_gated=False)),
        ("at most", lambda: ops.to_image(torch.zeros(65_536, 4, device=gpu.device))),
        ("columns are needed", rope(heads=(1, 2, 24))),
        ("cannot be taken", rope(heads=(2, 2, 23))),
        ("cannot be taken", rope(table=(table[:, :3].contiguous(), table))),
        ("cannot be taken", rope(heads=(3, 3, 8), table=(table, table))),
        ("a cache", rope(cache=(cache[0].double(), cache[1]))),
        ("a cache", rope(cache=(cache[0], torch.zeros(1, 8, 1, 24, device=gpu.device)))),
        ("int64 and contiguous", rope(at=(at[0].int(), at[1]))),
    ]
    for message, call in bad:
        with pytest.raises(ValueError, match=message.replace("rows of numbers", "rows of 96 numbers")):
            call()
