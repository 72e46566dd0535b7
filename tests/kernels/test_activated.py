"""act(gate) · up at the end of the matmul: bit for bit what the matmul and the activation by itself give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import NO_COMPILER, NO_GPU, watch
from tests.kernels.emulator.gpu import EmulatedGpu
from tests.kernels.weights import matrix_of, random, random_raw
from worker_orcd.backends.base import Experts, Operand
from worker_orcd.backends.cuda import CudaBackend
from worker_orcd.gguf.types import GgmlType
from worker_orcd.kernels.driver import Argument
from worker_orcd.kernels.gpu import Gpu
from worker_orcd.kernels.linear.linear import Linear
from worker_orcd.kernels.linear.plan import ManyTokens, plan_linear
from worker_orcd.kernels.ops.experts import ExpertOps, Grouped
from worker_orcd.kernels.ops.ops import Activation, Ops, Part

Q4_K, Q8_0, MXFP4 = GgmlType.Q4_K, GgmlType.Q8_0, GgmlType.MXFP4


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("emulated", marks=NO_COMPILER),
        pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU]),
    ],
)
def hopper(request: pytest.FixtureRequest) -> Gpu:
    if request.param == "emulated":
        return EmulatedGpu(shared_bytes=227 * 1024, has_wgmma=True)
    gpu = Gpu(torch.device("cuda", 0))
    if not gpu.card.has_wgmma:
        pytest.skip("this GPU has no wgmma")
    return gpu


def rows_of(image: Tensor, rows: Tensor) -> Tensor:
    """Those of an image, padding and all; what lies where in a row depends on its place among 8."""
    rows = rows.to(image.device)
    units = image.permute(1, 2, 0, 3).flatten(0, 1)[rows].unflatten(2, (8, 8))
    straight = torch.arange(8, device=rows.device) ^ (rows & 7)[:, None]
    return units.gather(2, straight[:, None, :, None].expand(units.shape)).flatten(1).view(torch.int16)


def variant_of(tokens: int, warpgroups: int = 2, sequential: bool = True) -> ManyTokens:
    return ManyTokens(tokens, warpgroups, 2, 3, sequential)


CASES = [  # format, F, K, slices, rows, tokens of a block, warpgroups, activation
    (Q4_K, 192, 512, 2, 17, 32, 2, "silu"),
    (Q4_K, 384, 1024, 3, 33, 32, 4, "silu"),
    (Q4_K, 256, 512, 2, 256, 256, 2, "gelu_tanh"),
    (Q4_K, 64, 256, 1, 300, 256, 2, "gelu"),
    (MXFP4, 320, 384, 3, 100, 128, 2, "clamped"),
    (MXFP4, 192, 160, 1, 65, 24, 2, "clamped"),
    (Q8_0, 512, 256, 2, 64, 64, 4, "silu"),
]


@pytest.mark.parametrize(("kind", "f", "k", "slices", "num_rows", "tokens", "warpgroups", "activation"), CASES)
def test_the_bits_of_two_launches(
    kind: GgmlType, f: int, k: int, slices: int, num_rows: int, tokens: int, warpgroups: int, activation: Activation,
    hopper: Gpu,
) -> None:  # fmt: skip
    """The sums come from few rows at a time, where no wgmma is."""
    linear, ops = Linear(hopper), Ops(hopper)
    matrix, x = matrix_of(hopper, kind, (2 * f, k), slices), random(hopper, num_rows, k)
    few = [linear(ops.to_image(x[i : i + 16]), len(x[i : i + 16]), matrix) for i in range(0, num_rows, 16)]
    variant = matrix.plan.activated(variant_of(tokens, warpgroups, sequential=slices > 1), activation)
    assert variant is not None
    for bias in (None, random(hopper, 2 * f)):
        expected = ops.activate([Part(torch.cat(few, 1), bias)], f, activation)
        found = linear.activated(ops.to_image(x), num_rows, matrix, bias, variant)
        assert found.shape == expected.shape
        rows = torch.arange(num_rows)
        assert torch.equal(rows_of(found, rows), rows_of(expected, rows))


def crowded(gpu: Gpu, num_rows: int) -> Part:
    """Scores by which expert 0 has every row, expert 2 none, and the others some."""
    scores = random(gpu, 1, num_rows, 5)
    scores[..., 0], scores[..., 2] = 9.0, -9.0
    return Part(scores)


UNITS = [  # format, F, K, slices, rows, sizes of units
    (MXFP4, 192, 384, 3, 70, (0, 24)),
    (Q4_K, 192, 512, 1, 70, (0, 32)),
    (MXFP4, 192, 384, 3, 70, (24, 48)),
    (Q4_K, 192, 512, 1, 70, (16, 32)),
    (MXFP4, 128, 384, 3, 110, (16, 96)),  # 4 warpgroups
]


@pytest.mark.parametrize(("kind", "f", "k", "slices", "num_rows", "sizes"), UNITS)
def test_experts_have_the_bits_of_two_launches(
    kind: GgmlType, f: int, k: int, slices: int, num_rows: int, sizes: tuple[int, int], hopper: Gpu
) -> None:
    """And of units of 8 rows, whatever the sizes."""
    ops = Ops(hopper)
    experts, scores = ExpertOps(hopper, ops), [crowded(hopper, num_rows)]
    routing, small = experts.route(scores, 5, 2, True, sizes), experts.route(scores, 5, 2, True, (0, 8))
    assert [region.unit for region in routing.regions] == [size for size in reversed(sizes) if size]
    assert all(region.owners[0] >= 0 for region in routing.regions), "none is empty"
    assert (routing.owners != 2).all()
    matrix = matrix_of(hopper, kind, (2 * f, k), slices, 5)
    bias = random(hopper, 5 * 2 * f) if slices > 1 else None
    image, rows = ops.to_image(random(hopper, num_rows, k)), routing.places.long()
    spread = experts.spread(image, routing)
    expected = ops.activate(
        [experts.multiply(experts.spread(image, small), matrix, bias, small)], f, "clamped", places=small.places
    )
    sums = experts.multiply(spread, matrix, bias, routing)
    two = ops.activate([sums], f, "clamped", places=routing.places)
    one = experts.up(spread, matrix, bias, routing, "clamped")
    assert one is not None
    for found in (two, one):
        assert torch.equal(rows_of(found, rows), rows_of(expected, small.places.long()))


@pytest.mark.parametrize("unit", [24, 48])
def test_slices_of_experts_may_lie_side_by_side(unit: int, hopper: Gpu) -> None:
    """Where a unit has fewer rows than there are, too."""
    experts = ExpertOps(hopper, Ops(hopper))
    matrix, num_rows = matrix_of(hopper, MXFP4, (128, 384), 3, 5), 40
    routing = experts.route([crowded(hopper, num_rows)], 5, 2, True, (0, unit))
    image = experts.spread(Ops(hopper).to_image(random(hopper, num_rows, 384)), routing)
    apart = Grouped(ManyTokens(unit, 2, 2, 3, sequential=False), 1)
    sums = [experts.multiply(image, matrix, None, routing, how) for how in (None, apart)]
    assert [len(part.slices) for part in sums] == [1, 3]
    assert torch.equal(*(experts.combine(part, routing) for part in sums))


@pytest.mark.parametrize(("sizes", "turns"), [((0, 16), [0]), ((16, 32), [1, 2])])
def test_the_first_of_two_launches_is_for_large_units(
    sizes: tuple[int, int], turns: list[int], hopper: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of them waits for what is a matter of `turn`; an emulated GPU would not notice."""
    experts, launched = ExpertOps(hopper, Ops(hopper)), list[tuple[tuple[str, ...], Argument]]()
    routing = experts.route([crowded(hopper, 70)], 5, 2, True, sizes)
    matrix = matrix_of(hopper, MXFP4, (128, 128), 1, 5)
    image = experts.spread(Ops(hopper).to_image(random(hopper, 70, 128)), routing)
    monkeypatch.setattr(hopper, "launch", lambda source, *more: launched.append((source.options, more[-1][8])))
    experts.multiply(image, matrix, None, routing)
    units = sorted(filter(None, sizes), reverse=True)
    for (options, given), turn, tokens in zip(launched, turns, units, strict=True):
        assert f"-DTOKENS={tokens}" in options
        assert given == turn


def test_a_backend_takes_one_launch_where_it_can(hopper: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CudaBackend(hopper.device, hopper)
    raws = [random_raw(Q4_K, 192, 256, str(hopper.device), seed=seed) for seed in (0, 1)]
    gate, up = (backend.pack(raw, Q4_K, (192, 256)) for raw in raws)
    joined = backend.join([gate, up])
    assert joined is not None
    down = backend.pack(random_raw(Q8_0, 64, 192, str(hopper.device)), Q8_0, (64, 192))
    x, launched, names = random(hopper, 40, 256), watch(hopper, monkeypatch), list[str]()

    def found(rows: Tensor, *weights: object) -> Tensor:
        operand = Operand(backend._ops.to_image(rows), *rows.shape)
        launched.clear()
        given = backend.mlp(operand, tuple((w, None) for w in weights), ((down, None),), "silu")  # type: ignore[misc]
        names[:] = launched
        return backend.total(given)

    whole = found(x, joined)
    assert names == ["qgemm", "qgemm"]
    assert torch.equal(found(x, gate, up), whole)
    assert torch.equal(found(x[:5], joined), whole[:5])
    assert names == ["qmm", "activate", "qmm"]


def test_experts_of_a_backend_take_one_launch_where_they_can(hopper: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CudaBackend(hopper.device, hopper)

    def weight(n: int, k: int) -> object:
        return backend.pack(random_raw(MXFP4, n, k, str(hopper.device), seed=n), MXFP4, (n, k))

    gate, up = weight(3 * 64, 128), weight(3 * 64, 128)
    router, joined, down = weight(3, 128), backend.join([gate, up], 3), weight(3 * 128, 64)  # type: ignore[list-item]
    given = ((gate, None), (up, None)), ((joined, None),)
    x = random(hopper, 60, 128)
    launched, found = watch(hopper, monkeypatch), []
    for gate_up in given:
        experts = Experts(3, 2, True, ((router, None),), gate_up, ((down, None),), "clamped")  # type: ignore[arg-type]
        launched.clear()
        found.append(backend.total(backend.experts(Operand(backend._ops.to_image(x), *x.shape), experts)))
        assert launched.count("activate") == (gate_up is given[0])
    assert torch.equal(*found)


def test_what_takes_two_launches(hopper: Gpu) -> None:
    plan = plan_linear(384, 512, Q4_K, 2)
    assert plan.activated(plan.variant(16, hopper.card), "silu") is None, "few rows"
    assert plan.activated(variant_of(64, sequential=False), "silu") is None, "partial sums"
    assert plan.activated(variant_of(64, 1), "silu") is None, "no half"
    assert plan.activated(variant_of(32, 4), "silu") is None, "192 columns, where a block has 128"
    assert plan_linear(416, 512, Q4_K, 2).activated(variant_of(64), "silu") is None, "208 columns"


def test_a_bias_of_another_length_is_refused(hopper: Gpu) -> None:
    matrix = matrix_of(hopper, Q4_K, (384, 256), 1)
    image = Ops(hopper).to_image(random(hopper, 20, 256))
    with pytest.raises(ValueError, match=r"bias \(192,\) for 384 rows"):
        Linear(hopper).up(image, 20, matrix, random(hopper, 192), "silu")
