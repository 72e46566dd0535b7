"""A mixture of experts: near the reference, a row the same bits in any company, however rows are spread."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import NO_COMPILER
from tests.kernels.emulator.gpu import EmulatedGpu
from tests.kernels.weights import dequantized, random_raw
from worker_orcd.backends.base import Backend, Experts, Operand, PackedWeight, SharedExpert
from worker_orcd.backends.cuda import CudaBackend
from worker_orcd.backends.torch_ref import TorchBackend
from worker_orcd.gguf.types import GgmlType
from worker_orcd.kernels.gpu import Card, Gpu
from worker_orcd.kernels.linear.linear import tiled
from worker_orcd.kernels.linear.plan import ManyTokens, plan_linear
from worker_orcd.kernels.ops import ops
from worker_orcd.kernels.ops.experts import (
    GROUPED,
    MAX_EXPERTS,
    SMALL_UNITS,
    UNITS,
    ExpertOps,
    Routing,
    unit_counts,
    unit_rows,
)
from worker_orcd.kernels.ops.ops import Ops
from worker_orcd.quant.format import FORMATS
from worker_orcd.quant.repack import pack
from worker_orcd.quant.tiles import tile_bytes

F32 = GgmlType.F32


def random(gpu: Gpu, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + shape[-1])).to(gpu.device)


def expected_choice(scores: Tensor, used: int, over_chosen: bool) -> tuple[Tensor, Tensor]:
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :used]
    over = scores.gather(1, order) if over_chosen else scores
    return order, (scores.gather(1, order) - over.logsumexp(1, keepdim=True)).exp()


def check_places(routing: Routing, counts: list[int]) -> None:
    """`counts`: the rows of each expert."""
    places, experts = routing.places.tolist(), routing.experts.tolist()
    assert len(set(places)) == len(places)
    assert routing.num_places == sum(region.num_places for region in routing.regions)
    units = [region.unit for region in routing.regions]
    large, small = units[0], units[1] if len(units) > 1 else 0
    rests = [small if 0 < n % large <= small else large if n % large else 0 for n in counts]
    needed = {large: sum(n // large + (r == large) for n, r in zip(counts, rests, strict=True))}
    if small:
        needed[small] = rests.count(small)
    for region in routing.regions:
        owners = region.owners.tolist()
        assert all(owner >= 0 for owner in owners[: needed[region.unit]]), "units in use come first"
        assert owners[needed[region.unit] :] == [-1] * (len(owners) - needed[region.unit])
        filled = region.filled.tolist()
        for place in range(region.first, region.first + region.num_places):
            unit, row = divmod(place - region.first, region.unit)
            assert (place in places) == (row < filled[unit])
            assert experts[place] == (owners[unit] if place in places else -1)


@pytest.mark.parametrize(
    ("num_experts", "used", "num_rows"), [(4, 1, 3), (32, 4, 9), (60, 4, 40), (200, 8, 5), (32, 4, 1), (200, 16, 1)]
)
@pytest.mark.parametrize("over_chosen", [False, True])
def test_route(num_experts: int, used: int, num_rows: int, over_chosen: bool, gpu: Gpu) -> None:
    scores = random(gpu, num_rows, num_experts)
    scores[0, 1] = scores[0].max()
    scores[0, 3] = scores[0, 1]  # equal: the lower index goes first
    experts = ExpertOps(gpu, Ops(gpu))
    routing = experts.route([ops.Part(scores[None])], num_experts, used, over_chosen)
    order, weights = expected_choice(scores, used, over_chosen)
    torch.testing.assert_close(routing.weights, weights)
    counts = order.flatten().bincount(minlength=num_experts).tolist()
    for sizes in ((0, 8), (8, 16), (8, 24)):
        routing = experts.route([ops.Part(scores[None])], num_experts, used, over_chosen, sizes)
        assert torch.equal(routing.experts.long()[routing.places.long()].view(num_rows, used), order)
        check_places(routing, counts)


def test_a_size_that_cannot_be_needed_has_no_places(gpu: Gpu) -> None:
    scores = [ops.Part(random(gpu, 1, 10, 1))]
    routing = ExpertOps(gpu, Ops(gpu)).route(scores, 1, 1, True, (16, 32))
    assert [(region.unit, region.owners.tolist()) for region in routing.regions] == [(16, [0])]


def splits(rows: int, experts: int) -> Iterator[tuple[int, ...]]:
    """All ways to share rows among experts, whose order does not matter."""
    if experts == 1:
        yield (rows,)
        return
    for last in range(rows // experts + 1):
        yield from ((last, *(n + last for n in others)) for others in splits(rows - last * experts, experts - 1))


@pytest.mark.parametrize(("small", "large"), [(0, 1), (0, 3), (1, 2), (2, 4), (1, 4), (2, 5)])
def test_units_are_enough_however_rows_fall_and_no_more(small: int, large: int) -> None:
    for pairs in range(18):
        for num_experts in range(1, 5):
            ways = [[(n // large, n % large) for n in counts] for counts in splits(pairs, num_experts)]
            larges = max(sum(whole + (rest > small) for whole, rest in way) for way in ways)
            smalls = max(sum(0 < rest <= small for _, rest in way) for way in ways)
            most = unit_counts(pairs, num_experts, small, large)
            assert most[1] == larges
            assert smalls <= most[0]


def test_a_row_of_no_numbers_gets_experts_all_the_same(gpu: Gpu) -> None:
    scores = random(gpu, 3, 8)
    scores[1] = torch.nan
    routing = ExpertOps(gpu, Ops(gpu)).route([ops.Part(scores[None])], 8, 4, True)
    chosen = routing.experts[routing.places.long()].view(3, 4)
    assert len(set(chosen[1].tolist())) == 4
    assert not routing.weights[1].isfinite().any()
    assert routing.weights[[0, 2]].isfinite().all()


def packed(backend: Backend, kind: GgmlType, n: int, k: int) -> PackedWeight:
    """A matrix of the values that `kind` gives, whatever the backend makes of it."""
    raw = random_raw(kind, n, k, str(backend.device), seed=n)
    if isinstance(backend, TorchBackend):
        values = dequantized(kind, raw, n, k).float()
        return backend.pack(values.contiguous().view(torch.uint8).flatten(), F32, (n, k))
    return backend.pack(raw, kind, (n, k))


def experts_of(backend: Backend, kind: GgmlType, is_shared: bool) -> Experts:
    count, k, f = 8, 256, 96 if kind.block_elems == 32 else 256
    gpu = backend._gpu if hasattr(backend, "_gpu") else backend
    bias = [random(gpu, count * n, seed=i) for i, n in enumerate((f, f, k))]  # type: ignore[arg-type]
    shared = SharedExpert(
        ((packed(backend, F32, 1, k), None),),
        ((packed(backend, F32, f, k), None), (packed(backend, F32, f, k), None)),
        ((packed(backend, F32, k, f), None),),
    )
    return Experts(
        count, 3, True, ((packed(backend, F32, count, k), None),),
        ((packed(backend, kind, count * f, k), bias[0]), (packed(backend, kind, count * f, k), bias[1])),
        ((packed(backend, kind, count * k, f), bias[2]),),
        "silu" if is_shared else "clamped", shared if is_shared else None,
    )  # fmt: skip


@pytest.mark.parametrize("kind", [GgmlType.MXFP4, GgmlType.Q4_K, GgmlType.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("is_shared", [False, True])
def test_experts(kind: GgmlType, is_shared: bool, gpu: Gpu) -> None:
    backend, reference = CudaBackend(gpu.device, gpu), TorchBackend(gpu.device)
    experts, truth = experts_of(backend, kind, is_shared), experts_of(reference, kind, is_shared)
    x = random(gpu, 70 if gpu.device.type == "cuda" else 30, 256)

    def found(rows: Tensor) -> Tensor:
        image = Operand(backend._ops.to_image(rows), *rows.shape)
        return backend.total(backend.experts(image, experts))

    whole = found(x)
    expected = reference.total(reference.experts(Operand(x.bfloat16().float(), *x.shape), truth))
    assert ((whole - expected).norm() / expected.norm()).item() < 6e-3
    for rows in ([0], [5, 3], list(range(4, 21))):
        assert torch.equal(found(x[rows]), whole[rows]), rows


@NO_COMPILER
def test_a_unit_that_shared_memory_cannot_hold_is_taken_in_parts() -> None:
    small, large = EmulatedGpu(shared_bytes=32 * 1024), EmulatedGpu()
    found = []
    for gpu in (small, large):
        ops_ = Ops(gpu)
        experts, x = ExpertOps(gpu, ops_), random(gpu, 40, 1024)
        routing = experts.route([ops.Part(random(gpu, 1, 40, 4))], 4, 4, True)
        assert [region.unit for region in routing.regions] == [32]
        tiles = pack(random_raw(GgmlType.Q8_0, 64, 1024), GgmlType.Q8_0, (64, 1024))
        matrix = replace(tiled(tiles, GgmlType.Q8_0, (16, 1024), 4), plan=plan_linear(16, 1024, GgmlType.Q8_0, 1))
        given = experts.multiply(experts.spread(ops_.to_image(x), routing), matrix, None, routing)
        found.append(experts.combine(given, routing))
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_a_multiprocessor_has_room_for_its_blocks_of_any_unit(kind: GgmlType) -> None:
    """Activated or not."""
    card, plan = Card(has_wgmma=True, shared_bytes=227 * 1024), plan_linear(256, 2816, kind, 2)
    for unit in sorted({*UNITS[True], *SMALL_UNITS, *(2 * unit for unit in SMALL_UNITS)} - {8}):
        row = next(row for row in GROUPED if row.fits(tile_bytes(kind) // 128, unit))
        variant = ManyTokens(unit, row.warpgroups, row.depth, row.stages, sequential=True, ctas=row.ctas)
        activated = plan.activated(variant, "clamped")
        assert activated is not None
        assert plan.fits(variant, card)
        assert plan.fits(activated, card)


def test_units_hold_about_what_an_expert_has() -> None:
    found = [unit_rows(pairs, 32, True) for pairs in (4, 128, 129, 256, 320, 512, 768, 1024, 8192)]
    assert found == [(0, 8), (0, 8), (0, 24), (0, 24), (0, 24), (0, 24), (24, 48), (32, 64), (64, 128)]
    assert [unit_rows(pairs, 32, False) for pairs in (4, 129, 512, 8192)] == [(0, 8), (0, 16), (0, 32), (0, 32)]


def test_what_does_not_match_is_refused_before_a_launch(gpu: Gpu) -> None:
    experts, scores = ExpertOps(gpu, Ops(gpu)), [ops.Part(random(gpu, 1, 2, 8))]
    for count, used in ((8, 9), (8, 0), (MAX_EXPERTS + 1, 2)):
        with pytest.raises(ValueError, match="are possible"):
            experts.route(scores, count, used, True)
    with pytest.raises(ValueError, match="columns are needed"):
        experts.route(scores, 7, 2, True)
