"""The matmuls on the device: right within the error of their 16-bit operands, the same bits in any company."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.kernels.weights import dequantized, random_raw
from worker_orcd.gguf.types import GgmlType
from worker_orcd.kernels.linear.linear import Linear, TiledMatrix, check_equal_bits, tiled
from worker_orcd.kernels.linear.plan import FewTokens, ManyTokens, plan_linear
from worker_orcd.quant.format import FORMATS
from worker_orcd.quant.repack import pack

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
EVERY_FORMAT = pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
NUM_ROWS = 300
SOME_T = (1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 200, 255, 256, 257, 299)

FEW = ((1, 4, 2, 2), (2, 8, 1, 1), (3, 8, 1, 1), (4, 4, 1, 1))  # groups, warps, depth, ctas
MANY = ((16, 4, 1, 8), (32, 3, 1, 8), (64, 2, 1, 8), (128, 1, 1, 6), (128, 2, 2, 4), (256, 2, 1, 3))


@pytest.fixture(scope="module")
def linear() -> Linear:
    return Linear(torch.device("cuda", 0))


def shapes(kind: GgmlType) -> list[tuple[int, int]]:
    """Full tiles, and N and K that end inside one; one slice, several even ones, several uneven ones."""
    if kind.block_elems == 256:
        return [(4096, 1024), (1000, 1792), (7, 256), (70000, 256)]
    odd = 416 if kind.block_elems == 32 else 413
    return [(4096, 1024), (1000, odd), (7, 32), (70000, 160)]


def matrix_of(kind: GgmlType, shape: tuple[int, int]) -> tuple[TiledMatrix, Tensor]:
    """A random matrix, and its values in float64 (of the first 512 rows)."""
    raw = random_raw(kind, *shape, device="cuda")
    few = min(shape[0], 512)
    values = dequantized(kind, raw[: few * kind.row_bytes(shape[1])].clone(), few, shape[1])
    return tiled(pack(raw, kind, shape), kind, shape), values


def rows_of(k: int) -> Tensor:
    return torch.randn(NUM_ROWS, k, device="cuda", generator=torch.Generator("cuda").manual_seed(k))


def error(found: Tensor, x: Tensor, values: Tensor) -> float:
    expected = x.double() @ values.T
    return ((found[:, : len(values)].double() - expected).norm() / expected.norm()).item()


def budget(x: Tensor, values: Tensor) -> float:
    """Twice what plain torch loses in bf16."""
    return 2 * error(x.bfloat16() @ values.bfloat16().T, x, values)


@EVERY_FORMAT
def test_close_to_float64_and_the_same_bits_for_every_number_of_rows(kind: GgmlType, linear: Linear) -> None:
    for shape in shapes(kind):
        matrix, values = matrix_of(kind, shape)
        linear.compile_ahead(matrix)
        x = rows_of(shape[1])
        bias = torch.randn(shape[0], device="cuda")
        whole = linear(x, matrix)
        print(kind.name, shape, matrix.plan.slices, f"{error(whole, x, values):.2e} of {budget(x, values):.2e}")
        assert error(whole, x, values) < budget(x, values)
        biased = linear(x, matrix, bias)
        assert torch.equal(biased, whole + bias)
        assert torch.equal(linear(x, matrix), whole), "the same call twice"
        for num_rows in SOME_T:
            chosen = torch.randperm(NUM_ROWS, device="cuda")[:num_rows]
            assert torch.equal(linear(x[chosen], matrix), whole[chosen]), (shape, num_rows)
            assert torch.equal(linear(x[chosen], matrix, bias), biased[chosen]), (shape, num_rows)


@EVERY_FORMAT
@pytest.mark.parametrize("slices", [1, 3, 4])
def test_every_variant_gives_the_same_bits(kind: GgmlType, slices: int, linear: Linear) -> None:
    shape = (1544, 1024)
    matrix, _ = matrix_of(kind, shape)
    matrix = replace(matrix, plan=plan_linear(*shape, kind, slices))
    x = rows_of(shape[1])
    few = [FewTokens(*f, early) for f in FEW for early in (False, True)]
    many = [ManyTokens(*m, sequential) for m in MANY for sequential in (False, True)[: 2 if slices > 1 else 1]]
    variants = [*few, *(many if linear.card.has_wgmma else [])]
    for variant in variants:
        linear._compiled(kind, variant)  # all at once
    expected = None
    for variant in variants:
        image = linear.image(x, matrix, variant.groups)
        is_whole = matrix.plan.is_whole(variant)
        part = torch.full((1 if is_whole else slices, NUM_ROWS, shape[0]), torch.nan, device="cuda")
        linear.multiply(image, matrix, variant, part)
        y = torch.empty(NUM_ROWS, shape[0], device="cuda")
        linear._sum(part, None, y)
        expected = y if expected is None else expected
        assert torch.equal(y, expected), variant


@EVERY_FORMAT
def test_a_row_that_is_not_a_number_stays_alone(kind: GgmlType, linear: Linear) -> None:
    matrix, _ = matrix_of(kind, shapes(kind)[1])
    x = rows_of(matrix.shape[1])[:40]
    expected = linear(x, matrix)
    x[3], x[20, 0] = torch.nan, torch.inf
    for num_rows in (7, 30, 40):
        found = linear(x[:num_rows], matrix)
        assert not found[3].isfinite().any()
        good = [row for row in range(num_rows) if row not in (3, 20)]
        assert torch.equal(found[good], expected[good])


def test_no_rows(linear: Linear) -> None:
    matrix, _ = matrix_of(GgmlType.Q8_0, (64, 256))
    assert linear(torch.empty(0, 256, device="cuda"), matrix).shape == (0, 64)


def test_this_card_adds_in_one_order(linear: Linear) -> None:
    check_equal_bits(linear)


def test_in_a_captured_graph(linear: Linear) -> None:
    matrix, _ = matrix_of(GgmlType.Q4_K, (4096, 1024))
    x = rows_of(1024)[:5].contiguous()
    expected = linear(x, matrix)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x, matrix)
    y.fill_(torch.nan)
    graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (lambda: torch.zeros(2, 255, device="cuda"), r"float32 \[T, 256\]"),
        (lambda: torch.zeros(256, device="cuda"), r"float32 \[T, 256\]"),
        (lambda: torch.zeros(2, 256, device="cuda", dtype=torch.float16), "not torch.float16"),
        (lambda: torch.zeros(256, 2, device="cuda").T, "contiguous"),
        (lambda: torch.zeros(2, 256), "x lies on cpu"),
    ],
)
def test_bad_rows_are_refused_before_a_launch(x: object, message: str, linear: Linear) -> None:
    matrix, _ = matrix_of(GgmlType.Q8_0, (64, 256))
    with pytest.raises(ValueError, match=message):
        linear(x(), matrix)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"the bias must be float32 \[64\]"):
        linear(torch.zeros(1, 256, device="cuda"), matrix, torch.zeros(63, device="cuda"))
