"""Operands that a matmul makes of the sums before it: bit for bit what the activation by itself leaves for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import watch
from tests.kernels.weights import matrix_of, random, random_raw
from worker_orcd.backends.base import Operand
from worker_orcd.backends.cuda import CudaBackend
from worker_orcd.gguf.types import GgmlType
from worker_orcd.kernels.gpu import Gpu
from worker_orcd.kernels.linear.linear import Linear, made_of
from worker_orcd.kernels.linear.plan import FewTokens, Made, plan_linear
from worker_orcd.kernels.ops.experts import ExpertOps
from worker_orcd.kernels.ops.ops import Activation, Ops, Part

Q4_K, Q8_0, MXFP4, F16 = GgmlType.Q4_K, GgmlType.Q8_0, GgmlType.MXFP4, GgmlType.F16


CASES = [  # format, N, F, slices of the matrix, of the sums, activation, gated
    (Q4_K, 40, 1024, 2, 2, "silu", True),
    (Q4_K, 100, 768, 3, 1, "gelu_tanh", True),
    (Q8_0, 33, 288, 2, 3, "silu", True),
    (Q8_0, 33, 288, 1, 5, "gelu", True),
    (MXFP4, 64, 160, 1, 2, "clamped", True),
    (F16, 64, 516, 2, 4, "gelu", False),
    (Q4_K, 64, 256, 1, 1, "gelu_tanh", False),
]


@pytest.mark.parametrize(("kind", "n", "f", "slices", "summed", "activation", "is_gated"), CASES)
def test_the_bits_of_two_launches(
    kind: GgmlType, n: int, f: int, slices: int, summed: int, activation: Activation, is_gated: bool,
    gpu: Gpu,
) -> None:  # fmt: skip
    linear, ops, matrix = Linear(gpu), Ops(gpu), matrix_of(gpu, kind, (n, f), slices)
    width = f * (1 + is_gated)
    for parts in (
        [Part(random(gpu, summed, 1, width), random(gpu, width))],
        [Part(random(gpu, summed, 1, f)), Part(random(gpu, 2, 1, f), random(gpu, f))][: 1 + is_gated],
    ):
        expected = linear(ops.activate(parts, f, activation, is_gated), 1, matrix)
        found = linear.of_sums(parts, activation, is_gated, matrix)
        assert found is not None
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "variant",
    [
        FewTokens(1, 8, 2, 1, early=True, is_long=True),
        FewTokens(1, 4, 1, 2, early=False, has_tiles_in_registers=True),
        FewTokens(1, 8, 1, 1, early=False),
    ],
)
def test_every_variant_has_them(variant: FewTokens, gpu: Gpu) -> None:
    ops, matrix = Ops(gpu), matrix_of(gpu, Q4_K, (70, 1536), 2)
    parts, linear = [Part(random(gpu, 3, 1, 2 * 1536))], Linear(gpu)
    image = ops.activate(parts, 1536)
    expected = linear(image, 1, matrix)
    found = torch.full((2, 1, 70), torch.nan, device=gpu.device)
    linear.multiply_sums(parts, matrix, replace(variant, made=made_of(parts, "silu")), found)
    assert torch.equal(found, expected)


def test_what_takes_two_launches(gpu: Gpu) -> None:
    linear, matrix = Linear(gpu), matrix_of(gpu, Q8_0, (33, 288), 1)

    def found(num_rows: int, slices: int) -> Tensor | None:
        return linear.of_sums([Part(random(gpu, slices, num_rows, 2 * 288))], "silu", True, matrix)

    assert found(1, 6) is not None
    assert found(1, 7) is None, "14 numbers for each column"
    assert found(2, 1) is None, "two rows"
    plan, card = plan_linear(64, 8192, Q8_0, 2), replace(gpu.card, shared_bytes=99 * 1024)
    variant = FewTokens(1, 4, 1, 2, early=True)
    assert plan.fits(variant, card) is False
    assert plan.making(variant, Made("silu", 6, 6), card) is None, "4,096 inputs with 12 numbers each"
    made = plan.making(variant, Made("silu", 2, 2), card)
    assert made is not None
    assert made.ctas == 1, "less room than an image of eight rows would take, and more than for two blocks"


@pytest.mark.parametrize("used", [1, 4])
def test_experts_have_the_bits_of_two_launches(used: int, gpu: Gpu) -> None:
    ops = Ops(gpu)
    experts = ExpertOps(gpu, ops)
    routing = experts.route([Part(random(gpu, 1, 1, 5))], 5, used, True)
    bias = random(gpu, 5 * 2 * 160)
    matrix, own_bias = matrix_of(gpu, MXFP4, (48, 160), 2, 5), random(gpu, 5 * 48)
    up = [Part(random(gpu, 3, routing.num_places, 2 * 160), bias, routing.experts)]
    image = ops.activate(up, 160, "clamped", places=routing.places)
    expected = experts.combine(experts.multiply(image, matrix, own_bias, routing), routing)
    given = experts.of_sums(up, "clamped", matrix, own_bias, routing)
    assert given is not None
    assert torch.equal(experts.combine(given, routing), expected)


@pytest.mark.parametrize("used", [1, 3])
def test_one_row_needs_no_places_of_its_own(used: int, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its experts take it as it lies there, and it has the bits that it has beside another."""
    ops = Ops(gpu)
    experts, launched = ExpertOps(gpu, ops), watch(gpu, monkeypatch)
    matrix, scores, x = matrix_of(gpu, MXFP4, (48, 160), 2, 5), random(gpu, 1, 2, 5), random(gpu, 2, 160)
    found = []
    for num_rows in (2, 1):
        routing = experts.route([Part(scores[:, :num_rows])], 5, used, True)
        launched.clear()
        image = experts.spread(ops.to_image(x[:num_rows]), routing)
        assert launched == ["to_image", "spread"][:num_rows]
        found.append(experts.combine(experts.multiply(image, matrix, None, routing), routing)[0])
    assert torch.equal(*found)


def test_a_backend_takes_two_launches_for_a_row(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, launched = CudaBackend(gpu.device, gpu), watch(gpu, monkeypatch)
    raw = [random_raw(Q8_0, *shape, str(gpu.device), seed=seed) for seed, shape in enumerate([(192, 128), (64, 96)])]
    up, down = backend.pack(raw[0], Q8_0, (192, 128)), backend.pack(raw[1], Q8_0, (64, 96))
    x, found = random(gpu, 3, 128), []
    for rows in (x, x[:1]):
        operand = Operand(backend._ops.to_image(rows), *rows.shape)
        launched.clear()
        given = backend.mlp(operand, ((up, None),), ((down, None),), "silu")
        assert launched == (["qmm", "activate", "qmm"] if len(rows) > 1 else ["qmm", "qmm"])
        found.append(backend.total(given)[0])
    assert torch.equal(*found)
