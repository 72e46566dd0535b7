"""Launching a mixture of experts: each row's experts, and products of rows with the matrices of their own.

Pairs (row, slot) get places, expert by expert, each expert's from a multiple of `unit` rows; the grouped matmul takes
a unit at a time. Shapes depend on the number of rows alone, never on where the router sends them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from worker_orcd.kernels.driver import Argument
from worker_orcd.kernels.gpu import Gpu, Work
from worker_orcd.kernels.linear.linear import TiledMatrix, kernel_of
from worker_orcd.kernels.linear.plan import MULTIPROCESSORS, WARPS_PER_SM, FewTokens, LinearPlan, ManyTokens, Variant
from worker_orcd.kernels.ops.ops import MAX_GRID_Y, ROW_THREADS, Activation, Ops, Part, image_shape, rows_source
from worker_orcd.kernels.source import Source
from worker_orcd.quant.tiles import tile_bytes

MAX_EXPERTS, MAX_USED = 256, 16
ARRANGERS = 1024  # threads, of rows.cu
TOGETHER_ROWS = ARRANGERS // 32  # that one block both routes, a warp each, and arranges
UNITS = {False: (8, 16, 32), True: (8, 16, 24, 32, 40, 48, 64, 96, 128)}  # rows; without and with wgmma
MANY_ROWS = 16  # units from here on are for wgmma
MOST_STRIPS = 3  # of a warp
FEW_PAIRS = 128  # for which a thread copies 16 bytes; beyond, four times as many
SHORT_SLICE = 8  # tiles; expanding the first of them ahead of the wait pays
WARPS = WARPS_PER_SM * MULTIPROCESSORS
WAVES = 2.4  # of so many warps: fewer leave multiprocessors idle at the end, more begin too often; measured


class Grouped(NamedTuple):
    """How units are multiplied; nothing in it changes a bit of the result."""

    variant: Variant
    blocks: int  # that share the strips of an expert


@dataclass(frozen=True)
class Routing:
    """Where the rows go."""

    weights: Tensor  # f32 [T, used]
    places: Tensor  # i32 [T used], the place of each pair
    experts: Tensor  # i32 [P], whose place it is, or -1
    owners: Tensor  # i32 [P / unit]
    unit: int
    num_experts: int
    source: Source

    @property
    def num_places(self) -> int:
        return len(self.experts)

    @property
    def share(self) -> float:
        """Of the experts, that a row takes."""
        return self.weights.shape[1] / self.num_experts


class ExpertOps:
    def __init__(self, gpu: Gpu, ops: Ops) -> None:
        self._gpu, self._ops = gpu, ops
        self._begun = set[LinearPlan]()  # those whose kernels are being compiled

    def route(
        self, scores: Sequence[Part], num_experts: int, num_used: int, over_chosen: bool, unit: int | None = None
    ) -> Routing:
        """Sums [T, E] → the best `num_used` of each row; weights are a softmax over those, or over all.

        A benchmark may say the `unit`.
        """
        if not 0 < num_used <= min(num_experts, MAX_USED) or num_experts > MAX_EXPERTS:
            raise ValueError(f"{num_used} of {num_experts} experts; at most {MAX_USED} of {MAX_EXPERTS} are possible")
        num_rows, device = scores[0].slices.shape[1], self._gpu.device
        source = rows_source(EXPERTS=num_experts, USED=num_used)
        pairs = num_rows * num_used
        if pairs > MAX_GRID_Y:
            raise ValueError(
                f"{num_rows} rows take {num_used} experts each, {pairs} places; at most {MAX_GRID_Y} fit"
            )
        unit = unit or unit_rows(pairs, num_experts, self._gpu.card.has_wgmma)
        num_units = pairs // unit + min(num_experts, pairs)
        chosen, places = (torch.empty(pairs, dtype=torch.int32, device=device) for _ in range(2))
        weights = torch.empty(num_rows, num_used, device=device)
        experts = torch.empty(num_units * unit, dtype=torch.int32, device=device)
        owners = torch.empty(num_units, dtype=torch.int32, device=device)
        sums, where = self._ops.sums(scores, num_rows, num_experts), [places, experts, owners]
        if 0 < num_rows <= TOGETHER_ROWS:
            args: list[Argument] = [sums, chosen, weights, *where, num_rows, int(over_chosen), num_units, unit]
            self._gpu.launch(source, "route_and_arrange", Work((1, 1, 1), ARRANGERS), args)
        else:
            args = [sums, chosen, weights, num_rows, int(over_chosen)]
            self._gpu.launch(source, "route", Work((num_rows, 1, 1), 32), args)
            args = [chosen, *where, pairs, num_units, unit]
            self._gpu.launch(source, "arrange", Work((int(num_rows > 0), 1, 1), ARRANGERS), args)
        return Routing(weights, places, experts, owners, unit, num_experts, source)

    def spread(self, image: Tensor, routing: Routing) -> Tensor:
        """The image of T rows → that of P places."""
        pieces, groups = image.shape[:2]
        self._gpu.require(image, dtype=torch.bfloat16)
        if image.shape[2:] != (8, 64) or groups * 8 < len(routing.weights):
            raise ValueError(f"an image {tuple(image.shape)} for {len(routing.weights)} rows")
        out = image.new_empty(pieces, routing.num_places // 8, 8, 64)
        args: list[Argument] = [image, out, routing.places, pieces * 8, groups, out.shape[1]]
        pairs = len(routing.places)
        name, each = ("spread", 1) if pairs <= FEW_PAIRS else ("spread_many", 4)
        self._ops.rows(routing.source, name, -(-pieces * 8 // (ROW_THREADS * each)), pairs, ROW_THREADS, args)
        return out

    def multiply(
        self, image: Tensor, matrix: TiledMatrix, bias: Tensor | None, routing: Routing, how: Grouped | None = None
    ) -> Part:
        """Each place times the matrix of its expert; `bias` [E N]. A benchmark may say `how`."""
        self._check(image, matrix, bias, routing)
        how = how or self._choose(matrix, routing)
        count = 1 if matrix.plan.is_whole(how.variant) else matrix.plan.slices
        out = torch.empty(count, routing.num_places, matrix.shape[0], device=self._gpu.device)
        self._launch(image, matrix, how, out, routing, [])
        return Part(out, bias, routing.experts)

    def up(
        self, image: Tensor, matrix: TiledMatrix, bias: Tensor | None, routing: Routing, kind: Activation
    ) -> Tensor | None:
        """The image of act(gate) · up for the places; an expert's matrix is gate above up, `bias` [E N].

        None where that takes two launches: with few rows. The same bits.
        """
        self._check(image, matrix, bias, routing)
        self._begin(matrix, kind)
        variant = matrix.plan.activated(self._variant(matrix, routing.unit), kind)
        if variant is None:
            return None
        if bias is not None:
            self._gpu.require(bias)
        out = image.new_empty(image_shape(1, matrix.shape[0] // 2)[0], *image.shape[1:])
        how = Grouped(variant, matrix.shape[0] // (64 * variant.warpgroups))
        self._launch(image, matrix, how, out, routing, [bias])
        return out

    def _check(self, image: Tensor, matrix: TiledMatrix, bias: Tensor | None, routing: Routing) -> None:
        n = matrix.shape[0]
        if image.shape[0] != -(-matrix.shape[1] // 256) * 4 or image.shape[1] * 8 < routing.num_places:
            raise ValueError(f"an image {tuple(image.shape)} for {routing.num_places} rows of {matrix.shape[1]}")
        if matrix.count != routing.num_experts or (bias is not None and bias.shape != (matrix.count * n,)):
            found = None if bias is None else tuple(bias.shape)
            raise ValueError(
                f"{matrix.count} matrices of {n} rows and a bias {found} for {routing.num_experts} experts"
            )
        self._gpu.require(image, dtype=torch.bfloat16)
        self._gpu.require(matrix.tiles, dtype=torch.uint8)

    def _launch(
        self, image: Tensor, matrix: TiledMatrix, how: Grouped, out: Tensor, routing: Routing, more: list[Argument]
    ) -> None:
        """`more` is what the variant's activation needs."""
        (n, _), (_, depth, _), (variant, blocks) = matrix.shape, matrix.tiles.shape, how
        slices, units, share = matrix.plan.slices, len(routing.owners), routing.unit // (8 * variant.groups)
        source, name = kernel_of(matrix.type, variant, grouped=True)
        args: list[Argument] = [matrix.tiles, image, out, n, depth, routing.num_places, image.shape[1]]
        shared = matrix.plan.shared_bytes(variant)
        if isinstance(variant, FewTokens):
            work = Work((blocks, slices, units * share), variant.warps * 32, shared)
            self._gpu.launch(source, name, work, [*args, routing.owners, share])
        else:
            side_by_side = 1 if variant.sequential else slices
            work = Work((blocks, side_by_side, units), variant.warpgroups * 128 + 128, shared)
            self._gpu.launch(source, name, work, [*args, slices, routing.owners, *more])

    def _begin(self, matrix: TiledMatrix, kind: str = "") -> None:
        """Begin to compile for all units: they will come, and to compile them then would hold up a step."""
        if matrix.plan in self._begun:
            return
        self._begun.add(matrix.plan)
        for unit in UNITS[self._gpu.card.has_wgmma]:
            variant = self._variant(matrix, unit)
            found = matrix.plan.activated(variant, kind) if kind else None
            self._gpu.compile_ahead(kernel_of(matrix.type, found or variant, grouped=True)[0])

    def _choose(self, matrix: TiledMatrix, routing: Routing) -> Grouped:
        self._begin(matrix)
        variant, strips = self._variant(matrix, routing.unit), -(-matrix.shape[0] // 16)
        if isinstance(variant, ManyTokens):
            return Grouped(variant, -(-strips // (4 * variant.warpgroups)))
        busy = routing.num_experts * (1 - (1 - routing.share) ** len(routing.weights))
        per_warp = min(MOST_STRIPS, max(1, round(busy * strips * matrix.plan.slices / (WAVES * WARPS))))
        return Grouped(variant, -(-strips // (variant.warps * per_warp)))

    def _variant(self, matrix: TiledMatrix, unit: int) -> Variant:
        card, plan, words = self._gpu.card, matrix.plan, tile_bytes(matrix.type) // 128
        if unit >= MANY_ROWS and card.has_wgmma:
            fits_twice = words <= 18 and unit <= (64 if words <= 9 else 48)
            ctas = 3 if unit <= 24 and words <= 8 else 2 if fits_twice else 1
            depth = 1 if words >= 32 else 3 if ctas == 2 and words <= 9 else 2
            return ManyTokens(unit, 2, depth, 3 if unit <= 64 else 6, plan.slices > 1, ctas)
        early = unit == 8 and words <= 18 and plan.longest_slice_tiles <= SHORT_SLICE
        few = FewTokens(unit // 8, 4, max(1, min(3, 54 // words)), 4 if words < 64 else 2, early)
        while few.groups > 1 and plan.shared_bytes(few) > card.shared_bytes:
            few = replace(few, groups=few.groups // 2)
        return few

    def combine(self, given: Part, routing: Routing) -> Tensor:
        """What the places gave → rows f32 [T, N], slot by slot in order."""
        num_rows, width = routing.weights.shape[0], given.slices.shape[2]
        if width % 4:
            raise ValueError(f"rows of {width} numbers: a multiple of 4 is needed")
        y = torch.empty(num_rows, width, device=self._gpu.device)
        part = self._ops.part(given, routing.num_places, width)
        args: list[Argument] = [part, routing.places, routing.weights, y, routing.num_places]
        self._ops.rows(routing.source, "combine", -(-width // 256), num_rows, ROW_THREADS, args)
        return y


def unit_rows(pairs: int, num_experts: int, has_wgmma: bool) -> int:
    """Rows of an expert multiplied at a time: what one has when rows spread evenly, and two deviations more."""
    mean = pairs / num_experts
    sizes = UNITS[has_wgmma]
    return next((unit for unit in sizes if mean + 2 * mean**0.5 <= unit), sizes[-1])
