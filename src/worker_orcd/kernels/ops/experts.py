"""Launching a mixture of experts: each row's experts, and products of rows with the matrices of their own.

Pairs (row, slot) get places in units, each of one expert; the grouped matmul takes a unit at a time. Many rows have
units of two sizes, each with a launch of its own: a router is far from even, and a large unit costs less than several
small ones, but more than one. Shapes depend on the number of rows alone, never on where the router sends them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from worker_orcd.kernels.driver import Argument
from worker_orcd.kernels.gpu import Gpu, Work
from worker_orcd.kernels.linear.linear import TiledMatrix, kernel_of, made_of
from worker_orcd.kernels.linear.plan import (
    MULTIPROCESSORS,
    WARPS_PER_SM,
    FewTokens,
    LinearPlan,
    ManyTokens,
    Variant,
)
from worker_orcd.kernels.ops.ops import MAX_GRID_Y, ROW_THREADS, Activation, Ops, Part, activate_source, image_shape
from worker_orcd.kernels.source import Source, defined
from worker_orcd.quant.tiles import tile_bytes

MAX_EXPERTS, MAX_USED = 256, 16
ARRANGERS = 1024  # threads, of experts.cu
TOGETHER_ROWS = ARRANGERS // 32  # that one block both routes, a warp each, and arranges
UNITS = {False: (8, 16, 32), True: (8, 24)}  # rows, where all units are alike; without and with wgmma
SMALL_UNITS = (24, 32, 48, 64)  # for wgmma, beside others twice as large
MANY_ROWS = 16  # units from here on are for wgmma
MOST_STRIPS = 3  # of a warp
FEW_PAIRS = 128  # for which a thread copies 16 bytes; beyond, four times as many
WARPS = WARPS_PER_SM * MULTIPROCESSORS
WAVES = 2.4  # of so many warps: fewer leave multiprocessors idle at the end, more begin too often; measured


class Grouped(NamedTuple):
    """How units are multiplied; nothing in it changes a bit of the result."""

    variant: Variant
    blocks: int  # that share the strips of an expert


class _Row(NamedTuple):
    """How qgemm takes units of up to `rows`, of a format of up to `words` registers a tile."""

    words: int
    rows: int
    warpgroups: int
    depth: int
    stages: int
    ctas: int

    def fits(self, words: int, rows: int) -> bool:
        return words <= self.words and rows <= self.rows


GROUPED = (  # the first that fits; as measured for MXFP4, else as registers allow
    _Row(9, 32, 2, 2, 3, 3),
    _Row(9, 64, 2, 2, 3, 2),
    _Row(9, 128, 4, 2, 6, 1),  # many rows share weights among as many rows of a matrix as registers allow
    _Row(18, 48, 2, 2, 3, 2),
    _Row(31, 64, 2, 2, 3, 1),
    _Row(31, 128, 2, 2, 6, 1),
    _Row(64, 64, 2, 1, 3, 1),
    _Row(64, 128, 2, 1, 6, 1),
)


class Region(NamedTuple):
    """Units of one size, those in use before the others; a launch of the grouped matmul."""

    first: int  # place
    unit: int  # rows
    owners: Tensor  # of the units
    filled: Tensor  # rows of each unit that are anybody's

    @property
    def num_places(self) -> int:
        return len(self.owners) * self.unit


class _Units(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int) for name in ("smalls", "larges", "small", "large"))


@dataclass(frozen=True)
class Routing:
    """Where the rows go."""

    weights: Tensor  # f32 [T, used]
    places: Tensor  # i32 [T used], the place of each pair
    experts: Tensor  # i32 [P], whose place it is, or -1
    owners: Tensor  # i32 [units], expert or -1
    regions: tuple[Region, ...]  # one, or two: the larger units, which are launched first, and the smaller
    num_experts: int
    source: Source

    @property
    def num_places(self) -> int:
        return len(self.experts)

    @property
    def is_single(self) -> bool:
        """One row, which its experts take as it is: each has a unit of its own, the row its first."""
        return len(self.weights) == 1 and self.regions[0].unit == 8

    @property
    def share(self) -> float:
        """Of the experts, that a row takes."""
        return self.weights.shape[1] / self.num_experts


class ExpertOps:
    def __init__(self, gpu: Gpu, ops: Ops) -> None:
        self._gpu, self._ops = gpu, ops
        self._begun = set[LinearPlan]()  # those whose kernels are being compiled

    def route(
        self, scores: Sequence[Part], num_experts: int, num_used: int, over_chosen: bool,
        sizes: tuple[int, int] | None = None,
    ) -> Routing:  # fmt: skip
        """Sums [T, E] → the best `num_used` of each row; weights are a softmax over those, or over all.

        A benchmark may say the `sizes` of units, as `unit_rows` does.
        """
        if not 0 < num_used <= min(num_experts, MAX_USED) or num_experts > MAX_EXPERTS:
            raise ValueError(f"{num_used} of {num_experts} experts; at most {MAX_USED} of {MAX_EXPERTS} are possible")
        num_rows = scores[0].slices.shape[1]
        pairs = num_rows * num_used
        if pairs > MAX_GRID_Y:
            raise ValueError(
                f"{num_rows} rows take {num_used} experts each, {pairs} places; at most {MAX_GRID_Y} fit"
            )
        sums = self._ops.sums(scores, num_rows, num_experts)
        small, large = sizes or unit_rows(pairs, num_experts, self._gpu.card.has_wgmma)
        units = _Units(*unit_counts(pairs, num_experts, small, large), small, large)
        num_units = units.smalls + units.larges
        chosen, places, experts, owners, filled = (
            torch.empty(n, dtype=torch.int32, device=self._gpu.device)
            for n in (pairs, pairs, units.smalls * small + units.larges * large, num_units, num_units)
        )
        weights = torch.empty(num_rows, num_used, device=self._gpu.device)
        source, where = experts_source(num_experts, num_used), [places, experts, owners, filled]
        args: list[Argument] = [sums, chosen, weights]
        if num_rows == 1 and (small, large, num_units) == (0, 8, num_used):
            self._gpu.launch(source, "route_alone", Work((1, 1, 1), 32), [*args, *where, int(over_chosen)])
        elif 0 < num_rows <= TOGETHER_ROWS:
            args += [*where, num_rows, int(over_chosen), units]
            self._gpu.launch(source, "route_and_arrange", Work((1, 1, 1), ARRANGERS), args)
        else:
            self._gpu.launch(source, "route", Work((num_rows, 1, 1), 32), [*args, num_rows, int(over_chosen)])
            args = [chosen, *where, pairs, units]
            self._gpu.launch(source, "arrange", Work((int(num_rows > 0), 1, 1), ARRANGERS), args)
        regions = (
            Region(units.smalls * small, large, owners[units.smalls :], filled[units.smalls :]),
            Region(0, small, owners[: units.smalls], filled[: units.smalls]),
        )
        used = tuple(region for region in regions if len(region.owners))
        return Routing(weights, places, experts, owners, used, num_experts, source)

    def spread(self, image: Tensor, routing: Routing) -> Tensor:
        """The image of T rows → that of P places; that of one row stays as it is, for all its experts."""
        pieces, groups = image.shape[:2]
        self._gpu.require(image, dtype=torch.bfloat16)
        if image.shape[2:] != (8, 64) or groups * 8 < len(routing.weights):
            raise ValueError(f"an image {tuple(image.shape)} for {len(routing.weights)} rows")
        if routing.is_single and groups == 1:
            return image
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
        hows = [how or self._choose(matrix, region.unit, routing) for region in routing.regions]
        count = 1 if all(matrix.plan.is_whole(how.variant) for how in hows) else matrix.plan.slices
        out = torch.empty(count, routing.num_places, matrix.shape[0], device=self._gpu.device)
        self._launch(image, matrix, hows, out, routing, [])
        return Part(out, bias, routing.experts)

    def of_sums(
        self, gate_up: Sequence[Part], kind: Activation, matrix: TiledMatrix, bias: Tensor | None, routing: Routing
    ) -> Part | None:
        """act(gate) · up of each place times the matrix of its expert, in one launch; the same bits.

        None where that takes two: with more than one row.
        """
        if not routing.is_single:
            return None
        self._check_matrix(matrix, bias, routing)
        made, (region,) = made_of(gate_up, kind), routing.regions
        how = self._choose(matrix, region.unit, routing)
        variant = matrix.plan.making(how.variant, made, self._gpu.card)
        if variant is None:
            return None
        self._gpu.compile_ahead(activate_source(gate_up, kind))  # what more rows will take
        sums = self._ops.gate_up(gate_up, matrix.shape[1], kind, is_gated=True)
        out = torch.empty(matrix.plan.slices, routing.num_places, matrix.shape[0], device=self._gpu.device)
        self._launch_region(matrix, how._replace(variant=variant), (sums, matrix.shape[1], out), region, 0, [])
        return Part(out, bias, routing.experts)

    def up(
        self, image: Tensor, matrix: TiledMatrix, bias: Tensor | None, routing: Routing, kind: Activation
    ) -> Tensor | None:
        """The image of act(gate) · up for the places; an expert's matrix is gate above up, `bias` [E N].

        None where that takes two launches: with few rows. The same bits.
        """
        self._check(image, matrix, bias, routing)
        self._begin(matrix, kind)
        hows = list[Grouped]()
        for region in routing.regions:
            variant = self._activated(matrix, region.unit, kind)
            if variant is None:
                return None
            hows.append(Grouped(variant, matrix.shape[0] // (64 * variant.warpgroups)))
        if bias is not None:
            self._gpu.require(bias)
        out = image.new_empty(image_shape(1, matrix.shape[0] // 2)[0], *image.shape[1:])
        self._launch(image, matrix, hows, out, routing, [bias])
        return out

    def _check(self, image: Tensor, matrix: TiledMatrix, bias: Tensor | None, routing: Routing) -> None:
        is_alone = routing.is_single and image.shape[1] == 1
        if image.shape[0] != -(-matrix.shape[1] // 256) * 4 or (
            image.shape[1] * 8 < routing.num_places and not is_alone
        ):
            raise ValueError(f"an image {tuple(image.shape)} for {routing.num_places} rows of {matrix.shape[1]}")
        self._gpu.require(image, dtype=torch.bfloat16)
        self._check_matrix(matrix, bias, routing)

    def _check_matrix(self, matrix: TiledMatrix, bias: Tensor | None, routing: Routing) -> None:
        n = matrix.shape[0]
        if matrix.count != routing.num_experts or (bias is not None and bias.shape != (matrix.count * n,)):
            found = None if bias is None else tuple(bias.shape)
            raise ValueError(
                f"{matrix.count} matrices of {n} rows and a bias {found} for {routing.num_experts} experts"
            )
        self._gpu.require(matrix.tiles, dtype=torch.uint8)

    def _launch(
        self, image: Tensor, matrix: TiledMatrix, hows: Sequence[Grouped], out: Tensor, routing: Routing,
        more: list[Argument],
    ) -> None:  # fmt: skip
        """For each region, from its first place on; `out`, sums or an image, likewise. Large units first: blocks that
        take long are no good end. `more` is what an activation needs.
        """
        rows = 8 if out.ndim == 4 else 1  # of a step of `out`
        for i, (region, how) in enumerate(zip(routing.regions, hows, strict=True)):
            turn = i + 1 if len(hows) > 1 else 0
            groups = image.stride(0) // (8 * 64)  # of the whole image; sums are whole where there are two regions
            operands = image[:, region.first // 8 :], groups, out[:, region.first // rows :]
            is_alone = routing.is_single and groups == 1
            self._launch_region(matrix, how, operands, region, turn, more, is_alone)

    def _launch_region(
        self, matrix: TiledMatrix, how: Grouped, operands: tuple[Argument, int, Tensor], region: Region, turn: int,
        more: list[Argument], is_alone: bool = False,
    ) -> None:  # fmt: skip
        """`operands`: an image and its groups, or what it is made of and its width; where the sums go."""
        (n, _), (variant, blocks), (image, groups, out) = matrix.shape, how, operands
        slices, units = matrix.plan.slices, len(region.owners)
        source, name = kernel_of(matrix.type, variant, matrix.has_half, grouped=True)
        args: list[Argument] = [matrix.tiles, image, out, n, matrix.depth, region.num_places, groups]
        shared = matrix.plan.shared_bytes(variant)
        if isinstance(variant, FewTokens):
            share = region.unit // (8 * variant.groups)
            work = Work((blocks, slices, units * share), variant.warps * 32, shared)
            self._gpu.launch(source, name, work, [*args, region.owners, 0 if is_alone else share])
        else:
            side_by_side = 1 if variant.sequential else slices
            work = Work((blocks, side_by_side, units), variant.warpgroups * 128 + 128, shared)
            self._gpu.launch(source, name, work, [*args, slices, turn, region.owners, region.filled, *more])

    def _begin(self, matrix: TiledMatrix, kind: str = "") -> None:
        """Begin to compile for all units: they will come, and to compile them then would hold up a step."""
        if matrix.plan in self._begun:
            return
        self._begun.add(matrix.plan)
        has_wgmma = self._gpu.card.has_wgmma
        coming = {*UNITS[has_wgmma]}
        if has_wgmma:
            coming |= {*SMALL_UNITS, *(2 * unit for unit in SMALL_UNITS)}
        for unit in sorted(coming):
            found = self._activated(matrix, unit, kind) if kind else None
            variant = found or self._variant(matrix, unit)
            self._gpu.compile_ahead(kernel_of(matrix.type, variant, matrix.has_half, grouped=True)[0])

    def _choose(self, matrix: TiledMatrix, unit: int, routing: Routing) -> Grouped:
        self._begin(matrix)
        variant, strips = self._variant(matrix, unit), -(-matrix.shape[0] // 16)
        if isinstance(variant, ManyTokens):
            return Grouped(variant, -(-strips // (4 * variant.warpgroups)))
        busy = routing.num_experts * (1 - (1 - routing.share) ** len(routing.weights))
        per_warp = min(MOST_STRIPS, max(1, round(busy * strips * matrix.plan.slices / (WAVES * WARPS))))
        return Grouped(variant, -(-strips // (variant.warps * per_warp)))

    def _variant(self, matrix: TiledMatrix, unit: int) -> Variant:
        card, plan, words = self._gpu.card, matrix.plan, tile_bytes(matrix.type) // 128
        if unit >= MANY_ROWS and card.has_wgmma:
            row = next(row for row in GROUPED if row.fits(words, unit))
            return ManyTokens(unit, row.warpgroups, row.depth, row.stages, plan.slices > 1, row.ctas)
        early, groups = unit == 8 and words <= 18, [g for g in (4, 2, 1) if 8 * g <= unit]
        wanted = (FewTokens(g, 4, depth, ctas, early) for g in groups for ctas in (4, 2, 1) for depth in (2, 1))
        return next(few for few in wanted if plan.fits(few, card))

    def _activated(self, matrix: TiledMatrix, unit: int, kind: str) -> ManyTokens | None:
        """The variant with an activation, by whose blocks gate and up must divide: wide ones do so less often."""
        variant, plan = self._variant(matrix, unit), matrix.plan
        if found := plan.activated(variant, kind):
            return found
        return plan.activated(replace(variant, warpgroups=2), kind) if isinstance(variant, ManyTokens) else None

    def combine(self, given: Part, routing: Routing) -> Tensor:
        """What the places gave → rows f32 [T, N], slot by slot in order."""
        num_rows, width = routing.weights.shape[0], given.slices.shape[2]
        if width % 4:
            raise ValueError(f"rows of {width} numbers: a multiple of 4 is needed")
        y = torch.empty(num_rows, width, device=self._gpu.device)
        part = self._ops.part(given, routing.num_places, width)
        args: list[Argument] = [part, routing.places, routing.weights, y, routing.num_places]
        name = "combine_whole" if len(given.slices) == 1 else "combine"
        self._ops.rows(routing.source, name, -(-width // 256), num_rows, ROW_THREADS, args)
        return y


@lru_cache(maxsize=16)
def experts_source(num_experts: int, num_used: int) -> Source:
    return Source("ops", "experts.cu", defined(EXPERTS=num_experts, USED=num_used))


def unit_rows(pairs: int, num_experts: int, has_wgmma: bool) -> tuple[int, int]:
    """Rows of small units, 0 where there are none, and of large ones.

    Alone, a unit holds what an expert has when rows spread evenly, and two deviations more. Of two, the small one
    holds the mean: most experts have about that or less, and those that a router prefers often twice as much.
    """
    mean = pairs / num_experts
    alone = next((unit for unit in UNITS[has_wgmma] if mean + 2 * mean**0.5 <= unit), 0)
    if alone or not has_wgmma:
        return 0, alone or UNITS[has_wgmma][-1]
    small = next((unit for unit in SMALL_UNITS if mean <= unit), SMALL_UNITS[-1])
    return small, 2 * small


def unit_counts(pairs: int, num_experts: int, small: int, large: int) -> tuple[int, int]:
    """The most small and large units that `pairs` can need, however they fall.

    As experts.cu gives units out, an expert has its first large one from small + 1 rows on, and one more for every
    `large` rows beyond. So m experts that have any, with p rows, have m + (p - m (small + 1)) // large at most; this
    grows with m, and more than p // (small + 1) such experts there cannot be.
    """
    most = min(num_experts, pairs // (small + 1))
    return min(num_experts, pairs) if small else 0, most + (pairs - most * (small + 1)) // large
