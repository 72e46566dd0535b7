"""Attention over pages: right against float64, and the same bits for a row in any company and by either kernel.

Without a GPU the kernels run under Triton's interpreter, on small shapes.
"""

from __future__ import annotations

import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

HAS_GPU = torch.cuda.is_available()
pytest.importorskip("triton")

from tests.kernels.emulator.gpu import EmulatedGpu  # noqa: E402
from tests.kernels.test_ops import rows_of  # noqa: E402
from worker_orcd.kernels import attention as kernels  # noqa: E402
from worker_orcd.kernels.attention import (  # noqa: E402
    Call,
    DecodeLaunch,
    FlashAttention,
    Form,
    Pages,
    PromptLaunch,
    Unrotated,
    decode_launch,
    decode_source,
)
from worker_orcd.kernels.gpu import Gpu  # noqa: E402
from worker_orcd.kernels.ops.ops import Ops, Part, image_shape  # noqa: E402
from worker_orcd.kernels.source import Source  # noqa: E402

on_cpu = pytest.mark.skipif(HAS_GPU, reason="the kernels are compiled here, not interpreted")
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="no NVIDIA GPU")
DEVICE = "cuda" if HAS_GPU else "cpu"
QWEN, LLAMA, PHI = Form(14, 2, 64, 0.125), Form(32, 8, 128, 128**-0.5), Form(32, 32, 96, 96**-0.5)
SMALL = Form(4, 2, 16, 0.25)
GPU = Gpu(torch.device("cuda", 0)) if HAS_GPU else EmulatedGpu(shared_bytes=227 * 1024)
FLASH = FlashAttention(GPU, Ops(GPU))


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.gpu(needs_gpu(test))


@dataclass
class World:
    """Sequences with all their queries, keys and values, and a cache that holds them in scattered blocks."""

    form: Form
    q: list[Tensor]  # [n, Hq, D] f32 each
    k: list[Tensor]  # [n, Hk, D]
    v: list[Tensor]
    cache: tuple[Tensor, Tensor]  # [blocks, block_size, Hk, D] each, NaN where nothing was stored
    tables: list[list[int]]
    sinks: Tensor | None = None

    @property
    def block_size(self) -> int:
        return self.cache[0].shape[1]


def build(form: Form, lens: list[int], block_size: int, dtype: torch.dtype, has_sinks: bool = False) -> World:
    g = torch.Generator().manual_seed(sum(lens) + block_size)
    counts = [-(-n // block_size) for n in lens]
    shape = (sum(counts) + 1, block_size, form.num_kv_heads, form.head_dim)
    caches = [torch.full(shape, torch.nan, dtype=dtype, device=DEVICE) for _ in "kv"]
    free = torch.randperm(shape[0], generator=g).tolist()
    world = World(form, [], [], [], (caches[0], caches[1]), [])
    for n, count in zip(lens, counts, strict=True):
        world.q.append(1.5 * torch.randn(n, form.num_heads, form.head_dim, generator=g).to(DEVICE))
        table = [free.pop() for _ in range(count)]
        world.tables.append(table)
        for cache, store in zip(caches, (world.k, world.v), strict=True):
            rows = torch.randn(n, form.num_kv_heads, form.head_dim, generator=g).to(DEVICE, dtype)
            store.append(rows)
            for number, block in enumerate(table):
                piece = rows[number * block_size : (number + 1) * block_size]
                cache[block, : len(piece)] = piece
    if has_sinks:
        world.sinks = torch.randn(form.num_heads, generator=g).to(DEVICE)
    return world


Chunk = tuple[int, int, int]  # sequence, first row, end


def pages_of(world: World, chunks: list[Chunk], width: int = 0) -> Pages:
    width = max(width, *(len(world.tables[s]) for s, _, _ in chunks))
    starts = [0]
    for _, first, end in chunks:
        starts.append(starts[-1] + end - first)
    rows = [world.tables[s] + [0] * (width - len(world.tables[s])) for s, _, _ in chunks]
    return Pages(
        torch.tensor(starts, device=DEVICE),
        torch.tensor([end for _, _, end in chunks], device=DEVICE),
        torch.tensor(rows, device=DEVICE),
    )


def run(world: World, chunks: list[Chunk], width: int = 0) -> list[Tensor]:
    """What `attend` gives each chunk's rows."""
    q = torch.cat([world.q[s][first:end] for s, first, end in chunks])
    out = FLASH.attend(q, *world.cache, pages_of(world, chunks, width), world.form, world.sinks)
    return list(out.split([end - first for _, first, end in chunks]))


def decode(world: World, chunks: list[Chunk], launch: DecodeLaunch) -> Tensor:
    """One row of each sequence with a launch of the test's choice."""
    q = torch.cat([world.q[s][first:end] for s, first, end in chunks])
    out = torch.full_like(q, torch.nan)
    FLASH.launch_decodes(Call(out, q, *world.cache, pages_of(world, chunks), world.form, world.sinks), launch)
    return out


def exact(world: World, s: int, cast: torch.dtype = torch.float64) -> Tensor:
    """All rows of a sequence in float64, from operands rounded to `cast`: softmax by its definition."""
    form, n = world.form, len(world.q[s])
    q = world.q[s].to(cast).double().transpose(0, 1)
    k, v = (x[s].double().repeat_interleave(form.group, 1).transpose(0, 1) for x in (world.k, world.v))
    scores = q @ k.transpose(1, 2) * form.scale
    if form.soft_cap:
        scores = form.soft_cap * torch.tanh(scores / form.soft_cap)
    behind = torch.arange(n, device=DEVICE)[:, None] - torch.arange(n, device=DEVICE)
    hidden = (behind < 0) | ((behind >= form.window) if form.window else (behind < 0))
    scores = scores.masked_fill(hidden, -math.inf)
    if world.sinks is not None:
        sink = world.sinks.double()[:, None, None].expand(-1, n, 1)
        scores = torch.cat([scores, sink], -1)
    return (scores.softmax(-1).to(cast).double()[..., :n] @ v).transpose(0, 1)


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def check_parity(world: World) -> None:
    """Every row of every sequence, as prompts, within twice what rounding operands to the cache's type loses."""
    dtype = world.cache[0].dtype
    found = run(world, [(s, 0, len(q)) for s, q in enumerate(world.q)])
    for s, rows in enumerate(found):
        expected = exact(world, s)
        lost = error(exact(world, s, dtype), expected)
        assert error(rows, expected) < 2 * lost + 1e-6, (s, error(rows, expected), lost)


def check_same(found: Tensor, expected: Tensor, is_exact: bool = HAS_GPU) -> None:
    """Bit for bit; without a GPU prompts are interpreted, decodes emulated, and their powers of 2 differ a little."""
    if is_exact:
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=4e-3, atol=2e-3)


def all_rows(world: World) -> list[Tensor]:
    """Every row, each sequence alone and whole."""
    return [run(world, [(s, 0, len(q))])[0] for s, q in enumerate(world.q)]


VARIANTS = {
    "plain": (SMALL, False),
    "window": (replace(SMALL, window=40), False),
    "window of a tile": (replace(SMALL, window=64), True),
    "sinks": (SMALL, True),
    "soft cap": (replace(SMALL, soft_cap=2.0), False),
    "all": (replace(SMALL, window=300, soft_cap=1.5), True),
    "one head": (Form(1, 1, 16, 0.3), False),
    "group of 7, padded head": (Form(7, 1, 80, 0.1), True),
    "group of 24": (Form(24, 1, 16, 0.3), False),
    "group of 40": (Form(40, 1, 16, 0.3), True),
    "large head": (Form(2, 1, 256, 0.0625), False),
}


@on_cpu
@pytest.mark.parametrize("case", VARIANTS)
def test_close_to_float64(case: str) -> None:
    form, has_sinks = VARIANTS[case]
    check_parity(build(form, [1, 5, 63, 65, 300 if form.group < 20 else 66], 32, torch.float16, has_sinks))


@on_cpu
@pytest.mark.parametrize("block_size", [16, 256])
def test_blocks_of_any_size_give_the_same_bits(block_size: int) -> None:
    world, other = (build(SMALL, [300, 7], size, torch.float16) for size in (block_size, 64))
    other.q, other.k, other.v = world.q, world.k, world.v
    for number, cache in enumerate(other.cache):
        for s, table in enumerate(other.tables):
            for i, block in enumerate(table):
                piece = (world.k, world.v)[number][s][i * 64 : (i + 1) * 64]
                cache[block, : len(piece)] = piece
    check_parity(world)
    assert all(map(torch.equal, all_rows(world), all_rows(other)))


@on_cpu
@pytest.mark.parametrize("case", ["plain", "all", "group of 7, padded head"])
def test_a_row_is_the_same_in_any_company(case: str) -> None:
    form, has_sinks = VARIANTS[case]
    check_company(build(form, [1, 5, 64, 70, 300], 16, torch.float16, has_sinks), 4)


def check_company(world: World, rounds: int) -> None:
    """Chunks of random lengths of random sequences, in random order, give the bits of each sequence alone."""
    rng, expected = random.Random(0), all_rows(world)
    for _ in range(rounds):
        chunks = []
        for s in rng.sample(range(len(world.q)), rng.randint(1, len(world.q))):
            n = len(world.q[s])
            first = rng.randrange(n)
            chunks.append((s, first, rng.choice([first + 1, rng.randint(first + 1, n)])))
        for (s, first, end), rows in zip(chunks, run(world, chunks, rng.choice([0, 100])), strict=True):
            check_same(rows, expected[s][first:end], HAS_GPU or (end - first > 1 and len(expected[s]) > 1))


@on_cpu
@pytest.mark.parametrize("case", ["plain", "window", "all", "group of 40"])
def test_shared_splits_give_the_bits_of_one_program(case: str) -> None:
    form, has_sinks = VARIANTS[case]
    check_parts(build(form, [1, 256, 257, 600], 32, torch.float16, has_sinks), [2, 3])


def check_parts(world: World, parts: list[int]) -> None:
    expected = run(world, [(s, max(0, len(q) - 2), len(q)) for s, q in enumerate(world.q)])  # as prompts of two rows
    chunks = [(s, len(q) - 1, len(q)) for s, q in enumerate(world.q)]
    alone = decode(world, chunks, DecodeLaunch(1, 2))
    check_same(alone, torch.stack([rows[-1] for rows in expected]))
    for num_warps, num_slots in ((1, 3), (2, 2), *([(4, 4)] if world.form.head_dim <= 128 else [])):
        assert torch.equal(decode(world, chunks, DecodeLaunch(num_warps, num_slots)), alone)
    for num_parts in parts:
        check_same(decode(world, chunks, DecodeLaunch(2, 3, num_parts)), alone)
    if world.form.head_dim <= 128:
        check_same(decode(world, chunks, DecodeLaunch(4, 8, splits_of(world, chunks), is_whole=True)), alone)


def splits_of(world: World, chunks: list[Chunk]) -> int:
    q = torch.empty(0)
    return Call(q, q, *world.cache, pages_of(world, chunks), world.form, None).max_splits


@on_cpu
@pytest.mark.parametrize("case", ["plain", "window", "all", "group of 40"])
def test_a_split_at_once_gives_the_bits_of_tile_after_tile(case: str) -> None:
    form, has_sinks = VARIANTS[case]
    world = build(form, [1, 63, 64, 65, 150, 256], 32, torch.float16, has_sinks)
    chunks = [(s, len(q) - 1, len(q)) for s, q in enumerate(world.q)]
    alone = decode(world, chunks, DecodeLaunch(1, 2))
    for num_warps in (2, 4) if case == "plain" else (4,):
        assert torch.equal(decode(world, chunks, DecodeLaunch(num_warps, 8, 1, is_whole=True)), alone)


@on_cpu
@pytest.mark.parametrize("order", [0, 1, 2])
def test_threads_in_any_order_give_the_same_bits(order: int) -> None:
    """Of a decode whose blocks are looked up a few tiles at a time; a missing barrier would show."""
    world = build(SMALL, [300, 5, 129], 2, torch.float16)
    gpu = EmulatedGpu(shared_bytes=227 * 1024, order=order)
    flash, chunks = FlashAttention(gpu, Ops(gpu)), [(s, len(q) - 1, len(q)) for s, q in enumerate(world.q)]
    q = torch.cat([world.q[s][first:end] for s, first, end in chunks])
    alone = decode(world, chunks, DecodeLaunch(1, 2))
    check_same(alone, torch.stack([exact(world, s)[-1].float() for s in range(3)]), is_exact=False)
    whole = DecodeLaunch(4, 8, splits_of(world, chunks), is_whole=True)
    for launch in (*(DecodeLaunch(*how) for how in ((1, 2), (2, 3), (4, 2), (4, 8))), whole):
        out = torch.full_like(q, torch.nan)
        call = Call(out, q, *world.cache, pages_of(world, chunks), world.form, None)
        flash.launch_decodes(call, launch)
        check_same(out, alone)


@pytest.mark.parametrize("form", [SMALL, Form(6, 2, 48, 0.2)])
def test_an_image_holds_the_rows_in_the_order_of_the_matmuls(form: Form) -> None:
    world = build(form, [300, 9, 40], 16, torch.float16)
    width = form.num_heads * form.head_dim
    for chunks in ([(0, 290, 300), (1, 8, 9), (2, 0, 7)], [(0, 299, 300), (1, 8, 9)], [(2, 3, 4)]):
        q = torch.cat([world.q[s][first:end] for s, first, end in chunks])
        pages = pages_of(world, chunks)
        expected = FLASH.attend(q, *world.cache, pages, form).flatten(1)
        image = torch.full(image_shape(len(q), width), torch.nan, dtype=torch.bfloat16, device=DEVICE)
        assert FLASH.attend(q, *world.cache, pages, form, out=image) is image
        found = rows_of(image, len(q), width)
        if HAS_GPU:  # the interpreter cuts bits off where the device rounds
            assert torch.equal(found, expected.bfloat16())
        torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=1e-6)


COMPILE_FOR_HOPPER = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from worker_orcd.kernels import attention_kernels as kernels

TYPES = dict(out="*bf16", q="*fp32", k="*fp16", v="*fp16", query_starts="*i64", context_lens="*i64",
             block_table="*i64", partials="*fp32", num_seqs="i32", table_width="i32", groups="i32", factor="fp32",
             max_splits="i32")
VALUES = dict(SOFT_CAP=0.0, GROUP=4, DIM=64, BLOCK=32, WINDOW=0, ROWS=64, PAD=128, OVERLAPS=True, UNROLL=8,
              sinks=None)

kernel = getattr(kernels, sys.argv[1])
values = {x: VALUES[x] for x in kernel.arg_names if x in VALUES}
types = {x: "constexpr" if x in values else TYPES[x] for x in kernel.arg_names}
aligned = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(kernel.arg_names) if types[x][0] == "*"}
source = ASTSource(kernel, types, constexprs=values, attrs=aligned)
built = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_stages": 3, "launch_pdl": True})
print(built.asm["ptx"])
"""


@pytest.mark.parametrize("name", ["prompt_kernel", "fold_kernel"])
def test_only_integers_are_read_before_the_one_ahead_has_ended(name: str) -> None:
    command = [sys.executable, "-c", COMPILE_FOR_HOPPER, name]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    ptx = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    access = r"(?:ld|st|atom|red|prefetch)\.(?:\w+\.)*global[\w.]*"
    steps = re.findall(rf"griddepcontrol\.\w+|{access}|cp\.async|\bret;", ptx)
    wait = steps.index("griddepcontrol.wait")
    assert steps[0] == "griddepcontrol.launch_dependents"
    assert all(step.startswith("ld.global.cg.b64") for step in steps[1:wait]), steps[:wait]
    assert "cp.async" in steps or name == "fold_kernel"
    assert not any(step.startswith("griddep") for step in steps[wait + 1 :])


@dataclass(frozen=True)
class Sums:
    """How the projection of q, k and v leaves them: one part for each number of `widths` heads."""

    widths: tuple[int, ...]
    slices: tuple[int, ...]  # of each part
    has_bias: bool
    pairs: int  # of a head's numbers that turn
    is_interleaved: bool = False


def unrotated(form: Form, sums: Sums, num_rows: int, context: int) -> tuple[list[Part], Unrotated]:
    """Random sums, as rope_store takes them and as attention does."""
    g = torch.Generator().manual_seed(sum(sums.slices))
    parts = []
    for width, count in zip(sums.widths, sums.slices, strict=True):
        slices = torch.randn(count, num_rows, width * form.head_dim, generator=g).to(DEVICE)
        bias = torch.randn(width * form.head_dim, generator=g).to(DEVICE) if sums.has_bias else None
        parts.append(Part(slices, bias))
    angles = 7 * torch.rand(context, sums.pairs, generator=g).to(DEVICE)
    return parts, Unrotated(parts, angles.cos(), angles.sin(), sums.is_interleaved)


def check_rotation(gpu: Gpu, world: World, sums: Sums, num_parts: int | None = None) -> None:
    """One row of each sequence, one of which is padding: the bits of rope_store and `attend`, in cache and result."""
    form, lens = world.form, [len(q) for q in world.q]
    parts, made_of = unrotated(form, sums, len(lens), max(lens))
    pages = pages_of(world, [(s, n - 1, n) for s, n in enumerate(lens)])
    pages.context_lens[0] = 0
    positions, rows = pages.context_lens.clamp(min=1) - 1, torch.arange(len(lens), device=DEVICE)
    size = world.block_size
    slots = pages.block_table[rows, positions // size] * size + positions % size
    slots[0] = -1
    other = world.cache[0].clone(), world.cache[1].clone()
    dims = form.num_heads, form.num_kv_heads, form.head_dim
    table = made_of.cos, made_of.sin
    q = Ops(gpu).rope_store(parts, dims, (None, None), other, (positions, slots), table, sums.is_interleaved)
    if num_parts is None:
        expected = FLASH.attend(q, *other, pages, form, world.sinks)
        found = FLASH.store_and_attend(made_of, *world.cache, pages, form, world.sinks)
    else:
        found, expected = torch.full_like(q, torch.nan), torch.full_like(q, torch.nan)
        for out, what, cache in ((expected, q, other), (found, made_of, world.cache)):
            call = Call(out, what, *cache, pages, form, world.sinks)
            FLASH.launch_decodes(call, DecodeLaunch(1, 2, num_parts))
    assert torch.equal(found, expected)
    for mine, theirs in zip(world.cache, other, strict=True):
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))


ROTATIONS = {
    "one matrix with a bias": (Form(14, 2, 64, 0.125), Sums((18,), (7,), True, 32), False),
    "v on its own": (Form(8, 2, 128, 0.1), Sums((10, 2), (2, 3), False, 64, True), False),
    "k and v of another kind": (Form(3, 3, 96, 0.1), Sums((3, 6), (1, 4), True, 48), False),
    "some numbers pass": (Form(4, 1, 80, 0.1), Sums((4, 1, 1), (1, 11, 2), True, 20), False),
    "some interleaved ones pass": (Form(4, 2, 32, 0.2), Sums((6, 2), (2, 1), True, 12, True), False),
    "none turn": (Form(2, 2, 16, 0.25), Sums((6,), (1,), True, 0), False),
    "in either type": (SMALL, Sums((8,), (2,), False, 8), False),
    "window and sinks": (Form(8, 1, 64, 0.125, window=128), Sums((10,), (5,), False, 32), True),
}


@pytest.mark.parametrize("case", ROTATIONS)
def test_rows_that_are_rotated_and_stored_here(case: str, gpu: Gpu) -> None:
    form, sums, has_sinks = ROTATIONS[case]
    for dtype in (torch.float16, torch.bfloat16)[: 2 if HAS_GPU or form == SMALL else 1]:  # emulated it takes long
        check_rotation(gpu, build(form, [7, 1, 64, 70, *([300] if HAS_GPU else [])], 32, dtype, has_sinks), sums)
        check_rotation(gpu, build(form, [7, 130], 32, dtype, has_sinks), sums, 1)


@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_programs_that_share_a_row_see_what_one_of_them_stores(num_parts: int, gpu: Gpu) -> None:
    for form in (Form(4, 2, 16, 0.25), Form(4, 2, 16, 0.25, window=300)):
        world = build(form, [9, 1, 256, 257, 600], 16, torch.float16)
        check_rotation(gpu, world, Sums((8,), (3,), True, 8), num_parts)


def test_sums_that_cannot_be_right() -> None:
    world = build(SMALL, [5], 16, torch.float16)
    pages, (_, made_of) = pages_of(world, [(0, 4, 5)]), unrotated(SMALL, Sums((8,), (2,), True, 8), 1, 5)
    for wrong, message in [
        (replace(made_of, sums=made_of.sums[:0]), "128 columns are needed"),
        (replace(made_of, sums=[Part(made_of.sums[0].slices[:, :, :64])]), "128 columns are needed"),
        (replace(made_of, sums=[Part(made_of.sums[0].slices.half())]), "float32"),
        (replace(made_of, sin=made_of.sin[:, 1:]), "tables"),
    ]:
        with pytest.raises(ValueError, match=message):
            FLASH.store_and_attend(wrong, *world.cache, pages, SMALL)


def check_padding(world: World) -> None:
    """A sequence without context, as a padded batch has it, becomes zeros and disturbs nobody."""
    chunks = [(0, 0, 1), (1, len(world.q[1]) - 1, len(world.q[1])), (0, 0, 1)]
    pages = pages_of(world, chunks)
    q = torch.cat([world.q[s][first:end] for s, first, end in chunks])
    expected = FLASH.attend(q, *world.cache, pages, world.form)
    padded = replace(pages, context_lens=pages.context_lens * torch.tensor([0, 1, 0], device=DEVICE))
    found = FLASH.attend(q, *world.cache, padded, world.form)
    assert torch.equal(found[1], expected[1])
    assert not found[0].any()
    assert not found[2].any()


@on_cpu
@pytest.mark.parametrize("lens", [[1, 20], [1, 400]])
def test_padding_sequences_are_zeros(lens: list[int]) -> None:
    check_padding(build(SMALL, lens, 16, torch.float16))


EVERY_SHAPE = pytest.mark.parametrize(
    "form", [QWEN, LLAMA, PHI, Form(8, 1, 80, 0.1), Form(8, 2, 256, 0.0625), Form(48, 1, 64, 0.125)], ids=str
)
EVERY_TYPE = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@on_gpu
@EVERY_SHAPE
@EVERY_TYPE
def test_close_to_float64_on_the_gpu(form: Form, dtype: torch.dtype) -> None:
    lens = [1, 2, 3, 17, 63, 64, 65, 127, 255, 256, 257, 300, 1000, 2049]
    check_parity(build(form, lens, 32, dtype))
    check_parity(build(replace(form, window=128), lens, 16, dtype, has_sinks=True))
    check_parity(build(replace(form, soft_cap=3.0), lens, 256, dtype))


@on_gpu
def test_long_contexts_on_the_gpu() -> None:
    check_parity(build(QWEN, [4100, 9000], 32, torch.float16))


@on_gpu
@EVERY_SHAPE
@EVERY_TYPE
def test_a_row_is_the_same_in_any_company_on_the_gpu(form: Form, dtype: torch.dtype) -> None:
    rng = random.Random(1)
    lens = [1, 2, *(rng.randint(1, 700) for _ in range(61)), 9000]
    check_company(build(form, lens, 32, dtype), 40)
    check_company(build(replace(form, window=200, soft_cap=4.0), lens, 16, dtype, has_sinks=True), 20)


@on_gpu
@EVERY_SHAPE
def test_chunks_of_any_length_give_the_same_bits(form: Form) -> None:
    world = build(form, [900], 32, torch.float16)
    expected = all_rows(world)[0]
    for size in (*range(1, 34), 63, 64, 65, 127, 128, 129, 200, 255, 256, 257, 300):
        rows = [run(world, [(0, first, min(first + size, 900))])[0] for first in range(0, 900, size)]
        assert torch.equal(torch.cat(rows), expected), size


@on_gpu
@EVERY_SHAPE
@EVERY_TYPE
def test_shared_splits_give_the_bits_of_one_program_on_the_gpu(form: Form, dtype: torch.dtype) -> None:
    lens = [1, 64, 255, 256, 257, 511, 512, 513, 2000, 9000]
    check_parts(build(form, lens, 32, dtype), [2, 3, 7, 36])
    check_parts(build(replace(form, window=700), lens, 32, dtype, has_sinks=True), [2, 5])


@on_gpu
@EVERY_SHAPE
@EVERY_TYPE
def test_tiles_of_any_shape_give_the_same_bits(form: Form, dtype: torch.dtype) -> None:
    """Few rows use one kind of tensor core instruction, many another; warps divide rows or columns."""
    world = build(form, [70, 1, 513, 900], 32, dtype)
    chunks = [(s, 0, len(q)) for s, q in enumerate(world.q)]
    q = torch.cat(world.q)
    expected = torch.cat(all_rows(world))
    expected[70] = math.nan
    for rows, num_warps, num_stages in [
        (16, 1, 2),
        (16, 4, 5),
        (32, 4, 2),
        (64, 4, 3),
        (64, 8, 2),
        (128, 4, 2),
        (128, 8, 3),
    ]:
        if rows < form.group:
            continue
        out = torch.full_like(q, math.nan)
        call = Call(out, q, *world.cache, pages_of(world, chunks), form, None)
        kernels.launch_prompts(call, PromptLaunch(rows, num_warps, num_stages))
        assert torch.equal(out.nan_to_num(), expected.nan_to_num()), (rows, num_warps, num_stages)


@on_gpu
def test_padding_and_a_captured_batch() -> None:
    """A graph captured for short contexts, replayed for other sequences and long ones."""
    world = build(LLAMA, [5, 400, 9000, 300], 32, torch.float16)
    check_padding(world)
    width = len(world.tables[2])
    chunks = [(s, len(q) - 1, len(q)) for s, q in enumerate(world.q)]
    pages = pages_of(world, [chunks[0]] * 4, width)
    q = torch.cat([world.q[0][4:5]] * 4)
    FLASH.attend(q, *world.cache, pages, LLAMA)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = FLASH.attend(q, *world.cache, pages, LLAMA)
    fresh = pages_of(world, chunks, width)
    q.copy_(torch.cat([world.q[s][-1:] for s in range(4)]))
    pages.context_lens.copy_(fresh.context_lens)
    pages.block_table.copy_(fresh.block_table)
    graph.replay()
    assert torch.equal(out, torch.cat([rows[-1:] for rows in all_rows(world)]))


@pytest.mark.parametrize("form", [SMALL, PHI, QWEN])
def test_all_decodes_are_compiled_before_they_come(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, begun = FLASH._gpu, set[Source]()
    world = build(form, [3], 16, torch.float16)
    monkeypatch.setattr(gpu, "compile_ahead", begun.add)
    monkeypatch.setattr(gpu, "launch", lambda *_: None)
    flash = FlashAttention(gpu, Ops(gpu))
    flash.attend(world.q[0][-1:], *world.cache, pages_of(world, [(0, 2, 3)]), form)
    for num_seqs, splits in ((1, 1), (3, 3), (5, 1), (16, 40), (100, 2), (150, 9), (256, 300)):
        launch = decode_launch(form, num_seqs, splits, gpu.card)
        assert decode_source(form.head_dim, torch.float16, 16, launch, 0) in begun
