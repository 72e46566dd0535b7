"""The matmuls: right within the error of their 16-bit operands, the same bits in any company."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import NO_GPU
from tests.kernels.weights import HALVES, dequantized, random_raw
from worker_orcd.errors import CudaError
from worker_orcd.gguf.types import GgmlType
from worker_orcd.kernels.driver import Argument
from worker_orcd.kernels.gpu import Card, Gpu, Work
from worker_orcd.kernels.linear.linear import Linear, TiledMatrix, check_equal_bits, kernel_of, tiled
from worker_orcd.kernels.linear.plan import FewTokens, LinearPlan, ManyTokens, Variant, plan_linear, plan_pair
from worker_orcd.kernels.ops.ops import Ops, Part, image_shape
from worker_orcd.kernels.source import Source
from worker_orcd.quant import tiles
from worker_orcd.quant.format import FORMATS
from worker_orcd.quant.repack import pack
from worker_orcd.quant.tiles import TILE_K

EVERY_FORMAT = pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
WITH_HALVES = [kind for kind in FORMATS if TILE_K[kind] == 128]
SOME_T = (1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 200, 255, 256, 257, 299)
FEW_T = (1, 8)  # emulated: another variant than the 20 rows of the whole

FEW = ((1, 4, 2, 2), (2, 8, 1, 1), (3, 8, 1, 1), (4, 4, 1, 1), (1, 14, 1, 2), (1, 4, 3, 1))  # groups, warps, depth, …
MANY = ((16, 4, 1, 8), (32, 3, 1, 8), (64, 4, 1, 4), (128, 1, 1, 6), (128, 2, 2, 4), (256, 2, 1, 3))


def is_real(gpu: Gpu) -> bool:
    return gpu.device.type == "cuda"


def shapes(kind: GgmlType, gpu: Gpu) -> list[tuple[int, int]]:
    """Full tiles, and N and K that end inside one; one slice, several even ones, several uneven ones."""
    odd = 1792 if kind.block_elems == 256 else 416 if kind.block_elems == 32 else 413
    if not is_real(gpu):
        return [(70, 256 * (odd // 256) or 256)] if kind.block_elems == 256 else [(70, odd)]
    small = (7, 256) if kind.block_elems == 256 else (7, 32)
    return [(4096, 1024), (1000, odd), small, (70000, 256 if kind.block_elems == 256 else 160)]


def matrix_of(kind: GgmlType, shape: tuple[int, int], gpu: Gpu) -> tuple[TiledMatrix, Tensor]:
    """A random matrix, and its values in float64 (of the first 512 rows)."""
    raw = random_raw(kind, *shape, device=str(gpu.device))
    few = min(shape[0], 512)
    values = dequantized(kind, raw[: few * kind.row_bytes(shape[1])].clone(), few, shape[1])
    return tiled(pack(raw, kind, shape), kind, shape), values


def rows_of(k: int, gpu: Gpu) -> Tensor:
    count = 300 if is_real(gpu) else 20
    return torch.randn(count, k, generator=torch.Generator().manual_seed(k)).to(gpu.device)


def product(gpu: Gpu, x: Tensor, matrix: TiledMatrix, bias: Tensor | None = None) -> Tensor:
    ops = Ops(gpu)
    return ops.total([Part(Linear(gpu)(ops.to_image(x), len(x), matrix), bias)])


def error(found: Tensor, x: Tensor, values: Tensor) -> float:
    expected = x.double() @ values.T
    return ((found[:, : len(values)].double() - expected).norm() / expected.norm()).item()


def budget(x: Tensor, values: Tensor) -> float:
    """Twice what plain torch loses in bf16."""
    return 2 * error(x.bfloat16() @ values.bfloat16().T, x, values)


@EVERY_FORMAT
def test_close_to_float64_and_the_same_bits_for_every_number_of_rows(kind: GgmlType, gpu: Gpu) -> None:
    for shape in shapes(kind, gpu):
        matrix, values = matrix_of(kind, shape, gpu)
        Linear(gpu).compile_ahead(matrix)
        x = rows_of(shape[1], gpu)
        bias = torch.randn(shape[0]).to(gpu.device)
        whole = product(gpu, x, matrix)
        print(kind.name, shape, matrix.plan.slices, f"{error(whole, x, values):.2e} of {budget(x, values):.2e}")
        assert error(whole, x, values) < budget(x, values)
        biased = product(gpu, x, matrix, bias)
        assert torch.equal(biased, whole + bias)
        assert torch.equal(product(gpu, x, matrix), whole), "the same call twice"
        for num_rows in SOME_T if is_real(gpu) else FEW_T:
            chosen = torch.randperm(len(x))[:num_rows]
            assert torch.equal(product(gpu, x[chosen], matrix), whole[chosen]), (shape, num_rows)


@pytest.mark.parametrize("kind", WITH_HALVES, ids=lambda kind: kind.name)
def test_half_a_tile_at_the_end_changes_no_bit(kind: GgmlType, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a vocabulary, which is this small here; in every kind of kernel that a card has."""
    shape = (70, 192 if kind.block_elems == 32 else 150)
    whole, _ = matrix_of(kind, shape, gpu)
    monkeypatch.setattr(tiles, "MANY_ROWS", 1)
    half, _ = matrix_of(kind, shape, gpu)
    assert half.tiles.nbytes == whole.tiles.nbytes * 3 // 4
    x = rows_of(shape[1], gpu)
    for num_rows in (1, 12, 20, *((300,) if is_real(gpu) else ())):
        assert torch.equal(product(gpu, x[:num_rows], half), product(gpu, x[:num_rows], whole)), num_rows


def variants(plan: LinearPlan, gpu: Gpu) -> list[Variant]:
    """Those that shared memory has room for: all, but of 32 bits a weight."""
    few = [FewTokens(*f, early) for f in (FEW if is_real(gpu) else FEW[::2]) for early in (False, True)]
    few += [FewTokens(1, 4, depth, 2, early=depth < 3, has_tiles_in_registers=True) for depth in (1, 2, 3)]
    few += [FewTokens(*f, early=f[0] < 3, is_long=True) for f in FEW]
    many = [ManyTokens(*m, sequential) for m in MANY for sequential in (False, True)[: 2 if plan.slices > 1 else 1]]
    found: list[Variant] = [*few, *many] if gpu.card.has_wgmma else [*few]
    return [variant for variant in found if plan.shared_bytes(variant) <= gpu.card.shared_bytes]


def check_variants(kind: GgmlType, shape: tuple[int, int], slices: int, gpu: Gpu) -> None:
    matrix, _ = matrix_of(kind, shape, gpu)
    matrix = replace(matrix, plan=plan_linear(*shape, kind, slices))
    linear, ops, x = Linear(gpu), Ops(gpu), rows_of(shape[1], gpu)
    for variant in variants(matrix.plan, gpu):
        gpu.compile_ahead(kernel_of(kind, variant, matrix.has_half)[0])  # all at once
    expected, image = None, ops.to_image(x)
    for variant in variants(matrix.plan, gpu):
        count = 1 if matrix.plan.is_whole(variant) else slices
        part = torch.full((count, len(x), shape[0]), torch.nan, device=gpu.device)
        linear.multiply(image, matrix, variant, part)
        y = ops.total([Part(part)])
        expected = y if expected is None else expected
        assert torch.equal(y, expected), variant


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("kind", [GgmlType.Q4_K, GgmlType.Q6_K, GgmlType.MXFP4], ids=lambda kind: kind.name)
def test_no_tile_is_overwritten_before_it_is_read(kind: GgmlType) -> None:
    """Several strips a warp and eight rows to store between them, one launch upon the other; as many rows have it."""
    gpu = Gpu(torch.device("cuda", 0))
    raw = random_raw(kind, 65536, 1024, device="cuda")
    matrix, linear, ops = tiled(pack(raw, kind, (65536, 1024)), kind, (65536, 1024)), Linear(gpu), Ops(gpu)
    x = torch.randn(40, 1024, device="cuda")
    expected, image = product(gpu, x, matrix)[:8], ops.to_image(x[:8])
    for how in ((1, 14, 1, 2, False), (1, 14, 2, 2, False), (1, 4, 2, 4, True), (1, 8, 3, 2, True)):
        found = torch.empty(20, matrix.plan.slices, 8, 65536, device="cuda")
        for part in found:
            linear.multiply(image, matrix, FewTokens(*how), part)
        assert all(torch.equal(ops.total([Part(part)]), expected) for part in found), how


@pytest.mark.gpu
@NO_GPU
@EVERY_FORMAT
@pytest.mark.parametrize("slices", [1, 3, 4])
def test_every_variant_gives_the_same_bits(kind: GgmlType, slices: int) -> None:
    check_variants(kind, (1544, 1024), slices, Gpu(torch.device("cuda", 0)))


@pytest.mark.parametrize(("kind", "slices"), [(GgmlType.Q4_K, 1), (GgmlType.Q6_K, 3), (GgmlType.Q8_0, 3)])
def test_variants_of_some_formats_give_the_same_bits(kind: GgmlType, slices: int, gpu: Gpu) -> None:
    check_variants(kind, (72, 1024), slices, gpu)


PAIRS = [  # formats, slices, K, launches for few rows
    (GgmlType.Q5_0, GgmlType.Q8_0, (1, 1), 416, 1),
    (GgmlType.Q4_K, GgmlType.Q6_K, (3, 2), 1280, 1),
    (GgmlType.Q4_K, GgmlType.Q5_0, (1, 4), 1280, 1),
    (GgmlType.BF16, GgmlType.F32, (4, 1), 413, 1),
    (GgmlType.Q8_0, GgmlType.F16, (2, 1), 416, 2),
]


@pytest.mark.parametrize(("first", "second", "slices", "k", "launches"), PAIRS)
def test_a_pair_gives_the_bits_of_two_calls(
    first: GgmlType,
    second: GgmlType,
    slices: tuple[int, int],
    k: int,
    launches: int,
    gpu: Gpu,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both end inside a tile; emulated, a warp takes several strips. Two launches where registers are not alike."""
    linear, ops, x = Linear(gpu), Ops(gpu), rows_of(k, gpu)
    n = 5004 if is_real(gpu) else 300
    one, two = (
        replace(matrix_of(kind, (n, k), gpu)[0], plan=plan_linear(n, k, kind, count))
        for kind, n, count in zip((first, second), (n, 70), slices, strict=True)
    )
    launched: list[str] = []
    launch = gpu.launch

    def watched(source: Source, name: str, work: Work, args: Sequence[Argument]) -> None:
        launched.append(name)
        launch(source, name, work, args)

    for num_rows in (1, 8, 9, 16, 17):
        image = ops.to_image(x[:num_rows])
        expected = linear(image, num_rows, one), linear(image, num_rows, two)
        with monkeypatch.context() as patched:
            patched.setattr(gpu, "launch", watched)
            found = linear.pair(image, num_rows, one, two)
        assert all(map(torch.equal, found, expected))
        assert len(launched) == (launches if num_rows <= 16 else 2)
        launched.clear()


@pytest.mark.parametrize("num_rows", [1, 16])
@pytest.mark.parametrize(("n", "k"), [((1024, 128), 896), ((5120, 1024), 4096), ((14336, 14336), 4096)])
def test_a_pair_fills_the_card_once(n: tuple[int, int], k: int, num_rows: int) -> None:
    """x of either fits into a block's shared memory, and each matrix has its part of the blocks."""
    plans = plan_linear(n[0], k, GgmlType.Q4_K), plan_linear(n[1], k, GgmlType.Q6_K)
    for first, second in (plans, plans[::-1]):
        pair = plan_pair(first, second, num_rows, Card(True, 227 * 1024), 132)
        assert pair is not None
        for plan in (first, second):
            assert 227 * 1024 >= pair.shared_bytes >= plan.shared_bytes(pair.variant)
        blocks = pair.blocks[0] * first.slices + pair.blocks[1] * second.slices
        assert blocks <= 132 * pair.variant.ctas
        for plan, count in zip((first, second), pair.blocks, strict=True):
            assert plan.shape[0] <= 3 * 16 * count * pair.variant.warps, "more than three strips for a warp"


def test_a_row_that_is_not_a_number_stays_alone(gpu: Gpu) -> None:
    kind = GgmlType.Q5_0
    matrix, _ = matrix_of(kind, shapes(kind, gpu)[-1], gpu)
    x = rows_of(matrix.shape[1], gpu)[:20]
    expected = product(gpu, x, matrix)
    x[3], x[11, 0] = torch.nan, torch.inf
    for num_rows in (7, 16, 20):
        found = product(gpu, x[:num_rows], matrix)
        assert not found[3].isfinite().any()
        good = [row for row in range(num_rows) if row not in (3, 11)]
        assert torch.equal(found[good], expected[good])


def test_no_rows(gpu: Gpu) -> None:
    matrix, _ = matrix_of(GgmlType.Q8_0, (64, 256), gpu)
    assert product(gpu, torch.empty(0, 256, device=gpu.device), matrix).shape == (0, 64)


def test_this_card_adds_in_one_order(gpu: Gpu) -> None:
    check_equal_bits(Linear(gpu), Ops(gpu), gpu.device)


def test_a_card_that_adds_in_another_order_is_refused(gpu: Gpu) -> None:
    class Other(Linear):
        def __call__(self, image: Tensor, num_rows: int, matrix: TiledMatrix) -> Tensor:
            found = super().__call__(image, num_rows, matrix)
            return found.flip(0) * (1 + 1e-7) if num_rows > 8 else found

    with pytest.raises(CudaError, match="adds products in another order"):
        check_equal_bits(Other(gpu), Ops(gpu), gpu.device)


def test_every_code_and_exponent_of_mxfp4_is_exact(gpu: Gpu) -> None:
    """Rows of the identity pick out numbers, from 2^-110, whose operand is bf16's smallest, to the largest."""
    kind, shape = GgmlType.MXFP4, (127, 32)
    raw = torch.empty(shape[0], 17, dtype=torch.uint8)
    raw[:, 0] = torch.arange(shape[0]) + 18
    raw[:, 1:] = torch.arange(16) * 0x11  # each code in both halves of the block
    matrix = tiled(pack(raw.flatten().to(gpu.device), kind, shape), kind, shape)
    found = product(gpu, torch.eye(shape[1], device=gpu.device), matrix)
    assert torch.equal(found.T.double(), dequantized(kind, raw.flatten(), *shape).to(gpu.device))


@pytest.mark.parametrize("kind", HALVES, ids=lambda kind: kind.name)
def test_every_code_is_exact_where_its_scale_is_a_power_of_two(kind: GgmlType, gpu: Gpu) -> None:
    """Rows of the identity pick out numbers; mins are zero, and the small scales of the K formats one."""
    shape = (64, 256)
    raw = random_raw(kind, *shape).view(-1, kind.block_bytes)
    for byte in HALVES[kind]:
        raw[:, byte : byte + 2] = torch.tensor([0.0 if byte == 2 else 2.0**-9]).half().view(torch.uint8)
    if kind in (GgmlType.Q4_K, GgmlType.Q5_K):
        raw[:, 4:16] = torch.tensor([1, 0, 1]).repeat_interleave(4)
    elif kind is GgmlType.Q6_K:
        raw[:, 192:208] = 1
    matrix = tiled(pack(raw.flatten().to(gpu.device), kind, shape), kind, shape)
    found = product(gpu, torch.eye(shape[1], device=gpu.device), matrix)
    assert torch.equal(found.T.double(), dequantized(kind, raw.flatten(), *shape).to(gpu.device))


@pytest.mark.gpu
@NO_GPU
def test_in_a_captured_graph() -> None:
    gpu = Gpu(torch.device("cuda", 0))
    matrix, _ = matrix_of(GgmlType.Q4_K, (4096, 1024), gpu)
    x = rows_of(1024, gpu)[:5].contiguous()
    expected = product(gpu, x, matrix)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = product(gpu, x, matrix)
    y.fill_(torch.nan)
    graph.replay()
    assert torch.equal(y, expected)


def test_a_bad_image_is_refused_before_a_launch(gpu: Gpu) -> None:
    matrix, _ = matrix_of(GgmlType.Q8_0, (64, 256), gpu)
    linear = Linear(gpu)
    for shape, dtype, message in (
        (image_shape(2, 512), torch.bfloat16, "the image of 2 rows of 256"),
        (image_shape(9, 256), torch.bfloat16, "the image of 2 rows of 256"),
        (image_shape(2, 256), torch.float16, "bfloat16 and contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            linear(torch.zeros(shape, dtype=dtype, device=gpu.device), 2, matrix)
    if is_real(gpu):
        with pytest.raises(ValueError, match="lies on cpu"):
            linear(torch.zeros(image_shape(2, 256), dtype=torch.bfloat16), 2, matrix)
